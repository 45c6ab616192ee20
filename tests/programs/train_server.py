"""Fork a run of clipcore.train for each JSON line on standard input that has argv; report exit statuses on poll.

With "events" in the request, the run kills itself at that file system event, counted from its start. With "count", it
writes the number of its events to that file when it ends.
"""

import itertools
import json
import os
import signal
import sys

import clipcore.classify
import clipcore.train

# What a run does to its files, and each step of its clock: moments at which a kill can fall between two of them.
EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}


def count_events(kill_at: int | None, count_to: str | None) -> None:
    """Number the run's events, and end it by SIGKILL at number ``kill_at``."""
    from clipcore import logbook

    numbers = itertools.count(1)
    counting = True

    def come() -> None:
        nonlocal counting
        if not counting:
            return
        number = next(numbers)
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if count_to is not None:
            counting = False  # this file is no event of the run
            with open(count_to, "w") as file:
                file.write(str(number))
            counting = True

    sys.addaudithook(lambda event, _: come() if event in EVENTS else None)
    for owner, name in ((os, "write"), (os, "fsync"), (logbook.PartClock, "charge")):
        setattr(owner, name, preceded(getattr(owner, name), come))


def preceded(function, come):
    """Return a function that notes an event before each call."""

    def call(*arguments, **keywords):
        come()
        return function(*arguments, **keywords)

    return call


def main() -> None:
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
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.close(0)
            if request.get("kill_at") or request.get("count_to"):
                count_events(request.get("kill_at"), request.get("count_to"))
            sys.exit(clipcore.train.main(request["argv"]))
        print(json.dumps({"pid": pid}), flush=True)


main()
