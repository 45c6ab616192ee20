"""The kernel of the sigmoid loss's factors in Triton: one launch where PyTorch would make a dozen.

Legend and maths: ``clipcore.kernels.sigmoid``.
"""

from __future__ import annotations

from clipcore.kernels.launch import tl, triton


@triton.jit
def _store_parts(ptr, value):
    """Store a float64 number as the sum of two floats."""
    high = value.to(tl.float32)
    tl.store(ptr, high)
    tl.store(ptr + 1, (value - high.to(tl.float64)).to(tl.float32))


@triton.jit
def sigmoid_factors_kernel(
    scale_ptr,
    bias_ptr,
    factor_ptr,  # float32 [4]: the factor from cosines to powers of two, and the bias as one, each in two parts
    walk_factor_ptr,  # float32 [1]: what the walk multiplies its sums with
    LOG2E: tl.constexpr,
    GRADIENT_SCALE: tl.constexpr,
):
    scale = tl.load(scale_ptr).to(tl.float64)
    bias = tl.load(bias_ptr).to(tl.float64)
    _store_parts(factor_ptr, scale * LOG2E)
    _store_parts(factor_ptr + 2, bias * LOG2E)
    tl.store(walk_factor_ptr, (scale / GRADIENT_SCALE).to(tl.float32))
