"""How many threads of the CPU a process computes with: one, or all that it may have, whichever is faster.

Threads that share an operation wait for each other at its end, and spin while they do. Beside other work a thread may have
lost its core by then: on a busy machine of two cores a step took 3,196 ms with two threads and 388 ms with one. On the same
machine, idle, two are 1.3 times as fast (docs/log.md, 2026-11-29). So both are timed before the first step.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from clipcore.ranks.distributed import World, broadcast_object, gather_sizes
from clipcore.run.grad_cache import Embed
from clipcore.run.recipe import RunConfig
from clipcore.towers.resnet import replayed

# A ResNet's BatchNorm needs two.
FEWEST_ROWS = 2
# A shorter pass is mostly the start of its operations, in which further threads have no part.
LONG_ENOUGH_S = 0.05
ROUNDS = 3
# Of the products that are timed where there is no step: a block of features by a square matrix, 20 ms together.
_PRODUCT_ROWS, _PRODUCT_SIDE, _NUM_PRODUCTS = 256, 512, 8
# A number that takes so many times as long in one round is not tried again.
FAR_APART = 2.0


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
    """Return how many threads a process may have: the least number of all ranks, and at least one.

    A machine's cores are shared among its ranks, and each rank's data loader processes take one each.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    here = max(1, len(os.sched_getaffinity(0)) // local_ranks - workers)
    return min(number for number, _ in gather_sizes(here, 0, "numbers of threads"))


def set_threads(config: RunConfig, is_chosen: bool, world: World) -> RunConfig:
    """Set the number of threads on a CPU; return the settings with it, or with None if it is to be measured.

    --threads decides, else OMP_NUM_THREADS of the first rank (which torchrun sets to 1 for several ranks of a machine), else
    what a resumed run began with, where this machine has as many to give.
    """
    if world.device.type != "cpu":
        if is_chosen and config.threads is not None:
            torch.set_num_threads(config.threads)
        return config

    most = most_threads(world.world_size, config.workers)
    number, note = config.threads, None
    if not is_chosen and "OMP_NUM_THREADS" in os.environ:
        number = torch.get_num_threads()
        if config.threads not in (None, number):
            note = f"OMP_NUM_THREADS is {number}, where this run had {config.threads}"
    elif not is_chosen and number is not None and number > most:
        note = f"this run had {number} threads, and here it may have {most}"
        number = None
    if note is not None:
        world.print(f"{note}: sums may round otherwise than before (--threads N to choose)")

    number = broadcast_object(1 if number is None and most == 1 else number)
    torch.set_num_threads(most if number is None else number)
    return dataclasses.replace(config, threads=number)


def set_faster(
    embed: Embed,
    module: nn.Module,
    most_rows: int,
    most: int,
    add_up: Callable[[list[float]], list[float]] = list,
) -> Timed:
    """Time one thread against ``most`` and set torch's number to the faster.

    The parameters end without gradients; BatchNorm's statistics stay as they were.

    Args:
        embed: as of ``grad_cache.differentiate``.
        most_rows: of a pass, which takes as few as are telling.
        most: more than one, and the same on every rank, as is ``most_rows``: a pass may be one of all ranks.
        add_up: sums numbers over the ranks, which then decide alike.
    """
    rows = min(FEWEST_ROWS, most_rows)
    with replayed(module):
        torch.set_num_threads(most)
        while rows < most_rows:
            # Of two, since some is spent once, and a machine may be busy for a moment.
            seconds = min(_seconds(embed, module, rows) for _ in range(2))
            if add_up([seconds])[0] >= LONG_ENOUGH_S:
                break
            rows = min(2 * rows, most_rows)
        _seconds(embed, module, rows)

        taken: dict[int, list[float]] = {most: [], 1: []}
        for _ in range(ROUNDS):
            for number, passes in taken.items():
                torch.set_num_threads(number)
                passes.append(_seconds(embed, module, rows))
            medians = [statistics.median(taken[1]), statistics.median(taken[most])]
            one_s, most_s = add_up(medians)
            if max(one_s, most_s) > FAR_APART * min(one_s, most_s):
                break

    number = 1 if one_s < most_s else most
    torch.set_num_threads(number)
    return Timed(number, most, rows, one_s, most_s)


def set_faster_for_products(most: int) -> int:
    """Time matrix products with one thread and with all of them; set torch's number to the faster, and return it.

    Probes and encoders alike are mostly products. Beside a busy process two threads may take several times as long as one.
    """
    rows, columns = (
        torch.ones(_PRODUCT_ROWS, _PRODUCT_SIDE),
        torch.ones(_PRODUCT_SIDE, _PRODUCT_SIDE),
    )
    taken: dict[int, list[float]] = {most: [], 1: []}
    for _ in range(ROUNDS):
        for number, seconds in taken.items():
            torch.set_num_threads(number)
            start = time.perf_counter()
            for _ in range(_NUM_PRODUCTS):
                torch.mm(rows, columns)
            seconds.append(time.perf_counter() - start)
    number = min(taken, key=lambda number: (statistics.median(taken[number]), -number))
    torch.set_num_threads(number)
    return number


def _seconds(embed: Embed, module: nn.Module, rows: int) -> float:
    """Return how long some rows take forward and backward."""
    start = time.perf_counter()
    trained = [part for part in embed(slice(0, rows), None) if part.requires_grad]
    torch.autograd.backward(trained, [torch.ones_like(part) for part in trained])
    module.zero_grad(set_to_none=True)
    return time.perf_counter() - start
