"""The contrastive loss as forward and backward see it, on any device: its arguments, logarithms and upstream gradients.

Legend and maths: contrastive.py. Everything here is of the size of the rows, never of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clipcore.kernels import logits_triton, tiles
from clipcore.kernels.logits import LOG2E, Pairs

# exp(z - o) is at most 2^101 (e^70) for logits up to the scale; float64 has room for any scale of use.
HEADROOM = {torch.float32: 101.0, torch.float64: 900.0}


class Targets(NamedTuple):
    """How targets spread (T and U of the module docstring): weight of a positive and of any valid pair."""

    row_positive_B: Tensor
    row_uniform_B: Tensor
    column_positive_G: Tensor
    column_uniform_G: Tensor

    def relative_uniform(self) -> tuple[Tensor, Tensor]:
        """float32: the uniform weights of rows and of columns over their positives'. Without any there is no target."""
        sides = self[:2], self[2:]
        rows, columns = (
            torch.where(positive > 0, uniform / positive, 0.0).float()
            for positive, uniform in sides
        )
        return rows, columns


class Problem(NamedTuple):
    """The arguments that forward and backward share; see `contrastive_terms`."""

    image_BE: Tensor
    text_GE: Tensor
    scale: Tensor
    pairs: Pairs
    normalized: bool
    operand: torch.dtype
    engine: str
    workspace_bytes: int
    targets: Targets | None  # None: each on the pair's own column

    @property
    def by_place(self) -> bool:
        """No spread targets: a positive is known by its place."""
        return self.targets is None

    @property
    def architecture(self) -> int:
        """The row of the launch tables."""
        return tiles.architecture(self.image_BE.device)

    def powers(self) -> tuple[Tensor, Tensor]:
        """(what turns a cosine into a power of two, the offset of the powers), float64; see contrastive.py."""
        headroom = HEADROOM[tiles.accumulate_dtype(self.operand)]
        to_power = self.scale.double().reshape(()) * LOG2E
        return to_power, (to_power.abs() - headroom).clamp(min=0).ceil()

    def sides(self, element_bytes: int) -> tuple[int, int]:
        """Rows and columns of a block on a GPU."""
        return logits_triton.block_sides(
            *(self.image_BE.shape[1], element_bytes, self.workspace_bytes, self.operand.itemsize)
        )


class Upstream(NamedTuple):
    """Upstream gradients of the terms, as the gradient kernel adds them up: per row and column of the logits."""

    row_lse_B: Tensor
    column_lse_G: Tensor
    row_positive_B: Tensor
    row_uniform_B: Tensor
    column_positive_G: Tensor
    column_uniform_G: Tensor

    @classmethod
    def spread(
        cls,
        upstream: Sequence[Tensor],
        targets: Targets | None,
        row_rest: Tensor,
        column_rest: Tensor,
    ) -> Upstream:
        """From the gradients of (row_lse, column_lse, row_target, column_target).

        Without targets a positive's gradient is whole here: P - 1 = -rest has no cancellation to suffer.
        """
        row_lse, column_lse, row_target, column_target = upstream
        if targets is None:
            at_row = (row_lse + row_target) - row_lse * row_rest
            at_column = (column_lse + column_target) - column_lse * column_rest
            return cls(row_lse, column_lse, at_row, at_row, at_column, at_column)
        return cls(
            row_lse,
            column_lse,
            row_target * targets.row_positive_B,
            row_target * targets.row_uniform_B,
            column_target * targets.column_positive_G,
            column_target * targets.column_uniform_G,
        )

    def over_largest(self) -> tuple[Upstream, Tensor]:
        """(itself over its largest element, that element), so that the block's gradients are of order one."""
        largest = torch.cat(self).abs().amax()
        divisor = torch.where(largest > 0, largest, 1.0)
        return Upstream(*(part / divisor for part in self)), largest

    def factors(self, logs: Logarithms) -> tuple[Tensor, Tensor]:
        """What exp2(power - offset) is multiplied with, per row and per column, for the gradient of the lse."""
        return (
            _factor(self.row_lse_B, logs.row_lse_B, logs.row_offset_B),
            _factor(self.column_lse_G, logs.column_lse_G, logs.column_offset_G),
        )

    def to(self, dtype: torch.dtype) -> Upstream:
        """Every part in another dtype."""
        return Upstream(*(part.to(dtype) for part in self))

    def block(self, rows: slice, columns: slice) -> Upstream:
        """The part of a block."""
        sides = (rows, columns, rows, rows, columns, columns)
        return Upstream(*(part[side] for part, side in zip(self, sides, strict=True)))

    def pointers(self) -> dict[str, Tensor]:
        """Those at targets, as launch keywords."""
        return {
            "row_positive_ptr": self.row_positive_B,
            "row_uniform_ptr": self.row_uniform_B,
            "column_positive_ptr": self.column_positive_G,
            "column_uniform_ptr": self.column_uniform_G,
        }


def _factor(upstream: Tensor, lse: Tensor, offset: Tensor) -> Tensor:
    """Of one side. A row without a valid pair has no gradient."""
    return torch.where(lse == -torch.inf, 0.0, upstream * torch.exp2(offset - lse))


class Online(NamedTuple):
    """What a running maximum finds for one side, in powers of two; of no meaning for trusted rows."""

    rest_lse: Tensor  # without the positive where its place makes it known
    target: Tensor  # the target logit, of the same numbers


class Logarithms(NamedTuple):
    """What the sums came to, in powers of two."""

    row_lse_B: Tensor
    column_lse_G: Tensor
    row_rest_B: Tensor  # 1 - probability of the row's positive, where its place makes it known
    column_rest_G: Tensor
    row_offset_B: Tensor  # what the powers of its gradient are taken off: the problem's, or its own
    column_offset_G: Tensor

    def untrusted(self, offset: Tensor) -> tuple[Tensor, Tensor]:
        """bool: the rows and the columns that have an offset of their own."""
        return self.row_offset_B != offset, self.column_offset_G != offset

    def completed(
        self, problem: Problem, untrusted: Sequence[Tensor], online: Sequence[Online]
    ) -> Logarithms:
        """With what a running maximum found for untrusted rows and columns; the others keep their bits."""
        _, offset = problem.powers()
        sides = []
        for lse, rest, chosen, found in zip(self[:2], self[2:4], untrusted, online, strict=True):
            own = found.rest_lse
            if problem.by_place:
                own = torch.logaddexp2(found.rest_lse, found.target)
            # A row without a valid pair has nothing: no rest, and no offset of its own.
            own_rest = torch.where(own == -torch.inf, 0.0, torch.exp2(found.rest_lse - own))
            below = torch.where(own.isfinite(), own.floor(), offset)
            sides.append(
                (
                    torch.where(chosen, own, lse),
                    torch.where(chosen, own_rest, rest),
                    torch.where(chosen, below, offset),
                )
            )
        rows, columns = sides
        return Logarithms(rows[0], columns[0], rows[1], columns[1], rows[2], columns[2])


def new_sums(problem: Problem, length: int) -> tuple[Tensor, Tensor]:
    """(sums of exponentials, target logits) to fill, float64. A row without a positive keeps the logit -inf."""
    device = problem.image_BE.device
    no_target = -torch.inf if problem.by_place else 0.0
    return (
        torch.zeros(length, dtype=torch.float64, device=device),
        torch.full((length,), no_target, dtype=torch.float64, device=device),
    )


def logarithms(
    problem: Problem,
    row_sum: Tensor,
    column_sum: Tensor,
    row_target: Tensor,
    column_target: Tensor,
    wide: torch.dtype,
) -> tuple[Logarithms, tuple[Tensor, Tensor]]:
    """(logarithms of the sums, which rows and which columns are not to be trusted).

    With ids or spread targets the sums are whole, else positives are added here.
    """
    # Terms below the smallest normal number are lost: harmless where all of them together are below the sum's last place.
    # One over the sum has to be a normal number too. A NaN stays what it is.
    info = torch.finfo(wide)
    least = 2 * max(len(row_sum), len(column_sum)) * info.tiny / info.eps
    _, offset = problem.powers()
    lse, rests, untrusted = [], [], []
    for rest, target in ((row_sum, row_target), (column_sum, column_target)):
        total = rest + torch.exp2(target - offset) if problem.by_place else rest
        log = total.log2() + offset
        # A row of one pair: the logarithm of a power need not give the exponent back to the last bit.
        lse.append(torch.where(rest == 0, target, log) if problem.by_place else log)
        rests.append(rest / total)
        untrusted.append((total < least) | (total > 1 / info.tiny))
    offsets = [offset.repeat(len(total)) for total in lse]
    return Logarithms(*lse, *rests, *offsets), (untrusted[0], untrusted[1])
