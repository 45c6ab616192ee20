"""Layer normalisation over the last axis, in one pass with the sum before it and the gradients that join it.

x_hat = (x - mean(x)) / sqrt(var(x) + eps),    y = x_hat w + b
dx = rstd (g - mean(g) - x_hat mean(g x_hat)) + dstream,  g = dy w;    dw = sum_n dy x_hat,    db = sum_n dy

Forward, x may be a sum: the residual stream and a block's output, or the tokens of an image and their positions. The sum
is rounded to its dtype first, so that the stored stream is the one that was normalised. Backward, dstream is the gradient
that reaches x by the residual connection. The sum of dx over rows is the gradient of a bias: that of the linear layer
whose output was added to the stream. It costs no pass of its own.

Legend: N rows, D width, B images, P patches, L = P + 1 tokens. Precision: statistics, sums over rows and everything in
registers are float32 whatever the dtype of x (float64 for float64, by torch); y and dx have the dtype of x, as in CLIP's
own LayerNorm; weight and bias may have another. Traffic for b-byte elements: 2 N D b forward, 4 N D b with a sum;
3 N D b backward, 4 N D b with dstream. Bound by memory.
Determinism: no atomics; sums over rows are added in a fixed order.

On the CPU the passes are torch's own. Its backward pass sums the gradients of 16-bit weights in 16 bits, which after
6,400 rows is wrong by a third of their size. So 16-bit rows go through it as float32, in strips that the cache holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.layer_norm_triton import MAX_WIDTH, backward_triton, forward_triton

# torch adds up a thread's rows one after the other. After some hundreds the float32 sum has several times the error of a
# pairwise sum. torch sums at most this many rows, and their sums are added in float64.
SUMMED_ROWS = 128


def layer_norm_ref(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute LayerNorm by its definition, term by term. This is the reference."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    centred = x.to(dtype) - x.to(dtype).mean(-1, keepdim=True)
    scaled = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (scaled * weight_D.to(dtype) + bias_D.to(dtype)).to(x.dtype)


# By torch: the CPU, and float64.


def normalize_cpu(
    x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, mean_N, rstd_N). With float32 weights torch computes float32 statistics of 16-bit rows."""
    wide = launch.accumulate_dtype(x.dtype)
    y, mean, rstd = torch.native_layer_norm(
        x.contiguous(), x.shape[-1:], weight_D.to(wide), bias_D.to(wide), eps
    )
    return y, mean.flatten(), rstd.flatten()


def backward_cpu(
    dy_ND: Tensor,
    x_ND: Tensor,
    mean_N: Tensor,
    rstd_N: Tensor,
    weight_D: Tensor,
    dstream_ND: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx_ND, dweight_D, dbias_D), all in the wide dtype of the statistics."""
    wide = mean_N.dtype
    weight_D = weight_D.to(wide)
    dx_ND, dweight_D, dbias_D = torch.ops.aten.native_layer_norm_backward(
        *(dy_ND.to(wide), x_ND.to(wide), weight_D.shape),
        *(mean_N[:, None], rstd_N[:, None], weight_D, weight_D, [True, True, True]),
    )
    return dx_ND if dstream_ND is None else dx_ND.add_(dstream_ND), dweight_D, dbias_D


def strips(num_rows: int, row_elements: int) -> list[slice]:
    """Split the rows into strips that the cache holds."""
    rows = max(1, launch.STRIP_ELEMENTS // max(1, row_elements))
    return [slice(first, min(first + rows, num_rows)) for first in range(0, num_rows, rows)]


# The passes.


def layer_norm_forward(
    x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y_ND, mean_N, rstd_N) of the rows of a matrix; `layer_norm_backward` takes the statistics."""
    if not launch.in_triton(x_ND):
        return normalize_cpu(x_ND, weight_D, bias_D, eps)
    with launch.on_device(x_ND.device):
        return forward_triton(x_ND, weight_D, bias_D, eps)[1:]


def add_layer_norm_forward(
    x_ND: Tensor, delta_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (stream_ND, y_ND, mean_N, rstd_N): stream = x + delta in the dtype of x, then `layer_norm_forward` of it."""
    if not launch.in_triton(x_ND):
        stream_ND = torch.add(x_ND, delta_ND, out=x_ND.new_empty(x_ND.shape))
        return stream_ND, *normalize_cpu(stream_ND, weight_D, bias_D, eps)
    with launch.on_device(x_ND.device):
        return forward_triton(x_ND, weight_D, bias_D, eps, delta_ND=delta_ND)


def layer_norm_apply(
    x_ND: Tensor, mean_N: Tensor, rstd_N: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> Tensor:
    """Compute y_ND again, with the forward pass's bits, or on a GPU to the last place; eps is that pass's.

    A GPU reads the statistics. On the CPU torch has no such pass; computing them again is as fast there.
    """
    if not launch.in_triton(x_ND):
        return normalize_cpu(x_ND, weight_D, bias_D, eps)[0]
    with launch.on_device(x_ND.device):
        return forward_triton(x_ND, weight_D, bias_D, eps, statistics=(mean_N, rstd_N))[1]


def layer_norm_backward(
    dy_ND: Tensor,
    x_ND: Tensor,
    mean_N: Tensor,
    rstd_N: Tensor,
    weight_D: Tensor,
    dstream_ND: Tensor | None,
    want_column_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dx_ND, dweight_D, dbias_D, dx_sum_D): the gradients from dy, and the sum of dx over rows.

    dx includes dstream. x is the normalised input: the stream, if a delta was added. The vectors are float32 (float64 for
    float64); dx_sum is empty unless it is wanted.
    """
    if launch.in_triton(x_ND):
        with launch.on_device(x_ND.device):
            dx_ND, dweight_D, dbias_D, dx_sum = backward_triton(
                *(dy_ND, x_ND, mean_N, rstd_N, weight_D),
                dstream_ND=dstream_ND,
                want_column_sum=want_column_sum,
            )
            return dx_ND, dweight_D, dbias_D, dx_sum.flatten()
    if x_ND.dtype == mean_N.dtype:
        grads = backward_cpu(dy_ND, x_ND, mean_N, rstd_N, weight_D, dstream_ND)
        return *grads, grads[0].sum(0) if want_column_sum else mean_N.new_empty(0)
    dx_ND = x_ND.new_empty(x_ND.shape)
    # The sums of strips are added in float64, at no measurable cost.
    sums_3D = x_ND.new_zeros((3, x_ND.shape[1]), dtype=torch.float64)
    for rows in strips(len(x_ND), max(x_ND.shape[1], launch.STRIP_ELEMENTS // SUMMED_ROWS)):
        dx, dweight, dbias = backward_cpu(
            *(dy_ND[rows], x_ND[rows], mean_N[rows], rstd_N[rows], weight_D),
            None if dstream_ND is None else dstream_ND[rows],
        )
        dx_ND[rows] = dx
        sums_3D[0] += dweight
        sums_3D[1] += dbias
        if want_column_sum:
            sums_3D[2] += dx.sum(0)
    dweight_D, dbias_D, dx_sum_D = (part.to(mean_N.dtype) for part in sums_3D)
    return dx_ND, dweight_D, dbias_D, dx_sum_D if want_column_sum else mean_N.new_empty(0)


# Their operators.


def operator(fn: Callable[..., Any]) -> Any:
    """Register fn as the operator `clipcore::<name of fn>` and return it; autocast is off inside."""
    op = torch.library.custom_op(f"clipcore::{fn.__name__}", fn, mutates_args=())
    launch.register_autocast(fn.__name__, num_operands=0)
    return op


_forward_op = operator(layer_norm_forward)
_add_forward_op = operator(add_layer_norm_forward)
_apply_op = operator(layer_norm_apply)
_backward_op = operator(layer_norm_backward)


def wide_like(x: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Return uninitialised wide tensors of these shapes on the device of x."""
    wide = launch.accumulate_dtype(x.dtype)
    return [x.new_empty(shape, dtype=wide) for shape in shapes]


@_forward_op.register_fake
def _(x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, ...]:
    return x_ND.new_empty(x_ND.shape), *wide_like(x_ND, x_ND.shape[:1], x_ND.shape[:1])


@_add_forward_op.register_fake
def _(
    x_ND: Tensor, delta_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, ...]:
    stream_ND, y_ND = (x_ND.new_empty(x_ND.shape) for _ in range(2))
    return stream_ND, y_ND, *wide_like(x_ND, x_ND.shape[:1], x_ND.shape[:1])


@_apply_op.register_fake
def _(
    x_ND: Tensor, mean_N: Tensor, rstd_N: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> Tensor:
    return x_ND.new_empty(x_ND.shape)


@_backward_op.register_fake
def _(
    dy_ND: Tensor,
    x_ND: Tensor,
    mean_N: Tensor,
    rstd_N: Tensor,
    weight_D: Tensor,
    dstream_ND: Tensor | None,
    want_column_sum: bool,
) -> tuple[Tensor, ...]:
    sum_shape = weight_D.shape if want_column_sum else (0,)
    return x_ND.new_empty(x_ND.shape), *wide_like(x_ND, weight_D.shape, weight_D.shape, sum_shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_ND, weight_D, ctx.bias_dtype = inputs[0], inputs[1], inputs[2].dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_ND, *output[1:], weight_D)


def _backward(ctx: Any, dy_ND: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    launch.check_first_order("layer_norm")
    if dy_ND is None:
        return None, None, None, None
    # Unpacked once: activation checkpointing forbids a second time.
    *saved, weight_D = ctx.saved_tensors
    dx_ND, dweight_D, dbias_D, _ = torch.ops.clipcore.layer_norm_backward(
        dy_ND, *saved, weight_D, None, False
    )
    return dx_ND, dweight_D.to(weight_D.dtype), dbias_D.to(ctx.bias_dtype), None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


# The public functions.


def check(x: Tensor, weight_D: Tensor, bias_D: Tensor) -> None:
    width = x.shape[-1:]
    if weight_D.shape != width or bias_D.shape != width:
        raise ValueError(
            f"weight and bias must be {list(width)} for x {tuple(x.shape)}, "
            f"got {tuple(weight_D.shape)} and {tuple(bias_D.shape)}"
        )
    if launch.in_triton(x) and x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"D = {x.shape[-1]} is wider than the {MAX_WIDTH} that the kernels hold")


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise the last axis of ``x`` [..., D]; weight and bias are [D], of any floating dtype. Differentiable once.

    Raises:
        ValueError: the weight or the bias does not fit the last axis; on a GPU, D above 2048.

    >>> layer_norm(torch.randn(2, 8), torch.ones(8), torch.zeros(8)).shape
    torch.Size([2, 8])
    """
    check(x, weight_D, bias_D)
    if launch.is_portable():
        # A trace may be run where clipcore is not installed, so it holds operators of torch alone.
        return layer_norm_ref(x, weight_D, bias_D, eps)
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    y_ND, _, _ = torch.ops.clipcore.layer_norm_forward(rows, weight_D, bias_D, eps)
    return y_ND.view(x.shape)
