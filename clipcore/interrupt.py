"""Ctrl-C, SIGTERM and their like end a run after the step in hand, with a checkpoint; a second one ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from types import FrameType

from clipcore.terminal import write_steadily

# A launcher hands its own signal on to processes that may have had it from the scheduler or the terminal already.
REPEAT_S = 3.0

# SIGHUP comes when the terminal is closed or the connection to it is lost.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Interrupt:
    """Notes a signal for the training loop to see between two steps.

    The exit status is the shell's convention, 128 + the signal's number: 130 for Ctrl-C, 143 for SIGTERM, 138 for
    SIGUSR1 (which schedulers send before the time limit), 129 for a closed terminal (which ``nohup`` has ignored).

    Args:
        repeat_s: for so many seconds a further signal counts as the first one once more.

    Attributes:
        signal_number: the signal received, or 0.
    """

    def __init__(self, repeat_s: float = 0.0) -> None:
        self.signal_number = 0
        self._repeat_s = repeat_s
        self._received_at = 0.0
        self._previous: dict[int, object] = {}

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
