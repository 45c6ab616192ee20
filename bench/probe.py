"""What to check on a machine before measuring: packages, matrix products, attention's bits and NaN.

python bench/probe.py [--device cuda]

It checks in half a minute what later figures depend on. Each check prints a line, and records a row if its result can change
with torch or the chip. The exit status is 1 if a package that clipcore itself needs is missing, or a check of its own fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from collections.abc import Sequence

import harness
import torch
import triton
from harness import leaving_out, parse, record_row, run
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipcore.kernels import attention_triton, launch
from clipcore.kernels.attention import attention_ref

# What needs each package.
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
# Calls that have to give the same bits.
CALLS = 10
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
    """Print each missing package, and what needs it."""
    for packages, is_needed in ((NEEDED, True), (PEERS, False)):
        for name, use in packages.items():
            if importlib.util.find_spec(name) is None:
                print(f"missing: {name} ({use}); a wheel in wheels/ is installed by bench/gpu.sh")
                if is_needed:
                    harness.settings.failed.append(name)


def accumulate(device: torch.device) -> None:
    """Check that 16-bit products are added to float32 sums in place, as the losses' library engine does."""
    a, b = (torch.randn(64, 64, device=device).half() for _ in range(2))
    sums = torch.randn(64, 64, device=device)
    exact = sums.double() + a.double() @ b.double()
    launch.addmm_fp32_(sums, a, b)
    error = report("16-bit product added to float32", "clipcore", device, [sums], exact)
    assert error < 1e-5, "the product was rounded to 16 bits on its way"


def attention_inputs(
    rows: int, queries: int, keys: int, scale: float, device: torch.device
) -> list[Tensor]:
    """Return queries, keys and values [rows, 4, L, 64] in bfloat16; scores are about 2.7 times `scale` on average."""
    away = torch.randn(rows, 4, 1, 64, device=device)
    q = away + 0.1 * torch.randn(rows, 4, queries, 64, device=device)
    k = scale / 3 * away + 0.1 * torch.randn(rows, 4, keys, 64, device=device)
    v = torch.randn(rows, 4, keys, 64, device=device)
    return [x.to(torch.bfloat16).requires_grad_() for x in (q, k, v)]


def attend(leaves: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Return the gradients of queries, keys and values by torch's attention, flat and side by side."""
    out = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
    upstream = torch.ones_like(out) + torch.arange(out.shape[2], device=out.device)[:, None] % 3
    found = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    return torch.cat([gradient.flatten() for gradient in found])


def for_each_backend(
    question: str, leaves: Sequence[Tensor], mask: Tensor | None, device: torch.device
) -> None:
    """Record the gradient's error by each of torch's backends, and whether `CALLS` give the same bits."""
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with sdpa_kernel(SDPBackend.MATH):
        exact = attend(wide, mask)
    for name in BACKENDS:
        with leaving_out(f"{question}, {name}"), sdpa_kernel(getattr(SDPBackend, name)):
            found = [attend(leaves, mask) for _ in range(CALLS)]
            shape = {"queries": leaves[0].shape[2], "keys": leaves[1].shape[2]}
            report(question, f"SDPA {name}", device, found, exact, **shape)


def repeat_attention(device: torch.device) -> None:
    """Find the backends that repeat their bits: a backward pass may add in any order, and a run needs one that does not."""
    rows, length = (64, 257) if device.type == "cuda" else (2, 33)
    leaves = attention_inputs(rows, length, length, 0.0, device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for_each_backend("attention's gradient", leaves, None, device)
    finally:
        torch.use_deterministic_algorithms(False)


def attend_far(device: torch.device) -> None:
    """Attend with all scores at about -120, with one query and with a mask: there cuDNN has given NaN."""
    leaves = attention_inputs(4, 1, 50, -45.0, device)
    for_each_backend("attention's gradient, far keys", leaves, None, device)

    for length in (64, 128):
        leaves = attention_inputs(4, length, length, -45.0, device)
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        for_each_backend("attention's gradient, far keys, mask", leaves, mask, device)


def narrow_heads(device: torch.device) -> None:
    """Run the kernels on heads of 40 and 48 columns, which `attention_triton.supports` refuses.

    Causal rows of 33 tokens with segments came out wrong on a chip.
    """
    for size in (40, 48):
        for is_causal in (True, False):
            length = 33
            qkv = torch.randn(5, length, 3, 3, size).to(device, torch.bfloat16)
            upstream = torch.randn(5, length, 3 * size).to(device, torch.bfloat16)
            starts = (torch.rand(5, length, device=device) < 0.1).cumsum(1).to(torch.int32)
            how = (is_causal, starts if is_causal else None)

            wide = qkv.double().requires_grad_()
            out = attention_ref(wide, *how)
            exact = torch.cat([out.detach().flatten(), *gradient_of(out, wide, upstream)])

            # A case that is already refused is no failure.
            question = "attention kernels on narrow heads"
            with leaving_out(f"{question}, {size} columns"):
                found = []
                for _ in range(CALLS):
                    out, lse = attention_triton.forward(qkv, *how)
                    gradient = attention_triton.backward(upstream, qkv, out, lse, *how)
                    found.append(torch.cat([out.flatten(), gradient.flatten()]))
                case = {"L": length, "K": size, "causal, segments": is_causal}
                report(question, "clipcore", device, found, exact, **case)


def gradient_of(out: Tensor, leaf: Tensor, upstream: Tensor) -> list[Tensor]:
    """Return the gradient of one leaf, flat, in its dtype."""
    (gradient,) = torch.autograd.grad(out, leaf, upstream.to(leaf.dtype))
    return [gradient.flatten()]


def report(
    question: str,
    provider: str,
    device: torch.device,
    found: Sequence[Tensor],
    exact: Tensor,
    **case: int,
) -> float:
    """Record the first result's relative error against float64, and whether all results have its bits; return the error."""
    first = found[0]
    error = torch.linalg.vector_norm(first.double() - exact) / torch.linalg.vector_norm(exact)
    figures: dict[str, float | bool] = {"finite": bool(first.isfinite().all())}
    if figures["finite"]:
        figures["gradient_error"] = error.item()
        # Two NaN are never equal.
        figures["repeatable"] = all(torch.equal(first, again) for again in found[1:])
    record_row(question, provider, device=device, figures=figures, **case)
    return error.item()


if __name__ == "__main__":
    run(main)
