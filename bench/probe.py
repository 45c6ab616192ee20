"""What a machine has and does, before anything is measured on it: packages, matrix products, attention's bits and NaN.

python bench/probe.py [--device cuda]

Answers in half a minute what later figures depend on. A line for each question, and a row where the answer can change
with torch or the chip. Exit status 1 if a package that clipcore itself needs is missing, or its own kernels are wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from collections.abc import Sequence

import torch
import triton
from harness import broken, leaving_out, parse, record_row, run
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipcore.kernels import attention_triton, tiles
from clipcore.kernels.attention import attention_ref

# What goes without each.
NEEDED = {
    "ftfy": "the tokenizer, and so the main job",
    "tokenizers": "the tokenizer, and so the main job",
    "safetensors": "weights",
    "PIL": "images",
    "pytest": "all tests",
    "xdist": "tests in several processes",
}
PEERS = {
    "open_clip": "the peer of every ratio, and tests against it",
    "transformers": "a peer of the training step",
    "inf_cl": "a peer of the loss",
    "cut_cross_entropy": "a peer of the loss",
    "siglip_kernel": "a peer of the sigmoid loss",
}
BACKENDS = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = parse(parser, [], argv).device

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"torch {torch.__version__}, Triton {triton.__version__}")
    find_packages()
    for question in (accumulate, repeat_attention, attend_far, narrow_heads):
        with leaving_out(f"clipcore, {question.__name__}"):
            question(device)


def find_packages() -> None:
    """Name what is missing, and what goes without it."""
    for packages, is_needed in ((NEEDED, True), (PEERS, False)):
        for name, use in packages.items():
            if importlib.util.find_spec(name) is None:
                print(f"missing: {name} ({use}); a wheel in wheels/ is installed by bench/gpu.sh")
                if is_needed:
                    broken.append(name)


def accumulate(device: torch.device) -> None:
    """16-bit products are added to float32 sums in place, as the losses' library engine does."""
    a, b = (torch.randn(64, 64, device=device).half() for _ in range(2))
    sums = torch.randn(64, 64, device=device)
    exact = sums.double() + a.double() @ b.double()
    tiles.addmm_fp32_(sums, a, b)
    report("16-bit product added to float32", "torch", device, sums, exact)


def attention_inputs(
    shape: tuple[int, ...], keys: int, scale: float, device: torch.device
) -> list[Tensor]:
    """Queries [B, H, L, K], and as many heads of `keys` keys and values."""
    rows, heads, _, size = shape
    q = scale * torch.randn(shape, device=device)
    k, v = (torch.randn(rows, heads, keys, size, device=device) for _ in range(2))
    return [x.to(torch.bfloat16).requires_grad_() for x in (q, k, v)]


def attend(leaves: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Queries', keys' and values' gradients of torch's attention, flat and side by side."""
    out = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
    upstream = torch.ones_like(out) + torch.arange(out.shape[2], device=out.device)[:, None] % 3
    found = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    return torch.cat([gradient.flatten() for gradient in found])


def in_float64(leaves: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """The same from the same values."""
    with sdpa_kernel(SDPBackend.MATH):
        return attend([leaf.detach().double().requires_grad_() for leaf in leaves], mask)


def for_each_backend(
    op: str, leaves: Sequence[Tensor], mask: Tensor | None, device: torch.device
) -> None:
    """Rows of the gradient by each of torch's backends: its error, and whether two calls give the same bits."""
    exact = in_float64(leaves, mask)
    for name in BACKENDS:
        with leaving_out(f"{op}, {name}"), sdpa_kernel(getattr(SDPBackend, name)):
            found = attend(leaves, mask)
            again = attend(leaves, mask)
            report(op, f"SDPA {name}", device, found, exact, repeatable=torch.equal(found, again))


def repeat_attention(device: torch.device) -> None:
    """The backward pass may add in any order; a run's bits need one that does not."""
    length = 257 if device.type == "cuda" else 33
    leaves = attention_inputs((8, 4, length, 64), length, 1.0, device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for_each_backend(f"attention's gradient, L = {length}", leaves, None, device)
    finally:
        torch.use_deterministic_algorithms(False)


def attend_far(device: torch.device) -> None:
    """Scores of about -120 with one query, and under a mask at 64 and 128 tokens: where cuDNN has been seen to give NaN."""
    q, k, v = attention_inputs((4, 2, 1, 64), 50, 1.0, device)
    with torch.no_grad():
        k.copy_(-15 * q.expand_as(k) + k)
    for_each_backend("attention's gradient, one query, far keys", (q, k, v), None, device)

    for length in (64, 128):
        leaves = attention_inputs((4, 2, length, 64), length, 4.0, device)
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        for_each_backend(f"attention's gradient, mask, L = {length}", leaves, mask, device)


def narrow_heads(device: torch.device) -> None:
    """Heads of 40 and 48 columns, which `attention_triton.supports` refuses: what the kernels make of them now."""
    for size in (40, 48):
        for length in (33, 77):
            op = f"attention kernels, heads of {size}, L = {length}"
            qkv = torch.randn(3, length, 3, 2, size).to(device, torch.bfloat16)
            upstream = torch.randn(3, length, 2 * size).to(device, torch.bfloat16)

            def passes(qkv: Tensor = qkv, upstream: Tensor = upstream) -> Tensor:
                out, lse = attention_triton.forward(qkv, False, None)
                gradient = attention_triton.backward(upstream, qkv, out, lse, False, None)
                return torch.cat([out.flatten(), gradient.flatten()])

            wide = qkv.double().requires_grad_()
            exact = attention_ref(wide, False, None)
            gradient = torch.autograd.grad(exact, wide, upstream.double())[0]
            exact = torch.cat([exact.detach().flatten(), gradient.flatten()])
            # What is refused already is no failure.
            with leaving_out(op):
                found = passes()
                is_same = torch.equal(found, passes())
                report(op, "clipcore", device, found, exact, repeatable=is_same)


def report(
    op: str, provider: str, device: torch.device, found: Tensor, exact: Tensor, **figures: bool
) -> None:
    """Record the relative error against float64, and whether all numbers are finite."""
    error = torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact)
    is_finite = bool(found.isfinite().all())
    figures |= {"finite": is_finite}
    errors = {"gradient_error": error.item()} if is_finite else {}
    record_row(op, provider, device=device, figures={**figures, **errors})


if __name__ == "__main__":
    run(main)
