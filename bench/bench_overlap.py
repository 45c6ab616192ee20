"""The nearest training image of each evaluation image, against plain products in blocks: CPU time.

python bench/bench_overlap.py [--images 5000] [--training 100000] [--width 256]

Descriptors are random, and those of the training images arrive in blocks, as in a real stream. The whole matrix of
cosines would take 2 GB.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import is_wanted, leaving_out, parse, record_row, run
from torch import Tensor
from torch.nn import functional as F

from clipcore.evaluate.overlap import nearest_training

_BLOCK_ROWS = 4096
_ROUNDS = 3


def products_in_blocks(images_NW: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """Return the cosine of the nearest training image, with a block of the cosines at a time."""
    images_NW = F.normalize(images_NW, dim=1)
    best_N = images_NW.new_full((len(images_NW),), -torch.inf)
    for block_BW in blocks:
        best_N = torch.maximum(best_N, (images_NW @ F.normalize(block_BW, dim=1).T).amax(1))
    return best_N


def bare_products(images_NW: Tensor, blocks: Sequence[Tensor]) -> None:
    """Multiply, and discard the products."""
    for block_BW in blocks:
        images_NW @ block_BW.T


PROVIDERS: dict[str, Callable[[Tensor, Sequence[Tensor]], Any]] = {
    "clipcore": nearest_training,
    "products and maxima": products_in_blocks,
    "bare products": bare_products,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000, help="[%(default)s]")
    parser.add_argument("--training", type=int, default=100_000, help="[%(default)s]")
    parser.add_argument("--width", type=int, default=256, help="[%(default)s]")
    tests = ["tests/test_overlap.py", "tests/test_overlap_study.py"]
    arguments = parse(parser, tests, argv, has_device=False)

    generator = torch.Generator().manual_seed(0)
    images_NW, training_MW = (
        torch.randn(number, arguments.width, generator=generator)
        for number in (arguments.images, arguments.training)
    )
    blocks = training_MW.split(_BLOCK_ROWS)
    times_s: dict[str, list[float]] = {name: [] for name in PROVIDERS if is_wanted(name)}
    for _ in range(_ROUNDS):
        # The providers take turns, so that load on the machine slows all of them alike.
        for name in times_s:
            with leaving_out(name):
                begun = time.process_time()
                PROVIDERS[name](images_NW, blocks)
                times_s[name].append(time.process_time() - begun)
    for name, times in times_s.items():
        if len(times) == _ROUNDS:
            record_row(
                "overlap",
                name,
                device=torch.device("cpu"),
                figures={"cpu_s": round(statistics.median(times), 2)},
                images=arguments.images,
                training=arguments.training,
                width=arguments.width,
            )


if __name__ == "__main__":
    run(main)
