"""How cost grows with the work: loss and step against pairs, towers against tokens, loss against ranks.

python bench/bench_scaling.py [--only loss step tokens ranks wire] [--device cuda] [--model ViT-B-32] [--seconds 10]

Printed with each row: the cost of a pair or a token, and the growth exponent from the row before, log(cost ratio) over
log(size ratio). A loss tends to 2; a step, which the towers dominate, tends to 1. Rows of ``wire`` are computed (wire.py)
and marked so. Inputs are random. Ranks are processes of one thread each; if there are more ranks than cores, a note says
so.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import contrastive_providers  # puts the tests' folder on the path
import torch
from bench_global_batch import random_batch
from harness import Measured, parse, record, record_computed, record_measured, run
from ranks import RankPool
from scaling_ranks import LOSSES, loss_inputs, loss_on_rank
from torch import nn
from wire import ETHERNET, NVLINK, gradient_collectives, loss_collectives

from clipcore.data.packing import pack_captions
from clipcore.kernels.launch import visible_operators
from clipcore.loss import ClipLoss
from clipcore.ranks.distributed import World
from clipcore.run import memory
from clipcore.run.traffic import TrafficCounter
from clipcore.run.train_step import TrainingStep
from clipcore.towers.architectures import find_model
from clipcore.towers.factory import create_model
from clipcore.towers.model import CLIP

SMALLEST, LARGEST = 1024, 2**22  # pairs
TOKEN_FACTORS = (1, 1.5, 2, 4, 8)
CAPTION_LENGTHS = (8, 16, 32, 48, 64, 77)
WIRE_RANKS, WIRE_PAIRS, WIRE_MODELS = 8, (32768, 262144), ("ViT-B-32", "ViT-L-14")


class Growth:
    """A printer of growth: from one size to the next, and at the end over all sizes."""

    def __init__(self, what: str, unit: str) -> None:
        self.what, self.unit = what, unit
        self.points: list[tuple[float, float]] = []

    def add(self, size: float, cost_ms: float) -> None:
        """Add a size and its cost in milliseconds; sizes rise."""
        grown = ""
        if self.points:
            grown = f", exponent {exponent(self.points[-1], (size, cost_ms)):.2f}"
        self.points.append((size, cost_ms))
        print(f"{self.what}, {size:,.0f}: {1e3 * cost_ms / size:.3f} us a {self.unit}{grown}")

    def end(self) -> None:
        """Print the exponent over all sizes; it is 1 if the cost of a pair or token is constant."""
        if len(self.points) > 1:
            print(f"{self.what}: exponent {slope(self.points):.3f} over all sizes", flush=True)


def exponent(first: tuple[float, float], last: tuple[float, float]) -> float:
    """Return p of cost = c size^p through two points (size, cost)."""
    return math.log(last[1] / first[1]) / math.log(last[0] / first[0])


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return p through several points, by least squares of the logarithms."""
    logarithms = [[math.log(value) for value in side] for side in zip(*points, strict=True)]
    return statistics.linear_regression(*logarithms).slope


def bench_loss(name: str, arguments: argparse.Namespace, device: torch.device) -> None:
    """Measure forward and backward pass against N, doubling N while time and memory last."""
    width, dtype = arguments.width, torch.bfloat16 if device.type == "cuda" else torch.float32
    loss_fn, growth = LOSSES[name](), Growth(f"{name} loss", "pair")
    size, expected_s = SMALLEST, 0.0
    while size <= LARGEST and expected_s <= arguments.seconds:
        like = torch.empty(1, width, dtype=dtype, device=device).expand(size, width)
        # Besides the loss's own estimate: features and gradients of both sides.
        needed = loss_fn.memory_bytes(like, like) + 4 * size * width * dtype.itemsize
        if needed > arguments.memory * 1e9:
            print(
                f"{name} loss, {size:,}: needs {needed / 1e9:.1f} GB, --memory {arguments.memory:g}"
            )
            return growth.end()
        leaves = loss_inputs(name, size, width, dtype, device)

        def both(leaves: list[torch.Tensor] = leaves) -> Any:
            return torch.autograd.grad(loss_fn(*leaves), leaves)

        found = record(
            "loss against N",
            {"clipcore": both},
            device=device,
            flops=3 * 2.0 * size * size * width,
            bytes_moved=4.0 * dtype.itemsize * size * width,
            extras={"clipcore": {"plan": str(loss_fn.plan(like, like))}},
            min_rounds=5 if expected_s < 1 else 1,
            loss=name,
            N=size,
            E=width,
            dtype=str(dtype).removeprefix("torch."),
        )
        if "clipcore" not in found:
            break
        growth.add(size, found["clipcore"])
        size, expected_s = 2 * size, 4 * found["clipcore"] / 1e3
    growth.end()


def bench_step(arguments: argparse.Namespace, device: torch.device) -> None:
    """Measure towers and loss, forward and backward, against the global batch, in the plan's micro-batches."""
    torch.manual_seed(0)
    model = create_model(arguments.model, device=device).train()
    precision = "amp_bf16" if device.type == "cuda" else "fp32"
    growth = Growth(f"step of {arguments.model}", "pair")
    for size in arguments.sizes:
        batch = random_batch(
            size, model.config.vision.image_size, model.vocab_size, device.type == "cuda"
        )
        step = TrainingStep(
            *(model, ClipLoss(), World(0, 1, 0, device), precision, 0, size),
            lambda loss: loss,
        )
        step.plan(batch, 0, arguments.memory)

        def run(step: TrainingStep = step, batch: Any = batch) -> None:
            step.gradients(batch, 0)
            model.zero_grad(set_to_none=True)

        cut = f"{step.num_parts} micro-batches, {step.num_kept_graphs} kept"
        found = record(
            "step against N",
            {"clipcore": run},
            device=device,
            flops=0.0,
            bytes_moved=float(batch.images.nbytes),
            extras={"clipcore": {"plan": cut}},
            min_rounds=3,
            model=arguments.model,
            N=size,
            dtype=precision,
        )
        if "clipcore" not in found:
            break
        print(f"{arguments.model}, {size:,} pairs: {cut}")
        growth.add(size, found["clipcore"])
    growth.end()


def bench_image_tokens(arguments: argparse.Namespace, device: torch.device) -> None:
    """Measure forward and backward pass of the image tower against tokens, with larger and larger pictures."""
    growth = Growth("image tower", "token")
    vision = find_model(arguments.model).vision
    grid = vision.image_size // vision.patch_size
    for side in sorted({round(grid * factor**0.5) for factor in TOKEN_FACTORS}):
        size = side * vision.patch_size
        model = create_model(arguments.model, device=device, force_image_size=size).train()
        images = torch.randint(0, 256, (arguments.batch, 3, size, size), dtype=torch.uint8)
        images = images.to(device)
        run = tower_pass(model.visual, lambda m=model, x=images: m.encode_image(x, True), device)
        case = {"model": arguments.model, "B": arguments.batch, "tokens": side * side + 1}
        for cost_ms in record_tower(
            "image tower against tokens", {"clipcore": run}, device, case
        ).values():
            growth.add(arguments.batch * case["tokens"], cost_ms)
    growth.end()


def bench_caption_tokens(arguments: argparse.Namespace, device: torch.device) -> None:
    """Measure the text tower against the length of captions, all of one length: one a row, and packed."""
    model = create_model(arguments.model, device=device).train()
    growth = {name: Growth(f"text tower, {name}", "token") for name in ("rows", "packed")}
    for length in (n for n in CAPTION_LENGTHS if n <= model.context_length):
        tokens = torch.randint(1, model.vocab_size - 2, (arguments.batch, length))
        tokens[:, -1] = model.vocab_size - 1
        texts = {"rows": tokens.to(device), "packed": pack_captions(tokens).to(device)}
        runs = {
            name: tower_pass(model, lambda x=text: model.encode_text(x, True), device)
            for name, text in texts.items()
        }
        case = {"model": arguments.model, "B": arguments.batch, "tokens": length}
        for name, cost_ms in record_tower("text tower against tokens", runs, device, case).items():
            growth[name].add(arguments.batch * length, cost_ms)
    for one in growth.values():
        one.end()


def tower_pass(
    module: nn.Module, encode: Callable[[], torch.Tensor], device: torch.device
) -> Callable[[], None]:
    """Return a tower's forward and backward pass as a call, in mixed precision on a GPU."""

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = encode()
        features.float().square().sum().backward()
        module.zero_grad(set_to_none=True)

    return run


def record_tower(
    op: str, runs: dict[str, Callable[[], None]], device: torch.device, case: dict[str, Any]
) -> dict[str, float]:
    """Measure the passes, and count the FLOPs of the first."""
    with TrafficCounter() as counter, visible_operators():
        next(iter(runs.values()))()
    flops = sum(traffic.flops for traffic in counter.found.values())
    return record(op, runs, device=device, flops=float(flops), bytes_moved=0.0, **case)


def bench_ranks(name: str, arguments: argparse.Namespace) -> None:
    """Measure a loss of a fixed number of pairs over more and more gloo ranks of one thread on this machine."""
    cores, pairs, width = len(os.sched_getaffinity(0)), arguments.rank_pairs, arguments.width
    for num_ranks in arguments.ranks:
        with RankPool(num_ranks) as pool:
            found = pool.run(loss_on_rank, name, pairs, width, 5)
        # A round ends when the last rank ends.
        times_ms = [max(several) for several in zip(*(times for times, _ in found), strict=True)]
        wire = loss_collectives(pairs, width, num_ranks, torch.float32, loss=name, on_gpu=False)
        sent = sum(one.sent_bytes(num_ranks) for one in wire) if num_ranks > 1 else 0
        medians = record_measured(
            "loss against ranks",
            {"clipcore": Measured(times_ms, max(peak for _, peak in found))},
            device=torch.device("cpu"),
            flops=3 * 2.0 * pairs * pairs * width,
            bytes_moved=0.0,
            extras={"clipcore": {"sent_bytes": int(sent)}},
            loss=name,
            N=pairs,
            E=width,
            ranks=num_ranks,
            threads_a_rank=1,
            cores=cores,
        )
        note = "; MORE RANKS THAN CORES: contention, no scaling" if num_ranks > cores else ""
        print(
            f"{name} loss of {pairs:,} pairs on {num_ranks} ranks: {medians['clipcore']:.1f} ms, each sends "
            f"{sent / 1e6:.2f} MB{note}",
            flush=True,
        )


def compute_wire() -> None:
    """Compute the time of the loss's collectives and of the gradients' average on wires that are not here."""
    for model in WIRE_MODELS:
        config = find_model(model)
        with torch.device("meta"):
            num_parameters = sum(p.numel() for p in CLIP(config).parameters())
        for wire in (NVLINK, ETHERNET):
            case = {"wire": wire.name, "ranks": WIRE_RANKS, "model": model}
            gradients = gradient_collectives(num_parameters)
            computed(f"gradients' average of {num_parameters / 1e6:.1f} M", gradients, wire, case)
            for pairs in WIRE_PAIRS:
                losses = loss_collectives(
                    pairs, config.embed_dim, WIRE_RANKS, torch.bfloat16, on_gpu=True
                )
                computed("softmax loss", losses, wire, {**case, "N": pairs})


def computed(what: str, collectives: list[Any], wire: Any, case: dict[str, Any]) -> None:
    sent = sum(one.sent_bytes(WIRE_RANKS) for one in collectives)
    time_ms = wire.time_ms(collectives, WIRE_RANKS)
    record_computed(f"collectives of the {what}", time_ms, sent, wire.assumptions, **case)


def main(argv: Sequence[str] | None = None) -> None:
    assert contrastive_providers is not None
    parts = ("loss", "step", "tokens", "ranks", "wire")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--model", default=None, help="[ViT-B-32 on a GPU, else ViT-glyphs]")
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--width", type=int, default=512, help="of the embeddings")
    parser.add_argument(
        "--seconds", type=float, default=10, help="longest call that is still measured"
    )
    parser.add_argument("--memory", type=float, default=None, help="GB [half of what is free]")
    parser.add_argument("--sizes", type=int, nargs="+", default=None, help="global batches")
    parser.add_argument("--batch", type=int, default=256, help="sequences in a batch, for tokens")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rank-pairs", type=int, default=4096)
    arguments = parse(parser, ["tests/test_wire.py", "tests/test_loss.py"], argv)
    device = arguments.device
    on_gpu = device.type == "cuda"
    arguments.model = arguments.model or ("ViT-B-32" if on_gpu else "ViT-glyphs")
    arguments.sizes = arguments.sizes or [(4096 if on_gpu else 512) * 2**i for i in range(5)]
    arguments.memory = arguments.memory or memory.available(device) / 2e9
    for name in arguments.loss if "loss" in arguments.only else ():
        bench_loss(name, arguments, device)
    if "step" in arguments.only:
        bench_step(arguments, device)
    if "tokens" in arguments.only:
        bench_image_tokens(arguments, device)
        bench_caption_tokens(arguments, device)
    for name in arguments.loss if "ranks" in arguments.only else ():
        bench_ranks(name, arguments)
    if "wire" in arguments.only:
        compute_wire()


if __name__ == "__main__":
    run(main)
