"""The sigmoid loss on the CPU: the same walk over blocks, whose chunks stay in the cache.

Legend and maths: ``clipcore.kernels.sigmoid``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels.logits.pairs import LOG2E, LossInputs, Pairs
from clipcore.kernels.logits.walk_cpu import LogitChunk, LogitWalk, diagonal, masks, scaled

# Powers of two of cosine and bias each, for which exp2 of them apart is safe in float32.
SAFE_POWER = 60.0
# Beyond it no float32 logit changes its loss's whole power of two.
LARGEST_POWER = 2.0**60
# Beyond it log(1 + exp(x)) is x in float64 too.
LINEAR = 40.0


def sigmoid_fwd_cpu(
    inputs: LossInputs, bias: Tensor, backward: bool, need: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the outputs of ``clipcore::sigmoid_fwd``; the scale's gradient is <d_x, x>, which float32 blocks make exact."""
    loss, d_scale, d_bias = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    scale, bias = (part.double().reshape(()) for part in (inputs.scale, bias))
    walk = LogitWalk(inputs, scale * LOG2E, need=need if backward else None)
    for block in walk:
        for chunk in walk.chunks(block):
            total = math.inf
            if chunk.pairs.ids != "positive":
                total = _losses_by_place(chunk, scale, bias, backward)
            if total == math.inf:  # any logits and any positives
                scaled_RE = scaled(walk.x_BE[chunk.rows], scale)
                torch.mm(scaled_RE, walk.y_GE[block.columns].T, out=chunk.values_RC)
                total = _losses_of_any(chunk.values_RC, chunk.pairs, bias, backward)
            loss += total
            if backward:
                d_bias += chunk.values_RC.sum(1).sum(dtype=torch.float64)
        walk.add_gradient(block)

    if backward:
        d_scale = walk.along()
    d_image, d_text = walk.gradients(scale, walk.dtype)
    return loss, d_image, d_text, d_scale, d_bias


def _losses_by_place(chunk: LogitChunk, scale: Tensor, bias: Tensor, backward: bool) -> float:
    """Return the sum of a chunk's losses, its powers of two turned into gradients; inf where one overflows.

    With exp(bias) as a factor c of its own: log1p(c q), and c q / (1 + c q) as q / (1 / c + q).
    """
    values_RC, spare_RC, pairs = chunk.values_RC, chunk.spare_RC, chunk.pairs
    bias_log2 = (bias * LOG2E).item()
    if not abs(bias_log2) < LARGEST_POWER:
        return math.inf
    invalid, _ = masks(pairs)
    if invalid is not None:
        values_RC.masked_fill_(invalid, -torch.inf)
    own, _, _ = diagonal(values_RC, pairs)
    z = own.double() / LOG2E + bias
    own.fill_(-torch.inf)

    if max(abs(bias_log2), (scale * LOG2E).abs().item()) > SAFE_POWER:
        whole = round(bias_log2)
        values_RC += whole
        bias_log2 -= whole
    values_RC.exp2_()
    torch.mul(values_RC, 2.0**bias_log2, out=spare_RC).log1p_()
    total = spare_RC.sum(1).sum(dtype=torch.float64) + F.softplus(-z, threshold=LINEAR).sum()

    if backward:
        torch.add(values_RC, 2.0**-bias_log2, out=spare_RC)
        values_RC /= spare_RC
        own.copy_(-torch.sigmoid(-z))
    return total.item()


def _losses_of_any(values_RC: Tensor, pairs: Pairs, bias: Tensor, backward: bool) -> float:
    """Return the sum of losses of any logits, which the chunk holds without the bias, and with any positives."""
    invalid, positive = masks(pairs)
    sign = values_RC.new_ones(()) if positive is None else 1 - 2 * positive.to(values_RC.dtype)
    values_RC.add_(bias.to(values_RC.dtype)).mul_(sign)
    own, _, _ = diagonal(values_RC, pairs)
    if positive is None:
        own.neg_()
    if invalid is not None:
        values_RC.masked_fill_(invalid, -torch.inf)
    total = F.softplus(values_RC, threshold=LINEAR).sum(1).sum(dtype=torch.float64)

    if backward:
        values_RC.sigmoid_().mul_(sign)
        if positive is None:
            own.neg_()
    return total.item()
