"""The contrastive loss's forward pass over a block that the library has multiplied, in Triton.

Legend, maths, precision and traffic: ``clipcore.kernels.contrastive``. N and M are rows and columns of a block; a strip
is what a program works on: ``clipcore.kernels.strips``.

On sm_90 an interior strip takes 7.2 machine instructions a logit, 16.1 with a stash (counted in tests/test_passes.py). With
many more the pass would be bound by instruction issue, not by memory.
"""

from __future__ import annotations

from clipcore.kernels.contrastive.fixed_point import pack_rows
from clipcore.kernels.launch import tl, triton
from clipcore.kernels.strips import (
    strip_ids,
    strip_load,
    strip_pairs,
    strip_place,
    strip_rows,
    strip_store,
)


@triton.jit(do_not_specialize=["first_label"])
def contrastive_sums_pass(
    product_ptr,  # float32 [N, M], rows stride_product apart
    scale_ptr,  # float32 [3]: factor to powers of two in two parts, offset
    image_id_ptr,  # int64 [N]
    text_id_ptr,  # int64 [M]
    row_uniform_ptr,  # float32 [N]
    column_uniform_ptr,  # float32 [M]
    row_sum_ptr,  # float32 [strips along the columns, N]
    column_sum_ptr,  # float32 [strips along the rows, M]
    row_target_ptr,  # float64 [N]; with TARGETS as row_sum_ptr
    column_target_ptr,  # float64 [M]; with TARGETS as column_sum_ptr
    stash_ptr,  # int16 [N, M], rows stride_stash apart
    range_ptr,  # float32 [strips along the columns, ..., 2], strips stride_range apart
    N,
    M,
    stride_product,
    stride_stash,
    stride_range,
    first_label,
    IDS: tl.constexpr,
    TARGETS: tl.constexpr,
    STASH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Leave the sums over rows and columns of each strip, target logits, and a stash."""
    first_n, first_m, is_edge = strip_place(N, M, first_label, ROWS, COLS)
    # Both forms are compiled, and each strip takes one.
    for EDGE in tl.static_range(2):
        if is_edge == EDGE:
            _sum_strip(
                product_ptr,
                scale_ptr,
                image_id_ptr,
                text_id_ptr,
                row_uniform_ptr,
                column_uniform_ptr,
                row_sum_ptr,
                column_sum_ptr,
                row_target_ptr,
                column_target_ptr,
                stash_ptr,
                range_ptr,
                N,
                M,
                stride_product,
                stride_stash,
                stride_range,
                first_label,
                first_n,
                first_m,
                IDS,
                TARGETS,
                STASH,
                ROWS,
                COLS,
                STEP=1 if EDGE else STEP,
                EDGE=EDGE,
            )


@triton.jit
def _sum_strip(
    product_ptr,
    scale_ptr,
    image_id_ptr,
    text_id_ptr,
    row_uniform_ptr,
    column_uniform_ptr,
    row_sum_ptr,
    column_sum_ptr,
    row_target_ptr,
    column_target_ptr,
    stash_ptr,
    range_ptr,
    N,
    M,
    stride_product,
    stride_stash,
    stride_range,
    first_label,
    first_n,
    first_m,
    IDS: tl.constexpr,
    TARGETS: tl.constexpr,
    STASH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Sum one strip. Arguments as in ``contrastive_sums_pass``."""
    m = first_m + tl.arange(0, COLS)
    in_m = m < M
    text_id = strip_ids(text_id_ptr, m, in_m, IDS, EDGE)
    high, low, offset = tl.load(scale_ptr), tl.load(scale_ptr + 1), tl.load(scale_ptr + 2)

    # One row of the partial sums for each strip along the other side.
    row_sum_ptr += (first_m // COLS).to(tl.int64) * N
    column_sum_ptr += (first_n // ROWS).to(tl.int64) * M
    if TARGETS:
        row_target_ptr += (first_m // COLS).to(tl.int64) * N
        column_target_ptr += (first_n // ROWS).to(tl.int64) * M
        column_uniform = strip_load(column_uniform_ptr + m, in_m, EDGE)
    if STASH:
        range_ptr += (first_m // COLS).to(tl.int64) * stride_range

    column_sum = tl.zeros((COLS,), tl.float32)
    column_target = tl.zeros((COLS,), tl.float32)
    for step_n in range(0, strip_rows(first_n, N, ROWS, EDGE), STEP):
        n = first_n + step_n + tl.arange(0, STEP)
        in_n = n < N
        row_n = n.to(tl.int64)[:, None]
        inside = in_n[:, None] & in_m[None, :]
        cosine = strip_load(product_ptr + row_n * stride_product + m[None, :], inside, EDGE)
        if STASH:
            stash_ptrs = stash_ptr + row_n * stride_stash + m[None, :]
            cosine = pack_rows(cosine, stash_ptrs, range_ptr + 2 * n, inside, in_n, EDGE)

        image_id = strip_ids(image_id_ptr, n, in_n, IDS, EDGE)
        valid, positive = strip_pairs(n, m, inside, first_label, image_id, text_id, IDS, EDGE)
        # First the logit, rounded once: beside the offset its low part would be lost, for all rows alike.
        z = cosine * high + cosine * low
        power = tl.exp2(z - offset)
        if EDGE and not TARGETS:
            # A positive that is known by its place is added to the sums from its logit.
            power = tl.where(valid & (positive == 0), power, 0.0)
        elif EDGE or IDS == "ignore":
            power = tl.where(valid, power, 0.0)
        strip_store(row_sum_ptr + n, tl.sum(power, axis=1), in_n, EDGE)
        column_sum += tl.sum(power, axis=0)

        if TARGETS:
            # In units of a positive's weight, which float32 might not hold exactly.
            if EDGE or IDS == "ignore":
                z = tl.where(valid, z, 0.0)
            row_uniform = strip_load(row_uniform_ptr + n, in_n, EDGE)
            row_z = z * row_uniform[:, None]
            column_z = z * column_uniform[None, :]
            if EDGE or IDS == "positive":
                row_z += tl.where(positive, z, 0.0)
                column_z += tl.where(positive, z, 0.0)
            strip_store(row_target_ptr + n, tl.sum(row_z, axis=1), in_n, EDGE)
            column_target += tl.sum(column_z, axis=0)
        elif EDGE:
            # Each positive lies in one strip, which stores it for its row and its column.
            z = tl.where(positive, z, 0.0)
            label_m = n + first_label
            has_label = in_n & (label_m >= first_m) & (label_m < min(first_m + COLS, M))
            tl.store(row_target_ptr + n, tl.sum(z, axis=1), mask=has_label)
            column_target += tl.sum(z, axis=0)

    strip_store(column_sum_ptr + m, column_sum, in_m, EDGE)
    if TARGETS:
        strip_store(column_target_ptr + m, column_target, in_m, EDGE)
    elif EDGE:
        label_n = m - first_label
        is_label = in_m & (label_n >= first_n) & (label_n < min(first_n + ROWS, N))
        tl.store(column_target_ptr + m, column_target, mask=is_label)
