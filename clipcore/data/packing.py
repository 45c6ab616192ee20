"""Captions packed into rows of 128 tokens: a causal tower with its feature at the end-of-text token needs no padding.

Legend: B captions, L tokens of a padded row, R packed rows, P tokens of a packed row, M tokens of the longest caption.

Captions have 16 tokens on average and padded rows have 77. A causal token does not attend to later tokens, so the tokens
after the end-of-text token change no feature and no gradient. Packing removes them: whole captions share rows of
``PACKED_LENGTH`` tokens, with their own positions, and attend only within themselves. This leaves a fifth of the tokens.
It is exact for finite numbers; a NaN spreads over its packed row, while a padded row would keep it in its caption.
"""

from __future__ import annotations

import heapq
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

PACKED_LENGTH = 128
# A batch's number of rows is rounded up by at most 1/16, so that compiled code and allocators see few shapes.
ROUNDING = 16
# Captions are packed from this ratio of tokens with padding to tokens without.
WORTHWHILE = 1.5


class PackedText(NamedTuple):
    """Captions in packed rows, which ``pack_captions`` returns and ``encode_text`` accepts.

    Attributes:
        ids_RP: token ids, 0 where there is no token.
        positions_RP: position of a token in its caption.
        segments_RP: int32, the caption that a token belongs to, -1 where there is no token.
        slots_BM: index of each token of a caption in the flattened rows; -1 after its end.
        lengths_B: tokens of each caption, up to and with its end-of-text token.
    """

    ids_RP: Tensor
    positions_RP: Tensor
    segments_RP: Tensor
    slots_BM: Tensor
    lengths_B: Tensor

    @property
    def ends_B(self) -> Tensor:
        """Index of each caption's end-of-text token in the flattened rows."""
        return self.slots_BM.gather(1, self.lengths_B[:, None] - 1).squeeze(1)

    def unpacked(self, x_RPD: Tensor) -> Tensor:
        """Return the tokens' values by caption, [B, M, D], 0 after a caption's end; differentiable."""
        return _Unpacked.apply(x_RPD, self.slots_BM, self.segments_RP, self.positions_RP)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedText:
        return PackedText(*(part.to(device, non_blocking=non_blocking) for part in self))

    def pin_memory(self) -> PackedText:
        return PackedText(*(part.pin_memory() for part in self))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Record that a stream uses the tensors; see ``Tensor.record_stream``."""
        for part in self:
            part.record_stream(stream)


def check_token_rows(text: object) -> None:
    """Raise TypeError unless captions are a tensor of integers."""
    if not isinstance(text, Tensor):
        raise TypeError(
            f"the model takes captions as token ids in a tensor, got {type(text).__name__}; get_tokenizer(model_name) makes "
            "them of text"
        )
    if text.is_floating_point() or text.is_complex() or text.dtype == torch.bool:
        raise TypeError(f"the model takes token ids as whole numbers, got {text.dtype}")
    if text.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"the model takes token ids of 32 or 64 bits, got {text.dtype}; use .long()"
        )


def pack_captions(text_BL: Tensor, length: int = PACKED_LENGTH) -> PackedText:
    """Pack padded token rows, on the host.

    Args:
        text_BL: int64 [B, L] as a tokenizer returns them. A caption ends at the first of its largest ids, as for
            ``encode_text``; later tokens are left out.
        length: tokens of a packed row; longer captions make the rows longer.

    Raises:
        ValueError: the shape is not [B, L].
        TypeError: these are not token ids, but for example text.

    >>> pack_captions(torch.tensor([[1, 5, 9, 0], [1, 9, 0, 0]])).ids_RP[0, :6]
    tensor([1, 5, 9, 1, 9, 0])
    """
    check_token_rows(text_BL)
    if text_BL.ndim != 2 or 0 in text_BL.shape:
        raise ValueError(f"token rows must be [B, L], got {list(text_BL.shape)}")
    text = text_BL.numpy(force=True)
    lengths = text.argmax(1) + 1
    length = max(length, int(lengths.max()))
    row_of, start_of, num_rows = _best_fit(lengths, length)
    num_rows = _rounded(num_rows)

    captions = np.repeat(np.arange(len(lengths)), lengths)
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    slots = (row_of * length + start_of)[captions] + positions
    rows = np.zeros((3, num_rows * length), np.int64)
    rows[2] = -1
    rows[0, slots] = text[captions, positions]
    rows[1, slots] = positions
    rows[2, slots] = captions
    slots_BM = np.full((len(lengths), lengths.max()), -1)
    slots_BM[captions, positions] = slots
    ids, positions_RP, segments = torch.from_numpy(rows.reshape(3, num_rows, length))
    return PackedText(
        *(ids.to(text_BL.dtype), positions_RP, segments.int()),
        *(torch.from_numpy(slots_BM), torch.from_numpy(lengths)),
    )


def fitted_length(text_BL: Tensor) -> int:
    """Return the row length, at most about ``PACKED_LENGTH``, that gives these captions the least padding.

    It is for a CPU, which does not need the same shape for all batches. Eight captions, 130 tokens together, in two rows
    of 128 would be half padding.
    """
    lengths = (text_BL.argmax(1) + 1).numpy(force=True)
    total, longest = int(lengths.sum()), int(lengths.max())
    num_rows = _rounded(-(-total // max(PACKED_LENGTH, longest)))
    length = max(longest, -(-total // num_rows))
    while length < PACKED_LENGTH and _best_fit(lengths, length)[2] > num_rows:
        length += max(1, length // 32)
    return min(length, max(PACKED_LENGTH, longest))


def _rounded(num_rows: int) -> int:
    step = max(1, (1 << (num_rows.bit_length() - 1)) // ROUNDING)
    return -(-num_rows // step) * step


def is_worth_packing(text_BL: Tensor) -> bool:
    """Return whether rows as long as the longest caption hold more than 1.5 times the tokens of the captions.

    Below that ratio, attention within 128 tokens costs more than the padding.
    """
    lengths_B = text_BL.argmax(1) + 1
    longest = int(lengths_B.max()) if len(lengths_B) else 0
    return len(lengths_B) * longest > WORTHWHILE * int(lengths_B.sum())


def _best_fit(lengths_B: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return (row of each caption, its first token there, number of rows), by the best-fit heuristic.

    The longest caption comes first. Each goes into the fullest row with enough room, the first of equal ones.
    """
    row_of, start_of = (np.empty(len(lengths_B), np.int64) for _ in range(2))
    with_room: list[list[int]] = [
        [] for _ in range(row_length + 1)
    ]  # heaps of rows, by their free tokens
    num_rows = 0
    for caption in np.argsort(-lengths_B, kind="stable").tolist():
        length = int(lengths_B[caption])
        room = next((r for r in range(length, row_length) if with_room[r]), row_length)
        if room == row_length:
            row, num_rows = num_rows, num_rows + 1
        else:
            row = heapq.heappop(with_room[room])
        row_of[caption], start_of[caption] = row, row_length - room
        heapq.heappush(with_room[room - length], row)
    return row_of, start_of, num_rows


class _Unpacked(torch.autograd.Function):
    """Gathers tokens by caption. Each token has one slot, so the gradient is a gather too, without sums whose order
    could change."""

    @staticmethod
    def forward(
        ctx: Any, x_RPD: Tensor, slots_BM: Tensor, segments_RP: Tensor, positions_RP: Tensor
    ) -> Tensor:
        ctx.save_for_backward(segments_RP, positions_RP)
        return _gathered(x_RPD.flatten(0, 1), slots_BM)

    @staticmethod
    def backward(ctx: Any, grad_BMD: Tensor) -> tuple[Tensor, None, None, None]:
        segments_RP, positions_RP = ctx.saved_tensors
        places_RP = segments_RP * grad_BMD.shape[1] + positions_RP
        places_RP = torch.where(segments_RP < 0, -1, places_RP)
        return _gathered(grad_BMD.flatten(0, 1), places_RP), None, None, None


def _gathered(x_ND: Tensor, places: Tensor) -> Tensor:
    """Return rows of ``x_ND`` by index, in the shape of the indices; 0 where an index is negative."""
    found = x_ND[places.clamp(min=0)]
    return found.masked_fill_((places < 0).unsqueeze(-1), 0)
