"""The loops of docs/own-loop.md, as they are written there: in float64 all of them train alike."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from runs import PROGRAMS, ROOT

import clipcore

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own-loop.md").read_text(), re.DOTALL)
DATA, ONE, DDP, ACCELERATE, LEFT = BLOCKS


def in_float64(loop: str) -> str:
    """Return a loop with its data, in float64, where the order of sums does not hide a missing gradient."""
    plain = 'create_model("ViT-nano-8-32")'
    assert plain in loop
    model = plain.replace(")", ', precision="fp64")')
    return DATA + "torch.set_default_dtype(torch.float64)\n" + loop.replace(plain, model)


def run_here(loop: str) -> list[float]:
    """Run a loop in this process; return the losses that it prints."""
    printed: list[str] = []
    try:
        exec(in_float64(loop), {"print": printed.append})
    finally:
        torch.set_default_dtype(torch.float32)
    return [float(line.rpartition(" ")[2]) for line in printed]


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Run the loops of several processes on two by torchrun; return the losses that rank 0 of each prints."""
    folder, loops = tmp_path_factory.mktemp("loops"), {"DDP": DDP, "accelerate": ACCELERATE}
    programs = [folder / f"{name}.py" for name in loops]
    for program, loop in zip(programs, loops.values(), strict=True):
        program.write_text(in_float64(loop))
    command = [sys.executable, str(PROGRAMS / "run_loops.py"), "2", *map(str, programs)]
    # Without it accelerate takes processes without a GPU for one each.
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    _, *printed = done.stdout.split("---\n")
    return {
        name: [float(line.rpartition(" ")[2]) for line in text.splitlines()]
        for name, text in zip(loops, printed, strict=True)
    }


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """Return the losses of the direct loop, without micro-batches."""
    found = run_here(ONE.replace("num_parts=4", "num_parts=1"))
    assert len(found) == 3 and len(set(found)) == 3
    return found


def test_micro_batches_train_like_the_direct_loop(expected: list[float]) -> None:
    assert run_here(ONE) == pytest.approx(expected, rel=0, abs=2e-12)


@pytest.mark.parametrize("loop", ["DDP", "accelerate"])
def test_two_processes_train_like_one(
    loop: str, of_two_ranks: dict[str, list[float]], expected: list[float]
) -> None:
    assert of_two_ranks[loop] == pytest.approx(expected, rel=0, abs=2e-12)


def test_names_that_read_what_a_run_left_are_public() -> None:
    for name in re.findall(r"clipcore\.(\w+)\(", LEFT):
        assert callable(getattr(clipcore, name)) and name in clipcore.__all__
