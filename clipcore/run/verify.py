"""``--verify-gradients``: a small step of the run, with everything that the run does to it, against plain float64.

Legend: B pairs of this rank in the small step, G of all ranks.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clipcore.data.loader import Batch
from clipcore.kernels.contrastive import contrastive_ref
from clipcore.kernels.sigmoid import sigmoid_ref
from clipcore.loss import SigLipLoss
from clipcore.loss.distill import distill_ref
from clipcore.ranks.distributed import all_reduce_flag, gather_rows
from clipcore.run.compiled import uncompile_blocks
from clipcore.run.grad_cache import micro_batches
from clipcore.run.sharding import gathered, is_sharded, whole
from clipcore.run.train_step import TrainingStep
from clipcore.towers.resnet import replayed

# Pairs of the small step on all ranks, whose float64 graphs each rank holds; micro-batches on each.
NUM_PAIRS, NUM_PARTS = 48, 3
# How far the gradient may be from the exact one, relative to it: what rounding explains, and no wrong factor.
LIMITS = {"fp32": 1e-3, "amp_bf16": 0.1, "amp_bfloat16": 0.1, "amp": 0.03, "bf16": 0.1}
# BatchNorm over a few pairs amplifies the rounding of 16 bits: 0.15 was met in bfloat16, at 0.969 times the length.
RESNET_FACTOR = 3.0
# What float16 gradients are lifted by: a loss scaler begins with a factor that overflows, and then lowers it.
FP16_FACTOR = 256.0


class VerificationError(RuntimeError):
    """The gradients of a step are not those of the loss; the message says by how much."""


def verify_gradients(training: TrainingStep, batch: Batch, step: int) -> str:
    """Compare the gradients of the first pairs of a batch, on all ranks, with the plain computation in float64.

    The small step goes the way of every step of the run: micro-batches, replays, the loss over all ranks, its kernels, the
    reduction over ranks, in the run's precision. The plain one is made by each rank alone: the float64 model, the whole
    matrix of logits, one backward pass. A ResNet's micro-batches are normalised on their own in both.

    Returns:
        What agrees how well, in a line.

    Raises:
        VerificationError: on all ranks, if any rank's do not agree.
    """
    # As many on every rank, whose shares may differ by one.
    smallest = gather_rows(torch.tensor([len(batch.images)])).min()
    most = max(2, NUM_PAIRS // training.world.world_size)
    rows = slice(0, min(most, int(smallest)))
    num_pairs = rows.stop
    small = dataclasses.replace(
        batch, images=batch.images[rows], tokens=batch.tokens[rows], indices=batch.indices[rows]
    )
    # A ResNet's micro-batches have two pairs at least.
    num_parts = max(1, min(NUM_PARTS, num_pairs // 2))
    with replayed(training.model):  # leaves BatchNorm's statistics alone
        factor = FP16_FACTOR if training.precision == "amp" else 1.0
        scaled = dataclasses.replace(
            training, num_kept_graphs=1, scale_loss=lambda loss: factor * loss
        )
        output = scaled.gradients(small, step, num_parts=num_parts)
    gradients = _take_gradients(training, factor)
    loss, exact, terms = _plain(training, small, num_parts, step)

    def error(ours: Tensor, theirs: Tensor) -> float:
        largest = torch.linalg.vector_norm(theirs).clamp(min=torch.finfo(torch.float64).tiny)
        return float(torch.linalg.vector_norm(ours - theirs) / largest)

    assert gradients.keys() == exact.keys()
    ours, theirs = (
        torch.cat([parts[name].flatten() for name in exact]) for parts in (gradients, exact)
    )
    errors = {"all gradients": error(ours, theirs)}
    for name, size in terms.items():
        if name in exact:
            errors[f"that of {name}"] = float((gradients[name] - exact[name]).abs() / size)
    ratio = float(ours.norm() / theirs.norm())
    mean_loss = _mean_over_ranks(output.loss, training.world.world_size)
    errors["the loss"] = abs(float(mean_loss - loss)) / max(abs(float(loss)), 1e-6)
    limit = LIMITS[training.precision]
    if training.model.is_resnet and training.precision != "fp32":
        limit *= RESNET_FACTOR
    told = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
    total = num_pairs * training.world.world_size
    if all_reduce_flag(not max(errors.values()) <= limit):
        raise VerificationError(
            f"--verify-gradients: the gradients of {total} pairs are not those of the plain computation in float64: "
            f"relative errors: {told}; length {ratio:.3f} times the exact one's; at most {limit:g} is rounding in "
            f"{training.precision}. Nothing was trained; this is a defect, in clipcore or in this machine"
        )
    return (
        f"gradients of {total} pairs verified against float64 (limit {limit:g}); relative errors: {told}; "
        f"length {ratio:.6f} times the exact one's"
    )


def _take_gradients(training: TrainingStep, factor: float) -> dict[str, Tensor]:
    """Take the gradients off the parameters, and return them without the loss's factor."""
    taken = {
        name: whole(parameter.grad).double() / factor
        for name, parameter in training.model.named_parameters()
        if parameter.grad is not None
    }
    training.model.zero_grad(set_to_none=True)
    return taken


def _mean_over_ranks(loss: Tensor, world_size: int) -> Tensor:
    return gather_rows(loss.double().reshape(1)).mean() if world_size > 1 else loss.double()


def _plain(
    training: TrainingStep, small: Batch, num_parts: int, step: int
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return (loss, gradients, sizes of the scalars' terms) of all ranks' pairs, by this rank alone in float64."""
    device = training.world.device
    images, tokens, indices = (
        gather_rows(part.to(device)).cpu()
        for part in (small.images, _padded(training, small), small.indices)
    )
    everything = Batch(images, tokens, indices)
    model = gathered(training.model) if is_sharded(training.model) else training.model
    model = copy.deepcopy(model).double()
    uncompile_blocks(model)
    teacher = None if training.teacher is None else copy.deepcopy(training.teacher).double()
    plain = dataclasses.replace(
        training, model=model, teacher=teacher, precision="fp32", pack_text=False
    )
    embed = plain.embedder(everything, step, model)
    starts = range(0, len(everything.images), len(small.images))
    parts = [
        embed(slice(start + rows.start, start + rows.stop), None)
        for start in starts
        for rows in micro_batches(len(small.images), num_parts)
    ]
    image_GE, text_GE = (torch.cat([part[i] for part in parts]) for i in range(2))
    reference = _reference(training, tokens)
    if teacher is not None:
        reference = _with_teacher(reference, plain.features_of_teacher(everything, step))
    scalars = parts[-1][2:]
    loss = reference(image_GE, text_GE, *scalars)
    loss.backward()
    terms = _sizes_of_terms(reference, image_GE, text_GE, scalars)
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.detach(), gradients, terms


def _reference(training: TrainingStep, tokens_GL: Tensor) -> Callable[..., Tensor]:
    """Return the plain loss under the run's settings: (image features, text features, *scalars) to the loss."""
    loss_fn = training.loss_fn
    settings: dict[str, Any] = {}
    if training.with_ids:
        # Exact ids, so that the hashes of these few pairs are verified too: an id is where the caption stands first.
        has_padding = training.model.ignores_padding
        captions = [
            tuple((row[: int(row.argmax()) + 1] if has_padding else row).tolist())
            for row in tokens_GL
        ]
        ids_G = torch.tensor([captions.index(caption) for caption in captions])
        ids_G = ids_G.to(training.world.device)
        settings = {"image_ids": ids_G, "text_ids": ids_G, "same_id": loss_fn.same_id}
    if isinstance(loss_fn, SigLipLoss):
        return partial(sigmoid_ref, **settings)
    return partial(contrastive_ref, label_smoothing=loss_fn.label_smoothing, **settings)


def _with_teacher(
    reference: Callable[..., Tensor], taught: Sequence[Tensor]
) -> Callable[..., Tensor]:
    """Return a plain loss with the cross-entropy to a teacher's softmax added."""

    def total(
        image_GE: Tensor, text_GE: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        loss = reference(image_GE, text_GE, scale)
        loss = loss + distill_ref(image_GE, text_GE, scale, *taught)
        # It changes no softmax.
        return loss if bias is None else loss + 0 * bias

    return total


def _sizes_of_terms(
    reference: Callable[..., Tensor], image_GE: Tensor, text_GE: Tensor, scalars: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return, by name of a scalar, the sum of the absolute terms of its gradient, one for each logit.

    An error is relative to this sum: the terms nearly cancel at times, and then a right gradient of 16 digits has few.
    """
    cosines = (image_GE @ text_GE.T).detach().requires_grad_()
    columns = torch.eye(len(text_GE), dtype=cosines.dtype, device=cosines.device)
    scalars = [scalar.detach() for scalar in scalars]
    (gradient,) = torch.autograd.grad(reference(cosines, columns, *scalars), cosines)
    return {
        "logit_scale": (gradient * cosines).abs().sum().detach(),
        "logit_bias": gradient.abs().sum() / scalars[0],
    }


def _padded(training: TrainingStep, small: Batch) -> Tensor:
    """Return tokens of the full length, which is the same on all ranks."""
    missing = training.model.context_length - small.tokens.shape[1]
    return torch.nn.functional.pad(small.tokens, (0, missing))
