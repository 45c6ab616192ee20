"""The whole training step against open_clip and transformers: same model, batch and captions, upload included.

python bench/bench_step.py [--model ViT-B-32] [--batch 64] [--patch-dropout 0.5] [--micro-batch-size 16] [--compiled]

Rows: pairs/s; TFLOP/s of useful tokens and their share of the speed of the device's matrix products; peak memory beside
model and optimizer; milliseconds by part. The parts are timed on a step that waits for the device after each, so they add
up to a little more than the step. Captions have the lengths of `step_providers.CAPTION_LENGTHS`, 16 tokens on average. With
`--micro-batch-size` gradients are cached: clipcore's way against open_clip's `--accum-freq`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from harness import leaving_out, parse, record, run
from step_providers import Case, Clock, Step, captions, ignore, providers, useful_flops

from clipcore.run import memory
from clipcore.run.ceilings import measure_ceilings
from clipcore.towers.architectures import ModelConfig, find_model

TESTS = "tests/test_packing.py tests/test_residual.py tests/test_attention.py tests/test_loss.py".split()
PROVIDERS = ["clipcore", "open_clip", "transformers"]
# Compiled peers, and our step with compiled blocks, which decides whether we need kernels for LayerNorm and GELU.
COMPILED = ["open_clip compiled", "clipcore, blocks compiled"]
# Models with more parameters are measured one by one: more than two of them do not fit side by side.
ALONE = 3 * 10**8


def bench(case: Case, names: list[str]) -> None:
    config = find_model(case.model)
    torch.manual_seed(0)
    text = captions(case.num_pairs, config.text.vocab_size, config.text.context_length)
    mean_tokens = round((text.argmax(1) + 1.0).mean().item(), 2)
    dtype = torch.bfloat16 if case.precision == "amp_bf16" else torch.float32
    widths = {config.vision.width, config.text.width}
    ceiling = measure_ceilings(widths, dtype, case.device).flops_per_s / 1e12
    steps: dict[str, Step] = {}
    medians: dict[str, float] = {}
    alone = _is_large(config) and case.device.type == "cuda" and len(names) > 2
    for name, make in providers(case, names):
        with leaving_out(name):
            steps[name] = make()
        if alone:
            medians |= _record(case, steps, useful_flops(config, case, text), mean_tokens, ceiling)
            steps.clear()
            gc.collect()
            torch.cuda.empty_cache()
    if steps:
        medians |= _record(case, steps, useful_flops(config, case, text), mean_tokens, ceiling)
    for name, median in medians.items():
        gain = (
            f", {medians['open_clip'] / median:.2f} x open_clip" if "open_clip" in medians else ""
        )
        print(f"{name}: {1e3 * case.num_pairs / median:.1f} pairs/s{gain}", flush=True)


def _is_large(config: ModelConfig) -> bool:
    blocks = 12 * config.text.layers * config.text.width**2
    assert isinstance(config.vision.layers, int)
    return blocks + 12 * config.vision.layers * config.vision.width**2 > ALONE


def _record(
    case: Case, steps: dict[str, Step], flops: float, mean_tokens: float, ceiling: float
) -> dict[str, float]:
    extras: dict[str, dict[str, Any]] = {}
    fns: dict[str, Callable[[], Any]] = {}
    for name, step in steps.items():
        with leaving_out(name):
            extras[name] = {"parts_ms": _parts_ms(step, case.device), "mean_tokens": mean_tokens}
            fns[name] = partial(step, ignore)
            print(f"{name}, ms by part: {extras[name]['parts_ms']}", flush=True)
    return record(
        "training step",
        fns,
        device=case.device,
        flops=flops,
        bytes_moved=0.0,
        extras=extras,
        min_rounds=5 if case.device.type == "cuda" else 3,
        num_pairs=case.num_pairs,
        ceiling_tflops=ceiling,
        model=case.model,
        B=case.num_pairs,
        dtype=case.precision,
        **({"patch_dropout": case.patch_dropout} if case.patch_dropout else {}),
        **({"micro_batch": case.micro_batch_size} if case.micro_batch_size else {}),
    )


def _parts_ms(step: Step, device: torch.device, rounds: int = 3) -> dict[str, float]:
    """Return the median of each part, after a warm-up step."""
    found: list[dict[str, float]] = []
    for _ in range(rounds + 1):
        clock = Clock(device)
        step(clock)
        found.append(clock.parts)
    return {
        part: round(1e3 * statistics.median(parts[part] for parts in found[1:]), 2)
        for part in found[1]
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=["fp32", "amp_bf16"], default=None)
    parser.add_argument("--patch-dropout", type=float, default=0.0)
    parser.add_argument("--micro-batch-size", type=int, default=None, help="with cached gradients")
    parser.add_argument(
        "--compiled", action="store_true", help="measure open_clip and our blocks compiled too"
    )
    names = [*PROVIDERS, *COMPILED]
    parser.add_argument("--providers", nargs="+", choices=names, default=None, metavar="NAME")
    arguments = parse(parser, TESTS, argv)
    device = arguments.device
    if device.type == "cpu":
        memory.keep_freed()  # as a run does, for all providers
    precision = arguments.precision or ("amp_bf16" if device.type == "cuda" else "fp32")
    names = arguments.providers or PROVIDERS + (COMPILED if arguments.compiled else [])
    case = Case(
        *(arguments.model, arguments.batch, device, precision),
        *(arguments.patch_dropout, arguments.micro_batch_size),
    )
    # Each is a compilation of open_clip's model: micro-batches of two sizes, with and without gradients.
    with torch._dynamo.config.patch(recompile_limit=64):
        bench(case, names)


if __name__ == "__main__":
    run(main)
