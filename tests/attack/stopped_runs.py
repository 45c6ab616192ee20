"""Runs of many settings that get signals at any moment, in files, pipes and terminals: no step is lost, and no bit."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from runs import Run, wait_until
from shards import write_csv, write_shards

from attack.harness import Attack, LocalRuns
from attack.whole_runs import (
    NUM_PAIRS,
    NUM_STEPS,
    RESUME,
    SIZES,
    Progress,
    RunAttack,
    Straight,
    finish,
    line,
    make_straight,
    stops,
)

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
NOTHING = "stopped before the first step; there was nothing to save"


def how_it_stopped(
    run_dir: Path, before: Progress, then: Progress, status: int, number: int, text: str | None
) -> str:
    """Return how a run ended that got one signal.

    Args:
        before: its progress before this life.
        then: when the signal came.
        text: what it wrote, None where nobody could read it.

    Raises:
        AssertionError: it did not end as clipcore.train says, or a step was lost.
    """
    after, text = Progress.of(run_dir), text or ""
    assert "Traceback" not in text, text[-1500:]
    is_done = after.saved_step == NUM_STEPS and (run_dir / "report.html").exists()
    if status == 0:
        # Behind the last row nothing is left to stop, and it is written a little after that was decided.
        assert is_done and then.logged_step >= NUM_STEPS - 1, f"it went on, from {then}"
        return "done"

    shown = 128 - status if status < 0 else status
    assert shown == 128 + number, f"it ended with {status}: {text[-1500:]}"
    if after == before:
        # Not noted yet: Python's own way for SIGINT, the system's for the others.
        assert before.log is not None or then.log is None, "the first step was not saved"
        assert status == (130 if number == signal.SIGINT else -number), status
        assert not text or number != signal.SIGINT or NOTHING in text, text
        return "before the first step"
    assert NOTHING not in text, f"step {after.saved_step} is there, and it says: {NOTHING}"
    if is_done and status < 0:
        assert then.logged_step == NUM_STEPS, f"killed, from {then}"
        return "killed when it was done"
    assert status > 0 and after.logged_step == after.saved_step > before.saved_step, after
    hint = f"saved step {after.saved_step} of {NUM_STEPS}; go on with: python -m clipcore.train"
    assert not text or hint in text, text[-1500:]
    return "saved"


# By name: the data, and settings that change how a run computes or what it keeps.
_SETTINGS = {
    "plain": ("table", ""),
    "workers": ("table", "--workers 2"),
    "patch dropout": ("table", "--force-patch-dropout 0.5"),
    "average": ("table", "--ema-decay 0.9"),
    "bfloat16": ("table", "--precision amp_bf16"),
    "weights of 16 bits": ("table", "--precision bf16"),
    "loss scaler": ("table", "--precision amp"),
    "micro-batches": ("table", "--micro-batch-size 3 --force-patch-dropout 0.25"),
    "accumulation": ("table", "--batch-size 2 --accum-freq 4"),
    "sigmoid": ("table", "--siglip --grad-checkpointing"),
    "ResNet": ("table", "--model RN-nano-32 --precision amp_bf16"),
    "locked images": ("table", "--lock-image --lock-image-unlocked-groups 1"),
    "locked texts": ("table", "--lock-text --grad-clip-norm 0.5"),
    "shards": ("shards", "--val-data {shards} --workers 1"),
    "bad samples": ("bad", "--max-bad-fraction 0.3 --val-data {bad} --workers 1"),
    "mixture": ("mixture", "--train-data-upsampling-factors 1::2 --train-num-samples 24"),
    "cool-down": ("table", "--lr-scheduler const-cooldown --epochs-cooldown 1 --warmup 2"),
    "constant rate": ("table", "--skip-scheduler --aug-resize 40 --save-frequency 0"),
    "glyphs": ("glyphs", "--train-num-samples 24 --val-frequency 0 --zeroshot-frequency 0"),
    "moments of 16 bits": ("table", "--adam-moments bf16"),
    "all at once": (
        "shards",
        "--workers 2 --force-patch-dropout 0.5 --ema-decay 0.9 --precision amp --adam-moments bf16 "
        "--micro-batch-size 3 --siglip --grad-checkpointing --val-data {shards}",
    ),
}
EPOCHS_END = "at an epoch's end"
_WAYS = ("killed", *(number.name for number in STOPS), "three times", EPOCHS_END)


class Resumes(Attack):
    """Runs of many settings get a signal at a drawn event, and are resumed."""

    fast: ClassVar[int] = 3

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        shards = write_shards(folder / "shards", num_shards=2, pairs_per_shard=12)
        others = write_shards(folder / "others", num_shards=1, pairs_per_shard=9)
        table = write_csv(folder / "table", NUM_PAIRS)
        bad = write_csv(folder / "bad", NUM_PAIRS)
        for path in sorted(bad.parent.rglob("*.jpg"))[3:20:8]:
            path.write_bytes(path.read_bytes()[:200])
        self.data = {"table": table, "bad": bad, "shards": shards, "glyphs": "glyphs"}
        self.data["mixture"] = f"{shards}::{others}"
        # Each process makes those that its cases need.
        self.straight: dict[str, Straight] = {}

    def cases(self) -> Mapping[str, Any]:
        pairs = itertools.product(_SETTINGS, _WAYS)
        return {f"{name}, {way}": (name, way, seed) for seed, (name, way) in enumerate(pairs)}

    def attempt(self, what: Any, folder: Path) -> str:
        name, way, seed = what
        heed_signals()
        draws, logs = random.Random(seed), folder / "logs"
        logs.mkdir()
        data, settings = _SETTINGS[name]
        more = [*SIZES, *settings.format_map(self.data).split()]
        if name not in self.straight:
            place = self.folder / f"{os.getpid()} {name}"
            self.straight[name] = make_straight(place, self.data[data], more)
        straight, command = self.straight[name], line(logs, self.data[data], more)

        with contextlib.closing(LocalRuns()) as runs:
            for moment, number in _lives(way, straight, logs, draws):
                before = Progress.of(logs / "r")
                run = runs.start([*command, *RESUME], folder / "out", **moment)
                assert stops(run), f"it ended with {run.wait()}: {run.text[-1500:]}"
                then = Progress.of(logs / "r")
                for each in (number, signal.SIGCONT):
                    run.signal(each)

                status, how = run.wait(), "killed"
                if number != signal.SIGKILL:
                    how = how_it_stopped(logs / "r", before, then, status, number, run.text)
                else:
                    assert status == -number, f"it ended with {status}: {run.text[-1500:]}"
                if way == EPOCHS_END:
                    # It came with the last call of the step before.
                    assert how == "saved" and Progress.of(logs / "r").saved_step in (3, NUM_STEPS)

            # How many processes read the data makes no difference.
            workers = ["--workers", str(seed % 3)] if way in ("SIGUSR1", "SIGHUP") else []
            finish(runs, [*command, *workers], logs, straight)
        return how


def _lives(
    way: str, straight: Straight, logs: Path, draws: random.Random
) -> list[tuple[dict[str, Any], int]]:
    """Return when each life of a run stands still, as arguments of ``LocalRuns.start``, and what it gets then."""
    if way == EPOCHS_END:
        at = straight.row(draws.choice((3, NUM_STEPS))) - 1
        return [({"disk": [logs, signal.SIGSTOP, at]}, draws.choice(STOPS))]
    if way == "three times":
        # Each repeats the rest of a step at most, so that they do not come to the end.
        numbers, most = draws.choices([signal.SIGKILL, *STOPS], k=3), straight.num_events // 4
    else:
        numbers = [signal.SIGKILL if way == "killed" else signal.Signals[way]]
        most = straight.num_events
    return [({"signals": [(draws.randrange(1, most), signal.SIGSTOP)]}, n) for n in numbers]


def heed_signals() -> None:
    """Let the runs that this process starts have signals that were ignored when it began, as under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Reader:
    """A process that reads what a run prints, into a file: a terminal, or ``tee`` behind a pipe.

    It has a process group of its own. As a terminal it presses Ctrl-C on SIGUSR1, and closes when it is killed.

    Attributes:
        target: what the run is to write to, a descriptor.
        pid: of the process.
    """

    def __init__(self, is_terminal: bool, transcript: Path) -> None:
        source, self.target = os.openpty() if is_terminal else os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.target)
            _read(source, transcript)
        # The run must not inherit the end that is read.
        os.close(source)
        wait_until(transcript.exists, "reader")

    def wait(self) -> None:
        """Wait for the end of all that was written."""
        os.close(self.target)
        os.waitpid(self.pid, 0)


def _read(source: int, transcript: Path) -> None:
    """Copy into a file what comes, until no more does; ends the process."""
    with contextlib.suppress(BaseException):
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, lambda *_: os.write(source, b"\x03"))
        with open(transcript, "wb", buffering=0) as file:
            while chunk := os.read(source, 1 << 16):
                file.write(chunk)
    os._exit(0)


# How often each.
_KINDS = {
    "file": 48,
    "dead pipe": 16,
    "terminal": 24,
    "Ctrl-C": 20,
    "closed terminal": 16,
    "tee": 20,
    "impatience": 12,
}
# The signal that comes by itself.
_OWN = {
    "Ctrl-C": signal.SIGINT,
    "closed terminal": signal.SIGHUP,
    "tee": signal.SIGINT,
    "impatience": signal.SIGINT,
}
# Kinds whose signals come with what becomes of the reader.
_FROM_READER = {"Ctrl-C", "closed terminal", "tee"}


class Signals(RunAttack):
    """A run gets a signal, one in three a second one soon after, and is then resumed."""

    fast: ClassVar[int] = 3

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        calls = self.straight.calls
        changing = {n for n in range(1, len(calls)) if calls[n] != calls[n - 1]}
        # Shortly before that one it is decided whether the run goes on.
        self.moments = sorted(changing - {self.straight.row(NUM_STEPS)})

        # In the middle of a step, where pictures are read.
        reads, logs = folder / "reads", folder / "reading" / "logs"
        logs.mkdir(parents=True)
        with contextlib.closing(LocalRuns()) as runs:
            listed = [self.table.parent, None, -1, reads]
            assert runs.start(self.line(logs), folder / "out", disk=listed).wait() == 0
        self.num_reads = len(reads.read_text().splitlines())

    def cases(self) -> Mapping[str, Any]:
        return {
            f"{kind}, {number}": (kind, number % 3 == 2 or kind == "impatience", f"{kind} {number}")
            for kind, count in _KINDS.items()
            for number in range(count)
        }

    def attempt(self, what: Any, folder: Path) -> str:
        kind, is_double, seed = what
        heed_signals()
        draws, logs = random.Random(seed), folder / "logs"
        logs.mkdir()
        first = _OWN.get(kind) or draws.choice(STOPS)
        second = (_OWN.get(kind) or draws.choice(STOPS)) if is_double else None
        with contextlib.closing(LocalRuns()) as runs:
            moment = self._moment(draws, logs, kind, second)
            then, status, text = self._signalled(runs, folder, kind, first, second, moment)
            if second is None or first == second == signal.SIGHUP:
                start = Progress(0, None)
                how = how_it_stopped(logs / "r", start, then, status, first, text)
                is_late = how in ("done", "killed when it was done")
                assert is_late == (then.logged_step == NUM_STEPS), f"{how}, from {then}"
            else:
                how = _how_it_stopped_at_two(logs / "r", then, status, (first, second), text)
            finish(runs, self.line(logs), logs, self.straight)
        return how

    def _moment(
        self, draws: random.Random, logs: Path, kind: str, second: int | None
    ) -> dict[str, Any]:
        """Return when a run stands still, and when it then sends itself a second signal."""
        if second is not None and kind not in _FROM_READER:
            # One in four before the first step, where few of the events are.
            is_early = kind == "impatience" or draws.random() < 0.25
            at = draws.randrange(1, 25 if is_early else self.straight.num_events)
            later = draws.randrange(1, 3 if kind == "impatience" else 30)
            return {"signals": [(at, signal.SIGSTOP), (at + later, second)]}
        if draws.random() < 0.5:
            return {"disk": [self.table.parent, signal.SIGSTOP, draws.randrange(self.num_reads)]}
        return {"disk": [logs, signal.SIGSTOP, draws.choice(self.moments)]}

    def _signalled(
        self,
        runs: LocalRuns,
        folder: Path,
        kind: str,
        first: int,
        second: int | None,
        moment: dict[str, Any],
    ) -> tuple[Progress, int, str | None]:
        """Make the run, and send it the signal where it stands still.

        Return its progress there, its status, and what it wrote where somebody could read that.
        """
        command, output, reader = self.line(folder / "logs"), folder / "out", None
        if kind == "dead pipe":
            run = runs.start(command, output, is_pipe_dead=True, **moment)
        elif kind in ("file", "impatience"):
            run = runs.start(command, output, **moment)
        else:
            command.remove("--quiet")  # it draws its bar
            reader = Reader(kind != "tee", folder / "transcript")
            if kind == "tee":
                run = runs.start(command, Path(f"/proc/self/fd/{reader.target}"), **moment)
                os.setpgid(run.pid, reader.pid)
            else:
                terminal = os.ttyname(reader.target)
                run = runs.start(command, output, terminal=terminal, **moment)
            output = folder / "transcript"

        assert stops(run), f"it ended with {run.wait()}: {output.read_text()[-1500:]}"
        then = Progress.of(folder / "logs" / "r")
        _send(kind, first, run, reader)
        if second is not None and kind in _FROM_READER:
            _send(kind, second, run, reader)
        status = run.wait()
        if reader is not None:
            reader.wait()
        text = output.read_text(errors="replace")
        assert "Traceback" not in text, text[-1500:]
        is_read = kind not in ("dead pipe", "closed terminal", "tee")
        return then, status, text if is_read else None


def _send(kind: str, number: int, run: Run, reader: Reader | None) -> None:
    """Send a run a signal, as whoever sends it does, and let it go on."""
    with contextlib.suppress(ProcessLookupError):
        if reader is None or kind == "terminal":
            os.kill(run.pid, number)
        elif kind == "Ctrl-C":
            os.kill(reader.pid, signal.SIGUSR1)
            wait_until(lambda: not _stands_still(run), "SIGINT of the terminal")
        else:
            # To all of a pipeline, of which the reader is gone first. With the last descriptor of a terminal the kernel
            # hangs up, and a shell sends one SIGHUP more.
            os.kill(reader.pid, signal.SIGINT if kind == "tee" else signal.SIGKILL)
            os.waitid(os.P_PID, reader.pid, os.WEXITED | os.WNOWAIT)
            os.kill(run.pid, number)
        os.kill(run.pid, signal.SIGCONT)


def _stands_still(run: Run) -> bool:
    """Return whether a run is stopped, and has no SIGINT that waits for it to go on."""
    rows = Path(f"/proc/{run.pid}/status").read_text().splitlines()
    values = dict(row.split(":", 1) for row in rows)
    is_waiting = int(values["ShdPnd"], 16) >> (signal.SIGINT - 1) & 1
    return values["State"].split()[0] == "T" and not is_waiting


def _how_it_stopped_at_two(
    run_dir: Path, then: Progress, status: int, numbers: tuple[int, int], text: str | None
) -> str:
    """Return how a run ended that got two signals, of which the second may end it at once."""
    after, (first, second) = Progress.of(run_dir), numbers
    assert text is None or "Traceback" not in text, text[-1500:]
    if status == 0:
        assert after.saved_step == NUM_STEPS and (run_dir / "report.html").exists()
        assert then.logged_step >= NUM_STEPS - 1, f"it went on, from {then}"
        return "two: done"

    shown = 128 - status if status < 0 else status
    is_noted = then.log is not None and then.logged_step < NUM_STEPS
    expected = [128 + first] if is_noted else [128 + first, 128 + second]
    assert shown in expected, f"it ended with {status}: {(text or '')[-1500:]}"
    assert after.saved_step >= then.saved_step
    if second == signal.SIGHUP and is_noted:
        # Which is never taken for the wish to leave at once.
        assert after.saved_step == after.logged_step > then.saved_step, after
    if not after.logged_step:
        return "two: before the first step"
    return "two: saved" if after.saved_step == after.logged_step else "two: left at once"
