"""Commands answer --help and mistakes in their flags before they import torch, however they are started."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib

import pytest
from runs import PROGRAMS, ROOT

pytestmark = pytest.mark.fast

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
MODULES = [
    f"clipcore.{name}"
    for name in ("data.prepare", "tokenizer", "inspect", "interpolate", "evaluate")
]
MODULES += [f"clipcore.{name}" for name in ("classify", "export", "features", "train")]


def answer(command: str, *arguments: str) -> tuple[str, object]:
    """Return what a command prints, and its status with the slow libraries that it has imported."""
    line = [sys.executable, str(PROGRAMS / "answer_early.py"), command, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    *printed, last = done.stdout.splitlines()
    return "\n".join([*printed, done.stderr]), json.loads(last)


@pytest.mark.parametrize("command", [*MODULES, *SCRIPTS.values()])
def test_help_is_answered_before_torch_is_imported(command):
    said, ended = answer(command, "--help")
    assert said.startswith("usage: python -m clipcore.")
    assert ended == {"status": 0, "slow": []}


@pytest.mark.parametrize(
    ("command", "line", "said"),
    [
        ("clipcore.classify", "x.jpg --labels a,b", "one of the arguments --checkpoint"),
        ("clipcore.evaluate", "zero-shot --chekpoint r", "unrecognized arguments: --chekpoint r"),
        ("clipcore.evaluate", "retrieval --recall-k 129", "a K is a whole number from 1 to 128"),
        ("clipcore.evaluate", "overlap --help", "--threshold"),
        ("clipcore.export", "run out --to tf", "invalid choice: 'tf'"),
        ("clipcore.data.prepare", "--output x", "required: source"),
        ("clipcore.train", "--epocs 3", "unknown argument --epocs; did you mean --epochs?"),
        ("clipcore.train", "--epochs three", "invalid int value"),
        ("clipcore.train", "--epochs 0", "epochs"),
        ("clipcore.commands:train", "--epochs 0", "epochs"),
    ],
)
def test_mistakes_in_flags_are_answered_before_torch_is_imported(command, line, said):
    text, ended = answer(command, *line.split())
    assert said in text and ended == {"status": 0 if "--help" in line else 2, "slow": []}


def test_every_script_is_a_command() -> None:
    assert {name.removeprefix("clipcore-") for name in SCRIPTS} >= {"train", "classify", "evaluate"}
    for name, place in SCRIPTS.items():
        assert place == f"clipcore.commands:{name.removeprefix('clipcore-').replace('-', '_')}"
