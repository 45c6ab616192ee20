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

# Every module that lay at the top of the package before there were rooms, and is elsewhere now.
EARLIER = """
architectures ceilings collapse config convert descriptions distributed failures flops
grad_cache interrupt loading logbook memory model modules open_clip_arguments optim packing
profile resnet roll_call run_parts run_report run_state schedule sharding step step_plan text
threads torchscript traffic verify vision weights
""".split()
# What users import from them.
PUBLIC = {
    "clipcore.model": (
        "CLIP",
        "create_model",
        "create_model_and_transforms",
        "create_model_from_pretrained",
        "load_checkpoint",
    ),
    "clipcore.config": ("TrainConfig", "ConfigError"),
    "clipcore.optim": ("build_optimizer",),
    "clipcore.run_state": ("RunState", "load_run"),
    "clipcore.distributed": ("World", "init_distributed"),
}


def test_every_earlier_module_has_a_place() -> None:
    assert {f"clipcore.{name}" for name in EARLIER} == MOVED.keys()


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_where_they_were(module: str) -> None:
    assert all(hasattr(importlib.import_module(module), name) for name in PUBLIC[module])


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


def test_no_module_takes_the_place_of_one_of_pythons_own() -> None:
    """As it would where the folder clipcore/ itself is on the path."""
    names = {path.stem for path in (ROOT / "clipcore").iterdir() if not path.name.startswith("_")}
    assert not names & sys.stdlib_module_names


def test_inspect_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clipcore.inspect", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m clipcore.inspect")
    inspection = importlib.import_module("clipcore.inspection")
    assert importlib.import_module("clipcore.inspect") is inspection
