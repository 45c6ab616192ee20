"""Make a rank's disk wait, used as sitecustomize.py with a folder MARKS and the seconds REPEAT_S of clipcore.ranks.signals.

After a signal, each fsync notes that a checkpoint is being written, and waits for the file "go". Each signal that a rank
receives is noted as "RANK.NUMBER", and its coming to a barrier after the first as "barrier.RANK".
"""

import itertools
import os
import time
from pathlib import Path

import clipcore.ranks.distributed
import clipcore.ranks.signals
from clipcore.ranks.signals import Interrupt

marks = Path(os.environ["MARKS"])
fsync, receive, numbers = os.fsync, Interrupt._receive, itertools.count(1)
barrier = clipcore.ranks.distributed.barrier
is_signalled = False


def slow_fsync(file):
    if is_signalled:
        (marks / "writing").touch()
        while not (marks / "go").exists():
            time.sleep(0.01)
    return fsync(file)


def noted(self, number, frame):
    global is_signalled
    is_signalled = True
    (marks / f"{os.environ['RANK']}.{next(numbers)}").touch()
    receive(self, number, frame)


def noted_barrier(*group):
    if is_signalled:
        (marks / f"barrier.{os.environ['RANK']}").touch()
    barrier(*group)


os.fsync, Interrupt._receive = slow_fsync, noted
clipcore.ranks.distributed.barrier = noted_barrier
clipcore.ranks.signals.REPEAT_S = float(os.environ["REPEAT_S"])
