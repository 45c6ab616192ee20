"""Training runs as processes for tests: forked from one that has imported everything, so that a start costs little.

``RunServer`` keeps a process that has imported ``clipcore.train`` but computed nothing, so that its children may fork,
thread and differentiate as fresh ones do.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from clipcore.run.metrics import CLOCK_KEYS

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "programs"

# Seconds that one wait may take. It only ends a test that hangs: a loaded machine is many times slower than an idle one.
LIMIT_S = 300.0

# A model and a vocabulary that train in milliseconds.
NANO = [
    "--model",
    "ViT-nano-8-32",
    "--tokenizer",
    "bytes",
    "--workers",
    "0",
    "--device",
    "cpu",
    "--quiet",
]


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    """Return as soon as ``condition`` holds; fail with ``what`` was waited for if it never does."""
    limit = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < limit, f"no {what} within {limit_s:g} s"
        time.sleep(0.005)


def open_descriptors() -> int:
    """Return how many descriptors this process has open, once those are closed that other tests left in cycles.

    Threads of other tests may close some of theirs later: compare with ``<=``.
    """
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and not yet waited for."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@dataclass
class Run:
    """One forked run: its process, and where its output goes."""

    pid: int
    output: Path
    server: RunServer

    def wait(self) -> int:
        """Wait for the end; return the exit status, or minus the number of the signal that ended it."""
        return self.server.wait(self.pid)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)

    @property
    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, text: str) -> None:
        """Return once the output holds ``text``; fail if the run ends before."""

        def holds() -> bool:
            status = self.server.poll(self.pid)
            assert text in self.text or status is None, f"ended with {status}: {self.text}"
            return text in self.text

        wait_until(holds, repr(text))


class RunServer:
    """Starts runs of ``clipcore.train`` by fork."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAMS / "train_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._statuses: dict[int, int] = {}
        self._started: list[Run] = []
        # It answers once it has imported everything, so that no run's time holds that.
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    def start(
        self,
        arguments: list[str],
        output: Path,
        signals: Sequence[tuple[int, int]] = (),
        count_to: Path | None = None,
        is_pipe_dead: bool = False,
        num_ranks: int = 0,
        terminal: str | None = None,
        disk: Sequence[object] | None = None,
        torchrun: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Run:
        """Begin ``python -m clipcore.train`` with these arguments.

        Args:
            signals: (number, signal): the run sends itself this signal at its event of this number; what an event is,
                programs/train_server.py says.
            count_to: a file for the number of the run's events.
            is_pipe_dead: print into a pipe that nobody reads, in place of ``output``.
            num_ranks: under torchrun, with so many ranks.
            terminal: the device of a terminal that the run is to be controlled by, and print to in place of ``output``.
            disk: arguments of attack/disk.py's ``begin``, where that library was preloaded.
            torchrun: under torchrun, with these of its options in place of ``num_ranks``.
            environment: variables to set in the run.
        """
        output.write_text("")
        request: dict[str, Any] = {"argv": [str(a) for a in arguments], "output": str(output)}
        request |= {"signals": list(signals), "count_to": str(count_to) if count_to else None}
        if num_ranks:
            torchrun = ["--standalone", "--nproc-per-node", str(num_ranks)]
        request |= {"is_pipe_dead": is_pipe_dead, "terminal": terminal, "torchrun": list(torchrun)}
        request["environment"] = dict(environment or {})
        request["disk"] = (
            None if disk is None else [str(a) if isinstance(a, Path) else a for a in disk]
        )
        run = Run(self._ask(request)["pid"], output, self)
        self._started.append(run)
        return run

    def run(self, arguments: list[str], output: Path, num_ranks: int = 0) -> tuple[int, str]:
        """Make a whole run, under torchrun where a number of ranks is given; return its exit status and its output."""
        run = self.start(arguments, output, num_ranks=num_ranks)
        return run.wait(), run.text

    def poll(self, pid: int) -> int | None:
        """Return the exit status of a run, None while it goes on."""
        if pid not in self._statuses:
            status = self._ask({"poll": pid})["status"]
            if status is None:
                return None
            self._statuses[pid] = status
        return self._statuses[pid]

    def wait(self, pid: int) -> int:
        """Wait for the end of a run; return its exit status."""
        try:
            wait_until(lambda: self.poll(pid) is not None, "end of the run")
        except AssertionError:
            os.kill(pid, signal.SIGKILL)
            raise
        return self._statuses[pid]

    def counted(self, arguments: list[str], output: Path) -> int:
        """Make a whole run, which succeeds; return the number of its events."""
        events = output.with_suffix(".events")
        run = self.start(arguments, output, count_to=events)
        assert run.wait() == 0, run.text
        return int(events.read_text())

    def close(self) -> None:
        for run in self._started:
            if run.pid not in self._statuses:  # of a test that failed
                run.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(LIMIT_S)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def leave_process_alone(patch: pytest.MonkeyPatch) -> None:
    """Keep ``clipcore.train.main`` from what it sets for a whole process: determinism, threads, what malloc keeps."""
    train = importlib.import_module("clipcore.train")
    patch.setattr(train, "make_deterministic", lambda: None)
    patch.setattr(train, "set_threads", lambda config, *_: config)
    patch.setattr(train.memory, "keep_freed", lambda: None)


def final_state(run_dir: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, object]]]:
    """Return what must be equal, bit for bit, between a run and one that was stopped and resumed.

    It is every tensor of the last checkpoint, and the log without the clock.
    """
    from safetensors.torch import load_file

    newest = max((run_dir / "checkpoints").glob("step_*"))
    tensors = {
        f"{path.stem}/{name}": tensor
        for path in sorted(newest.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return tensors, [{k: v for k, v in row.items() if k not in CLOCK_KEYS} for row in rows]


def assert_same_bits(run_dir: Path, other_dir: Path) -> None:
    """Check that two runs ended alike."""
    (tensors, rows), (other_tensors, other_rows) = final_state(run_dir), final_state(other_dir)
    assert tensors.keys() == other_tensors.keys()
    differing = [
        name for name, value in tensors.items() if not torch.equal(value, other_tensors[name])
    ]
    assert not differing
    assert rows == other_rows
