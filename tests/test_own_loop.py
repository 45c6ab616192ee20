"""The loops of docs/own-loop.md, as they are written there: in float64 all of them train alike."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT

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


def run_ranks(loop: str, folder: Path, ranks: int) -> list[float]:
    """Run a loop in several processes by torchrun; return the losses that rank 0 prints."""
    program = folder / "loop.py"
    program.write_text(in_float64(loop))
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous]
    command += ["--nproc-per-node", str(ranks), str(program)]
    # Without it accelerate takes processes without a GPU for one each.
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """Return the losses of the direct loop, without micro-batches."""
    found = run_here(ONE.replace("num_parts=4", "num_parts=1"))
    assert len(found) == 3 and len(set(found)) == 3
    return found


def test_micro_batches_train_like_the_direct_loop(expected: list[float]) -> None:
    assert run_here(ONE) == pytest.approx(expected, rel=0, abs=2e-12)


@pytest.mark.parametrize("loop", [DDP, ACCELERATE], ids=["DDP", "accelerate"])
def test_two_processes_train_like_one(loop: str, tmp_path: Path, expected: list[float]) -> None:
    assert run_ranks(loop, tmp_path, 2) == pytest.approx(expected, rel=0, abs=2e-12)


def test_names_that_read_what_a_run_left_are_public() -> None:
    for name in re.findall(r"clipcore\.(\w+)\(", LEFT):
        assert callable(getattr(clipcore, name)) and name in clipcore.__all__
