"""The k nearest rows by cosine similarity, without the N x M matrix.

    values_nk, indices_nk = the k largest of <x_n, y_m> / (|x_n| |y_m|) over m, largest first, lower m first among equals

Legend: N query rows, M rows searched, D width, k neighbours. Short rows follow normalize.py (similarity 0).

Triton: a program owns BLOCK_N rows of x and one contiguous range of y. It computes a float32 tile of similarities at a
time (operands in their own dtype) and keeps k keys a row in registers. A key is a 64-bit integer: the high half is the
similarity as an integer of the same order, the low half falls as the index m rises. One integer comparison then decides
the order, and no two keys are equal. Tiles come in ascending m. A similarity enters only if it is strictly greater than
the row's smallest kept one; a tile is searched again only while some row has such a similarity. A row expects
k (1 + ln(M / k)) insertions, so almost every tile costs its product and one maximum. One integer top-k merges the keys
of the ranges. The order is total, so the result depends on tiles, ranges and chip only by the product's own rounding.

CPU: the same pass in PyTorch over chunks of CHUNK_N x CHUNK_M similarities; memory N k + (N + CHUNK_M) D + one chunk.

Ties are between similarities as computed, in float32 (float64 for float64 on the CPU), before the rounding to the
result's dtype. NaN counts as the largest value, as in torch.topk, and comes back as NaN.

Traffic for b-byte elements: b (N D + M D ceil(N / BLOCK_N)) if L2 holds nothing, 8 N k ranges for the keys; 2 N M D FLOPs.
Floor: the arithmetic; N = 10,000, M = 1,000,000, D = 512 in bfloat16 on an H100 is 10.4 ms at 989 TFLOP/s.
No gradient: both results are detached.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.launch import tl, triton
from clipcore.kernels.normalize import (
    check_rows,
    cosine_tile,
    lengths,
    lengths_ref,
    normalize_ref,
)
from clipcore.kernels.tiles import dot_rows

# The most keys that a row keeps in registers. The CPU path has no such limit.
MAX_K = 128
# Rows of x and of y in one chunk of the CPU path: 16 MiB of float32 similarities.
CHUNK_N = 1024
CHUNK_M = 4096


def similarity_topk_ref(x_ND: Tensor, y_MD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sort the whole matrix by a stable sort and return its first k columns. This is the reference."""
    dtype = torch.promote_types(x_ND.dtype, y_MD.dtype)
    wide = launch.accumulate_dtype(dtype)
    cosine_NM = normalize_ref(x_ND.to(wide)) @ normalize_ref(y_MD.to(wide)).T
    values_NM, indices_NM = cosine_NM.sort(dim=1, descending=True, stable=True)
    return values_NM[:, :k].to(dtype).contiguous(), indices_NM[:, :k].contiguous()


@triton.jit
def _ordered(bits):
    """Map float32 bits to int32 in the order of the floats, and back: the map is its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _key(value, m):
    """Return the 64-bit key of a similarity at index m: greater value first, then lower index."""
    value = tl.where(value == 0.0, 0.0, value)  # -0 equals 0, but its bits differ
    high = _ordered(value.to(tl.int32, bitcast=True)).to(tl.int64) << 32
    return high | (0x7FFFFFFF - m)


@triton.jit
def _key_value(key):
    return _ordered((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _insert(keys, scores, best, arg, m, first_m, BLOCK_M: tl.constexpr):
    """Replace each row's smallest key by its best score in the tile if that is greater, and remove it from the tile."""
    smallest = tl.min(keys, axis=1)
    enters = best > _key_value(smallest)
    key = _key(best, first_m + arg)
    keys = tl.where(enters[:, None] & (keys == smallest[:, None]), key[:, None], keys)
    taken = enters[:, None] & (m[None, :] == arg[:, None])
    return keys, tl.where(taken, float("-inf"), scores)


@triton.jit
def _similarity_topk_kernel(
    x_ptr,
    y_ptr,
    length_x_ptr,
    length_y_ptr,
    keys_ptr,
    stride_x_n,
    stride_y_m,
    N,
    M,
    D,
    k,
    tiles_per_range,
    K_SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXACT: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_n = tl.minimum(n, N - 1)
    length_x = tl.load(length_x_ptr + row_n)
    m = tl.arange(0, BLOCK_M)
    slot = tl.arange(0, K_SLOTS)
    # An empty slot is a key of -inf whose index no row has; the indices differ, so that each is replaced alone. Slots
    # from k on are never the smallest.
    empty = (tl.full((K_SLOTS,), -0x7F800001, tl.int64) << 32) | slot
    keys = tl.where(slot < k, empty, 0x7FFFFFFFFFFFFFFF)[None, :] + tl.zeros(
        (BLOCK_N, K_SLOTS), tl.int64
    )
    first_tile = tl.program_id(1).to(tl.int64) * tiles_per_range
    last_tile = tl.minimum(first_tile + tiles_per_range, tl.cdiv(M, BLOCK_M))
    for tile in range(first_tile, last_tile):
        first_m = tile * BLOCK_M
        row_m = tl.minimum(first_m + m, M - 1)
        dot = dot_rows(
            x_ptr, y_ptr, row_n, row_m, stride_x_n, stride_y_m, D, BLOCK_N, BLOCK_M, BLOCK_D
        )
        scores = cosine_tile(dot, length_x, tl.load(length_y_ptr + row_m), EXACT)
        # A cosine is finite or NaN: +inf stands for NaN from here to the host's decoding.
        scores = tl.where(scores == scores, scores, float("inf"))
        scores = tl.where((first_m + m < M)[None, :], scores, float("-inf"))
        best, arg = tl.max(scores, axis=1, return_indices=True)
        entering = tl.max((best > _key_value(tl.min(keys, axis=1))).to(tl.int32), axis=0)
        while entering > 0:
            keys, scores = _insert(keys, scores, best, arg, m, first_m, BLOCK_M)
            best, arg = tl.max(scores, axis=1, return_indices=True)
            entering = tl.max((best > _key_value(tl.min(keys, axis=1))).to(tl.int32), axis=0)
    offsets = (n * tl.num_programs(1) + tl.program_id(1))[:, None] * k + slot[None, :]
    tl.store(keys_ptr + offsets, keys, mask=(n[:, None] < N) & (slot[None, :] < k))


# (architecture, kind) -> BLOCK_N, BLOCK_M, BLOCK_D, num_warps, num_stages. "many" rows of 16-bit operands and at most 16
# keys a row; "few" rows, or more keys than registers hold beside a large tile; "exact" for float32. No row spills. On
# sm_100 Triton 3.7 cannot compile this epilogue on a tile in tensor memory. Its tiles stay below 64 rows there, so that
# they use the older matrix instruction.
_LAUNCH_TABLE = {
    (80, "many"): (64, 128, 64, 8, 3),
    (80, "few"): (16, 64, 64, 4, 3),
    (80, "exact"): (16, 64, 32, 8, 3),
    (90, "many"): (128, 128, 64, 8, 3),
    (90, "few"): (16, 64, 64, 4, 3),
    (90, "exact"): (16, 64, 32, 8, 3),
    (100, "many"): (32, 64, 64, 4, 3),
    (100, "few"): (16, 64, 64, 4, 3),
    (100, "exact"): (16, 64, 32, 8, 3),
}


def _launch_config(
    N: int, M: int, k: int, dtype: torch.dtype, architecture: int
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Return grid (blocks of rows, ranges of y) and launch keywords of the top-k kernel."""
    k_slots = max(16, triton.next_power_of_2(k))
    kind = "exact" if dtype == torch.float32 else "few" if N <= 16 or k_slots > 16 else "many"
    block_n, block_m, block_d, num_warps, num_stages = _LAUNCH_TABLE[architecture, kind]
    row_blocks = triton.cdiv(N, block_n)
    num_tiles = triton.cdiv(M, block_m)
    # Two waves of programs, but at least 8 tiles a range: every range starts from an empty list.
    wanted = triton.cdiv(2 * launch.NUM_PROCESSORS[architecture], row_blocks)
    tiles_per_range = max(8, triton.cdiv(num_tiles, wanted))
    config = {
        "tiles_per_range": tiles_per_range,
        "K_SLOTS": k_slots,
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "BLOCK_D": block_d,
        "EXACT": dtype == torch.float32,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "maxnreg": launch.most_registers(architecture, num_warps),
    }
    return (row_blocks, triton.cdiv(num_tiles, tiles_per_range)), config


def _similarity_topk_triton(x_ND: Tensor, y_MD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Launch the kernel, merge the keys of its ranges and decode them."""
    dtype = torch.promote_types(x_ND.dtype, y_MD.dtype)
    N, M = x_ND.shape[0], y_MD.shape[0]
    if N == 0:
        return x_ND.new_empty((0, k), dtype=dtype), x_ND.new_empty((0, k), dtype=torch.int64)
    grid, config = _launch_config(N, M, k, dtype, launch.architecture(x_ND.device))
    x_ND, y_MD = (launch.aligned_rows(t.to(dtype), config["BLOCK_D"]) for t in (x_ND, y_MD))
    keys_NS = torch.empty((N, grid[1] * k), dtype=torch.int64, device=x_ND.device)
    _similarity_topk_kernel[grid](
        x_ptr=x_ND,
        y_ptr=y_MD,
        length_x_ptr=lengths(x_ND),
        length_y_ptr=lengths(y_MD),
        keys_ptr=keys_NS,
        stride_x_n=x_ND.stride(0),
        stride_y_m=y_MD.stride(0),
        N=N,
        M=M,
        D=x_ND.shape[1],
        k=k,
        **config,
    )
    keys_NK = keys_NS.topk(k, dim=1, sorted=True).values
    high_NK = (keys_NK >> 32).to(torch.int32)
    values_NK = (high_NK ^ ((high_NK >> 31) & 0x7FFFFFFF)).view(torch.float32)
    values_NK = values_NK.masked_fill(values_NK == torch.inf, torch.nan)
    return values_NK.to(dtype), 0x7FFFFFFF - (keys_NK & 0x7FFFFFFF)


def _chunk_topk(scores_nm: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row by value, then by lower column; torch.topk leaves ties in any order."""
    num_columns = scores_nm.shape[1]
    values, columns = scores_nm.topk(min(k + 1, num_columns), dim=1)
    if num_columns > k:
        last, next_one = values[:, k - 1], values[:, k]
        # A tie across the boundary: torch.topk kept any of the equals. (If the next is NaN, so is the last.)
        tied = ((last == next_one) | next_one.isnan()).nonzero().squeeze(1)
        values, columns = values[:, :k], columns[:, :k]
        if len(tied) > 0:
            sorted_values, order = scores_nm[tied].sort(dim=1, descending=True, stable=True)
            values[tied], columns[tied] = sorted_values[:, :k], order[:, :k]
    columns, by_column = columns.sort(dim=1)
    return values.gather(1, by_column), columns


def _merge_chunk(values_nK: Tensor, indices_nK: Tensor, scores_nm: Tensor, first_m: int) -> None:
    """Update the k best of each row, in place, with a chunk whose indices start at first_m."""
    # Most rows find nothing new in most chunks, and a maximum is far cheaper than a top-k. A NaN is never `<=`.
    rows = (~(scores_nm.amax(1) <= values_nK[:, -1])).nonzero().squeeze(1)
    if len(rows) == 0:
        return
    k = values_nK.shape[1]
    values, columns = _chunk_topk(scores_nm if len(rows) == len(scores_nm) else scores_nm[rows], k)
    # The kept rows have lower indices than the chunk, so a stable sort by value breaks ties by lower index.
    values = torch.cat((values_nK[rows], values), dim=1)
    indices = torch.cat((indices_nK[rows], columns + first_m), dim=1)
    values, order = values.sort(dim=1, descending=True, stable=True)
    values_nK[rows] = values[:, :k]
    indices_nK[rows] = indices.gather(1, order[:, :k])


def _similarity_topk_cpu(x_ND: Tensor, y_MD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Merge the chunks of y into the k best rows; each chunk is read once."""
    dtype = torch.promote_types(x_ND.dtype, y_MD.dtype)
    wide = launch.accumulate_dtype(dtype)
    unit_x_ND = normalize_ref(x_ND.to(wide))
    values_NK = torch.full((len(x_ND), k), -torch.inf, dtype=wide)
    indices_NK = torch.full((len(x_ND), k), len(y_MD))
    for first_m in range(0, len(y_MD), CHUNK_M):
        y_mD = y_MD[first_m : first_m + CHUNK_M].to(wide)
        length_m = lengths_ref(y_mD)
        for first_n in range(0, len(x_ND), CHUNK_N):
            n = slice(first_n, first_n + CHUNK_N)
            scores_nm = (unit_x_ND[n] @ y_mD.T).div_(length_m)
            _merge_chunk(values_NK[n], indices_NK[n], scores_nm, first_m)
    return values_NK.to(dtype), indices_NK


@torch.library.custom_op("clipcore::similarity_topk", mutates_args=())
def _similarity_topk(x_ND: Tensor, y_MD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    search = _similarity_topk_triton if x_ND.is_cuda else _similarity_topk_cpu
    with launch.on_device(x_ND.device):
        return search(x_ND, y_MD, k)


@_similarity_topk.register_fake
def _(x_ND: Tensor, y_MD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x_ND.dtype, y_MD.dtype)
    shape = (x_ND.shape[0], k)
    return x_ND.new_empty(shape, dtype=dtype), x_ND.new_empty(shape, dtype=torch.int64)


# No operand is cast: autocast trades accuracy for time in training, and this op ranks finished embeddings.
launch.register_autocast("similarity_topk", num_operands=0)


def similarity_topk(x_ND: Tensor, y_MD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k rows of y with the largest cosine similarity to each row of x; N x M is never held.

    Largest first; among equal similarities the lower index first, always. Triton on CUDA, PyTorch over chunks on the
    CPU. float32 inside (float64 for float64 on the CPU). Rows shorter than 1e-12 have similarity 0 to everything, NaN
    ranks above every number. Not differentiable. Autocast changes nothing.

    Args:
        x_ND: [N, D] float16, bfloat16 or float32 (float64 on the CPU), D at most 8192 on CUDA.
        y_MD: [M, D], same device, M below 2^31 - 1; mixed dtypes are promoted.
        k: 1 to M; on CUDA at most 128, and cheapest up to 16.

    Returns:
        values [N, k] in the promoted dtype and int64 indices [N, k] into y.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or k is out of range.

    >>> import torch
    >>> similarity_topk(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0], [3.0, 0.0], [5.0, 0.0]]), 2)
    (tensor([[1., 1.]]), tensor([[1, 2]]))
    """
    check_rows(x_ND, y_MD)
    M = y_MD.shape[0]
    if not 1 <= k <= M:
        raise ValueError(f"k has to be between 1 and the {M} rows of y, got {k}")
    if x_ND.is_cuda and k > MAX_K:
        raise ValueError(f"k is at most {MAX_K} on CUDA, got {k}: move x and y to the CPU")
    if M >= 2**31 - 1:
        raise ValueError(f"y has {M} rows, an index holds 2^31 - 2")
    with torch.no_grad():
        return torch.ops.clipcore.similarity_topk(x_ND, y_MD, k)
