"""The gradient all-gather: gathers rows and ids of every rank in one packed and checked collective, with a backward.

``start_gather`` runs csrc/all_gather.cpp if the extension is built; ``_ExchangeRef`` is its reference in torch.distributed
alone, with the same wire format and the same results.

Legend: B rows on this rank that G rows of all ranks are gathered from, E embedding size, W ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from clipcore import native
from clipcore.ranks import watchdog
from clipcore.ranks.distributed import all_gather_single, gather_equal

# torch 2.13 renamed it and warns about the old name.
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# The dtypes that start_gather carries, with their numbers in c10::ScalarType.
_DTYPE_CODES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}

# The header of a rank's part of a gather: eight int64. The last byte of the first one is the version of the format.
_HEADER_FIELDS = ("format", "rows", "columns", "dtype", "wire dtype", "ids", "gradient", "step")
_FORMAT = int.from_bytes(b"clipwir\x01", "big")


@dataclass(frozen=True)
class GatheredRows:
    """The rows and ids of all ranks, in rank order."""

    rows_GE: torch.Tensor
    """[G, E] in the dtype that each rank passed."""
    ids_G: torch.Tensor | None
    """int64 [G], or None without ids."""
    shard_sizes: tuple[int, ...]
    """The number of rows of each rank; the sum is G."""


@dataclass(frozen=True)
class _Layout:
    """The byte layout of a rank's part: header, ids, rows, each aligned to 16, with room for the largest shard."""

    max_rows: int
    ids_at: int
    rows_at: int
    part_bytes: int

    @staticmethod
    def of(max_rows: int, columns: int, wire_dtype: torch.dtype, has_ids: bool) -> _Layout:
        def aligned(num_bytes: int) -> int:
            return -(-num_bytes // 16) * 16

        ids_at = 8 * len(_HEADER_FIELDS)
        rows_at = aligned(ids_at + 8 * max_rows * has_ids)
        part_bytes = aligned(rows_at + max_rows * columns * wire_dtype.itemsize)
        return _Layout(max_rows, ids_at, rows_at, part_bytes)


class _ExchangeRef:
    """The reference of csrc/all_gather.cpp, in torch.distributed only: one gather from its start to its backward."""

    def __init__(
        self,
        x_BE: torch.Tensor,
        ids_B: torch.Tensor | None,
        header: list[int],
        shard_sizes: tuple[int, ...],
        layout: _Layout,
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
        return self.parts.view(torch.int64).view(len(self.shard_sizes), -1)[
            :, : len(_HEADER_FIELDS)
        ]

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


class _AnchorRef(torch.autograd.Function):
    """x_BE -> own_BE; the backward runs after the gather node's backward, and adds the sum that that one started."""

    @staticmethod
    def forward(ctx: Any, x_BE: torch.Tensor, exchange: _ExchangeRef) -> torch.Tensor:
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


class _GatherRef(torch.autograd.Function):
    """own_BE -> rows_GE; the backward starts the sum over ranks. Its edge to the anchor carries no gradient."""

    @staticmethod
    def forward(
        ctx: Any, own_BE: torch.Tensor, exchange: _ExchangeRef
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


class PendingGather:
    """A gather in flight, from `start_gather`.

    Attributes:
        own_BE: this rank's rows, to be used instead of x_BE where only they are needed. The gradients of both uses then
            arrive together, and the backward of the work between start and `wait` overlaps with the sum over ranks.
    """

    def __init__(
        self,
        own_BE: torch.Tensor,
        gathered: GatheredRows | None = None,
        exchange: Any = None,
        extension: Any = None,
        expected: _Expected | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.own_BE = own_BE
        self._gathered, self._group = gathered, group
        self._exchange, self._extension, self._expected = exchange, extension, expected

    def wait(self) -> GatheredRows:
        """Wait for all ranks' rows, check that they belong together, and unpack them; later calls return the same result.

        Raises:
            ValueError: a rank sent something other than this one expects (on the CPU; see `start_gather`).
        """
        if self._gathered is None:
            assert self._expected is not None, "an exchange knows its expected headers"
            with watchdog.collective("all-gather of features", self._group):
                if self._extension is None:
                    self._expected.check(self._exchange.headers())
                    rows_GE, ids_G = _GatherRef.apply(self.own_BE, self._exchange)
                else:
                    self._expected.check(self._extension.headers(self._exchange))
                    rows_GE, ids_G = self._extension.unpack_gather(self._exchange, self.own_BE)
            self._gathered = GatheredRows(rows_GE, ids_G, self._expected.shard_sizes)
            self._exchange = None
        return self._gathered


def start_gather(
    x_BE: torch.Tensor,
    ids_B: torch.Tensor | None = None,
    *,
    wire_dtype: torch.dtype | None = None,
    step: int = 0,
    shard_sizes: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> PendingGather:
    """Start to gather every rank's rows, in rank order, with the gradient of all ranks' losses.

    The backward pass sums the gradient of the gathered rows over ranks (a reduce-scatter) in float32, or in float64
    for float64 rows, adds that of ``own_BE`` and rounds once to the dtype of the rows. Each rank thus differentiates
    the sum of all ranks' losses: divide by the world size, or let DistributedDataParallel do it.

    The collective of the backward runs on every rank whose loss depends on ``own_BE`` or on the gathered rows, with zeros
    if it does not depend on the gathered rows. A rank whose loss depends on neither must add ``0 * own_BE.sum()``, or the
    others would wait for it. Gradients are those of x_BE, not of ``own_BE``.

    Args:
        x_BE: [B, E] in float16, bfloat16, float32 or float64, on the device that the group's backend serves. B may
            differ between ranks and be 0; E and the dtype may not, nor whether x_BE needs a gradient.
        ids_B: int64 [B] on the same device, the id of each row; on all ranks or on none.
        wire_dtype: dtype of the rows in transfer; None for the dtype of x_BE. If it is narrower, the gathered rows are
            rounded; ``own_BE`` is not, and neither is anything in a group of one rank.
        step: a number that must be equal on all ranks, so that a rank out of step is detected.
        shard_sizes: the rows of every rank, if they are known: there is then one collective, and nothing waits for
            another rank before `PendingGather.wait`. For None, the CPU gathers the sizes in a collective first, and CUDA
            assumes that all ranks have as many rows as this one, because nothing may wait for the host there.
        group: the ranks to gather from; None means all.

    Returns:
        The gather in flight; `PendingGather.wait` returns the rows. In a group of one rank they are x_BE itself.

    Raises:
        ValueError: an argument is invalid, or a rank disagrees, which the error names. On the CPU that error is raised
            here without ``shard_sizes``, else in `PendingGather.wait`. On CUDA a device assertion ends the step, and the
            next call names the rank. With ``shard_sizes``, ranks whose parts differ in bytes cause an error of the
            backend instead.
        native.WrongBuildError: the extension was built for another torch.

    Source: the sharded similarities of CLIP (Radford et al. 2021, section 2.5) need every rank's features, and the
    exact gradient of the whole batch needs the sum over ranks.

    >>> pending = start_gather(text_features, caption_ids, step=step)  # doctest: +SKIP
    >>> rows_GE, ids_G = pending.wait().rows_GE, pending.wait().ids_G  # doctest: +SKIP
    """
    wire_dtype = wire_dtype or x_BE.dtype
    _check_rows(x_BE, ids_B, wire_dtype)
    _raise_deferred()
    ranks = dist.get_process_group_ranks(group) if dist.is_initialized() else [0]
    if shard_sizes is not None and (len(shard_sizes) != len(ranks) or min(shard_sizes) < 0):
        raise ValueError(
            f"shard_sizes must be the numbers of rows of the {len(ranks)} ranks, got {list(shard_sizes)}"
        )
    if len(ranks) == 1:
        if shard_sizes is not None and shard_sizes[0] != len(x_BE):
            raise ValueError(f"the rank has {len(x_BE)} rows, but shard_sizes has {shard_sizes[0]}")
        return PendingGather(x_BE, GatheredRows(x_BE, ids_B, (len(x_BE),)))
    codes = (_DTYPE_CODES[x_BE.dtype], _DTYPE_CODES[wire_dtype])
    needs_gradient = x_BE.requires_grad and torch.is_grad_enabled()
    header = [_FORMAT, *x_BE.shape, *codes, int(ids_B is not None), int(needs_gradient), step]
    if shard_sizes is None:
        shard_sizes = [len(x_BE)] * len(ranks)
        if x_BE.is_cpu:
            with watchdog.collective("sizes of the shards", group):
                headers = gather_equal(torch.tensor([header]), group)
            shard_sizes = headers[:, _HEADER_FIELDS.index("rows")].tolist()
            _Expected(header, tuple(shard_sizes), ranks).check(headers)
    sizes = tuple(shard_sizes)
    layout = _Layout.of(max(sizes), x_BE.shape[1], wire_dtype, ids_B is not None)
    expected = _Expected(header, sizes, ranks)
    extension = native.load()
    if extension is None or (x_BE.is_cuda and not extension.has_cuda_kernels()):
        exchange = _ExchangeRef(x_BE, ids_B, header, sizes, layout, wire_dtype, group)
        own_BE = _AnchorRef.apply(x_BE, exchange)
        return PendingGather(own_BE, None, exchange, None, expected, group)
    group = group or dist.group.WORLD
    assert group is not None, "a group of several ranks exists"
    exchange, own_BE = extension.start_gather(
        *(x_BE, ids_B, header, sizes),
        *(layout.ids_at, layout.rows_at, layout.part_bytes, wire_dtype, group.group_name),
    )
    return PendingGather(own_BE, None, exchange, extension, expected, group)


def _check_rows(x_BE: torch.Tensor, ids_B: torch.Tensor | None, wire_dtype: torch.dtype) -> None:
    if x_BE.dim() != 2 or x_BE.dtype not in _DTYPE_CODES:
        raise ValueError(
            "x_BE must be [B, E] in float16, bfloat16, float32 or float64, got "
            f"{list(x_BE.shape)} {x_BE.dtype}"
        )
    if wire_dtype not in _DTYPE_CODES:
        raise ValueError(
            f"wire_dtype must be float16, bfloat16, float32, float64 or None, got {wire_dtype}"
        )
    if ids_B is not None and (
        ids_B.shape != x_BE.shape[:1] or ids_B.dtype != torch.int64 or ids_B.device != x_BE.device
    ):
        raise ValueError(
            f"ids_B must be int64 [{len(x_BE)}] on {x_BE.device}, one for each row of x_BE, got "
            f"{list(ids_B.shape)} {ids_B.dtype} on {ids_B.device}"
        )


@dataclass(frozen=True)
class _Expected:
    """The expected headers: this rank's own, except for the number of rows."""

    header: list[int]
    shard_sizes: tuple[int, ...]
    ranks: list[int]
    """The global ranks of the group."""

    def all_headers(self) -> list[list[int]]:
        at = _HEADER_FIELDS.index("rows")
        return [[*self.header[:at], size, *self.header[at + 1 :]] for size in self.shard_sizes]

    def check(self, headers: torch.Tensor) -> None:
        """Raise a ValueError that names the first rank that differs; on CUDA assert on the device, and raise later."""
        if not headers.is_cuda:
            self.raise_if_wrong(headers.tolist())
            return
        # One pinned buffer: the expected headers are copied to the device, the received ones back. Until then it holds the
        # expected ones, so the host does not mistake another device error for a wrong header.
        host = torch.tensor(self.all_headers()).pin_memory()
        right = (headers == host.to(headers.device, non_blocking=True)).all()
        host.copy_(headers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        _deferred.append((self, host, arrived))
        torch._assert_async(right, "start_gather: ranks disagree; the next call names the rank")

    def raise_if_wrong(self, headers: list[list[int]]) -> None:
        for rank, theirs, ours in zip(self.ranks, headers, self.all_headers(), strict=True):
            if theirs != ours:
                differences = [
                    _difference(*both)
                    for both in zip(_HEADER_FIELDS, theirs, ours, strict=True)
                    if both[1] != both[2]
                ]
                if theirs[0] != ours[0]:
                    differences = differences[:1]  # the rest then has another meaning
                raise ValueError(
                    f"start_gather: rank {rank} {', '.join(differences)}; all ranks must make the same calls in "
                    "the same order, with rows of one width and dtype"
                )


def _difference(field: str, theirs: int, ours: int) -> str:
    """Return how a rank differs from what this one expects, as part of a sentence about that rank."""
    if field == "format":
        return (
            f"sent a header of format {theirs:#x}, this rank {ours:#x}: run one version of clipcore"
        )
    if field == "rows":
        return f"has {theirs} rows, but shard_sizes has {ours}"
    if field == "step":
        return f"is at step {theirs}, this rank at step {ours}"
    if field == "ids":
        return "passes ids, this rank none" if theirs else "passes no ids, this rank does"
    if field == "gradient":
        return "needs a gradient, this rank none" if theirs else "needs no gradient, this rank does"
    names = {code: str(dtype) for dtype, code in _DTYPE_CODES.items()} if "dtype" in field else {}
    return f"has {field} {names.get(theirs, theirs)}, this rank {names.get(ours, ours)}"


# Headers in transfer from the GPU to the host, oldest first.
_deferred: deque[tuple[_Expected, torch.Tensor, Any]] = deque()


def _raise_deferred() -> None:
    """Raise ValueError for an earlier gather whose headers have arrived from the GPU and are wrong."""
    while _deferred:
        expected, host, arrived = _deferred[0]
        try:
            if not arrived.query():
                return
        except RuntimeError:
            pass  # the device has failed, perhaps in this very check; the headers that it copied before are still valid
        _deferred.popleft()
        expected.raise_if_wrong(host.tolist())
