"""What a run does with a batch: up to the device, through the towers, one loss, gradients.

Legend: B pairs of this rank, L tokens, S side of an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from clipcore.data.caption_ids import caption_ids
from clipcore.data.loader import Batch
from clipcore.data.order import hash64
from clipcore.data.packing import (
    PACKED_LENGTH,
    PackedText,
    fitted_length,
    is_worth_packing,
    pack_captions,
)
from clipcore.data.upload import Upload
from clipcore.kernels.contrastive.budget import default_stash_bytes
from clipcore.kernels.contrastive.planning import DENSE_SIDE
from clipcore.kernels.weight_casts import WeightCasts
from clipcore.loss import ClipLoss, SigLipLoss
from clipcore.ranks import watchdog
from clipcore.ranks.distributed import World, all_reduce_flag, all_reduce_sum, broadcast_object
from clipcore.run import compiled, threads
from clipcore.run.grad_cache import Embed, StepOutput, differentiate, micro_batches, sharing
from clipcore.run.memory_plan import (
    GB,
    StepPlan,
    bytes_of,
    default_budget,
    make_plan,
    shared_stash_bytes,
)
from clipcore.run.sharding import gradient_sync, is_sharded
from clipcore.towers.model import CLIP

# Of the numbers that seed an image's patch dropout, apart from those of the loader.
_DROPOUT = 201
# Pairs that a teacher embeds at once at most: the memory plan measures the student alone.
TEACHER_ROWS = 256
# What the log says of a loss's ``same_id``.
_EQUAL_CAPTIONS = {"ignore": "left out as negatives", "positive": "positives"}


@dataclass
class TrainingStep:
    """The forward and backward passes of one step.

    Attributes:
        model: what is trained.
        scale_loss: what is differentiated in place of the loss.
        micro_batch_size: pairs that are embedded at once; None until there is a plan.
        num_kept_graphs: micro-batches that keep their graphs; None until there is a plan.
        reduced: the towers in what averages gradients over ranks, where there are several and the model is whole.
        with_ids: equal captions of a global batch belong together, and ``loss_fn.same_id`` says how.
        teacher: in evaluation mode, whose features a ``DistillClipLoss`` takes too; None for any other loss.
    """

    model: CLIP
    loss_fn: ClipLoss | SigLipLoss
    world: World
    precision: str
    seed: int
    global_batch_size: int
    scale_loss: Callable[[Tensor], Tensor]
    micro_batch_size: int | None = None
    num_kept_graphs: int | None = None
    reduced: nn.Module | None = None
    pack_text: bool = True  # padded captions give the same features and gradients, slower
    stream: torch.cuda.Stream | None = None  # of the uploads, made when it is needed
    with_ids: bool = False
    teacher: CLIP | None = None

    @property
    def largest_share(self) -> int:
        """Return the pairs of the rank that has most of a global batch; another may have one less."""
        return -(-self.global_batch_size // self.world.world_size)

    @property
    def num_parts(self) -> int:
        """Return the number of micro-batches of a step, the same on every rank."""
        size = self.largest_share if self.micro_batch_size is None else self.micro_batch_size
        parts = -(-self.largest_share // size)
        # Each has a pair; a ResNet's two, which BatchNorm needs to have a variance.
        smallest = self.global_batch_size // self.world.world_size
        return max(1, min(parts, smallest // 2 if self.model.is_resnet else smallest))

    def gradients(
        self,
        batch: Batch,
        step: int,
        on_phase: Callable[[str], None] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        num_parts: int | None = None,
    ) -> StepOutput:
        """Add a batch's gradients, averaged over ranks, to those of the parameters.

        Dropout is a function of the seed and the step, that of patches of the sample too: it does not depend on the
        rank or the micro-batch that a sample is in.

        Args:
            num_parts: other than those of the plan, for another batch.
        """
        num_parts = self.num_parts if num_parts is None else num_parts
        taught: tuple[Tensor, ...] | None = None
        if self.teacher is not None:
            taught = self.features_of_teacher(batch, step, num_parts)
            if on_phase is not None:
                on_phase("teacher")
        torch.manual_seed(step_seed(self.seed, step, self.world.rank))
        towers = self.model if self.reduced is None else self.reduced
        ids_B = self.ids(batch) if self.with_ids else None
        loss = partial(self.loss, ids_B=ids_B, taught=taught)
        return differentiate(
            self.embedder(batch, step, towers),
            loss,
            self.model,
            len(batch.images),
            num_parts,
            1 if self.num_kept_graphs is None else self.num_kept_graphs,
            scale_loss=self.scale_loss,
            sync=partial(_pass, towers) if self.world.world_size > 1 else None,
            on_phase=on_phase,
            on_progress=on_progress,
        )

    def cutter(self, batch: Batch, step: int) -> Callable[[slice], list[Tensor | PackedText]]:
        """Return a function that makes the towers' arguments of some rows of a batch, on the host.

        Captions are packed where that is worth it, and where the text tower's features do not depend on padding.
        """
        pinned = batch.images.is_pinned()
        packs = self.pack_text and self.model.ignores_padding
        others: list[Tensor] = []
        if getattr(self.model.visual, "patch_dropout", 0.0) > 0:
            words = hash64(batch.indices.numpy(), self.seed, step, _DROPOUT)
            seeds = torch.from_numpy(words.view("int64"))
            others.append(seeds.pin_memory() if pinned else seeds)

        def cut(rows: slice) -> list[Tensor | PackedText]:
            tokens: Tensor | PackedText = batch.tokens[rows]
            if packs and is_worth_packing(batch.tokens[rows]):
                on_cpu = self.world.device.type == "cpu"
                length = fitted_length(batch.tokens[rows]) if on_cpu else PACKED_LENGTH
                tokens = pack_captions(batch.tokens[rows], length)
                tokens = tokens.pin_memory() if pinned else tokens
            return [batch.images[rows], tokens, *(other[rows] for other in others)]

        return cut

    def embedder(self, batch: Batch, step: int, towers: nn.Module) -> Embed:
        """Return a function that embeds one micro-batch of a batch with some form of the towers."""
        upload = Upload(self.cutter(batch, step), self.world.device, self._stream())

        def embed(rows: slice, following: slice | None) -> tuple[Tensor, ...]:
            parts = upload.rows(rows, following)
            with self.autocast():
                return towers(*parts)

        return embed

    @torch.no_grad()
    def features_of_teacher(
        self, batch: Batch, step: int, num_parts: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the teacher's image features and text features of a batch, [B, F], and its scale.

        The batch goes up to the device once more for it: kept there, it would take the memory of all its images.

        Args:
            num_parts: micro-batches at least, of which one is embedded at a time; there are more if one would have more
                than TEACHER_ROWS pairs. No feature depends on it.
        """
        assert self.teacher is not None
        upload = Upload(self.cutter(batch, step), self.world.device, self._stream())
        num_rows = len(batch.images)
        parts = micro_batches(num_rows, max(num_parts, -(-num_rows // TEACHER_ROWS)))
        features: list[tuple[Tensor, Tensor]] = []
        scale = self.teacher.logit_scale.exp()
        with sharing(WeightCasts(), self.teacher):
            for rows, following in zip(parts, [*parts[1:], None], strict=True):
                # Without the seeds of the student's dropout.
                images, tokens = upload.rows(rows, following)[:2]
                with self.autocast():
                    image, text, scale = self.teacher(images, tokens)[:3]
                features.append((image, text))
        image_BF, text_BF = (torch.cat(side) for side in zip(*features, strict=True))
        return image_BF, text_BF, scale

    def _stream(self) -> torch.cuda.Stream | None:
        """Return the stream of all uploads: the caching allocator pools memory per stream."""
        if self.stream is None and self.world.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.world.device)
        return self.stream

    def ids(self, batch: Batch) -> Tensor:
        """Return a batch's caption ids on the device, int64 [B]; the host does not wait for it."""
        ids_B = caption_ids(batch.tokens, self.model.ignores_padding)
        if batch.tokens.is_pinned():
            ids_B = ids_B.pin_memory()
        return ids_B.to(self.world.device, non_blocking=True)

    def loss(
        self,
        *features: Tensor,
        ids_B: Tensor | None = None,
        taught: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """Return the loss of all pairs; what it multiplies follows the precision of the run.

        Args:
            features: image features, text features, and the scalars of the loss.
            ids_B: the id of each pair's caption, which its image and its text share; None for the plain loss.
            taught: as of ``features_of_teacher``; None without a teacher.
        """
        with self.autocast():
            if taught is not None:
                contrastive, distill = self.loss_fn(*features[:3], *taught)
                # A logit bias changes no softmax. Its gradient is zero, not missing: every trained parameter has one.
                return contrastive + distill + sum(0 * bias for bias in features[3:])
            if ids_B is None:
                return self.loss_fn(*features)
            return self.loss_fn(*features, image_ids=ids_B, text_ids=ids_B)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the towers' matrix products."""
        return {"fp32": torch.float32, "amp": torch.float16}.get(self.precision, torch.bfloat16)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of mixed precision."""
        if self.precision in ("fp32", "bf16"):
            return nullcontext()  # the dtype is the weights' own
        # Casts of weights are kept until the end of the context, where a sharded model would be whole again.
        cached = not is_sharded(self.model)
        return torch.autocast(self.world.device.type, self.dtype, cache_enabled=cached)

    def needs_plan(self) -> bool:
        """Return whether ``plan`` has something to choose: the micro-batch, or how many of several keep their graphs."""
        return self.micro_batch_size is None or (
            self.num_parts > 1 and self.num_kept_graphs is None
        )

    def plan(self, batch: Batch, step: int, step_memory: float | None = None) -> StepPlan:
        """Choose ``micro_batch_size`` and ``num_kept_graphs`` where they are open, the same on every rank.

        Args:
            step_memory: GB that a step may take beside model and optimizer; None for `memory_plan.default_budget`.
        """
        device, num_rows = self.world.device, self.largest_share
        given_bytes = bytes_of(step_memory)
        budget_bytes = default_budget(device) if given_bytes is None else given_bytes
        embeddings = 2 * num_rows * self.model.config.embed_dim * torch.float32.itemsize
        fixed = {"embeddings": 2 * embeddings}  # and their gradients
        if self.teacher is not None:
            width = self.teacher.config.embed_dim
            fixed["teacher's embeddings"] = 2 * num_rows * width * torch.float32.itemsize
        if device.type == "cpu":
            fixed = {"inputs": batch.images.nbytes + batch.tokens.nbytes, **fixed}
        some = self._some_features()
        made = make_plan(
            self.embedder(batch, step, self.model),
            self.model,
            num_rows,
            device,
            fixed=fixed,
            loss_bytes=self.loss_fn.memory_bytes(some, some),
            budget_bytes=budget_bytes,
            micro_batch_size=self.micro_batch_size,
            num_kept_graphs=self.num_kept_graphs,
            all_but_last=self.world.world_size > 1,
            agree=lambda is_so: not all_reduce_flag(not is_so),
        )
        made = broadcast_object(made)
        self.micro_batch_size = made.micro_batch_size
        self.num_kept_graphs = made.num_kept_graphs
        return made

    def choose_stash(self, step_memory: float | None) -> int | None:
        """Decide what the loss's stash may take where that is open: once for the run, the same on every rank.

        Args:
            step_memory: GB that a step may take beside the model; of these a quarter at most. None has no limit.

        Returns:
            The bytes; None where there is nothing to decide: on the CPU, whose default is fixed, for a loss without a
            stash, where it is decided, and for a small batch, whose logits a GPU keeps whatever is free.
        """
        loss_fn, device = self.loss_fn, self.world.device
        if not isinstance(loss_fn, ClipLoss) or device.type != "cuda":
            return None
        if loss_fn.stash_bytes is not None or self.global_batch_size <= DENSE_SIDE:
            return None
        own_bytes = default_stash_bytes(device)
        if step_memory is not None:
            own_bytes = min(own_bytes, int(step_memory * GB / 4))
        loss_fn.stash_bytes = shared_stash_bytes(own_bytes, self.precision)
        return loss_fn.stash_bytes

    def set_faster_threads(self, batch: Batch, step: int) -> threads.Timed:
        """Compute with one thread of the CPU or with as many as now, whichever is faster; ranks do alike.

        Compiled code is for one number of threads, so blocks are compiled after this.
        """
        smallest_share = self.global_batch_size // self.world.world_size
        rows = smallest_share if self.micro_batch_size is None else self.micro_batch_size
        return threads.set_faster(
            self.embedder(batch, step, self.model),
            self.model,
            min(smallest_share, max(threads.FEWEST_ROWS, rows)),
            torch.get_num_threads(),
            all_reduce_sum,
        )

    def compile_blocks(self, batch: Batch, step: int) -> compiled.Compiled:
        """Compile the model's transformer blocks, on all ranks together."""
        smallest_share = self.global_batch_size // self.world.world_size
        return compiled.compile_now(
            self.embedder(batch, step, self.model), self.model, smallest_share
        )

    def describe_loss(self) -> str:
        """Return in a line how the loss of a step will be computed."""
        some = self._some_features()
        with self.autocast():
            said = str(self.loss_fn.plan(some, some))
        if isinstance(self.loss_fn, ClipLoss) and self.loss_fn.label_smoothing > 0:
            said += f"; label smoothing {self.loss_fn.label_smoothing:g}"
        if self.teacher is not None:
            said += f"; and the cross-entropy to the softmax of a teacher, {self.teacher.config.short_name}"
        if self.with_ids:
            said += f"; pairs of equal captions are {_EQUAL_CAPTIONS[self.loss_fn.same_id]}"
            if isinstance(self.loss_fn, ClipLoss) and self.loss_fn.same_id == "positive":
                said += " (for the softmax loss this equals negative, since equal captions have equal features)"
        return said

    def _some_features(self) -> Tensor:
        """Return as many features as a rank has pairs, in the memory of one."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        one = torch.empty(1, self.model.config.embed_dim, dtype=dtype, device=self.world.device)
        return one.expand(self.largest_share, -1)


@contextmanager
def _pass(towers: nn.Module, is_last: bool) -> Iterator[None]:
    """Wrap the passes over a micro-batch on one of several ranks."""
    name = "last passes and the gradients' average" if is_last else "passes over a micro-batch"
    with watchdog.collective(name), gradient_sync(towers, is_last):
        yield


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of a step's generators: a function of seed, step and rank, so that nothing of them needs saving."""
    digest = hashlib.sha256(f"step {seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
