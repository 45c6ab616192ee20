"""Modules that have moved, under their earlier names."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
from runs import PROGRAMS, ROOT

from clipcore.moved import MOVED
from clipcore.run import schedule


# In interpreters of their own, where nothing is imported yet: each takes the seconds in which torch comes.
@pytest.mark.parametrize("how", ["earlier", "present", "from"])
def test_earlier_names_give_the_very_modules(how: str) -> None:
    program = PROGRAMS / "import_earlier_names.py"
    done = subprocess.run(
        [sys.executable, program, how],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(MOVED))]


def test_what_is_replaced_under_one_name_is_replaced_under_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.import_module("clipcore.schedule"), "learning_rate", "replaced")
    assert schedule.learning_rate == "replaced"


def test_other_names_are_still_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"clipcore\.no_such_module"):
        importlib.import_module("clipcore.no_such_module")
