"""The walk over blocks of logits on the CPU: products of large blocks, passes over chunks that stay in the cache.

Legend: ``clipcore.kernels.logits``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clipcore.kernels.logits.pages import buffer
from clipcore.kernels.logits.pairs import LossInputs, Pairs, slices
from clipcore.kernels.normalize import normalize_bwd_ref, normalize_ref

# Columns of a block. A block is as large as the workspace, for the library's products; the passes over its elements
# walk over chunks of its rows that stay in the cache.
MOST_COLUMNS = 8192
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class LogitBlock:
    """A block of logits: where it lies, and its values [R, C]."""

    rows: slice
    columns: slice
    values_RC: Tensor


@dataclass(frozen=True)
class LogitChunk:
    """Some rows of a block that stay in the cache.

    Attributes:
        rows: among all.
        values_RC: a view of the block's.
        spare_RC: a buffer of their size, whose values are of no meaning.
        pairs: theirs.
    """

    rows: slice
    values_RC: Tensor
    spare_RC: Tensor
    pairs: Pairs


class LogitWalk:
    """Walk over the blocks of B x G logits, and add up the gradients that a pass leaves of each.

    Args:
        inputs: the rows.
        factor: what a cosine is multiplied with, one element in float64.
        stash_BG: where the blocks are to stay, the whole matrix; without it they share a buffer.
        is_multiplied: whether the blocks hold logits; False leaves them to be filled.
        need: whether the gradients of images and of texts are wanted; one side's are summed for the scale's in any case.
            None where blocks leave no gradients.

    Attributes:
        x_BE, y_GE: the operands, float32, or float64 where one side is.

    >>> for block in walk:  # doctest: +SKIP
    ...     for chunk in walk.chunks(block):
    ...         chunk.values_RC.exp_()
    ...     walk.add_gradient(block)
    """

    def __init__(
        self,
        inputs: LossInputs,
        factor: Tensor,
        *,
        stash_BG: Tensor | None = None,
        is_multiplied: bool = True,
        need: tuple[bool, bool] | None = None,
    ) -> None:
        self.inputs, self._factor = inputs, factor
        self._stash_BG, self._is_multiplied = stash_BG, is_multiplied
        self.x_BE = unit_rows(inputs.image_BE, inputs.normalized, inputs.operand)
        self.y_GE = unit_rows(inputs.text_GE, inputs.normalized, inputs.operand)
        self._need = (False, False) if need is None else need
        self._sums_image = need is not None and (need[0] or not need[1])
        self._sums_text = need is not None and need[1]
        # Contiguous, whatever the embeddings are: the operators' fakes say so.
        self._image_sum = self.x_BE.new_zeros(self.x_BE.shape if self._sums_image else 0)
        self._text_sum = self.y_GE.new_zeros(self.y_GE.shape if self._sums_text else 0)

        self._side_R, self._side_C = block_sides(len(self.y_GE), self.dtype, inputs.workspace_bytes)
        size = min(self._side_R, len(self.x_BE)) * min(self._side_C, len(self.y_GE))
        self._buffer = buffer((0 if stash_BG is not None else size,), self.dtype)
        self._spare = self.x_BE.new_empty(0)

    @property
    def dtype(self) -> torch.dtype:
        """Of operands, logits and sums of gradients."""
        return self.x_BE.dtype

    def __iter__(self) -> Iterator[LogitBlock]:
        """Yield the blocks, row by row of blocks."""
        for rows in slices(len(self.x_BE), self._side_R):
            scaled_RE = scaled(self.x_BE[rows], self._factor)
            for columns in slices(len(self.y_GE), self._side_C):
                shape = rows.stop - rows.start, columns.stop - columns.start
                if self._stash_BG is None:
                    values_RC = self._buffer[: math.prod(shape)].view(shape)
                else:
                    values_RC = self._stash_BG[rows, columns]
                if self._is_multiplied:
                    torch.mm(scaled_RE, self.y_GE[columns].T, out=values_RC)
                yield LogitBlock(rows, columns, values_RC)

    def chunks(self, block: LogitBlock) -> Iterator[LogitChunk]:
        """Yield a block in chunks of rows."""
        num_rows, num_columns = block.values_RC.shape
        most = chunk_rows(num_columns, self.dtype)
        if self._spare.numel() < most * num_columns:
            self._spare = self.x_BE.new_empty(most * num_columns)
        spare = self._spare[: most * num_columns].view(most, num_columns)
        for part in slices(num_rows, most):
            rows = slice(block.rows.start + part.start, block.rows.start + part.stop)
            pairs = self.inputs.pairs.block(rows, block.columns)
            values_RC = block.values_RC[part]
            yield LogitChunk(rows, values_RC, spare[: len(values_RC)], pairs)

    def add_gradient(self, block: LogitBlock) -> None:
        """Add the products of a block's gradient, which it holds in place of the logits, with its operands."""
        if self._sums_image:
            self._image_sum[block.rows].addmm_(block.values_RC, self.y_GE[block.columns])
        if self._sums_text:
            self._text_sum[block.columns].addmm_(block.values_RC.T, self.x_BE[block.rows])

    def along(self) -> Tensor:
        """Return the sum of all gradients times their cosines, <d_x, x>, which float32 blocks make exact."""
        if self._sums_image:
            return dot(self._image_sum, self.x_BE)
        return dot(self._text_sum, self.y_GE)

    def gradients(self, factor: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return the gradients of images and texts, times a factor; empty tensors for those that nobody needs.

        Args:
            dtype: of the gradients [that of the embeddings].
        """
        sides = (self.inputs.image_BE, self._image_sum), (self.inputs.text_GE, self._text_sum)
        d_image, d_text = (
            finish(x_NE, sum_NE, self.inputs.normalized, factor).to(dtype or x_NE.dtype)
            if is_needed
            else x_NE.new_empty(0, dtype=dtype or x_NE.dtype)
            for is_needed, (x_NE, sum_NE) in zip(self._need, sides, strict=True)
        )
        return d_image, d_text


def block_sides(num_columns: int, dtype: torch.dtype, workspace_bytes: int) -> tuple[int, int]:
    """Return the rows and columns of a block, which fills the workspace."""
    columns = max(1, min(num_columns, MOST_COLUMNS))
    return max(1, workspace_bytes // (dtype.itemsize * columns)), columns


def chunk_rows(num_columns: int, dtype: torch.dtype) -> int:
    """Return the rows of a chunk."""
    return max(1, CHUNK_BYTES // (dtype.itemsize * num_columns))


def scaled(x_RE: Tensor, factor: Tensor) -> Tensor:
    """Return x by a factor of two numbers: rounding it to one float32 would shift all logits alike."""
    high = factor.to(x_RE.dtype)
    return (x_RE * high).add_(x_RE, alpha=(factor - high.double()).item())


def masks(pairs: Pairs) -> tuple[Tensor | None, Tensor | None]:
    """Return (invalid, positive) of a block's pairs, where ids make them differ from nothing and the diagonal."""
    if pairs.image_ids is None or pairs.text_ids is None:
        return None, None
    same_RC = pairs.image_ids[:, None] == pairs.text_ids
    if pairs.same_id == "positive":
        return None, same_RC
    same_RC.diagonal(pairs.first_label).fill_(False)
    return same_RC, None


def masks_of_rows(pairs: Pairs, row_n: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return (invalid, positive) of some rows, by their numbers, and a block's columns."""
    column_m = torch.arange(columns.start, columns.stop, device=row_n.device)
    own_NM = (row_n + pairs.first_label)[:, None] == column_m
    if pairs.image_ids is None or pairs.text_ids is None:
        return torch.zeros_like(own_NM), own_NM
    same_NM = pairs.image_ids[row_n, None] == pairs.text_ids[columns]
    if pairs.same_id == "positive":
        return torch.zeros_like(own_NM), same_NM
    return same_NM & ~own_NM, own_NM


def diagonal(matrix_RC: Tensor, pairs: Pairs) -> tuple[Tensor, slice, slice]:
    """Return a view of a block's elements that are pairs by their place, and their rows and columns in the block."""
    view = matrix_RC.diagonal(pairs.first_label)
    first_row, first_column = max(0, -pairs.first_label), max(0, pairs.first_label)
    return (
        view,
        slice(first_row, first_row + len(view)),
        slice(first_column, first_column + len(view)),
    )


def unit_rows(x_NE: Tensor, normalized: bool, dtype: torch.dtype) -> Tensor:
    """Return the CPU's operand in the dtype of both sides: float32, or float64 where one of them is."""
    wide_NE = x_NE.to(dtype)
    return wide_NE if normalized else normalize_ref(wide_NE)


def finish(x_NE: Tensor, sum_NE: Tensor, normalized: bool, factor: Tensor) -> Tensor:
    """Turn the gradient of unit rows into that of the embeddings, times a factor, in place."""
    for rows in slices(len(x_NE), MOST_COLUMNS):
        if normalized:
            sum_NE[rows] *= factor
        else:
            sum_NE[rows] = normalize_bwd_ref(x_NE[rows].to(sum_NE.dtype), sum_NE[rows], factor)[0]
    return sum_NE


def dot(x_NE: Tensor, y_NE: Tensor) -> Tensor:
    """Return the float64 sum of x * y over all elements, in a fixed order and without a copy of their size."""
    total = torch.zeros((), dtype=torch.float64, device=x_NE.device)
    for rows in slices(len(x_NE), MOST_COLUMNS):
        total += (x_NE[rows] * y_NE[rows]).sum(dtype=torch.float64)
    return total
