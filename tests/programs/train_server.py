"""Fork a run of clipcore.train for each JSON line on standard input that has argv; report exit statuses on poll.

A request may hold "signals", [[number, signal], ...]: the run sends itself each at its event of that number. With
"count_to" it writes the number of its events to that file at its end. With "is_pipe_dead" all that it prints goes into a
pipe that nobody reads; with "terminal" to that terminal, which controls the run. With "torchrun", options of torchrun, the
run is one of that, whose ranks are forked as well. "disk" holds the arguments of attack/disk.py's ``begin``, "environment"
further variables.
"""

import atexit
import gc
import itertools
import json
import os
import sys
from pathlib import Path

from forking_torchrun import launch

import clipcore.classify.__main__
import clipcore.train

# What a run changes of its files, and each charge of its clock: between two of them a signal can fall.
EVENTS = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}


def count_events(signals: dict[int, int], count_to: str | None) -> None:
    """Count the run's events, and send it a signal at some of them."""
    from clipcore.run import metrics

    numbers, owner = itertools.count(1), os.getpid()

    def come() -> None:
        if os.getpid() != owner:  # a loader's process
            return
        if (signal := signals.get(next(numbers))) is not None:
            os.kill(owner, signal)

    def write_count(path: str) -> None:
        with open(path, "w") as file:
            file.write(str(next(numbers) - 1))

    if count_to is not None:
        atexit.register(write_count, count_to)

    sys.addaudithook(lambda event, _: come() if event in EVENTS else None)
    for holder, name in ((os, "write"), (os, "fsync"), (metrics.PartClock, "charge")):
        setattr(holder, name, preceded(getattr(holder, name), come))


def preceded(function, come):
    """Return a function that notes an event before each call."""

    def call(*arguments, **keywords):
        come()
        return function(*arguments, **keywords)

    return call


def be_run(request) -> None:
    """Become the run of a request, in a process of its own; ends in SystemExit."""
    out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if request["is_pipe_dead"]:
        reader, out = os.pipe()
        os.close(reader)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(0)
    if request["terminal"]:
        os.login_tty(os.open(request["terminal"], os.O_RDWR))
    if request["signals"] or request["count_to"]:
        count_events(dict(request["signals"]), request["count_to"])
    if request["disk"]:
        from attack import disk

        folder, fault, at, *calls = request["disk"]
        disk.begin(Path(folder), fault, at, *map(Path, calls))
    os.environ.update(request["environment"])
    if request["torchrun"]:
        launch(request["torchrun"], request["argv"])
        sys.exit(0)
    sys.exit(clipcore.train.main(request["argv"]))


def answer(request) -> dict:
    """Fork the run that is asked for, or say how one has ended."""
    if "poll" in request:
        pid, status = os.waitpid(request["poll"], os.WNOHANG)
        return {"status": os.waitstatus_to_exitcode(status) if pid else None}
    pid = os.fork()
    if not pid:
        be_run(request)
    return {"pid": pid}


def main() -> None:
    # Each run would copy all of its memory to look for cycles in it, for a second.
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
