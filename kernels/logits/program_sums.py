"""Sums over all blocks of a walk on a GPU that each program of a launch keeps for itself.

Program p of every block adds to place p, one block after the other: no atomics, a fixed order, no launch to fold a block's
parts, and no more memory than one block has programs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipcore.kernels.logits.block import LogitBlock


class ProgramSums:
    """Float64 sums, of which a kernel adds to place ``program_id`` of each row.

    Args:
        num_sums: how many there are.
    """

    def __init__(self, num_sums: int, device: torch.device) -> None:
        self._num_sums, self._device = num_sums, device
        self._parts = torch.empty((num_sums, 0), dtype=torch.float64, device=device)

    def places(self, block: LogitBlock) -> Tensor:
        """Return [num_sums, at least as many as the block's launch has programs]."""
        missing = math.prod(block.grid) - self._parts.shape[1]
        if missing > 0:
            more = torch.zeros((self._num_sums, missing), dtype=torch.float64, device=self._device)
            # The first block is the largest as a rule.
            is_first = self._parts.shape[1] == 0
            self._parts = more if is_first else torch.cat((self._parts, more), 1)
        return self._parts

    def total(self, index: int) -> Tensor:
        """Return one of the sums over all programs, a scalar."""
        return self._parts[index].sum()
