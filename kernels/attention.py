"""Multi-head self-attention on the packed projection.

Legend: R rows of tokens (sequences, or rows of packed captions), L tokens of a row, H heads, K head size.

``o = softmax(q k^T / sqrt(K)) v`` for each row and head. A query sees all tokens, or with ``is_causal`` itself and those
before it, and with ``segments`` only its own segment's, so that one row holds several captions. The passes read
[R, L, 3, H, K] as one linear layer writes it and write [R, L, H*K] as the next one reads it; the gradient is packed too.
Scores, the softmax and its sums are float32 (float64 for float64).

Traffic: ``R L H (4 K + 1)`` numbers forward and about twice as many backward, for ``4 R H L^2 K`` FLOP forward and 2.5
times as many backward (half where causal). At CLIP's lengths (50 to 257) it is bound by memory.

``attention_forward`` and ``attention_backward`` are the two passes as operators, for code that writes its own backward
pass; ``attention`` is the differentiable function. 16-bit operands on CUDA up to 512 tokens and up to 32 bits on the CPU
go to our kernels (attention_triton.py, attention_cpu.py), everything else to torch's (attention_torch.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels import attention_cpu, attention_torch, attention_triton, launch


def attention_ref(
    qkv_RL3HK: Tensor, is_causal: bool = False, segments_RL: Tensor | None = None
) -> Tensor:
    """Compute attention by its definition, with the L x L matrix. This is the reference."""
    q_RHLK, k_RHLK, v_RHLK = qkv_RL3HK.permute(2, 0, 3, 1, 4)
    scores = q_RHLK @ k_RHLK.mT * q_RHLK.shape[-1] ** -0.5
    length = scores.shape[-1]
    seen = torch.ones(length, length, dtype=torch.bool, device=scores.device)
    if is_causal:
        seen = seen.tril()
    if segments_RL is not None:
        seen = seen & (segments_RL[:, None, :, None] == segments_RL[:, None, None, :])
    out_RLD = (
        (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v_RHLK).transpose(1, 2).flatten(2)
    )
    return out_RLD if segments_RL is None else out_RLD * (segments_RL >= 0).unsqueeze(-1)


def attention_forward(
    qkv_RL3HK: Tensor, is_causal: bool, segments_RL: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (output [R, L, H*K], logarithm of the softmax's sums [R, H, L]); see ``attention``."""
    with launch.on_device(qkv_RL3HK.device):
        return _passes(qkv_RL3HK, is_causal, segments_RL).forward(qkv_RL3HK, is_causal, segments_RL)


_forward_op = torch.library.custom_op(
    "clipcore::attention_forward", attention_forward, mutates_args=()
)


@_forward_op.register_fake
def _(qkv_RL3HK: Tensor, is_causal: bool, segments_RL: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, length, _, heads, size = qkv_RL3HK.shape
    wide = launch.accumulate_dtype(qkv_RL3HK.dtype)
    return (
        qkv_RL3HK.new_empty(rows, length, heads * size),
        qkv_RL3HK.new_empty(rows, heads, length, dtype=wide),
    )


def attention_backward(
    grad_RLD: Tensor,
    qkv_RL3HK: Tensor,
    out_RLD: Tensor,
    lse_RHL: Tensor,
    is_causal: bool,
    segments_RL: Tensor | None,
) -> Tensor:
    """Return the packed projection's gradient [R, L, 3, H, K] from the output's and the forward pass's results."""
    with launch.on_device(qkv_RL3HK.device):
        return _passes(qkv_RL3HK, is_causal, segments_RL).backward(
            *(grad_RLD.contiguous(), qkv_RL3HK, out_RLD, lse_RHL, is_causal, segments_RL)
        )


_backward_op = torch.library.custom_op(
    "clipcore::attention_backward", attention_backward, mutates_args=()
)


@_backward_op.register_fake
def _(grad_RLD: Tensor, qkv_RL3HK: Tensor, *_: Any) -> Tensor:
    return qkv_RL3HK.new_empty(qkv_RL3HK.shape)


def _passes(qkv_RL3HK: Tensor, is_causal: bool, segments_RL: Tensor | None) -> Any:
    """Return the module whose ``forward`` and ``backward`` serve this device, dtype and shape."""
    _, length, _, _, size = qkv_RL3HK.shape
    has_segments = segments_RL is not None
    on_gpu = qkv_RL3HK.is_cuda
    if on_gpu and attention_triton.supports(length, size, qkv_RL3HK.dtype, is_causal, has_segments):
        return attention_triton
    return attention_cpu if attention_cpu.supports(qkv_RL3HK) else attention_torch


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv_RL3HK, ctx.is_causal, segments_RL = inputs
    ctx.save_for_backward(qkv_RL3HK, *output, segments_RL)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_RLD: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    launch.check_first_order("attention")
    if grad_RLD is None:
        return None, None, None
    qkv_RL3HK, out_RLD, lse_RHL, segments_RL = ctx.saved_tensors
    found = torch.ops.clipcore.attention_backward(
        grad_RLD.contiguous(), qkv_RL3HK, out_RLD, lse_RHL, ctx.is_causal, segments_RL
    )
    return found, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
launch.register_autocast("attention_forward", num_operands=1)
launch.register_autocast("attention_backward", num_operands=0)


def attention(
    qkv_RL3HK: Tensor, is_causal: bool = False, segments_RL: Tensor | None = None
) -> Tensor:
    """Compute the attention of every token: [R, L, 3, H, K] -> [R, L, H*K].

    Args:
        is_causal: a token sees itself and those before it.
        segments_RL: int32; a token sees its own segment only. Tokens of segment -1 are padding: their output and
            the gradients that reach them are 0.

    Raises:
        ValueError: the layout is not packed, or the segments do not fit it.

    >>> attention(torch.zeros(2, 5, 3, 4, 8), is_causal=True).shape
    torch.Size([2, 5, 32])
    """
    check_packed(qkv_RL3HK, segments_RL)
    if launch.is_portable() and segments_RL is None:
        # A trace may be run where clipcore is not installed, so it holds operators of torch alone.
        q_RHLK, k_RHLK, v_RHLK = qkv_RL3HK.permute(2, 0, 3, 1, 4)
        out_RHLK = F.scaled_dot_product_attention(q_RHLK, k_RHLK, v_RHLK, is_causal=is_causal)
        return out_RHLK.transpose(1, 2).flatten(2)
    return torch.ops.clipcore.attention_forward(qkv_RL3HK, is_causal, segments_RL)[0]


def check_packed(qkv_RL3HK: Tensor, segments_RL: Tensor | None) -> None:
    """Raise ValueError unless the projection is packed and the segments fit its tokens."""
    if qkv_RL3HK.ndim != 5 or qkv_RL3HK.shape[2] != 3:
        raise ValueError(f"qkv must be [R, L, 3, H, K], got {tuple(qkv_RL3HK.shape)}")
    if segments_RL is None:
        return
    if segments_RL.shape != qkv_RL3HK.shape[:2] or segments_RL.dtype != torch.int32:
        raise ValueError(
            f"segments must be int32 {list(qkv_RL3HK.shape[:2])}, got {segments_RL.dtype} {list(segments_RL.shape)}"
        )
