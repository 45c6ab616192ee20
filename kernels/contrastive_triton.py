"""The contrastive loss in Triton: the kernels, their launch table, and the walk over blocks that launches them.

Legend, maths, precision and traffic: contrastive.py. N and M are rows and columns of a block, tiles are parts of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipcore.kernels import logits, logits_triton, tiles
from clipcore.kernels.contrastive_problem import (
    Logarithms,
    Online,
    Problem,
    Upstream,
    logarithms,
    new_sums,
)
from clipcore.kernels.logits import LOG2E, Pairs
from clipcore.kernels.logits_triton import load_product, multiply, positives, tile_numbers
from clipcore.kernels.tiles import dot_rows, tl, triton

# |dz| over the largest upstream gradient is at most 4 (each direction takes off and puts back at most 1 of 2).
FP16_GRADIENT_SCALE = 2.0**13


@triton.jit
def _logit(cosine, scale_ptr):
    """cosine times a factor of two floats: rounding the factor to one would shift all logits alike."""
    return cosine * tl.load(scale_ptr) + cosine * tl.load(scale_ptr + 1)


@triton.jit
def _store_sums(partial_ptr, tile, length, index, values):
    """One row of a [tiles, length] buffer of partial sums."""
    tl.store(partial_ptr + tile.to(tl.int64) * length + index, values, mask=index < length)


@triton.jit
def _pack(cosine, valid, stash_ptr, range_ptr, offsets):
    """Store a tile in 16 bits between its least and greatest value; returns the values that were stored."""
    least = tl.min(tl.min(tl.where(valid, cosine, float("inf")), axis=1), axis=0)
    most = tl.max(tl.max(tl.where(valid, cosine, float("-inf")), axis=1), axis=0)
    # A tile without a valid pair has no range, one of equal values a range of 0.
    step = tl.maximum((most - least) / 65535.0, 1e-30)
    tl.store(range_ptr, least)
    tl.store(range_ptr + 1, step)
    code = tl.minimum(tl.maximum(tl.floor((cosine - least) / step + 0.5), 0.0), 65535.0)
    tl.store(stash_ptr + offsets, (code - 32768.0).to(tl.int16), mask=valid)
    stored = least + step * code
    return tl.where(cosine == cosine, stored, cosine)  # a NaN stays one


@triton.jit
def _unpack(stash_ptr, range_ptr, offsets, valid):
    """The values of a stored tile."""
    code = tl.load(stash_ptr + offsets, mask=valid, other=0).to(tl.float32) + 32768.0
    return tl.load(range_ptr) + tl.load(range_ptr + 1) * code


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
    """The values of any rows and columns of a stash, each by the range of the tile that wrote it."""
    n, m = n.to(tl.int64)[:, None], m.to(tl.int64)[None, :]
    code = tl.load(stash_ptr + n * stride_n + m * stride_m, mask=inside, other=0)
    range_ptr += (n // RANGE_N) * stride_range_n + (m // RANGE_M) * stride_range_m
    least = tl.load(range_ptr, mask=inside, other=0.0)
    return least + tl.load(range_ptr + 1, mask=inside, other=0.0) * (code.to(tl.float32) + 32768.0)


@triton.jit
def _contrastive_sums_kernel(
    x_desc,
    y_desc,
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
    D,
    stride_product,
    stride_stash,
    stride_range,
    first_label,
    IDS: tl.constexpr,
    TARGETS: tl.constexpr,
    STASH: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    tile_n, tile_m, n, m = tile_numbers(N, M, BLOCK_N, BLOCK_M, GROUP_N)
    inside = (n[:, None] < N) & (m[None, :] < M)
    if FUSED:
        cosine = multiply(x_desc, y_desc, tile_n, tile_m, D, BLOCK_N, BLOCK_M, BLOCK_D)
    else:
        cosine = load_product(product_ptr, stride_product, n, m, inside)
    valid, positive = positives(n, m, inside, first_label, image_id_ptr, text_id_ptr, IDS)
    if STASH:
        offsets = n.to(tl.int64)[:, None] * stride_stash + m[None, :]
        tile_range_ptr = range_ptr + tile_n.to(tl.int64) * stride_range + 2 * tile_m
        cosine = _pack(cosine, inside, stash_ptr, tile_range_ptr, offsets)
    z = _logit(cosine, scale_ptr)
    # A positive that is known by its place is added to the sums from its logit: see the module docstring.
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


@triton.jit
def _contrastive_online_kernel(
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

    x and y are the operands that everything else multiplies; with STASH x is the stash itself, stride_y_m its other
    stride, and what is read are the very numbers that were summed. Positives by place stay out here too.
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
        if STASH:
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


@triton.jit
def _contrastive_grad_kernel(
    x_desc,
    y_desc,
    product_ptr,
    range_ptr,
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
    stride_product,
    stride_range,
    stride_grad,
    first_label,
    RANGE_N: tl.constexpr,
    RANGE_M: tl.constexpr,
    GRADIENT_SCALE: tl.constexpr,
    IDS: tl.constexpr,
    TARGETS: tl.constexpr,
    STASH: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    tile_n, tile_m, n, m = tile_numbers(N, M, BLOCK_N, BLOCK_M, GROUP_N)
    inside = (n[:, None] < N) & (m[None, :] < M)
    if FUSED:
        cosine = multiply(x_desc, y_desc, tile_n, tile_m, D, BLOCK_N, BLOCK_M, BLOCK_D)
    elif STASH:
        offsets = n.to(tl.int64)[:, None] * stride_product + m[None, :]
        range_n = (tile_n * BLOCK_N // RANGE_N).to(tl.int64)
        tile_range_ptr = range_ptr + range_n * stride_range + 2 * (tile_m * BLOCK_M // RANGE_M)
        cosine = _unpack(product_ptr, tile_range_ptr, offsets, inside)
    else:
        cosine = load_product(product_ptr, stride_product, n, m, inside)
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
    tl.store(along_ptr + tl.program_id(0), along)
    offsets = n.to(tl.int64)[:, None] * stride_grad + m[None, :]
    stored = (grad * GRADIENT_SCALE).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + offsets, stored, mask=inside)


# (architecture, kind) -> BLOCK_N, BLOCK_M, BLOCK_D, num_warps, num_stages. "pass" reads a block that the library
# multiplied; "fused" multiplies 16-bit operands itself, "spread" does so with ids or spread targets, and "exact"
# multiplies float32 ones; "online" and "online exact" are the kernel of the running maximum. No row spills. Not yet
# measured. On sm_100 Triton 3.7 cannot compile the epilogues on a tile in tensor memory: tiles of fewer than 64 rows
# take the older matrix instruction.
_LAUNCH_TABLE = {
    (80, "pass"): (64, 128, 16, 8, 1),
    (80, "fused"): (64, 128, 32, 8, 3),
    (80, "spread"): (64, 128, 32, 8, 3),
    (80, "exact"): (64, 64, 16, 8, 2),
    (80, "online"): (64, 64, 64, 4, 3),
    (80, "online exact"): (32, 64, 16, 4, 3),
    (90, "pass"): (64, 128, 16, 8, 1),
    (90, "fused"): (128, 128, 64, 8, 3),
    (90, "spread"): (64, 128, 64, 8, 3),
    (90, "exact"): (64, 128, 16, 8, 2),
    (90, "online"): (64, 64, 64, 4, 3),
    (90, "online exact"): (32, 64, 32, 4, 3),
    (100, "pass"): (64, 128, 16, 8, 1),
    (100, "fused"): (32, 128, 64, 4, 3),
    (100, "spread"): (32, 128, 64, 4, 3),
    (100, "exact"): (64, 64, 16, 8, 2),
    (100, "online"): (32, 64, 32, 4, 3),
    (100, "online exact"): (32, 64, 32, 4, 3),
}

# The engine by (architecture, width, operand bits), where both were measured; elsewhere the library's.
ENGINE_TABLE: dict[tuple[int, int, int], str] = {}


def _kind(problem: Problem, fused: bool) -> str:
    """The row of the launch table for a block of the problem."""
    if not fused:
        return "pass"
    if problem.operand == torch.float32:
        return "exact"
    return "fused" if problem.by_place and problem.pairs.image_ids is None else "spread"


def _tile_arguments(
    problem: Problem, x_RE: Tensor, y_CE: Tensor, rows: slice, columns: slice, fused: bool
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and the launch keywords that every tile kernel has, for one block."""
    launch = _LAUNCH_TABLE[problem.architecture, _kind(problem, fused)]
    if not fused:  # a tile that reads a stash has to lie in one of those that wrote it, which have a range each
        range_n, range_m = _stash_tile(problem)
        launch = (min(launch[0], range_n), min(launch[1], range_m), *launch[2:])
        assert range_n % launch[0] == 0 and range_m % launch[1] == 0
    pairs = problem.pairs.block(rows, columns)
    return logits_triton.tile_arguments(pairs, x_RE, y_CE, launch, fused)


def _factors(problem: Problem) -> Tensor:
    """float32 [3]: the factor from cosines to powers of two in two parts, and the offset of the powers."""
    to_power, offset = problem.powers()
    high = to_power.float()
    return torch.stack((high, (to_power - high).float(), offset.float()))


def packed_shapes(B: int, G: int) -> tuple[tuple[int, int], tuple[int, int, int], torch.dtype]:
    """Shapes of a stash and of its ranges, as many as the finest tile makes, and the stash's dtype."""
    finest = [row for (_, kind), row in _LAUNCH_TABLE.items() if not kind.startswith("online")]
    rows, columns = min(row[0] for row in finest), min(row[1] for row in finest)
    return (B, -(-G // 8) * 8), (-(-B // rows), -(-G // columns), 2), torch.int16


def _sum_sides(problem: Problem) -> tuple[int, int]:
    """Sides of a block in the forward: float32 logits for the library's engine, partial sums for the fused one."""
    return (_sum_side(problem),) * 2 if problem.engine == "fused" else problem.sides(4)


def _sum_side(problem: Problem) -> int:
    """Side of a block that leaves nothing but sums."""
    return logits_triton.sum_side(
        *(problem.image_BE.shape[1], problem.workspace_bytes, problem.operand.itemsize)
    )


def contrastive_fwd_triton(problem: Problem, stash: bool) -> tuple[Tensor, ...]:
    """The outputs of `clipcore::contrastive_fwd`."""
    image_BE, text_GE = problem.image_BE, problem.text_GE
    B, G, device = len(image_BE), len(text_GE), image_BE.device
    shape, range_shape, dtype = packed_shapes(B, G) if stash else ((0, 0), (0, 0, 2), torch.int16)
    stash_BG = torch.empty(shape, dtype=dtype, device=device)
    # What no tile writes: an output is a function of its inputs, to the last byte.
    stash_BG[:, G:] = 0
    ranges = torch.zeros(range_shape, dtype=torch.float32, device=device)
    scale = _factors(problem)
    row_sum, row_target = new_sums(problem, B)
    column_sum, column_target = new_sums(problem, G)
    uniform = None if problem.targets is None else problem.targets.relative_uniform()
    fused = problem.engine == "fused"
    side_R, side_C = _sum_sides(problem)
    block = torch.empty(
        0 if fused else min(side_R, B) * min(side_C, G), dtype=torch.float32, device=device
    )
    for rows in logits.blocks(B, side_R):
        x_RE = logits_triton.operand(image_BE[rows], problem.normalized, problem.operand)
        for columns in logits.blocks(G, side_C):
            y_CE = logits_triton.operand(text_GE[columns], problem.normalized, problem.operand)
            R, C = len(x_RE), len(y_CE)
            product_RC = None
            if not fused:
                product_RC = tiles.matmul_fp32(x_RE, y_CE.T, block[: R * C].view(R, C))
            grid, arguments = _tile_arguments(problem, x_RE, y_CE, rows, columns, fused)
            tiles_n = triton.cdiv(R, arguments["BLOCK_N"])
            tiles_m = triton.cdiv(C, arguments["BLOCK_M"])
            sums = [
                torch.empty(length, dtype=torch.float32, device=device)
                for length in ((tiles_m, R), (tiles_n, C))
            ]
            spread = (
                [row_target[rows], column_target[columns]]
                if problem.by_place
                else [torch.empty_like(total) for total in sums]
            )
            _contrastive_sums_kernel[grid](
                product_ptr=product_RC,
                scale_ptr=scale,
                row_uniform_ptr=None if uniform is None else uniform[0][rows],
                column_uniform_ptr=None if uniform is None else uniform[1][columns],
                row_sum_ptr=sums[0],
                column_sum_ptr=sums[1],
                row_target_ptr=spread[0],
                column_target_ptr=spread[1],
                stash_ptr=stash_BG[rows, columns.start :] if stash else None,
                range_ptr=_range_block(ranges, arguments, rows, columns) if stash else None,
                stride_product=C,
                stride_stash=stash_BG.stride(0),
                stride_range=ranges.stride(0),
                TARGETS=not problem.by_place,
                STASH=stash,
                **arguments,
            )
            row_sum[rows] += sums[0].sum(0)
            column_sum[columns] += sums[1].sum(0)
            if not problem.by_place:
                row_target[rows] += spread[0].sum(0)
                column_target[columns] += spread[1].sum(0)
    if problem.targets is not None:
        row_target *= problem.targets.row_positive_B
        column_target *= problem.targets.column_positive_G
    logs, untrusted = logarithms(
        problem, row_sum, column_sum, row_target, column_target, torch.float32
    )
    product_RC = None
    del block
    rests = _online(problem, scale, untrusted, stash_BG, ranges)
    online = [Online(*side) for side in zip(rests, (row_target, column_target), strict=True)]
    logs = logs.completed(problem, untrusted, online)
    return (*logs[:2], row_target, column_target, *logs[2:], stash_BG, ranges)


def _range_block(ranges: Tensor, arguments: dict[str, Any], rows: slice, columns: slice) -> Tensor:
    """The ranges from a block's first tile on, in the grid of the tiles that wrote them."""
    return ranges[rows.start // arguments["BLOCK_N"] :, columns.start // arguments["BLOCK_M"] :]


def _online(
    problem: Problem, scale: Tensor, untrusted: Sequence[Tensor], stash_BG: Tensor, ranges: Tensor
) -> list[Tensor]:
    """Log-sum-exps of untrusted rows and columns without positives by place: kernels that otherwise return at once."""
    image_BE, text_GE = problem.image_BE, problem.text_GE
    chosen = [side.to(torch.int32) for side in untrusted]
    largest = [torch.full_like(side, -torch.inf, dtype=torch.float32) for side in chosen]
    total = [torch.zeros_like(side, dtype=torch.float32) for side in chosen]
    stash = stash_BG.numel() > 0
    kind = "online exact" if stash or problem.operand == torch.float32 else "online"
    launch = _LAUNCH_TABLE[problem.architecture, kind]

    def continued(
        side: int,
        part: slice,
        operands: tuple[Tensor, Tensor],
        sizes: tuple[int, int],
        pairs: Pairs,
        strides: tuple[int, int, int, int],
        tile: tuple[int, int],
    ) -> None:
        block_n, block_m, block_d, num_warps, num_stages = launch
        _contrastive_online_kernel[(triton.cdiv(sizes[0], block_n),)](
            x_ptr=operands[0],
            y_ptr=operands[1],
            range_ptr=ranges,
            scale_ptr=scale,
            image_id_ptr=pairs.image_ids,
            text_id_ptr=pairs.text_ids,
            untrusted_ptr=chosen[side][part],
            largest_ptr=largest[side][part],
            total_ptr=total[side][part],
            stride_x_n=strides[0],
            stride_y_m=strides[1],
            stride_range_n=strides[2],
            stride_range_m=strides[3],
            N=sizes[0],
            M=sizes[1],
            D=operands[0].shape[1],
            first_label=pairs.first_label,
            RANGE_N=tile[0],
            RANGE_M=tile[1],
            IDS=pairs.ids,
            TARGETS=not problem.by_place,
            STASH=stash,
            BLOCK_N=block_n,
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            num_warps=num_warps,
            num_stages=num_stages,
            maxnreg=tiles.most_registers(problem.architecture, num_warps),
        )

    B, G = len(image_BE), len(text_GE)
    if stash:
        row, column = stash_BG.stride()
        range_row, range_column = ranges.stride()[:2]
        tile_n, tile_m = _stash_tile(problem)
        both = stash_BG, stash_BG
        strides = (row, column, range_row, range_column)
        continued(0, slice(0, B), both, (B, G), problem.pairs, strides, (tile_n, tile_m))
        strides = (column, row, range_column, range_row)
        exchanged = problem.pairs.exchanged()
        continued(1, slice(0, G), both, (G, B), exchanged, strides, (tile_m, tile_n))
    else:
        for rows in logits.blocks(B, _sum_side(problem)):
            x_RE = logits_triton.operand(image_BE[rows], problem.normalized, problem.operand)
            x_RE = tiles.aligned_rows(x_RE, launch[2])
            for columns in logits.blocks(G, _sum_side(problem)):
                y_CE = logits_triton.operand(text_GE[columns], problem.normalized, problem.operand)
                y_CE = tiles.aligned_rows(y_CE, launch[2])
                pairs, sizes = problem.pairs.block(rows, columns), (len(x_RE), len(y_CE))
                row, column = x_RE.stride(0), y_CE.stride(0)
                continued(0, rows, (x_RE, y_CE), sizes, pairs, (row, column, 0, 0), (1, 1))
                continued(
                    *(1, columns, (y_CE, x_RE), sizes[::-1], pairs.exchanged()),
                    *((column, row, 0, 0), (1, 1)),
                )
    return [most.double() + part.double().log2() for most, part in zip(largest, total, strict=True)]


def contrastive_bwd_triton(
    problem: Problem,
    upstream: Sequence[Tensor],
    terms: Sequence[Tensor],
    need: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_image, d_text, d_scale); a side that nobody needs costs no product."""
    image_BE, text_GE, operand = problem.image_BE, problem.text_GE, problem.operand
    B, G, device = len(image_BE), len(text_GE), image_BE.device
    *sums, stash_BG, ranges = terms
    logs = Logarithms(*sums)
    stash = stash_BG.numel() > 0
    fused = problem.engine == "fused" and not stash
    grad_scale = FP16_GRADIENT_SCALE if operand == torch.float16 else 1.0
    parts, largest = Upstream.spread(
        upstream, problem.targets, logs.row_rest_B, logs.column_rest_G
    ).over_largest()
    to_power, offset = problem.powers()
    flag = torch.cat(logs.untrusted(offset)).any().to(torch.int32)
    row_factor, column_factor = (factor.float() for factor in parts.factors(logs))
    row_offset, column_offset = logs.row_offset_B.float(), logs.column_offset_G.float()
    parts = parts.to(torch.float32)
    factor = (to_power * largest / grad_scale).float()
    gradients = logits_triton.Gradients(image_BE, text_GE, problem.normalized, need)
    d_scale, scale = torch.zeros((), dtype=torch.float64, device=device), _factors(problem)
    # float32 gradients take the place of the logits.
    own_product = not (fused or stash)
    in_place = own_product and operand == torch.float32
    side_R, side_C = problem.sides(
        (4 if own_product else 0) + (0 if in_place else operand.itemsize)
    )
    size = min(side_R, B) * min(side_C, G)
    products = torch.empty(size if own_product else 0, dtype=torch.float32, device=device)
    grads = products if in_place else torch.empty(size, dtype=operand, device=device)
    for rows in logits.blocks(B, side_R):
        x_RE = logits_triton.operand(image_BE[rows], problem.normalized, operand)
        gradients.begin_rows(rows)
        for columns in logits.blocks(G, side_C):
            y_CE = logits_triton.operand(text_GE[columns], problem.normalized, operand)
            R, C = len(x_RE), len(y_CE)
            grad_RC = grads[: R * C].view(R, C)
            common = {
                "scale_ptr": scale,
                "flag_ptr": flag,
                "row_factor_ptr": row_factor[rows],
                "row_offset_ptr": row_offset[rows],
                "column_factor_ptr": column_factor[columns],
                "column_offset_ptr": column_offset[columns],
                **parts.block(rows, columns).pointers(),
                "grad_ptr": grad_RC,
                "stride_grad": C,
                "GRADIENT_SCALE": grad_scale,
                "TARGETS": not problem.by_place,
            }
            product_RC, stride = None, C
            if stash:
                product_RC, stride = stash_BG[rows, columns.start :], stash_BG.stride(0)
                common |= _stash_arguments(problem, ranges, rows, columns)
            elif own_product:
                product_RC = tiles.matmul_fp32(x_RE, y_CE.T, products[: R * C].view(R, C))
            grid, arguments = _tile_arguments(problem, x_RE, y_CE, rows, columns, fused)
            d_scale += _launch_grad(grid, arguments, common, product_RC, stride)
            gradients.add(grad_RC, x_RE, y_CE, columns)
        gradients.end_rows(rows, factor)
    grad_scalar = (d_scale * largest * LOG2E).to(problem.scale.dtype).reshape(problem.scale.shape)
    return gradients.image_grad, gradients.text_grad(factor), grad_scalar


def _stash_tile(problem: Problem) -> tuple[int, int]:
    """Rows and columns of the tiles that wrote a stash."""
    return _LAUNCH_TABLE[problem.architecture, _kind(problem, problem.engine == "fused")][:2]


def _stash_arguments(
    problem: Problem, ranges: Tensor, rows: slice, columns: slice
) -> dict[str, Any]:
    """Launch keywords of a block that is read from a stash."""
    range_n, range_m = _stash_tile(problem)
    return {
        "range_ptr": ranges[rows.start // range_n :, columns.start // range_m :],
        "stride_range": ranges.stride(0),
        "RANGE_N": range_n,
        "RANGE_M": range_m,
        "STASH": True,
    }


def _launch_grad(
    grid: tuple[int],
    arguments: dict[str, Any],
    common: dict[str, Any],
    product: Tensor | None,
    stride_product: int,
) -> Tensor:
    """Launch the gradient kernel on one block; returns the block's sum of gradient times cosine."""
    along = torch.zeros(grid, dtype=torch.float32, device=common["grad_ptr"].device)
    defaults = {"range_ptr": None, "stride_range": 0, "RANGE_N": 1, "RANGE_M": 1, "STASH": False}
    _contrastive_grad_kernel[grid](
        product_ptr=product,
        stride_product=stride_product,
        along_ptr=along,
        **{**defaults, **common, **arguments},
    )
    return along.sum(dtype=torch.float64)
