"""A save that is killed, cut off or refused at each of its calls: the old checkpoint is there, or the new one, and whole."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from checkpoints import groups, mark_of, save

from attack import disk
from attack.harness import Attack
from clipcore.checkpoint import (
    CheckpointError,
    Writers,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)

SAVED, REFUSED, KILLED = 0, 3, -signal.SIGKILL


def save_by_two(directory: Path, step: int, mark: int | None = None, keep: int | None = 2) -> None:
    """Write it as two ranks, each half of the rows: threads here, so that a kill ends both."""
    mark = step if mark is None else mark
    barrier, told, failures = threading.Barrier(2), [None, None], []

    def gather(rank: int, value: Any) -> list[Any]:
        told[rank] = value
        barrier.wait()
        values = list(told)
        barrier.wait()
        return values

    def write(rank: int) -> None:
        parts = {
            group: {
                name: value[3 * rank : 3 * rank + 3] if value.dim() else value
                for name, value in tensors.items()
                if value.dim() or not rank
            }
            for group, tensors in groups(mark).items()
        }
        writers = Writers(rank, 2, lambda value: gather(rank, value))
        try:
            save_checkpoint(directory, step, parts, {"mark": mark}, keep, writers)
        except CheckpointError as error:
            failures.append(error)

    other = threading.Thread(target=write, args=(1,))
    other.start()
    write(0)
    other.join()
    assert len(failures) in (0, 2), "one rank went on without the other"
    if failures:
        raise failures[0]


# By scenario: the checkpoints before in the order of saves, the step that is saved then, and how.
_SCENARIOS: dict[str, tuple[list[int], int, Callable[..., None], int | None]] = {
    "first": ([], 3, save, 2),
    "plain": ([1, 2], 3, save, 2),
    "again": ([1, 2], 2, save, 2),
    "left-overs": ([1, 2], 3, save, 2),
    "displaced": ([1, 2], 3, save, 2),
    "went back": ([10, 20, 30], 15, save, 2),
    "keeps one": ([1, 2], 3, save, 1),
    "keeps all": ([1, 2], 3, save, None),
    "damaged": ([1, 2], 3, save, 2),
    "two ranks": ([1, 2], 3, save_by_two, 2),
    "two ranks again": ([1, 2], 2, save_by_two, 1),
    "after a kill": ([1, 2], 3, save, 2),
}
MARK = 33


class Saves(Attack):
    """One call of a save goes wrong; what is there before and after it, in twelve scenarios."""

    fast: ClassVar[int] = 60

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for scenario in _SCENARIOS:
            self._prepare(scenario)

    def cases(self) -> Mapping[str, Any]:
        return {
            f"{scenario}, {fault}, call {number}": (scenario, fault, number)
            for scenario, fault in itertools.product(_SCENARIOS, disk.FAULTS)
            for number in disk.numbers(self.folder / f"{scenario}.calls", fault)
        }

    def attempt(self, what: Any, folder: Path) -> str:
        scenario, fault, number = what
        directory = shutil.copytree(self.folder / scenario, folder / "checkpoints")
        before, step, _, _ = _SCENARIOS[scenario]
        old = None if not before else before[-2] if scenario == "damaged" else before[-1]
        status = self._save_in_a_child(directory, scenario, fault, number)

        expected = {KILLED} if fault in disk.KILLS else {SAVED, REFUSED}
        if fault == "short":
            expected = {SAVED}
        elif fault == "torn" and scenario.startswith("two ranks"):
            expected |= {SAVED}  # whose calls come in any order: that one need not be a write
        assert status in expected, f"the save ended with {status}"

        # What has its name is whole, or was damaged before.
        for path in directory.glob("step_*"):
            if scenario != "damaged" or path.name != "step_00000002":
                load_checkpoint(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if scenario == "damaged" else "error")
            latest = load_latest(directory)
        if latest is None:
            assert old is None and status != SAVED, "nothing is left"
            mark = None
        else:
            mark = mark_of(latest)
            assert mark in (old, MARK), f"the newest is that of step {mark}"
            assert latest.step == (step if mark == MARK else old)
        assert mark == MARK or status != SAVED, "it was said to be saved, and is not"
        if status == REFUSED:
            assert not list(directory.glob(".tmp_step_*")), "a refused save left something behind"

        # The next save goes as if nothing had been.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(directory, 40)
            assert mark_of(load_latest(directory)) == 40
        hidden = [path.name for path in directory.glob(".*") if "displaced" not in path.name]
        assert not hidden, f"{hidden} are left for good"
        name = {SAVED: "saved", REFUSED: "refused", KILLED: "killed"}[status]
        return f"{name}, {'new' if mark == MARK else 'old'} one there"

    def _prepare(self, scenario: str) -> None:
        """Make the folder that a scenario begins with, and the list of calls of an undisturbed save in it."""
        directory = self.folder / scenario
        directory.mkdir(parents=True)
        for step in _SCENARIOS[scenario][0]:
            save(directory, step, keep=None)
        newest = directory / "step_00000002"
        if scenario == "left-overs":
            shutil.copytree(newest, directory / ".tmp_step_00000003")
            shutil.copytree(directory / "step_00000001", directory / ".tmp_old_step_00000001")
        if scenario == "displaced":
            newest.rename(directory / ".displaced_step_00000002")
        if scenario == "damaged":
            (newest / "manifest.json").write_bytes(b"{}")
        calls = self.folder / f"{scenario}.calls"
        if scenario == "after a kill":
            # Killed between the renames: it has its name, and the older one is not gone.
            renames = disk.numbers(self.folder / "plain.calls", "kill before")
            self._save_in_a_child(directory, scenario, "kill before", renames[-4])

        copy = shutil.copytree(directory, self.folder / f"{scenario} undisturbed")
        assert self._save_in_a_child(copy, scenario, None, -1, calls) == SAVED

    def _save_in_a_child(
        self, directory: Path, scenario: str, fault: str | None, at: int, calls: Path | None = None
    ) -> int:
        """Save as the scenario does in a process of its own; return how it ended."""
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        _, step, write, keep = _SCENARIOS[scenario]
        status = 4
        with contextlib.suppress(BaseException):
            warnings.simplefilter("ignore")
            disk.begin(directory, fault, at, calls)
            try:
                write(directory, step, MARK, keep)
                status = SAVED
            except CheckpointError:
                status = REFUSED
        os._exit(status)
