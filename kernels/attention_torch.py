"""The passes of packed attention by torch's kernels: on the CPU, and on a GPU where our own do not serve.

Legend and contract: attention.py. Nothing of L x L is kept between the passes; the mask of segments is made in each. On a
GPU 16-bit rows without segments that are too long for our kernels go to FlashAttention. The rest there (float32, float64,
packed rows of more than 512 tokens or of head sizes that our kernels lack) takes plain products, some rows at a time,
which is not fast. On the CPU torch serves float64, and every dtype where our own passes (attention_cpu.py) are missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from clipcore.kernels.launch import accumulate_dtype

aten = torch.ops.aten
DENSE_BYTES = 64 * 10**6


def forward(
    qkv_RL3HK: Tensor, is_causal: bool, segments_RL: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (output [R, L, H*K], log-sum-exp [R, H, L])."""
    qkv_RL3HK = _with_whole_heads(qkv_RL3HK)
    q, k, v = _split(qkv_RL3HK)
    if not qkv_RL3HK.is_cuda:
        mask = _mask(qkv_RL3HK, is_causal, segments_RL)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal and mask is None, attn_mask=mask
        )
    elif _takes_flash(qkv_RL3HK, segments_RL):
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[:2]
    else:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
        for rows, scores in _scores(qkv_RL3HK, is_causal, segments_RL):
            lse[rows] = scores.logsumexp(-1)
            out[rows] = (scores.softmax(-1) @ v[rows].to(scores.dtype)).to(out.dtype)
    out = out.transpose(1, 2).flatten(2).contiguous()
    if segments_RL is not None:
        out.masked_fill_(_padding(segments_RL), 0)
    return out, lse.to(accumulate_dtype(out.dtype)).contiguous()


def backward(
    grad_RLD: Tensor,
    qkv_RL3HK: Tensor,
    out_RLD: Tensor,
    lse_RHL: Tensor,
    is_causal: bool,
    segments_RL: Tensor | None,
) -> Tensor:
    """Return the gradient of the packed projection, [R, L, 3, H, K]."""
    qkv_RL3HK = _with_whole_heads(qkv_RL3HK)
    q, k, v = _split(qkv_RL3HK)
    heads = qkv_RL3HK.shape[3]
    if segments_RL is not None:
        grad_RLD = grad_RLD.masked_fill(_padding(segments_RL), 0)
    grad, out = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (grad_RLD, out_RLD))
    if not qkv_RL3HK.is_cuda:
        mask = _mask(qkv_RL3HK, is_causal, segments_RL)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse_RHL, 0.0, is_causal and mask is None, attn_mask=mask
        )
    elif _takes_flash(qkv_RL3HK, segments_RL):
        length, unused = q.shape[2], torch.zeros(2, dtype=torch.int64, device=q.device)
        with _deterministic():
            grads = aten._scaled_dot_product_flash_attention_backward(
                *(grad, q, k, v, out, lse_RHL, None, None, length, length, 0.0, is_causal),
                *(unused, unused),
            )
    else:
        grads = [torch.empty_like(q) for _ in range(3)]
        for rows, scores in _scores(qkv_RL3HK, is_causal, segments_RL):
            p, (g, q_, k_, v_) = (
                scores.softmax(-1),
                (x[rows].to(scores.dtype) for x in (grad, q, k, v)),
            )
            dp = g @ v_.mT
            ds = _scores_gradient(dp, p, q.shape[-1])
            for whole, part in zip(grads, (ds @ k_, ds.mT @ q_, p.mT @ g), strict=True):
                whole[rows] = part.to(whole.dtype)
    return torch.stack([x.transpose(1, 2) for x in grads], 2)


def _scores_gradient(dp: Tensor, p: Tensor, size: int) -> Tensor:
    """Return the gradient of the products of queries and keys from that of the probabilities.

    It is computed from the probabilities themselves, so a token that sees only itself has a gradient of exactly 0.
    """
    return aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(size**-0.5)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Make FlashAttention add up the gradients of queries in a fixed order, not as they arrive."""
    was_on, only_warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=only_warned)


def _with_whole_heads(qkv_RL3HK: Tensor) -> Tensor:
    """Return the projection with the columns of a head side by side, as torch's attention on the CPU assumes."""
    return qkv_RL3HK if qkv_RL3HK.stride(-1) == 1 else qkv_RL3HK.contiguous()


def _split(qkv_RL3HK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values [R, H, L, K], as views."""
    q, k, v = qkv_RL3HK.permute(2, 0, 3, 1, 4)
    return q, k, v


def _takes_flash(qkv_RL3HK: Tensor, segments_RL: Tensor | None) -> bool:
    size = qkv_RL3HK.shape[-1]
    return segments_RL is None and qkv_RL3HK.dtype.itemsize == 2 and size % 8 == 0 and size <= 256


def _scores(
    qkv_RL3HK: Tensor, is_causal: bool, segments_RL: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, their masked scores [rows, H, L, L], at least float32), as many rows as 64 MB of scores hold."""
    q, k, _ = _split(qkv_RL3HK)
    wide = accumulate_dtype(q.dtype)
    length = q.shape[2]
    step = max(1, DENSE_BYTES // (q.shape[1] * length**2 * wide.itemsize))
    for first in range(0, len(q), step):
        rows = slice(first, first + step)
        scores = q[rows].to(wide) @ k[rows].to(wide).mT * q.shape[-1] ** -0.5
        seen = torch.ones(length, length, dtype=torch.bool, device=q.device)
        seen = seen.tril() if is_causal else seen
        if segments_RL is not None:
            segments = segments_RL[rows]
            seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
        yield rows, scores.masked_fill_(~seen, -torch.inf)


def _padding(segments_RL: Tensor) -> Tensor:
    return (segments_RL < 0).unsqueeze(-1)


def _mask(qkv_RL3HK: Tensor, is_causal: bool, segments_RL: Tensor | None) -> Tensor | None:
    """Return the mask that is added to the scores, [R, 1, L, L]: 0 within a segment, else -inf."""
    if segments_RL is None:
        return None
    seen = segments_RL[:, None, :, None] == segments_RL[:, None, None, :]
    if is_causal:
        seen = seen.tril()
    mask = torch.full(seen.shape, -torch.inf, dtype=qkv_RL3HK.dtype, device=seen.device)
    return mask.masked_fill_(seen, 0)
