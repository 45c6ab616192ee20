"""Packed attention against torch's backends, a compiled definition, and a copy of the bytes that it has to move.

python bench/bench_attention.py [--device cuda] [--batch 1024]

On a GPU, `--sweep` times other rows for the launch table of kernels/attention_triton.py instead, and prints the fastest
first. It takes a minute after the tests, most of it for compiling in one process a core.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from harness import measure, parse, record, run
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipcore.kernels import attention_triton
from clipcore.kernels.attention import attention, attention_ref


class Shape(NamedTuple):
    """The shape of a tower's attention."""

    length: int
    heads: int
    size: int
    is_causal: bool = False
    has_segments: bool = False


SHAPES = {
    "ViT-B/32": Shape(50, 12, 64),
    "ViT-B/16": Shape(197, 12, 64),
    "ViT-L/14": Shape(257, 16, 64),
    "ViT-H/14": Shape(257, 16, 80),
    "text": Shape(77, 8, 64, is_causal=True),
    "packed text": Shape(128, 8, 64, is_causal=True, has_segments=True),
}


class Problem(NamedTuple):
    """The inputs of the passes."""

    qkv: Tensor
    upstream: Tensor
    is_causal: bool
    segments: Tensor | None

    @classmethod
    def of(cls, shape: Shape, rows: int, device: torch.device, dtype: torch.dtype) -> Problem:
        """Draw random numbers, and captions of 16 tokens on average for packed rows."""
        length, heads, size, is_causal, has_segments = shape
        qkv = torch.randn(rows, length, 3, heads, size, device=device, dtype=dtype)
        upstream = torch.randn(rows, length, heads * size, device=device, dtype=dtype)
        starts = torch.rand(rows, length, device=device) < 1 / 16
        segments = starts.cumsum(1).to(torch.int32) if has_segments else None
        return cls(qkv, upstream, is_causal, segments)

    def pairs(self) -> float:
        """Return the number of (query, key) pairs that the mask shows."""
        rows, length = self.qkv.shape[:2]
        seen = torch.ones(length, length, device=self.qkv.device, dtype=torch.bool)
        seen = seen.tril() if self.is_causal else seen
        if self.segments is None:
            return float(rows * seen.sum().item())
        same = self.segments[:, :, None] == self.segments[:, None, :]
        return float((same & seen).sum().item())


def sdpa(backend: SDPBackend | None, problem: Problem) -> Callable[[Tensor], Tensor]:
    """Return torch's attention on the packed projection, with the backend's mask made beforehand."""
    mask = None
    if problem.segments is not None:
        same = problem.segments[:, None, :, None] == problem.segments[:, None, None, :]
        mask = same.tril() if problem.is_causal else same

    def call(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        is_causal = problem.is_causal and mask is None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return out.transpose(1, 2).flatten(2)

    def call_with(qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return call(qkv)

    return call if backend is None else call_with


def forward_and_backward(fn: Callable[[Tensor], Tensor], problem: Problem) -> Callable[[], Any]:
    """Return the packed gradient, by autograd."""
    leaf = problem.qkv.clone().requires_grad_()
    return lambda: torch.autograd.grad(fn(leaf), leaf, problem.upstream)


def launched(problem: Problem) -> Tensor:
    """Run forward and backward by the launchers."""
    qkv, upstream, *how = problem
    out, lse = attention_triton.forward(qkv, *how)
    return attention_triton.backward(upstream, qkv, out, lse, *how)


def copy_of(num_bytes: float, device: torch.device) -> Callable[[], Any]:
    """Return a copy that reads half of the bytes and writes half."""
    source = torch.randn(int(num_bytes / 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def bench_shape(name: str, rows: int, device: torch.device, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    problem = Problem.of(shape, rows, device, dtype)
    qkv, _, is_causal, segments = problem
    on_gpu = device.type == "cuda"
    backends = {"SDPA": None}
    if on_gpu:
        backends = {
            f"SDPA {backend.name}": backend
            for backend in (
                SDPBackend.CUDNN_ATTENTION,
                SDPBackend.FLASH_ATTENTION,
                SDPBackend.EFFICIENT_ATTENTION,
                SDPBackend.MATH,
            )
        }
    peers = {label: sdpa(backend, problem) for label, backend in backends.items()}
    torch._dynamo.reset()
    definition = partial(attention_ref, is_causal=is_causal, segments_RL=segments)
    peers["torch.compile"] = torch.compile(definition, dynamic=False)
    forward = {label: partial(fn, qkv) for label, fn in peers.items()}
    both = {label: forward_and_backward(fn, problem) for label, fn in peers.items()}
    if on_gpu:
        ours: dict[str, Callable[[], Any]] = {
            "forward": lambda: attention_triton.forward(*(qkv, is_causal, segments)),
            "both": partial(launched, problem),
        }
    else:
        public = partial(attention, is_causal=is_causal, segments_RL=segments)
        ours = {"forward": partial(public, qkv), "both": forward_and_backward(public, problem)}
    numbers, sums = qkv.numel() // 3, 4 * qkv.numel() // (3 * shape.size)
    products = 4 * problem.pairs() * shape.heads * shape.size
    case = {
        "tower": name,
        "R": rows,
        "L": shape.length,
        "H": shape.heads,
        "K": shape.size,
        "dtype": str(dtype).removeprefix("torch."),
    }
    for op, fns, flops, moved in (
        ("forward", {"clipcore": ours["forward"], **forward}, products, 4),
        ("forward+backward", {"clipcore": ours["both"], **both}, 3.5 * products, 12),
    ):
        # Backward: output, its gradient and the projection in, the projection's gradient out.
        bytes_moved = float(moved * numbers * dtype.itemsize + sums * (1 if moved == 4 else 2))
        fns["copy of the bytes"] = copy_of(bytes_moved, device)
        work = {"flops": flops, "bytes_moved": bytes_moved}
        record(f"attention {op}", fns, device=device, **work, **case)


# What the sweep tries, by kernel: BLOCK, STEP, smallest side of a rest or tail, num_warps, num_stages.
Launch = tuple[int, int, int, int, int]
ONE_TILE: dict[str, list[Launch]] = {
    "forward": [(64, 64, 64, warps, 1) for warps in (2, 4, 8)],
    "tile": [(64, 64, 64, warps, 1) for warps in (2, 4, 8)],
}
TWO_TILES: dict[str, list[Launch]] = {
    "tile": [(128, 128, 128, warps, 1) for warps in (4, 8, 16)],
    "forward": [(128, 128, 128, 8, 1), (128, 128, 128, 4, 1)],
}
BLOCKS: dict[str, list[Launch]] = {
    "forward": [
        (64, 64, 16, 4, 1),
        (64, 64, 16, 4, 2),
        (64, 64, 16, 4, 3),
        (64, 64, 64, 4, 2),
        (64, 32, 16, 4, 3),
        (64, 128, 16, 4, 1),
        (128, 64, 16, 8, 2),
        (128, 64, 16, 8, 3),
        (128, 128, 16, 8, 1),
    ],
    "both": [
        (64, 32, 16, 4, 1),
        (64, 32, 16, 4, 2),
        (64, 32, 16, 4, 3),
        (64, 32, 64, 4, 2),
        (64, 32, 64, 8, 2),
        (64, 64, 16, 4, 2),
        (64, 64, 64, 8, 2),
        (128, 32, 16, 8, 2),
        (128, 64, 16, 8, 2),
    ],
    "query": [(64, 64, 16, 4, 2), (64, 32, 16, 4, 2), (128, 64, 16, 8, 2)],
    "key": [(64, 64, 16, 4, 2), (64, 32, 16, 4, 2), (64, 32, 64, 4, 2), (128, 64, 16, 8, 2)],
}


def candidates(shape: Shape) -> list[tuple[str, Launch]]:
    """Return each (kernel, row of the table) that can serve a shape."""
    groups = [ONE_TILE] if shape.length <= 64 else [BLOCKS]
    if 64 < shape.length <= 128:
        groups.append(TWO_TILES)
    return [
        (kernel, launch)
        for group in groups
        for kernel, launches in group.items()
        for launch in launches
    ]


def only(kernel: str, launch: Launch) -> None:
    """Make one launch this process's table; the other of "query" and "key" keeps a row that compiles fast."""
    names = {"forward": (64, 64, 64, 4, 1), kernel: launch}
    if kernel in ("query", "key"):
        names = {"query": (64, 32, 64, 4, 1), "key": (64, 32, 64, 4, 1), **names}
    architecture = launch.architecture(torch.device("cuda"))
    rows: attention_triton.Launches
    attention_triton._LAUNCH_TABLE.clear()
    for name, row in names.items():
        rows = {(attention_triton.LONGEST, attention_triton.WIDEST): row}
        attention_triton._LAUNCH_TABLE[architecture, name] = rows


def sweep_call(problem: Problem, kernel: str) -> Callable[[], Any]:
    """Return the pass that a kernel belongs to."""
    qkv, upstream, *how = problem
    if kernel == "forward":
        return lambda: attention_triton.forward(qkv, *how)
    out, lse = attention_triton.forward(qkv, *how)
    return lambda: attention_triton.backward(upstream, qkv, out, lse, *how)


def compile_one(name: str, kernel: str, launch: Launch) -> str | None:
    """Compile a kernel into the compiler's cache on disk; return the error, if there was one."""
    only(kernel, launch)
    try:
        sweep_call(Problem.of(SHAPES[name], 1, torch.device("cuda"), torch.bfloat16), kernel)()
        torch.cuda.synchronize()
    except Exception as error:  # any compiler error of a row that does not fit the chip
        return (str(error) or repr(error)).splitlines()[0][:90]
    return None


def sweep(rows: int, names: list[str]) -> None:
    device = torch.device("cuda")
    jobs = [(name, *candidate) for name in names for candidate in candidates(SHAPES[name])]
    workers = max(1, min(len(jobs), os.cpu_count() or 1))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        failures = dict(zip(jobs, pool.map(compile_one, *zip(*jobs, strict=True)), strict=True))
    for name in names:
        problem = Problem.of(SHAPES[name], rows, device, torch.bfloat16)
        for kernel in dict.fromkeys(kernel for kernel, _ in candidates(SHAPES[name])):
            times: list[tuple[float, Launch]] = []
            for launch in [row for one, row in candidates(SHAPES[name]) if one == kernel]:
                if failure := failures[name, kernel, launch]:
                    print(f"{name} {kernel} {launch}: {failure}")
                    continue
                only(kernel, launch)
                call = {kernel: sweep_call(problem, kernel)}
                for found in measure(call, device, budget_s=0.05).values():
                    times.append((statistics.median(found.times_ms), launch))
            for time_ms, launch in sorted(times):
                print(f"{name} {kernel} {launch}: {time_ms:.4f} ms", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--towers", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sweep", action="store_true", help="time rows for the launch table")
    arguments = parse(parser, ["tests/test_attention_kernels.py"], argv)
    device = arguments.device
    on_gpu = device.type == "cuda"
    if arguments.sweep:
        sweep(arguments.batch or 256, arguments.towers)
        return
    for name in arguments.towers:
        dtype = torch.bfloat16 if on_gpu else torch.float32
        bench_shape(name, arguments.batch or (1024 if on_gpu else 8), device, dtype)


if __name__ == "__main__":
    run(main)
