"""Copies rows of a batch from page-locked host memory to the device, while other rows are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clipcore.data.packing import PackedText

Part = Tensor | PackedText


class Upload:
    """Rows of a batch on a device, one slice after the other.

    With a stream, the next rows are copied while the current ones are computed; at most two slices
    are on the device at a time. On the CPU, rows are views.

    Args:
        cut: makes the parts of a slice on the host; the host does not wait for the copies of page-locked parts.
        stream: the GPU stream of the copies; None copies on demand.

    >>> upload = Upload(lambda rows: [torch.arange(6)[rows]], torch.device("cpu"))
    >>> upload.rows(slice(0, 2), slice(2, 4))
    [tensor([0, 1])]
    """

    def __init__(
        self,
        cut: Callable[[slice], Sequence[Part]],
        device: torch.device,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.cut, self.device, self._stream = cut, device, stream
        self._ahead: tuple[slice, list[Part]] | None = None

    def rows(self, rows: slice, following: slice | None = None) -> list[Part]:
        """Return the parts of these rows on the device.

        Args:
            following: the rows that will be needed next; None if unknown.
        """
        if self._stream is None:
            return [part.to(self.device) for part in self.cut(rows)]
        under_way, self._ahead = self._ahead, None
        if under_way is None or under_way[0] != rows:
            under_way = rows, self._copy(rows)
        found = under_way[1]
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        for part in found:
            part.record_stream(computing)
        # Started only now, so that waiting for these rows does not include the next copy.
        self._ahead = None if following is None else (following, self._copy(following))
        return found

    def _copy(self, rows: slice) -> list[Part]:
        with torch.cuda.stream(self._stream):
            return [part.to(self.device, non_blocking=True) for part in self.cut(rows)]
