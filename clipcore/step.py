"""What a run does with a batch: up to the device, through the towers, one loss, gradients.

Legend: B pairs of this rank, L tokens, S side of an image.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipcore.data.loader import Batch
from clipcore.data.order import hash64
from clipcore.data.transforms import ImageTransform, normalize_images
from clipcore.data.upload import Upload
from clipcore.distributed import World, broadcast_object
from clipcore.grad_cache import Embed, Found, differentiate
from clipcore.loss import ClipLoss, SigLipLoss
from clipcore.model import CLIP
from clipcore.step_plan import GB, StepPlan, default_budget, make_plan

# Of the numbers that seed an image's patch dropout, apart from those of the loader.
_DROPOUT = 201


@dataclass
class TrainingStep:
    """The forward and backward passes of one step.

    Attributes:
        model: what is trained; ``towers`` is the same as it is called in training, compiled or wrapped.
        scale_loss: what is differentiated in place of the loss.
        micro_batch_size, kept: as ``grad_cache.differentiate`` takes them; None until there is a plan.
        unsynchronized: see there.
    """

    model: CLIP
    towers: nn.Module
    loss_fn: ClipLoss | SigLipLoss
    world: World
    transform: ImageTransform
    precision: str
    seed: int
    scale_loss: Callable[[Tensor], Tensor]
    micro_batch_size: int | None = None
    kept: int | None = None
    unsynchronized: Callable[[], AbstractContextManager[object]] = nullcontext
    replica: nn.Module | None = None  # the towers beneath what reduces gradients

    def gradients(
        self,
        batch: Batch,
        step: int,
        on_phase: Callable[[str], None] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Found:
        """Adds a batch's gradients to the parameters' own, averaged over ranks.

        Dropout is a function of the seed and the step, that of patches of the sample too: it does not depend on the
        rank or the micro-batch that a sample is in.
        """
        num_rows = len(batch.images)
        torch.manual_seed(step_seed(self.seed, step, self.world.rank))
        return differentiate(
            self.embedder(batch, step),
            self.loss,
            self.model,
            num_rows,
            self.micro_batch_size or num_rows,
            self.kept or 1,
            scale_loss=self.scale_loss,
            unsynchronized=self.unsynchronized,
            on_phase=on_phase,
            on_progress=on_progress,
        )

    def embedder(self, batch: Batch, step: int, towers: nn.Module | None = None) -> Embed:
        """What embeds a micro-batch of a batch."""
        inputs = [batch.images, batch.tokens]
        if getattr(self.model.visual, "patch_dropout", 0.0) > 0:
            words = hash64(batch.indices.numpy(), self.seed, step, _DROPOUT)
            inputs.append(torch.from_numpy(words.view("int64")))
        upload = Upload(inputs, self.world.device)
        forward = towers or self.towers

        def embed(rows: slice, following: slice | None) -> tuple[Tensor, ...]:
            images, *others = upload.rows(rows, following)
            images = normalize_images(images, self.transform.mean, self.transform.std)
            with autocast(self.world.device, self.precision):
                return forward(images, *others)

        return embed

    def loss(self, *features: Tensor) -> Tensor:
        """The loss of all pairs; what it multiplies follows the precision of the run."""
        with autocast(self.world.device, self.precision):
            return self.loss_fn(*features)

    def reduce_through(
        self, towers: nn.Module, unsynchronized: Callable[[], AbstractContextManager[object]]
    ) -> None:
        """From now on the towers are called through a wrapper that averages gradients over ranks."""
        self.replica, self.towers, self.unsynchronized = self.towers, towers, unsynchronized

    def needs_plan(self, batch: Batch) -> bool:
        """Whether ``plan`` has something to choose: the micro-batch, or how many of several keep their graphs."""
        if self.micro_batch_size is None:
            return True
        return self.kept is None and self.micro_batch_size < len(batch.images)

    def plan(self, batch: Batch, step: int, step_memory: float | None = None) -> StepPlan:
        """Chooses what is not chosen yet of ``micro_batch_size`` and ``kept``, the same on every rank.

        Args:
            step_memory: GB that a step may take beside model and optimizer; None for `step_plan.default_budget`.
        """
        device, num_rows = self.world.device, len(batch.images)
        budget_bytes = default_budget(device) if step_memory is None else int(step_memory * GB)
        wide = torch.float32.itemsize
        embeddings = 2 * num_rows * self.model.config.embed_dim * wide
        fixed = {"embeddings": 2 * embeddings}
        if device.type == "cpu":
            fixed = {"inputs": batch.images.nbytes + batch.tokens.nbytes, **fixed}
        some = self._some_features(batch)
        made = make_plan(
            self.embedder(batch, step, self.replica or self.towers),
            self.model,
            num_rows,
            device,
            fixed=fixed,
            loss_bytes=self.loss_fn.memory_bytes(some, some),
            budget_bytes=budget_bytes,
            micro_batch_size=self.micro_batch_size,
            kept=self.kept,
            all_but_last=self.unsynchronized is not nullcontext,
            agree=broadcast_object,
        )
        made = broadcast_object(made)
        self.micro_batch_size, self.kept = made.micro_batch_size, made.kept
        return made

    def describe_loss(self, batch: Batch) -> str:
        """How the loss of a batch will be computed, in a line."""
        some = self._some_features(batch)
        with autocast(self.world.device, self.precision):
            return str(self.loss_fn.plan(some, some))

    def _some_features(self, batch: Batch) -> Tensor:
        """As many features as the batch has pairs, in the memory of one."""
        one = torch.empty(1, self.model.config.embed_dim, device=self.world.device)
        return one.expand(len(batch.images), -1)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision for the towers."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.float16 if precision == "amp" else torch.bfloat16)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a step's generators: a function of its place, so that nothing of them needs saving."""
    digest = hashlib.sha256(f"step {seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
