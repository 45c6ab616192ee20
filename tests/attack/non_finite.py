"""Tensors and numbers that no step can go on from: they are named, refused, and never saved as a checkpoint."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from attack.harness import Attack, one_line
from attack.mutations import (
    BEFORE,
    NEWEST,
    STEPS,
    finish,
    run_flags,
    trained,
    whole_checkpoints,
)
from clipcore.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from clipcore.run.faults import first_fault, newest_sound
from clipcore.run.metrics import read_metrics
from clipcore.run.state import run_record

# Bits of float32, whose upper halves are those of bfloat16: quiet and signalling, and of either sign.
BITS = {
    "NaN": (0x7FC00000, 0x7F810000, 0xFFC00000, 0xFFFF0000),
    "+Inf": (0x7F800000,),
    "-Inf": (0xFF800000,),
    "negative": (0x80800000, 0xBF800000, 0xFF7F0000),  # down to the largest
}
# How a run of each kind was made, beside run_flags.
RUNS = {
    "float32": [],
    "bfloat16": ["--precision", "bf16", "--adam-moments", "bf16"],
    "float16": ["--precision", "amp"],
}
SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


def kinds_of(name: str) -> list[str]:
    """Return what no step can go on from in a tensor, by its name: only some cannot be negative."""
    is_counted = name.endswith((".exp_avg_sq", ".step"))
    return [kind for kind in BITS if kind != "negative" or is_counted]


def edited(tensor: Tensor, bits: int, at: int) -> Tensor:
    """Return a copy with the bits of a float32, or their upper half, in one element."""
    copied = tensor.clone().contiguous()
    is_wide = copied.element_size() == 4
    content = struct.pack("<I", bits) if is_wide else struct.pack("<H", bits >> 16)
    value = torch.frombuffer(bytearray(content), dtype=copied.dtype)
    copied.view(-1)[at] = value[0]
    return copied


class NonFinite(Attack):
    """One element of a finished run's newest checkpoint, or one number of its state, or weights to begin from."""

    fast: ClassVar[int] = 30

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.newest: dict[str, Checkpoint] = {}
        for name, more in RUNS.items():
            finish(run_flags(folder, "--name", name, *more), folder / "output")
            self.newest[name] = load_checkpoint(folder / name / NEWEST)
        straight = shutil.copytree(folder / "float32", folder / "straight")
        finish(["--resume", str(straight), "--epochs", "2"], folder / "output")

    def cases(self) -> Mapping[str, Any]:
        cases: dict[str, Any] = {}
        draw = random.Random(0)
        for run, group, name in self._tensors():
            # All that a tensor of float32 may hold; of the others, which are read alike, one.
            drawn = BITS if run == "float32" else [draw.choice(kinds_of(name))]
            for kind in kinds_of(name):
                if kind in drawn:
                    case = (self._try_tensor, run, group, name, kind)
                    cases[f"{run}, {group}, {name}, {kind}"] = case
            if name.endswith(".exp_avg_sq"):
                cases[f"{run}, {name}, all 0"] = (self._try_zeros, run, name)

        # Of each kind of tensor two, by whole runs.
        tensors = sorted(self._tensors())
        for run, group, kind in itertools.product(RUNS, ("model", "optimizer", "ema"), BITS):
            fits = [t for t in tensors if t[:2] == (run, group) and kind in kinds_of(t[2])]
            for _, _, name in draw.sample(fits, min(2, len(fits))):
                case = (self._try_resume, run, group, name, kind)
                cases[f"resumed, {run}, {group}, {name}, {kind}"] = case

        for run, key in self._numbers():
            for what in VALUES:
                cases[f"{run}, state, {'.'.join(key)}, {what}"] = (self._try_state, run, key, what)
        for name in self.newest["float32"].tensors["model"]:
            # Whatever a scale is, it would be brought back into its bounds after a step.
            drawn = kinds_of(name) if name == "logit_scale" else [draw.choice(kinds_of(name))]
            for kind in drawn:
                cases[f"weights, {name}, {kind}"] = (self._try_weights, name, kind)
        return cases

    def attempt(self, what: Any, folder: Path) -> str:
        attempt, *arguments = what
        return attempt(folder, *arguments)

    def _tensors(self) -> list[tuple[str, str, str]]:
        """Return (run, group, name) of all tensors that can hold what is not finite."""
        return [
            (run, group, name)
            for run, checkpoint in self.newest.items()
            for group, tensors in checkpoint.tensors.items()
            for name, tensor in tensors.items()
            if tensor.is_floating_point()
        ]

    def _numbers(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return the run and the place of all numbers of a state, those of a loss scaler too."""
        state = self.newest["float32"].state
        places = [(key,) for key, value in state.items() if isinstance(value, int | float)]
        places += [("timings", key) for key in state["timings"]]
        numbers = [("float32", place) for place in places]
        return numbers + [("float16", ("scaler", key)) for key in SCALER]

    def _copy(
        self, folder: Path, run: str, change: Callable[[dict[str, Any], dict[str, Any]], None]
    ) -> Path:
        """Copy a run with something else in its newest checkpoint, which is whole; return its folder."""
        copy = shutil.copytree(self.folder / run, folder / "run", copy_function=link_or_copy)
        found = self.newest[run]
        groups = {group: dict(tensors) for group, tensors in found.tensors.items()}
        state = json.loads(json.dumps(found.state))
        change(groups, state)
        save_checkpoint(copy / "checkpoints", STEPS, groups, state)
        return copy

    def _with_tensor(self, folder: Path, run: str, group: str, name: str, kind: str) -> Path:
        tensor = self.newest[run].tensors[group][name]
        draw = random.Random(f"{run} {group} {name} {kind}")
        at, bits = draw.randrange(tensor.numel()), draw.choice(BITS[kind])

        def change(groups: dict[str, Any], _: dict[str, Any]) -> None:
            groups[group][name] = edited(tensor, bits, at)

        return self._copy(folder, run, change)

    def _try_tensor(self, folder: Path, run: str, group: str, name: str, kind: str) -> str:
        copy = self._with_tensor(folder, run, group, name, kind)
        said = first_fault(load_checkpoint(copy / NEWEST).tensors)
        assert said == fault_of(group, name, kind), f"the fault is {said!r}"
        sound = newest_sound(copy / "checkpoints")
        assert sound == copy / BEFORE, f"{sound} is said to be sound"
        return "a tensor is named"

    def _try_zeros(self, folder: Path, run: str, name: str) -> str:
        draw = random.Random(name)

        def change(groups: dict[str, Any], _: dict[str, Any]) -> None:
            zero = draw.choice([0.0, -0.0])
            groups["optimizer"][name] = torch.full_like(groups["optimizer"][name], zero)

        copy = self._copy(folder, run, change)
        assert first_fault(load_checkpoint(copy / NEWEST).tensors) is None
        assert newest_sound(copy / "checkpoints") == copy / NEWEST
        return "second moments of 0 are sound"

    def _try_resume(self, folder: Path, run: str, group: str, name: str, kind: str) -> str:
        copy = self._with_tensor(folder, run, group, name, kind)
        before, log = whole_checkpoints(copy), (copy / "metrics.jsonl").read_bytes()
        line = ["--resume", str(copy), "--epochs", "2"]
        status, text = trained(line, folder / "output")
        assert status == 2, f"the run ended with {status}: {text[-300:]}"
        said = one_line(text)
        assert f" {fault_of(group, name, kind)}; " in said, said
        assert said.endswith(f"then python -m clipcore.train --resume {copy / BEFORE}"), said
        assert whole_checkpoints(copy) == before and (copy / "metrics.jsonl").read_bytes() == log

        # As it says.
        line = ["--resume", str(copy / BEFORE), "--epochs", "2"]
        status, text = trained(line, folder / "output")
        assert status == 0, f"the run from the checkpoint before ended with {status}: {text[-300:]}"
        assert_all_finite(copy)
        return "a tensor is named to a run"

    def _try_state(self, folder: Path, run: str, key: tuple[str, ...], what: str) -> str:
        value, name = VALUES[what], ".".join(key)

        def change(_: dict[str, Any], state: dict[str, Any]) -> None:
            *path, last = key
            for part in path:
                state = state[part]
            state[last] = value

        copy = self._copy(folder, run, change)
        is_record = True
        try:
            run_record(load_checkpoint(copy / NEWEST))
        except CheckpointError as error:
            assert key[0] in str(error) and len(str(error).splitlines()) == 1
            is_record = False

        status, text = trained(["--resume", str(copy), "--epochs", "2"], folder / "output")
        assert status in ({0, 2} if is_record else {2}), f"status {status}: {text[-300:]}"
        if status:
            said = one_line(text)
            said = said.replace("--global-batch-size", "global_batch_size")
            assert key[0] in said or (name == "metrics_bytes" and "metrics.jsonl" in said), said
            assert whole_checkpoints(copy) == whole_checkpoints(self.folder / run)
            return "a state is refused"

        assert is_possible(name, value), f"a run went on with {name} = {what}"
        assert "Traceback" not in text
        assert_all_finite(copy)
        steps = [row["step"] for row in read_metrics(copy)[0]]
        assert steps == list(range(1, 2 * STEPS + 1)), f"the log has steps {steps}"
        return "a run goes on with a number that may be"

    def _try_weights(self, folder: Path, name: str, kind: str) -> str:
        weights = dict(self.newest["float32"].tensors["model"])
        draw = random.Random(f"{name} {kind}")
        at, bits = draw.randrange(weights[name].numel()), draw.choice(BITS[kind])
        weights[name] = edited(weights[name], bits, at)
        path = folder / "weights.safetensors"
        save_file(weights, path)

        table = str(self.folder / "data" / "pairs.csv")
        line = [*run_flags(self.folder), "--pretrained", str(path), "--train-data", table]
        line += ["--logs", str(folder), "--name", "run"]
        status, text = trained(line, folder / "output")
        assert_all_finite(folder / "run")
        assert status == 2, f"the run ended with {status}: {text[-300:]}"
        assert f"{name} in {path} is not finite" in one_line(text), text
        assert not (folder / "run" / "checkpoints").exists(), "something was saved"
        return "weights are named"


# Values of JSON, by name.
VALUES: dict[str, Any] = {
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
    "-1": -1,
    "-0.5": -0.5,
    "-1e300": -1e300,
    "10**30": 10**30,
    "10**400": 10**400,
    "10**4000": 10**4000,
    "2**63": 2**63,
    "1e300": 1e300,
    "0": 0,
    "0.5": 0.5,
    "null": None,
    "text": "1",
    "true": True,
    "list": [1],
    "object": {"value": 1},
}
MAX_FLOAT32, MAX_FLOAT64 = (torch.finfo(t).max for t in (torch.float32, torch.float64))


def is_possible(name: str, value: object) -> bool:
    """Return whether a number of a state may be a value, so that a run may go on with it."""
    if value is None:  # as if it were not there, as in checkpoints of earlier versions
        return name in ("global_batch_size", "transparent")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        return False
    if name == "scaler.scale":
        return 0 < value <= MAX_FLOAT32
    if name in ("scaler.growth_factor", "scaler.backoff_factor"):
        return 0 < value <= MAX_FLOAT64
    if name == "elapsed_s" or name.startswith("timings."):
        return value <= MAX_FLOAT64
    return isinstance(value, int) and value < 2**63


def link_or_copy(source: str, target: str) -> None:
    """Put a file of a run into a copy: one of weights is never written to, and may be the same one."""
    if source.endswith(".safetensors"):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def fault_of(group: str, name: str, kind: str) -> str:
    """Return what is to be said of a tensor."""
    return f"{group}: {name} is {'negative' if kind == 'negative' else 'not finite'}"


def assert_all_finite(run: Path) -> None:
    """Raise if a tensor in a checkpoint of a run, newer than those it began with, is not finite."""
    for path in (run / "checkpoints").glob("step_*"):
        if path.name != Path(NEWEST).name or not (run / BEFORE).exists():
            for group, tensors in load_checkpoint(path).tensors.items():
                for name, tensor in tensors.items():
                    assert tensor.isfinite().all(), f"{path.name} has {group}: {name} not finite"
