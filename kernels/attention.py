"""Scaled dot-product attention of the encoders, on the packed projection.

Legend: B sequences, L tokens, H heads, K head size.

``o = softmax(q k^T / sqrt(K)) v`` for each sequence and head, causal for text. Reads [B, L, 3, H, K], as one linear
layer writes it, and writes [B, L, H*K], as the next one reads it: with the row sums of the softmax that is
``B L H (4 K + 1)`` numbers forward and about twice as many backward, for ``4 B H L^2 K`` FLOP forward and 2.5 times as
many backward. At CLIP's lengths (50 to 257) it is bound by memory.

``pooled_attention`` computes one query a sequence: the last block of a tower is read at one token, so that the other
queries would be thrown away. It reads keys and values once.

The implementation is torch's scaled_dot_product_attention: nothing of L x L is kept, scores and sums are float32. On the
CPU its kernel takes a task for each sequence and head, which costs more than the work in it where sequences are short;
up to ``SHORT`` tokens batched matrix products are faster, and their L x L scores no larger than the keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SHORT = 32  # tokens, on the CPU: 3.5 times as fast at 5 tokens, 1.4 times at 24, equal at 50


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

    >>> attention(torch.zeros(2, 5, 3, 4, 8), is_causal=True).shape
    torch.Size([2, 5, 32])
    """
    if qkv_BL3HK.ndim != 5 or qkv_BL3HK.shape[2] != 3:
        raise ValueError(f"qkv must be [B, L, 3, H, K], got {tuple(qkv_BL3HK.shape)}")
    exact = qkv_BL3HK.dtype in (torch.float32, torch.float64)
    if qkv_BL3HK.device.type == "cpu" and exact and qkv_BL3HK.shape[1] <= SHORT:
        return _short_attention(qkv_BL3HK, is_causal)
    q_BHLK, k_BHLK, v_BHLK = qkv_BL3HK.permute(2, 0, 3, 1, 4)
    out_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, is_causal=is_causal)
    return out_BHLK.transpose(1, 2).flatten(2)


def _short_attention(qkv_BL3HK: Tensor, is_causal: bool) -> Tensor:
    """By batched products, one matrix a sequence and head (G = B * H of them)."""
    batch, length, _, heads, size = qkv_BL3HK.shape
    q_GLK, k_GLK, v_GLK = qkv_BL3HK.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind()
    offset_LL = qkv_BL3HK.new_zeros(length, length)
    if is_causal:
        offset_LL = offset_LL.fill_(-torch.inf).triu_(1)
    scores_GLL = torch.baddbmm(offset_LL, q_GLK, k_GLK.mT, alpha=size**-0.5)
    out_GLK = torch.bmm(scores_GLL.softmax(-1), v_GLK)
    return out_GLK.unflatten(0, (batch, heads)).transpose(1, 2).flatten(2)


def pooled_attention(q_BHK: Tensor, kv_BL2HK: Tensor, last_B: Tensor | None = None) -> Tensor:
    """Attention of one query a sequence: [B, H, K] and [B, L, 2, H, K] -> [B, H*K].

    Args:
        last_B: the last token that each query sees, for causal text; None where it sees all.

    Raises:
        ValueError: the shapes do not fit each other.

    >>> pooled_attention(torch.zeros(2, 4, 8), torch.zeros(2, 5, 2, 4, 8)).shape
    torch.Size([2, 32])
    """
    batch, heads, size = q_BHK.shape if q_BHK.ndim == 3 else (-1, -1, -1)
    if kv_BL2HK.shape != (batch, *kv_BL2HK.shape[1:2], 2, heads, size):
        raise ValueError(
            f"q must be [B, H, K] and kv [B, L, 2, H, K], got {tuple(q_BHK.shape)} and {tuple(kv_BL2HK.shape)}"
        )
    if last_B is not None and last_B.shape != (batch,):
        raise ValueError(f"last must be [{batch}], one for each query, got {tuple(last_B.shape)}")
    k_BHLK, v_BHLK = kv_BL2HK.permute(2, 0, 3, 1, 4)
    seen_B11L = None
    if last_B is not None:
        seen_BL = torch.arange(kv_BL2HK.shape[1], device=q_BHK.device) <= last_B[:, None]
        seen_B11L = seen_BL[:, None, None]
    q_BH1K = q_BHK.unsqueeze(2)
    return F.scaled_dot_product_attention(q_BH1K, k_BHLK, v_BHLK, attn_mask=seen_B11L).flatten(1)
