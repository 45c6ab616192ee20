"""A part of each attack of tests/attack, none of whose cases may be a finding."""

from __future__ import annotations

import subprocess
import sys

from runs import ROOT


def test_the_attacks_find_nothing():
    command = [sys.executable, "-m", "tests.attack", "--fast", "--processes", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    assert "FOUND" not in done.stdout and "saves: 60 cases, no finding" in done.stdout
