"""L2 normalisation of rows: the prologue and epilogue kernels that the similarity and the losses share.

    norm_n = sqrt(sum_d x_nd^2)        x_hat_n = x_n / norm_n
    dx_n   = c / norm_n * (t_n - x_hat_n <x_hat_n, t_n>)      t = gradient of x_hat,  c = a scale on the device

A row shorter than EPS = 1e-12 has no direction: its length counts as inf, so that x_hat, similarities and gradient
are exactly 0. Other rows are those of torch.nn.functional.normalize, which gives short rows a gradient 1e12 times the
upstream one, too large to be of use.

Legend: N rows, D width. Precision: loads float16, bfloat16 or float32, computes in float32 with IEEE division and
square root, stores the input's dtype; lengths and <x_hat, t> are float32. Rows longer than 1.8e19 overflow the
float32 sum of squares and count as inf long, as they do in PyTorch.
Traffic for b-byte elements: lengths N D b read; normalize 2 N D b; normalize_bwd N D (2 b + 4). No FLOPs to speak of:
each floor is its bytes over the memory bandwidth.
Determinism: one program owns a row from load to store.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipcore.kernels.launch import tl, triton

EPS = 1e-12
# The widest row one program holds in registers; CLIP's embeddings end at 1,280.
MAX_WIDTH = 8192


def normalize_ref(x_ND: Tensor) -> Tensor:
    """Return each row over its length; rows shorter than EPS give 0 and have gradient 0. Differentiable."""
    norm_N1 = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True)
    # Not `norm < EPS`: a NaN row has to stay NaN.
    short_N1 = norm_N1 < EPS
    return (x_ND / norm_N1.masked_fill(short_N1, 1.0)).masked_fill(short_N1, 0.0)


def lengths_ref(x_ND: Tensor) -> Tensor:
    """Return the norm of each row, [N] in the dtype of x; inf for rows shorter than EPS."""
    norm_N = torch.linalg.vector_norm(x_ND, dim=1)
    return norm_N.masked_fill(norm_N < EPS, torch.inf)


def normalize_bwd_ref(x_ND: Tensor, grad_unit_ND: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what `normalize_bwd` does, in plain PyTorch and in the dtype of x."""
    unit_ND = normalize_ref(x_ND)
    norm_N1 = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True)
    short_N1 = norm_N1 < EPS
    factor_N1 = (scale.to(x_ND.dtype) / norm_N1.masked_fill(short_N1, 1.0)).masked_fill(short_N1, 0)
    along_N = (unit_ND * grad_unit_ND).sum(1)
    return (grad_unit_ND - unit_ND * along_N[:, None]) * factor_N1, along_N


@triton.jit
def _load_row_block(x_ptr, stride_n, N, D, n, BLOCK_D: tl.constexpr):
    """Load rows n of x as float32; return them, their norms and the mask. Elements outside [N, D] are 0."""
    d = tl.arange(0, BLOCK_D)
    mask = (n[:, None] < N) & (d[None, :] < D)
    x = tl.load(x_ptr + n[:, None] * stride_n + d[None, :], mask=mask, other=0.0).to(tl.float32)
    return x, tl.sqrt_rn(tl.sum(x * x, axis=1)), mask


@triton.jit
def _unit_rows(x, norm, EPS: tl.constexpr):
    """Return x over its norm, 0 for short rows. The test is `<`, which is false for NaN, so NaN rows stay NaN."""
    short = norm < EPS
    unit = tl.div_rn(x, tl.where(short, 1.0, norm)[:, None] + tl.zeros_like(x))
    return tl.where(short[:, None], 0.0, unit)


@triton.jit
def cosine_tile(dot, length_n, length_m, EXACT: tl.constexpr):
    """Return dot over the product of the lengths of its rows and columns, float32.

    float32 operands (EXACT) take one division an element: the product of lengths rounds as the dot of parallel rows does.
    16-bit operands take two multiplications by reciprocal lengths: their result is rounded far more coarsely anyway.
    """
    if EXACT:
        cosine = tl.div_rn(dot, length_n[:, None] * length_m[None, :])
    else:
        cosine = dot * (1.0 / length_n)[:, None] * (1.0 / length_m)[None, :]
    return cosine


@triton.jit
def _lengths_kernel(
    x_ptr,
    length_ptr,
    stride_n,
    N,
    D,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    _, norm, _ = _load_row_block(x_ptr, stride_n, N, D, n, BLOCK_D)
    tl.store(length_ptr + n, tl.where(norm < EPS, float("inf"), norm), mask=n < N)


@triton.jit
def _normalize_fwd_kernel(
    x_ptr, unit_ptr, stride_n, N, D, EPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x, norm, mask = _load_row_block(x_ptr, stride_n, N, D, n, BLOCK_D)
    unit = _unit_rows(x, norm, EPS)
    offsets = n[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(unit_ptr + offsets, unit.to(unit_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _normalize_bwd_kernel(
    x_ptr,
    grad_unit_ptr,
    scale_ptr,
    grad_x_ptr,
    along_ptr,
    stride_n,
    N,
    D,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x, norm, mask = _load_row_block(x_ptr, stride_n, N, D, n, BLOCK_D)
    unit = _unit_rows(x, norm, EPS)
    offsets = n[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    grad_unit = tl.load(grad_unit_ptr + offsets, mask=mask, other=0.0)
    along = tl.sum(unit * grad_unit, axis=1)
    scale = tl.load(scale_ptr).to(tl.float32)
    short = norm < EPS
    factor = tl.where(short, 0.0, scale / tl.where(short, 1.0, norm))
    grad_x = (grad_unit - unit * along[:, None]) * factor[:, None]
    tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(along_ptr + n, along, mask=n < N)


def _launch_config(N: int, D: int) -> tuple[tuple[int], dict[str, int]]:
    """Return grid and launch keywords: about 2,048 elements a program, at least one row; the same on every chip."""
    assert D <= MAX_WIDTH, f"rows of {D} elements; the kernels hold at most {MAX_WIDTH}"
    block_d = max(16, triton.next_power_of_2(D))
    block_n = max(1, min(16, 2048 // block_d))
    config = {"BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": 8 if block_d > 2048 else 4}
    return (triton.cdiv(N, block_n),), config


def lengths(x_ND: Tensor) -> Tensor:
    """Return the norm of each row, float32 [N]. Short rows give inf, so a quotient by it is 0. Unit inner stride."""
    N, D = x_ND.shape
    length_N = torch.empty(N, dtype=torch.float32, device=x_ND.device)
    if N > 0:
        grid, config = _launch_config(N, D)
        _lengths_kernel[grid](
            x_ptr=x_ND, length_ptr=length_N, stride_n=x_ND.stride(0), N=N, D=D, EPS=EPS, **config
        )
    return length_N


def normalize(x_ND: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return each row over its norm, [N, D] contiguous in `dtype` (default: x's); short rows give 0. Unit inner stride."""
    N, D = x_ND.shape
    unit_ND = torch.empty((N, D), dtype=dtype or x_ND.dtype, device=x_ND.device)
    if N > 0:
        grid, config = _launch_config(N, D)
        _normalize_fwd_kernel[grid](
            x_ptr=x_ND, unit_ptr=unit_ND, stride_n=x_ND.stride(0), N=N, D=D, EPS=EPS, **config
        )
    return unit_ND


def normalize_bwd(
    x_ND: Tensor, grad_unit_ND: Tensor, scale: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (dx_ND, along_N) of `scale * <t, normalize(x)>` for t = grad_unit_ND (float32, contiguous).

    dx has x's dtype. It is written to `out` (contiguous) if given; `out` may be grad_unit_ND itself.
    along_N = <x_hat, t> is float32; its sum in row order is the gradient of the scale.
    """
    N, D = x_ND.shape
    grad_x_ND = torch.empty((N, D), dtype=x_ND.dtype, device=x_ND.device) if out is None else out
    along_N = torch.empty(N, dtype=torch.float32, device=x_ND.device)
    if N > 0:
        grid, config = _launch_config(N, D)
        _normalize_bwd_kernel[grid](
            x_ptr=x_ND,
            grad_unit_ptr=grad_unit_ND,
            scale_ptr=scale,
            grad_x_ptr=grad_x_ND,
            along_ptr=along_N,
            stride_n=x_ND.stride(0),
            N=N,
            D=D,
            EPS=EPS,
            **config,
        )
    return grad_x_ND, along_N


def check_rows(x_ND: Tensor, y_MD: Tensor, names: tuple[str, str] = ("x", "y")) -> None:
    """Raise ValueError unless x and y are two matrices of rows that can be compared on their device."""
    x, y = names
    if x_ND.dim() != 2 or y_MD.dim() != 2 or x_ND.shape[1] != y_MD.shape[1] or x_ND.shape[1] == 0:
        raise ValueError(
            f"expected {x} [N, D] and {y} [M, D] with the same D >= 1, "
            f"got {x} {list(x_ND.shape)} and {y} {list(y_MD.shape)}"
        )
    for name, tensor in ((x, x_ND), (y, y_MD)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has to be a floating-point tensor, got {tensor.dtype}")
    if x_ND.device != y_MD.device:
        raise ValueError(f"{x} is on {x_ND.device} and {y} on {y_MD.device}: move one of them")
    if x_ND.is_cuda and torch.float64 in (x_ND.dtype, y_MD.dtype):
        raise ValueError("float64 is computed on the CPU only: pass float32 or CPU tensors")
    if x_ND.is_cuda and x_ND.shape[1] > MAX_WIDTH:
        raise ValueError(f"D = {x_ND.shape[1]} is wider than the {MAX_WIDTH} that the kernels hold")
