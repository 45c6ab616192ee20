"""A rank's shard of the logits of several ranks: its rows of one side against all rows of the other.

Legend: B rows of one side on this rank, G of the other on all ranks, E embedding size.

Each rank keeps its rows of the larger side, the resident one, and gathers the rows of the smaller one. During the gather it
computes the block of its own columns, then the blocks of the other ranks. Each logit is computed once, on one rank. Sums
over a row are complete there; sums over a column are complete after an all-reduce of [G] numbers. The gradient of the
resident side is complete too. A reduce-scatter in float32 sums the gradient of the gathered side, while the rank
differentiates its own block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.logits.pairs import choose_operand
from clipcore.loss.all_gather import PendingGather, start_gather
from clipcore.ranks.distributed import all_reduce_, gather_sizes


class Side(NamedTuple):
    """This rank's rows of one side, and their ids."""

    rows: Tensor
    ids: Tensor | None


class Block(NamedTuple):
    """A block of columns of this rank's shard, from one or several ranks."""

    rows: Tensor
    ids: Tensor | None
    columns: slice
    first_label: int
    is_own: bool


class LossGroup:
    """The ranks that share a loss. Every rank must make the same calls, which are counted to detect a rank out of step."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        wire_dtype: torch.dtype | None,
        uneven: bool,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.rank, self.world_size, self.group = rank, world_size, group
        self.wire_dtype, self.uneven = wire_dtype, uneven
        self.num_calls = 0

    def shard(self, image: Side, text: Side) -> LogitShard:
        """Return this rank's rows of the larger side against all rows of the smaller one; the gather has started."""
        own = len(image.rows), len(text.rows)
        known = [own] * self.world_size
        if image.rows.is_cpu or self.uneven:
            known = gather_sizes(*own, "sizes of the shards", self.group)
        image_shards, text_shards = (tuple(side) for side in zip(*known, strict=True))
        resident, sent, resident_shards, shards = image, text, image_shards, text_shards
        if sum(image_shards) < sum(text_shards):
            resident, sent, resident_shards, shards = text, image, text_shards, image_shards
        num_pairs = sum(map(min, image_shards, text_shards))
        if num_pairs == 0:
            raise ValueError("no rank has a pair: image_features and text_features have no rows")
        # In float32, so that gradients are summed in it.
        wide = launch.accumulate_dtype(torch.promote_types(image.rows.dtype, text.rows.dtype))
        self.num_calls += 1
        pending = start_gather(
            sent.rows.to(wide),
            sent.ids,
            wire_dtype=self.wire_dtype or sent.rows.dtype,
            step=self.num_calls,
            shard_sizes=shards,
            group=self.group,
        )
        return LogitShard(
            resident=resident,
            resident_shards=resident_shards,
            own_ids=sent.ids,
            shards=shards,
            rank=self.rank,
            pending=pending,
            num_pairs=num_pairs,
            num_images=sum(image_shards),
            promoted=torch.promote_types(image.rows.dtype, text.rows.dtype),
        )


@dataclass
class LogitShard:
    """This rank's rows of one side against all rows of the other; see `LossGroup.shard`."""

    resident: Side
    resident_shards: tuple[int, ...]
    own_ids: Tensor | None  # for this rank's rows of the gathered side
    shards: tuple[int, ...]
    rank: int
    pending: PendingGather
    num_pairs: int  # of all ranks
    num_images: int  # of all ranks
    promoted: torch.dtype  # of both sides, as passed by the caller

    @property
    def own(self) -> slice:
        """This rank's own columns."""
        first = sum(self.shards[: self.rank])
        return slice(first, first + self.shards[self.rank])

    @property
    def num_own_pairs(self) -> int:
        return min(self.resident_shards[self.rank], self.shards[self.rank])

    def all_ids(self) -> Tensor:
        """Return the ids of all columns."""
        ids_G = self.pending.wait().ids_G
        assert ids_G is not None
        return ids_G

    def operand(self, asked: torch.dtype | None) -> torch.dtype | None:
        """Return the dtype of a GPU's products: chosen by the original features, although rows are widened to float32."""
        if not self.resident.rows.is_cuda:
            return asked
        given = self.resident.rows.new_empty(0, 1, dtype=self.promoted)
        return choose_operand(given, given, asked)

    def blocks(self) -> Iterator[Block]:
        """Yield the shard in blocks: this rank's own columns during the gather, then those of the other ranks."""
        own = self.own
        yield Block(self.pending.own_BE, self.own_ids, own, 0, True)
        gathered = self.pending.wait()
        others = (slice(0, own.start), own, slice(own.stop, sum(self.shards)))
        parts = gathered.rows_GE.split([part.stop - part.start for part in others])
        for rows, columns in zip(parts, others, strict=True):
            if columns == own or columns.start == columns.stop:
                continue
            ids = None if gathered.ids_G is None else gathered.ids_G[columns]
            # These columns hold no pair by position.
            yield Block(rows, ids, columns, len(rows), False)


class CompleteLse(torch.autograd.Function):
    """Log of the sum over ranks of exp(lse); the gradient is that of the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, lse_G: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        # The maximum first, so that no exponential overflows.
        maximum_G = lse_G.clone()
        all_reduce_(maximum_G, "columns' maximum", dist.ReduceOp.MAX, group)
        total_G = (lse_G - maximum_G).exp()
        all_reduce_(total_G, "columns' sum", group=group)
        complete_G = total_G.log_() + maximum_G
        ctx.save_for_backward(lse_G, complete_G)
        ctx.group = group
        return complete_G

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_G: Tensor) -> tuple[Tensor, None]:
        lse_G, complete_G = ctx.saved_tensors
        grad_G = grad_G.contiguous().clone()
        all_reduce_(grad_G, "columns' gradient", group=ctx.group)
        return grad_G * (lse_G - complete_G).exp(), None


class CompleteSum(torch.autograd.Function):
    """The sum over ranks; the gradient is that of the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, part_G: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        complete_G = part_G.clone()
        all_reduce_(complete_G, "columns' targets", group=group)
        return complete_G

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_G: Tensor) -> tuple[Tensor, None]:
        grad_G = grad_G.contiguous().clone()
        all_reduce_(grad_G, "columns' gradient", group=ctx.group)
        return grad_G, None
