"""Attention of one query an image with the projections of keys and values absorbed: the ResNets' attention pool.

Legend: B images, L tokens, C channels, H heads of K columns, C = H K.

    scores_bhl = ((q_bh W_k,h) x_bl + q_bh b_k,h) / sqrt(K)    instead of q_bh (W_k,h x_bl + b_k,h) / sqrt(K)
    out_bh     = W_v,h (sum_l p_bhl x_bl) + b_v,h              instead of sum_l p_bhl (W_v,h x_bl + b_v,h)

With one query there are H vectors of C numbers to multiply the tokens with, not L keys and L values to make: 4 B H L C +
4 B C^2 FLOP for 4 B L C^2, for RN50 (L = 50, H = 32) 25 times fewer, and x is read twice. Probabilities sum to one, so that
a value's bias is added once. All in plain products, differentiated by autograd; the softmax in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels.attention import pooled_attention

Linear = tuple[Tensor, Tensor]


def attention_pool_ref(q_BHK: Tensor, x_BLC: Tensor, key: Linear, value: Linear) -> Tensor:
    """With keys and values: the reference."""
    kv_BL2C = torch.stack([F.linear(x_BLC, *key), F.linear(x_BLC, *value)], 2)
    return pooled_attention(q_BHK, kv_BL2C.unflatten(-1, (q_BHK.shape[1], -1)))


def attention_pool(q_BHK: Tensor, x_BLC: Tensor, key: Linear, value: Linear) -> Tensor:
    """[B, H, K] queries over tokens [B, L, C] to [B, C].

    Args:
        key, value: (weight [C, C], bias [C]) of a linear layer each.

    Raises:
        ValueError: shapes that do not fit.

    >>> linear = torch.zeros(32, 32), torch.zeros(32)
    >>> attention_pool(torch.zeros(2, 4, 8), torch.zeros(2, 5, 32), linear, linear).shape
    torch.Size([2, 32])
    """
    heads, size = q_BHK.shape[1:]
    width = x_BLC.shape[-1]
    weights = (key[0].shape, value[0].shape)
    if heads * size != width or any(shape != (width, width) for shape in weights):
        raise ValueError(
            f"queries {tuple(q_BHK.shape)}, tokens {tuple(x_BLC.shape)} and weights {[tuple(s) for s in weights]} do not "
            "fit: heads times their size are the channels"
        )
    dtype = q_BHK.dtype  # a linear layer's, autocast's where it is on
    key_HKC, value_HKC = (
        weight.to(dtype).unflatten(0, (heads, size)) for weight, _ in (key, value)
    )
    x_BLC = x_BLC.to(dtype)
    asked_BHC = torch.einsum("bhk,hkc->bhc", q_BHK, key_HKC)
    # The same for all tokens, which the softmax does not see: here for the bias's gradient, which is zero.
    offset_BH = (q_BHK * key[1].to(dtype).unflatten(0, (heads, size))).sum(-1)
    scores_BHL = (asked_BHC @ x_BLC.mT + offset_BH[..., None]) * size**-0.5
    wide = torch.promote_types(dtype, torch.float32)
    weights_BHL = scores_BHL.softmax(-1, dtype=wide).to(dtype)
    pooled_BC = torch.einsum("bhc,hkc->bhk", weights_BHL @ x_BLC, value_HKC).flatten(1)
    return pooled_BC + value[1].to(dtype)
