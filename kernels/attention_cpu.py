"""The passes of packed attention on the CPU in the extension (csrc/attention.cpp), in float32.

Legend and contract: attention.py. 16-bit operands are converted to float32, so only the result is rounded; a pass then
holds a second copy of its operands. attention_torch.py serves float64, and every dtype where the extension was not built
or the processor has no vectors of 8 floats.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from clipcore import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def widest() -> int:
    """Return the floats in this processor's widest vector; 0 if the extension does not serve it."""
    extension = native.load()
    return max(extension.attention_lanes(), default=0) if extension is not None else 0


def supports(qkv_RL3HK: Tensor) -> bool:
    """Return whether ``forward`` and ``backward`` take this projection here."""
    return qkv_RL3HK.device.type == "cpu" and qkv_RL3HK.dtype in DTYPES and widest() > 0


def forward(
    qkv_RL3HK: Tensor, is_causal: bool, segments_RL: Tensor | None, lanes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return (output [R, L, H*K], log-sum-exp [R, H, L]). ``lanes``: floats in a vector; default the widest."""
    out, lse = native.load().attention_forward(  # type: ignore[union-attr]
        _operand(qkv_RL3HK), is_causal, _contiguous(segments_RL), lanes or widest()
    )
    return out.to(qkv_RL3HK.dtype), lse


def backward(
    grad_RLD: Tensor,
    qkv_RL3HK: Tensor,
    out_RLD: Tensor,
    lse_RHL: Tensor,
    is_causal: bool,
    segments_RL: Tensor | None,
    lanes: int | None = None,
) -> Tensor:
    """Return the gradient of the packed projection, [R, L, 3, H, K]."""
    grad_RL3HK = native.load().attention_backward(  # type: ignore[union-attr]
        *(grad_RLD.float().contiguous(), _operand(qkv_RL3HK), lse_RHL.contiguous()),
        *(is_causal, _contiguous(segments_RL), lanes or widest()),
    )
    return grad_RL3HK.to(qkv_RL3HK.dtype)


def _operand(qkv_RL3HK: Tensor) -> Tensor:
    qkv_RL3HK = qkv_RL3HK.detach().float()
    return qkv_RL3HK if qkv_RL3HK.stride(-1) == 1 else qkv_RL3HK.contiguous()


def _contiguous(segments_RL: Tensor | None) -> Tensor | None:
    return None if segments_RL is None else segments_RL.contiguous()
