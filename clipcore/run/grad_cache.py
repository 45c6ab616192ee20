"""Exact gradients of a batch whose activations do not fit: towers in micro-batches, one loss over all of them.

    1. embed:   each micro-batch through the towers; the first ones keep their graphs, the others do not
    2. loss:    over all embeddings at once, and its gradients with respect to them
    3. replay:  in order, each micro-batch is differentiated from its embeddings' gradients; those without a graph
                are embedded once more, with one

The gradients are those of the direct computation, the logit scale's and bias's included: the loss is never cut. A kept
graph costs memory until its replay and saves one forward pass; whether it is kept changes no bit.

Random numbers: the generators' states are noted before each micro-batch and set back for its replay, so that dropout
is the same in both passes.
BatchNorm: a micro-batch is normalised by its own statistics, in both passes; the running statistics count it once.
The gradients are therefore those of a model that normalises in groups of a micro-batch, as the paper's normalises in
groups of a GPU's share; Vision Transformers know no groups.
Several ranks: every replay but the last runs without a reduction of gradients.
Autocast: the micro-batches share one 16-bit copy of each weight, instead of a copy for every pass and kept graph.

Source: Gao et al. 2021 (GradCache, arXiv 2101.06983); keeping some of the graphs is our own.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clipcore.kernels.weight_casts import WeightCasts
from clipcore.run.sharding import is_sharded
from clipcore.towers.resnet import replayed

# What embeds a micro-batch: (its rows, the rows that follow or None) to (image features, text features, scalars ...).
Embed = Callable[[slice, slice | None], Sequence[Tensor]]


class StepOutput(NamedTuple):
    """What a step computed; its gradients are in the parameters."""

    loss: Tensor
    image_features_BE: Tensor
    text_features_BE: Tensor
    scalars: tuple[Tensor, ...]  # the logit scale, and the bias where the model has one


def micro_batches(num_rows: int, number: int) -> list[slice]:
    """Split the rows into slices that differ by one row at most, so that a compiled model meets few shapes."""
    ends = [num_rows * i // number for i in range(number + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def differentiate(
    embed: Embed,
    loss_fn: Callable[..., Tensor],
    module: nn.Module,
    num_rows: int,
    num_parts: int,
    num_kept_graphs: int = 1,
    *,
    scale_loss: Callable[[Tensor], Tensor] | None = None,
    sync: Callable[[bool], AbstractContextManager[object]] | None = None,
    on_phase: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> StepOutput:
    """Add the gradients of the loss of ``num_rows`` pairs to the parameters', without all activations at once.

    Args:
        embed: called with the rows of a micro-batch, and with the rows of the one that will be asked for next, so that
            its inputs can be under way. Returns features [rows, E] of images and of texts, then the scalars that the
            loss takes. It has to compute the same each time.
        loss_fn: (image features, text features, *scalars) to the loss.
        module: what holds the parameters; its BatchNorm statistics count each pair once.
        num_parts: micro-batches, 1 to ``num_rows``; 1 is the direct step.
        num_kept_graphs: how many of the first micro-batches keep their graphs until their replay, at least 1.
        scale_loss: what is differentiated in place of the loss, such as ``GradScaler.scale``.
        sync: a context around the passes over a micro-batch, called with whether its backward pass is the last and
            averages gradients over ranks, such as ``sharding.gradient_sync``. The last one is then always replayed.
        on_phase: called with "forward", "loss" and "backward" at the end of each.
        on_progress: called with (passes done, passes in all) after each pass over a micro-batch.

    >>> model = torch.nn.Linear(4, 2)
    >>> images, texts = torch.rand(6, 4), torch.rand(6, 4)
    >>> output = differentiate(
    ...     lambda rows, _: (model(images[rows]), model(texts[rows])),
    ...     lambda image, text: (image * text).sum(), model, num_rows=6, num_parts=3)
    """
    parts = micro_batches(num_rows, num_parts)
    sync_here = sync or (lambda is_last: nullcontext())
    scale_loss = scale_loss or (lambda loss: loss)
    on_phase = on_phase or (lambda phase: None)
    if num_parts == 1:
        with sync_here(True):
            image_BE, text_BE, *scalars = embed(parts[0], None)
            on_phase("forward")
            loss = loss_fn(image_BE, text_BE, *scalars)
            on_phase("loss")
            scale_loss(loss).backward()
        on_phase("backward")
        return StepOutput(loss.detach(), image_BE, text_BE, tuple(scalars))

    # The first is embedded with its graph in any case: it shows what has a gradient.
    num_kept_graphs = max(1, min(num_kept_graphs, num_parts if sync is None else num_parts - 1))
    num_passes = 2 * len(parts) - num_kept_graphs
    num_done = 0
    casts = WeightCasts()

    def one_more() -> None:
        nonlocal num_done
        num_done += 1
        if on_progress is not None:
            on_progress(num_done, num_passes)

    # Embed
    graphs: list[Sequence[Tensor]] = []
    states: list[_RandomStates] = []
    features: list[list[Tensor]] = [[], []]
    first_replayed = parts[num_kept_graphs] if num_kept_graphs < len(parts) else None
    upcoming = [*parts[1:], first_replayed]
    with sharing(casts, module):
        for i, (rows, following) in enumerate(zip(parts, upcoming, strict=True)):
            states.append(_RandomStates(i >= num_kept_graphs))
            with torch.set_grad_enabled(i < num_kept_graphs), sync_here(False):
                embedded = embed(rows, following)
            if i < num_kept_graphs:
                graphs.append(embedded)
            for side, part in zip(features, embedded, strict=False):
                side.append(part.detach())
            one_more()
    needed = [part.requires_grad for part in graphs[0]]
    scalars = [part.detach().clone() for part in graphs[0][2:]]
    on_phase("forward")

    # Loss
    leaves = [torch.cat(side) for side in features] + scalars
    del features, side, part, embedded  # the names hold parts of micro-batches
    for leaf, need in zip(leaves, needed, strict=True):
        leaf.requires_grad_(need)
    loss = loss_fn(*leaves)
    scale_loss(loss).backward()
    gradients = [leaf.grad for leaf in leaves]
    on_phase("loss")

    # Replay
    with replayed(module), sharing(casts, module):
        for i, rows in enumerate(parts):
            is_last = i == len(parts) - 1
            with sync_here(is_last):
                if i < num_kept_graphs:
                    embedded, graphs[i] = graphs[i], ()
                else:
                    following = parts[i + 1] if not is_last else None
                    with states[i].restored():
                        embedded = embed(rows, following)
                _backward(embedded, gradients, rows, is_last)
            del embedded
            if i >= num_kept_graphs:
                one_more()
    on_phase("backward")
    image_BE, text_BE, *scalars = (leaf.detach() for leaf in leaves)
    return StepOutput(loss.detach(), image_BE, text_BE, tuple(scalars))


def sharing(casts: WeightCasts, module: nn.Module) -> AbstractContextManager[None]:
    """Return the context in which passes share ``casts`` of a model's weights, except a split model's.

    FSDP brings a block's weights together for one pass, and then frees them.
    """
    return nullcontext() if any(map(is_sharded, module.modules())) else casts.kept()


def _backward(
    embedded: Sequence[Tensor], gradients: Sequence[Tensor | None], rows: slice, is_last: bool
) -> None:
    """Differentiate a micro-batch from its embeddings; the scalars, which all share, once, with the last one."""
    given = []
    for i, (part, gradient) in enumerate(zip(embedded, gradients, strict=True)):
        if part.requires_grad and gradient is not None and (i < 2 or is_last):
            given.append((part, gradient[rows] if i < 2 else gradient))
    if given:
        torch.autograd.backward([part for part, _ in given], [gradient for _, gradient in given])


class _RandomStates:
    """The states of torch's generators when it was made: the CPU's and the current GPU's."""

    def __init__(self, noted: bool) -> None:
        self.on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        self.cpu = torch.get_rng_state() if noted else None
        self.gpu = torch.cuda.get_rng_state() if noted and self.on_gpu else None

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Set the generators to these states within the context, and back to the present ones at its end."""
        assert self.cpu is not None
        before = _RandomStates(True)
        self._set()
        try:
            yield
        finally:
            before._set()

    def _set(self) -> None:
        assert self.cpu is not None
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu)
