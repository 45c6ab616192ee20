"""Memory of a process: a step of 32,768 pairs and its losses, page faults after freed memory, decoding.

python bench/bench_memory.py [--only step loss faults bombs pictures] [--device cuda]

Each case runs in a fresh process (`--case`), since memory left by one case would hide that of the next. Rows:

step    the peak beside model and optimizer, with the batch's inputs, against the plan's estimate and its budget;
        for micro-batches of given sizes, and of the size that the plan chooses (`auto`)
loss    the peak above embeddings and their gradients, for loss and backward pass together; beside it open_clip's at 8,192
        pairs, and its computed memory at 32,768, from the same number of matrices
faults  page faults of the tensors of twenty steps, with glibc's default and after `clipcore.run.memory.keep_freed`
bombs   the peak while pictures are refused, and the CPU time for all of them: pictures with too many pixels in their
        headers, or made so that a decoder takes seconds
pictures  the peak while the largest accepted pictures are decoded, and the CPU time

On the CPU the peak is that of the resident set, on a GPU that of torch's allocator.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from bench_contrastive import TABLES, forward_and_backward, inputs_for
from bench_global_batch import random_batch
from bombs import HEADERS, LARGEST, NUM_BOMBS, all_bombs, encoded
from contrastive_providers import providers
from harness import extra_bytes_of, leaving_out, parse, record_computed, record_row, run

from clipcore.data import BadSample, DataError
from clipcore.data.transforms import DECODERS, check_decoder, decode_image
from clipcore.loss import ClipLoss
from clipcore.ranks.distributed import World
from clipcore.run import memory
from clipcore.run.train_step import TrainingStep
from clipcore.towers.factory import create_model

NUM_PAIRS = 32768  # the paper's batch
DENSE_PAIRS = 8192  # for losses that hold the whole matrix
MODEL = "ViT-glyphs"  # the embedded default's
MICRO_BATCH_SIZES = (32, 64, 128, 256, None)
WIDTHS = (128, 512)
# The provider of each loss that is measured at `NUM_PAIRS`; open_clip's is measured at `DENSE_PAIRS`.
LOSSES = {"softmax": "clipcore recompute", "sigmoid": "clipcore"}
TITLES = {"softmax": "contrastive loss", "sigmoid": "sigmoid loss"}
PARTS = ("step", "loss", "faults", "bombs", "pictures")
PARTS_ON_GPU = ("step", "loss")
# Without this file `memory.watch` sees only the memory at the end, and no peak.
PEAK_RESET = "/proc/self/clear_refs"


class Case(NamedTuple):
    """A row to be made: its names, its sizes, and the call that measures its figures."""

    op: str
    provider: str
    sizes: dict[str, Any]
    find: Callable[[], dict[str, Any]]  # empty if the provider is not installed


def cases(device: torch.device) -> dict[str, Case]:
    """Return the cases of a device by their names for `--case`; each name begins with that of its part."""
    precision = "amp_bf16" if device.type == "cuda" else "fp32"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = {}

    for size in MICRO_BATCH_SIZES:
        cut = "auto" if size is None else size
        sizes = {"model": MODEL, "N": NUM_PAIRS, "micro_batch": cut, "dtype": precision}
        run = partial(step_figures, size, precision, device)
        found[f"step/{cut}"] = Case("memory of a step", "clipcore", sizes, run)

    for loss, ours in LOSSES.items():
        for width in WIDTHS:
            for provider, pairs in ((ours, NUM_PAIRS), ("open_clip", DENSE_PAIRS)):
                sizes = {"N": pairs, "E": width, "dtype": str(dtype).removeprefix("torch.")}
                run = partial(loss_figures, loss, provider, pairs, width, dtype, device)
                name = f"loss/{loss}/{provider.split()[0]}/{width}"
                found[name] = Case(f"memory of the {TITLES[loss]}", provider, sizes, run)

    for name, provider in (("glibc", "glibc by itself"), ("kept", "keep_freed")):
        run = partial(fault_figures, provider == "keep_freed")
        found[f"faults/{name}"] = Case("page faults", provider, {"steps": 20}, run)

    for decoder in DECODERS:
        sizes = {"formats": " ".join(HEADERS), "pictures": NUM_BOMBS}
        run = partial(bomb_figures, decoder)
        found[f"bombs/{decoder}"] = Case("memory of decoding bombs", decoder, sizes, run)
        for kind in LARGEST:
            if decoder == "pillow" or kind.startswith("JPEG"):
                run = partial(picture_figures, decoder, kind)
                case = Case("memory of decoding a picture", decoder, {"picture": kind}, run)
                found[f"pictures/{decoder}/{kind}"] = case

    return found


def step_figures(
    micro_batch_size: int | None, precision: str, device: torch.device
) -> dict[str, Any]:
    """Measure a step within the default budget, in the micro-batches of its plan."""
    on_gpu = device.type == "cuda"
    if not on_gpu:
        memory.keep_freed()  # as a run does

    model = create_model(MODEL, device=device).train()
    batch = random_batch(NUM_PAIRS, model.config.vision.image_size, model.vocab_size, on_gpu)
    step = TrainingStep(
        *(model, ClipLoss(), World(0, 1, 0, device), precision, 0, NUM_PAIRS),
        lambda loss: loss,
        micro_batch_size=micro_batch_size,
    )
    plan = step.plan(batch, 0)
    print(plan)

    with memory.watch(device) as watched:
        step.gradients(batch, 0)

    return {
        # The plan counts inputs that are on the device, and here they were there before.
        "peak_bytes": watched.peak + plan.parts.get("inputs", 0),
        "expected_bytes": plan.peak_bytes,
        "budget_bytes": plan.budget_bytes,
        "kept": plan.num_kept_graphs,
        "micro_batch_size": plan.micro_batch_size,
    }


def loss_figures(
    loss: str, provider: str, num_pairs: int, width: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Measure a loss with its gradients, after a small one that starts threads and late imports."""
    for _, loss_fn, _ in providers(TABLES[loss], device.type == "cuda", [provider]):
        forward_and_backward(loss_fn, inputs_for(loss, 64, width, device, dtype))

        leaves = inputs_for(loss, num_pairs, width, device, dtype)
        both = partial(forward_and_backward, loss_fn, leaves)
        return {"extra_bytes": extra_bytes_of(both, device)}
    return {}


def fault_figures(keeps: bool) -> dict[str, Any]:
    """Count the page faults of twenty steps, after twenty others."""
    if keeps:
        memory.keep_freed()

    def take_steps() -> None:
        for _ in range(20):
            # A step's activations: megabytes each, of different sizes, freed together.
            _kept = [torch.ones(2**20 + 4096 * i) for i in range(10)]

    take_steps()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    take_steps()
    return {"page_faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before}


def bomb_figures(decoder: str) -> dict[str, Any]:
    """Measure how far memory rises while all bombs are refused."""
    if not import_decoders(decoder):
        return {}
    bombs = all_bombs()

    begin = time.process_time()
    with memory.watch(torch.device("cpu")) as watched:
        for bomb in bombs:
            try:
                decode_image(bomb, decoder)
            except BadSample:
                continue
            raise AssertionError(f"{decoder} has decoded a bomb of {len(bomb)} bytes")
    return {"extra_bytes": watched.peak, "cpu_s": round(time.process_time() - begin, 3)}


def picture_figures(decoder: str, kind: str) -> dict[str, Any]:
    """Measure memory and CPU time of decoding one of the largest pictures, or of its refusal by a decoder."""
    if not import_decoders(decoder):
        return {}
    data = LARGEST[kind]()
    gc.collect()
    begin = time.process_time()
    with memory.watch(torch.device("cpu")) as watched, contextlib.suppress(BadSample):
        decode_image(data, decoder)
    return {"extra_bytes": watched.peak, "cpu_s": round(time.process_time() - begin, 3)}


def import_decoders(decoder: str) -> bool:
    """Decode a small picture of each format, to load its library; return whether the decoder is installed."""
    try:
        check_decoder(decoder)
    except DataError as error:
        print(error)
        return False
    for kind in HEADERS:
        decode_image(encoded(kind), decoder)
    return True


def figures_of(name: str, device: torch.device) -> dict[str, Any]:
    """Run a case in a fresh process, and print its output before its figures."""
    command = [
        sys.executable,
        __file__,
        "--device",
        str(device),
        "--case",
        name,
        "--tests",
        "passed",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)

    *told, figures = done.stdout.splitlines()
    print("\n".join(told), end="\n" if told else "", flush=True)
    return json.loads(figures)


def compute_dense(case: Case, extra_bytes: int, device: torch.device) -> None:
    """Record the memory of open_clip's loss at `NUM_PAIRS`, computed: as many matrices as at `DENSE_PAIRS`."""
    item = 2 if case.sizes["dtype"] == "bfloat16" else 4
    matrices = round(extra_bytes / (item * DENSE_PAIRS**2))  # the rest grows as N
    assumptions = (
        f"{item} bytes x N x N x {matrices} matrices, "
        f"as measured at N = {DENSE_PAIRS} on {device.type}"
    )

    record_computed(
        f"{case.op}, open_clip",
        None,
        item * NUM_PAIRS**2 * matrices,
        assumptions,
        **{**case.sizes, "N": NUM_PAIRS},
    )


def bench(names: list[str], device: torch.device) -> None:
    """Record a row for each of the cases."""
    faults = []
    for name in names:
        case, figures = cases(device)[name], {}
        # open_clip may run out of memory.
        with leaving_out(case.provider if case.provider == "open_clip" else f"clipcore, {name}"):
            figures = figures_of(name, device)
        if not figures:
            continue
        record_row(case.op, case.provider, device=device, figures=figures, **case.sizes)

        if case.sizes.get("N") == DENSE_PAIRS:
            compute_dense(case, figures["extra_bytes"], device)
        if "page_faults" in figures:
            faults.append(figures["page_faults"])

    if faults and not any(faults):
        print("this machine counts no page faults: these rows say nothing about keep_freed")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tests and then the cases, or one case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        help="measure these parts [all; on a GPU only step and loss exist]",
    )
    parser.add_argument(
        "--case",
        metavar="NAME",
        help="measure one case in this process, print its figures as JSON and record nothing",
    )

    def check(arguments: argparse.Namespace) -> None:
        known, device = cases(arguments.device), arguments.device
        if arguments.case is not None:
            if arguments.case not in known:
                parser.error(f"unknown case {arguments.case}; choose one of {', '.join(known)}")
            return
        possible = PARTS_ON_GPU if device.type == "cuda" else PARTS
        arguments.only = arguments.only or possible
        if not set(arguments.only) <= set(possible):
            parser.error(f"on a GPU the parts are only {' and '.join(possible)}")
        watches = device.type == "cpu" and set(arguments.only) - {"faults"}
        if watches and not os.access(PEAK_RESET, os.W_OK):
            parser.error(f"peaks cannot be measured here without {PEAK_RESET}; use --only faults")

    tests = [
        f"tests/test_{name}.py" for name in ("grad_cache", "contrastive", "sigmoid", "transforms")
    ]
    arguments = parse(parser, tests, argv, check)

    known = cases(arguments.device)
    if arguments.case is not None:
        print(json.dumps(known[arguments.case].find()))
        return
    bench([name for name in known if name.split("/")[0] in arguments.only], arguments.device)


if __name__ == "__main__":
    run(main)
