"""A step of a batch that is larger than memory: micro-batches as planned, all but one embedded twice, and the direct step.

The direct step is measured if it fits; the other rows show their extra cost over it.

python bench/bench_global_batch.py [--model ViT-B-32] [--sizes 32768] [--image-size 224] [--direct] [--once]

Rows: milliseconds of forward and backward passes with the loss (no optimizer), and peak memory above the memory before.
Inputs are random and on the host as uint8, page-locked if there is a GPU; captions end at 6 to 26 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import parse, record, run

from clipcore.data.loader import Batch, trim_tokens
from clipcore.loss import ClipLoss, SigLipLoss
from clipcore.ranks.distributed import World
from clipcore.run.train_step import TrainingStep
from clipcore.towers.factory import create_model

SHORTEST, LONGEST = 6, 26


def random_batch(num_pairs: int, image_size: int, vocab_size: int, pinned: bool) -> Batch:
    """Return random pixels and tokens; each caption ends with the largest id."""
    generator = torch.Generator().manual_seed(0)
    images = torch.empty(num_pairs, 3, image_size, image_size, dtype=torch.uint8, pin_memory=pinned)
    for rows in images.split(4096):
        rows.random_(0, 256, generator=generator)
    tokens = torch.randint(1, vocab_size - 2, (num_pairs, LONGEST), generator=generator)
    ends = torch.randint(SHORTEST - 1, LONGEST, (num_pairs,), generator=generator)
    tokens[torch.arange(num_pairs), ends] = vocab_size - 1
    tokens = trim_tokens(tokens)
    return Batch(images, tokens.pin_memory() if pinned else tokens, torch.arange(num_pairs))


def bench(arguments: argparse.Namespace, size: int, device: torch.device) -> None:
    torch.manual_seed(0)
    model = create_model(
        arguments.model,
        device=device,
        force_image_size=arguments.image_size,
        init_logit_bias=-10.0 if arguments.siglip else None,
    ).train()
    precision = "amp_bf16" if device.type == "cuda" else "fp32"
    image_size = model.config.vision.image_size
    batch = random_batch(size, image_size, model.vocab_size, device.type == "cuda")
    planned = TrainingStep(
        *(model, SigLipLoss() if arguments.siglip else ClipLoss(), World(0, 1, 0, device)),
        *(precision, 0, size, lambda loss: loss),
        *(arguments.micro_batch_size, None),
    )
    print(planned.plan(batch, 0, arguments.step_memory), flush=True)
    steps = {f"planned, {planned.num_kept_graphs} graphs kept": planned}
    if planned.num_parts > 1:
        steps["all but one embedded twice"] = dataclasses.replace(planned, num_kept_graphs=1)
    if arguments.direct:
        steps["direct"] = dataclasses.replace(planned, micro_batch_size=size)
    fns: dict[str, Callable[[], Any]] = {}
    for name, step in steps.items():

        def run(step: TrainingStep = step) -> None:
            step.gradients(batch, 0)
            model.zero_grad(set_to_none=True)

        fns[name] = run
    medians = record(
        "step of a global batch",
        fns,
        device=device,
        flops=0.0,
        bytes_moved=float(batch.images.nbytes),
        min_rounds=1 if arguments.once else 3,
        model=arguments.model,
        N=size,
        image_size=image_size,
        micro_batch=planned.micro_batch_size,
        dtype=precision,
        loss="sigmoid" if arguments.siglip else "softmax",
    )
    for name, median in medians.items():
        over = f", {median / medians['direct'] - 1:+.0%} over direct" if "direct" in medians else ""
        print(f"{arguments.model} {size}, {name}: {1e3 * size / median:.0f} pairs/s{over}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32768])
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--micro-batch-size", type=int, default=None)
    parser.add_argument("--step-memory", type=float, default=None, help="GB")
    parser.add_argument(
        "--direct", action="store_true", help="measure the direct step too: it fits"
    )
    parser.add_argument("--siglip", action="store_true")
    parser.add_argument("--once", action="store_true", help="one timed step, for huge batches")
    arguments = parse(parser, ["tests/test_grad_cache.py"], argv)
    for size in arguments.sizes:
        bench(arguments, size, arguments.device)


if __name__ == "__main__":
    run(main)
