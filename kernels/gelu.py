"""GELU and QuickGELU, the activations of CLIP's MLPs.

``erf``: ``x * Phi(x)`` with the normal distribution's Phi (Hendrycks and Gimpel 2016); ``quick``: ``x * sigmoid(1.702 x)``,
which OpenAI's weights were trained with. Bound by memory: one read and one write forward, two reads and one write
backward.

The implementation is torch's on every device. QuickGELU is computed as ``silu(1.702 x) / 1.702``: the same function with
one saved tensor in place of three.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("erf", "quick")
QUICK_GELU_SLOPE = 1.702


def gelu_ref(x: Tensor, kind: str = "erf") -> Tensor:
    """Both definitions, term by term: the reference."""
    if kind == "quick":
        return x * torch.sigmoid(QUICK_GELU_SLOPE * x)
    return x * 0.5 * (1 + torch.erf(x * 0.5**0.5))


def gelu(x: Tensor, kind: str = "erf") -> Tensor:
    """The activation of every element of ``x``, of any shape.

    Args:
        kind: ``erf`` for GELU, ``quick`` for QuickGELU.

    Raises:
        ValueError: another kind.

    >>> gelu(torch.zeros(2))
    tensor([0., 0.])
    """
    if kind not in KINDS:
        raise ValueError(f"the kinds of GELU are {' and '.join(KINDS)}, got {kind!r}")
    if kind == "quick":
        return F.silu(x * QUICK_GELU_SLOPE) * (1 / QUICK_GELU_SLOPE)
    return F.gelu(x)
