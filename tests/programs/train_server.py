"""Fork a run of clipcore.train for each JSON line on standard input that has argv; report exit statuses on poll.

A request may hold "signal_at", [number, signal]: the run sends itself that signal at its event of that number. With
"count_to" it writes the number of its events to that file at its end. With "is_pipe_dead" all that it prints goes into a
pipe that nobody reads. With "num_ranks" the run is torchrun with so many ranks, which are forked as well.
"""

import atexit
import gc
import itertools
import json
import os
import sys

from forking_torchrun import launch

import clipcore.classify
import clipcore.train

# What a run changes of its files, and each charge of its clock: between two of them a signal can fall.
EVENTS = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}


def count_events(signal_at: list[int] | None, count_to: str | None) -> None:
    """Number the run's events, and send it a signal at one of them."""
    from clipcore import logbook

    numbers, owner = itertools.count(1), os.getpid()
    at, number = signal_at or (0, 0)

    def come() -> None:
        if os.getpid() != owner:  # a loader's process
            return
        if next(numbers) == at:
            os.kill(owner, number)

    def write_count(path: str) -> None:
        with open(path, "w") as file:
            file.write(str(next(numbers) - 1))

    if count_to is not None:
        atexit.register(write_count, count_to)

    sys.addaudithook(lambda event, _: come() if event in EVENTS else None)
    for holder, name in ((os, "write"), (os, "fsync"), (logbook.PartClock, "charge")):
        setattr(holder, name, preceded(getattr(holder, name), come))


def preceded(function, come):
    """Return a function that notes an event before each call."""

    def call(*arguments, **keywords):
        come()
        return function(*arguments, **keywords)

    return call


def main() -> None:
    # Each run would copy all of its memory to look for cycles in it, for a second.
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            ended = os.waitstatus_to_exitcode(status) if pid else None
            print(json.dumps({"status": ended}), flush=True)
            continue
        pid = os.fork()
        if not pid:
            out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            if request["is_pipe_dead"]:
                reader, out = os.pipe()
                os.close(reader)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.close(0)
            if request["signal_at"] or request["count_to"]:
                count_events(request["signal_at"], request["count_to"])
            if request["num_ranks"]:
                launch(request["num_ranks"], request["argv"])
                sys.exit(0)
            sys.exit(clipcore.train.main(request["argv"]))
        print(json.dumps({"pid": pid}), flush=True)


main()
