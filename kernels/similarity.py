"""Scaled cosine similarity of every row of x with every row of y, forward and backward.

    S_nm = s * <x_n, y_m> / (|x_n| |y_m|)           with x_hat, y_hat and the rule for short rows of normalize.py
    t_n  = sum_m g_nm y_hat_m                       g = gradient of S;  t_m = sum_n g_nm x_hat_n likewise
    dx_n = s / |x_n| (t_n - x_hat_n <x_hat_n, t_n>)
    ds   = sum_nm g_nm <x_hat_n, y_hat_m> = sum_n <x_hat_n, t_n>      free: the dx epilogue has both factors

Legend: N and M rows, D width.

Forward (Triton): one pass of row norms, then one tile kernel that multiplies the rows as they are and applies
s / (|x_n| |y_m|) to the float32 accumulator, so that nothing is rounded between the input and the one store.
|<x, y>| <= |x| |y|: the accumulator overflows only where a norm does. Backward: the two products are the vendor
library's, with float32 results (a fused kernel would have to hold D-wide accumulators or add with atomics; neither
reaches the library's rate), between a normalising prologue and a projecting epilogue.

Precision: operands in their own dtype (float32 in IEEE arithmetic), float32 accumulators, results in the promoted
dtype. In the backward y_hat is rounded to that dtype once, as g is. float64 runs on the CPU only.
Traffic for b-byte elements: forward b (2 N D + 2 M D + N M), backward b (2 N M + 5 (N + M) D) + 8 (N + M) D.
FLOPs: 2 N M D forward, 4 N M D backward. Floor: with N = M = 32,768, D = 512, bfloat16 on an H100, 1.1 ms of
arithmetic (989 TFLOP/s) against 0.66 ms of bytes (3.35 TB/s): arithmetic, as long as D > 300.
Determinism: no atomics; each element of S and dx has one owner, ds is a sum over rows in a fixed order.

Source: Radford et al. 2021 (arXiv 2103.00020), figure 3.
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
    normalize,
    normalize_bwd,
    normalize_bwd_ref,
    normalize_ref,
)
from clipcore.kernels.tiles import dot_rows, grouped_tile


def similarity_ref(x_ND: Tensor, y_MD: Tensor, scale: Tensor | float) -> Tensor:
    """Return the similarities by plain PyTorch in the promoted dtype; differentiable, holds N x M. The reference."""
    dtype = torch.promote_types(x_ND.dtype, y_MD.dtype)
    return (normalize_ref(x_ND.to(dtype)) @ normalize_ref(y_MD.to(dtype)).T) * scale


@triton.jit
def _similarity_fwd_kernel(
    x_ptr,
    y_ptr,
    length_x_ptr,
    length_y_ptr,
    scale_ptr,
    out_ptr,
    stride_x_n,
    stride_y_m,
    N,
    M,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    EXACT: tl.constexpr,
):
    tile_n, tile_m = grouped_tile(
        tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), GROUP_N
    )
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows past the end repeat the last one instead of being masked: the loads of the loop stay plain.
    row_n = tl.minimum(n, N - 1)
    row_m = tl.minimum(m, M - 1)
    dot = dot_rows(x_ptr, y_ptr, row_n, row_m, stride_x_n, stride_y_m, D, BLOCK_N, BLOCK_M, BLOCK_D)
    length_x = tl.load(length_x_ptr + row_n)
    length_y = tl.load(length_y_ptr + row_m)
    cosine = cosine_tile(dot, length_x, length_y, EXACT)
    out = cosine * tl.load(scale_ptr).to(tl.float32)
    mask = (n[:, None] < N) & (m[None, :] < M)
    tl.store(out_ptr + n[:, None] * M + m[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


# (architecture, kind) -> BLOCK_N, BLOCK_M, BLOCK_D, num_warps, num_stages. "wide" is for 16-bit operands where the
# wide tiles fill the chip at least once, "narrow" for fewer rows, "exact" for float32.
_LAUNCH_TABLE = {
    (80, "wide"): (128, 128, 64, 4, 3),
    (80, "narrow"): (64, 64, 64, 4, 3),
    (80, "exact"): (64, 64, 32, 4, 3),
    (90, "wide"): (128, 256, 64, 8, 3),
    (90, "narrow"): (64, 64, 64, 4, 4),
    (90, "exact"): (64, 64, 32, 4, 3),
    (100, "wide"): (128, 256, 64, 8, 3),
    (100, "narrow"): (64, 64, 64, 4, 4),
    (100, "exact"): (64, 64, 32, 4, 3),
}


def _launch_config(
    N: int, M: int, dtype: torch.dtype, architecture: int
) -> tuple[tuple[int], dict[str, Any]]:
    """Return grid and launch keywords of the forward tile kernel."""
    if dtype == torch.float32:
        kind = "exact"
    else:
        block_n, block_m, *_ = _LAUNCH_TABLE[architecture, "wide"]
        wide_tiles = triton.cdiv(N, block_n) * triton.cdiv(M, block_m)
        kind = "wide" if wide_tiles >= launch.NUM_PROCESSORS[architecture] else "narrow"
    block_n, block_m, block_d, num_warps, num_stages = _LAUNCH_TABLE[architecture, kind]
    config = {
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "BLOCK_D": block_d,
        "GROUP_N": 8,
        "EXACT": dtype == torch.float32,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    return (triton.cdiv(N, block_n) * triton.cdiv(M, block_m),), config


def _similarity_fwd_triton(x_ND: Tensor, y_MD: Tensor, scale: Tensor) -> Tensor:
    """Launch the forward pass: on CUDA, or on CPU tensors where Triton runs in its interpreter (tests)."""
    dtype = torch.promote_types(x_ND.dtype, y_MD.dtype)
    N, M = x_ND.shape[0], y_MD.shape[0]
    out_NM = torch.empty((N, M), dtype=dtype, device=x_ND.device)
    if out_NM.numel() == 0:
        return out_NM
    grid, config = _launch_config(N, M, dtype, launch.architecture(x_ND.device))
    x_ND, y_MD = (launch.aligned_rows(t.to(dtype), config["BLOCK_D"]) for t in (x_ND, y_MD))
    _similarity_fwd_kernel[grid](
        x_ptr=x_ND,
        y_ptr=y_MD,
        length_x_ptr=lengths(x_ND),
        length_y_ptr=lengths(y_MD),
        scale_ptr=scale,
        out_ptr=out_NM,
        stride_x_n=x_ND.stride(0),
        stride_y_m=y_MD.stride(0),
        N=N,
        M=M,
        D=x_ND.shape[1],
        **config,
    )
    return out_NM


def _similarity_bwd_triton(
    grad_NM: Tensor, x_ND: Tensor, y_MD: Tensor, scale: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dy, ds). A side that nobody needs costs no product, except that ds needs one side."""
    operand_x_ND, operand_y_MD = (
        launch.unit_inner_stride(t.to(grad_NM.dtype)) for t in (x_ND, y_MD)
    )
    grad_x, grad_y, along = x_ND.new_empty(0), y_MD.new_empty(0), None
    if need_y:
        to_y_MD = launch.matmul_fp32(grad_NM.T, normalize(operand_x_ND))
        grad_y, along = normalize_bwd(launch.unit_inner_stride(y_MD), to_y_MD, scale)
    if need_x or along is None:  # ds needs one side at least
        to_x_ND = launch.matmul_fp32(grad_NM, normalize(operand_y_MD))
        grad_x, along = normalize_bwd(launch.unit_inner_stride(x_ND), to_x_ND, scale)
    return grad_x, grad_y, along.sum().to(scale.dtype).reshape(scale.shape)


def _similarity_bwd_cpu(
    grad_NM: Tensor, x_ND: Tensor, y_MD: Tensor, scale: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same in plain PyTorch: an operator's body runs below autograd and cannot call it."""
    wide = launch.accumulate_dtype(torch.promote_types(x_ND.dtype, y_MD.dtype))
    g_NM, wide_x_ND, wide_y_MD = grad_NM.to(wide), x_ND.to(wide), y_MD.to(wide)
    grad_x, grad_y, along = x_ND.new_empty(0), y_MD.new_empty(0), None
    if need_y:
        grad_y, along = normalize_bwd_ref(wide_y_MD, g_NM.T @ normalize_ref(wide_x_ND), scale)
    if need_x or along is None:
        grad_x, along = normalize_bwd_ref(wide_x_ND, g_NM @ normalize_ref(wide_y_MD), scale)
    grad_scale = along.sum().to(scale.dtype).reshape(scale.shape)
    return grad_x.to(x_ND.dtype), grad_y.to(y_MD.dtype), grad_scale


@torch.library.custom_op("clipcore::similarity_fwd", mutates_args=())
def _similarity_fwd(x_ND: Tensor, y_MD: Tensor, scale: Tensor) -> Tensor:
    if x_ND.is_cuda:
        with launch.on_device(x_ND.device):
            return _similarity_fwd_triton(x_ND, y_MD, scale)
    dtype = torch.promote_types(x_ND.dtype, y_MD.dtype)
    wide = launch.accumulate_dtype(dtype)
    # The scale goes to the N x D side: another pass over N x M would cost a third of the product.
    scaled_ND = normalize_ref(x_ND.to(wide)) * scale.to(wide).reshape(())
    return (scaled_ND @ normalize_ref(y_MD.to(wide)).T).to(dtype)


@_similarity_fwd.register_fake
def _(x_ND: Tensor, y_MD: Tensor, scale: Tensor) -> Tensor:
    dtype = torch.promote_types(x_ND.dtype, y_MD.dtype)
    return x_ND.new_empty((x_ND.shape[0], y_MD.shape[0]), dtype=dtype)


@torch.library.custom_op("clipcore::similarity_bwd", mutates_args=())
def _similarity_bwd(
    grad_NM: Tensor, x_ND: Tensor, y_MD: Tensor, scale: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if x_ND.is_cuda:
        with launch.on_device(x_ND.device):
            return _similarity_bwd_triton(grad_NM, x_ND, y_MD, scale, need_x, need_y)
    return _similarity_bwd_cpu(grad_NM, x_ND, y_MD, scale, need_x, need_y)


@_similarity_bwd.register_fake
def _(
    grad_NM: Tensor, x_ND: Tensor, y_MD: Tensor, scale: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x_ND.new_empty(x_ND.shape if need_x or not need_y else (0,))
    grad_y = y_MD.new_empty(y_MD.shape if need_y else (0,))
    return grad_x, grad_y, scale.new_empty(scale.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    launch.check_first_order("normalized_similarity")
    x_ND, y_MD, scale = ctx.saved_tensors
    need_x, need_y, need_scale = ctx.needs_input_grad
    grad_x, grad_y, grad_scale = _similarity_bwd(grad_NM, x_ND, y_MD, scale, need_x, need_y)
    return (
        grad_x if need_x else None,
        grad_y if need_y else None,
        grad_scale if need_scale else None,
    )


_similarity_fwd.register_autograd(_backward, setup_context=_setup_context)
launch.register_autocast("similarity_fwd", num_operands=2)
launch.register_autocast("similarity_bwd", num_operands=0)


def normalized_similarity(x_ND: Tensor, y_MD: Tensor, scale: Tensor | float) -> Tensor:
    """Return the cosine similarity of each row of x with each row of y, times scale.

    Triton on CUDA, PyTorch on the CPU; float32 inside (float64 for float64 on the CPU). Differentiable once in x, y
    and scale. A row shorter than 1e-12 (a row of zeros) has similarity 0 and gradient 0. Under autocast x and y
    take the autocast dtype, as for a matrix product; scale keeps its own.

    Args:
        x_ND: [N, D] float16, bfloat16 or float32 (float64 on the CPU), D at most 8192 on CUDA; N may be 0.
        y_MD: [M, D], same device; mixed dtypes are promoted.
        scale: a number, or a floating-point tensor with one element on the same device (exp of CLIP's logit_scale).

    Returns:
        [N, M] in the promoted dtype of x and y.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    >>> import torch
    >>> normalized_similarity(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]]), 10.0)
    tensor([[6.]])
    """
    check_rows(x_ND, y_MD)
    scale = launch.as_scalar("scale", scale, x_ND, y_MD)
    return torch.ops.clipcore.similarity_fwd(x_ND, y_MD, scale)
