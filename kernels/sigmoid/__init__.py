"""The sigmoid loss of SigLIP: loss and all gradients in one pass over the logits, in bounded memory, without atomics.

Legend: B image rows (of this rank), G text rows (of all), E embedding size, R and C rows and columns of a block.

    z_bg   = scale * <x_b, y_g> + bias           x, y = image and text rows, over their lengths if asked
    s_bg   = -1 for a pair, +1 for all others: each logit is a question of its own
    loss   = 1/B sum_bg log(1 + exp(s_bg z_bg))
    dz_bg  = s_bg sigmoid(s_bg z_bg) / B
    dx     = scale dz y,   dy = scale dz^T x,   dscale = sum_bg dz_bg <x_b, y_g>,   dbias = sum_bg dz_bg

The loss needs no sum over a row before its gradient is known. So the forward computes the gradients of the sum beside
it, 3 products (6 B G E FLOP), and saves them in float32; the backward multiplies them with what comes from upstream.
Where no gradient is asked for it is one product.

With t = exp(-|z|): log(1 + exp(z)) = max(z, 0) + log(1 + t) and sigmoid(z) is 1 or t over 1 + t, so that one
exponential and one reciprocal an element serve both. At SigLIP's first bias of -10 all but the pairs have t = 4.5e-5,
where the float32 number 1 + t has lost half the digits of t: log(1 + t) is t times a polynomial on GPUs (degree 10,
relative error 2e-8 before rounding, no logarithm) and torch.log1p on the CPU. Rows of negatives that are all far from
their margin (t below 1/32) take two cubics instead and no division: nearly all rows at that bias, fewer later in training.

Precision: ``clipcore.kernels.logits``. Gradients of a block are times 2^15 in float16: sigmoids down to 2e-9 are normal
numbers. Sums of a tile or strip are float32, those of all float64.
Traffic per logit: library engine 4 bytes written by the product, 6 by the pass, 4 read by the products (16-bit
operands); fused engine 2 and 4. Roofline: 3 products at their library's rate; the pass is bound by memory.
Determinism: no atomics; partial sums are written and added in a fixed order.

Files: ``reference.py`` the reference, ``kernels.py`` the Triton kernels, ``factor_kernels.py`` that of what it reads of
scale and bias, ``launches.py`` its launch, ``gpu.py`` and ``cpu.py`` the walks, ``operator.py`` PyTorch's side, and here
the public function. A loss of another kind begins as a copy of this folder (kernels/README.md).

Source: Zhai et al. 2023 (arXiv 2303.15343), algorithm 1; open_clip's SigLipLoss for the division by B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.logits.pairs import Pairs, check_no_tangent, checked_inputs
from clipcore.kernels.sigmoid.operator import sigmoid_sum
from clipcore.kernels.sigmoid.reference import sigmoid_ref

__all__ = ["sigmoid_loss", "sigmoid_ref"]


def sigmoid_loss(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    normalize: bool = True,
    first_label: int = 0,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same_id: str = "ignore",
    workspace_bytes: int | None = None,
    operand_dtype: torch.dtype | None = None,
    engine: str | None = None,
) -> Tensor:
    """Return SigLIP's loss of images and texts without the B x G matrix: the sum over all pairs of rows, divided by B.

    Image row b and text row `first_label + b` are a pair, all others are negatives. Any `first_label` is allowed: texts
    of another rank may have no pair here, and the losses of an image's parts then add up. Differentiable once in both
    embeddings, scale and bias; the gradients are computed with the loss (module docstring).

    Args:
        image_BE: [B, E] float16, bfloat16 or float32 (float64 on the CPU), E at most 8192 on CUDA.
        text_GE: [G, E], same device.
        scale: what the cosine is multiplied with: a number or a tensor of one element (exp of the logit_scale).
        bias: what is added to it, likewise.
        normalize: divide rows by their lengths; False takes them as they are, for embeddings of length one. Rows
            shorter than 1e-12 have cosine 0 to everything and gradient 0.
        first_label: column of the first image's pair; may be negative.
        image_ids, text_ids: int64 [B] and [G], both or none. Equal ids mark what belongs together.
        same_id: "ignore" leaves pairs of equal ids out unless they are a pair by position (false negatives);
            "positive" makes them positives, and position means nothing.
        workspace_bytes: what a GPU may hold for a block, its operands and the sum of its rows' gradients, and the CPU
            for a block. Default 512 MB on CUDA, 64 MiB on the CPU. Not in it: gradients of both sides in float32, and
            on the CPU rows of length one.
        operand_dtype: what a GPU multiplies. Default float32 for float32 embeddings outside autocast, else float16.
            The CPU multiplies in float32 (float64 for float64) in any case.
        engine: "library" (default) or "fused" on a GPU (``clipcore.kernels.logits``).

    Returns:
        A scalar, float32 (float64 for float64 on the CPU); 0 where there is no image or no text.

    Raises:
        ValueError: shapes, dtypes, devices or ids do not fit.
        RuntimeError: forward-mode differentiation, which the operation does not have.

    Source: Zhai et al. 2023 (arXiv 2303.15343).

    >>> import torch
    >>> sigmoid_loss(torch.eye(2), torch.eye(2), 10.0, -5.0)
    tensor(0.0134)
    """
    inputs = checked_inputs(
        image_BE,
        text_GE,
        scale,
        Pairs(image_ids, text_ids, first_label, same_id),
        operation="sigmoid_loss",
        normalize=normalize,
        workspace_bytes=workspace_bytes,
        operand_dtype=operand_dtype,
        engine=engine,
    )
    bias = launch.as_scalar("bias", bias, image_BE, text_GE)
    check_no_tangent("sigmoid_loss", bias)
    total = sigmoid_sum(inputs, bias)
    wide = launch.accumulate_dtype(torch.promote_types(image_BE.dtype, text_GE.dtype))
    return (total / max(1, len(image_BE))).to(wide)
