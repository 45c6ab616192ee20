"""The kernels of the mean of the loss's terms in Triton.

Legend and maths: ``clipcore.kernels.contrastive``; the formulas: ``sums.mean_loss`` and ``sums.mean_gradients``, which the
CPU runs and which these are tested against. N numbers of one side, rows or columns, float64, summed in a fixed order.
"""

from __future__ import annotations

from clipcore.kernels.launch import tl, triton

# Lengths are not specialized: see ``vector_kernels.py``.


@triton.jit
def _counts(weight_ptr, n, first, last, BY_WEIGHT: tl.constexpr):
    """Which rows n count in the mean: those with a positive."""
    counts = (n >= first) & (n < last)
    if BY_WEIGHT:
        counts = counts & (tl.load(weight_ptr + n, mask=counts, other=0.0) > 0.0)
    return counts


@triton.jit(do_not_specialize=["first", "last"])
def mean_parts_kernel(
    lse_ptr,
    target_ptr,
    weight_ptr,
    part_ptr,  # float64 [2, PARTS]: sums and counts
    first,
    last,
    PARTS: tl.constexpr,
    BY_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Leave each program's sum of (lse - target) over the rows of one side that count, and their number."""
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    total, number = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(first + program * BLOCK, last, num_programs * BLOCK):
        n = start + tl.arange(0, BLOCK)
        counts = _counts(weight_ptr, n, first, last, BY_WEIGHT)
        lse_log2 = tl.load(lse_ptr + n, mask=counts, other=0.0)
        total += lse_log2 - tl.load(target_ptr + n, mask=counts, other=0.0)
        number += counts.to(tl.float64)
    tl.store(part_ptr + program, tl.sum(total, axis=0))
    tl.store(part_ptr + PARTS + program, tl.sum(number, axis=0))


@triton.jit
def _sum_parts(part_ptr, num_parts, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(part_ptr + part, mask=part < num_parts, other=0.0), axis=0)


@triton.jit(do_not_specialize=["row_parts", "column_parts"])
def mean_kernel(
    part_ptr,  # float64 [2, 2, PARTS]: rows and columns, sums and counts
    loss_ptr,
    count_ptr,  # float64 [2]
    row_parts,
    column_parts,
    LOG2E: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Compute ``sums.mean_loss`` of the parts."""
    row_sum = _sum_parts(part_ptr, row_parts, PARTS)
    row_count = _sum_parts(part_ptr + PARTS, row_parts, PARTS)
    column_sum = _sum_parts(part_ptr + 2 * PARTS, column_parts, PARTS)
    column_count = _sum_parts(part_ptr + 3 * PARTS, column_parts, PARTS)
    loss = (row_sum / row_count + column_sum / column_count) / LOG2E / 2.0
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
    tl.store(count_ptr, row_count)
    tl.store(count_ptr + 1, column_count)


@triton.jit(do_not_specialize=["N", "first", "last"])
def mean_bwd_kernel(
    upstream_ptr,
    count_ptr,  # of this side
    weight_ptr,
    lse_grad_ptr,
    target_grad_ptr,
    N,
    first,
    last,
    LOG2E: tl.constexpr,
    BY_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute ``sums.mean_gradients`` of one side."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts = _counts(weight_ptr, n, first, last, BY_WEIGHT)
    share = tl.load(upstream_ptr).to(tl.float64) / 2.0 / tl.load(count_ptr) / LOG2E
    grad = tl.where(counts, share, 0.0)
    tl.store(lse_grad_ptr + n, grad, mask=n < N)
    tl.store(target_grad_ptr + n, -grad, mask=n < N)
