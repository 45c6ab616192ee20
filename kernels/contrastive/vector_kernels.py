"""The kernels over the rows' and the columns' numbers in Triton: one launch each where PyTorch would make a dozen.

Legend and maths: ``clipcore.kernels.contrastive``; the formulas: ``sums.py``, which the CPU runs and which these are tested
against. N numbers of one side, rows or columns. Sums and logarithms are float64, and summed in a fixed order.
"""

from __future__ import annotations

from clipcore.kernels.launch import tl, triton

# Lengths are not specialized: Triton would compile each kernel again for multiples of 16, which gains nothing here.


@triton.jit
def exponents_kernel(
    scale_ptr,
    exponent_ptr,  # float64 [2]: scale and offset as powers of two
    factor_ptr,  # float32 [3]: the scale in two parts, and the offset
    LOG2E: tl.constexpr,
    HEADROOM: tl.constexpr,
):
    """Compute ``sums.exponents`` and what the kernels over logits read of them."""
    scale_log2 = tl.load(scale_ptr).to(tl.float64) * LOG2E
    offset_log2 = tl.ceil(tl.maximum(tl.abs(scale_log2) - HEADROOM, 0.0))
    tl.store(exponent_ptr, scale_log2)
    tl.store(exponent_ptr + 1, offset_log2)

    high = scale_log2.to(tl.float32)
    tl.store(factor_ptr, high)
    tl.store(factor_ptr + 1, (scale_log2 - high.to(tl.float64)).to(tl.float32))
    tl.store(factor_ptr + 2, offset_log2.to(tl.float32))


@triton.jit
def _add_tiles(partial_ptr, sum_ptr, n, num_tiles, N, TILES: tl.constexpr):
    """Add to the sums n the partial ones of all tiles, [num_tiles, N]."""
    total = tl.load(sum_ptr + n, mask=n < N, other=0.0)
    for first in range(0, num_tiles, TILES):
        tile = (first + tl.arange(0, TILES)).to(tl.int64)[:, None]
        inside = (tile < num_tiles) & (n[None, :] < N)
        part = tl.load(partial_ptr + tile * N + n[None, :], mask=inside, other=0.0)
        total += tl.sum(part.to(tl.float64), axis=0)
    tl.store(sum_ptr + n, total, mask=n < N)


@triton.jit(do_not_specialize=["R", "C", "tiles_n", "tiles_m"])
def add_partials_kernel(
    row_partial_ptr,  # float32 [tiles_m, R]
    column_partial_ptr,  # float32 [tiles_n, C]
    row_target_partial_ptr,
    column_target_partial_ptr,
    row_sum_ptr,  # float64 [R]
    column_sum_ptr,  # float64 [C]
    row_target_ptr,
    column_target_ptr,
    R,
    C,
    tiles_n,
    tiles_m,
    TARGETS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add what the tiles of a block left to the sums of its rows and of its columns."""
    row_programs = tl.cdiv(R, BLOCK)
    program = tl.program_id(0)
    if program < row_programs:
        n = program * BLOCK + tl.arange(0, BLOCK)
        _add_tiles(row_partial_ptr, row_sum_ptr, n, tiles_m, R, TILES)
        if TARGETS:
            _add_tiles(row_target_partial_ptr, row_target_ptr, n, tiles_m, R, TILES)
    else:
        n = (program - row_programs) * BLOCK + tl.arange(0, BLOCK)
        _add_tiles(column_partial_ptr, column_sum_ptr, n, tiles_n, C, TILES)
        if TARGETS:
            _add_tiles(column_target_partial_ptr, column_target_ptr, n, tiles_n, C, TILES)


@triton.jit(do_not_specialize=["N"])
def relative_uniform_kernel(positive_ptr, uniform_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """Compute ``Targets.relative_uniform`` of one side."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    positive = tl.load(positive_ptr + n, mask=n < N, other=0.0)
    uniform = tl.load(uniform_ptr + n, mask=n < N, other=0.0)
    has_positive = positive > 0.0
    relative = tl.where(has_positive, uniform / tl.where(has_positive, positive, 1.0), 0.0)
    tl.store(out_ptr + n, relative.to(tl.float32), mask=n < N)


@triton.jit(do_not_specialize=["N"])
def logarithms_kernel(
    sum_ptr,
    target_ptr,  # with TARGETS over a positive's weight, and whole afterwards
    weight_ptr,
    exponent_ptr,
    lse_ptr,
    rest_ptr,
    offset_ptr,
    untrusted_ptr,  # int32; the last three begin a running maximum
    largest_ptr,
    total_ptr,
    N,
    least,  # the limits of a sum that is to be trusted
    most,
    TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute ``sums.logarithms`` of one side."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    rest = tl.load(sum_ptr + n, mask=inside, other=1.0)
    target_log2 = tl.load(target_ptr + n, mask=inside, other=0.0)
    offset_log2 = tl.load(exponent_ptr + 1)

    if TARGETS:
        weight = tl.load(weight_ptr + n, mask=inside, other=0.0)
        tl.store(target_ptr + n, target_log2 * weight, mask=inside)
        total = rest
        lse_log2 = tl.log2(total) + offset_log2
    else:
        total = rest + tl.exp2(target_log2 - offset_log2)
        # A row of one pair: the logarithm of a power need not give the exponent back to the last bit.
        lse_log2 = tl.where(rest == 0.0, target_log2, tl.log2(total) + offset_log2)

    tl.store(lse_ptr + n, lse_log2, mask=inside)
    tl.store(rest_ptr + n, rest / total, mask=inside)
    tl.store(offset_ptr + n, tl.zeros_like(total) + offset_log2, mask=inside)
    untrusted = (total < least) | (total > most)
    tl.store(untrusted_ptr + n, untrusted.to(tl.int32), mask=inside)
    tl.store(largest_ptr + n, tl.full((BLOCK,), float("-inf"), tl.float32), mask=inside)
    tl.store(total_ptr + n, tl.zeros((BLOCK,), tl.float32), mask=inside)


@triton.jit(do_not_specialize=["N"])
def completed_kernel(
    untrusted_ptr,
    largest_ptr,
    total_ptr,
    target_ptr,
    exponent_ptr,
    lse_ptr,
    rest_ptr,
    offset_ptr,
    N,
    TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute ``Logarithms.completed`` of one side in place; rows that are trusted keep their bits."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    untrusted = tl.load(untrusted_ptr + n, mask=n < N, other=0) != 0
    if tl.max(untrusted.to(tl.int32), axis=0) == 0:
        return
    largest = tl.load(largest_ptr + n, mask=untrusted, other=0.0).to(tl.float64)
    total = tl.load(total_ptr + n, mask=untrusted, other=1.0).to(tl.float64)
    rest_lse_log2 = largest + tl.log2(total)

    own = rest_lse_log2
    if not TARGETS:
        target_log2 = tl.load(target_ptr + n, mask=untrusted, other=0.0)
        above = tl.maximum(rest_lse_log2, target_log2)
        difference = tl.abs(rest_lse_log2 - target_log2)
        # Equal ones may both be infinite.
        own = above + tl.log2(1.0 + tl.exp2(-difference))
        own = tl.where(rest_lse_log2 == target_log2, above + 1.0, own)

    # A row without a valid pair has nothing: no rest, and no offset of its own.
    own_rest = tl.where(own == float("-inf"), 0.0, tl.exp2(rest_lse_log2 - own))
    is_finite = tl.abs(own) < float("inf")
    below = tl.where(is_finite, tl.floor(own), tl.load(exponent_ptr + 1))
    tl.store(lse_ptr + n, own, mask=untrusted)
    tl.store(rest_ptr + n, own_rest, mask=untrusted)
    tl.store(offset_ptr + n, below, mask=untrusted)


@triton.jit
def _upstream(
    lse_grad_ptr,
    target_grad_ptr,
    rest_ptr,
    positive_weight_ptr,
    uniform_weight_ptr,
    n,
    inside,
    TARGETS: tl.constexpr,
):
    """(lse, positive, uniform) of ``Upstream.from_terms`` for some rows of one side."""
    lse_grad = tl.load(lse_grad_ptr + n, mask=inside, other=0.0)
    target_grad = tl.load(target_grad_ptr + n, mask=inside, other=0.0)
    if TARGETS:
        positive = target_grad * tl.load(positive_weight_ptr + n, mask=inside, other=0.0)
        uniform = target_grad * tl.load(uniform_weight_ptr + n, mask=inside, other=0.0)
    else:
        rest = tl.load(rest_ptr + n, mask=inside, other=0.0)
        positive = (lse_grad + target_grad) - lse_grad * rest
        uniform = positive
    return lse_grad, positive, uniform


@triton.jit
def _largest(values):
    """Return the largest of some numbers, NaN where one is: a maximum alone would leave it out."""
    has_nan = tl.max((values != values).to(tl.int32), axis=0) > 0
    return tl.where(has_nan, float("nan"), tl.max(tl.where(values == values, values, 0.0), axis=0))


@triton.jit(do_not_specialize=["N"])
def upstream_largest_kernel(
    lse_grad_ptr,
    target_grad_ptr,
    rest_ptr,
    positive_weight_ptr,
    uniform_weight_ptr,
    offset_ptr,
    exponent_ptr,
    largest_ptr,  # float64, one of each program
    untrusted_ptr,  # int32, likewise: whether a row has an offset of its own
    N,
    TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Leave each program's part of ``Upstream.over_largest`` and of ``Logarithms.untrusted`` for one side."""
    program = tl.program_id(0)
    offset_log2 = tl.load(exponent_ptr + 1)
    largest = tl.zeros((BLOCK,), tl.float64)
    untrusted = tl.zeros((BLOCK,), tl.int32)
    for first in range(program * BLOCK, N, tl.num_programs(0) * BLOCK):
        n = first + tl.arange(0, BLOCK)
        inside = n < N
        lse, positive, uniform = _upstream(
            lse_grad_ptr,
            target_grad_ptr,
            rest_ptr,
            positive_weight_ptr,
            uniform_weight_ptr,
            n,
            inside,
            TARGETS,
        )
        # A sum has every NaN.
        found = tl.maximum(tl.maximum(tl.abs(lse), tl.abs(positive)), tl.abs(uniform))
        together = lse + positive + uniform
        found = tl.where(
            (lse == lse) & (positive == positive) & (uniform == uniform), found, together
        )
        largest = tl.where((found > largest) | (found != found), found, largest)
        own_offset = tl.load(offset_ptr + n, mask=inside, other=0.0) != offset_log2
        untrusted = tl.maximum(untrusted, (own_offset & inside).to(tl.int32))
    tl.store(largest_ptr + program, _largest(largest))
    tl.store(untrusted_ptr + program, tl.max(untrusted, axis=0))


@triton.jit
def _is_written(part, row_parts, column_parts, PARTS: tl.constexpr):
    """Which parts of rows and columns, PARTS each, a program has written."""
    return (part % PARTS) < tl.where(part < PARTS, row_parts, column_parts)


@triton.jit(do_not_specialize=["N", "row_parts", "column_parts"])
def upstream_factors_kernel(
    lse_grad_ptr,
    target_grad_ptr,
    rest_ptr,
    positive_weight_ptr,
    uniform_weight_ptr,
    lse_ptr,
    offset_ptr,
    exponent_ptr,
    part_largest_ptr,  # [2, PARTS]: rows and columns
    part_untrusted_ptr,
    factor_out_ptr,  # float32 [N], as the next three
    offset_out_ptr,
    positive_out_ptr,
    uniform_out_ptr,
    largest_out_ptr,  # float64 [1]
    untrusted_out_ptr,  # int32 [1]
    walk_factor_ptr,  # float32 [1]: what the walk multiplies its sums with
    N,
    row_parts,  # how many of the PARTS of a side there are
    column_parts,
    GRADIENT_SCALE: tl.constexpr,
    TARGETS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute what the gradient pass reads of one side: ``Upstream`` over its largest element, and its factors."""
    part = tl.arange(0, 2 * PARTS)
    written = _is_written(part, row_parts, column_parts, PARTS)
    largest = _largest(tl.load(part_largest_ptr + part, mask=written, other=0.0))
    if tl.program_id(0) == 0:
        untrusted = tl.load(part_untrusted_ptr + part, mask=written, other=0)
        tl.store(untrusted_out_ptr, tl.max(untrusted, axis=0))
        tl.store(largest_out_ptr, largest)
        walk_factor = tl.load(exponent_ptr) * largest / GRADIENT_SCALE
        tl.store(walk_factor_ptr, walk_factor.to(tl.float32))

    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    lse_grad, positive, uniform = _upstream(
        lse_grad_ptr,
        target_grad_ptr,
        rest_ptr,
        positive_weight_ptr,
        uniform_weight_ptr,
        n,
        inside,
        TARGETS,
    )
    divisor = tl.where(largest > 0.0, largest, 1.0)
    lse_log2 = tl.load(lse_ptr + n, mask=inside, other=0.0)
    offset_log2 = tl.load(offset_ptr + n, mask=inside, other=0.0)
    # A row without a valid pair has no gradient.
    factor = lse_grad / divisor * tl.exp2(offset_log2 - lse_log2)
    factor = tl.where(lse_log2 == float("-inf"), 0.0, factor)
    tl.store(factor_out_ptr + n, factor.to(tl.float32), mask=inside)
    tl.store(offset_out_ptr + n, offset_log2.to(tl.float32), mask=inside)
    tl.store(positive_out_ptr + n, (positive / divisor).to(tl.float32), mask=inside)
    if TARGETS:
        tl.store(uniform_out_ptr + n, (uniform / divisor).to(tl.float32), mask=inside)
