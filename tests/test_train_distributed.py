"""A run on two gloo ranks under torchrun: the same training as on one, sharded evaluation, resume on another number."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from runs import NANO, PROGRAMS, ROOT, RunServer, assert_same_bits, children, wait_until
from shards import write_csv

from clipcore.checkpoint import CheckpointError, latest_checkpoint, save_checkpoint
from clipcore.ranks.distributed import World
from clipcore.run.config import TrainConfig
from clipcore.run.folders import find_checkpoint
from clipcore.run.metrics import read_metrics

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture
def launch(server: RunServer, table: Path, tmp_path: Path) -> Callable[..., str]:
    """Make a whole run of global batch 8 on ``num_ranks`` processes; return what it prints."""

    def run(name: str, num_ranks: int, *extra: str) -> str:
        line = ["--logs", str(tmp_path), "--name", name, "--train-data", str(table), *NANO]
        line += ["--val-data", str(table), "--lr", "1e-3"]
        if "--global-batch-size" not in extra:
            line += ["--batch-size", str(8 // num_ranks)]
        several = num_ranks if num_ranks > 1 else 0
        status, text = server.run([*line, *extra], tmp_path / "out", several)
        assert status == 0, text
        return text

    return run


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("table"), num_pairs=41)


def test_two_ranks_train_as_one_and_resume_on_one(launch, tmp_path):
    launch("one", 1, "--epochs", "2")
    said = launch("two", 2, "--epochs", "1", "--resume", "latest")
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

    launch("two", 1, "--epochs", "2", "--resume", "latest")
    resumed = read_metrics(tmp_path / "two")[0]
    assert [row["step"] for row in resumed] == list(range(1, 11))


def test_uneven_shares_in_micro_batches_train_as_one_and_resume_on_two(launch, tmp_path):
    """Global batches of 8 on three ranks, three, three and two pairs, at most two at once; dropped patches are the same."""
    line = "--force-patch-dropout 0.5 --global-batch-size 8 --skip-scheduler".split()
    launch("one", 1, *line, "--epochs", "2", "--micro-batch-size", "8")
    several = [*line, "--micro-batch-size", "2", "--resume", "latest"]
    launch("three", 3, *several, "--epochs", "1", "--verify-gradients")
    launch("three", 2, *several, "--epochs", "2")
    (one, _), (three, _) = (read_metrics(tmp_path / name) for name in ("one", "three"))
    assert len(one) == len(three) == 10
    for theirs, ours in zip(one, three, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert three[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)


def test_a_split_model_is_planned_verified_and_resumed_on_one(launch, tmp_path):
    line = "--global-batch-size 9 --micro-batch-size 2 --siglip --verify-gradients --resume latest".split()
    said = launch("r", 2, *line, "--fsdp", "--epochs", "1")
    assert "3 micro-batches of 2" in said and "verified against float64" in said
    launch("r", 1, *line, "--epochs", "2")
    assert [row["step"] for row in read_metrics(tmp_path / "r")[0]] == list(range(1, 9))


def test_three_ranks_resume_to_the_bits_of_the_unbroken_run(launch, tmp_path):
    """Three sums depend on their order, and a ResNet's ranks on whose BatchNorm statistics they evaluate with."""
    line = "--epochs 2 --batch-size 3 --model RN-nano-32 --keep-checkpoints 0".split()
    launch("straight", 3, *line)
    shutil.copytree(tmp_path / "straight", tmp_path / "broken")
    (first, *later) = sorted((tmp_path / "broken" / "checkpoints").glob("step_*"))
    assert first.name == "step_00000004" and len(later) == 1
    shutil.rmtree(later[0])
    launch("broken", 3, *line, "--resume", "latest")
    assert len(read_metrics(tmp_path / "broken")[1]) == 2
    assert_same_bits(tmp_path / "straight", tmp_path / "broken")


def resume(world: World, folder: Path) -> str:
    config = TrainConfig(name="r", resume="latest")
    with pytest.raises(CheckpointError) as raised:
        find_checkpoint(config, folder / str(world.rank) / "r", world)
    return str(raised.value)


def test_ranks_that_find_another_checkpoint_stop_together(pool_of_two, tmp_path):
    """Folders that the machines do not share: rank 1 finds an older one, or none."""
    for step in (2, 1):
        weights = {"model": {"weight": torch.ones(2)}}
        save_checkpoint(tmp_path / "0" / "r" / "checkpoints", 3 - step, weights, {})
        told = pool_of_two.run(resume, tmp_path)
        assert told[0] == told[1] and "1 of 2 ranks" in told[0] and "share" in told[0]
        save_checkpoint(tmp_path / "1" / "r" / "checkpoints", 1, weights, {})


def test_another_global_batch_is_refused(launch, tmp_path):
    launch("r", 1, "--epochs", "1")
    with pytest.raises(AssertionError, match="choose --global-batch-size 8 again"):
        launch("r", 1, "--epochs", "2", "--resume", "latest", "--batch-size", "4")


@contextlib.contextmanager
def two_ranks(
    tmp_path: Path, table: Path, *more: str, **given: str
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Start a long run that saves nothing by itself; yield torchrun and its ranks once they train.

    Args:
        given: environment variables.
    """
    command = [*TORCHRUN, "2", "-m", "--", "clipcore.train", "--logs", str(tmp_path), "--name", "r"]
    command += ["--train-data", str(table), *NANO, "--batch-size", "4", "--epochs", "100000"]
    command += ["--save-frequency", "0", *more]
    environment = {**os.environ, **given, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**environment, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    ) as run:
        log, ranks = tmp_path / "r" / "metrics.jsonl", []

        def is_training() -> bool:
            assert run.poll() is None, "the run has ended"
            return log.exists() and log.stat().st_size > 2000

        try:
            wait_until(is_training, "steps")
            ranks = children(run.pid)
            assert len(ranks) == 2
            yield run, ranks
        except BaseException:
            for pid in [run.pid, *ranks]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise


def assert_last_step_was_saved(run_dir: Path, said: str) -> None:
    steps, _ = read_metrics(run_dir)
    newest = latest_checkpoint(run_dir / "checkpoints")
    assert newest is not None and newest.name == f"step_{steps[-1]['step']:08d}", said
    assert "go on with: python -m clipcore.train --resume" in said


@pytest.mark.parametrize("to_launcher", [True, False])
def test_a_signal_to_the_ranks_saves(table, tmp_path, to_launcher):
    """On a disk so slow that rank 0 still writes its checkpoint when torchrun could signal once more: because it has had
    the signal as well, or, with every further signal taken for a second one, because another rank has ended."""
    shutil.copy(PROGRAMS / "slow_disk.py", tmp_path / "sitecustomize.py")
    given = {"MARKS": str(tmp_path), "REPEAT_S": "3600" if to_launcher else "0"}
    with two_ranks(tmp_path, table, **given) as (run, ranks):
        # The ranks first: torchrun has put them into process groups of their own.
        for pid in ranks:
            os.kill(pid, signal.SIGTERM)
        wait_until((tmp_path / "writing").exists, "checkpoint in writing")
        if to_launcher:
            run.send_signal(signal.SIGTERM)
            wait_until((tmp_path / "0.2").exists, "second signal to rank 0")
        else:
            # Rank 1 has nothing left to do, and stays: torchrun would take its end for the run's.
            wait_until((tmp_path / "barrier.1").exists, "rank 1 at the barrier")
        (tmp_path / "go").touch()
        said, _ = run.communicate()
    assert_last_step_was_saved(tmp_path / "r", said)


def test_the_worker_of_one_rank_is_killed_and_both_save(table, tmp_path):
    with two_ranks(tmp_path, table, "--workers", "1") as (run, ranks):
        (worker,) = children(ranks[1])
        os.kill(worker, signal.SIGKILL)
        said, _ = run.communicate()
    assert run.returncode != 0
    assert said.count("clipcore.train: stopped: a process that reads data was killed") == 1, said
    assert "exitcode  : 4" in said and "clipcore.train: rank" not in said, said
    assert_last_step_was_saved(tmp_path / "r", said)


def test_two_ranks_give_the_same_bits_every_time(launch, tmp_path):
    for name in ("a", "b"):
        launch(name, 2, "--epochs", "1", "--ema-decay", "0.9")
    assert_same_bits(tmp_path / "a", tmp_path / "b")
