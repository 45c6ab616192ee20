"""Send signals to the loader's workers from another process and read on; print "went on" and exit with status 7.

PYTHONPATH names tests/ and the checkout: the batches are those of tests/test_loader.py.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from runs import children, wait_until
from test_loader import Pictures, assert_same, make, take

STRANGER = "import os, sys; [os.kill(int(pid), int(sys.argv[1])) for pid in sys.argv[2:]]"


def has_received(pid: int, number: int) -> bool:
    """Return whether no such signal waits for a process any more; fail if the process has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines)
    assert status["State"][0] not in "ZX", f"worker {pid} ended at signal {number}"
    pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    return not pending >> (number - 1) & 1


def send(number: int, pids: list[int]) -> None:
    """Send a signal from a process that is not the workers' parent; return once all have received it."""
    subprocess.run([sys.executable, "-c", STRANGER, *map(str, [number, *pids])], check=True)
    wait_until(
        lambda: all(has_received(pid, number) for pid in pids),
        f"worker without a pending signal {number}",
    )


signal.signal(signal.SIGUSR1, lambda *_: os._exit(1))  # which no worker may keep
batches = make(Pictures(64), workers=2).batches()
first = take(batches, 2)  # one of each worker, so that both have set up their signals
workers = children(os.getpid())
assert len(workers) == 2
# A worker receives the second SIGTERM only after it has decided not to end at the first.
for name in ("SIGINT", "SIGUSR1", "SIGTERM", "SIGTERM"):
    send(int(signal.Signals[name]), workers)
# Four batches are read ahead: of six, both workers read one after the signals.
assert_same(first + take(batches, 6), take(make(Pictures(64)).batches(), 8))
print("went on")
raise SystemExit(7)  # with the workers still there
