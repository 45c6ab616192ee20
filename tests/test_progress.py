"""A bar on a terminal, and lines now and then without one."""

from __future__ import annotations

import io
import sys

import pytest

from clipcore.progress import LINE_EVERY_S, Progress

pytestmark = pytest.mark.fast


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_once_in_a_while(capsys):
    clock = Clock()
    with Progress(1000, "images", "x", initial=100, clock=clock) as shown:
        for _ in range(4):
            clock.now += LINE_EVERY_S / 2
            shown.update(150)
    assert not shown.is_bar
    assert capsys.readouterr().err.splitlines() == [
        f"x: 400 of 1,000 images, {300 / LINE_EVERY_S:,.1f} images/s, 60 s left",
        f"x: 700 of 1,000 images, {300 / LINE_EVERY_S:,.1f} images/s, 30 s left",
    ]


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch):
    clock, terminal = Clock(), Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(10, "steps", "x", stays=True, clock=clock) as shown:
        clock.now += 2 * LINE_EVERY_S
        shown.update(10, "loss 1.0")
    said = terminal.getvalue()
    assert shown.is_bar and "10/10" in said and "loss 1.0" in said and "10 of 10" not in said


def test_quiet_shows_nothing(monkeypatch):
    for stream in (io.StringIO(), Terminal()):
        clock = Clock()
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress(10, "steps", quiet=True, clock=clock) as shown:
            clock.now += 2 * LINE_EVERY_S
            shown.update(10)
        assert stream.getvalue() == "" and not shown.is_bar


def test_a_detail_takes_the_place_of_the_speed(capsys):
    clock = Clock()
    shown = Progress(10, "steps", clock=clock)
    clock.now += LINE_EVERY_S
    shown.update(3, "loss 1.0")
    assert capsys.readouterr().err == "3 of 10 steps, loss 1.0\n"


def test_a_total_that_is_not_known_is_left_out(capsys):
    clock = Clock()
    shown = Progress(None, "captions", "x", clock=clock)
    clock.now += LINE_EVERY_S
    shown.update(60)
    assert capsys.readouterr().err == f"x: 60 captions, {60 / LINE_EVERY_S:,.1f} captions/s\n"
