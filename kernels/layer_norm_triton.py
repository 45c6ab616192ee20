"""Layer normalisation on a GPU: the kernels of the passes that `layer_norm.py` defines, and their launches.

A row is two tensors side by side, the largest power of two below D and the power of two that holds the rest: 768 is
512 + 256 and 1280 is 1024 + 256, where one power of two would leave a quarter and more of the registers idle.

Rows are numbered b L + l. A program serves one token l and walks over images b; a plain matrix has L = 1. A program's
sums over rows are then those of one position, so the gradient of the positions costs nothing extra.

Legend: B images (or rows, with L = 1), L tokens (class token and P patches), D width.
Determinism: a program owns its rows; sums of rows are written by program and added in the order of the programs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.launch import tl, triton

# The widest row that the launch table holds in registers; CLIP's widest tower has 1,664.
MAX_WIDTH = 2048


@triton.jit
def _columns(inside, d, D: tl.constexpr, RAGGED: tl.constexpr):
    """Return the mask of rows inside and columns d. If no column is beyond D, it is the rows' alone: loads stay wide."""
    return inside[:, None] & (d < D)[None, :] if RAGGED else inside[:, None]


@triton.jit
def _load_vector(ptr, d, D: tl.constexpr, RAGGED: tl.constexpr):
    """Load elements d of a vector over columns, float32 [1, BLOCK], 0 beyond D."""
    value = tl.load(ptr + d, mask=d < D, other=0.0) if RAGGED else tl.load(ptr + d)
    return value.to(tl.float32)[None, :]


@triton.jit
def _load_rows(ptr, row, inside, d, D: tl.constexpr, RAGGED: tl.constexpr):
    """Load elements d of rows of a matrix, float32 [BLOCK_B, BLOCK], 0 outside."""
    mask = _columns(inside, d, D, RAGGED)
    return tl.load(ptr + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(ptr, value, row, inside, d, D: tl.constexpr, RAGGED: tl.constexpr):
    mask = _columns(inside, d, D, RAGGED)
    tl.store(ptr + row[:, None] * D + d[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_embedded(
    patch_ptr,
    class_ptr,
    position_ptr,
    row,
    token,
    inside,
    d,
    D: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Load the class token or a patch as `_load_rows` does, plus its position, rounded where the definition rounds."""
    dtype = patch_ptr.dtype.element_ty
    # Not `inside & (token > 0)`: Triton 3.9's interpreter makes integers of it.
    is_patch = tl.where(token > 0, inside, False)
    x = _load_rows(patch_ptr, row, is_patch, d, D, RAGGED)
    if token == 0:
        x += _load_vector(class_ptr, d, D, RAGGED).to(dtype).to(tl.float32)
    position = _load_vector(position_ptr + token * D, d, D, RAGGED).to(dtype).to(tl.float32)
    return (x + position).to(dtype).to(tl.float32)


@triton.jit
def _centred(x, mean, d, D: tl.constexpr, RAGGED: tl.constexpr):
    """Return x without its mean, 0 beyond D."""
    centred = x - mean[:, None]
    return tl.where((d < D)[None, :], centred, 0.0) if RAGGED else centred


@triton.jit
def _normalized(weight_ptr, bias_ptr, x, mean, rstd, d, D: tl.constexpr, RAGGED: tl.constexpr):
    """Return y by an explicit product and fused multiply-add, so that every mode gets the same bits from the same x."""
    weight = _load_vector(weight_ptr, d, D, RAGGED) + tl.zeros_like(x)
    bias = _load_vector(bias_ptr, d, D, RAGGED) + tl.zeros_like(x)
    return tl.fma((x - mean[:, None]) * rstd[:, None], weight, bias)


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,
    delta_ptr,
    class_ptr,
    position_ptr,
    weight_ptr,
    bias_ptr,
    stream_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    B,
    L,
    eps,
    D: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Normalise x (MODE "plain"), x + delta ("add"), tokens ("embed"), or x by statistics written before ("apply")."""
    RAGGED: tl.constexpr = BLOCK_D + BLOCK_E != D
    token = tl.program_id(0) % L
    b = (tl.program_id(0) // L).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = b < B
    n = b * L + token
    d = tl.arange(0, BLOCK_D)
    e = BLOCK_D + tl.arange(0, BLOCK_E)
    if MODE == "embed":
        patch = b * (L - 1) + token - 1
        x_d = _load_embedded(x_ptr, class_ptr, position_ptr, patch, token, inside, d, D, False)
        x_e = _load_embedded(x_ptr, class_ptr, position_ptr, patch, token, inside, e, D, RAGGED)
    else:
        x_d = _load_rows(x_ptr, n, inside, d, D, False)
        x_e = _load_rows(x_ptr, n, inside, e, D, RAGGED)
    if MODE == "add":
        x_d = (x_d + _load_rows(delta_ptr, n, inside, d, D, False)).to(x_ptr.dtype.element_ty)
        x_e = (x_e + _load_rows(delta_ptr, n, inside, e, D, RAGGED)).to(x_ptr.dtype.element_ty)
        _store_rows(stream_ptr, x_d, n, inside, d, D, False)
        _store_rows(stream_ptr, x_e, n, inside, e, D, RAGGED)
        x_d, x_e = x_d.to(tl.float32), x_e.to(tl.float32)
    if MODE == "apply":
        mean = tl.load(mean_ptr + n, mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + n, mask=inside, other=0.0)
    else:
        mean = (tl.sum(x_d, axis=1) + tl.sum(x_e, axis=1)) / D
        centred_d = _centred(x_d, mean, d, D, False)
        centred_e = _centred(x_e, mean, e, D, RAGGED)
        squares = tl.sum(centred_d * centred_d, axis=1) + tl.sum(centred_e * centred_e, axis=1)
        rstd = 1.0 / tl.sqrt_rn(squares / D + eps)
        tl.store(mean_ptr + n, mean, mask=inside)
        tl.store(rstd_ptr + n, rstd, mask=inside)
    y_d = _normalized(weight_ptr, bias_ptr, x_d, mean, rstd, d, D, False)
    y_e = _normalized(weight_ptr, bias_ptr, x_e, mean, rstd, e, D, RAGGED)
    _store_rows(y_ptr, y_d, n, inside, d, D, False)
    _store_rows(y_ptr, y_e, n, inside, e, D, RAGGED)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    class_ptr,
    position_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dstream_ptr,
    dx_ptr,
    partial_ptr,
    B,
    L,
    images_per_program,
    D: tl.constexpr,
    EMBED: tl.constexpr,
    STREAM: tl.constexpr,
    COLUMN_SUM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Compute dx of one token of some images, and the sums over them of dy x_hat, dy and dx, in this order."""
    RAGGED: tl.constexpr = BLOCK_D + BLOCK_E != D
    pid = tl.program_id(0)
    token = pid % L
    d = tl.arange(0, BLOCK_D)
    e = BLOCK_D + tl.arange(0, BLOCK_E)
    weight_d = _load_vector(weight_ptr, d, D, False)
    weight_e = _load_vector(weight_ptr, e, D, RAGGED)
    dweight_d = tl.zeros((BLOCK_B, BLOCK_D), dtype=tl.float32)
    dweight_e = tl.zeros((BLOCK_B, BLOCK_E), dtype=tl.float32)
    dbias_d, dbias_e = tl.zeros_like(dweight_d), tl.zeros_like(dweight_e)
    sum_d, sum_e = tl.zeros_like(dweight_d), tl.zeros_like(dweight_e)
    for first in range(0, images_per_program, BLOCK_B):
        b = (pid // L).to(tl.int64) * images_per_program + first + tl.arange(0, BLOCK_B)
        inside = b < B
        n = b * L + token
        if EMBED:
            row = b * (L - 1) + token - 1
            stored = tl.where(token > 0, inside, False)
            x_d = _load_embedded(x_ptr, class_ptr, position_ptr, row, token, inside, d, D, False)
            x_e = _load_embedded(x_ptr, class_ptr, position_ptr, row, token, inside, e, D, RAGGED)
        else:
            row = n
            stored = inside
            x_d = _load_rows(x_ptr, n, inside, d, D, False)
            x_e = _load_rows(x_ptr, n, inside, e, D, RAGGED)
        dy_d = _load_rows(dy_ptr, n, inside, d, D, False)
        dy_e = _load_rows(dy_ptr, n, inside, e, D, RAGGED)
        mean = tl.load(mean_ptr + n, mask=inside, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + n, mask=inside, other=0.0)[:, None]
        # Beyond D, x_hat is not 0, but dy and weight are. Rows outside have rstd 0.
        x_d, x_e = (x_d - mean) * rstd, (x_e - mean) * rstd
        dweight_d += dy_d * x_d
        dweight_e += dy_e * x_e
        dbias_d += dy_d
        dbias_e += dy_e
        dy_d, dy_e = dy_d * weight_d, dy_e * weight_e
        along = ((tl.sum(dy_d * x_d, axis=1) + tl.sum(dy_e * x_e, axis=1)) / D)[:, None]
        mean_dy = ((tl.sum(dy_d, axis=1) + tl.sum(dy_e, axis=1)) / D)[:, None]
        dx_d = (dy_d - mean_dy - x_d * along) * rstd
        dx_e = (dy_e - mean_dy - x_e * along) * rstd
        if STREAM:
            dx_d += _load_rows(dstream_ptr, n, inside, d, D, False)
            dx_e += _load_rows(dstream_ptr, n, inside, e, D, RAGGED)
        _store_rows(dx_ptr, dx_d, row, stored, d, D, False)
        _store_rows(dx_ptr, dx_e, row, stored, e, D, RAGGED)
        if COLUMN_SUM:
            sum_d += dx_d
            sum_e += dx_e
    partial_ptr += pid.to(tl.int64) * D
    num_partials = tl.num_programs(0).to(tl.int64) * D
    _store_sum(partial_ptr, dweight_d, dweight_e, d, e, D)
    _store_sum(partial_ptr + num_partials, dbias_d, dbias_e, d, e, D)
    if COLUMN_SUM:
        _store_sum(partial_ptr + 2 * num_partials, sum_d, sum_e, d, e, D)


@triton.jit
def _store_sum(ptr, value_d, value_e, d, e, D: tl.constexpr):
    tl.store(ptr + d, tl.sum(value_d, axis=0))
    tl.store(ptr + e, tl.sum(value_e, axis=0), mask=e < D)


# BLOCK_D + BLOCK_E at most -> BLOCK_B and num_warps forward; BLOCK_B, num_warps and programs a processor backward. The
# same on every chip and for every dtype; the largest entry has 2 tensors of 1024 columns. Registers bound the backward
# pass, which holds three sums: 8 to 16 elements of each a thread. No entry spills.
_LAUNCH_TABLE = {
    512: ((4, 4), (4, 4, 4)),
    1024: ((4, 4), (2, 4, 4)),
    1536: ((2, 4), (2, 8, 2)),
    2048: ((2, 4), (1, 8, 3)),
}


def _launch_config(D: int, backward: bool) -> tuple[dict[str, int], int]:
    """Return the launch keywords for rows of D elements, and the backward pass's programs a processor."""
    assert 0 < D <= MAX_WIDTH, f"rows of {D} elements; the kernels hold at most {MAX_WIDTH}"
    block_d = 1 << max(0, (D - 1).bit_length() - 1)
    block_e = triton.next_power_of_2(max(1, D - block_d))
    row = next(row for width, row in _LAUNCH_TABLE.items() if block_d + block_e <= width)
    block_b, num_warps, *programs = row[backward]
    blocks = {"BLOCK_B": block_b, "BLOCK_D": block_d, "BLOCK_E": block_e, "num_warps": num_warps}
    return blocks, programs[0] if backward else 0


def forward_triton(
    x: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    *,
    delta_ND: Tensor | None = None,
    tokens: tuple[Tensor, Tensor] | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (stream, y, mean_N, rstd_N) of x [N, D] or, with tokens (class_D, position_LD), of patches [B, P, D].

    stream is x + delta, or an empty tensor without a delta. If statistics are given, they are applied and returned.
    """
    x = x.contiguous()
    D = x.shape[-1]
    B, L = len(x), 1 if tokens is None else x.shape[1] + 1
    config, _ = _launch_config(D, backward=False)
    y = x.new_empty(x.shape if tokens is None else (B, L, D))
    stream = x.new_empty(0) if delta_ND is None else torch.empty_like(x)
    mode = "plain" if delta_ND is None else "add"
    if tokens is not None:
        mode = "embed"
    if statistics is None:
        mean_N, rstd_N = (x.new_empty(B * L, dtype=torch.float32) for _ in range(2))
    else:
        mode = "apply"
        mean_N, rstd_N = statistics
    if B > 0:
        class_D, position_LD = tokens or (None, None)
        _layer_norm_fwd_kernel[(triton.cdiv(B, config["BLOCK_B"]) * L,)](
            x_ptr=x,
            delta_ptr=None if delta_ND is None else delta_ND.contiguous(),
            class_ptr=None if class_D is None else class_D.contiguous(),
            position_ptr=None if position_LD is None else position_LD.contiguous(),
            weight_ptr=weight_D.contiguous(),
            bias_ptr=bias_D.contiguous(),
            stream_ptr=stream,
            y_ptr=y,
            mean_ptr=mean_N,
            rstd_ptr=rstd_N,
            B=B,
            L=L,
            eps=eps,
            D=D,
            MODE=mode,
            **config,
        )
    return stream, y, mean_N, rstd_N


def backward_triton(
    dy: Tensor,
    x: Tensor,
    mean_N: Tensor,
    rstd_N: Tensor,
    weight_D: Tensor,
    *,
    dstream_ND: Tensor | None = None,
    tokens: tuple[Tensor, Tensor] | None = None,
    want_column_sum: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dweight_D, dbias_D, dx_sum_LD) of x as in `forward_triton`; dx_sum is empty unless wanted."""
    dy, x = dy.contiguous(), x.contiguous()
    D = x.shape[-1]
    B, L = len(x), 1 if tokens is None else x.shape[1] + 1
    dx = torch.empty_like(x)
    config, programs = _launch_config(D, backward=True)
    programs *= launch.NUM_PROCESSORS[launch.architecture(x.device)]
    block_b = config["BLOCK_B"]
    # Without images, one program for each token writes its sums, 0.
    images = block_b * triton.cdiv(max(1, B), block_b * triton.cdiv(programs, L))
    groups = triton.cdiv(max(1, B), images)
    num_sums = 3 if want_column_sum else 2
    partial = x.new_empty((num_sums, groups, L, D), dtype=torch.float32)
    class_D, position_LD = tokens or (None, None)
    _layer_norm_bwd_kernel[(groups * L,)](
        dy_ptr=dy,
        x_ptr=x,
        class_ptr=None if class_D is None else class_D.contiguous(),
        position_ptr=None if position_LD is None else position_LD.contiguous(),
        mean_ptr=mean_N,
        rstd_ptr=rstd_N,
        weight_ptr=weight_D.contiguous(),
        dstream_ptr=None if dstream_ND is None else dstream_ND.contiguous(),
        dx_ptr=dx,
        partial_ptr=partial,
        B=B,
        L=L,
        images_per_program=images,
        D=D,
        EMBED=tokens is not None,
        STREAM=dstream_ND is not None,
        COLUMN_SUM=want_column_sum,
        **config,
    )
    dweight_D, dbias_D = (part.flatten(0, 1).sum(0) for part in partial[:2])
    dx_sum_LD = partial[2].sum(0) if want_column_sum else partial.new_empty(0)
    return dx, dweight_D, dbias_D, dx_sum_LD
