"""From the host to the device: rows of a batch that lies in page-locked memory, copied while others are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clipcore.data.packing import PackedText

Part = Tensor | PackedText


class Upload:
    """Rows of a batch on a device, one slice after the other.

    With a stream the rows that will be asked for next are under way while these are computed; at
    most two slices are there at a time. On the CPU rows are views.

    Args:
        cut: makes the parts of a slice on the host; page-locked ones are copied without the host waiting.
        stream: of the copies, on a GPU; None copies when asked.

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
        """The parts of these rows on the device.

        Args:
            following: the rows that will be asked for next; None for nothing known.
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
        # Only now, so that the copy of these rows is not waited for together with the next.
        self._ahead = None if following is None else (following, self._copy(following))
        return found

    def _copy(self, rows: slice) -> list[Part]:
        with torch.cuda.stream(self._stream):
            return [part.to(self.device, non_blocking=True) for part in self.cut(rows)]
