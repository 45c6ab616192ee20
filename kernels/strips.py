"""Parts of Triton kernels that pass over a block of logits in memory: strips of rows, and which pairs count in them.

One warp owns a strip of ROWS x COLS logits and walks down its rows, STEP at a time. Sums over columns stay in registers
until the strip ends, and a sum over a row's COLS logits is 16 additions in each thread and five between them. A strip that
lies in the block as a whole and away from the positives ("interior", nearly all of them) needs no masks and no labels; the
others (EDGE) take one row a step.

With more than one warp Triton would share the columns out, and each step would meet in shared memory.
"""

from __future__ import annotations

from clipcore.kernels.launch import tl, triton


@triton.jit
def strip_place(N, M, first_label, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the first row and column of this program's strip, and 1 where it is at the edge, else 0."""
    strips_m = tl.cdiv(M, COLS)
    first_n = tl.program_id(0) // strips_m * ROWS
    first_m = tl.program_id(0) % strips_m * COLS
    is_whole = (first_n + ROWS <= N) & (first_m + COLS <= M)

    label_n = first_m - first_label  # the row whose positive is in the first column
    has_labels = (label_n < first_n + ROWS) & (label_n + COLS > first_n)
    return first_n, first_m, ((is_whole == 0) | has_labels).to(tl.int32)


@triton.jit
def strip_rows(first_n, N, ROWS: tl.constexpr, EDGE: tl.constexpr):
    """Return how many rows of a strip are in the block."""
    return min(ROWS, N - first_n) if EDGE else ROWS


@triton.jit
def strip_load(ptrs, inside, EDGE: tl.constexpr):
    """Load elements of a strip; 0 outside of the block."""
    return tl.load(ptrs, mask=inside, other=0) if EDGE else tl.load(ptrs)


@triton.jit
def strip_store(ptrs, values, inside, EDGE: tl.constexpr):
    """Store elements of a strip."""
    if EDGE:
        tl.store(ptrs, values, mask=inside)
    else:
        tl.store(ptrs, values)


@triton.jit
def strip_ids(ids_ptr, index, inside, IDS: tl.constexpr, EDGE: tl.constexpr):
    """Load ids of rows or of columns; without ids the index, which nobody reads."""
    if IDS == "none":
        ids = index
    elif EDGE:
        ids = tl.load(ids_ptr + index, mask=inside, other=0)
    else:
        ids = tl.load(ids_ptr + index)
    return ids


@triton.jit
def strip_pairs(
    n,  # [STEP], rows of the block
    m,  # [COLS]
    inside,  # [STEP, COLS]
    first_label,
    image_id,  # int64 [STEP]
    text_id,  # int64 [COLS]
    IDS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Return (valid, positive): which pairs count, and which of them match. IDS as in ``Pairs.ids``.

    In an interior strip all pairs count unless IDS is "ignore", and none match unless it is "positive".
    """
    if EDGE:
        label = (m[None, :] - n[:, None]) == first_label
        valid = inside
        positive = inside & label
        if IDS == "ignore":
            valid = inside & (label | (image_id[:, None] != text_id[None, :]))
        if IDS == "positive":
            positive = inside & (image_id[:, None] == text_id[None, :])
    else:
        valid = image_id[:, None] != text_id[None, :]
        positive = image_id[:, None] == text_id[None, :]
    return valid, positive
