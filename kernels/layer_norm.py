"""Layer normalisation over the last axis.

Legend: D width; x is [..., D].

``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias``. Statistics, and the sums over rows that are the gradients of
weight and bias, are float32 whatever the dtype of ``x``; the result has the dtype of ``x``, as in CLIP's own LayerNorm.
Traffic: one read and one write of ``x`` forward, three reads and one write backward; bound by memory.

The implementation is torch's own on every device, on a float32 copy where ``x`` is of lower precision: torch's bfloat16
and float16 kernels for the CPU sum those gradients in that type.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def layer_norm_ref(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float = 1e-5) -> Tensor:
    """The definition, term by term: the reference."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    centred = x.to(dtype) - x.to(dtype).mean(-1, keepdim=True)
    scaled = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (scaled * weight_D.to(dtype) + bias_D.to(dtype)).to(x.dtype)


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalises the last axis of ``x`` [..., D]; weight and bias are [D], of any floating dtype.

    Raises:
        ValueError: the weight or the bias does not fit the last axis.

    >>> layer_norm(torch.randn(2, 8), torch.ones(8), torch.zeros(8)).shape
    torch.Size([2, 8])
    """
    if weight_D.shape != x.shape[-1:] or bias_D.shape != x.shape[-1:]:
        raise ValueError(
            f"weight and bias must be [{x.shape[-1]}] for x {tuple(x.shape)}, "
            f"got {tuple(weight_D.shape)} and {tuple(bias_D.shape)}"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight_D, bias_D = weight_D.to(dtype), bias_D.to(dtype)
    return F.layer_norm(x.to(dtype), weight_D.shape, weight_D, bias_D, eps).to(x.dtype)
