"""Tiles of packed attention: parts of a head, products over them, and which key a query sees.

Legend: L tokens of a row, m queries, n keys, SIZE the head size, K0 and K1 its two parts (K1 may be 0). 80 is 64 + 16:
the sides of tiles are powers of two, and padding 80 to 128 would waste much work. Where K1 is 0, the second part repeats
the first, and nothing is computed with it.
"""

from __future__ import annotations

from clipcore.kernels.launch import tl, triton


@triton.jit
def _place(
    base_ptr, row, stride, L, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, INSIDE: tl.constexpr
):  # fmt: skip
    """Return pointers to columns FIRST to FIRST + WIDTH of rows, and which of them exist. INSIDE: all rows exist."""
    column = FIRST + tl.arange(0, WIDTH)
    exists = ((row < L) | INSIDE)[:, None] & ((column < SIZE) | (FIRST + WIDTH <= SIZE))[None, :]
    return base_ptr + row[:, None] * stride + column[None, :], exists


@triton.jit
def load_rows(
    base_ptr, row, stride, L, SIZE: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, INSIDE: tl.constexpr
):  # fmt: skip
    """Load both parts of rows of a head; elements past the end are 0."""
    pointers, exists = _place(base_ptr, row, stride, L, 0, K0, SIZE, INSIDE)
    first = tl.load(pointers, mask=exists, other=0.0)
    second = first
    if K1 > 0:
        pointers, exists = _place(base_ptr, row, stride, L, K0, K1, SIZE, INSIDE)
        second = tl.load(pointers, mask=exists, other=0.0)
    return first, second


@triton.jit
def store_rows(
    base_ptr, row, stride, L, first, second, SIZE: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr
):  # fmt: skip
    """Store both parts of rows of a head, in the dtype of the pointer."""
    pointers, exists = _place(base_ptr, row, stride, L, 0, K0, SIZE, False)
    tl.store(pointers, first.to(base_ptr.dtype.element_ty), mask=exists)
    if K1 > 0:
        pointers, exists = _place(base_ptr, row, stride, L, K0, K1, SIZE, False)
        tl.store(pointers, second.to(base_ptr.dtype.element_ty), mask=exists)


@triton.jit
def zero_rows(ROWS: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr):
    """Return float32 accumulators of both parts, zero."""
    first = tl.zeros((ROWS, K0), dtype=tl.float32)
    second = first
    if K1 > 0:
        second = tl.zeros((ROWS, K1), dtype=tl.float32)
    return first, second


@triton.jit
def multiply_rows(a0, a1, b0, b1, K1: tl.constexpr):
    """Return a . b^T over both parts, float32."""
    tile = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if K1 > 0:
        tile = tl.dot(a1, tl.trans(b1), tile, input_precision="ieee")
    return tile


@triton.jit
def add_rows(acc0, acc1, weights, b0, b1, K1: tl.constexpr):
    """Return acc + weights . b for both parts; the weights take the dtype of b."""
    narrow = weights.to(b0.dtype)
    acc0 = tl.dot(narrow, b0, acc0, input_precision="ieee")
    if K1 > 0:
        acc1 = tl.dot(narrow, b1, acc1, input_precision="ieee")
    return acc0, acc1


@triton.jit
def sum_products(a0, a1, b0, b1, K1: tl.constexpr):
    """Return the float32 sum of a * b over each row."""
    total = tl.sum(a0.to(tl.float32) * b0.to(tl.float32), axis=1)
    if K1 > 0:
        total += tl.sum(a1.to(tl.float32) * b1.to(tl.float32), axis=1)
    return total


@triton.jit
def hide_unseen(
    tile, m, n, L, segment_ptr, hidden, CAUSAL: tl.constexpr, SEGMENTS: tl.constexpr, INSIDE: tl.constexpr
):  # fmt: skip
    """Return the tile with `hidden` wherever query m does not see key n.

    m and n are indices, one a column and one a row of the tile. INSIDE: every n is below L. The caller masks queries past
    the end. segment_ptr points to the row's segments.
    """
    if not INSIDE:
        tile = tl.where(n < L, tile, hidden)
    if CAUSAL:
        tile = tl.where(n <= m, tile, hidden)
    if SEGMENTS:
        segment_m = tl.load(segment_ptr + m, mask=m < L, other=-2)
        segment_n = tl.load(segment_ptr + n, mask=n < L, other=-3)
        tile = tl.where(segment_m == segment_n, tile, hidden)
    return tile


@triton.jit
def load_log_sums(lse_ptr, segment_ptr, m, L, SEGMENTS: tl.constexpr):
    """Load the log-sums of queries; +inf past the end and at padding, where probability and gradient are then 0."""
    exists = m < L
    if SEGMENTS:
        exists = exists & (tl.load(segment_ptr + m, mask=exists, other=-1) >= 0)
    return tl.load(lse_ptr + m, mask=exists, other=float("inf"))
