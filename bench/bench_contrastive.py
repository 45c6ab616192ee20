"""The contrastive and the sigmoid loss against their peers, and against the matrix products that any loss needs.

python bench/bench_contrastive.py [--sizes 1024 8192] [--widths 512] [--loss softmax sigmoid] [--providers "open_clip"]
python bench/bench_contrastive.py --largest     on a GPU: doubles N until each provider runs out of memory

Rows: forward (with a graph for the backward) and forward+backward; peak memory above embeddings and gradients; relative
errors of loss and gradients against float64 up to N = 8,192; whether three runs gave the same bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from contrastive_providers import SIGMOID, SOFTMAX, Loss, bare_products, providers
from harness import leaving_out, parse, record, run
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels.contrastive import contrastive_ref
from clipcore.kernels.sigmoid import sigmoid_ref

# Above this size the float64 reference takes too much time and memory.
LARGEST_EXACT = 8192
# Above this size a dense provider fits no single GPU.
LARGEST_DENSE = 131072
# The first and the last batch that --largest tries.
FIRST_TRIED, LAST_TRIED = 8192, 2**19
FACTORS = {"softmax": (100.0,), "sigmoid": (10.0, -10.0)}
TABLES = {"softmax": SOFTMAX, "sigmoid": SIGMOID}
REFERENCES: dict[str, Loss] = {"softmax": contrastive_ref, "sigmoid": sigmoid_ref}


def inputs_for(
    loss: str, size: int, width: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Return leaves: pairs with a cosine of about 0.3 among random ones, and the loss's factors."""
    generator = torch.Generator(device).manual_seed(0)
    image, noise = (
        F.normalize(torch.randn(size, width, generator=generator, device=device)) for _ in range(2)
    )
    text = F.normalize(0.3 * image + noise)
    factors = (torch.tensor(factor, device=device) for factor in FACTORS[loss])
    return [t.requires_grad_() for t in (image.to(dtype), text.to(dtype), *factors)]


def forward_and_backward(loss_fn: Loss, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return only the gradients, as a step does."""
    return torch.autograd.grad(loss_fn(*leaves), leaves)


def errors(
    loss_fn: Loss, leaves: Sequence[Tensor], exact: Sequence[Tensor] | None
) -> dict[str, Any]:
    """Return relative errors against float64, and whether three runs give the same bits."""

    def run() -> list[Tensor]:
        loss = loss_fn(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    first = run()
    repeatable = all(torch.equal(a, b) for _ in range(2) for a, b in zip(first, run(), strict=True))
    found: dict[str, Any] = {"repeatable": repeatable}
    if exact is not None:
        relative = [
            float(torch.linalg.vector_norm(ours.double() - theirs) / theirs.norm())
            for ours, theirs in zip(first, exact, strict=True)
        ]
        found["loss_error"], found["gradient_error"] = relative[0], max(relative[1:3])
        found["scale_error"] = relative[3]
    return found


def exact_results(loss: str, leaves: Sequence[Tensor]) -> list[Tensor] | None:
    """Return loss and gradients in float64, from exactly the same inputs."""
    if len(leaves[0]) > LARGEST_EXACT:
        return None
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    value = REFERENCES[loss](*wide)
    return [value.detach(), *torch.autograd.grad(value, wide)]


def bench(
    loss: str,
    size: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    names: list[str] | None,
    once: bool,
) -> None:
    leaves = inputs_for(loss, size, width, device, dtype)
    case = {"N": size, "E": width, "dtype": str(dtype).removeprefix("torch.")}
    product, item = 2.0 * size * size * width, dtype.itemsize
    work = {"device": device, "flops": 3 * product, "bytes_moved": 4.0 * item * size * width}
    title = {"softmax": "contrastive loss", "sigmoid": "sigmoid loss"}[loss]
    # The bare products have clipcore's operands: float16 for 16-bit embeddings.
    operands = [t.detach() if dtype == torch.float32 else t.detach().half() for t in leaves[:2]]
    counts = (3, 4) if loss == "softmax" else (3,)
    steps: dict[str, Callable[[], Any]] = {}
    if not once:
        for count in counts:
            steps[f"{count} bare products"] = bare_products(*operands, count)
    forwards: dict[str, Callable[[], Any]] = {}
    extras: dict[str, dict[str, Any]] = {}
    exact = None if once else exact_results(loss, leaves)
    for name, loss_fn, dense in providers(TABLES[loss], device.type == "cuda", names):
        if dense and size > LARGEST_DENSE:
            continue
        with leaving_out(name):
            if not once:
                extras[name] = errors(loss_fn, leaves, exact)
            forwards[name] = partial(loss_fn, *leaves)
            steps[name] = partial(forward_and_backward, loss_fn, leaves)
    if not once:
        record(f"{title} forward", forwards, **{**work, "flops": product}, **case)
    both = {"extras": extras, "min_rounds": 1 if once else 5}
    medians = record(f"{title} forward+backward", steps, **work, **both, **case)
    torch._dynamo.reset()
    for name, median in medians.items():
        shares = ", ".join(
            f"{medians[key] / median:.2f} x {key}"
            for key in ("open_clip", *(f"{count} bare products" for count in counts))
            if key in medians
        )
        compared = f"; speed {shares}" if shares else ""
        print(f"{loss} {size} x {width}, {name}: {median:.1f} ms{compared}", flush=True)


def largest(loss: str, width: int, device: torch.device, names: list[str] | None) -> None:
    """Double N until each provider runs out of memory, up to `LAST_TRIED` pairs."""
    for name, loss_fn, _ in providers(TABLES[loss], device.type == "cuda", names):
        size = FIRST_TRIED
        with leaving_out(name):
            while size <= LAST_TRIED and fits(loss_fn, loss, size, width, device):
                print(f"{loss}, E = {width}, {name}: N = {size:,} fits", flush=True)
                size *= 2


def fits(loss_fn: Loss, loss: str, size: int, width: int, device: torch.device) -> bool:
    """Return whether a step of so many pairs fits into memory."""
    try:
        forward_and_backward(loss_fn, inputs_for(loss, size, width, device, torch.bfloat16))
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=None)
    parser.add_argument("--widths", type=int, nargs="+", default=None)
    parser.add_argument("--loss", nargs="+", choices=TABLES, default=list(TABLES))
    names = [*SOFTMAX, *SIGMOID]
    parser.add_argument("--providers", nargs="+", choices=names, metavar="NAME", default=None)
    parser.add_argument("--largest", action="store_true")
    parser.add_argument(
        "--once", action="store_true", help="the step alone, one timed call: for millions of pairs"
    )
    arguments = parse(
        parser, ["tests/test_contrastive.py", "tests/test_sigmoid.py", "tests/test_logits.py"], argv
    )
    device = arguments.device
    on_gpu = device.type == "cuda"
    sizes = arguments.sizes or ([1024, 8192, 32768, 65536] if on_gpu else [1024, 4096, 8192])
    widths = arguments.widths or ([512, 768, 1024] if on_gpu else [512])
    dtype = torch.bfloat16 if on_gpu else torch.float32
    for width in widths:
        for loss in arguments.loss:
            if arguments.largest:
                largest(loss, width, device, arguments.providers)
                continue
            for size in sizes:
                bench(loss, size, width, device, dtype, arguments.providers, arguments.once)


if __name__ == "__main__":
    run(main)
