"""Signals: Ctrl-C, SIGTERM and similar end a run after the current step, with a checkpoint; a second one ends it at once.

If the data never arrive, the current step never ends. After a signal, the wait for data therefore has a time limit.
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

# A launcher forwards its signal to processes that may have received it from the scheduler or the terminal already.
REPEAT_S = 3.0

# The longest wait for data after a signal. It applies to single-process runs: in a group, the other ranks would lose steps.
DATA_WAIT_S = 10.0

# SIGHUP arrives when the terminal is closed or the connection to it is lost.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class DataWaitError(BaseException):
    """The data did not arrive in time after a signal.

    Like KeyboardInterrupt, it is not an Exception. It may be raised inside a decoder, whose Exceptions mean a bad sample.

    Args:
        number: the signal.
        waited_s: how long the process waited.

    Attributes:
        exit_status: see ``Interrupt``.
    """

    def __init__(self, number: int, waited_s: float) -> None:
        super().__init__(
            f"no data arrived for {waited_s:g} s after {signal.Signals(number).name}; check the disk that holds it"
        )
        self.exit_status = 128 + number


# Monotonic time at which this process began to wait for data or last received some; None while it does not wait.
_waiting_since: float | None = None


@contextlib.contextmanager
def waiting_for_data() -> Iterator[None]:
    """Allow an ``Interrupt`` to end the enclosed wait with DataWaitError, for a signal received before or during it."""
    global _waiting_since
    _waiting_since = time.monotonic()
    try:
        yield
    finally:
        _waiting_since = None


def data_arrived() -> None:
    """Restart the time limit of the wait, because some of the data have arrived."""
    global _waiting_since
    if _waiting_since is not None:
        _waiting_since = time.monotonic()


@contextlib.contextmanager
def signal_ignored(number: int) -> Iterator[None]:
    """Ignore a signal in the enclosed code, such as a second Ctrl-C while the first one is handled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, handler)


class Interrupt:
    """Records a signal, which the training loop reads between two steps.

    The exit status follows the shell's convention, 128 + the signal's number: 130 for Ctrl-C, 143 for SIGTERM, 138 for
    SIGUSR1 (which schedulers send before the time limit), 129 for a closed terminal (``nohup`` makes a run ignore it).

    Args:
        repeat_s: a further signal within this many seconds counts as a repetition of the first.
        data_wait_s: the longest wait for data after a signal, in seconds; None for no limit.

    Attributes:
        signal_number: the signal received, or 0.
    """

    def __init__(self, repeat_s: float = 0.0, data_wait_s: float | None = None) -> None:
        self.signal_number = 0
        self._repeat_s = repeat_s
        self._data_wait_s = data_wait_s
        self._received_at = 0.0
        self._previous: dict[int, object] = {}
        # Handler, seconds and interval of another alarm that this one replaced.
        self._other_alarm: tuple[Any, float, float] | None = None

    @property
    def exit_status(self) -> int:
        """128 + the signal's number. A rank that stops because another one was signalled counts as stopped by SIGTERM."""
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
            # A closing terminal sends more than one SIGHUP: first the shell forwards its own, then the kernel sends one.
            is_repeated = time.monotonic() < self._received_at + self._repeat_s
            if is_repeated or number == signal.SIGHUP:
                return
            # Checkpoints are atomic, so an exit in the middle of one loses nothing.
            os._exit(self.exit_status)
        self.signal_number, self._received_at = number, time.monotonic()
        message = f"\n{signal.Signals(number).name}: saving after this step; repeat the signal to exit now\n"
        # print is not safe in a handler. The reader of a pipe has often received the same Ctrl-C and closed the pipe.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            write_steadily(sys.stderr.fileno(), message.encode())
        if self._data_wait_s is not None:
            handler = signal.signal(signal.SIGALRM, self._end_wait)
            # The timer repeats, because a wait may begin later.
            every_s = self._data_wait_s / 4
            left = signal.setitimer(signal.ITIMER_REAL, every_s, every_s)
            self._other_alarm = (handler, *left)

    def _end_wait(self, *_: object) -> None:
        global _waiting_since
        if _waiting_since is None or self._data_wait_s is None:
            return
        if time.monotonic() >= max(_waiting_since, self._received_at) + self._data_wait_s:
            # Raise only once, so that the cleanup, such as ending a loader's processes, is not interrupted.
            _waiting_since = None
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            raise DataWaitError(self.signal_number, self._data_wait_s)
