"""Attention of one query a sequence, with the projections of keys and values absorbed.

The ResNets' attention pool, and the last block of a transformer that is read at one token.

Legend: B sequences, L tokens, C channels, H heads of K columns, C = H K.

    scores_bhl = ((q_bh W_k,h) x_bl + q_bh b_k,h) / sqrt(K)    instead of q_bh (W_k,h x_bl + b_k,h) / sqrt(K)
    out_bh     = W_v,h (sum_l p_bhl x_bl) + b_v,h              instead of sum_l p_bhl (W_v,h x_bl + b_v,h)

With one query, H vectors of C numbers multiply the tokens; L keys and L values need not be computed. That is
4 B H L C + 4 B C^2 FLOP in place of 4 B L C^2: 28 times fewer for RN50 (L = 50, H = 32) and 48 times fewer for ViT-B-16
(L = 197, H = 12), and x is read twice. Probabilities sum to one, so a value's bias is added once. Everything is plain
products, differentiated by autograd; the softmax is float32. No attention kernel of a library is involved: with one
query the backward pass of some is not deterministic, or gives NaN (cudnn-frontend issue 1072).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Linear = tuple[Tensor, Tensor]


def attention_pool_ref(
    q_BHK: Tensor, x_BLC: Tensor, key: Linear, value: Linear, last_B: Tensor | None = None
) -> Tensor:
    """Compute the pool with keys and values. This is the reference."""
    k_BLHK, v_BLHK = (
        F.linear(x_BLC, *layer).unflatten(-1, q_BHK.shape[1:]) for layer in (key, value)
    )
    scores_BHL = torch.einsum("bhk,blhk->bhl", q_BHK, k_BLHK) * q_BHK.shape[-1] ** -0.5
    weights_BHL = _without_unseen(scores_BHL, last_B).softmax(-1)
    return torch.einsum("bhl,blhk->bhk", weights_BHL, v_BLHK).flatten(1)


def attention_pool(
    q_BHK: Tensor, x_BLC: Tensor, key: Linear, value: Linear, last_B: Tensor | None = None
) -> Tensor:
    """Return the attention of queries [B, H, K] over tokens [B, L, C], as [B, C].

    Args:
        key, value: (weight [C, C], bias [C]) of a linear layer each.
        last_B: the last token that each query sees, for causal text; None where it sees all.

    Raises:
        ValueError: shapes do not fit.

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
    if last_B is not None and last_B.shape != q_BHK.shape[:1]:
        raise ValueError(
            f"last must be [{q_BHK.shape[0]}], one for each query, got {tuple(last_B.shape)}"
        )

    dtype = q_BHK.dtype  # a linear layer's, autocast's where it is on
    key_HKC, value_HKC = (
        weight.to(dtype).unflatten(0, (heads, size)) for weight, _ in (key, value)
    )
    x_BLC = x_BLC.to(dtype)

    # In a trace a side of a shape is a tensor, whose power would be float32.
    q_BHK = q_BHK * int(size) ** -0.5
    asked_BHC = torch.einsum("bhk,hkc->bhc", q_BHK, key_HKC)
    # This is the same for all tokens, so the softmax ignores it. It is here to give the bias its gradient, zero.
    offset_BH = (q_BHK * key[1].to(dtype).unflatten(0, (heads, size))).sum(-1)

    wide = torch.promote_types(dtype, torch.float32)
    scores_BHL = (asked_BHC @ x_BLC.mT).to(wide) + offset_BH[..., None].to(wide)
    weights_BHL = _without_unseen(scores_BHL, last_B).softmax(-1).to(dtype)
    pooled_BC = torch.einsum("bhc,hkc->bhk", weights_BHL @ x_BLC, value_HKC).flatten(1)
    return pooled_BC + value[1].to(dtype)


def _without_unseen(scores_BHL: Tensor, last_B: Tensor | None) -> Tensor:
    """Return the scores with -inf where a query does not see the token."""
    if last_B is None:
        return scores_BHL
    token_L = torch.arange(scores_BHL.shape[-1], device=scores_BHL.device)
    return scores_BHL.masked_fill((token_L > last_B[:, None])[:, None], -torch.inf)
