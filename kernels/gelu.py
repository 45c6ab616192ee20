"""GELU and QuickGELU, the activations of CLIP's MLPs.

``gelu(x) = x * Phi(x)`` with the normal distribution's Phi (Hendrycks and Gimpel 2016); ``quick_gelu(x) =
x * sigmoid(1.702 x)``, which OpenAI's weights were trained with. Memory bound: one read and one write forward, two reads
and one write backward.

QuickGELU is computed as ``silu(1.702 x) / 1.702``: the same function with one saved tensor in place of three.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

QUICK_GELU_SLOPE = 1.702


def gelu_ref(x: Tensor, quick: bool = False) -> Tensor:
    """Both definitions, term by term: the reference."""
    if quick:
        return x * torch.sigmoid(QUICK_GELU_SLOPE * x)
    return x * 0.5 * (1 + torch.erf(x * 0.5**0.5))


def gelu(x: Tensor, quick: bool = False) -> Tensor:
    """The activation of every element of ``x``, any shape: GELU (erf), or QuickGELU.

    >>> gelu(torch.zeros(2))
    tensor([0., 0.])
    """
    if quick:
        return F.silu(x * QUICK_GELU_SLOPE) * (1 / QUICK_GELU_SLOPE)
    return F.gelu(x)
