"""The contrastive loss's backward pass over a block that the library has multiplied or a stash holds, in Triton.

Legend, maths, precision and traffic: ``clipcore.kernels.contrastive``. N and M are rows and columns of a block; a strip
is what a program works on: ``clipcore.kernels.strips``.

On sm_90 an interior strip takes 7.8 machine instructions a logit, 11.8 from a stash (counted in tests/test_passes.py). With
many more the pass would be bound by instruction issue, not by memory.
"""

from __future__ import annotations

from clipcore.kernels.contrastive.fixed_point import unpack_rows
from clipcore.kernels.launch import tl, triton
from clipcore.kernels.strips import (
    strip_ids,
    strip_load,
    strip_pairs,
    strip_place,
    strip_rows,
    strip_store,
)
from clipcore.kernels.tiles import add_to_place


@triton.jit(do_not_specialize=["first_label"])
def contrastive_gradient_pass(
    product_ptr,  # float32 [N, M], or int16 of a stash; rows stride_product apart
    range_ptr,  # float32 [segments, ..., 2], segments stride_range apart
    scale_ptr,  # float32 [3]
    image_id_ptr,  # int64 [N]
    text_id_ptr,  # int64 [M]
    flag_ptr,  # int32: 1 where any row or column has an offset of its own, else 0
    row_factor_ptr,  # float32 [N], and so on
    row_offset_ptr,
    column_factor_ptr,  # float32 [M], and so on
    column_offset_ptr,
    row_positive_ptr,
    row_uniform_ptr,
    column_positive_ptr,
    column_uniform_ptr,
    grad_ptr,  # [N, M], rows stride_grad apart
    along_ptr,  # float64 [programs]: sums of gradient * cosine
    N,
    M,
    stride_product,
    stride_range,
    stride_grad,
    first_label,
    GRADIENT_SCALE: tl.constexpr,
    IDS: tl.constexpr,
    TARGETS: tl.constexpr,
    STASH: tl.constexpr,
    RANGE_M: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Leave the gradient of each strip's logits, and add its sum along the cosines."""
    first_n, first_m, is_edge = strip_place(N, M, first_label, ROWS, COLS)
    # Where a row or a column has an offset of its own, every strip takes the edge's form, which reads them.
    is_edge |= tl.load(flag_ptr)
    # Both forms are compiled, and each strip takes one.
    for EDGE in tl.static_range(2):
        if is_edge == EDGE:
            along = _differentiate_strip(
                product_ptr,
                range_ptr,
                scale_ptr,
                image_id_ptr,
                text_id_ptr,
                row_factor_ptr,
                row_offset_ptr,
                column_factor_ptr,
                column_offset_ptr,
                row_positive_ptr,
                row_uniform_ptr,
                column_positive_ptr,
                column_uniform_ptr,
                grad_ptr,
                N,
                M,
                stride_product,
                stride_range,
                stride_grad,
                first_label,
                first_n,
                first_m,
                GRADIENT_SCALE,
                IDS,
                TARGETS,
                STASH,
                RANGE_M,
                ROWS,
                COLS,
                STEP=1 if EDGE else STEP,
                EDGE=EDGE,
            )
            add_to_place(along_ptr + tl.program_id(0), along)


@triton.jit
def _differentiate_strip(
    product_ptr,
    range_ptr,
    scale_ptr,
    image_id_ptr,
    text_id_ptr,
    row_factor_ptr,
    row_offset_ptr,
    column_factor_ptr,
    column_offset_ptr,
    row_positive_ptr,
    row_uniform_ptr,
    column_positive_ptr,
    column_uniform_ptr,
    grad_ptr,
    N,
    M,
    stride_product,
    stride_range,
    stride_grad,
    first_label,
    first_n,
    first_m,
    GRADIENT_SCALE: tl.constexpr,
    IDS: tl.constexpr,
    TARGETS: tl.constexpr,
    STASH: tl.constexpr,
    RANGE_M: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Differentiate one strip; return the sum of gradient * cosine. Arguments as in ``contrastive_gradient_pass``.

    An edge strip takes each row's and each column's own offset, which is that of all where the flag is not set.
    """
    m = first_m + tl.arange(0, COLS)
    in_m = m < M
    text_id = strip_ids(text_id_ptr, m, in_m, IDS, EDGE)
    high, low, offset = tl.load(scale_ptr), tl.load(scale_ptr + 1), tl.load(scale_ptr + 2)
    column_factor = strip_load(column_factor_ptr + m, in_m, EDGE) * GRADIENT_SCALE
    if STASH:
        range_ptr += (first_m // RANGE_M).to(tl.int64) * stride_range

    # A row's positive and its negatives cancel in the sum: where both are in a strip by their place it is float64.
    wide = tl.float64 if EDGE else tl.float32
    along = tl.zeros((COLS,), wide)
    for step_n in range(0, strip_rows(first_n, N, ROWS, EDGE), STEP):
        n = first_n + step_n + tl.arange(0, STEP)
        in_n = n < N
        row_n = n.to(tl.int64)[:, None]
        inside = in_n[:, None] & in_m[None, :]
        product_ptrs = product_ptr + row_n * stride_product + m[None, :]
        if STASH:
            cosine = unpack_rows(product_ptrs, range_ptr + 2 * n, inside, in_n, EDGE)
        else:
            cosine = strip_load(product_ptrs, inside, EDGE)

        row_factor = strip_load(row_factor_ptr + n, in_n, EDGE) * GRADIENT_SCALE
        if EDGE:
            z = cosine * high + cosine * low
            row_offset = strip_load(row_offset_ptr + n, in_n, EDGE)
            column_offset = strip_load(column_offset_ptr + m, in_m, EDGE)
            grad = row_factor[:, None] * tl.exp2(z - row_offset[:, None])
            grad += column_factor[None, :] * tl.exp2(z - column_offset[None, :])
        else:
            # An instruction less than in the sums: a probability may be off by 1e-6 of itself.
            power = tl.exp2(cosine * high + (cosine * low - offset))
            grad = power * (row_factor[:, None] + column_factor[None, :])

        image_id = strip_ids(image_id_ptr, n, in_n, IDS, EDGE)
        valid, positive = strip_pairs(n, m, inside, first_label, image_id, text_id, IDS, EDGE)
        if EDGE or IDS == "positive":
            row_positive = strip_load(row_positive_ptr + n, in_n, EDGE)
            column_positive = strip_load(column_positive_ptr + m, in_m, EDGE)
            at_positive = (row_positive[:, None] + column_positive[None, :]) * GRADIENT_SCALE
            # A positive by place has its whole gradient here: see ``Upstream.from_terms``.
            grad = tl.where(positive, at_positive + grad if TARGETS else at_positive, grad)
        if TARGETS:
            row_uniform = strip_load(row_uniform_ptr + n, in_n, EDGE)
            column_uniform = strip_load(column_uniform_ptr + m, in_m, EDGE)
            grad += row_uniform[:, None] * GRADIENT_SCALE + column_uniform[None, :] * GRADIENT_SCALE
        if EDGE or IDS == "ignore":
            grad = tl.where(valid, grad, 0.0)
        along += tl.sum((grad * cosine).to(wide), axis=0)
        stored = grad.to(grad_ptr.dtype.element_ty)
        strip_store(grad_ptr + row_n * stride_grad + m[None, :], stored, inside, EDGE)
    return tl.sum(along.to(tl.float64), axis=0) / GRADIENT_SCALE
