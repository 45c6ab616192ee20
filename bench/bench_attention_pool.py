"""Attention of one query a sequence with absorbed projections, against keys and values with torch's attention, and a copy.

python bench/bench_attention_pool.py [--batch 256] [--device cpu]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import parse, record, run
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels.attention_pool import Linear, attention_pool

# Tokens, channels, heads: of the ResNets' attention pool, and of the last block of Vision Transformers.
SHAPES = {
    "RN50": (50, 2048, 32),
    "RN50x4": (82, 2560, 40),
    "RN50x16": (145, 3072, 48),
    "ViT-B-32": (50, 768, 12),
    "ViT-B-16": (197, 768, 12),
    "ViT-L-14": (257, 1024, 16),
}


def with_sdpa(q_BHK: Tensor, x_BLC: Tensor, key: Linear, value: Linear) -> Tensor:
    """Project all tokens to keys and values, and run torch's attention with one query."""
    k_BHLK, v_BHLK = (
        F.linear(x_BLC, *layer).unflatten(-1, q_BHK.shape[1:]).transpose(1, 2)
        for layer in (key, value)
    )
    return F.scaled_dot_product_attention(q_BHK.unsqueeze(2), k_BHLK, v_BHLK).flatten(1)


def bench_model(name: str, batch: int, device: torch.device, dtype: torch.dtype) -> None:
    length, width, heads = SHAPES[name]
    size = width // heads

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    inputs = [numbers(batch, heads, size), numbers(batch, length, width)]
    for _ in range(2):
        inputs += [numbers(width, width) * width**-0.5, numbers(width)]
    upstream = numbers(batch, width)

    def call(fn: Callable[..., Tensor], leaves: list[Tensor]) -> Tensor:
        q, x, *linear = leaves
        return fn(q, x, tuple(linear[:2]), tuple(linear[2:]))

    def forward(fn: Callable[..., Tensor]) -> Callable[[], Any]:
        def run() -> Tensor:
            with torch.no_grad():
                return call(fn, inputs)

        return run

    def both(fn: Callable[..., Tensor]) -> Callable[[], Any]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        return lambda: torch.autograd.grad(call(fn, leaves), leaves, upstream)

    torch._dynamo.reset()
    fns = {
        "clipcore": attention_pool,
        "eager, SDPA": with_sdpa,
        "torch.compile": torch.compile(with_sdpa, dynamic=False),
    }
    # Tokens twice forward, and once more with their gradient; both weights.
    tokens, weights = batch * length * width * dtype.itemsize, 2 * width**2 * dtype.itemsize
    flops = 4.0 * batch * (heads * length * width + width**2)
    case = {"model": name, "B": batch, "dtype": str(dtype).removeprefix("torch.")}
    for op, made, moved, passes in (
        ("forward", forward, 2 * tokens + weights, 1),
        ("forward+backward", both, 5 * tokens + 3 * weights, 3),
    ):
        source = torch.randn(moved // 8, device=device)
        target = torch.empty_like(source)
        timed = {label: made(fn) for label, fn in fns.items()}
        timed["copy of the bytes"] = lambda source=source, target=target: target.copy_(source)
        work = {"flops": passes * flops, "bytes_moved": float(moved)}
        record(f"attention_pool {op}", timed, device=device, **work, **case)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batch", type=int, default=None)
    arguments = parse(parser, ["tests/test_residual.py", "-k", "attention_pool"], argv)
    device = arguments.device
    on_gpu = device.type == "cuda"
    for name in arguments.models:
        for dtype in (torch.float16, torch.bfloat16) if on_gpu else (torch.float32,):
            bench_model(name, arguments.batch or (512 if on_gpu else 16), device, dtype)


if __name__ == "__main__":
    run(main)
