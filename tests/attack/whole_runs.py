"""Whole runs that are killed, refused, stopped or doubled: each, resumed, ends with the bits of one that was let be."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from runs import NANO, Run, assert_same_bits
from shards import write_csv

from attack import disk
from attack.harness import Attack, LocalRuns, one_line
from clipcore.checkpoint import latest_checkpoint

# Two epochs of three steps, saved after the steps 2, 3, 4 and 6, and evaluated after 3 and 6.
NUM_PAIRS, NUM_STEPS = 24, 6
SIZES = "--batch-size 8 --epochs 2 --lr 1e-3 --save-every-steps 2 --keep-checkpoints 2".split()
RESUME = ["--resume", "latest"]

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
NOTHING = "stopped before the first step; there was nothing to save"


def line(logs: Path, data: Path | str, more: list[str] = SIZES) -> list[str]:
    """Return the command line of the run ``r``."""
    return ["--logs", str(logs), "--name", "r", "--train-data", str(data), *NANO, *more]


@dataclass(frozen=True)
class Straight:
    """A run that was let be.

    Attributes:
        run_dir: its folder.
        calls: its calls on the disk, by name and path.
        num_events: as programs/train_server.py counts them.
    """

    run_dir: Path
    calls: list[str]
    num_events: int

    def row(self, step: int) -> int:
        """Return the number of the call that writes a step's row of metrics.jsonl."""
        rows = map(json.loads, (self.run_dir / "metrics.jsonl").read_text().splitlines())
        index = next(k for k, row in enumerate(rows) if row["step"] == step and "task" not in row)
        writes = [n for n, call in enumerate(self.calls) if call.startswith("write ")]
        return [n for n in writes if self.calls[n].endswith("/metrics.jsonl")][index]


def make_straight(folder: Path, data: Path | str, more: list[str] = SIZES) -> Straight:
    """Make a run that is let be, in a new folder."""
    logs, calls, events = folder / "logs", folder / "calls", folder / "events"
    logs.mkdir(parents=True)
    with contextlib.closing(LocalRuns()) as runs:
        listed = [logs, None, -1, calls]
        run = runs.start(line(logs, data, more), folder / "out", disk=listed, count_to=events)
        assert run.wait() == 0, run.text
    return Straight(logs / "r", calls.read_text().splitlines(), int(events.read_text()))


@dataclass(frozen=True)
class Progress:
    """What of a run is on the disk.

    Attributes:
        saved_step: of its newest checkpoint.
        log: None before it is begun, from when on a run notes signals.
    """

    saved_step: int
    log: bytes | None

    @staticmethod
    def of(run_dir: Path) -> Progress:
        newest, log = latest_checkpoint(run_dir / "checkpoints"), run_dir / "metrics.jsonl"
        step = 0 if newest is None else int(newest.name.removeprefix("step_"))
        return Progress(step, log.read_bytes() if log.exists() else None)

    @property
    def logged_step(self) -> int:
        """The step of the last row, which is that of a step or of an evaluation behind it."""
        rows = (self.log or b"").splitlines()
        return json.loads(rows[-1])["step"] if rows else 0


def finish(runs: LocalRuns, command: list[str], logs: Path, straight: Straight) -> int:
    """Resume a run and let it be; return the step that it went on from.

    Raises:
        AssertionError: it does not end with the straight run's bits.
    """
    status, text = runs.run([*command, *RESUME], logs.parent / "finished")
    assert status == 0, f"resumed, it ended with {status}: {text[-1500:]}"
    assert "skipped step_" not in text, f"a checkpoint was damaged: {text[-1500:]}"
    assert_same_bits(straight.run_dir, logs / "r")
    assert (logs / "r" / "report.html").exists()
    return first_step(text)


def first_step(text: str) -> int:
    """Return the step that a run went on from, as it says."""
    begun = re.search(r" steps, from step (\d+), on ", text)
    return int(begun[1]) if begun else 0


class RunAttack(Attack):
    """What the attacks on one small run share: its table, and how it ends where it is let be."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.table = write_csv(folder / "table", NUM_PAIRS)
        self.sizes = [*SIZES, "--val-data", str(self.table)]
        self.straight = make_straight(folder / "straight", self.table, self.sizes)

    def line(self, logs: Path) -> list[str]:
        return line(logs, self.table, self.sizes)


class WholeRuns(RunAttack):
    """One call on the disk goes wrong in the middle of a run, which is then resumed."""

    fast: ClassVar[int] = 6

    def cases(self) -> Mapping[str, Any]:
        calls, draws = self.straight.calls, random.Random(0)
        # Each tensor is a write of its own: of those behind one another the first and the last stand for all.
        repeated = {n for n in range(1, len(calls) - 1) if calls[n - 1] == calls[n] == calls[n + 1]}
        cases = {}
        for number in sorted(set(range(len(calls))) - repeated):
            is_write = calls[number].startswith("write ")
            fitting = [fault for fault in disk.FAULTS if is_write or fault not in disk.OF_WRITES]
            for fault in draws.sample(fitting, 2):
                cases[f"{fault}, call {number}"] = (fault, number)
        return cases

    def attempt(self, what: Any, folder: Path) -> str:
        fault, number = what
        logs = folder / "logs"
        logs.mkdir()
        with contextlib.closing(LocalRuns()) as runs:
            run = runs.start(self.line(logs), folder / "out", disk=[logs, fault, number])
            status, text = run.wait(), run.text

            calls, at = self.straight.calls, number
            if fault in ("ENOSPC", "EDQUOT"):
                fitting = (n for n in range(number, len(calls)) if takes_room(calls[n]))
                at = next(fitting, len(calls))

            # A rename that was made is a checkpoint, and one that was not is none.
            is_made = fault in ("kill after", "short")
            commits = [n for n, call in enumerate(calls) if is_commit(call)]
            num_saved = sum(n < at or (is_made and n == at) for n in commits)
            if fault in disk.KILLS:
                assert status == -signal.SIGKILL, f"the run ended with {status}: {text[-1500:]}"
            elif status == 0:
                assert_same_bits(self.straight.run_dir, logs / "r")
                is_heard = fault != "short" and at < len(calls) and not may_fail(calls[at])
                assert not is_heard or UNREMOVED in text, f"an error of {calls[at]!r} was lost"
                num_saved = len(commits)
            else:
                assert fault != "short" and status == 2, f"it ended with {status}: {text[-1500:]}"
                assert os.strerror(disk.FAULTS[fault][1]) in one_line(text), text
            saved_step, found = (0, 2, 3, 4, NUM_STEPS)[num_saved], Progress.of(logs / "r")
            assert found.saved_step == saved_step, f"step {found.saved_step}, not {saved_step}"

            begun = finish(runs, self.line(logs), logs, self.straight)
        assert begun == saved_step, f"it went on from step {begun}, not {saved_step}"
        return {-signal.SIGKILL: "killed", 0: "done all the same", 2: "refused"}[status]


# What a run says of an error after its save.
UNREMOVED = "cannot remove an old checkpoint"


def may_fail(call: str) -> bool:
    """Return whether a run needs nothing of a call: it makes what is there, or closes what is on the disk."""
    return (call.endswith("/checkpoints") and call.startswith("mkdir ")) or (
        call.startswith("close ") and call.endswith(("/metrics.jsonl", "/.lock"))
    )


def takes_room(call: str) -> bool:
    """Return whether a call fails on a full disk."""
    return call.startswith(("write ", "mkdir "))


def is_commit(call: str) -> bool:
    """Return whether a call gives a checkpoint its name."""
    return bool(re.match(r"rename .*/checkpoints/step_\d+$", call))


class TwoWriters(RunAttack):
    """A run is stopped at a call on the disk, and another one begins in the same folder."""

    fast: ClassVar[int] = 4

    def cases(self) -> Mapping[str, Any]:
        early = {f"about the lock, {seed}": (True, seed) for seed in range(30)}
        return early | {f"anywhere, {seed}": (False, seed) for seed in range(30)}

    def attempt(self, what: Any, folder: Path) -> str:
        is_early, seed = what
        draws, logs = random.Random(seed), folder / "logs"
        logs.mkdir()
        command, num_calls = [*self.line(logs), *RESUME], len(self.straight.calls)
        with contextlib.closing(LocalRuns()) as runs:
            is_begun = draws.random() < 0.5
            if is_begun:
                life = [logs, "kill before", draws.randrange(20, num_calls // 2)]
                assert runs.start(command, folder / "life", disk=life).wait() == -signal.SIGKILL

            at = draws.randrange(5, 280)
            if is_early:
                # Often at the call that opens the lock, which is earlier where the folder has its name already.
                at = draws.choice((1 if is_begun else 4, draws.randrange(12)))
            listed = [logs, signal.SIGSTOP, at, folder / "calls"]
            first = runs.start(command, folder / "first", disk=listed)
            assert stops(first), first.text
            *calls, _ = (folder / "calls").read_text().splitlines()
            is_locked = any(call.endswith("/.lock") for call in calls)
            if is_locked:
                how = self._refuse_second(runs, command, folder, first, draws)
            else:
                how = self._let_second(runs, command, folder, first, draws)
            finish(runs, self.line(logs), logs, self.straight)
        return how

    def _refuse_second(
        self,
        runs: LocalRuns,
        command: list[str],
        folder: Path,
        first: Run,
        draws: random.Random,
    ) -> str:
        """Begin a run while the first one holds the lock; it says so, and changes nothing."""
        run_dir = folder / "logs" / "r"
        before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
        check_busy(runs.start(command, folder / "second"))
        after = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
        assert after == before, "the refused run wrote to the folder"

        if draws.random() < 0.5:
            first.kill()
            assert first.wait() == -signal.SIGKILL
            return "the second refused, the first killed"
        first.signal(signal.SIGCONT)
        assert first.wait() == 0, first.text[-1500:]
        return "the second refused, the first done"

    def _let_second(
        self,
        runs: LocalRuns,
        command: list[str],
        folder: Path,
        first: Run,
        draws: random.Random,
    ) -> str:
        """Begin a run while the first one has no lock yet, and continue that while this one writes, or is gone."""
        how = draws.choice(("writes", "is done", "was killed"))
        fault = {"writes": signal.SIGSTOP, "is done": None, "was killed": "kill after"}[how]
        # Behind its lock.
        life = [folder / "logs", fault, draws.randrange(10, 280)]
        second = runs.start(command, folder / "second", disk=life)
        if how == "writes":
            assert stops(second), second.text
            first.signal(signal.SIGCONT)
            check_busy(first)
            second.signal(signal.SIGCONT)
        expected = -signal.SIGKILL if how == "was killed" else 0
        assert second.wait() == expected, second.text[-1500:]
        if how != "writes":
            # It has to look at what is there now.
            newest = Progress.of(folder / "logs" / "r").saved_step
            first.signal(signal.SIGCONT)
            assert first.wait() == 0, first.text[-1500:]
            begun = first_step(first.text)
            assert begun == newest, f"it went on from step {begun}, not {newest}"
        return f"the second {how} when the first goes on"


def stops(run: Run) -> bool:
    """Wait for the stop that a run has been given; return whether it came before the run's end."""
    how = os.waitid(os.P_PID, run.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    return how is not None and how.si_code == os.CLD_STOPPED


def check_busy(run: Run) -> None:
    """Wait for a run that another one keeps out."""
    status = run.wait()
    assert status == 2, f"it ended with {status}: {run.text[-1500:]}"
    assert "another run is writing to" in one_line(run.text), run.text
