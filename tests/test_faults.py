"""Ranks that die, sleep or are out of step: the others say so and end, and torchrun brings the run to the same bits.

The faults come from outside: what a rank calls at the place of the fault is patched before it starts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import NANO, ROOT, assert_same_bits
from shards import write_csv

from clipcore import roll_call
from clipcore.logbook import read_metrics

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
INJECT = """
import os, signal, time

def pass_by(phase):
    from clipcore import roll_call

    here = [int(os.environ["RANK"]), roll_call._step, phase]
    for number, (*place, what) in enumerate(FAULTS):
        if place != here:
            continue
        try:
            os.close(os.open(f"{MARKS}/{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue  # it has happened, in an earlier life of this rank
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "leave":
            os._exit(0)
        if what == "raise":
            raise OSError("the disk of this rank is gone")
        time.sleep(600)

def before(owner, name, phase=None):
    function = getattr(owner, name)
    def patched(*arguments, **keywords):
        pass_by(phase or arguments[1])
        return function(*arguments, **keywords)
    setattr(owner, name, patched)

def inject():
    import torch.distributed
    import clipcore.evaluate.tasks, clipcore.logbook

    before(clipcore.logbook.PartClock, "charge")  # (self, phase), at the end of the phase
    before(torch.distributed, "all_reduce", "collective")
    before(clipcore.evaluate.tasks, "retrieval_recall", "evaluating")
    before(os, "fsync", "writing")
"""
# torchrun's own options and agent, but ranks forked from a process that has imported everything: a start then costs one
# second in place of four.
FORKING_TORCHRUN = """
import os, sys
import clipcore.train
from torch.distributed import run
from torch.distributed.launcher.api import elastic_launch

def rank(*arguments):
    inject()
    if status := clipcore.train.main(arguments):
        os._exit(status)

def forked(config, entrypoint):
    config.start_method = "fork"
    return lambda *line: elastic_launch(config, rank)(*line[line.index("clipcore.train") + 1 :])

run.elastic_launch = forked
run.main()
"""


# Two pairs at once: one graph is kept, one micro-batch embedded twice.
SIZES = "--batch-size 2 --accum-freq 2 --keep-graphs 1".split()


def settings(folder: Path, table: Path, *more: str, sizes: Sequence[str] = SIZES) -> list[str]:
    """Two ranks, three epochs of five steps, saved at every step."""
    line = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "16", "-m", "--"]
    line += ["clipcore.train", "--logs", str(folder), "--train-data", str(table), *NANO]
    line += ["--val-data", str(table), "--epochs", "3", "--lr", "1e-3"]
    return [*line, *sizes, "--save-every-steps", "1", "--resume", "latest", "--timeout", "6", *more]


def launch(command: list[str], path: Path | None = None) -> str:
    """A whole launch, which succeeds; what it wrote."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{path}:{ROOT}" if path else str(ROOT),
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_run_that_loses_ranks_in_every_phase_ends_with_the_same_bits(tmp_path):
    table = write_csv(tmp_path / "table", num_pairs=41)
    for name, faults in (("unbroken", []), ("broken", FAULTS)):
        given = f"FAULTS, MARKS = {json.dumps(faults)}, {str(tmp_path)!r}"
        script = f"{given}\n{INJECT}\n{FORKING_TORCHRUN}"
        said = launch(["-c", script, *settings(tmp_path, table, "--name", name)])
    assert [(tmp_path / str(n)).exists() for n in range(len(FAULTS))] == [True] * len(FAULTS)
    for rank in (0, 1):
        named = re.findall(
            f"clipcore.train: rank {1 - rank} ends: rank {rank} (?:has|did|ended)", said
        )
        assert len(named) == sum(place[0] == rank for place in FAULTS), said
    late = "rank 1 did not come to the last passes and the gradients' average of step 8"
    assert f"{late} within 6 s" in said and said.count(f"rank 1 ends: {late}") == 1, said
    assert "rank 0 ended with OSError: the disk of this rank is gone" in said
    assert_same_bits(tmp_path / "unbroken", tmp_path / "broken")


def test_a_restart_finds_the_run_without_a_name(tmp_path):
    """Under torchrun itself, beside an older run that has a checkpoint, before the new one has any."""
    table = write_csv(tmp_path / "table", num_pairs=41)
    given = f"FAULTS, MARKS = {[[0, 1, 'backward', 'kill']]}, {str(tmp_path)!r}"
    inject = f"{given}\n{INJECT}\nif 'RANK' in os.environ: inject()"
    (tmp_path / "sitecustomize.py").write_text(inject)
    logs = tmp_path / "logs"
    torchrun = ["-m", "torch.distributed.run"]
    found = ["--global-batch-size", "8", "--epochs", "1"]
    said = launch([*torchrun, *settings(logs, table, *found, sizes=[])], tmp_path)
    # A micro-batch that is found by the clock is found once: another one would round otherwise.
    assert said.count("expected memory, GB") == 1, said
    assert (tmp_path / "0").exists()
    (run,) = logs.iterdir()
    steps, evaluations = read_metrics(run)
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5] and len(evaluations) == 1


# Each case is a group of ranks in which the last one, or the first, does what its name says at step 17.
TIMEOUT_S = 3.0
GROUPS = {"sleep": 3, "die": 3, "die_in_backward": 2, "raise": 2, "behind": 3, "elsewhere": 2}
GROUPS |= {"other_kind": 2, "other_size": 2, "host_dies": 2, "host_waits": 2, "own_mistake": 2}
RANKS = """
import json, os, sys, time
import torch
from clipcore import all_gather, distributed, roll_call

def act(case, rank, last):
    roll_call.at_step(16)
    distributed.barrier()
    roll_call.at_step(16 if case == "behind" and rank == last else 17)
    x = torch.ones(4, 3, requires_grad=True)
    if rank == last:
        if case == "sleep": time.sleep(60)
        if case == "die": os._exit(9)
        if case == "raise":
            with roll_call.farewell(): raise OSError("no disk")
        if case == "elsewhere": distributed.gather_rows(x)
        if case == "other_kind": distributed.all_reduce_(torch.ones(5), "sum of columns")
        if case == "other_size": distributed.all_reduce_(torch.ones(5), "sum of columns")
        if case == "host_waits": time.sleep(8)
        if case == "own_mistake":
            with roll_call.collective("sum of rows"): x @ x
    elif case == "other_size": distributed.all_reduce_(torch.ones(500), "maximum of columns")
    elif case == "host_dies": os._exit(9)
    elif case == "host_waits":
        # As on a GPU, where the collective returns at once and the wait for its result has no end of its own.
        with roll_call.collective("sum of rows"): time.sleep(60)
    sizes = distributed.gather_sizes(len(x), 0, "all-gather of texts")
    y = all_gather.start_gather(x, shard_sizes=[size for size, _ in sizes]).wait().rows_GE
    if case == "die_in_backward" and rank == last: os._exit(9)
    with roll_call.collective("backward pass"): y.sum().backward()

def main(case, rank, last, port, output):
    out = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(last + 1))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init_distributed("cpu", TIMEOUT_S)
    distributed.barrier()
    os.write(2, f"{time.time()}\\n".encode())
    try:
        act(case, rank, last)
    except roll_call.RankError as error:
        os.write(2, f"{error}".encode())
        os._exit(3)
    except Exception as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    os._exit(0)

import socket
ranks = {}
for case, size in GROUPS.items():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank in range(size):
        pid = os.fork()
        if not pid: main(case, rank, size - 1, port, f"{FOLDER}/{case}.{rank}")
        ranks[pid] = (case, rank)
while ranks:
    pid, status = os.wait()
    case, rank = ranks.pop(pid)
    print(json.dumps([case, rank, os.waitstatus_to_exitcode(status)]), flush=True)
"""


@dataclass(frozen=True)
class End:
    """How a rank ended, what it said last, and how long after its start."""

    status: int
    text: str
    after_s: float

    @staticmethod
    def read(status: int, path: Path) -> End:
        began, *said = path.read_text().splitlines()
        return End(status, said[-1] if said else "", path.stat().st_mtime - float(began))


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], End]:
    """All cases at once: their ranks wait more than they compute."""
    folder = tmp_path_factory.mktemp("ranks")
    given = f"GROUPS, TIMEOUT_S, FOLDER = {GROUPS}, {TIMEOUT_S}, {str(folder)!r}"
    done = subprocess.run(
        [sys.executable, "-c", f"{given}\n{RANKS}"],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        (case, rank): End.read(status, folder / f"{case}.{rank}") for case, rank, status in lines
    }


GATHER, SEEN = (
    "the all-gather of texts of step 17",
    "it was last seen coming to the barrier of step 16",
)
LATE = f"rank 2 did not come to {GATHER} within 3 s; {SEEN}"
DEAD = f"rank 2 has died (its connection closed) before it came to {GATHER}; {SEEN}"
SAID = {
    ("sleep", 0): LATE,
    ("sleep", 1): LATE,
    ("sleep", 2): f"rank 2 ends: {LATE}",
    ("die", 0): DEAD,
    ("die", 1): DEAD,
    ("die_in_backward", 0): (
        "rank 1 has died (its connection closed) before it came to the backward pass of step 17; "
        "it was last seen coming to the all-gather of features of step 17"
    ),
    ("raise", 0): f"rank 1 ended with OSError: no disk, and did not get through {GATHER}",
    ("behind", 0): "the ranks are out of step: rank 2 came to the all-gather of texts of step 16; "
    f"ranks 0, 1 came to {GATHER}",
    ("elsewhere", 0): f"the ranks are out of step: rank 0 came to {GATHER}; "
    "rank 1 came to the gathering of rows of step 17",
    ("other_kind", 0): f"the ranks are out of step: rank 0 came to {GATHER}; "
    "rank 1 came to the sum of columns of step 17",
    ("other_size", 0): (
        "the ranks are out of step: rank 0 came to the maximum of columns of step 17; "
        "rank 1 came to the sum of columns of step 17"
    ),
    ("host_waits", 0): "rank 0 ends: rank 1 did not come to the sum of rows of step 17 within 3 s; "
    "it was last seen coming to the barrier of step 16",
}
SAID |= {("behind", 1): SAID["behind", 0], ("behind", 2): SAID["behind", 0]}
SAID |= {(case, 1): SAID[case, 0] for case in ("elsewhere", "other_kind")}


@pytest.mark.parametrize(("case", "rank"), SAID)
def test_survivors_name_the_rank_the_collective_and_the_step(ends, case, rank):
    assert ends[case, rank].text == SAID[case, rank]
    assert ends[case, rank].status == roll_call.EXIT_STATUS


def test_survivors_speak_within_the_timeout_and_three_seconds(ends):
    after_s = {key: ends[key].after_s for key in SAID if key != ("sleep", 2)}
    assert max(after_s.values()) < TIMEOUT_S + 3, after_s
    # Whom the others have given up on ends by itself, long before its sleep does.
    assert ends["sleep", 2].after_s < 30


def test_without_the_notes_only_what_is_known_is_said(ends):
    """Rank 0, which held them, is the one that died."""
    text = ends["host_dies", 1].text
    assert text.startswith(
        f"{GATHER} lost a connection, and rank 0, which held the notes, has ended"
    )
    assert ends["host_dies", 1].status == roll_call.EXIT_STATUS


def test_a_mistake_of_its_own_is_no_other_ranks_fault(ends):
    assert ends["own_mistake", 1].text.startswith("RuntimeError: mat1 and mat2")


def test_one_process_notes_nothing():
    roll_call.at_step(3)
    with pytest.raises(ZeroDivisionError), roll_call.farewell():  # noqa: SIM117
        with roll_call.collective("sum"):
            raise ZeroDivisionError
    roll_call.at_step(0)
