"""Standard output and error that cannot end a run: a dead pipe, a full disk or a closed terminal only loses text."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, TextIO


class SteadyStream(io.TextIOBase):
    """A text stream over a file descriptor whose writes never fail.

    A line is written as a whole. Text that cannot be written is dropped, so that it does not cause an error at the next
    flush or when Python exits. Characters that the encoding lacks are written as escapes.

    Args:
        stream: the stream whose descriptor and encoding are used; it is flushed once.
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
        """Add a text to the buffer, and write the buffer if the text ends a line; return its length."""
        self._pending += text
        if "\n" in text or "\r" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        pending, self._pending = self._pending, ""
        write_steadily(self._descriptor, pending.encode(self._encoding, "backslashreplace"))


_MOST_CHARS = 1200  # limit of one message

# Categories of characters that control a terminal or break a line, and marks that change the direction of text.
_STEERING = {"Cc", "Cs", "Zl", "Zp"}
_TURNING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def is_printable(text: str) -> bool:
    """Return whether a text is safe in one line of a terminal; spaces and joiners of all scripts are."""
    return text.isprintable() or not any(map(_is_steering, text))


def printable(text: str) -> str:
    """Return a text that is safe in one line of a terminal or a log, whatever names a data set contains."""
    if text.isprintable():
        return text
    return "".join("\ufffd" if _is_steering(c) else c for c in text)


def _is_steering(character: str) -> bool:
    return unicodedata.category(character) in _STEERING or ord(character) in _TURNING


def printable_lines(text: str) -> str:
    """Return a text of several lines, which may hold tabs, made safe for a terminal: see ``printable``."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if it has none, made safe for a terminal."""
    return printable((str(error).splitlines() or [type(error).__name__])[0])


def complain(program: str, text: object) -> None:
    """Print one line on standard error: the error that ends a program, or a warning about its input."""
    line = " ".join(str(text).splitlines())
    # Quoted content of a file may have any length, and the remedy is at the end.
    if len(line) > _MOST_CHARS:
        line = f"{line[: _MOST_CHARS // 2]} [...] {line[-_MOST_CHARS // 2 :]}"
    print(f"{program}: {printable_lines(line)}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line, whatever the arguments contain."""

    def error(self, message: str) -> NoReturn:
        complain(self.prog.removeprefix("python -m "), f"error: {message}; see --help")
        raise SystemExit(2)


def answer_early(parse: Callable[[], object]) -> None:
    """Answer --help, or a mistake in the flags, and exit; return if the command line is right.

    A command calls this before it imports torch, which takes seconds.

    Args:
        parse: reads the process's command line, and exits as argparse does.
    """
    with steady_output():
        parse()


def check_whole_numbers(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise ValueError for an option with the value ``--``, which argparse turns into an empty list."""
    for name in names:
        if not isinstance(getattr(arguments, name), int):
            raise ValueError(f"--{name.replace('_', '-')} takes a whole number, got '--'")


def write_steadily(descriptor: int, content: bytes) -> None:
    """Write to a descriptor as much as it accepts; safe in a signal handler."""
    view = memoryview(content)
    with contextlib.suppress(OSError):
        while len(view):
            view = view[os.write(descriptor, view) :]


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Replace ``sys.stdout`` and ``sys.stderr`` by steady streams, for prints, warnings and progress bars.

    It is also a decorator for a command's ``main``. A stream that Python did not open itself, such as a notebook's, is not
    replaced.
    """
    _fill_standard_descriptors()
    with contextlib.ExitStack() as stack:
        redirections = (
            (contextlib.redirect_stdout, sys.stdout, 1),
            (contextlib.redirect_stderr, sys.stderr, 2),
        )
        for redirect, stream, descriptor in redirections:
            # Python has no stream for a descriptor that was closed before it started.
            if stream is None:
                stream = os.fdopen(descriptor, "w", closefd=False)
            # A notebook's stream may use the descriptor of another file.
            if not isinstance(stream, io.TextIOWrapper):
                continue
            with contextlib.suppress(OSError, ValueError):
                steady = SteadyStream(stream)
                stack.enter_context(redirect(steady))
                stack.callback(steady.flush)
        yield


def _fill_standard_descriptors() -> None:
    """Open the null device for each closed descriptor of 0, 1 and 2.

    Otherwise the next opened file would get that number, and a library's output would go to that file.
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
