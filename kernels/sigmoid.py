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
relative error 2e-8 before rounding, no logarithm) and torch.log1p on the CPU.

Precision: logits.py. Gradients of a block are times 2^15 in float16: sigmoids down to 2e-9 are normal numbers. Sums of
a tile are float32, those of tiles float64.
Traffic per logit: library engine 4 bytes written by the product, 6 by the pass, 4 read by the products (16-bit
operands); fused engine 2 and 4. Roofline: 3 products at their library's rate; the pass is bound by memory.
Determinism: no atomics; partial sums are written and added in a fixed order.

Source: Zhai et al. 2023 (arXiv 2303.15343), algorithm 1; open_clip's SigLipLoss for the division by B.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels import logits, logits_cpu, logits_triton, tiles
from clipcore.kernels.logits import LOG2E, Pairs
from clipcore.kernels.logits_triton import load_product, multiply, positives, tile_numbers
from clipcore.kernels.normalize import normalize_ref
from clipcore.kernels.tiles import tl, triton

FP16_GRADIENT_SCALE = 2.0**15
# Powers of two of cosine and bias each, for which exp2 of them apart is safe in float32.
SAFE_POWER = 60.0
# Beyond it no float32 logit changes its loss's whole power of two.
LARGEST_POWER = 2.0**60
# Beyond it log(1 + exp(x)) is x in float64 too.
LINEAR = 40.0


class Problem(NamedTuple):
    """The arguments of `sigmoid_loss`, checked."""

    image_BE: Tensor
    text_GE: Tensor
    scale: Tensor
    bias: Tensor
    pairs: Pairs
    normalized: bool
    operand: torch.dtype
    engine: str
    workspace_bytes: int


def sigmoid_ref(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    normalize: bool = False,
    first_label: int = 0,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same_id: str = "ignore",
) -> Tensor:
    """The reference: the loss by the B x G matrix, in the promoted dtype of the embeddings, differentiable."""
    dtype = torch.promote_types(image_BE.dtype, text_GE.dtype)
    x_BE, y_GE = image_BE.to(dtype), text_GE.to(dtype)
    if normalize:
        x_BE, y_GE = normalize_ref(x_BE), normalize_ref(y_GE)
    z_BG = scale * x_BE @ y_GE.T + bias
    positive_BG = torch.zeros_like(z_BG, dtype=torch.bool)
    positive_BG.diagonal(first_label).fill_(True)
    valid_BG = torch.ones_like(positive_BG)
    if image_ids is not None and text_ids is not None:
        same_BG = image_ids[:, None] == text_ids
        if same_id == "positive":
            positive_BG = same_BG
        else:
            valid_BG = positive_BG | ~same_BG
    sign_BG = 2 * positive_BG.to(z_BG.dtype) - 1
    return -F.logsigmoid(sign_BG * z_BG).masked_fill(~valid_BG, 0).sum() / len(x_BE)


# Triton.


@triton.jit
def _log1p_over(t):
    """log(1 + t) / t for t in [0, 1]: the polynomial through the Chebyshev points, by Horner's rule."""
    poly = 0.00198669636 * t - 0.0131878254
    poly = poly * t + 0.0410065711
    poly = poly * t - 0.0818804061
    poly = poly * t + 0.123779956
    poly = poly * t - 0.160876229
    poly = poly * t + 0.198858203
    poly = poly * t - 0.249864965
    poly = poly * t + 0.333324975
    poly = poly * t - 0.499999795
    poly = poly * t + 0.999999999
    return poly


@triton.jit
def _sigmoid_kernel(
    x_desc,
    y_desc,
    product_ptr,
    factor_ptr,
    image_id_ptr,
    text_id_ptr,
    grad_ptr,
    partial_ptr,
    N,
    M,
    D,
    stride_product,
    first_label,
    GRADIENT_SCALE: tl.constexpr,
    GRADIENT: tl.constexpr,
    IDS: tl.constexpr,
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
    # In powers of two. Factor and bias are two floats each: rounding them to one would shift all logits alike.
    low = cosine * tl.load(factor_ptr + 1) + tl.load(factor_ptr + 3)
    power = cosine * tl.load(factor_ptr) + tl.load(factor_ptr + 2) + low
    power = tl.where(positive, -power, power)
    t = tl.exp2(-tl.abs(power))
    loss = tl.maximum(power, 0.0) * 0.6931471805599453 + t * _log1p_over(t)
    loss = tl.where(power == power, loss, power)  # whatever a maximum makes of NaN
    num_tiles = tl.num_programs(0)
    partial_ptr += tl.program_id(0)
    tl.store(partial_ptr, tl.sum(tl.sum(tl.where(valid, loss, 0.0), axis=1), axis=0))
    if GRADIENT:
        probability = tl.where(power > 0, 1.0, t) / (1.0 + t)
        grad = tl.where(valid, tl.where(positive, -probability, probability), 0.0)
        tl.store(partial_ptr + num_tiles, tl.sum(tl.sum(grad * cosine, axis=1), axis=0))
        tl.store(partial_ptr + 2 * num_tiles, tl.sum(tl.sum(grad, axis=1), axis=0))
        offsets = n.to(tl.int64)[:, None] * M + m[None, :]
        stored = (grad * GRADIENT_SCALE).to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + offsets, stored, mask=inside)


# (architecture, kind) -> BLOCK_N, BLOCK_M, BLOCK_D, num_warps, num_stages. "pass" reads a block that the library
# multiplied, "fused" multiplies 16-bit operands itself, "spread" does so with ids, "exact" float32 ones. No row spills.
# Not yet measured. Tiles on sm_100 are small for the reason given in contrastive_triton.py.
_LAUNCH_TABLE = {
    (80, "pass"): (64, 128, 16, 8, 1),
    (80, "fused"): (64, 128, 32, 8, 3),
    (80, "spread"): (64, 128, 32, 8, 3),
    (80, "exact"): (64, 64, 16, 8, 2),
    (90, "pass"): (64, 128, 16, 8, 1),
    (90, "fused"): (64, 128, 64, 8, 3),
    (90, "spread"): (64, 128, 64, 8, 3),
    (90, "exact"): (64, 128, 16, 8, 2),
    (100, "pass"): (64, 128, 16, 8, 1),
    (100, "fused"): (32, 128, 64, 4, 3),
    (100, "spread"): (32, 128, 64, 4, 3),
    (100, "exact"): (64, 128, 16, 8, 2),
}


def _kind(problem: Problem) -> str:
    """The row of the launch table."""
    if problem.engine == "library":
        return "pass"
    if problem.operand == torch.float32:
        return "exact"
    return "fused" if problem.pairs.image_ids is None else "spread"


def _kernel_factors(problem: Problem) -> Tensor:
    """float32 [4]: factor from cosines to powers of two and bias as one, each in two parts."""
    wide = [part.double().reshape(()) * LOG2E for part in (problem.scale, problem.bias)]
    high = [part.float() for part in wide]
    low = [(part - rounded).float() for part, rounded in zip(wide, high, strict=True)]
    return torch.stack((high[0], low[0], high[1], low[1]))


def sigmoid_fwd_triton(
    problem: Problem, backward: bool, need: tuple[bool, bool]
) -> tuple[Tensor, ...]:
    """The outputs of `clipcore::sigmoid_fwd`; a side that nobody needs costs no product."""
    image_BE, text_GE, operand = problem.image_BE, problem.text_GE, problem.operand
    B, G, device = len(image_BE), len(text_GE), image_BE.device
    fused = problem.engine == "fused"
    launch = _LAUNCH_TABLE[tiles.architecture(device), _kind(problem)]
    grad_scale = FP16_GRADIENT_SCALE if operand == torch.float16 else 1.0
    factors = _kernel_factors(problem)
    in_place = not fused and operand == torch.float32  # gradients take the place of the logits
    own_gradient = backward and not in_place
    element_bytes = (0 if fused else 4) + (operand.itemsize if own_gradient else 0)
    side_R, side_C = logits_triton.block_sides(
        *(image_BE.shape[1], max(2, element_bytes), problem.workspace_bytes, operand.itemsize)
    )
    size = min(side_R, B) * min(side_C, G)
    products = torch.empty(0 if fused else size, dtype=torch.float32, device=device)
    grads = torch.empty(size if own_gradient else 0, dtype=operand, device=device)
    if in_place:
        grads = products
    gradients = logits_triton.Gradients(image_BE, text_GE, problem.normalized, need, torch.float32)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    factor = (problem.scale.double().reshape(()) / grad_scale).float()
    for rows in logits.blocks(B, side_R):
        x_RE = logits_triton.operand(image_BE[rows], problem.normalized, operand)
        gradients.begin_rows(rows)
        for columns in logits.blocks(G, side_C):
            y_CE = logits_triton.operand(text_GE[columns], problem.normalized, operand)
            R, C = len(x_RE), len(y_CE)
            product_RC = None
            if not fused:
                product_RC = tiles.matmul_fp32(x_RE, y_CE.T, products[: R * C].view(R, C))
            grad_RC = grads[: R * C].view(R, C) if backward else None
            pairs = problem.pairs.block(rows, columns)
            grid, arguments = logits_triton.tile_arguments(pairs, x_RE, y_CE, launch, fused)
            partial = torch.empty((3 if backward else 1, *grid), dtype=torch.float32, device=device)
            _sigmoid_kernel[grid](
                product_ptr=product_RC,
                factor_ptr=factors,
                grad_ptr=grad_RC,
                partial_ptr=partial,
                stride_product=C,
                GRADIENT_SCALE=grad_scale,
                GRADIENT=backward,
                **arguments,
            )
            sums[: len(partial)] += partial.sum(1, dtype=torch.float64)
            if grad_RC is not None:
                gradients.add(grad_RC, x_RE, y_CE, columns)
        gradients.end_rows(rows, factor)
    loss, d_scale, d_bias = (part.clone() for part in sums)
    return loss, gradients.image_grad, gradients.text_grad(factor), d_scale, d_bias


# The CPU.


def sigmoid_fwd_cpu(
    problem: Problem, backward: bool, need: tuple[bool, bool]
) -> tuple[Tensor, ...]:
    """The same in strips that stay in the cache. The scale's gradient is <d_x, x>, which float32 blocks make exact."""
    x_BE = logits_cpu.unit_rows_cpu(problem.image_BE, problem.normalized, problem.operand)
    y_GE = logits_cpu.unit_rows_cpu(problem.text_GE, problem.normalized, problem.operand)
    wide = x_BE.dtype
    need_image, need_text = backward and (need[0] or not need[1]), backward and need[1]
    # Contiguous, whatever the embeddings are: the operator's fake says so.
    d_x = x_BE.new_zeros(x_BE.shape if need_image else 0)
    d_y = y_GE.new_zeros(y_GE.shape if need_text else 0)
    loss, d_scale, d_bias = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    scale, bias = (part.double().reshape(()) for part in (problem.scale, problem.bias))
    side_R, side_C = logits_cpu.cpu_sides(len(y_GE), wide, problem.workspace_bytes)
    buffer = logits_cpu.buffer((min(side_R, len(x_BE)) * min(side_C, len(y_GE)),), wide)
    for rows in logits.blocks(len(x_BE), side_R):
        scaled_RE = logits_cpu.scaled(x_BE[rows], scale * LOG2E)
        for columns in logits.blocks(len(y_GE), side_C):
            shape = rows.stop - rows.start, columns.stop - columns.start
            block = torch.mm(scaled_RE, y_GE[columns].T, out=buffer[: math.prod(shape)].view(shape))
            other = x_BE.new_empty(logits_cpu.strip_rows(shape[1], wide), shape[1])
            for strip, part in logits_cpu.strips(rows, shape[1], wide):
                here, pairs = block[part], problem.pairs.block(strip, columns)
                total = math.inf
                if pairs.ids != "positive":
                    total = _strip_by_place(here, other[: len(here)], pairs, scale, bias, backward)
                if total == math.inf:  # any logits and any positives
                    torch.mm(logits_cpu.scaled(x_BE[strip], scale), y_GE[columns].T, out=here)
                    total = _strip_of_any(here, pairs, bias, backward)
                loss += total
                if backward:
                    d_bias += here.sum(1).sum(dtype=torch.float64)
            if need_image:
                d_x[rows].addmm_(block, y_GE[columns])
            if need_text:
                d_y[columns].addmm_(block.T, x_BE[rows])
    if backward:
        d_scale = logits_cpu.dot(d_x, x_BE) if need_image else logits_cpu.dot(d_y, y_GE)
    d_image, d_text = x_BE.new_empty(0), y_GE.new_empty(0)
    if need[0]:
        d_image = logits_cpu.finish_cpu(problem.image_BE, d_x, problem.normalized, scale)
    if need[1]:
        d_text = logits_cpu.finish_cpu(problem.text_GE, d_y, problem.normalized, scale)
    return loss, d_image, d_text, d_scale, d_bias


def _strip_by_place(
    strip_RC: Tensor,
    other_RC: Tensor,
    pairs: Pairs,
    scale: Tensor,
    bias: Tensor,
    backward: bool,
) -> float:
    """The sum of a strip's losses, its powers of two turned into gradients; inf where one overflows.

    With exp(bias) as a factor c of its own: log1p(c q), and c q / (1 + c q) as q / (1 / c + q).
    """
    bias_power = (bias * LOG2E).item()
    if not abs(bias_power) < LARGEST_POWER:
        return math.inf
    invalid, _ = logits_cpu.masks(pairs)
    if invalid is not None:
        strip_RC.masked_fill_(invalid, -torch.inf)
    diagonal, _, _ = logits_cpu.diagonal(strip_RC, pairs)
    z = diagonal.double() / LOG2E + bias
    diagonal.fill_(-torch.inf)
    if max(abs(bias_power), (scale * LOG2E).abs().item()) > SAFE_POWER:
        whole = round(bias_power)
        strip_RC += whole
        bias_power -= whole
    strip_RC.exp2_()
    torch.mul(strip_RC, 2.0**bias_power, out=other_RC).log1p_()
    total = other_RC.sum(1).sum(dtype=torch.float64) + F.softplus(-z, threshold=LINEAR).sum()
    if backward:
        torch.add(strip_RC, 2.0**-bias_power, out=other_RC)
        strip_RC /= other_RC
        diagonal.copy_(-torch.sigmoid(-z))
    return total.item()


def _strip_of_any(strip_RC: Tensor, pairs: Pairs, bias: Tensor, backward: bool) -> float:
    """The same of any logits, which the strip holds without the bias, and with any positives."""
    invalid, positive = logits_cpu.masks(pairs)
    sign = strip_RC.new_ones(()) if positive is None else 1 - 2 * positive.to(strip_RC.dtype)
    strip_RC.add_(bias.to(strip_RC.dtype)).mul_(sign)
    diagonal, _, _ = logits_cpu.diagonal(strip_RC, pairs)
    if positive is None:
        diagonal.neg_()
    if invalid is not None:
        strip_RC.masked_fill_(invalid, -torch.inf)
    total = F.softplus(strip_RC, threshold=LINEAR).sum(1).sum(dtype=torch.float64)
    if backward:
        strip_RC.sigmoid_().mul_(sign)
        if positive is None:
            diagonal.neg_()
    return total.item()


# The operator.


@torch.library.custom_op("clipcore::sigmoid_fwd", mutates_args=())
def _sigmoid_fwd(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    first_label: int,
    same_id: str,
    normalized: bool,
    operand: torch.dtype,
    engine: str,
    workspace_bytes: int,
    backward: bool,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(
        *(image_BE, text_GE, scale, bias, Pairs(image_ids, text_ids, first_label, same_id)),
        *(normalized, operand, engine, workspace_bytes),
    )
    forward = sigmoid_fwd_triton if image_BE.is_cuda else sigmoid_fwd_cpu
    with tiles.on_device(image_BE.device):
        return forward(problem, backward, (need_image, need_text))  # type: ignore[return-value]


@_sigmoid_fwd.register_fake
def _(image_BE: Tensor, text_GE: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    need_image, need_text = arguments[-2:]
    wide = tiles.accumulate_dtype(torch.promote_types(image_BE.dtype, text_GE.dtype))
    loss, d_scale, d_bias = (image_BE.new_empty((), dtype=torch.float64) for _ in range(3))
    return (
        loss,
        image_BE.new_empty(image_BE.shape if need_image else (0,), dtype=wide),
        text_GE.new_empty(text_GE.shape if need_text else (0,), dtype=wide),
        d_scale,
        d_bias,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.likes = [(part.dtype, part.shape) for part in inputs[:4]]
    ctx.set_materialize_grads(False)
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
    # The saved gradients would count as constants.
    tiles.check_first_order("sigmoid_loss")
    gradients: list[Tensor | None] = [None] * ctx.num_inputs
    for i, (saved, (dtype, shape)) in enumerate(zip(ctx.saved_tensors, ctx.likes, strict=True)):
        if upstream is not None and ctx.needs_input_grad[i]:
            gradients[i] = (saved * upstream.to(saved.dtype)).to(dtype).reshape(shape)
    return tuple(gradients)


_sigmoid_fwd.register_autograd(_backward, setup_context=_setup_context)
tiles.register_autocast("sigmoid_fwd", num_operands=0)


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
    """SigLIP's loss of images and texts without the B x G matrix: the sum over all pairs of rows, divided by B.

    Image row b and text row `first_label + b` are a pair, all others are negatives. Any `first_label` is allowed: texts
    of another rank may have no pair here, and the losses of an image's strips then add up. Differentiable once in both
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
        engine: "library" (default) or "fused" on a GPU (logits.py).

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
    logits.check_embeddings(image_BE, text_GE, operand_dtype, engine)
    Pairs(image_ids, text_ids, first_label, same_id).check(image_BE, text_GE)
    scale = tiles.as_scalar("scale", scale, image_BE, text_GE)
    bias = tiles.as_scalar("bias", bias, image_BE, text_GE)
    if workspace_bytes is None:
        workspace_bytes = logits.WORKSPACE_BYTES["cuda" if image_BE.is_cuda else "cpu"]
    # Kernels read ids one after the other.
    image_ids, text_ids = (
        None if ids is None else ids.contiguous() for ids in (image_ids, text_ids)
    )
    logits.check_no_tangent("sigmoid_loss", image_BE, text_GE, scale, bias)
    needs = [t.requires_grad and torch.is_grad_enabled() for t in (image_BE, text_GE, scale, bias)]
    total, *_ = torch.ops.clipcore.sigmoid_fwd(
        *(image_BE, text_GE, scale, bias, image_ids, text_ids, first_label, same_id),
        *(not normalize, logits.operand_dtype(image_BE, text_GE, operand_dtype)),
        *(engine or "library", workspace_bytes, any(needs), needs[0], needs[1]),
    )
    wide = tiles.accumulate_dtype(torch.promote_types(image_BE.dtype, text_GE.dtype))
    return (total / max(1, len(image_BE))).to(wide)
