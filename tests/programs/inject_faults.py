"""Make ranks fail at given places: FAULTS is JSON, [[rank, step, phase, what], ...], MARKS a folder that notes each.

Used as sitecustomize.py, where every process with a RANK gets the faults, or imported by forking_torchrun.py.
"""

import json
import os
import signal
import time


def pass_by(phase):
    from clipcore.ranks import watchdog

    here = [int(os.environ["RANK"]), watchdog._step, phase]
    for number, (*place, what) in enumerate(json.loads(os.environ["FAULTS"])):
        if place != here:
            continue
        try:
            os.close(os.open(f"{os.environ['MARKS']}/{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue  # it has happened, in an earlier life of this rank
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "leave":
            os._exit(0)
        if what == "raise":
            raise OSError("the disk of this rank is gone")
        if what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(3600)  # longer than any test may take: only another process ends it


def before(owner, name, phase=None):
    """Pass by the phase, or the function's second argument, before each call."""
    function = getattr(owner, name)

    def patched(*arguments, **keywords):
        pass_by(phase or arguments[1])
        return function(*arguments, **keywords)

    setattr(owner, name, patched)


def wait_for_all():
    """Return once the launcher has started all ranks.

    For a rank that connects earlier the launcher looks a name up in another thread, and a rank forked meanwhile inherits
    a lock of the C library that nobody opens.
    """
    launcher, limit = os.getppid(), time.monotonic() + 5.0  # one may have gone on, and be dead
    children = f"/proc/{launcher}/task/{launcher}/children"
    while time.monotonic() < limit:
        with open(children) as file:
            if len(file.read().split()) >= int(os.environ["LOCAL_WORLD_SIZE"]):
                return
        time.sleep(0.01)


def inject():
    import torch.distributed

    import clipcore.evaluate.tasks
    import clipcore.run.metrics
    from clipcore.ranks import watchdog

    wait_for_all()
    watchdog.MARGIN_S = (
        30.0  # on a busy machine the group's own error is late, and is to come first
    )
    before(clipcore.run.metrics.PartClock, "charge")  # (self, phase), at the end of the phase
    before(torch.distributed, "all_reduce", "collective")
    before(clipcore.evaluate.tasks, "retrieval_recall", "evaluating")
    before(os, "fsync", "writing")


if __name__ == "sitecustomize" and "RANK" in os.environ:
    inject()
