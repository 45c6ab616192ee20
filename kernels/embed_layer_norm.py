"""The entry of a Vision Transformer: LayerNorm of class token and patches plus positions, in one pass each way.

x = cat(class, patches) + position, rounded to the dtype of the patches;    y = LayerNorm(x)
dpatches = dx without the class token's row,    dposition_l = sum_b dx_bl,    dclass = dposition_0

x is never stored on a GPU: the backward pass computes the sum again. Positions need no pass of their own, because a
program of `layer_norm_triton.py` walks over the images of one token.

Legend: B images, P patches, L = P + 1 tokens, D width, N = B L. Precision: as layer_norm.py. Traffic for b-byte
elements: 2 N D b forward, 3 N D b backward. Bound by memory. Determinism: as layer_norm.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.layer_norm import (
    backward_cpu,
    check,
    layer_norm_ref,
    normalize_cpu,
    operator,
    strips,
    wide_like,
)
from clipcore.kernels.layer_norm_triton import backward_triton, forward_triton


def embed_layer_norm_ref(
    patches_BPD: Tensor,
    class_D: Tensor,
    position_LD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """Return LayerNorm of class token and patches plus positions, summed in the patches' dtype. The reference."""
    class_B1D = class_D.to(patches_BPD.dtype).expand(patches_BPD.shape[0], 1, -1)
    x_BLD = torch.cat([class_B1D, patches_BPD], 1) + position_LD.to(patches_BPD.dtype)
    return layer_norm_ref(x_BLD, weight_D, bias_D, eps)


# By torch: the CPU, and float64.


def _embed_cpu(patches_BPD: Tensor, class_D: Tensor, position_LD: Tensor) -> Tensor:
    """Return x_BLD, written once."""
    B, P, D = patches_BPD.shape
    class_D, position_LD = class_D.to(patches_BPD.dtype), position_LD.to(patches_BPD.dtype)
    x_BLD = patches_BPD.new_empty((B, P + 1, D))
    x_BLD[:, 0] = class_D + position_LD[0]
    torch.add(patches_BPD, position_LD[1:], out=x_BLD[:, 1:])
    return x_BLD


# The passes and their operators.


def embed_layer_norm_forward(
    patches_BPD: Tensor,
    class_D: Tensor,
    position_LD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y_BLD, mean_N, rstd_N) of the N = B L tokens: class token and patches, plus positions, normalised."""
    if not launch.in_triton(patches_BPD):
        x_BLD = _embed_cpu(patches_BPD, class_D, position_LD)
        return normalize_cpu(x_BLD, weight_D, bias_D, eps)
    with launch.on_device(patches_BPD.device):
        tokens = class_D, position_LD
        return forward_triton(patches_BPD, weight_D, bias_D, eps, tokens=tokens)[1:]


def embed_layer_norm_backward(
    dy_BLD: Tensor,
    patches_BPD: Tensor,
    class_D: Tensor,
    position_LD: Tensor,
    mean_N: Tensor,
    rstd_N: Tensor,
    weight_D: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dpatches_BPD, dweight_D, dbias_D, dposition_LD); the class token's gradient is dposition[0]."""
    if launch.in_triton(patches_BPD):
        with launch.on_device(patches_BPD.device):
            return backward_triton(
                *(dy_BLD, patches_BPD, mean_N, rstd_N, weight_D),
                tokens=(class_D, position_LD),
                want_column_sum=True,
            )
    B, L, D = dy_BLD.shape
    dpatches_BPD = patches_BPD.new_empty(patches_BPD.shape)
    dposition_LD = dy_BLD.new_zeros((L, D), dtype=torch.float64)
    dweight_D, dbias_D = (dy_BLD.new_zeros(D, dtype=torch.float64) for _ in range(2))
    for images in strips(B, L * D):
        x_BLD = _embed_cpu(patches_BPD[images], class_D, position_LD)
        rows = slice(images.start * L, images.stop * L)
        dx_ND, dweight, dbias = backward_cpu(
            *(dy_BLD[images].flatten(0, 1), x_BLD.flatten(0, 1)),
            *(mean_N[rows], rstd_N[rows], weight_D),
        )
        dx_BLD = dx_ND.view(-1, L, D)
        dpatches_BPD[images] = dx_BLD[:, 1:]
        dposition_LD += dx_BLD.sum(0)
        dweight_D += dweight
        dbias_D += dbias
    wide = mean_N.dtype
    return dpatches_BPD, dweight_D.to(wide), dbias_D.to(wide), dposition_LD.to(wide)


_forward_op = operator(embed_layer_norm_forward)
_backward_op = operator(embed_layer_norm_backward)


@_forward_op.register_fake
def _(
    patches_BPD: Tensor,
    class_D: Tensor,
    position_LD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    B, P, D = patches_BPD.shape
    N = B * (P + 1)
    return patches_BPD.new_empty(B, P + 1, D), *wide_like(patches_BPD, (N,), (N,))


@_backward_op.register_fake
def _(
    dy_BLD: Tensor,
    patches_BPD: Tensor,
    class_D: Tensor,
    position_LD: Tensor,
    mean_N: Tensor,
    rstd_N: Tensor,
    weight_D: Tensor,
) -> tuple[Tensor, ...]:
    shapes = weight_D.shape, weight_D.shape, position_LD.shape
    return patches_BPD.new_empty(patches_BPD.shape), *wide_like(patches_BPD, *shapes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    patches_BPD, class_D, position_LD, weight_D, bias_D, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(patches_BPD, class_D, position_LD, *output[1:], weight_D)
    ctx.bias_dtype = bias_D.dtype


def _backward(ctx: Any, dy_BLD: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    launch.check_first_order("embed_layer_norm")
    if dy_BLD is None:
        return None, None, None, None, None, None
    patches_BPD, class_D, position_LD, mean_N, rstd_N, weight_D = ctx.saved_tensors
    dpatches_BPD, dweight_D, dbias_D, dposition_LD = torch.ops.clipcore.embed_layer_norm_backward(
        dy_BLD, patches_BPD, class_D, position_LD, mean_N, rstd_N, weight_D
    )
    return (
        dpatches_BPD,
        dposition_LD[0].to(class_D.dtype, copy=True),
        dposition_LD.to(position_LD.dtype),
        dweight_D.to(weight_D.dtype),
        dbias_D.to(ctx.bias_dtype),
        None,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def embed_layer_norm(
    patches_BPD: Tensor,
    class_D: Tensor,
    position_LD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """Return the tokens [B, P + 1, D] that enter a Vision Transformer: class token, patches, plus positions, normalised.

    Args:
        patches_BPD: the embedded patches; the sum and the result have their dtype.
        class_D, position_LD: the class token and the L = P + 1 positions, of any floating dtype.

    Raises:
        ValueError: shapes do not fit; on a GPU, D above 2048.

    Differentiable once in every tensor. Source: Radford et al. 2021, section 2.4.

    >>> patches, token, position = torch.randn(2, 4, 8), torch.randn(8), torch.randn(5, 8)
    >>> embed_layer_norm(patches, token, position, torch.ones(8), torch.zeros(8)).shape
    torch.Size([2, 5, 8])
    """
    if (
        patches_BPD.dim() != 3
        or class_D.shape != patches_BPD.shape[2:]
        or position_LD.shape != (patches_BPD.shape[1] + 1, patches_BPD.shape[2])
    ):
        raise ValueError(
            "expected patches [B, P, D], class [D] and position [P + 1, D], got "
            f"{tuple(patches_BPD.shape)}, {tuple(class_D.shape)} and {tuple(position_LD.shape)}"
        )
    check(patches_BPD, weight_D, bias_D)
    return torch.ops.clipcore.embed_layer_norm_forward(
        patches_BPD, class_D, position_LD, weight_D, bias_D, eps
    )[0]
