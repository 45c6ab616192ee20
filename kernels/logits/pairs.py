"""What a loss over all pairs of rows is given, on any device: rows, which pairs count, and the checks of both.

Legend: ``clipcore.kernels.logits``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from clipcore.kernels import launch
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
        """Return the same with texts as images and images as texts."""
        return Pairs(self.text_ids, self.image_ids, -self.first_label, self.same_id)

    def block(self, rows: slice, columns: slice) -> Pairs:
        """Return the ids and the first label of a block."""
        return Pairs(
            None if self.image_ids is None else self.image_ids[rows],
            None if self.text_ids is None else self.text_ids[columns],
            self.first_label + rows.start - columns.start,
            self.same_id,
        )

    def check(self, image_BE: Tensor, text_GE: Tensor) -> None:
        """Raise ValueError unless they are pairs of these rows."""
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


class LossInputs(NamedTuple):
    """What every loss over pairs is given, checked."""

    image_BE: Tensor
    text_GE: Tensor
    scale: Tensor  # one element
    pairs: Pairs
    normalized: bool  # rows are of length one already
    operand: torch.dtype  # what the products multiply
    engine: str  # one of ENGINES, or "dense": the library's, whose products are kept
    workspace_bytes: int  # what a block may take


def checked_inputs(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor | float,
    pairs: Pairs,
    *,
    operation: str,
    normalize: bool,
    workspace_bytes: int | None,
    operand_dtype: torch.dtype | None,
    engine: str | None,
) -> LossInputs:
    """Return a loss's inputs with their defaults, the one place where they are checked.

    Args:
        operation: what the messages call the loss.

    Raises:
        ValueError: shapes, dtypes, devices or ids do not fit.
        RuntimeError: forward-mode differentiation, which no loss has.
    """
    check_embeddings(image_BE, text_GE, operand_dtype, engine)
    pairs.check(image_BE, text_GE)
    scale = launch.as_scalar("scale", scale, image_BE, text_GE)
    check_no_tangent(operation, image_BE, text_GE, scale)

    if workspace_bytes is None:
        workspace_bytes = WORKSPACE_BYTES["cuda" if image_BE.is_cuda else "cpu"]
    # Kernels read ids one after the other.
    image_ids, text_ids = (
        None if ids is None else ids.contiguous() for ids in (pairs.image_ids, pairs.text_ids)
    )
    return LossInputs(
        image_BE,
        text_GE,
        scale,
        Pairs(image_ids, text_ids, pairs.first_label, pairs.same_id),
        normalized=not normalize,
        operand=choose_operand(image_BE, text_GE, operand_dtype),
        engine=engine or "library",
        workspace_bytes=workspace_bytes,
    )


def slices(length: int, size: int) -> Iterator[slice]:
    """Yield slices of at most ``size`` that cover ``length``."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def choose_operand(image_BE: Tensor, text_GE: Tensor, asked: torch.dtype | None) -> torch.dtype:
    """Return what the products multiply; see the package. Under autocast float32 embeddings count as 16-bit ones."""
    promoted = torch.promote_types(image_BE.dtype, text_GE.dtype)
    if not image_BE.is_cuda:
        return launch.accumulate_dtype(promoted)
    if asked is not None:
        return asked
    autocast = torch.is_autocast_enabled("cuda")
    return torch.float32 if promoted == torch.float32 and not autocast else torch.float16


def check_no_tangent(operation: str, *inputs: Tensor) -> None:
    """Raise RuntimeError in forward-mode differentiation, for which an operator would answer a tangent of zero."""
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs):
        raise RuntimeError(
            f"{operation} has no forward-mode derivative: use torch.autograd.grad or vjp"
        )


def check_embeddings(
    image_BE: Tensor, text_GE: Tensor, asked: torch.dtype | None, engine: str | None
) -> None:
    """Raise ValueError unless the two can be compared on their device, with operands of the dtype asked for."""
    check_rows(image_BE, text_GE, ("image features", "text features"))
    if asked not in (None, torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"operand_dtype has to be float16, bfloat16 or float32, got {asked}")
    if engine not in (None, *ENGINES):
        raise ValueError(f"engine has to be one of {ENGINES}, got {engine!r}")
