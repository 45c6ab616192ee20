"""The logits of two sets of embeddings, block by block: what the softmax and the sigmoid loss have in common.

    z_bg = scale * <x_b, y_g>      x, y = the rows as they are, or over their lengths (normalize.py)

Legend: B image rows, G text rows, E embedding size, R and C rows and columns of a block, N and M those of a kernel's
tile.

A loss walks over blocks of R x C logits. Two engines make a block on a GPU:

- "library": the vendor's product into a float32 block, then one memory-bound Triton pass over it;
- "fused": a Triton product whose epilogue does the pass on the accumulators, with operands from tensor descriptors.

Either leaves the gradient of the block, which two library products with float32 sums turn into those of the
embeddings. The operands of a block are made for the block, so that nothing beside the sums grows with B or G. The CPU
walks over smaller blocks, which stay in its cache.

Precision: rows are normalised in float32 and rounded once to the operand dtype. For float16 and bfloat16 that is
float16 by default: a row of length one has nothing near the ends of its range, and its rounding moves a logit eight
times less than bfloat16's. float32 operands multiply in float32.

What either device needs is here, the GPU's part in logits_triton.py, the CPU's in logits_cpu.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from clipcore.kernels import tiles
from clipcore.kernels.normalize import check_rows

LOG2E = math.log2(math.e)
# What blocks may hold: their logits, operands and sums on a GPU, their logits on the CPU.
WORKSPACE_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 10**6}
ENGINES = ("library", "fused")
SAME_ID = ("ignore", "positive")


class Pairs(NamedTuple):
    """Which pairs of rows count, and which of them belong together; see `contrastive_loss`."""

    image_ids: Tensor | None
    text_ids: Tensor | None
    first_label: int
    same_id: str

    @property
    def ids(self) -> str:
        """The kernels' IDS: "none", "ignore" or "positive"."""
        return "none" if self.image_ids is None else self.same_id

    def exchanged(self) -> Pairs:
        """The same with texts as images and images as texts."""
        return Pairs(self.text_ids, self.image_ids, -self.first_label, self.same_id)

    def block(self, rows: slice, columns: slice) -> Pairs:
        """Those of a block."""
        return Pairs(
            None if self.image_ids is None else self.image_ids[rows],
            None if self.text_ids is None else self.text_ids[columns],
            self.first_label + rows.start - columns.start,
            self.same_id,
        )

    def check(self, image_BE: Tensor, text_GE: Tensor) -> None:
        """ValueError unless they are pairs of these rows."""
        if self.same_id not in SAME_ID:
            raise ValueError(f"same_id has to be one of {SAME_ID}, got {self.same_id!r}")
        if (self.image_ids is None) != (self.text_ids is None):
            raise ValueError("image_ids and text_ids: pass both or none")
        for name, ids, rows in (
            ("image_ids", self.image_ids, image_BE),
            ("text_ids", self.text_ids, text_GE),
        ):
            if ids is None:
                continue
            if ids.shape != rows.shape[:1] or ids.dtype != torch.int64 or ids.device != rows.device:
                raise ValueError(
                    f"{name} has to be int64 [{rows.shape[0]}] on {rows.device}, "
                    f"got {ids.dtype} {list(ids.shape)} on {ids.device}"
                )


def blocks(length: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `length`."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def operand_dtype(image_BE: Tensor, text_GE: Tensor, asked: torch.dtype | None) -> torch.dtype:
    """What the products multiply (module docstring). Under autocast float32 embeddings count as 16-bit ones."""
    promoted = torch.promote_types(image_BE.dtype, text_GE.dtype)
    if not image_BE.is_cuda:
        return tiles.accumulate_dtype(promoted)
    if asked is not None:
        return asked
    autocast = torch.is_autocast_enabled("cuda")
    return torch.float32 if promoted == torch.float32 and not autocast else torch.float16


def check_no_tangent(operation: str, *inputs: Tensor) -> None:
    """RuntimeError in forward-mode differentiation, for which an operator would answer a tangent of zero."""
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs):
        raise RuntimeError(
            f"{operation} has no forward-mode derivative: use torch.autograd.grad or vjp"
        )


def check_embeddings(
    image_BE: Tensor, text_GE: Tensor, asked: torch.dtype | None, engine: str | None
) -> None:
    """ValueError unless the two can be compared on their device, with operands of the dtype asked for."""
    check_rows(image_BE, text_GE, ("image features", "text features"))
    if asked not in (None, torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"operand_dtype has to be float16, bfloat16 or float32, got {asked}")
    if engine not in (None, *ENGINES):
        raise ValueError(f"engine has to be one of {ENGINES}, got {engine!r}")
