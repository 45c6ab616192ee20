"""A run on two gloo ranks under torchrun: the same training as on one, sharded evaluation, resume on another number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import NANO, ROOT, assert_same_bits
from shards import write_csv

from clipcore.logbook import read_metrics


def launch(tmp_path: Path, name: str, num_ranks: int, table: Path, *extra: str) -> str:
    """A whole run of global batch 8 on ``num_ranks`` processes."""
    line = ["--logs", str(tmp_path), "--name", name, "--train-data", str(table), *NANO]
    line += ["--val-data", str(table), "--batch-size", str(8 // num_ranks), "--lr", "1e-3", *extra]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    # The -- keeps torchrun from taking --logs for a short form of its own --logs-specs.
    start = ["-m"] if num_ranks == 1 else [*torchrun, "-m", "--"]
    done = subprocess.run(
        [sys.executable, *start, "clipcore.train", *line],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("table"), num_pairs=41)


def test_two_ranks_train_as_one_and_resume_on_one(table, tmp_path):
    launch(tmp_path, "one", 1, table, "--epochs", "2")
    said = launch(tmp_path, "two", 2, table, "--epochs", "1", "--resume", "latest")
    assert said.count("starting from the beginning") == 1  # once, not once a rank
    (one, one_evals), (two, two_evals) = (
        read_metrics(tmp_path / "one"),
        read_metrics(tmp_path / "two"),
    )
    # The first loss comes from the same weights and the same pairs; only the order of sums differs.
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-4)
    assert [row["lr"] for row in two] != [] and len(two) == 5
    assert two_evals[0]["num_pairs"] == one_evals[0]["num_pairs"] == 41

    launch(tmp_path, "two", 1, table, "--epochs", "2", "--resume", "latest")
    resumed = read_metrics(tmp_path / "two")[0]
    assert [row["step"] for row in resumed] == list(range(1, 11))


def test_two_ranks_give_the_same_bits_every_time(table, tmp_path):
    for name in ("a", "b"):
        launch(tmp_path, name, 2, table, "--epochs", "1", "--ema-decay", "0.9")
    assert_same_bits(tmp_path / "a", tmp_path / "b")
