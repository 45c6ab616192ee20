"""Ranks that die, sleep or are out of step: the others say so and end, and torchrun brings the run to the same bits.

The faults come from outside: what a rank calls at the place of the fault is patched before it starts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist
from runs import LIMIT_S, NANO, PROGRAMS, ROOT, assert_same_bits
from shards import write_csv

from clipcore.ranks import watchdog
from clipcore.run.metrics import read_metrics

# (rank, step, phase, what happens there): every phase of a step, on both ranks. "collective" is between the header and
# the numbers of one, "writing" between two files of a checkpoint, "evaluating" in the middle of an evaluation.
FAULTS = [
    (0, 1, "data", "kill"),
    (1, 2, "forward", "kill"),
    (0, 3, "collective", "kill"),
    (1, 4, "backward", "raise"),
    (0, 5, "evaluating", "kill"),
    (1, 6, "optimizer", "kill"),
    (0, 7, "writing", "kill"),
    (1, 8, "loss", "sleep"),
    (1, 9, "checkpoint", "kill"),
    (0, 10, "evaluation", "kill"),
    (1, 11, "collective", "leave"),
    (0, 12, "optimizer", "raise"),
]

# Two pairs at once: one graph is kept, one micro-batch embedded twice.
SIZES = "--batch-size 2 --accum-freq 2 --keep-graphs 1".split()


def settings(folder: Path, table: Path, *more: str, sizes: Sequence[str] = SIZES) -> list[str]:
    """Two ranks, three epochs of five steps, saved at every step."""
    line = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "16", "-m", "--"]
    line += ["clipcore.train", "--logs", str(folder), "--train-data", str(table), *NANO]
    line += ["--val-data", str(table), "--epochs", "3", "--lr", "1e-3"]
    return [
        *line,
        *sizes,
        "--save-every-steps",
        "1",
        "--resume",
        "latest",
        "--timeout",
        "15",
        *more,
    ]


def launch(command: list[str], faults: Sequence[Sequence[object]], marks: Path, **more: str) -> str:
    """Make a whole launch, which succeeds, with the faults of programs/inject_faults.py; return what it wrote."""
    given = {"FAULTS": json.dumps(faults), "MARKS": str(marks), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **given, "PYTHONPATH": str(ROOT), **more},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# Each case is a group of ranks in which the last one, or the first, does what its name says at step 17.
# Where it decides nothing the timeout is longer, but some ranks wait for it to learn that another has failed.
TIMEOUT_S, WAITS = 10.0, {"sleep", "host_waits", "other_kind", "own_mistake"}
GROUPS = {"sleep": 3, "die": 3, "die_in_backward": 2, "raise": 2, "behind": 3, "elsewhere": 2}
GROUPS |= {"other_kind": 2, "other_size": 2, "host_dies": 2, "host_waits": 2, "own_mistake": 2}


@pytest.fixture(scope="module", autouse=True)
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Start all groups at once, with the first test: for most of a minute their ranks wait rather than compute."""
    folder = tmp_path_factory.mktemp("ranks")
    sizes = {case: (n, TIMEOUT_S if case in WAITS else 30.0) for case, n in GROUPS.items()}
    with subprocess.Popen(
        [sys.executable, PROGRAMS / "failing_ranks.py", json.dumps(sizes), folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    ) as process:
        yield process, folder


@dataclass(frozen=True)
class End:
    """How a rank ended, and what it said last."""

    status: int
    text: str


@pytest.fixture(scope="module")
def ends(groups: tuple[subprocess.Popen, Path]) -> dict[tuple[str, int], End]:
    """Return how the ranks of all groups ended.

    That they end is part of the claim: those that sleep would do so for an hour.
    """
    process, folder = groups
    ended, errors = process.communicate()
    assert process.returncode == 0, errors
    found = {}
    for case, rank, status in map(json.loads, ended.splitlines()):
        said = (folder / f"{case}.{rank}").read_text().splitlines()
        found[case, rank] = End(status, said[-1] if said else "")
    return found


def test_a_run_that_loses_ranks_in_every_phase_ends_with_the_same_bits(tmp_path):
    table = write_csv(tmp_path / "table", num_pairs=41)
    for name, faults in (("unbroken", []), ("broken", FAULTS)):
        command = [
            str(PROGRAMS / "forking_torchrun.py"),
            *settings(tmp_path, table, "--name", name),
        ]
        said = launch(command, faults, tmp_path)
    assert [(tmp_path / str(n)).exists() for n in range(len(FAULTS))] == [True] * len(FAULTS)
    for rank in (0, 1):
        named = re.findall(
            f"clipcore.train: rank {1 - rank} ends: rank {rank} (?:has|did|ended)", said
        )
        assert len(named) == sum(place[0] == rank for place in FAULTS), said
    late = "rank 1 did not enter the last passes and the gradients' average of step 8"
    assert f"{late} within 15 s" in said and said.count(f"rank 1 ends: {late}") == 1, said
    assert "rank 0 ended with OSError: the disk of this rank is gone" in said
    assert_same_bits(tmp_path / "unbroken", tmp_path / "broken")


def test_a_restart_finds_the_run_without_a_name(tmp_path):
    """Under torchrun itself, beside an older run that has a checkpoint, before the new one has any."""
    table = write_csv(tmp_path / "table", num_pairs=41)
    shutil.copy(PROGRAMS / "inject_faults.py", tmp_path / "sitecustomize.py")
    logs = tmp_path / "logs"
    torchrun = ["-m", "torch.distributed.run"]
    found = ["--global-batch-size", "8", "--epochs", "1"]
    command = [*torchrun, *settings(logs, table, *found, sizes=[])]
    path = f"{tmp_path}:{ROOT}"
    said = launch(command, [(0, 1, "backward", "kill")], tmp_path, PYTHONPATH=path)
    # A micro-batch that is found by the clock is found once: another one would round otherwise.
    assert said.count("expected memory, GB") == 1, said
    assert (tmp_path / "0").exists()
    (run,) = logs.iterdir()
    steps, evaluations = read_metrics(run)
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5] and len(evaluations) == 1


GATHER, SEEN = (
    "the all-gather of texts of step 17",
    "it last entered the barrier of step 16",
)
LATE = f"rank 2 did not enter {GATHER} within 10 s; {SEEN}"
DEAD = f"rank 2 has died (its connection closed) before it entered {GATHER}; {SEEN}"
SAID = {
    ("sleep", 0): LATE,
    ("sleep", 1): LATE,
    ("sleep", 2): f"rank 2 ends: {LATE}",
    ("die", 0): DEAD,
    ("die", 1): DEAD,
    ("die_in_backward", 0): (
        "rank 1 has died (its connection closed) before it entered the backward pass of step 17; "
        "it last entered the all-gather of features of step 17"
    ),
    ("raise", 0): f"rank 1 ended with OSError: no disk, and did not finish {GATHER}",
    ("behind", 0): "the ranks are out of step: rank 2 entered the all-gather of texts of step 16; "
    f"ranks 0, 1 entered {GATHER}",
    ("elsewhere", 0): f"the ranks are out of step: rank 0 entered {GATHER}; "
    "rank 1 entered the gathering of rows of step 17",
    ("other_kind", 0): f"the ranks are out of step: rank 0 entered {GATHER}; "
    "rank 1 entered the sum of columns of step 17",
    ("other_size", 0): (
        "the ranks are out of step: rank 0 entered the maximum of columns of step 17; "
        "rank 1 entered the sum of columns of step 17"
    ),
    (
        "host_waits",
        0,
    ): "rank 0 ends: rank 1 did not enter the sum of rows of step 17 within 10 s; "
    "it last entered the barrier of step 16",
}
SAID |= {("behind", 1): SAID["behind", 0], ("behind", 2): SAID["behind", 0]}
SAID |= {(case, 1): SAID[case, 0] for case in ("elsewhere", "other_kind")}


@pytest.mark.parametrize(("case", "rank"), SAID)
def test_survivors_name_the_rank_the_collective_and_the_step(ends, case, rank):
    assert ends[case, rank].text == SAID[case, rank]
    assert ends[case, rank].status == watchdog.EXIT_STATUS


def test_without_the_store_the_error_names_only_the_collective(ends):
    """Rank 0, which held the store, is the one that died."""
    text = ends["host_dies", 1].text
    assert text.startswith(
        f"{GATHER} lost a connection, and rank 0, which held the store, has ended"
    )
    assert ends["host_dies", 1].status == watchdog.EXIT_STATUS


def test_a_mistake_of_its_own_is_no_other_ranks_fault(ends):
    # The text is torch's, and 2.15 begins it with the operator.
    assert re.match(r"RuntimeError: (mm: )?mat1 and mat2", ends["own_mistake", 1].text)


def test_closing_waits_for_the_watchdog_to_leave_the_store(monkeypatch):
    """Python ends its daemon threads where they come back from C++, which aborts a process that is done."""
    monkeypatch.setattr(watchdog, "_POLL_S", 0.0)
    monkeypatch.setattr(watchdog, "PATIENCE_S", LIMIT_S)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    call = watchdog._Watchdog(store, 0, 1, timeout_s=LIMIT_S, is_launchers=True)
    inside, may_leave = threading.Event(), threading.Event()
    check = call._store.check

    class Held:
        def check(self, keys: list[str]) -> bool:
            inside.set()
            may_leave.wait(LIMIT_S)
            return check(keys)

    call._store = Held()
    assert inside.wait(LIMIT_S)
    closing = threading.Thread(target=call.close)
    closing.start()
    assert call._closed.wait(LIMIT_S)
    assert closing.is_alive() and call._watcher.is_alive()
    may_leave.set()
    closing.join(LIMIT_S)
    assert not closing.is_alive() and not call._watcher.is_alive()


def test_only_the_rank_that_holds_the_store_waits_for_the_others(monkeypatch):
    stays = []
    monkeypatch.setattr(watchdog.time, "sleep", stays.append)
    for rank, is_launchers in ((0, False), (0, True), (1, False)):
        call = object.__new__(watchdog._Watchdog)
        call._rank, call._is_launchers = rank, is_launchers
        call._linger()
    assert stays == [watchdog._LINGER_S]


def test_one_process_records_nothing():
    watchdog.at_step(3)
    with pytest.raises(ZeroDivisionError), watchdog.report_failure():  # noqa: SIM117
        with watchdog.collective("sum"):
            raise ZeroDivisionError
    watchdog.at_step(0)
