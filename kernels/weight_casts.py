"""16-bit copies of float32 weights, shared by the passes over the micro-batches of a step.

A pass in mixed precision multiplies 16-bit copies of the weights. Each block makes them where it needs them and frees them
at once, so that a direct step holds no second model. Several passes with the same weights can share the copies:
``WeightCasts.kept`` keeps them, for 2 bytes a weight, and a pass then launches no casts. The bits are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Copy(NamedTuple):
    weight: nn.Parameter  # held, so that no other tensor gets its storage
    version: int  # of the weight when it was copied
    narrow: Tensor


class WeightCasts:
    """The copies that blocks have made, for as long as this object is there."""

    def __init__(self) -> None:
        # By the weights' storages: autograd may hand a weight back as another tensor.
        self._copies: dict[tuple[object, ...], _Copy] = {}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Let the passes within the context use these copies and add to them; autocast's own are shared too.

        Autocast forgets its copies where its outermost context ends, and this counts as one. They are forgotten here in
        any case: a weight may change afterwards, and a copy made without a graph would lead no gradient to it. Not for
        weights that are gathered for one pass and freed after it (FSDP).
        """
        global _kept
        before, _kept = _kept, self
        torch.autocast_increment_nesting()
        try:
            yield
        finally:
            _kept = before
            torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()

    @property
    def nbytes(self) -> int:
        """Return the bytes of all copies."""
        return sum(copy.narrow.nbytes for copy in self._copies.values())

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the copy of a weight, made anew if the weight has changed in place since."""
        if weight.is_inference():  # which has no version
            return weight.to(dtype)
        key = weight.untyped_storage()._cdata, weight.storage_offset(), weight.shape, dtype
        copy = self._copies.get(key)
        if copy is not None and copy.version == copy.weight._version:
            return copy.narrow

        narrow = weight.detach().to(dtype)
        # What is computed for one pass, such as an adapter's sum, is not worth keeping.
        if isinstance(weight, nn.Parameter):
            self._copies[key] = _Copy(weight, weight._version, narrow)
        return narrow


# Of the process, not of a thread: on a GPU the backward pass runs in a thread of its own.
_kept: WeightCasts | None = None


def narrowed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in the dtype of a product, without a graph; within ``WeightCasts.kept`` a parameter is cast once."""
    # A compiler would make the copies constants of its graph.
    kept = None if torch.compiler.is_compiling() else _kept
    return weight.to(dtype) if kept is None or weight.dtype == dtype else kept.of(weight, dtype)
