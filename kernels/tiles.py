"""Parts of Triton kernels that several operations share: the order of tiles, and products of rows."""

from __future__ import annotations

from clipcore.kernels.launch import tl, triton


@triton.jit
def grouped_tile(pid, num_tiles_n, num_tiles_m, GROUP_N: tl.constexpr):
    """Tile (n, m) of program pid: GROUP_N tile rows advance together, so that neighbours find both operands in L2."""
    tiles_per_group = GROUP_N * num_tiles_m
    group = pid // tiles_per_group
    first_n = group * GROUP_N
    rows = min(num_tiles_n - first_n, GROUP_N)
    within = pid % tiles_per_group
    return first_n + within % rows, within // rows


@triton.jit
def add_product(acc, x, y):
    """acc + x . y in float32.

    float32 operands are summed by blocks: one running sum over a width of 1024 has several times the error of the
    library's product. Without the last argument the compiler would make one running sum of it again.
    """
    if x.dtype == tl.float32:
        acc += tl.dot(x, y, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        acc = tl.dot(x, y, acc)
    return acc


@triton.jit
def dot_rows(
    x_ptr,
    y_ptr,
    n,
    m,
    stride_x_n,
    stride_y_m,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return the float32 tile of x[n] . y[m] for row numbers n and m (int64, in range); BLOCK_D divides D.

    float32 operands multiply in IEEE arithmetic: float32 is the exact path, 16-bit operands the fast one.
    """
    d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + n[:, None] * stride_x_n + d[None, :]
    y_ptrs = y_ptr + m[None, :] * stride_y_m + d[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for _ in range(0, D, BLOCK_D):
        acc = add_product(acc, tl.load(x_ptrs), tl.load(y_ptrs))
        x_ptrs += BLOCK_D
        y_ptrs += BLOCK_D
    return acc


@triton.jit
def tile_numbers(N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_N: tl.constexpr):
    """Place of this program's tile in the block: (tile_n, tile_m, n [BLOCK_N], m [BLOCK_M])."""
    tile_n, tile_m = grouped_tile(
        tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), GROUP_N
    )
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    return tile_n, tile_m, n, m


@triton.jit
def add_to_place(sum_ptr, value):
    """Add to a float64 sum that is this program's own, over all blocks: see ``logits.program_sums``."""
    tl.store(sum_ptr, tl.load(sum_ptr) + value)


@triton.jit
def multiply(
    x_desc,
    y_desc,
    tile_n,
    tile_m,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return the float32 tile of x . y by tensor descriptors; rows and columns past the ends count as 0."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        x = x_desc.load([tile_n * BLOCK_N, d])
        y = y_desc.load([tile_m * BLOCK_M, d])
        acc = add_product(acc, x, y.T)
    return acc


@triton.jit
def positives(n, m, inside, first_label, image_id_ptr, text_id_ptr, IDS: tl.constexpr):
    """Return (valid, positive) of a tile: which pairs count, and which of them match. IDS as in ``Pairs.ids``."""
    label = (m[None, :] - n[:, None]) == first_label
    if IDS == "none":
        valid = inside
        positive = label & inside
    else:
        in_n = tl.max(inside.to(tl.int32), axis=1) > 0
        in_m = tl.max(inside.to(tl.int32), axis=0) > 0
        image_id = tl.load(image_id_ptr + n, mask=in_n, other=0)
        text_id = tl.load(text_id_ptr + m, mask=in_m, other=0)
        same = image_id[:, None] == text_id[None, :]
        if IDS == "ignore":
            valid = inside & (label | (same == 0))
            positive = label & inside
        else:
            valid = inside
            positive = same & inside
    return valid, positive
