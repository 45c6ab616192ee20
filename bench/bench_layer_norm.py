"""LayerNorm's passes, alone and as in a transformer block, against PyTorch and a copy of the same bytes.

python bench/bench_layer_norm.py [--shapes 201728x768 263168x1024] [--device cpu]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import parse, record, run
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels.layer_norm import (
    add_layer_norm_forward,
    layer_norm,
    layer_norm_backward,
    layer_norm_ref,
)

EPS = 1e-5
# ViT-B/16, L/14 and H/14 at 1,024 images.
GPU_SHAPES = ["201728x768", "263168x1024", "263168x1280"]
CPU_SHAPES = ["6400x768"]


def copy_of(num_bytes: int, device: torch.device) -> Callable[[], Any]:
    """Return a copy that moves so many bytes, reads plus writes: the bound of a pass that is limited by memory."""
    source = torch.randn(num_bytes // 8, device=device)
    return lambda: torch.empty_like(source).copy_(source)


def torchs_own(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Run F.layer_norm with weights in the dtype of x, its fastest case."""
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), EPS)


def forward_and_backward(
    fn: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor
) -> Callable[[], Any]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    return lambda: torch.autograd.grad(fn(*leaves), leaves, dy)


def add_and_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stream and its LayerNorm, the beginning of a block's half."""
    stream = x + delta
    return stream, torchs_own(stream, weight, bias)


def backward_eager(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, dstream: Tensor
) -> list[Tensor]:
    """Run the same half backward: LayerNorm, the sum with the stream's gradient, the gradient of the bias before it."""
    weight = weight.to(x.dtype)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy, x, weight.shape, mean, rstd, weight, weight, [True, True, True]
    )
    dx = dx + dstream
    return [dx, dweight, dbias, dx.sum(0)]


def bench_shape(N: int, D: int, device: torch.device, dtype: torch.dtype) -> None:
    x, delta, dy, dstream = (torch.randn(N, D, device=device).to(dtype) for _ in range(4))
    weight, bias = 1 + 0.1 * torch.randn(D, device=device), torch.randn(D, device=device)
    case = {"N": N, "D": D, "dtype": str(dtype).removeprefix("torch.")}
    matrix = N * D * dtype.itemsize

    def table(op: str, fns: dict[str, Callable[[], Any]], matrices: int) -> None:
        copy = {"copy of the bytes": copy_of(matrices * matrix, device)}
        record(op, {**fns, **copy}, device=device, flops=0, bytes_moved=matrices * matrix, **case)

    inputs = [x, weight, bias]
    compiled = torch.compile(layer_norm_ref)
    fns = {"clipcore": layer_norm, "F.layer_norm": torchs_own, "torch.compile": compiled}
    fns["eager"] = layer_norm_ref
    with torch.no_grad():
        table("layer_norm forward", {name: lambda f=f: f(*inputs) for name, f in fns.items()}, 2)
    both = {name: forward_and_backward(f, inputs, dy) for name, f in fns.items()}
    table("layer_norm forward+backward", both, 5)
    halves = {"eager": add_and_norm, "torch.compile": torch.compile(add_and_norm)}
    fns = {"clipcore": lambda: add_layer_norm_forward(x, delta, weight, bias, EPS)}
    fns |= {name: lambda f=f: f(x, delta, weight, bias) for name, f in halves.items()}
    with torch.no_grad():
        table("add_layer_norm forward", fns, 4)
    stream, _, mean, rstd = add_layer_norm_forward(x, delta, weight, bias, EPS)
    _, *theirs = torch.native_layer_norm(stream, (D,), weight.to(dtype), bias.to(dtype), EPS)
    halves = {"eager": backward_eager, "torch.compile": torch.compile(backward_eager)}
    fns = {"clipcore": lambda: layer_norm_backward(dy, stream, mean, rstd, weight, dstream, True)}
    fns |= {name: lambda f=f: f(dy, stream, *theirs, weight, dstream) for name, f in halves.items()}
    table("layer_norm_backward with stream and column sum", fns, 4)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=None, help="NxD")
    arguments = parse(parser, ["tests/test_layer_norm.py"], argv)
    device = arguments.device
    on_gpu = device.type == "cuda"
    for shape in arguments.shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES):
        N, D = map(int, shape.split("x"))
        for dtype in (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16):
            bench_shape(N, D, device, dtype)


if __name__ == "__main__":
    run(main)
