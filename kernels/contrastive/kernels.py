"""The contrastive loss's kernels that multiply, in Triton; those that pass over a block in memory: ``*_pass.py``.

Legend, maths, precision and traffic: ``clipcore.kernels.contrastive``. N and M are rows and columns of a block, tiles are
parts of it.
"""

from __future__ import annotations

from clipcore.kernels.contrastive.fixed_point import pack_rows, unpack
from clipcore.kernels.launch import tl, triton
from clipcore.kernels.tiles import (
    add_to_place,
    dot_rows,
    multiply,
    positives,
    tile_numbers,
)


@triton.jit
def _logit(cosine, scale_ptr):
    """Return cosine times a factor of two floats: rounding the factor to one would shift all logits alike."""
    return cosine * tl.load(scale_ptr) + cosine * tl.load(scale_ptr + 1)


@triton.jit
def _store_sums(partial_ptr, tile, length, index, values):
    """Store one row of a [tiles, length] buffer of partial sums."""
    tl.store(partial_ptr + tile.to(tl.int64) * length + index, values, mask=index < length)


@triton.jit
def _unpack_elements(
    stash_ptr,
    range_ptr,
    n,
    m,
    stride_n,
    stride_m,
    stride_range_n,
    stride_range_m,
    inside,
    RANGE_N: tl.constexpr,
    RANGE_M: tl.constexpr,
):
    """Return the values of any rows and columns of a stash, each by the range of the segment that it lies in."""
    n, m = n.to(tl.int64)[:, None], m.to(tl.int64)[None, :]
    code = tl.load(stash_ptr + n * stride_n + m * stride_m, mask=inside, other=0)
    range_ptr += (n // RANGE_N) * stride_range_n + (m // RANGE_M) * stride_range_m
    least = tl.load(range_ptr, mask=inside, other=0.0)
    return unpack(code, least, tl.load(range_ptr + 1, mask=inside, other=0.0))


@triton.jit(do_not_specialize=["first_label"])
def contrastive_sums_kernel(
    x_desc,
    y_desc,
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
    D,
    stride_stash,
    stride_range,
    first_label,
    IDS: tl.constexpr,
    TARGETS: tl.constexpr,
    STASH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    tile_n, tile_m, n, m = tile_numbers(N, M, BLOCK_N, BLOCK_M, GROUP_N)
    inside = (n[:, None] < N) & (m[None, :] < M)
    cosine = multiply(x_desc, y_desc, tile_n, tile_m, D, BLOCK_N, BLOCK_M, BLOCK_D)
    valid, positive = positives(n, m, inside, first_label, image_id_ptr, text_id_ptr, IDS)
    if STASH:
        stash_ptrs = stash_ptr + n.to(tl.int64)[:, None] * stride_stash + m[None, :]
        range_ptrs = range_ptr + tile_m.to(tl.int64) * stride_range + 2 * n
        cosine = pack_rows(cosine, stash_ptrs, range_ptrs, inside, n < N, EDGE=True)
    z = _logit(cosine, scale_ptr)
    # A positive that is known by its place is added to the sums from its logit: see ``clipcore.kernels.contrastive``.
    counted = valid if TARGETS else valid & (positive == 0)
    power = tl.where(counted, tl.exp2(z - tl.load(scale_ptr + 2)), 0.0)
    _store_sums(row_sum_ptr, tile_m, N, n, tl.sum(power, axis=1))
    _store_sums(column_sum_ptr, tile_n, M, m, tl.sum(power, axis=0))
    if TARGETS:
        # In units of a positive's weight, which float32 might not hold exactly.
        row_uniform = tl.load(row_uniform_ptr + n, mask=n < N, other=0.0)
        column_uniform = tl.load(column_uniform_ptr + m, mask=m < M, other=0.0)
        z = tl.where(valid, z, 0.0)
        own = tl.where(positive, 1.0, 0.0)
        row = z * (own + row_uniform[:, None])
        column = z * (own + column_uniform[None, :])
        _store_sums(row_target_ptr, tile_m, N, n, tl.sum(row, axis=1))
        _store_sums(column_target_ptr, tile_n, M, m, tl.sum(column, axis=0))
    else:
        # Each positive lies in one tile, which stores it for its row and its column.
        first_m = tile_m * BLOCK_M - first_label
        if (first_m < tile_n * BLOCK_N + BLOCK_N) & (first_m + BLOCK_M > tile_n * BLOCK_N):
            z = tl.where(positive, z, 0.0)
            has_label = tl.max(positive.to(tl.int32), axis=1) > 0
            tl.store(row_target_ptr + n, tl.sum(z, axis=1), mask=has_label)
            is_label = tl.max(positive.to(tl.int32), axis=0) > 0
            tl.store(column_target_ptr + m, tl.sum(z, axis=0), mask=is_label)


@triton.jit(do_not_specialize=["first_label"])
def contrastive_running_max_kernel(
    x_ptr,
    y_ptr,
    range_ptr,
    scale_ptr,
    image_id_ptr,
    text_id_ptr,
    untrusted_ptr,
    largest_ptr,
    total_ptr,
    stride_x_n,
    stride_y_m,
    stride_range_n,
    stride_range_m,
    N,
    M,
    D,
    first_label,
    RANGE_N: tl.constexpr,
    RANGE_M: tl.constexpr,
    IDS: tl.constexpr,
    TARGETS: tl.constexpr,
    STASH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Continue the running maximum and sum of untrusted rows of x over y; for columns, exchange x and y.

    x and y are the operands that everything else multiplies; with STASH x is the stash itself or the dense matrix in
    float32, stride_y_m its other stride, and what is read are the very numbers that were summed. Positives by place stay
    out here too.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    untrusted = tl.load(untrusted_ptr + n, mask=n < N, other=0)
    if tl.max(untrusted, axis=0) == 0:
        return
    row_n = tl.minimum(n, N - 1)
    largest = tl.load(largest_ptr + n, mask=n < N, other=float("-inf"))
    total = tl.load(total_ptr + n, mask=n < N, other=0.0)
    for first_m in range(0, M, BLOCK_M):
        m = first_m + tl.arange(0, BLOCK_M)
        inside = (n[:, None] < N) & (m[None, :] < M)
        if STASH and x_ptr.dtype.element_ty == tl.float32:
            offsets = n[:, None] * stride_x_n + m.to(tl.int64)[None, :] * stride_y_m
            cosine = tl.load(x_ptr + offsets, mask=inside, other=0.0)
        elif STASH:
            cosine = _unpack_elements(
                x_ptr,
                range_ptr,
                n,
                m,
                stride_x_n,
                stride_y_m,
                stride_range_n,
                stride_range_m,
                inside,
                RANGE_N,
                RANGE_M,
            )
        else:
            row_m = tl.minimum(m, M - 1).to(tl.int64)
            cosine = dot_rows(
                x_ptr, y_ptr, row_n, row_m, stride_x_n, stride_y_m, D, BLOCK_N, BLOCK_M, BLOCK_D
            )
        valid, positive = positives(n, m, inside, first_label, image_id_ptr, text_id_ptr, IDS)
        counted = valid if TARGETS else valid & (positive == 0)
        # Not -inf: a row without a valid pair has to stay clear of inf - inf.
        power = tl.where(counted, _logit(cosine, scale_ptr), -3e38)
        next_largest = tl.maximum(largest, tl.max(power, axis=1))
        part = tl.sum(tl.where(counted, tl.exp2(power - next_largest[:, None]), 0.0), axis=1)
        total = total * tl.exp2(largest - next_largest) + part
        largest = next_largest
    tl.store(largest_ptr + n, largest, mask=n < N)
    tl.store(total_ptr + n, total, mask=n < N)


@triton.jit(do_not_specialize=["first_label"])
def contrastive_gradient_kernel(
    x_desc,
    y_desc,
    scale_ptr,
    image_id_ptr,
    text_id_ptr,
    flag_ptr,
    row_factor_ptr,
    row_offset_ptr,
    column_factor_ptr,
    column_offset_ptr,
    row_positive_ptr,
    row_uniform_ptr,
    column_positive_ptr,
    column_uniform_ptr,
    grad_ptr,
    along_ptr,
    N,
    M,
    D,
    stride_grad,
    first_label,
    GRADIENT_SCALE: tl.constexpr,
    IDS: tl.constexpr,
    TARGETS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    tile_n, tile_m, n, m = tile_numbers(N, M, BLOCK_N, BLOCK_M, GROUP_N)
    inside = (n[:, None] < N) & (m[None, :] < M)
    cosine = multiply(x_desc, y_desc, tile_n, tile_m, D, BLOCK_N, BLOCK_M, BLOCK_D)
    valid, positive = positives(n, m, inside, first_label, image_id_ptr, text_id_ptr, IDS)
    z = _logit(cosine, scale_ptr)
    row_factor = tl.load(row_factor_ptr + n, mask=n < N, other=0.0)
    column_factor = tl.load(column_factor_ptr + m, mask=m < M, other=0.0)
    if tl.load(flag_ptr) != 0:
        # Some row or column has an offset of its own: two exponentials, each with the offset that belongs to it.
        row_offset = tl.load(row_offset_ptr + n, mask=n < N, other=0.0)
        column_offset = tl.load(column_offset_ptr + m, mask=m < M, other=0.0)
        grad = row_factor[:, None] * tl.exp2(z - row_offset[:, None])
        grad += column_factor[None, :] * tl.exp2(z - column_offset[None, :])
    else:
        power = tl.exp2(z - tl.load(scale_ptr + 2))
        grad = power * (row_factor[:, None] + column_factor[None, :])
    row_positive = tl.load(row_positive_ptr + n, mask=n < N, other=0.0)
    column_positive = tl.load(column_positive_ptr + m, mask=m < M, other=0.0)
    at_positive = row_positive[:, None] + column_positive[None, :]
    if TARGETS:
        grad += tl.where(positive, at_positive, 0.0)
        grad += tl.load(row_uniform_ptr + n, mask=n < N, other=0.0)[:, None]
        grad += tl.load(column_uniform_ptr + m, mask=m < M, other=0.0)[None, :]
    else:
        grad = tl.where(positive, at_positive, grad)
    grad = tl.where(valid, grad, 0.0)
    along = tl.sum(tl.sum(grad * cosine, axis=1), axis=0)
    add_to_place(along_ptr + tl.program_id(0), along)
    offsets = n.to(tl.int64)[:, None] * stride_grad + m[None, :]
    stored = (grad * GRADIENT_SCALE).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + offsets, stored, mask=inside)
