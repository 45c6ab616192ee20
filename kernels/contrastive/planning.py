"""How a contrastive problem will be computed: which engine, with a stash or without, and why.

Legend: ``clipcore.kernels.contrastive``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.contrastive.budget import default_stash_bytes
from clipcore.kernels.contrastive.launches import ENGINE_TABLE, dense_shape, packed_shapes
from clipcore.kernels.logits.pairs import choose_operand

# Up to so many rows and columns a GPU keeps the matrix as the library gave it, 64 MiB at most. Estimated, to be measured:
# reading it takes less time than making it again, and a small call is bound by its launches.
DENSE_SIDE = 4096


class Plan(NamedTuple):
    """How a problem will be computed; ``str`` says so in one line."""

    shape: tuple[int, int, int]  # B, G, E
    operand: torch.dtype
    device: str
    engine: str
    backward: bool
    stash: bool
    stash_bytes: int  # what a stash takes, or the dense matrix
    budget_bytes: int  # what it may take

    @property
    def kept_bytes(self) -> int:
        """What is kept from the forward to the backward."""
        return self.stash_bytes if self.stash or self.engine == "dense" else 0

    def __str__(self) -> str:
        B, G, E = self.shape
        operand = str(self.operand).removeprefix("torch.")
        if self.engine == "dense":
            return (
                f"contrastive loss of {B:,} x {G:,} x {E} on {self.device}: dense, 3 products in {operand}; up to "
                f"{DENSE_SIDE:,} rows and columns the matrix is kept in float32, here {self.stash_bytes / 2**20:,.1f} MiB"
            )
        mode = f"{'stash' if self.stash else 'recompute'}, {3 if self.stash else 4} products"
        why = "fits" if self.stash else "is more than"
        return (
            f"contrastive loss of {B:,} x {G:,} x {E} on {self.device}: "
            f"{mode if self.backward else 'forward only, 1 product'} in "
            f"{operand}, {self.engine} engine; a stash of "
            f"{self.stash_bytes / 2**20:,.1f} MiB {why if self.backward else 'is not needed under'} "
            f"the budget of {self.budget_bytes / 2**20:,.1f} MiB"
        )


def plan(
    image_BE: Tensor,
    text_GE: Tensor,
    *,
    stash_bytes: int | None = None,
    operand_dtype: torch.dtype | None = None,
    engine: str | None = None,
    backward: bool = True,
) -> Plan:
    """Say how ``contrastive_terms`` will compute a problem: which engine, with a stash or without, and why.

    The rule: a stash where a backward follows and the stash is at most `stash_bytes` (by default
    ``default_stash_bytes``). On a GPU a matrix of at most 4,096 rows and columns is kept as it is instead, unless
    `stash_bytes` or `engine` is given. The engine that was measured to be faster for the chip, width and operands, and the
    library's where neither was. A GPU's stash rounds the logits of float32 operands to 16 bits: for those there is one
    only where `stash_bytes` asks for it.
    """
    operand = choose_operand(image_BE, text_GE, operand_dtype)
    return plan_for(image_BE, len(text_GE), operand, stash_bytes, engine, backward)


def plan_for(
    image_BE: Tensor,
    num_texts: int,
    operand: torch.dtype,
    stash_bytes: int | None,
    engine: str | None,
    backward: bool,
) -> Plan:
    """Return ``plan``'s answer for operands of a dtype."""
    B, E = image_BE.shape
    on_cpu = not image_BE.is_cuda
    budget = stash_bytes
    if budget is None:
        is_exact = on_cpu or operand.itemsize == 2
        budget = default_stash_bytes(image_BE.device) if is_exact else 0
    is_small = 0 < B <= DENSE_SIDE and 0 < num_texts <= DENSE_SIDE
    if not on_cpu and is_small and engine is None and stash_bytes is None:
        engine = "dense"
    if engine == "dense" and not backward:
        engine = "library"  # there is nobody to keep the matrix for
    if not on_cpu and engine is None:
        key = (launch.architecture(image_BE.device), E, 8 * operand.itemsize)
        engine = ENGINE_TABLE.get(key, "library")

    if engine == "dense":
        needed = 4 * math.prod(dense_shape(B, num_texts))
    elif on_cpu:
        needed = B * num_texts * operand.itemsize
    else:
        # Beside them 8 bytes for each row of a segment, a 128th: 65,536 pairs are to fit 8 GiB.
        shape, _, dtype = packed_shapes(B, num_texts, str(engine))
        needed = math.prod(shape) * dtype.itemsize
    return Plan(
        shape=(B, num_texts, E),
        operand=operand,
        device=image_BE.device.type,
        engine=engine or "library",
        backward=backward,
        stash=backward and engine != "dense" and 0 < needed <= budget,
        stash_bytes=needed,
        budget_bytes=budget,
    )
