"""The gradient all-gather: gathers rows and ids of every rank in one packed and checked collective, with a backward.

``start_gather`` runs csrc/all_gather.cpp if the extension is built, else its reference in ``exchange.py``; ``wire.py`` says
what a rank sends.

Legend: B rows on this rank that G rows of all ranks are gathered from, E embedding size, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from clipcore import native
from clipcore.loss.exchange import AnchorRef, ExchangeRef, GatherRef
from clipcore.loss.wire import (
    DTYPE_CODES,
    FORMAT,
    HEADER_FIELDS,
    ExpectedHeaders,
    Layout,
    raise_deferred,
)
from clipcore.ranks import watchdog
from clipcore.ranks.distributed import gather_equal


@dataclass(frozen=True)
class GatheredRows:
    """The rows and ids of all ranks, in rank order."""

    rows_GE: torch.Tensor
    """[G, E] in the dtype that each rank passed."""
    ids_G: torch.Tensor | None
    """int64 [G], or None without ids."""
    shard_sizes: tuple[int, ...]
    """The number of rows of each rank; the sum is G."""


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
        expected: ExpectedHeaders | None = None,
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
                    rows_GE, ids_G = GatherRef.apply(self.own_BE, self._exchange)
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
    raise_deferred()

    ranks = dist.get_process_group_ranks(group) if dist.is_initialized() else [0]
    if shard_sizes is not None and (len(shard_sizes) != len(ranks) or min(shard_sizes) < 0):
        raise ValueError(
            f"shard_sizes must be the numbers of rows of the {len(ranks)} ranks, got {list(shard_sizes)}"
        )

    if len(ranks) == 1:
        if shard_sizes is not None and shard_sizes[0] != len(x_BE):
            raise ValueError(f"the rank has {len(x_BE)} rows, but shard_sizes has {shard_sizes[0]}")
        return PendingGather(x_BE, GatheredRows(x_BE, ids_B, (len(x_BE),)))

    codes = (DTYPE_CODES[x_BE.dtype], DTYPE_CODES[wire_dtype])
    needs_gradient = x_BE.requires_grad and torch.is_grad_enabled()
    header = [FORMAT, *x_BE.shape, *codes, int(ids_B is not None), int(needs_gradient), step]
    sizes = _sizes_of_all(x_BE, header, ranks, group) if shard_sizes is None else tuple(shard_sizes)

    layout = Layout.of(max(sizes), x_BE.shape[1], wire_dtype, ids_B is not None)
    expected = ExpectedHeaders(header, sizes, ranks)
    # The reference serves what the extension cannot.
    extension = native.load()
    if extension is None or (x_BE.is_cuda and not extension.has_cuda_kernels()):
        exchange = ExchangeRef(x_BE, ids_B, header, sizes, layout, wire_dtype, group)
        own_BE = AnchorRef.apply(x_BE, exchange)
        return PendingGather(own_BE, None, exchange, None, expected, group)

    group = group or dist.group.WORLD
    assert group is not None, "a group of several ranks exists"
    exchange, own_BE = extension.start_gather(
        x_BE,
        ids_B,
        header,
        sizes,
        layout.ids_at,
        layout.rows_at,
        layout.part_bytes,
        wire_dtype,
        group.group_name,
    )
    return PendingGather(own_BE, None, exchange, extension, expected, group)


def _sizes_of_all(
    x_BE: torch.Tensor, header: list[int], ranks: list[int], group: dist.ProcessGroup | None
) -> tuple[int, ...]:
    """Return the number of rows of each rank: the CPU asks them, CUDA takes this rank's for all (see `start_gather`)."""
    if not x_BE.is_cpu:
        return (len(x_BE),) * len(ranks)
    with watchdog.collective("sizes of the shards", group):
        headers = gather_equal(torch.tensor([header]), group)
    sizes = tuple(headers[:, HEADER_FIELDS.index("rows")].tolist())
    ExpectedHeaders(header, sizes, ranks).check(headers)
    return sizes


def _check_rows(x_BE: torch.Tensor, ids_B: torch.Tensor | None, wire_dtype: torch.dtype) -> None:
    """Raise a ValueError that says what is wrong with the arguments of `start_gather`."""
    if x_BE.dim() != 2 or x_BE.dtype not in DTYPE_CODES:
        raise ValueError(
            "x_BE must be [B, E] in float16, bfloat16, float32 or float64, got "
            f"{list(x_BE.shape)} {x_BE.dtype}"
        )
    if wire_dtype not in DTYPE_CODES:
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
