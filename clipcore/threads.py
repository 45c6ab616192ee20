"""How many threads of the CPU a process computes with: one, or all that it may have, whichever is faster.

Threads that share an operation wait for each other at its end, and spin while they do. Beside other work a thread may have
lost its core by then: on a busy machine of two cores a step took 2,500 ms with two threads and 132 ms with one, on the
idle machine two are 1.2 times as fast (docs/log.md). So both are timed, on the batch in hand, before the first step.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from clipcore.grad_cache import Embed
from clipcore.resnet import replayed

FEWEST_ROWS = 32
# A shorter pass is mostly the start of its operations, in which further threads have no part.
LONG_ENOUGH_S = 0.05
ROUNDS = 3


class Timed(NamedTuple):
    """A pass with one thread and with all of them.

    Attributes:
        number: of threads, the faster one.
        most: all of them.
        rows: pairs that were embedded and differentiated.
        one_s, most_s: median seconds.
    """

    number: int
    most: int
    rows: int
    one_s: float
    most_s: float

    def __str__(self) -> str:
        first, second = (f"{1000 * seconds:,.0f} ms" for seconds in (self.one_s, self.most_s))
        return (
            f"threads: {self.number}; {self.rows} pairs take {first} with 1 and {second} with {self.most} "
            "(--threads N to choose)"
        )


def most_threads(world_size: int, workers: int) -> int:
    """Return how many threads a process may have: those that ranks and data loader processes leave, at least one."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return max(1, len(os.sched_getaffinity(0)) // local_ranks - workers)


def set_faster(
    embed: Embed,
    module: nn.Module,
    num_rows: int,
    most: int,
    add_up: Callable[[list[float]], list[float]] = list,
) -> Timed:
    """Time one thread against ``most`` and set torch's number to the faster; gradients and BatchNorm's statistics stay as
    they were.

    Args:
        embed: as of ``grad_cache.differentiate``.
        num_rows: of the batch; the pass takes as few of them as are telling.
        add_up: sums numbers over the ranks, which then decide alike.
    """
    rows = min(FEWEST_ROWS, num_rows)
    with replayed(module):
        torch.set_num_threads(most)
        _seconds(embed, module, rows)  # of which some is spent once
        while rows < num_rows and add_up([_seconds(embed, module, rows)])[0] < LONG_ENOUGH_S:
            rows = min(2 * rows, num_rows)

        taken: dict[int, list[float]] = {most: [], 1: []}
        for _ in range(ROUNDS):
            for number, seconds in taken.items():
                torch.set_num_threads(number)
                seconds.append(_seconds(embed, module, rows))

    one_s, most_s = add_up([statistics.median(taken[1]), statistics.median(taken[most])])
    number = 1 if one_s < most_s else most
    torch.set_num_threads(number)
    return Timed(number, most, rows, one_s, most_s)


def _seconds(embed: Embed, module: nn.Module, rows: int) -> float:
    """Return how long some rows take forward and backward."""
    start = time.perf_counter()
    trained = [part for part in embed(slice(0, rows), None) if part.requires_grad]
    torch.autograd.backward(trained, [torch.ones_like(part) for part in trained])
    module.zero_grad(set_to_none=True)
    return time.perf_counter() - start
