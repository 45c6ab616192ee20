"""normalized_similarity and similarity_topk against plain PyTorch and the bare matrix product.

python bench/bench_similarity.py [--sizes 1024 4096] [--width 512] [--device cpu]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from harness import parse, record, run
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels.similarity import normalized_similarity
from clipcore.kernels.similarity_topk import similarity_topk


def eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Compute the similarity without clipcore."""
    return scale * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T


def forward_and_backward(
    fn: Callable[..., Tensor], x: Tensor, y: Tensor, scale: Tensor
) -> Callable[[], Any]:
    leaves = [tensor.clone().requires_grad_() for tensor in (x, y, scale)]
    upstream = torch.randn(len(x), len(y), device=x.device, dtype=x.dtype)
    return lambda: torch.autograd.grad(fn(*leaves), leaves, upstream)


def bench_size(size: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
    x, y = (torch.randn(size, width, device=device, dtype=dtype) for _ in range(2))
    scale = torch.tensor(14.3, device=device, dtype=dtype)
    case = {"N": size, "D": width, "dtype": str(dtype).removeprefix("torch.")}
    product, item = 2.0 * size * size * width, dtype.itemsize
    work = {
        "device": device,
        "flops": product,
        "bytes_moved": item * (2.0 * size * width + size * size),
    }
    compiled = torch.compile(eager)
    fns = {"clipcore": normalized_similarity, "eager": eager, "torch.compile": compiled}
    forward = {name: partial(fn, x, y, scale) for name, fn in fns.items()}
    record("similarity forward", {**forward, "bare product": lambda: x @ y.T}, **work, **case)
    both = {name: forward_and_backward(fn, x, y, scale) for name, fn in fns.items()}
    record("similarity forward+backward", both, **{**work, "flops": 3 * product}, **case)
    k = min(10, size)
    topk = {"device": device, "flops": product, "bytes_moved": item * 2.0 * size * width}
    ranked = {
        "clipcore": lambda: similarity_topk(x, y, k),
        "full matrix": lambda: eager(x, y, scale).topk(k),
    }
    record("similarity_topk", ranked, **topk, **case, k=k)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=None)
    parser.add_argument("--width", type=int, default=512)
    arguments = parse(parser, ["tests/test_similarity.py", "tests/test_similarity_topk.py"], argv)
    device = arguments.device
    on_gpu = device.type == "cuda"
    sizes = arguments.sizes or ([4096, 16384, 32768] if on_gpu else [512, 2048])
    for dtype in (torch.bfloat16, torch.float32) if on_gpu else (torch.float32,):
        for size in sizes:
            bench_size(size, arguments.width, device, dtype)


if __name__ == "__main__":
    run(main)
