"""What a device can do at most: a copy of much memory, and matrix products at the inner sizes of CLIP's towers.

Every share of a floor in bench/'s tables and in a run's profile is relative to these two rates, measured on the same device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

HEAD_START = 2_000_000  # cycles of a GPU, about a millisecond


class Work(NamedTuple):
    """A piece of work, what it costs at least, and what tells it from others."""

    fn: Callable[[], Any]
    flops: float
    bytes_moved: float
    case: dict[str, Any]


class Ceilings(NamedTuple):
    """Rates of one device: bytes a second of a copy, its read and its write both counted; FLOP a second of products."""

    bytes_per_s: float
    flops_per_s: float

    def floor_ms(self, bytes_moved: float, flops: float) -> float:
        """Return the least time for a piece of work, with memory traffic and arithmetic overlapped."""
        return 1e3 * max(bytes_moved / self.bytes_per_s, flops / self.flops_per_s)


def copy_work(device: torch.device, num_bytes: int = 2**28) -> Work:
    """Return a copy that reads and writes every byte once, far beyond the caches."""
    # A generator of its own, since a training run draws from the common one.
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(num_bytes // 4, device=device, generator=generator)
    out = torch.empty_like(x)
    return Work(lambda: out.copy_(x), 0.0, 2.0 * num_bytes, {"bytes": num_bytes})


def product_work(width: int, dtype: torch.dtype, device: torch.device, rows: int) -> Work:
    """Return the product [rows, width] x [width, 4 width], the first layer of an MLP."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, width, device=device, generator=generator).to(dtype)
    weight = torch.randn(4 * width, width, device=device, generator=generator).to(dtype)
    return Work(
        lambda: x @ weight.T,
        2.0 * rows * width * 4 * width,
        float(dtype.itemsize * (rows * width * 5 + 4 * width**2)),
        {"N": rows, "K": width, "M": 4 * width, "dtype": str(dtype).removeprefix("torch.")},
    )


def time_ms(fn: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds of one call: the device's on a GPU, the clock's on the CPU."""
    if device.type == "cuda":
        # The device is busy while the host gets ahead: what is timed is the device, not the dispatch of a first kernel.
        torch.cuda._sleep(HEAD_START)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        fn()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last)
    start = time.perf_counter()
    fn()
    return 1e3 * (time.perf_counter() - start)


def measure_ceilings(
    widths: Iterable[int], dtype: torch.dtype, device: torch.device, rounds: int = 5
) -> Ceilings:
    """Measure the rates of a device: the best of ``rounds`` calls and, for products, of all widths.

    Takes half a gigabyte at most for the copy, and less for the products of widths up to 1280.
    """
    copy = copy_work(device)
    bytes_per_s = copy.bytes_moved / _least_s(copy, device, rounds)
    del copy  # its memory, before the products take theirs
    rows = 16384 if device.type == "cuda" else 2048
    products = (product_work(width, dtype, device, rows) for width in widths)
    return Ceilings(bytes_per_s, max(w.flops / _least_s(w, device, rounds) for w in products))


def _least_s(work: Work, device: torch.device, rounds: int) -> float:
    work.fn()
    return min(time_ms(work.fn, device) for _ in range(rounds)) / 1e3
