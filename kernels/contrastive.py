"""InfoNCE of image and text embeddings: both directions from one similarity, in bounded memory, without atomics.

Legend: B image rows (of this rank), G text rows (of all), E embedding size, R and C rows and columns of a block.

    z_bg   = scale * <x_b, y_g>                         x, y = image and text rows, over their lengths if asked
    r_b    = log sum_g exp(z_bg)                        c_g = log sum_b exp(z_bg), over valid pairs
    t_b    = sum_g T_bg z_bg                            u_g = sum_b U_bg z_bg, the logits of what should be found
    loss   = 1/2 [mean_b (r_b - t_b) + mean_g (c_g - u_g)] over the rows and columns that have a positive
    dz_bg  = dr_b exp(z_bg - r_b) + dc_g exp(z_bg - c_g) + dt_b T_bg + du_g U_bg
    dx     = scale dz y,     dy = scale dz^T x,     dscale = sum_bg dz_bg <x_b, y_g>

T and U spread a row's and a column's target: all on the pair's own column (plain), evenly on the columns of equal id
("positive"), and a share `label_smoothing` of it evenly on every valid column. With ids in mode "ignore" a pair of
equal ids that is not the row's own is no valid pair: it counts neither as positive nor as negative.

The operation returns r, c, t, u and differentiates them; the loss is a few sums of them (`contrastive_loss`), and over
several ranks `clipcore.loss` completes c first.

Sums: with a fixed offset o, 0 up to scale 70 and scale - 70 beyond, the one exponential exp(z - o) serves r and c at
once: |cosine| <= 1 keeps it below e^70, so that 2^24 rows of them fit in float32, and cosines down to -0.57 at scale
100 stay normal numbers. In powers of two o is an integer, so that z - o is exact and the target's exponential cancels.
Every row's and column's sum is checked on the device; where one is too small to be exact, or not finite (scale above
100, rows that are not of length one), an online maximum recomputes r and c, and the backward takes two exponentials.
No host synchronisation; a kernel that is not needed returns at once.

Memory: "recompute" holds one block of logits and makes the similarity again in the backward: 4 products (8 B G E
FLOP). "stash" keeps each logit in 16 bits, fixed-point between the least and greatest of its tile, and needs 3 (6 B G
E). The error of a stashed logit is at most scale / 65,536 and typically a quarter of that; sums and gradients use the
same stored values. On the CPU a stash holds exponentials in float32 and changes no bit. `plan` chooses and says why.

Precision: logits.py. Logits, exponentials and sums are float32. The gradient of a block is complete, the positives
taken off, before it is rounded to the operand dtype; it is stored over its largest upstream gradient, times 2^13 in
float16, so that probabilities down to 1e-8 are normal numbers.
Traffic per logit: library engine 8 bytes forward, 14 backward (stash: 10 and 8), fused engine 0 and 6 (stash 2 and 8),
for 16-bit operands, plus the operands once a block.
Determinism: no atomics; partial sums are written and added in a fixed order.

Source: Radford et al. 2021 (arXiv 2103.00020), figure 3. Single-pass sums with a fixed offset are also in
MemoryEfficientCLIP (whose offset fails at scale 100), blocks with two library products in Liger-Kernel.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipcore.kernels import logits, tiles
from clipcore.kernels.logits import LOG2E, load_product, multiply, positives, tile_numbers
from clipcore.kernels.normalize import cosine_tile, lengths, normalize_ref
from clipcore.kernels.tiles import dot_rows, tl, triton

# exp(z - o) is at most 2^101 (e^70) for logits up to the scale; float64 has room for any scale of use.
HEADROOM = {torch.float32: 101.0, torch.float64: 900.0}
# |dz| over the largest upstream gradient is at most 4 (each direction takes off and puts back at most 1 of 2).
FP16_GRADIENT_SCALE = 2.0**13
# A stash larger than this is recomputed instead, unless the caller allows more.
STASH_BYTES = 2**30
# The finest tile that a stash is scaled by.
STASH_TILE = (64, 128)
SAME_ID = ("ignore", "positive")

_log = logging.getLogger("clipcore")


class ContrastiveTerms(NamedTuple):
    """What the loss is made of, each differentiable; float64, since the losses are small differences of them."""

    row_lse_B: Tensor  # log-sum-exp of each image's logits over the texts
    column_lse_G: Tensor  # of each text's logits over these images
    row_target_B: Tensor  # mean logit of each image's target; of no meaning where it has none
    column_target_G: Tensor  # of each text's target, the part of these images


class Targets(NamedTuple):
    """How targets spread (T and U of the module docstring): weight of a positive and of any valid pair."""

    row_positive_B: Tensor
    row_uniform_B: Tensor
    column_positive_G: Tensor
    column_uniform_G: Tensor


@dataclass(frozen=True)
class Plan:
    """How a problem will be computed; `str` says so in one line."""

    shape: tuple[int, int, int]  # B, G, E
    operand: torch.dtype
    device: str
    engine: str
    backward: bool
    stash: bool
    stash_bytes: int  # what a stash takes
    budget_bytes: int  # what it may take

    def __str__(self) -> str:
        B, G, E = self.shape
        mode = f"{'stash' if self.stash else 'recompute'}, {3 if self.stash else 4} products"
        why = "fits" if self.stash else "is more than"
        return (
            f"contrastive loss of {B:,} x {G:,} x {E} on {self.device}: "
            f"{mode if self.backward else 'forward only, 1 product'} in "
            f"{str(self.operand).removeprefix('torch.')}, {self.engine} engine; a stash of "
            f"{self.stash_bytes / 2**20:,.1f} MiB {why if self.backward else 'is not needed under'} "
            f"the budget of {self.budget_bytes / 2**20:,.1f} MiB"
        )


def contrastive_ref(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor | float,
    *,
    normalize: bool = False,
    first_label: int = 0,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same_id: str = "ignore",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The reference: the loss by the B x G matrix, in the promoted dtype of the embeddings, differentiable."""
    dtype = torch.promote_types(image_BE.dtype, text_GE.dtype)
    x_BE, y_GE = image_BE.to(dtype), text_GE.to(dtype)
    if normalize:
        x_BE, y_GE = normalize_ref(x_BE), normalize_ref(y_GE)
    z_BG = scale * x_BE @ y_GE.T
    B, G = z_BG.shape
    label_BG = torch.zeros(B, G, dtype=torch.bool, device=z_BG.device)
    label_BG.diagonal(first_label).fill_(True)
    valid_BG, positive_BG = torch.ones_like(label_BG), label_BG
    if image_ids is not None and text_ids is not None:
        same_BG = image_ids[:, None] == text_ids
        if same_id == "positive":
            positive_BG = same_BG
        else:
            valid_BG = label_BG | ~same_BG
    return (
        _cross_entropy_ref(z_BG, valid_BG, positive_BG, label_smoothing)
        + _cross_entropy_ref(z_BG.T, valid_BG.T, positive_BG.T, label_smoothing)
    ) / 2


def _cross_entropy_ref(z: Tensor, valid: Tensor, positive: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy of the rows that have a positive."""
    rows = positive.any(1)
    z, valid, positive = z[rows], valid[rows], positive[rows]
    log_p = z.masked_fill(~valid, -torch.inf).log_softmax(1).masked_fill(~valid, 0)
    positive, valid = positive.to(z.dtype), valid.to(z.dtype)
    target = (1 - smoothing) * positive / positive.sum(1, keepdim=True)
    target = target + smoothing * valid / valid.sum(1, keepdim=True)
    return -(target * log_p).sum(1).mean()


# Triton.


@triton.jit
def _store_sums(partial_ptr, tile, length, index, values):
    """One row of a [tiles, length] buffer of partial sums."""
    tl.store(partial_ptr + tile.to(tl.int64) * length + index, values, mask=index < length)


@triton.jit
def _pack(cosine, valid, stash_ptr, range_ptr, offsets, BLOCK_N: tl.constexpr):
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
def _contrastive_sums_kernel(
    x_desc,
    y_desc,
    product_ptr,
    scale_ptr,
    image_id_ptr,
    text_id_ptr,
    row_positive_ptr,
    row_uniform_ptr,
    column_positive_ptr,
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
        cosine = _pack(cosine, inside, stash_ptr, tile_range_ptr, offsets, BLOCK_N)
    z = cosine * tl.load(scale_ptr)
    power = tl.where(valid, tl.exp2(z - tl.load(scale_ptr + 1)), 0.0)
    _store_sums(row_sum_ptr, tile_m, N, n, tl.sum(power, axis=1))
    _store_sums(column_sum_ptr, tile_n, M, m, tl.sum(power, axis=0))
    if TARGETS:
        row_positive = tl.load(row_positive_ptr + n, mask=n < N, other=0.0)
        row_uniform = tl.load(row_uniform_ptr + n, mask=n < N, other=0.0)
        column_positive = tl.load(column_positive_ptr + m, mask=m < M, other=0.0)
        column_uniform = tl.load(column_uniform_ptr + m, mask=m < M, other=0.0)
        z = tl.where(valid, z, 0.0)
        row = z * (tl.where(positive, row_positive[:, None], 0.0) + row_uniform[:, None])
        column = z * (tl.where(positive, column_positive[None, :], 0.0) + column_uniform[None, :])
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
    length_x_ptr,
    length_y_ptr,
    scale_ptr,
    image_id_ptr,
    text_id_ptr,
    flag_ptr,
    lse_ptr,
    stride_x_n,
    stride_y_m,
    N,
    M,
    D,
    first_label,
    IDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """log-sum-exp of the rows of x over y by a running maximum; for columns, exchange x and y."""
    if tl.load(flag_ptr) == 0:
        return
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_n = tl.minimum(n, N - 1)
    length_x = tl.load(length_x_ptr + row_n)
    scale = tl.load(scale_ptr)
    largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first_m in range(0, M, BLOCK_M):
        m = first_m + tl.arange(0, BLOCK_M)
        row_m = tl.minimum(m, M - 1).to(tl.int64)
        dot = dot_rows(
            x_ptr, y_ptr, row_n, row_m, stride_x_n, stride_y_m, D, BLOCK_N, BLOCK_M, BLOCK_D
        )
        cosine = cosine_tile(dot, length_x, tl.load(length_y_ptr + row_m), True)
        inside = (n[:, None] < N) & (m[None, :] < M)
        valid, _ = positives(n, m, inside, first_label, image_id_ptr, text_id_ptr, IDS)
        # Not -inf: a row without a valid pair has to stay clear of inf - inf.
        power = tl.where(valid, cosine * scale, -3e38)
        next_largest = tl.maximum(largest, tl.max(power, axis=1))
        part = tl.sum(tl.where(valid, tl.exp2(power - next_largest[:, None]), 0.0), axis=1)
        total = total * tl.exp2(largest - next_largest) + part
        largest = next_largest
    tl.store(lse_ptr + n, (largest + tl.log2(total)).to(tl.float64), mask=n < N)


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
    row_lse_ptr,
    column_lse_ptr,
    row_grad_ptr,
    column_grad_ptr,
    row_factor_ptr,
    column_factor_ptr,
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
    SKIP: tl.constexpr,
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
    flagged = tl.load(flag_ptr) != 0
    if SKIP != "none" and flagged == (SKIP == "flagged"):
        return
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
    z = cosine * tl.load(scale_ptr)
    if flagged:
        row_lse = tl.load(row_lse_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        column_lse = tl.load(column_lse_ptr + m, mask=m < M, other=0.0).to(tl.float32)
        row_grad = tl.load(row_grad_ptr + n, mask=n < N, other=0.0)
        column_grad = tl.load(column_grad_ptr + m, mask=m < M, other=0.0)
        grad = row_grad[:, None] * tl.exp2(z - row_lse[:, None])
        grad += column_grad[None, :] * tl.exp2(z - column_lse[None, :])
    else:
        row_factor = tl.load(row_factor_ptr + n, mask=n < N, other=0.0)
        column_factor = tl.load(column_factor_ptr + m, mask=m < M, other=0.0)
        power = tl.exp2(z - tl.load(scale_ptr + 1))
        grad = power * (row_factor[:, None] + column_factor[None, :])
    row_positive = tl.load(row_positive_ptr + n, mask=n < N, other=0.0)
    column_positive = tl.load(column_positive_ptr + m, mask=m < M, other=0.0)
    grad += tl.where(positive, row_positive[:, None] + column_positive[None, :], 0.0)
    if TARGETS:
        grad += tl.load(row_uniform_ptr + n, mask=n < N, other=0.0)[:, None]
        grad += tl.load(column_uniform_ptr + m, mask=m < M, other=0.0)[None, :]
    grad = tl.where(valid, grad, 0.0)
    along = tl.sum(tl.sum(grad * cosine, axis=1), axis=0)
    tl.store(along_ptr + tl.program_id(0), along)
    offsets = n.to(tl.int64)[:, None] * stride_grad + m[None, :]
    stored = (grad * GRADIENT_SCALE).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + offsets, stored, mask=inside)


# (architecture, kind) -> BLOCK_N, BLOCK_M, BLOCK_D, num_warps, num_stages. "pass" reads a block that the library
# multiplied; "fused" multiplies 16-bit operands itself and "exact" float32 ones; "online" and "online exact" are the
# kernel of the running maximum. Not yet measured.
_LAUNCH_TABLE = {
    (80, "pass"): (64, 128, 16, 4, 1),
    (80, "fused"): (128, 128, 32, 8, 3),
    (80, "exact"): (64, 128, 16, 8, 2),
    (80, "online"): (64, 64, 64, 4, 3),
    (80, "online exact"): (32, 64, 32, 4, 3),
    (90, "pass"): (64, 128, 16, 4, 1),
    (90, "fused"): (128, 256, 64, 8, 3),
    (90, "exact"): (64, 128, 16, 8, 2),
    (90, "online"): (64, 64, 64, 4, 3),
    (90, "online exact"): (32, 64, 32, 4, 3),
    (100, "pass"): (64, 128, 16, 4, 1),
    (100, "fused"): (128, 256, 64, 8, 3),
    (100, "exact"): (64, 128, 16, 8, 2),
    (100, "online"): (64, 64, 64, 4, 3),
    (100, "online exact"): (32, 64, 32, 4, 3),
}

# The engine by (architecture, width, operand bits), where both were measured; elsewhere the library's.
_ENGINE_TABLE: dict[tuple[int, int, int], str] = {}


def _launch_config(
    N: int, M: int, kind: str, architecture: int
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and launch keywords of a tile kernel over N x M logits."""
    block_n, block_m, block_d, num_warps, num_stages = _LAUNCH_TABLE[architecture, kind]
    config = {
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "BLOCK_D": block_d,
        "GROUP_N": 8,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    return (triton.cdiv(N, block_n) * triton.cdiv(M, block_m),), config


def _kind(fused: bool, operand: torch.dtype) -> str:
    if not fused:
        return "pass"
    return "exact" if operand == torch.float32 else "fused"


class _Problem(NamedTuple):
    """The arguments that forward and backward share; see `contrastive_terms`."""

    image_BE: Tensor
    text_GE: Tensor
    scale: Tensor
    image_ids: Tensor | None
    text_ids: Tensor | None
    first_label: int
    same_id: str
    normalized: bool
    operand: torch.dtype
    engine: str
    workspace_bytes: int

    @property
    def ids(self) -> str:
        return "none" if self.image_ids is None else self.same_id

    @property
    def architecture(self) -> int:
        return tiles.architecture(self.image_BE.device)

    def powers(self) -> Tensor:
        """[2]: what turns a cosine into a power of two, and the offset of the powers; see the module docstring."""
        wide = tiles.accumulate_dtype(self.operand)
        to_power = self.scale.to(wide).reshape(()) * LOG2E
        return torch.stack((to_power, (to_power - HEADROOM[wide]).clamp(min=0).ceil()))

    def sides(self, element_bytes: int) -> tuple[int, int]:
        """Rows and columns of a block on a GPU."""
        return logits.block_sides(self.image_BE.shape[1], element_bytes, self.workspace_bytes)

    def tile_arguments(
        self, x_RE: Tensor, y_CE: Tensor, rows: slice, columns: slice, fused: bool
    ) -> tuple[tuple[int], dict[str, Any]]:
        """Grid and the launch keywords that every tile kernel has, for one block."""
        R, C = len(x_RE), len(y_CE)
        grid, config = _launch_config(R, C, _kind(fused, self.operand), self.architecture)
        descriptors = (None, None)
        if fused:
            block_n, block_m, block_d = (config[f"BLOCK_{axis}"] for axis in "NMD")
            descriptors = (
                logits.descriptor(x_RE, block_n, block_d),
                logits.descriptor(y_CE, block_m, block_d),
            )
        return grid, {
            "x_desc": descriptors[0],
            "y_desc": descriptors[1],
            "scale_ptr": self.powers(),
            "image_id_ptr": None if self.image_ids is None else self.image_ids[rows],
            "text_id_ptr": None if self.text_ids is None else self.text_ids[columns],
            "N": R,
            "M": C,
            "D": x_RE.shape[1],
            "first_label": self.first_label + rows.start - columns.start,
            "IDS": self.ids,
            "FUSED": fused,
            **config,
        }


def _stash_shapes(problem: _Problem) -> tuple[tuple[int, int], tuple[int, int, int], torch.dtype]:
    """Shapes of the stash and of its ranges, and its dtype."""
    B, G = len(problem.image_BE), len(problem.text_GE)
    if problem.image_BE.device.type == "cpu":
        return (B, G), (0, 0, 2), tiles.accumulate_dtype(problem.operand)
    return _packed_shapes(B, G)


def _packed_shapes(B: int, G: int) -> tuple[tuple[int, int], tuple[int, int, int], torch.dtype]:
    rows, columns = STASH_TILE
    return (B, -(-G // 8) * 8), (-(-B // rows), -(-G // columns), 2), torch.int16


def _sum_sides(problem: _Problem) -> tuple[int, int]:
    """Sides of a block in the forward: float32 logits for the library's engine, partial sums for the fused one."""
    return (32768, 32768) if problem.engine == "fused" else problem.sides(4)


def _contrastive_fwd_triton(
    problem: _Problem, targets: Targets | None, stash: bool
) -> tuple[Tensor, ...]:
    """(row_lse, column_lse, row_target, column_target, flag, stash, ranges)."""
    image_BE, text_GE = problem.image_BE, problem.text_GE
    B, G, device = len(image_BE), len(text_GE), image_BE.device
    shape, range_shape, dtype = _packed_shapes(B, G) if stash else ((0, 0), (0, 0, 2), torch.int16)
    stash_BG = torch.empty(shape, dtype=dtype, device=device)
    ranges = torch.empty(range_shape, dtype=torch.float32, device=device)
    row_sum, row_target = (torch.zeros(B, dtype=torch.float64, device=device) for _ in range(2))
    column_sum, column_target = (
        torch.zeros(G, dtype=torch.float64, device=device) for _ in range(2)
    )
    fused = problem.engine == "fused"
    side_R, side_C = _sum_sides(problem)
    block = torch.empty(
        0 if fused else min(side_R, B) * min(side_C, G), dtype=torch.float32, device=device
    )
    for rows in logits.blocks(B, side_R):
        x_RE = logits.operand(image_BE[rows], problem.normalized, problem.operand)
        for columns in logits.blocks(G, side_C):
            y_CE = logits.operand(text_GE[columns], problem.normalized, problem.operand)
            R, C = len(x_RE), len(y_CE)
            product_RC = None
            if not fused:
                product_RC = tiles.matmul_fp32(x_RE, y_CE.T, block[: R * C].view(R, C))
            grid, arguments = problem.tile_arguments(x_RE, y_CE, rows, columns, fused)
            tiles_n = triton.cdiv(R, arguments["BLOCK_N"])
            tiles_m = triton.cdiv(C, arguments["BLOCK_M"])
            sums = [
                torch.empty(length, dtype=torch.float32, device=device)
                for length in ((tiles_m, R), (tiles_n, C))
            ]
            spread = (
                [torch.empty_like(total) for total in sums]
                if targets is not None
                else [row_target[rows], column_target[columns]]
            )
            _contrastive_sums_kernel[grid](
                product_ptr=product_RC,
                **_target_pointers(targets, rows, columns),
                row_sum_ptr=sums[0],
                column_sum_ptr=sums[1],
                row_target_ptr=spread[0],
                column_target_ptr=spread[1],
                stash_ptr=stash_BG[rows, columns.start :] if stash else None,
                range_ptr=_range_block(ranges, arguments, rows, columns) if stash else None,
                stride_product=C,
                stride_stash=stash_BG.stride(0),
                stride_range=ranges.stride(0),
                TARGETS=targets is not None,
                STASH=stash,
                **arguments,
            )
            row_sum[rows] += sums[0].sum(0)
            column_sum[columns] += sums[1].sum(0)
            if targets is not None:
                row_target[rows] += spread[0].sum(0)
                column_target[columns] += spread[1].sum(0)
    row_lse, column_lse, flag = _logarithms(problem, row_sum, column_sum, torch.float32)
    _recompute_where_flagged(problem, flag, row_lse, column_lse)
    return row_lse, column_lse, row_target, column_target, flag, stash_BG, ranges


def _target_pointers(
    targets: Targets | None, rows: slice, columns: slice
) -> dict[str, Tensor | None]:
    """The target weights of a block, as launch keywords."""
    names = ("row_positive_ptr", "row_uniform_ptr", "column_positive_ptr", "column_uniform_ptr")
    if targets is None:
        return dict.fromkeys(names)
    sides = (rows, rows, columns, columns)
    return {name: weight[side] for name, weight, side in zip(names, targets, sides, strict=True)}


def _range_block(ranges: Tensor, arguments: dict[str, Any], rows: slice, columns: slice) -> Tensor:
    """The ranges from a block's first tile on, in the grid of the tiles that wrote them."""
    return ranges[rows.start // arguments["BLOCK_N"] :, columns.start // arguments["BLOCK_M"] :]


def _logarithms(
    problem: _Problem, row_sum: Tensor, column_sum: Tensor, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(row_lse, column_lse, flag) in powers of two; flag is 1 where a sum is not to be trusted."""
    # Terms below the smallest normal number are lost: harmless where all of them together are below the sum's last place.
    info = torch.finfo(wide)
    least = 2 * max(len(row_sum), len(column_sum)) * info.tiny / info.eps
    trusted = [((total >= least) & (total < torch.inf)).all() for total in (row_sum, column_sum)]
    flag = (~(trusted[0] & trusted[1])).to(torch.int32)
    offset = problem.powers()[1].double()
    return row_sum.log2() + offset, column_sum.log2() + offset, flag


def _recompute_where_flagged(
    problem: _Problem, flag: Tensor, row_lse: Tensor, column_lse: Tensor
) -> None:
    """Launch the online kernels, which return at once unless the flag is set."""
    kind = "online exact" if problem.operand == torch.float32 else "online"
    dtype = torch.promote_types(problem.image_BE.dtype, problem.text_GE.dtype)
    if problem.operand == torch.float32 or dtype == torch.float32:
        kind, dtype = "online exact", torch.float32
    block_n, block_m, block_d, num_warps, num_stages = _LAUNCH_TABLE[problem.architecture, kind]
    image_BE, text_GE = (
        tiles.aligned_rows(side.to(dtype), block_d) for side in (problem.image_BE, problem.text_GE)
    )
    length_B, length_G = (
        side.new_ones(len(side), dtype=torch.float32) if problem.normalized else lengths(side)
        for side in (image_BE, text_GE)
    )
    for x, y, length_x, length_y, x_ids, y_ids, first_label, lse in (
        (
            *(image_BE, text_GE, length_B, length_G),
            *(problem.image_ids, problem.text_ids, problem.first_label, row_lse),
        ),
        (
            *(text_GE, image_BE, length_G, length_B),
            *(problem.text_ids, problem.image_ids, -problem.first_label, column_lse),
        ),
    ):
        _contrastive_online_kernel[(triton.cdiv(len(x), block_n),)](
            x_ptr=x,
            y_ptr=y,
            length_x_ptr=length_x,
            length_y_ptr=length_y,
            scale_ptr=problem.powers(),
            image_id_ptr=x_ids,
            text_id_ptr=y_ids,
            flag_ptr=flag,
            lse_ptr=lse,
            stride_x_n=x.stride(0),
            stride_y_m=y.stride(0),
            N=len(x),
            M=len(y),
            D=x.shape[1],
            first_label=first_label,
            IDS=problem.ids,
            BLOCK_N=block_n,
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            num_warps=num_warps,
            num_stages=num_stages,
        )


class _Upstream(NamedTuple):
    """Upstream gradients of the terms, as the gradient kernel adds them up: per row and column of the logits."""

    row_lse_B: Tensor
    column_lse_G: Tensor
    row_positive_B: Tensor
    row_uniform_B: Tensor
    column_positive_G: Tensor
    column_uniform_G: Tensor

    @classmethod
    def spread(
        cls,
        row_lse: Tensor,
        column_lse: Tensor,
        row_target: Tensor,
        column_target: Tensor,
        targets: Targets | None,
    ) -> _Upstream:
        """Each target's gradient times the weights by which it was spread."""
        if targets is None:  # all on the positive: the uniform parts are not read
            return cls(row_lse, column_lse, row_target, row_target, column_target, column_target)
        return cls(
            row_lse,
            column_lse,
            row_target * targets.row_positive_B,
            row_target * targets.row_uniform_B,
            column_target * targets.column_positive_G,
            column_target * targets.column_uniform_G,
        )

    def over_largest(self) -> tuple[_Upstream, Tensor]:
        """(itself over its largest element, that element), so that the block's gradients are of order one."""
        largest = torch.stack([part.abs().amax() for part in self]).amax()
        divisor = torch.where(largest > 0, largest, 1.0)
        return _Upstream(*(part / divisor for part in self)), largest

    def factors(self, row_lse: Tensor, column_lse: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """What a power of two is multiplied with, per row and per column, for the gradient of the lse."""
        return (
            self.row_lse_B * torch.exp2(offset - row_lse),
            self.column_lse_G * torch.exp2(offset - column_lse),
        )

    def to(self, dtype: torch.dtype) -> _Upstream:
        """Every part in another dtype."""
        return _Upstream(*(part.to(dtype) for part in self))

    def pointers(self, rows: slice, columns: slice) -> dict[str, Tensor]:
        """The part of a block, as launch keywords."""
        return {
            "row_grad_ptr": self.row_lse_B[rows],
            "column_grad_ptr": self.column_lse_G[columns],
            "row_positive_ptr": self.row_positive_B[rows],
            "row_uniform_ptr": self.row_uniform_B[rows],
            "column_positive_ptr": self.column_positive_G[columns],
            "column_uniform_ptr": self.column_uniform_G[columns],
        }


def _contrastive_bwd_triton(
    problem: _Problem,
    targets: Targets | None,
    upstream: tuple[Tensor, Tensor, Tensor, Tensor],
    row_lse: Tensor,
    column_lse: Tensor,
    flag: Tensor,
    stash_BG: Tensor,
    ranges: Tensor,
    need: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_image, d_text, d_scale); a side that nobody needs costs no product."""
    image_BE, text_GE, operand = problem.image_BE, problem.text_GE, problem.operand
    B, G, device = len(image_BE), len(text_GE), image_BE.device
    stash = stash_BG.numel() > 0
    fused = problem.engine == "fused" and not stash
    grad_scale = FP16_GRADIENT_SCALE if operand == torch.float16 else 1.0
    parts, largest = _Upstream.spread(*upstream, targets).over_largest()
    to_power, offset = problem.powers()
    row_factor, column_factor = (
        factor.float() for factor in parts.factors(row_lse, column_lse, offset.double())
    )
    parts = parts.to(torch.float32)
    factor = (to_power * largest / grad_scale).float()
    gradients = logits.Gradients(image_BE, text_GE, problem.normalized, need)
    d_scale = torch.zeros((), dtype=torch.float64, device=device)
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
        x_RE = logits.operand(image_BE[rows], problem.normalized, operand)
        gradients.begin_rows(rows)
        for columns in logits.blocks(G, side_C):
            y_CE = logits.operand(text_GE[columns], problem.normalized, operand)
            R, C = len(x_RE), len(y_CE)
            grad_RC = grads[: R * C].view(R, C)
            common = {
                "flag_ptr": flag,
                "row_lse_ptr": row_lse[rows],
                "column_lse_ptr": column_lse[columns],
                "row_factor_ptr": row_factor[rows],
                "column_factor_ptr": column_factor[columns],
                **parts.pointers(rows, columns),
                "grad_ptr": grad_RC,
                "stride_grad": C,
                "GRADIENT_SCALE": grad_scale,
                "TARGETS": targets is not None,
            }
            if stash:
                d_scale += _grad_of_stash(
                    problem, common, x_RE, y_CE, rows, columns, stash_BG, ranges
                )
            else:
                product_RC = None
                if own_product:
                    product_RC = tiles.matmul_fp32(x_RE, y_CE.T, products[: R * C].view(R, C))
                grid, arguments = problem.tile_arguments(x_RE, y_CE, rows, columns, fused)
                d_scale += _launch_grad(grid, arguments, common, product_RC, C, "none")
            gradients.add(grad_RC, x_RE, y_CE, columns)
        gradients.end_rows(rows, factor)
    grad_scalar = (d_scale * largest * LOG2E).to(problem.scale.dtype).reshape(problem.scale.shape)
    return gradients.image_grad, gradients.text_grad(factor), grad_scalar


def _grad_of_stash(
    problem: _Problem,
    common: dict[str, Any],
    x_RE: Tensor,
    y_CE: Tensor,
    rows: slice,
    columns: slice,
    stash_BG: Tensor,
    ranges: Tensor,
) -> Tensor:
    """The gradient of a stashed block. A flagged problem may have had any range: its logits are multiplied again."""
    range_n, range_m, *_ = _LAUNCH_TABLE[
        problem.architecture, _kind(problem.engine == "fused", problem.operand)
    ]
    grid, arguments = problem.tile_arguments(x_RE, y_CE, rows, columns, False)
    along = _launch_grad(
        grid,
        arguments,
        {
            **common,
            "range_ptr": ranges[rows.start // range_n :, columns.start // range_m :],
            "stride_range": ranges.stride(0),
            "RANGE_N": range_n,
            "RANGE_M": range_m,
            "STASH": True,
        },
        stash_BG[rows, columns.start :],
        stash_BG.stride(0),
        "flagged",
    )
    grid, arguments = problem.tile_arguments(x_RE, y_CE, rows, columns, True)
    return along + _launch_grad(grid, arguments, common, None, 0, "plain")


def _launch_grad(
    grid: tuple[int],
    arguments: dict[str, Any],
    common: dict[str, Any],
    product: Tensor | None,
    stride_product: int,
    skip: str,
) -> Tensor:
    """Launch the gradient kernel on one block; returns the block's sum of gradient times cosine."""
    along = torch.zeros(grid, dtype=torch.float32, device=common["grad_ptr"].device)
    defaults = {"range_ptr": None, "stride_range": 0, "RANGE_N": 1, "RANGE_M": 1, "STASH": False}
    _contrastive_grad_kernel[grid](
        product_ptr=product,
        stride_product=stride_product,
        along_ptr=along,
        SKIP=skip,
        **{**defaults, **common, **arguments},
    )
    return along.sum(dtype=torch.float64)


# PyTorch, for the CPU.


def _contrastive_fwd_cpu(
    problem: _Problem, targets: Targets | None, stash: bool
) -> tuple[Tensor, ...]:
    """The same sums in blocks that stay in the cache; a stash holds the exponentials."""
    x_BE = logits.unit_rows_cpu(problem.image_BE, problem.normalized)
    y_GE = logits.unit_rows_cpu(problem.text_GE, problem.normalized)
    B, G, wide = len(x_BE), len(y_GE), x_BE.dtype
    row_sum, row_target = (torch.zeros(B, dtype=torch.float64) for _ in range(2))
    column_sum, column_target = (torch.zeros(G, dtype=torch.float64) for _ in range(2))
    stash_BG = x_BE.new_empty((B, G) if stash else (0, 0))
    to_power, offset = problem.powers()
    side_R, side_C = logits.cpu_sides(G, wide, problem.workspace_bytes)
    buffer = x_BE.new_empty(0 if stash else min(side_R, B) * min(side_C, G))
    for rows in logits.blocks(B, side_R):
        scaled_RE = x_BE[rows] * to_power
        for columns in logits.blocks(G, side_C):
            shape = rows.stop - rows.start, columns.stop - columns.start
            out = stash_BG[rows, columns] if stash else buffer[: math.prod(shape)].view(shape)
            power_RC = torch.mm(scaled_RE, y_GE[columns].T, out=out)
            invalid, positive = _masks_cpu(problem, rows, columns)
            _add_targets_cpu(
                power_RC,
                targets,
                row_target,
                column_target,
                problem,
                rows,
                columns,
                invalid,
                positive,
            )
            if offset:
                power_RC.sub_(offset)
            power_RC.exp2_()
            if invalid is not None:
                power_RC.masked_fill_(invalid, 0)
            row_sum[rows] += power_RC.sum(1)
            column_sum[columns] += power_RC.sum(0)
    row_lse, column_lse, flag = _logarithms(problem, row_sum, column_sum, wide)
    if flag:
        row_lse, column_lse = _online_cpu(problem, x_BE, y_GE)
    no_ranges = torch.empty(0, 0, 2)
    return row_lse, column_lse, row_target, column_target, flag, stash_BG, no_ranges


def _masks_cpu(
    problem: _Problem, rows: slice, columns: slice
) -> tuple[Tensor | None, Tensor | None]:
    """(invalid, positive) of a block, where ids make them differ from nothing and the diagonal."""
    if problem.image_ids is None or problem.text_ids is None:
        return None, None
    same_RC = problem.image_ids[rows, None] == problem.text_ids[columns]
    if problem.same_id == "positive":
        return None, same_RC
    same_RC.diagonal(problem.first_label + rows.start - columns.start).fill_(False)
    return same_RC, None


def _diagonal(
    matrix_RC: Tensor, first_label: int, rows: slice, columns: slice
) -> tuple[Tensor, slice, slice]:
    """The positives of a block: a view of them, and which rows and columns of the problem they belong to."""
    offset = first_label + rows.start - columns.start
    if not -matrix_RC.shape[0] < offset < matrix_RC.shape[1]:
        offset = matrix_RC.shape[1]  # none: an empty diagonal
    view = matrix_RC.diagonal(offset)
    first_row, first_column = rows.start + max(0, -offset), columns.start + max(0, offset)
    return (
        view,
        slice(first_row, first_row + len(view)),
        slice(first_column, first_column + len(view)),
    )


def _add_targets_cpu(
    power_RC: Tensor,
    targets: Targets | None,
    row_target: Tensor,
    column_target: Tensor,
    problem: _Problem,
    rows: slice,
    columns: slice,
    invalid: Tensor | None,
    positive: Tensor | None,
) -> None:
    """Add a block's part of the targets, in powers of two, before the block is exponentiated."""
    diagonal, own_rows, own_columns = _diagonal(power_RC, problem.first_label, rows, columns)
    if targets is None:
        row_target[own_rows] = diagonal
        column_target[own_columns] = diagonal
        return
    valid_RC = power_RC if invalid is None else power_RC.masked_fill(invalid, 0)
    row_target[rows] += targets.row_uniform_B[rows] * valid_RC.sum(1)
    column_target[columns] += targets.column_uniform_G[columns] * valid_RC.sum(0)
    if positive is None:
        row_target[own_rows] += targets.row_positive_B[own_rows] * diagonal
        column_target[own_columns] += targets.column_positive_G[own_columns] * diagonal
    else:
        matched_RC = power_RC.masked_fill(~positive, 0)
        row_target[rows] += targets.row_positive_B[rows] * matched_RC.sum(1)
        column_target[columns] += targets.column_positive_G[columns] * matched_RC.sum(0)


def _online_cpu(problem: _Problem, x_BE: Tensor, y_GE: Tensor) -> tuple[Tensor, Tensor]:
    """(row_lse, column_lse) in powers of two with a running maximum, for logits of any size."""
    row_lse = torch.full((len(x_BE),), -torch.inf, dtype=torch.float64)
    column_lse = torch.full((len(y_GE),), -torch.inf, dtype=torch.float64)
    scale = problem.scale.to(x_BE.dtype).reshape(())
    side_R, side_C = logits.cpu_sides(len(y_GE), x_BE.dtype, problem.workspace_bytes)
    for rows in logits.blocks(len(x_BE), side_R):
        for columns in logits.blocks(len(y_GE), side_C):
            z_RC = (x_BE[rows] * scale) @ y_GE[columns].T
            invalid, _ = _masks_cpu(problem, rows, columns)
            if invalid is not None:
                z_RC.masked_fill_(invalid, -torch.inf)
            row_lse[rows] = torch.logaddexp(row_lse[rows], z_RC.logsumexp(1).double())
            column_lse[columns] = torch.logaddexp(column_lse[columns], z_RC.logsumexp(0).double())
    return row_lse * LOG2E, column_lse * LOG2E


def _contrastive_bwd_cpu(
    problem: _Problem,
    targets: Targets | None,
    upstream: tuple[Tensor, Tensor, Tensor, Tensor],
    row_lse: Tensor,
    column_lse: Tensor,
    flag: Tensor,
    stash_BG: Tensor,
    need: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same gradients in blocks. The scale's is <d_x, x>, which float32 blocks make exact."""
    x_BE = logits.unit_rows_cpu(problem.image_BE, problem.normalized)
    y_GE = logits.unit_rows_cpu(problem.text_GE, problem.normalized)
    wide, flagged = x_BE.dtype, bool(flag)
    need_image, need_text = need[0] or not need[1], need[1]  # the scale takes one side at least
    d_x, d_y = torch.zeros_like(x_BE) if need_image else x_BE.new_empty(0), x_BE.new_empty(0)
    if need_text:
        d_y = torch.zeros_like(y_GE)
    parts = _Upstream.spread(*upstream, targets)
    to_power, offset = problem.powers()
    row_factor, column_factor = (
        factor.to(wide) for factor in parts.factors(row_lse, column_lse, offset.double())
    )
    parts = parts.to(wide)
    row_lse, column_lse = row_lse.to(wide), column_lse.to(wide)
    side_R, side_C = logits.cpu_sides(len(y_GE), wide, problem.workspace_bytes)
    size = min(side_R, len(x_BE)) * min(side_C, len(y_GE))
    buffers = [x_BE.new_empty(size) for _ in range(1 if stash_BG.numel() and not flagged else 2)]
    for rows in logits.blocks(len(x_BE), side_R):
        scaled_RE = x_BE[rows] * to_power
        for columns in logits.blocks(len(y_GE), side_C):
            shape = rows.stop - rows.start, columns.stop - columns.start
            grad_RC, *power = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
            if power:
                power_RC = torch.mm(scaled_RE, y_GE[columns].T, out=power[0])
            invalid, positive = _masks_cpu(problem, rows, columns)
            if flagged:
                torch.sub(power_RC, row_lse[rows, None], out=grad_RC)
                grad_RC.exp2_().mul_(parts.row_lse_B[rows, None])
                power_RC.sub_(column_lse[columns]).exp2_().mul_(parts.column_lse_G[columns])
                grad_RC += power_RC
            else:
                torch.add(row_factor[rows, None], column_factor[columns], out=grad_RC)
                if power and offset:
                    power_RC.sub_(offset)
                grad_RC *= power_RC.exp2_() if power else stash_BG[rows, columns]
            _add_target_gradients_cpu(grad_RC, parts, targets, problem, rows, columns, positive)
            if invalid is not None:
                grad_RC.masked_fill_(invalid, 0)
            if need_image:
                d_x[rows].addmm_(grad_RC, y_GE[columns])
            if need_text:
                d_y[columns].addmm_(grad_RC.T, x_BE[rows])
    along = logits.dot(d_x, x_BE) if need_image else logits.dot(d_y, y_GE)
    d_image, d_text = problem.image_BE.new_empty(0), problem.text_GE.new_empty(0)
    if need[0]:
        d_image = logits.finish_cpu(problem.image_BE, d_x, problem.normalized, to_power)
    if need[1]:
        d_text = logits.finish_cpu(problem.text_GE, d_y, problem.normalized, to_power)
    return d_image, d_text, (along * LOG2E).to(problem.scale.dtype).reshape(problem.scale.shape)


def _add_target_gradients_cpu(
    grad_RC: Tensor,
    parts: _Upstream,
    targets: Targets | None,
    problem: _Problem,
    rows: slice,
    columns: slice,
    positive: Tensor | None,
) -> None:
    """Add what the targets give to a block's gradient."""
    if positive is None:
        view, own_rows, own_columns = _diagonal(grad_RC, problem.first_label, rows, columns)
        view += parts.row_positive_B[own_rows] + parts.column_positive_G[own_columns]
    else:
        both_RC = parts.row_positive_B[rows, None] + parts.column_positive_G[columns]
        grad_RC += both_RC.masked_fill_(~positive, 0)
    if targets is not None:
        grad_RC += parts.row_uniform_B[rows, None]
        grad_RC += parts.column_uniform_G[columns]


# Operators.


@torch.library.custom_op("clipcore::contrastive_fwd", mutates_args=())
def _contrastive_fwd(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    target_weights: list[Tensor],
    first_label: int,
    same_id: str,
    normalized: bool,
    operand: torch.dtype,
    engine: str,
    workspace_bytes: int,
    stash: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = _Problem(
        *(image_BE, text_GE, scale, image_ids, text_ids, first_label, same_id, normalized),
        *(operand, engine, workspace_bytes),
    )
    targets = Targets(*target_weights) if target_weights else None
    if image_BE.is_cuda:
        return _contrastive_fwd_triton(problem, targets, stash)  # type: ignore[return-value]
    return _contrastive_fwd_cpu(problem, targets, stash)  # type: ignore[return-value]


@_contrastive_fwd.register_fake
def _(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    target_weights: list[Tensor],
    first_label: int,
    same_id: str,
    normalized: bool,
    operand: torch.dtype,
    engine: str,
    workspace_bytes: int,
    stash: bool,
) -> tuple[Tensor, ...]:
    B, G = image_BE.shape[0], text_GE.shape[0]
    on_cpu = image_BE.device.type == "cpu"
    wide = tiles.accumulate_dtype(torch.promote_types(image_BE.dtype, text_GE.dtype))
    shape, range_shape, dtype = ((B, G), (0, 0, 2), wide) if on_cpu else _packed_shapes(B, G)
    if not stash:
        shape, range_shape = (0, 0), (0, 0, 2)
    return (
        *(image_BE.new_empty(length, dtype=torch.float64) for length in (B, G, B, G)),
        image_BE.new_empty((), dtype=torch.int32),
        image_BE.new_empty(shape, dtype=dtype),
        image_BE.new_empty(range_shape, dtype=torch.float32),
    )


@torch.library.custom_op("clipcore::contrastive_bwd", mutates_args=())
def _contrastive_bwd(
    upstream: list[Tensor],
    terms: list[Tensor],
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    target_weights: list[Tensor],
    first_label: int,
    same_id: str,
    normalized: bool,
    operand: torch.dtype,
    engine: str,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _Problem(
        *(image_BE, text_GE, scale, image_ids, text_ids, first_label, same_id, normalized),
        *(operand, engine, workspace_bytes),
    )
    targets = Targets(*target_weights) if target_weights else None
    row_lse, column_lse, flag, stash, ranges = terms
    given = (*upstream,)
    if image_BE.is_cuda:
        return _contrastive_bwd_triton(
            *(problem, targets, given, row_lse, column_lse, flag, stash, ranges),  # type: ignore[arg-type]
            (need_image, need_text),
        )
    return _contrastive_bwd_cpu(
        *(problem, targets, given, row_lse, column_lse, flag, stash),  # type: ignore[arg-type]
        (need_image, need_text),
    )


@_contrastive_bwd.register_fake
def _(
    upstream: list[Tensor],
    terms: list[Tensor],
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    need_image, need_text = arguments[-2:]
    return (
        image_BE.new_empty(image_BE.shape if need_image else (0,)),
        text_GE.new_empty(text_GE.shape if need_text else (0,)),
        scale.new_empty(scale.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image_BE, text_GE, scale, image_ids, text_ids, target_weights, *settings, _ = inputs
    row_lse, column_lse, _, _, flag, stash, ranges = output
    ctx.save_for_backward(
        *(image_BE, text_GE, scale, row_lse, column_lse, flag, stash, ranges, image_ids, text_ids),
        *target_weights,
    )
    ctx.settings = settings
    # The gradient of the stash that nobody asks for would be as large as the stash.
    ctx.set_materialize_grads(False)
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    image_BE, text_GE, scale, *terms, image_ids, text_ids = ctx.saved_tensors[:10]
    target_weights = list(ctx.saved_tensors[10:])
    row_lse, column_lse = terms[:2]
    upstream = [
        torch.zeros_like(like) if grad is None else grad.to(like.dtype).contiguous()
        for grad, like in zip(grads[:4], (row_lse, column_lse) * 2, strict=True)
    ]
    need_image, need_text, need_scale = ctx.needs_input_grad[:3]
    found = _contrastive_bwd(
        *(upstream, terms, image_BE, text_GE, scale, image_ids, text_ids, target_weights),
        *ctx.settings,
        *(need_image, need_text),
    )
    needed = (need_image, need_text, need_scale)
    gradients = [grad if need else None for grad, need in zip(found, needed, strict=True)]
    # One entry for each input, and for the list of targets one for each of its own.
    rest: list[Any] = [None] * (ctx.num_inputs - 3)
    rest[2] = [None] * len(target_weights)
    return (*gradients, *rest)


_contrastive_fwd.register_autograd(_backward, setup_context=_setup_context)
tiles.register_autocast("contrastive_fwd", num_operands=0)
tiles.register_autocast("contrastive_bwd", num_operands=0)


# The public functions.


def plan(
    image_BE: Tensor,
    text_GE: Tensor,
    *,
    stash_bytes: int | None = None,
    operand_dtype: torch.dtype | None = None,
    engine: str | None = None,
    backward: bool = True,
) -> Plan:
    """How `contrastive_terms` will compute a problem: which engine, with a stash or without, and why.

    The rule: a stash where a backward follows and the stash is at most `stash_bytes` (1 GiB by default); the engine
    that was measured to be faster for the chip, width and operands, and the library's where neither was.
    """
    B, E = image_BE.shape
    G = text_GE.shape[0]
    operand = logits.operand_dtype(image_BE, text_GE, operand_dtype)
    budget = STASH_BYTES if stash_bytes is None else stash_bytes
    on_cpu = not image_BE.is_cuda
    needed = B * G * operand.itemsize if on_cpu else 2 * B * (-(-G // 8) * 8)
    if not on_cpu and engine is None:
        key = (tiles.architecture(image_BE.device), E, 8 * operand.itemsize)
        engine = _ENGINE_TABLE.get(key, "library")
    stash = backward and 0 < needed <= budget
    device = image_BE.device.type
    return Plan(*((B, G, E), operand, device, engine or "library", backward, stash, needed, budget))


def contrastive_terms(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor | float,
    *,
    normalize: bool = True,
    first_label: int = 0,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same_id: str = "ignore",
    targets: Targets | None = None,
    stash_bytes: int | None = None,
    workspace_bytes: int | None = None,
    operand_dtype: torch.dtype | None = None,
    engine: str | None = None,
) -> ContrastiveTerms:
    """Log-sum-exp and target logit of each image over the texts and of each text over the images.

    What a loss over one rank or many is made of; `contrastive_loss` is the one over one rank. Differentiable once in
    both embeddings and the scale. The arguments are those of `contrastive_loss`, but for:

    Args:
        targets: how each row's and each column's target spreads; None puts it on the pair's own column.

    Raises:
        ValueError: shapes, dtypes, devices or ids do not fit.
    """
    check_arguments(image_BE, text_GE, image_ids, text_ids, same_id, operand_dtype, engine)
    scale = logits.as_scalar("scale", scale, image_BE)
    if image_ids is not None and targets is None:
        targets = uniform_targets(image_BE, text_GE, first_label, image_ids, text_ids, same_id, 0.0)
    wants_grad = image_BE.requires_grad or text_GE.requires_grad or scale.requires_grad
    chosen = plan(
        *(image_BE, text_GE),
        stash_bytes=stash_bytes,
        operand_dtype=operand_dtype,
        engine=engine,
        backward=wants_grad and torch.is_grad_enabled(),
    )
    if workspace_bytes is None:
        workspace_bytes = logits.WORKSPACE_BYTES["cuda" if image_BE.is_cuda else "cpu"]
    row_lse, column_lse, row_target, column_target, *_ = torch.ops.clipcore.contrastive_fwd(
        *(image_BE, text_GE, scale, image_ids, text_ids, list(targets or ()), first_label, same_id),
        *(not normalize, chosen.operand, chosen.engine, workspace_bytes, chosen.stash),
    )
    # The operation counts in powers of two.
    powers = (row_lse, column_lse, row_target, column_target)
    return ContrastiveTerms(*(power / LOG2E for power in powers))


def contrastive_loss(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor | float,
    *,
    normalize: bool = True,
    first_label: int = 0,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same_id: str = "ignore",
    label_smoothing: float = 0.0,
    stash_bytes: int | None = None,
    workspace_bytes: int | None = None,
    operand_dtype: torch.dtype | None = None,
    engine: str | None = None,
) -> Tensor:
    """InfoNCE of images and texts, the mean of both directions, without the B x G matrix.

    Image row b and text row `first_label + b` are a pair. Rows of either side without a partner are extra negatives of
    the other side. Each direction is the mean over its rows that have a positive.

    Args:
        image_BE: [B, E] float16, bfloat16 or float32 (float64 on the CPU), E at most 8192 on CUDA.
        text_GE: [G, E], same device.
        scale: what the cosine is multiplied with: a number or a tensor of one element (exp of CLIP's logit_scale).
        normalize: divide rows by their lengths; False takes them as they are, for embeddings of length one. Rows
            shorter than 1e-12 have cosine 0 to everything and gradient 0.
        first_label: column of the first image's pair; may be negative.
        image_ids, text_ids: int64 [B] and [G], both or none. Equal ids mark what belongs together, such as the hash
            of a caption.
        same_id: "ignore" leaves pairs of equal ids out unless they are a pair by position (false negatives);
            "positive" makes them positives, which share the row's target evenly, and position means nothing.
        label_smoothing: in [0, 1): this share of every target goes evenly to all valid columns of its row.
        stash_bytes: the most that a stash may take (module docstring); 0 always recomputes. Default 1 GiB.
        workspace_bytes: what the call may hold beside embeddings, gradients and a stash. Default 576 MB on CUDA,
            64 MiB on the CPU.
        operand_dtype: what a GPU multiplies. Default float32 for float32 embeddings outside autocast, else float16.
            The CPU multiplies in float32 (float64 for float64) in any case.
        engine: "library" or "fused" on a GPU (logits.py). Default as measured.

    Returns:
        A scalar, float32 (float64 for float64 on the CPU).

    Raises:
        ValueError: shapes, dtypes, devices, ids or ranges do not fit, or there is no pair.

    Source: Radford et al. 2021 (arXiv 2103.00020), figure 3; several positives as in UniCL (arXiv 2204.03610).

    >>> import torch
    >>> contrastive_loss(torch.eye(2), torch.eye(2), 10.0)
    tensor(4.5399e-05)
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing has to be in [0, 1), got {label_smoothing}")
    check_arguments(image_BE, text_GE, image_ids, text_ids, same_id, operand_dtype, engine)
    B, G = image_BE.shape[0], text_GE.shape[0]
    rows = slice(max(0, -first_label), min(B, G - first_label))
    columns = slice(rows.start + first_label, rows.stop + first_label)
    by_id = image_ids is not None and same_id == "positive"
    if rows.stop <= rows.start and not by_id:
        raise ValueError(f"no image of {B} has a text among {G} with first_label {first_label}")
    targets = None
    if image_ids is not None or label_smoothing > 0:
        targets = uniform_targets(
            image_BE, text_GE, first_label, image_ids, text_ids, same_id, label_smoothing
        )
    terms = contrastive_terms(
        *(image_BE, text_GE, scale),
        normalize=normalize,
        first_label=first_label,
        image_ids=image_ids,
        text_ids=text_ids,
        same_id=same_id,
        targets=targets,
        stash_bytes=stash_bytes,
        workspace_bytes=workspace_bytes,
        operand_dtype=operand_dtype,
        engine=engine,
    )
    row_loss_B = terms.row_lse_B - terms.row_target_B
    column_loss_G = terms.column_lse_G - terms.column_target_G
    if by_id:
        assert targets is not None
        row_loss = _mean_where(row_loss_B, targets.row_positive_B > 0)
        column_loss = _mean_where(column_loss_G, targets.column_positive_G > 0)
    else:
        row_loss, column_loss = row_loss_B[rows].mean(), column_loss_G[columns].mean()
    wide = tiles.accumulate_dtype(torch.promote_types(image_BE.dtype, text_GE.dtype))
    return ((row_loss + column_loss) / 2).to(wide)


def _mean_where(values_N: Tensor, chosen_N: Tensor) -> Tensor:
    """The mean of the chosen, whatever the others are (NaN if none is chosen)."""
    return torch.where(chosen_N, values_N, 0.0).sum() / chosen_N.sum()


def uniform_targets(
    image_BE: Tensor,
    text_GE: Tensor,
    first_label: int,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    same_id: str,
    label_smoothing: float,
) -> Targets:
    """Targets spread evenly over a row's positives, and a share of `label_smoothing` over its valid columns."""
    B, G = image_BE.shape[0], text_GE.shape[0]
    wide = tiles.accumulate_dtype(torch.promote_types(image_BE.dtype, text_GE.dtype))
    if image_ids is None or text_ids is None:
        counts = [image_BE.new_ones(length, dtype=wide) for length in (B, G)]
        valid = [
            image_BE.new_full((length,), other, dtype=wide) for length, other in ((B, G), (G, B))
        ]
    else:
        same = count_equal(image_ids, text_ids), count_equal(text_ids, image_ids)
        if same_id == "positive":
            counts = [count.to(wide) for count in same]
            valid = [
                image_BE.new_full((length,), other, dtype=wide)
                for length, other in ((B, G), (G, B))
            ]
        else:
            own = _equal_to_partner(image_ids, text_ids, first_label)
            own = own, _equal_to_partner(text_ids, image_ids, -first_label)
            counts = [image_BE.new_ones(length, dtype=wide) for length in (B, G)]
            valid = [
                (other - (count - by_position)).to(wide)
                for other, count, by_position in zip((G, B), same, own, strict=True)
            ]
    weights = [
        (
            torch.where(count > 0, (1 - label_smoothing) / count, 0.0),
            torch.where(number > 0, label_smoothing / number, 0.0),
        )
        for count, number in zip(counts, valid, strict=True)
    ]
    return Targets(*weights[0], *weights[1])


def count_equal(ids_N: Tensor, others_M: Tensor) -> Tensor:
    """int64 [N]: how many of the others equal each id, in O((N + M) log M)."""
    ordered_M = others_M.sort().values
    last = torch.searchsorted(ordered_M, ids_N, right=True)
    return last - torch.searchsorted(ordered_M, ids_N)


def _equal_to_partner(ids_N: Tensor, others_M: Tensor, first_label: int) -> Tensor:
    """int64 [N]: 1 where the partner by position exists and has the same id."""
    N, M = ids_N.shape[0], others_M.shape[0]
    equal_N = torch.zeros_like(ids_N)
    start, stop = max(0, -first_label), min(N, M - first_label)
    if start < stop:
        partners = others_M[start + first_label : stop + first_label]
        equal_N[start:stop] = (ids_N[start:stop] == partners).to(ids_N.dtype)
    return equal_N


def check_arguments(
    image_BE: Tensor,
    text_GE: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    same_id: str,
    operand_dtype: torch.dtype | None,
    engine: str | None,
) -> None:
    """ValueError unless the arguments of `contrastive_terms` make a problem."""
    logits.check_embeddings(image_BE, text_GE, operand_dtype)
    if engine not in (None, *logits.ENGINES):
        raise ValueError(f"engine has to be one of {logits.ENGINES}, got {engine!r}")
    if same_id not in SAME_ID:
        raise ValueError(f"same_id has to be one of {SAME_ID}, got {same_id!r}")
    if (image_ids is None) != (text_ids is None):
        raise ValueError("image_ids and text_ids: pass both or none")
    for name, ids, rows in (("image_ids", image_ids, image_BE), ("text_ids", text_ids, text_GE)):
        if ids is None:
            continue
        if ids.shape != rows.shape[:1] or ids.dtype != torch.int64 or ids.device != rows.device:
            raise ValueError(
                f"{name} has to be int64 [{rows.shape[0]}] on {rows.device}, "
                f"got {ids.dtype} {list(ids.shape)} on {ids.device}"
            )
