"""From the host to the device: rows of a batch that lies in page-locked memory, copied while others are computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Upload:
    """Rows of some tensors on a device, one slice after the other.

    With a stream the rows that will be asked for next are under way while these are computed; at
    most two slices are there at a time. On the CPU rows are views.

    Args:
        tensors: of one length each, on the host; page-locked ones are copied without the host waiting.
        stream: of the copies, on a GPU; None copies when asked.

    >>> upload = Upload([torch.arange(6)], torch.device("cpu"))
    >>> upload.rows(slice(0, 2), slice(2, 4))
    [tensor([0, 1])]
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        device: torch.device,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.tensors, self.device, self._stream = tensors, device, stream
        self._ahead: tuple[slice, list[Tensor]] | None = None

    def rows(self, rows: slice, following: slice | None = None) -> list[Tensor]:
        """These rows of each tensor on the device.

        Args:
            following: the rows that will be asked for next; None for nothing known.
        """
        if self._stream is None:
            return [tensor[rows].to(self.device) for tensor in self.tensors]
        under_way, self._ahead = self._ahead, None
        if under_way is None or under_way[0] != rows:
            under_way = rows, self._copy(rows)
        found = under_way[1]
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        for tensor in found:
            tensor.record_stream(computing)
        # Only now, so that the copy of these rows is not waited for together with the next.
        self._ahead = None if following is None else (following, self._copy(following))
        return found

    def _copy(self, rows: slice) -> list[Tensor]:
        with torch.cuda.stream(self._stream):
            return [tensor[rows].to(self.device, non_blocking=True) for tensor in self.tensors]
