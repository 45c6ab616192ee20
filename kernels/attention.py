"""Scaled dot-product attention of the encoders, on the packed projection.

Legend: B sequences, L tokens, Q queries, H heads, K head size.

``o = softmax(q k^T / sqrt(K)) v`` for each sequence and head, causal for text. Reads [B, L, 3, H, K], as one linear
layer writes it, and writes [B, L, H*K], as the next one reads it. 4 B H L^2 K FLOP forward; nothing of L x L is kept.

``pooled_attention`` computes one query a sequence only: the last block of a tower is read at one token, so that the
other queries would be thrown away.

The implementation is torch's scaled_dot_product_attention on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_ref(qkv_BL3HK: Tensor, is_causal: bool = False) -> Tensor:
    """The definition, with its L x L matrix: the reference."""
    q_BHLK, k_BHLK, v_BHLK = qkv_BL3HK.permute(2, 0, 3, 1, 4)
    scores = q_BHLK @ k_BHLK.mT * q_BHLK.shape[-1] ** -0.5
    if is_causal:
        length = scores.shape[-1]
        future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return (scores.softmax(-1) @ v_BHLK).transpose(1, 2).flatten(2)


def attention(qkv_BL3HK: Tensor, is_causal: bool = False) -> Tensor:
    """Attention of every token: [B, L, 3, H, K] -> [B, L, H*K].

    Args:
        is_causal: a token sees itself and those before it.

    Raises:
        ValueError: not the packed layout.
    """
    _check_packed(qkv_BL3HK)
    q_BHLK, k_BHLK, v_BHLK = qkv_BL3HK.permute(2, 0, 3, 1, 4)
    out_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, is_causal=is_causal)
    return out_BHLK.transpose(1, 2).flatten(2)


def pooled_attention(q_BHK: Tensor, kv_BL2HK: Tensor, last_B: Tensor | None = None) -> Tensor:
    """Attention of one query a sequence: [B, H, K] and [B, L, 2, H, K] -> [B, H*K].

    Args:
        last_B: the last token that each query sees, for causal text; None where it sees all.
    """
    k_BHLK, v_BHLK = kv_BL2HK.permute(2, 0, 3, 1, 4)
    scores_BHL = torch.einsum("bhk,bhlk->bhl", q_BHK, k_BHLK) * q_BHK.shape[-1] ** -0.5
    if last_B is not None:
        later_BL = torch.arange(kv_BL2HK.shape[1], device=q_BHK.device) > last_B[:, None]
        scores_BHL = scores_BHL.masked_fill(later_BL[:, None], -torch.inf)
    weights_BHL = scores_BHL.softmax(-1).to(v_BHLK.dtype)
    return torch.einsum("bhl,bhlk->bhk", weights_BHL, v_BHLK).flatten(1)


def _check_packed(qkv_BL3HK: Tensor) -> None:
    if qkv_BL3HK.ndim != 5 or qkv_BL3HK.shape[2] != 3:
        raise ValueError(f"qkv must be [B, L, 3, H, K], got {tuple(qkv_BL3HK.shape)}")
