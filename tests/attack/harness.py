"""What an attack is, and how its cases are tried: in processes of their own, so that a crash or a hang is one case's."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import train_server
from runs import RunServer
from tqdm import tqdm

# tqdm's own lock is shared by all processes that are forked, and a run that is killed while it holds it would keep the
# others waiting for ever.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


class Attack(ABC):
    """One kind of attack: it lists its cases, and tries one at a time.

    It is made once, before processes are forked that try its cases.

    Attributes:
        fast: how many of the cases the suite tries.
        is_fast: whether the suite tries it, which judges nothing by time or memory in use.
        limit_s: seconds after which a case is a hang.
        folder: of its own, for what its cases share.
    """

    fast: ClassVar[int]
    is_fast: bool = False
    limit_s: ClassVar[float] = 120.0

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def cases(self) -> Mapping[str, Any]:
        """Return what ``attempt`` is called with, by a name to be printed."""

    @abstractmethod
    def attempt(self, what: Any, folder: Path) -> str:
        """Try one case in an empty folder.

        Returns:
            How it ended, to be counted.

        Raises:
            Exception: it ended badly. An assertion's message says how.
        """


@dataclass
class Result:
    """What came of an attack.

    Attributes:
        outcomes: how often a case ended how.
        findings: by the case's name, what went wrong.
        seconds: that it took.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def chosen(cases: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return so many of the cases, from all parts, the same ones each time."""
    names = random.Random(0).sample(list(cases), min(number, len(cases)))
    return {name: cases[name] for name in sorted(names, key=list(cases).index)}


def try_all(attack: Attack, cases: Mapping[str, Any], folder: Path, num_processes: int) -> Result:
    """Try cases of an attack in so many processes; a process that dies or hangs is a finding of its case."""
    began, result = time.monotonic(), Result()
    names = list(cases)
    workers = [
        _Worker(attack, cases, names[k::num_processes], folder / f"worker{k}")
        for k in range(num_processes)
    ]
    while working := [worker for worker in workers if worker.names]:
        readable, _, _ = select.select([worker.pipe for worker in working], [], [], 1.0)
        for worker in working:
            worker.listen(worker.pipe in readable, result)
    result.seconds = time.monotonic() - began
    return result


class _Worker:
    """A process that tries cases one after another, and a new one where it dies.

    Attributes:
        names: of the cases that have not ended.
        pipe: what it says, a JSON line a case.
    """

    def __init__(
        self, attack: Attack, cases: Mapping[str, Any], names: Sequence[str], folder: Path
    ) -> None:
        self.names = list(names)
        self._attack, self._cases, self._folder = attack, cases, folder
        # On a machine that does much else a case takes many times as long; the suite's limit only ends a hang.
        self._limit_s = attack.limit_s * (10 if attack.is_fast else 1)
        if self.names:
            self._start()

    def _start(self) -> None:
        self.pipe, other = os.pipe()
        self._said, self._since = b"", time.monotonic()
        self._pid = os.fork()
        if not self._pid:
            # What its children leave open must not keep the pipe alive after it.
            os.set_inheritable(other, False)
            status = 1
            try:
                self._work(other)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(other)

    def _work(self, pipe: int) -> None:
        os.setpgid(0, 0)  # to be killed with its children
        for name in self.names:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            try:
                told = {"outcome": self._attack.attempt(self._cases[name], self._folder)}
            except BaseException as error:
                places = traceback.extract_tb(error.__traceback__)[-3:]
                where = " < ".join(f"{Path(p.filename).name}:{p.lineno}" for p in reversed(places))
                told = {"finding": f"{type(error).__name__}: {error} ({where})"}
            os.write(pipe, json.dumps(told).encode() + b"\n")

    def listen(self, is_readable: bool, result: Result) -> None:
        """Take in what the process has said; begin a new one where it has died or hangs."""
        chunk = os.read(self.pipe, 1 << 16) if is_readable else None
        if chunk:
            *lines, self._said = (self._said + chunk).split(b"\n")
            for told in map(json.loads, lines):
                name = self.names.pop(0)
                self._since = time.monotonic()
                if "finding" in told:
                    result.findings[name] = told["finding"]
                else:
                    result.outcomes[told["outcome"]] += 1
        is_late = time.monotonic() > self._since + self._limit_s
        if chunk == b"" or is_late or not self.names:
            self._end(is_late, result)

    def _end(self, is_late: bool, result: Result) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.names:
                os.killpg(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        os.close(self.pipe)
        if self.names:
            ended = f"ended with {os.waitstatus_to_exitcode(status)}"
            late = f"did not end within {self._limit_s:g} s"
            result.findings[self.names.pop(0)] = f"the process {late if is_late else ended}"
        if self.names:
            self._start()


class LocalRuns(RunServer):
    """Starts runs of ``clipcore.train`` by fork of this process, which has imported everything and trained nothing."""

    def __init__(self) -> None:
        self._statuses, self._started = {}, []

    def close(self) -> None:
        for run in self._started:
            if run.pid not in self._statuses:
                run.kill()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if "poll" in request:
            return train_server.answer(request)
        pid = os.fork()
        if not pid:
            _be_run(request)
        return {"pid": pid}


def _be_run(request: dict[str, Any]) -> None:
    """Become a run, and end this process with its status, whatever frames there are below."""
    status = 1
    try:
        # Those of the attack would take its folder away.
        atexit._clear()
        train_server.be_run(request)
    except BaseException as error:
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            status = error.code
        else:
            traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def limit_memory(more_bytes: int) -> None:
    """Let this process have so much more address space than it has, once: what a torch takes of it differs by gigabytes."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def one_line(text: str) -> str:
    """Return the one line that begins with a command's name in what it wrote; raise for a traceback or several."""
    assert "Traceback" not in text, text[-2000:]
    lines = [line for line in text.splitlines() if line.startswith("clipcore.")]
    assert len(lines) == 1 and len(lines[0]) < 2000, text[-2000:]
    return lines[0]


def called(
    command: Callable[[Sequence[str]], int], arguments: Sequence[str], output: Path
) -> tuple[int, str]:
    """Call a command's ``main`` in this process; return its status and what it wrote, also from C."""
    sys.stdout.flush()
    sys.stderr.flush()
    with redirected(output):
        try:
            status = command(arguments)
        except SystemExit as error:  # argparse's
            status = error.code if isinstance(error.code, int) else 1
    return status, output.read_text(errors="replace")


@contextlib.contextmanager
def redirected(output: Path) -> Iterator[None]:
    """Send what this process writes to standard output and error, also from C, to a file."""
    kept = [os.dup(1), os.dup(2)]
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, target):
            os.close(descriptor)
