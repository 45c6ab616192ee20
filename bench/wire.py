"""Traffic between ranks: the collectives of a step by formula and counted, and their time on a wire.

Legend: W ranks, B pairs of each, G = W B, E embedding size.

The softmax loss gathers the texts ([G, E], behind a header of 64 bytes a rank), reduces the columns' maximum and sum ([G] in
float64), and in its backward pass the columns' gradient and the gathered texts' ([G, E] in float32 for whatever narrower
dtype travels). The sigmoid loss has only the first and the last of these. On the CPU both exchange sizes first, 24 bytes a
rank. What a rank sends is that of a ring: (W - 1) / W of all bytes for a gather or a scatter, twice that for an all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GATHER, REDUCE, SCATTER = "all-gather", "all-reduce", "reduce-scatter"


class Collective(NamedTuple):
    """One collective: its kind, and the bytes of all that is gathered or, on each rank, reduced."""

    kind: str
    num_bytes: int

    def sent_bytes(self, num_ranks: int) -> float:
        """Return the bytes that one rank sends in a ring."""
        passes = 2 if self.kind == REDUCE else 1
        return passes * self.num_bytes * (num_ranks - 1) / num_ranks


class Wire(NamedTuple):
    """A connection of ranks: usable bytes a second that each sends, and seconds of an empty collective."""

    name: str
    bytes_per_s: float
    latency_s: float
    assumptions: str

    def time_ms(self, collectives: Iterable[Collective], num_ranks: int) -> float:
        """Return the time of collectives in sequence, without overlap."""
        return 1e3 * sum(
            self.latency_s + one.sent_bytes(num_ranks) / self.bytes_per_s for one in collectives
        )


NVLINK = Wire(
    "NVLink",
    0.8 * 450e9,
    20e-6,
    "900 GB/s a GPU both ways, 450 one way, 80% of it usable, 20 us a collective, ring, no overlap",
)
ETHERNET = Wire(
    "100 Gb/s Ethernet",
    0.9 * 12.5e9,
    100e-6,
    "one GPU a machine, 12.5 GB/s one way, 90% of it usable, 100 us a collective, ring, no overlap",
)


def loss_collectives(
    num_pairs: int,
    width: int,
    num_ranks: int,
    wire_dtype: torch.dtype,
    *,
    loss: str = "softmax",
    on_gpu: bool,
) -> list[Collective]:
    """Return the collectives of a loss's forward and backward pass over ``num_pairs`` pairs in equal shares, in order.

    Args:
        width: E.
        wire_dtype: dtype of the features; float64 features have gradients in float64.
        loss: "softmax" (`clipcore.loss.ClipLoss`) or "sigmoid" (`SigLipLoss`), without ids.
    """
    rows = num_pairs // num_ranks
    part_bytes = 64 + -(-rows * width * wire_dtype.itemsize // 16) * 16
    wide_bytes = max(4, wire_dtype.itemsize)
    columns = Collective(REDUCE, 8 * num_pairs)
    sizes = [] if on_gpu else [Collective(GATHER, 24 * num_ranks)]
    features = [Collective(GATHER, num_ranks * part_bytes)]
    gradient = [Collective(SCATTER, num_pairs * width * wide_bytes)]
    if loss == "sigmoid":
        return [*sizes, *features, *gradient]
    return [*sizes, *features, columns, columns, columns, *gradient]


def gradient_collectives(num_parameters: int) -> list[Collective]:
    """Return the averaging of the parameters' gradients, in float32, as one collective."""
    return [Collective(REDUCE, 4 * num_parameters)]


class CollectiveCounter(TorchDispatchMode):
    """A mode that records in ``found`` the collectives called within it, from the process group's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Collective] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name == "c10d::allreduce_":
            self.found.append(Collective(REDUCE, sum(tensor.nbytes for tensor in args[0])))
        elif name == "c10d::_allgather_base_":
            self.found.append(Collective(GATHER, args[0].nbytes))
        elif name == "c10d::_reduce_scatter_base_":
            self.found.append(Collective(SCATTER, args[1].nbytes))
        elif name.startswith("c10d::"):
            raise ValueError(f"{name} has no formula in bench/wire.py: add one")
        return func(*args, **(kwargs or {}))
