"""Ctrl-C, SIGTERM and their like end a run after the step in hand, with a checkpoint; a second one ends it at once.

A wait for data that does not end would keep the step in hand for good. After a signal it is therefore given up in the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from clipcore.terminal import write_steadily

# A launcher hands its own signal on to processes that may have had it from the scheduler or the terminal already.
REPEAT_S = 3.0

# How long a wait for data goes on after a signal. Only of a process alone: the others of a group would lose steps with it.
DATA_WAIT_S = 10.0

# SIGHUP comes when the terminal is closed or the connection to it is lost.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class DataWaitError(BaseException):
    """A wait for data was given up after a signal.

    As KeyboardInterrupt it is no Exception: it may be raised inside a decoder, whose errors are a sample's.

    Args:
        number: the signal.
        waited_s: for how long.

    Attributes:
        exit_status: as of ``Interrupt``.
    """

    def __init__(self, number: int, waited_s: float) -> None:
        super().__init__(
            f"no data came for {waited_s:g} s after {signal.Signals(number).name}; look at the disk that holds it"
        )
        self.exit_status = 128 + number


# When this process began to wait for data, or received the last of it, on the monotonic clock; None while it does not wait.
_waiting_since: float | None = None


@contextlib.contextmanager
def waiting_for_data() -> Iterator[None]:
    """Let an ``Interrupt`` that has received a signal, before or inside, give this wait up with DataWaitError."""
    global _waiting_since
    _waiting_since = time.monotonic()
    try:
        yield
    finally:
        _waiting_since = None


def data_came() -> None:
    """Note that a part of what this process waits for is there: reading goes on, if slowly."""
    global _waiting_since
    if _waiting_since is not None:
        _waiting_since = time.monotonic()


@contextlib.contextmanager
def signal_ignored(number: int) -> Iterator[None]:
    """Let a signal pass unnoticed within it, such as one more Ctrl-C while the first is answered."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, handler)


class Interrupt:
    """Notes a signal for the training loop to see between two steps.

    The exit status is the shell's convention, 128 + the signal's number: 130 for Ctrl-C, 143 for SIGTERM, 138 for
    SIGUSR1 (which schedulers send before the time limit), 129 for a closed terminal (which ``nohup`` has ignored).

    Args:
        repeat_s: for so many seconds a further signal counts as the first one once more.
        data_wait_s: how long a wait for data goes on after a signal; None for as long as it takes.

    Attributes:
        signal_number: the signal received, or 0.
    """

    def __init__(self, repeat_s: float = 0.0, data_wait_s: float | None = None) -> None:
        self.signal_number = 0
        self._repeat_s = repeat_s
        self._data_wait_s = data_wait_s
        self._received_at = 0.0
        self._previous: dict[int, object] = {}
        # Handler, seconds and interval of somebody else's alarm, where this one has taken its place.
        self._other_alarm: tuple[Any, float, float] | None = None

    @property
    def exit_status(self) -> int:
        """Of a rank that stops because another one was signalled, as if by SIGTERM."""
        return 128 + (self.signal_number or signal.SIGTERM)

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._other_alarm is not None:
            handler, left_s, interval_s = self._other_alarm
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
            if left_s:
                left_s -= time.monotonic() - self._received_at
                signal.setitimer(signal.ITIMER_REAL, max(left_s, 1e-3), interval_s)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.signal_number:
            # A closing terminal sends more than one SIGHUP: the shell passes its own on, and then the kernel its one.
            is_repeated = time.monotonic() < self._received_at + self._repeat_s
            if is_repeated or number == signal.SIGHUP:
                return
            # The checkpoints are atomic, so that leaving in the middle of one loses nothing.
            os._exit(self.exit_status)
        self.signal_number, self._received_at = number, time.monotonic()
        message = (
            f"\n{signal.Signals(number).name}: saving after this step; once more to leave now\n"
        )
        # Not print, which is not safe in a handler. The reader of a pipe has often had the same Ctrl-C, and is gone.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            write_steadily(sys.stderr.fileno(), message.encode())
        if self._data_wait_s is not None:
            handler = signal.signal(signal.SIGALRM, self._give_up)
            # Again and again, as a wait may begin later.
            every_s = self._data_wait_s / 4
            left = signal.setitimer(signal.ITIMER_REAL, every_s, every_s)
            self._other_alarm = (handler, *left)

    def _give_up(self, *_: object) -> None:
        global _waiting_since
        if _waiting_since is None or self._data_wait_s is None:
            return
        if time.monotonic() >= max(_waiting_since, self._received_at) + self._data_wait_s:
            # Once: what is cleaned up on the way out, such as a loader's processes, is not to be cut short.
            _waiting_since = None
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            raise DataWaitError(self.signal_number, self._data_wait_s)
