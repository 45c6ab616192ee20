"""Training runs as processes for tests: forked from one that has imported everything, so that a start costs little.

``RunServer`` keeps a process that has imported ``clipcore.train`` but computed nothing, so that its children may fork,
thread and differentiate as fresh ones do.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from clipcore.logbook import CLOCK_KEYS

ROOT = Path(__file__).resolve().parent.parent

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


@dataclass
class Run:
    """One forked run: its process, and where its output goes."""

    pid: int
    output: Path
    server: RunServer

    def wait(self, timeout_s: float = 120.0) -> int:
        """The exit status; negative the number of the signal that ended it."""
        return self.server.wait(self.pid, timeout_s)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)

    @property
    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, text: str, timeout_s: float = 60.0) -> None:
        """Until the output holds ``text``."""
        limit = time.monotonic() + timeout_s
        while text not in self.text:
            assert time.monotonic() < limit, f"no {text!r} in: {self.text}"
            time.sleep(0.01)


class RunServer:
    """Starts runs of ``clipcore.train`` by fork."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        # It answers once it has imported everything, so that no run's time holds that.
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    def start(self, arguments: list[str], output: Path) -> Run:
        """Begins ``python -m clipcore.train`` with these arguments."""
        output.write_text("")
        reply = self._ask({"argv": [str(a) for a in arguments], "output": str(output)})
        return Run(reply["pid"], output, self)

    def run(self, arguments: list[str], output: Path, timeout_s: float = 120.0) -> tuple[int, str]:
        """A whole run: its exit status and its output."""
        run = self.start(arguments, output)
        return run.wait(timeout_s), run.text

    def wait(self, pid: int, timeout_s: float) -> int:
        limit = time.monotonic() + timeout_s
        while (status := self._ask({"poll": pid})["status"]) is None:
            if time.monotonic() > limit:
                os.kill(pid, signal.SIGKILL)
                raise TimeoutError(f"the run did not end within {timeout_s} s")
            time.sleep(0.01)
        return status

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def _ask(self, request: dict[str, object]) -> dict[str, int]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


_SERVER = """
import json, os, sys
import clipcore.train, clipcore.classify

print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "poll" in request:
        pid, status = os.waitpid(request["poll"], os.WNOHANG)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status) if pid else None}), flush=True)
        continue
    pid = os.fork()
    if not pid:
        out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2), os.close(0)
        sys.exit(clipcore.train.main(request["argv"]))
    print(json.dumps({"pid": pid}), flush=True)
"""


def final_state(run_dir: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, object]]]:
    """What must be equal, bit for bit, between a run and one that was stopped and resumed: every tensor of the last
    checkpoint, and the log without the clock."""
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
    """The two runs ended alike."""
    (tensors, rows), (other_tensors, other_rows) = final_state(run_dir), final_state(other_dir)
    assert tensors.keys() == other_tensors.keys()
    differing = [
        name for name, value in tensors.items() if not torch.equal(value, other_tensors[name])
    ]
    assert not differing
    assert rows == other_rows
