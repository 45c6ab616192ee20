"""GELU and QuickGELU, the activations of CLIP's MLPs, and the column sums of their gradient in the same pass.

y = x g(x),    dx = dy (g(x) + x g'(x)),    dx_sum_f = sum_n dx_nf
``erf``:   g = Phi(x), the normal distribution's (Hendrycks and Gimpel 2016);
``tanh``:  g = sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), the same paper's approximation;
``quick``: g = sigmoid(1.702 x), which OpenAI's weights were trained with.
dx_sum is the gradient of the preceding linear layer's bias. A pass of its own would read dx once more.

Legend: N rows, F width of the MLP. Precision: loads any dtype, computes in float32, stores the input's; dx_sum float32
(float64 for float64, by torch). Traffic for b-byte elements: 2 N F b forward, 3 N F b backward and N F b more for y.
Bound by memory, if g takes few instructions: Phi is a polynomial times exp(-x^2 / 2), in place of erf's two branches; the
derivative needs that exponential in any case.
Determinism: one program owns a strip of rows and columns; its sums of columns are added in the order of the programs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels import launch
from clipcore.kernels.launch import tl, triton

KINDS = ("erf", "tanh", "quick")
QUICK_GELU_SLOPE = 1.702
SQRT_2_OVER_PI = 0.7978845608028654
CUBIC = 0.044715


def gelu_ref(x: Tensor, kind: str = "erf") -> Tensor:
    """Return the activation by its definition, term by term. This is the reference."""
    if kind == "quick":
        return x * torch.sigmoid(QUICK_GELU_SLOPE * x)
    if kind == "tanh":
        return x * 0.5 * (1 + torch.tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x)))
    return x * 0.5 * (1 + torch.erf(x * 0.5**0.5))


# Triton.


@triton.jit
def _gate(x, KIND: tl.constexpr):
    """Return g(x) and x g'(x) of float32 x."""
    if KIND == "erf":
        # Phi(-|x|) = t P(t) exp(-x^2 / 2) with t = 1 / (1 + 0.36 |x|): P has the least maximum error, 6e-8 of Phi.
        t = 1.0 / (1.0 + 0.36 * tl.abs(x))
        poly = 0.04218040406703949 * t - 0.16096250712871552
        poly = poly * t + 0.15222041308879852
        poly = poly * t + 0.048505015671253204
        poly = poly * t + 0.13107450306415558
        poly = poly * t + 0.14336803555488586
        poly = poly * t + 0.14361420273780823
        bell = tl.exp2(x * x * -0.7213475204444817)
        tail = poly * t * bell
        gate = tl.where(x > 0, 1.0 - tail, tail)
        slope = x * bell * 0.3989422804014327
    else:
        if KIND == "quick":
            u = 1.702 * x
            du = 1.702 * x
        else:
            cube = 0.044715 * x * x * x
            u = 1.5957691216057308 * (x + cube)
            du = 1.5957691216057308 * (x + 3.0 * cube)
        # From exp(-|u|), so that 1 - sigmoid(u) is as accurate as sigmoid(u).
        t = tl.exp2(tl.abs(u) * -1.4426950408889634)
        over = 1.0 / (1.0 + t)
        gate = tl.where(u > 0, 1.0, t) * over
        slope = du * t * over * over
    return gate, slope


@triton.jit
def _gelu_fwd_kernel(x_ptr, y_ptr, num_elements, KIND: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_elements
    x = tl.load(x_ptr + i, mask=mask, other=0.0).to(tl.float32)
    gate, _ = _gate(x, KIND)
    tl.store(y_ptr + i, (x * gate).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_bwd_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    y_ptr,
    partial_ptr,
    N,
    F,
    rows_per_program,
    KIND: tl.constexpr,
    COLUMN_SUM: tl.constexpr,
    OUTPUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    # Columns first: programs that run side by side read rows from end to end.
    group = tl.program_id(1)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    column_sum = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    for first in range(0, rows_per_program, BLOCK_N):
        n = group.to(tl.int64) * rows_per_program + first + tl.arange(0, BLOCK_N)
        mask = (n[:, None] < N) & (f[None, :] < F)
        offsets = n[:, None] * F + f[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        gate, slope = _gate(x, KIND)
        dx = dy * (gate + slope)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if OUTPUT:
            tl.store(y_ptr + offsets, (x * gate).to(y_ptr.dtype.element_ty), mask=mask)
        if COLUMN_SUM:
            column_sum += dx
    if COLUMN_SUM:
        tl.store(partial_ptr + group.to(tl.int64) * F + f, tl.sum(column_sum, axis=0), mask=f < F)


# BLOCK, num_warps of the forward pass; BLOCK_N, BLOCK_F, num_warps and programs a processor of the backward pass. The
# same for every kind, dtype and chip: 16 elements a thread are four 16-byte loads of float32 and two of 16-bit rows.
_FORWARD_LAUNCH = (2048, 4)
_BACKWARD_LAUNCH = (4, 512, 4, 6)


def gelu_forward_triton(x_NF: Tensor, kind: str) -> Tensor:
    """Launch `gelu_forward` on the device of x."""
    x_NF = x_NF.contiguous()
    y_NF = torch.empty_like(x_NF)
    block, num_warps = _FORWARD_LAUNCH
    if x_NF.numel() > 0:
        _gelu_fwd_kernel[(triton.cdiv(x_NF.numel(), block),)](
            x_ptr=x_NF,
            y_ptr=y_NF,
            num_elements=x_NF.numel(),
            KIND=kind,
            BLOCK=block,
            num_warps=num_warps,
        )
    return y_NF


def gelu_backward_triton(
    dy_NF: Tensor, x_NF: Tensor, kind: str, want_column_sum: bool, want_output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `gelu_backward` on the device of x."""
    dy_NF, x_NF = dy_NF.contiguous(), x_NF.contiguous()
    N, F = x_NF.shape
    dx_NF = torch.empty_like(x_NF)
    y_NF = torch.empty_like(x_NF) if want_output else x_NF.new_empty(0)
    if x_NF.numel() == 0:
        sums = x_NF.new_zeros(F if want_column_sum else 0, dtype=torch.float32)
        return dx_NF, sums, y_NF
    block_n, block_f, num_warps, programs = _BACKWARD_LAUNCH
    columns = triton.cdiv(F, block_f)
    wanted_groups = triton.cdiv(
        launch.NUM_PROCESSORS[launch.architecture(x_NF.device)] * programs, columns
    )
    rows = block_n * triton.cdiv(N, block_n * wanted_groups)
    groups = triton.cdiv(N, rows)
    partial = x_NF.new_empty((groups, F) if want_column_sum else 0, dtype=torch.float32)
    _gelu_bwd_kernel[(columns, groups)](
        dy_ptr=dy_NF,
        x_ptr=x_NF,
        dx_ptr=dx_NF,
        y_ptr=y_NF,
        partial_ptr=partial,
        N=N,
        F=F,
        rows_per_program=rows,
        KIND=kind,
        COLUMN_SUM=want_column_sum,
        OUTPUT=want_output,
        BLOCK_N=block_n,
        BLOCK_F=block_f,
        num_warps=num_warps,
    )
    return dx_NF, partial.sum(0) if want_column_sum else partial, y_NF


# By torch: the CPU, and float64.


def _approximate(kind: str) -> str:
    return "tanh" if kind == "tanh" else "none"


def gelu_forward_cpu(x_NF: Tensor, kind: str) -> Tensor:
    """Compute `gelu_forward` by torch's kernels. QuickGELU is silu(1.702 x) / 1.702, in place: new memory costs most."""
    y_NF = x_NF.new_empty(x_NF.shape)
    if kind != "quick":
        return torch.ops.aten.gelu.out(x_NF, approximate=_approximate(kind), out=y_NF)
    torch.mul(x_NF, QUICK_GELU_SLOPE, out=y_NF)
    return F.silu(y_NF, inplace=True).mul_(1 / QUICK_GELU_SLOPE)


def gelu_backward_cpu(
    dy_NF: Tensor, x_NF: Tensor, kind: str, want_column_sum: bool, want_output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `gelu_backward` by torch's kernels."""
    dx_NF = x_NF.new_empty(x_NF.shape)
    if kind == "quick":
        torch.mul(x_NF, QUICK_GELU_SLOPE, out=dx_NF)
        torch.ops.aten.silu_backward.grad_input(dy_NF, dx_NF, grad_input=dx_NF)
    else:
        torch.ops.aten.gelu_backward.grad_input(
            dy_NF, x_NF, approximate=_approximate(kind), grad_input=dx_NF
        )
    sum_F = launch.column_sum(dx_NF) if want_column_sum else dx_NF.new_empty(0, dtype=_wide(x_NF))
    return dx_NF, sum_F, gelu_forward_cpu(x_NF, kind) if want_output else x_NF.new_empty(0)


def _wide(x_NF: Tensor) -> torch.dtype:
    return launch.accumulate_dtype(x_NF.dtype)


# The passes and their operators.


def gelu_forward(x_NF: Tensor, kind: str) -> Tensor:
    """Return the activation y of every element of a matrix, contiguous; not differentiable."""
    if not launch.in_triton(x_NF):
        return gelu_forward_cpu(x_NF, kind)
    with launch.on_device(x_NF.device):
        return gelu_forward_triton(x_NF, kind)


def gelu_backward(
    dy_NF: Tensor, x_NF: Tensor, kind: str, want_column_sum: bool, want_output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradient of x from that of y, its sum over rows, and y again, in one pass.

    Returns:
        dx_NF; dx_sum_F, float32 (float64 for float64); y_NF. An unwanted result is an empty tensor.
    """
    if not launch.in_triton(x_NF):
        return gelu_backward_cpu(dy_NF, x_NF, kind, want_column_sum, want_output)
    with launch.on_device(x_NF.device):
        return gelu_backward_triton(dy_NF, x_NF, kind, want_column_sum, want_output)


_forward_op = torch.library.custom_op("clipcore::gelu_forward", gelu_forward, mutates_args=())
_backward_op = torch.library.custom_op("clipcore::gelu_backward", gelu_backward, mutates_args=())


@_forward_op.register_fake
def _(x_NF: Tensor, kind: str) -> Tensor:
    return x_NF.new_empty(x_NF.shape)


@_backward_op.register_fake
def _(
    dy_NF: Tensor, x_NF: Tensor, kind: str, want_column_sum: bool, want_output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = launch.accumulate_dtype(x_NF.dtype)
    return (
        x_NF.new_empty(x_NF.shape),
        x_NF.new_empty(x_NF.shape[1] if want_column_sum else 0, dtype=wide),
        x_NF.new_empty(x_NF.shape if want_output else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    x_NF, ctx.kind = inputs
    ctx.save_for_backward(x_NF)


def _backward(ctx: Any, dy_NF: Tensor) -> tuple[Tensor, None]:
    launch.check_first_order("gelu")
    (x_NF,) = ctx.saved_tensors
    dx_NF, _, _ = torch.ops.clipcore.gelu_backward(dy_NF, x_NF, ctx.kind, False, False)
    return dx_NF, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
launch.register_autocast("gelu_forward", num_operands=0)
launch.register_autocast("gelu_backward", num_operands=0)


def gelu(x: Tensor, kind: str = "erf") -> Tensor:
    """Return the activation of every element of ``x``, of any shape; differentiable once.

    Args:
        x: float32, bfloat16, float16 or float64.
        kind: ``erf`` for GELU, ``tanh`` for its approximation, ``quick`` for QuickGELU.

    Raises:
        ValueError: the kind is none of these.

    >>> gelu(torch.zeros(2))
    tensor([0., 0.])
    """
    if kind not in KINDS:
        raise ValueError(f"the kinds of GELU are {', '.join(KINDS)}, got {kind!r}")
    if launch.is_portable():
        # A trace may be run where clipcore is not installed, so it holds operators of torch alone.
        return gelu_ref(x, kind) if kind == "quick" else F.gelu(x, approximate=_approximate(kind))
    rows = x.flatten(0, -2) if x.dim() > 1 else x.reshape(1, -1)
    return torch.ops.clipcore.gelu_forward(rows, kind).reshape(x.shape)
