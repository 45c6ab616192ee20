"""Bytes and FLOPs of every operator of a piece of work, as the dispatcher sees them.

An operator moves what it reads and what it writes: each tensor it takes and each it returns or changes, each part of a
storage once a call; views and what only asks about a tensor move nothing. What a cache keeps between two operators counts
for both, so that the sum is the traffic of operators that share nothing, not that of a fused program.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipcore.run.flops import flops_of
from clipcore.run.optim import local_part

_aten = torch.ops.aten
# What they return is not written, or lies in memory that was there.
_UNWRITTEN = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten.resize_,
    _aten.set_,
}
# What they change is not read before.
_OVERWRITTEN = {
    _aten.copy_,
    _aten.fill_,
    _aten.zero_,
    _aten.random_,
    _aten.normal_,
    _aten.uniform_,
    _aten.bernoulli_,
    _aten.exponential_,
}
# Of their first argument, its shape alone.
_SHAPED_LIKE = {
    *(_aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.rand_like, _aten.randn_like),
    *(_aten.new_zeros, _aten.new_ones, _aten.new_full),
}
# Of their first argument, as much as they return.
_GATHERING = {_aten.embedding, _aten.index, _aten.index_select, _aten.gather}


class Operator(NamedTuple):
    """An operator and the pass that it is called in, which makes two of the same product."""

    name: str  # as in "aten::mm"
    is_backward: bool


@dataclass
class Traffic:
    """Calls of an operator, and the bytes and FLOPs of all of them."""

    calls: int = 0
    bytes_moved: int = 0
    flops: int = 0


class TrafficCounter(TorchDispatchMode):
    """Counts the operators that are called within it, in ``found``; changes no number and keeps no tensor.

    >>> with TrafficCounter() as counter:
    ...     product = torch.zeros(2, 3) @ torch.zeros(3, 4)
    >>> counter.found[Operator("aten::mm", False)]
    Traffic(calls=1, bytes_moved=104, flops=48)
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Operator, Traffic] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Before the call: an operator may give its argument other memory.
        moves = _Moves(func, args, kwargs)
        out = func(*args, **kwargs)
        is_backward = torch._C._current_graph_task_id() != -1
        traffic = self.found.setdefault(Operator(func._schema.name, is_backward), Traffic())
        traffic.calls += 1
        traffic.bytes_moved += moves.bytes_with(out)
        traffic.flops += flops_of(func._overloadpacket, args, kwargs, out)
        return out


class _Moves:
    """What one call reads and writes, by its schema."""

    def __init__(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.packet = func._overloadpacket
        self.has_writes = False
        self.inputs: set[int] = set()
        self.first_read = 0
        self.read_bytes, self.written_bytes = 0, 0
        read: list[Tensor] = []
        written: list[Tensor] = []
        for i, argument in enumerate(func._schema.arguments):
            tensors = _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
            self.inputs.update(_storage(tensor) for tensor in tensors)
            if _is_written(self.packet, argument, kwargs):
                self.has_writes = True
                written += tensors
                if argument.is_out or self.packet in _OVERWRITTEN:
                    continue
            if i == 0 and self.packet in _SHAPED_LIKE:
                continue
            if i == 0 and self.packet in _GATHERING:
                self.first_read = bytes_shown(tensors)
                continue
            read += tensors
        self.read_bytes, self.written_bytes = bytes_shown(read), bytes_shown(written)

    def bytes_with(self, out: Any) -> int:
        """Return the bytes moved, now that it is known what the call returned."""
        fresh = [tensor for tensor in _tensors(out) if _storage(tensor) not in self.inputs]
        if self.packet in _UNWRITTEN or not (fresh or self.has_writes):
            return 0
        made = bytes_shown(fresh)
        return self.read_bytes + self.written_bytes + made + min(self.first_read, made)


def bytes_shown(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the elements that the tensors show: a part of a storage once, an expanded axis once."""
    parts: dict[int, dict[tuple[Any, ...], int]] = {}
    sizes: dict[int, int] = {}
    for tensor in tensors:
        storage = _storage(tensor)
        sizes[storage] = tensor.untyped_storage().nbytes()
        elements = math.prod(
            n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step
        )
        place = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        parts.setdefault(storage, {})[place] = (elements if tensor.numel() else 0) * tensor.itemsize
    return sum(min(sizes[storage], sum(shown.values())) for storage, shown in parts.items())


def _is_written(packet: Any, argument: Any, kwargs: dict[str, Any]) -> bool:
    if packet is _aten._fused_adamw_ and argument.name == "grads":
        return kwargs.get("grad_scale") is not None  # written only where a scaler is divided out
    return argument.alias_info is not None and argument.alias_info.is_write


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in an argument or a result; of a split one this rank's part."""
    if isinstance(value, Tensor):
        return [local_part(value)]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
