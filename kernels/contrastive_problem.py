"""The contrastive loss as forward and backward see it, on any device: its arguments, logarithms and upstream gradients.

Legend and maths: contrastive.py. Everything here is of the size of the rows, never of the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipcore.kernels import logits, tiles
from clipcore.kernels.logits import LOG2E

# exp(z - o) is at most 2^101 (e^70) for logits up to the scale; float64 has room for any scale of use.
HEADROOM = {torch.float32: 101.0, torch.float64: 900.0}


class Targets(NamedTuple):
    """How targets spread (T and U of the module docstring): weight of a positive and of any valid pair."""

    row_positive_B: Tensor
    row_uniform_B: Tensor
    column_positive_G: Tensor
    column_uniform_G: Tensor


class Problem(NamedTuple):
    """The arguments that forward and backward share; see `contrastive_terms`."""

    image_BE: Tensor
    text_GE: Tensor
    scale: Tensor
    image_ids: Tensor | None
    text_ids: Tensor | None
    first_label: int
    same_id: str
    normalized: bool
    operand: torch.dtype
    engine: str
    workspace_bytes: int

    @property
    def ids(self) -> str:
        return "none" if self.image_ids is None else self.same_id

    @property
    def architecture(self) -> int:
        return tiles.architecture(self.image_BE.device)

    def powers(self) -> Tensor:
        """[2]: what turns a cosine into a power of two, and the offset of the powers; see the module docstring."""
        wide = tiles.accumulate_dtype(self.operand)
        to_power = self.scale.to(wide).reshape(()) * LOG2E
        return torch.stack((to_power, (to_power - HEADROOM[wide]).clamp(min=0).ceil()))

    def sides(self, element_bytes: int) -> tuple[int, int]:
        """Rows and columns of a block on a GPU."""
        return logits.block_sides(self.image_BE.shape[1], element_bytes, self.workspace_bytes)


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
        row_lse: Tensor,
        column_lse: Tensor,
        row_target: Tensor,
        column_target: Tensor,
        targets: Targets | None,
    ) -> Upstream:
        """Each target's gradient times the weights by which it was spread."""
        if targets is None:  # all on the positive: the uniform parts are not read
            return cls(row_lse, column_lse, row_target, row_target, column_target, column_target)
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
        largest = torch.stack([part.abs().amax() for part in self]).amax()
        divisor = torch.where(largest > 0, largest, 1.0)
        return Upstream(*(part / divisor for part in self)), largest

    def factors(self, row_lse: Tensor, column_lse: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """What a power of two is multiplied with, per row and per column, for the gradient of the lse."""
        return (
            self.row_lse_B * torch.exp2(offset - row_lse),
            self.column_lse_G * torch.exp2(offset - column_lse),
        )

    def online_factors(
        self, row_lse: Tensor, column_lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same for a flagged problem: (row factor, its offset, column factor, its offset).

        The offset of each lse is the integer below it, which float32 holds and from which logits subtract exactly.
        """
        row_offset, column_offset = row_lse.floor(), column_lse.floor()
        return (
            self.row_lse_B * torch.exp2(row_offset - row_lse),
            row_offset,
            self.column_lse_G * torch.exp2(column_offset - column_lse),
            column_offset,
        )

    def to(self, dtype: torch.dtype) -> Upstream:
        """Every part in another dtype."""
        return Upstream(*(part.to(dtype) for part in self))

    def pointers(self, rows: slice, columns: slice) -> dict[str, Tensor]:
        """The part of a block, as launch keywords."""
        return {
            "row_positive_ptr": self.row_positive_B[rows],
            "row_uniform_ptr": self.row_uniform_B[rows],
            "column_positive_ptr": self.column_positive_G[columns],
            "column_uniform_ptr": self.column_uniform_G[columns],
        }


def logarithms(
    problem: Problem, row_sum: Tensor, column_sum: Tensor, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(row_lse, column_lse, flag) in powers of two; flag is 1 where a sum is not to be trusted."""
    # Terms below the smallest normal number are lost: harmless where all of them together are below the sum's last place.
    info = torch.finfo(wide)
    least = 2 * max(len(row_sum), len(column_sum)) * info.tiny / info.eps
    trusted = [((total >= least) & (total < torch.inf)).all() for total in (row_sum, column_sum)]
    flag = (~(trusted[0] & trusted[1])).to(torch.int32)
    offset = problem.powers()[1].double()
    return row_sum.log2() + offset, column_sum.log2() + offset, flag
