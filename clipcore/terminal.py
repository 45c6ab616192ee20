"""Standard output and error that cannot end a run: a dead pipe, a full disk or a closed terminal loses text alone."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NoReturn, TextIO


class SteadyStream(io.TextIOBase):
    """A text stream over a file descriptor whose writes never fail.

    A line goes out as a whole. What could not be written is dropped, so that it does not come back, as an error, at the next
    flush or when Python ends. What the encoding lacks is written as an escape.

    Args:
        stream: the one whose descriptor and encoding are taken over; it is flushed once.
    """

    def __init__(self, stream: TextIO) -> None:
        self._pending = ""
        self._stream = stream  # which would close the descriptor with its last reference
        self._descriptor = stream.fileno()
        self._encoding = stream.encoding or "utf-8"
        with contextlib.suppress(OSError, ValueError):
            stream.flush()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Take a text, and write what is there up to it if it ends a line; return its length."""
        self._pending += text
        if "\n" in text or "\r" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        pending, self._pending = self._pending, ""
        write_steadily(self._descriptor, pending.encode(self._encoding, "backslashreplace"))


_MOST_CHARS = 1200  # of one complaint

# Categories of characters that steer a terminal or break a line, and marks that turn the direction of what follows.
_STEERING = {"Cc", "Cs", "Zl", "Zp"}
_TURNING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def is_printable(text: str) -> bool:
    """Return whether a text is fit for one line of a terminal: spaces and joiners of all scripts are."""
    return text.isprintable() or not any(map(_is_steering, text))


def printable(text: str) -> str:
    """Return a text fit for one line of a terminal or a log, whatever a data set wrote into its names."""
    if text.isprintable():
        return text
    return "".join("\ufffd" if _is_steering(c) else c for c in text)


def _is_steering(character: str) -> bool:
    return unicodedata.category(character) in _STEERING or ord(character) in _TURNING


def printable_lines(text: str) -> str:
    """Return a text of several lines, which may hold tabs, fit for a terminal: see ``printable``."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind where it says nothing, fit for a terminal."""
    return printable((str(error).splitlines() or [type(error).__name__])[0])


def complain(program: str, text: object) -> None:
    """Print on standard error, in one line, what ends a program, or what is wrong with what it was given."""
    line = " ".join(str(text).splitlines())
    # What a file holds may be of any length; the remedy is at the end.
    if len(line) > _MOST_CHARS:
        line = f"{line[: _MOST_CHARS // 2]} [...] {line[-_MOST_CHARS // 2 :]}"
    print(f"{program}: {printable_lines(line)}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """A parser of arguments that tells a mistake in one line, whatever is in the arguments."""

    def error(self, message: str) -> NoReturn:
        complain(self.prog.removeprefix("python -m "), f"error: {message}; see --help")
        raise SystemExit(2)


def check_whole_numbers(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise ValueError for an option whose value was ``--``, of which argparse makes an empty list."""
    for name in names:
        if not isinstance(getattr(arguments, name), int):
            raise ValueError(f"--{name.replace('_', '-')} takes a whole number, got '--'")


def write_steadily(descriptor: int, content: bytes) -> None:
    """Write to a descriptor as much as goes; safe in a signal handler."""
    view = memoryview(content)
    with contextlib.suppress(OSError):
        while len(view):
            view = view[os.write(descriptor, view) :]


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Make ``sys.stdout`` and ``sys.stderr`` steady meanwhile, for all who print, warn, or draw a progress bar.

    Also a decorator of a command's ``main``. A stream that Python did not open itself, such as a notebook's, is left as it
    is.
    """
    _fill_standard_descriptors()
    with contextlib.ExitStack() as stack:
        redirections = (
            (contextlib.redirect_stdout, sys.stdout, 1),
            (contextlib.redirect_stderr, sys.stderr, 2),
        )
        for redirect, stream, descriptor in redirections:
            # Python has none for a descriptor that was closed before it began.
            if stream is None:
                stream = os.fdopen(descriptor, "w", closefd=False)
            # A notebook's stream may have the descriptor of another file.
            if not isinstance(stream, io.TextIOWrapper):
                continue
            with contextlib.suppress(OSError, ValueError):
                steady = SteadyStream(stream)
                stack.enter_context(redirect(steady))
                stack.callback(steady.flush)
        yield


def _fill_standard_descriptors() -> None:
    """Open the null device under each of 0, 1, 2 that is closed.

    The next file that is opened would get that number, and with it what a library prints.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)
