"""GELU's passes against PyTorch and a copy of the same bytes.

python bench/bench_gelu.py [--shapes 201728x3072] [--kinds erf quick] [--device cpu]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench_layer_norm import copy_of
from harness import parse, record, run
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels.gelu import KINDS, gelu_backward, gelu_forward, gelu_ref

# The MLP of ViT-B/16 at 1,024 images.
GPU_SHAPES = ["201728x3072"]
CPU_SHAPES = ["6400x3072"]


def torchs_own(x: Tensor, kind: str) -> Tensor:
    """Apply torch's GELU; torch has no QuickGELU, so that one is its definition, as in models."""
    if kind == "quick":
        return gelu_ref(x, kind)
    return F.gelu(x, approximate="tanh" if kind == "tanh" else "none")


def backward_with_sum(fn: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Callable[[], Any]:
    """Return the gradients of x and of the bias before it, from a kept graph."""
    leaf = x.clone().requires_grad_()
    y = fn(leaf)

    def call() -> tuple[Tensor, Tensor]:
        (dx,) = torch.autograd.grad(y, leaf, dy, retain_graph=True)
        return dx, dx.sum(0)

    return call


def bench_shape(N: int, F: int, kind: str, device: torch.device, dtype: torch.dtype) -> None:
    x, dy = (torch.randn(N, F, device=device).to(dtype) for _ in range(2))
    case = {"N": N, "F": F, "kind": kind, "dtype": str(dtype).removeprefix("torch.")}
    matrix = x.nbytes
    peers = {"eager": lambda x: torchs_own(x, kind)}
    peers["torch.compile"] = torch.compile(peers["eager"])

    def table(op: str, fns: dict[str, Callable[[], Any]], matrices: int) -> None:
        copy = {"copy of the bytes": copy_of(matrices * matrix, device)}
        record(op, {**fns, **copy}, device=device, flops=0, bytes_moved=matrices * matrix, **case)

    with torch.no_grad():
        fns = {name: lambda f=f: f(x) for name, f in peers.items()}
        table("gelu forward", {"clipcore": lambda: gelu_forward(x, kind), **fns}, 2)
    fns = {name: backward_with_sum(f, x, dy) for name, f in peers.items()}
    ours = {"clipcore": lambda: gelu_backward(dy, x, kind, True, False)}
    table("gelu backward with column sum", {**ours, **fns}, 3)
    # The peers would recompute y in a separate pass; their time is the sum of two rows above.
    ours = {"clipcore": lambda: gelu_backward(dy, x, kind, True, True)}
    table("gelu backward with column sum and y", ours, 4)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=None, help="NxF")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    arguments = parse(parser, ["tests/test_gelu.py"], argv)
    device = arguments.device
    on_gpu = device.type == "cuda"
    for shape in arguments.shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES):
        N, F = map(int, shape.split("x"))
        for kind in arguments.kinds:
            for dtype in (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16):
                bench_shape(N, F, kind, device, dtype)


if __name__ == "__main__":
    run(main)
