"""What a rank sends in a gradient all-gather: a header, ids and rows, and how the headers of all ranks are checked.

csrc/all_gather.cpp and ``exchange.py`` move the same bytes; only this file writes and checks the headers.

Legend: ``clipcore.loss.all_gather``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

# The dtypes that start_gather carries, with their numbers in c10::ScalarType.
DTYPE_CODES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}

# The header of a rank's part of a gather: eight int64. The last byte of the first one is the version of the format.
HEADER_FIELDS = ("format", "rows", "columns", "dtype", "wire dtype", "ids", "gradient", "step")
FORMAT = int.from_bytes(b"clipwir\x01", "big")


@dataclass(frozen=True)
class Layout:
    """The byte layout of a rank's part: header, ids, rows, each aligned to 16, with room for the largest shard."""

    max_rows: int
    ids_at: int
    rows_at: int
    part_bytes: int

    @staticmethod
    def of(max_rows: int, columns: int, wire_dtype: torch.dtype, has_ids: bool) -> Layout:
        def aligned(num_bytes: int) -> int:
            return -(-num_bytes // 16) * 16

        ids_at = 8 * len(HEADER_FIELDS)
        rows_at = aligned(ids_at + 8 * max_rows * has_ids)
        part_bytes = aligned(rows_at + max_rows * columns * wire_dtype.itemsize)
        return Layout(max_rows, ids_at, rows_at, part_bytes)


@dataclass(frozen=True)
class ExpectedHeaders:
    """The expected headers: this rank's own, except for the number of rows."""

    header: list[int]
    shard_sizes: tuple[int, ...]
    ranks: list[int]
    """The global ranks of the group."""

    def all_headers(self) -> list[list[int]]:
        at = HEADER_FIELDS.index("rows")
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
                    for both in zip(HEADER_FIELDS, theirs, ours, strict=True)
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
    names = {code: str(dtype) for dtype, code in DTYPE_CODES.items()} if "dtype" in field else {}
    return f"has {field} {names.get(theirs, theirs)}, this rank {names.get(ours, ours)}"


# Headers in transfer from the GPU to the host, oldest first.
_deferred: deque[tuple[ExpectedHeaders, torch.Tensor, Any]] = deque()


def raise_deferred() -> None:
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
