"""Output that cannot end a command: dead pipes, full disks, closed descriptors, characters that the encoding lacks."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import ROOT
from tqdm import tqdm

from clipcore.terminal import SteadyStream, check_whole_numbers, complain, steady_output

pytestmark = pytest.mark.fast


@contextlib.contextmanager
def descriptor_of(kind: str) -> Iterator[int]:
    """Return a descriptor to which every write fails."""
    if kind == "full disk":
        number = os.open("/dev/full", os.O_WRONLY)
    elif kind == "dead pipe":
        reader, number = os.pipe()
        os.close(reader)
    else:
        leader, number = os.openpty()
        os.close(leader)
    try:
        yield number
    finally:
        os.close(number)


@pytest.mark.parametrize("kind", ["full disk", "dead pipe", "closed terminal"])
def test_no_write_fails(kind):
    with descriptor_of(kind) as number:
        with pytest.raises(OSError), open(number, "w", closefd=False) as plain:
            plain.write("x")  # it is what it is said to be
        stream = SteadyStream(os.fdopen(number, "w", closefd=False))
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            print("a line", flush=True)
            print("no end of line", end="")
            with tqdm(total=3, file=sys.stderr, mininterval=0) as bar:
                bar.update()
                bar.write("above")
        stream.flush()


def test_a_line_goes_out_at_once_as_a_whole_and_what_lacks_as_an_escape():
    reader, writer = os.pipe()
    stream = SteadyStream(io.TextIOWrapper(os.fdopen(writer, "wb"), encoding="ascii"))
    print("a", "b", file=stream, end="")
    os.set_blocking(reader, False)
    with pytest.raises(BlockingIOError):
        os.read(reader, 100)
    print("\N{SNOWMAN}", file=stream)
    assert os.read(reader, 100) == b"a b\\u2603\n"
    assert stream.encoding == "ascii" and stream.fileno() == writer and not stream.isatty()
    os.close(reader)


def test_a_stream_without_a_descriptor_stays(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(sys, "stdout", text)
    monkeypatch.setattr(sys, "stderr", None)

    @steady_output()
    def command() -> int:
        print("here")
        return 7

    assert command() == 7 and text.getvalue() == "here\n" and sys.stdout is text


PROGRAM = """
import os, sys
from tqdm import tqdm
from clipcore.terminal import steady_output

@steady_output()
def main():
    print("one")
    with tqdm(total=2) as bar:
        bar.update()
        bar.write("above")
    print("two", file=sys.stderr)
    descriptor = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
    return 5 if descriptor > 2 else 6

sys.exit(main())
"""


@pytest.mark.parametrize("redirection", ["> /dev/full 2>&1", ">&- 2>&- <&-", "2>&1 | true"])
def test_a_command_ends_with_its_own_status(tmp_path, redirection):
    """Also where Python flushes its streams at the end, and where a file would get the number of a closed stream."""
    program, file = tmp_path / "program.py", tmp_path / "metrics.jsonl"
    program.write_text(PROGRAM)
    line = f"{sys.executable} {program} {file} {redirection}; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(["bash", "-c", line], env=environment).returncode == 5
    assert Path(file).read_bytes() == b""


def test_a_complaint_is_one_line_of_bounded_length(capsys):
    complain("clipcore", "first\nsecond \x1b[2J" + "x" * 10_000 + " the remedy")
    said = capsys.readouterr().err
    assert said.startswith("clipcore: first second \ufffd[2Jxxx") and said.endswith("the remedy\n")
    assert len(said) < 1300 and said.count("\n") == 1 and " [...] " in said


def test_an_option_without_a_number_is_named():
    """argparse makes an empty list of ``--top --``."""
    with pytest.raises(ValueError, match="--max-pixels takes a whole number, got '--'"):
        check_whole_numbers(Namespace(top=3, max_pixels=[]), ("top", "max_pixels"))
