"""The reference of csrc/all_gather.cpp in torch.distributed alone: the same wire format, nodes and results.

Legend and gradients: ``clipcore.loss.all_gather``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from clipcore.loss.wire import HEADER_FIELDS, Layout
from clipcore.ranks import watchdog
from clipcore.ranks.distributed import all_gather_single

# torch 2.13 renamed it and warns about the old name.
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ExchangeRef:
    """The reference of csrc/all_gather.cpp, in torch.distributed only: one gather from its start to its backward."""

    def __init__(
        self,
        x_BE: torch.Tensor,
        ids_B: torch.Tensor | None,
        header: list[int],
        shard_sizes: tuple[int, ...],
        layout: Layout,
        wire_dtype: torch.dtype,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.shard_sizes, self.layout, self.group = shard_sizes, layout, group
        self.wire_dtype, self.has_ids = wire_dtype, ids_B is not None
        self.dtype, self.device, self.rows = x_BE.dtype, x_BE.device, x_BE.shape
        self.sum: tuple[torch.Tensor, Any] | None = None
        part = self._pack(x_BE.detach(), ids_B, header)
        self.parts: torch.Tensor | None = part.new_empty(len(shard_sizes) * layout.part_bytes)
        self.gathering: Any = all_gather_single(self.parts, part, group=group, async_op=True)

    def _pack(
        self, x_BE: torch.Tensor, ids_B: torch.Tensor | None, header: list[int]
    ) -> torch.Tensor:
        # Rows that do not fit are not sent; the header tells all ranks that there are too many.
        x_BE = x_BE[: self.layout.max_rows]
        part = torch.empty(self.layout.part_bytes, dtype=torch.uint8, device=self.device)
        words = torch.tensor(header)
        if part.is_cuda:
            words = words.pin_memory()  # only then does the host not wait for the copy
        self._numbers(part, 0, len(header), torch.int64).copy_(words, non_blocking=True)
        if ids_B is not None:
            ids_B = ids_B[: self.layout.max_rows]
            self._numbers(part, self.layout.ids_at, len(ids_B), torch.int64).copy_(ids_B)
        rows = self._numbers(part, self.layout.rows_at, x_BE.numel(), self.wire_dtype)
        rows.view(x_BE.shape).copy_(x_BE)
        return part

    @staticmethod
    def _numbers(part: torch.Tensor, at: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        return part[at : at + count * dtype.itemsize].view(dtype)

    def headers(self) -> torch.Tensor:
        self.gathering.wait()
        assert self.parts is not None, "the buffer lives until the rows are taken"
        return self.parts.view(torch.int64).view(len(self.shard_sizes), -1)[:, : len(HEADER_FIELDS)]

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self.parts is not None, "rows are taken once"
        parts = self.parts.view(len(self.shard_sizes), -1)
        columns, rows, ids = self.rows[1], [], []
        for part, size in zip(parts, self.shard_sizes, strict=True):
            numbers = self._numbers(part, self.layout.rows_at, size * columns, self.wire_dtype)
            rows.append(numbers.view(size, columns))
            ids.append(self._numbers(part, self.layout.ids_at, size * self.has_ids, torch.int64))
        self.parts = self.gathering = None
        return torch.cat(rows).to(self.dtype), torch.cat(ids) if self.has_ids else None

    def start_sum(self, grad_GE: torch.Tensor | None) -> None:
        if self.sum is not None and self.sum[1] is not None:  # from a backward that ended early
            self.sum[1].wait()
        sum_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        shape = (len(self.shard_sizes), self.layout.max_rows, self.rows[1])
        summand = torch.zeros(shape, dtype=sum_dtype, device=self.device)
        if grad_GE is not None:
            for block, grad in zip(summand, grad_GE.split(self.shard_sizes), strict=True):
                block[: len(grad)] = grad
        total = summand.new_empty(shape[1:])
        work = None
        if total.numel() > 0:
            work = _reduce_scatter_single(
                total, summand.flatten(0, 1), group=self.group, async_op=True
            )
        self.sum = total, work

    def take_sum(self) -> torch.Tensor:
        if self.sum is None:
            self.start_sum(None)
        assert self.sum is not None
        (total, work), self.sum = self.sum, None
        if work is not None:
            with watchdog.collective("reduce-scatter of the features' gradient", self.group):
                work.wait()
        return total[: self.rows[0]]


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise ValueError(
            "start_gather has no second derivative: call backward without create_graph=True"
        )


class AnchorRef(torch.autograd.Function):
    """x_BE -> own_BE; the backward runs after the gather node's backward, and adds the sum that that one started."""

    @staticmethod
    def forward(ctx: Any, x_BE: torch.Tensor, exchange: ExchangeRef) -> torch.Tensor:
        ctx.exchange = exchange
        ctx.set_materialize_grads(False)
        return x_BE

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        _refuse_second_derivative()
        total_BE = ctx.exchange.take_sum()
        if grads[0] is not None:
            total_BE += grads[0]
        return total_BE.to(ctx.exchange.dtype), None


class GatherRef(torch.autograd.Function):
    """own_BE -> rows_GE; the backward starts the sum over ranks. Its edge to the anchor carries no gradient."""

    @staticmethod
    def forward(
        ctx: Any, own_BE: torch.Tensor, exchange: ExchangeRef
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.exchange = exchange
        ctx.set_materialize_grads(False)
        rows_GE, ids_G = exchange.unpack()
        if ids_G is not None:
            ctx.mark_non_differentiable(ids_G)
        return rows_GE, ids_G

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[None, None]:
        _refuse_second_derivative()
        ctx.exchange.start_sum(grads[0])
        return None, None
