"""The command line of open_clip's training, as its own parser has it: each flag works, has no effect, or is refused."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any

import pytest
from open_clip_train import params
from runs import ROOT

from clipcore.run.command_line import accepted_without_effect, parse_command_line
from clipcore.run.config import ConfigError, TrainConfig, flag_of
from clipcore.run.open_clip_flags import REFUSED
from clipcore.run.recipe import resolve
from clipcore.run.setup import note_without_effect

pytestmark = pytest.mark.fast

VALUES = {
    "--aug-cfg": "scale=(0.5,1)",
    "--dataset-type": "csv",
    "--dist-backend": "nccl",
    "--image-interpolation": "bicubic",
    "--image-resize-mode": "shortest",
    "--loss-dist-impl": "gather",
    "--lr-scheduler": "const",
    "--opt": "adamw",
    "--pretrained-image": "tower.pt",  # a switch in open_clip
    "--precision": "amp_bf16",
    "--remote-sync-protocol": "s3",
    "--report-to": "tensorboard",
    "--resume": "latest",
}


class Captured(Exception):
    """Carries a parser out of the function that makes it."""


@pytest.fixture(scope="module")
def theirs() -> dict[str, argparse.Action]:
    """Return the flags of open_clip's parser."""

    def capture(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise Captured(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", capture)
        with pytest.raises(Captured) as captured:
            params.parse_args([])
    (parser,) = captured.value.args
    return {a.option_strings[0]: a for a in parser._actions if a.dest != "help"}


def example(action: argparse.Action) -> list[str]:
    """Return a flag with a value that open_clip takes."""
    flag = action.option_strings[0]
    if action.nargs == 0 and flag not in VALUES:
        return [flag]
    more = ["--distill-pretrained", "teacher.pt"] if flag == "--distill-model" else []
    return [flag, VALUES.get(flag) or ("1" if action.type in (int, float) else "text"), *more]


def test_each_flag_is_taken_or_refused_by_name(theirs):
    ours = {flag_of(field.name) for field in dataclasses.fields(TrainConfig)}
    assert len(theirs) > 80 and REFUSED.keys() == theirs.keys() - ours
    assert not REFUSED.keys() & ours
    for flag, action in theirs.items():
        line = [*example(action), "--train-data", "x.tar"]
        if flag in REFUSED:
            with pytest.raises(ConfigError) as error:
                parse_command_line(line)
            assert str(error.value) == f"{flag} exists only in open_clip: {REFUSED[flag]}"
        else:
            assert flag[2:].replace("-", "_") in parse_command_line(line)[1]


def test_the_document_has_a_row_for_each_flag(theirs):
    document = (ROOT / "docs" / "from-open-clip.md").read_text()
    section = document.partition("## Flags of training")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(--[\w-]+)` \| ([a-z ]+) \| (.*?) ?\|$", section, re.MULTILINE)
    assert [flag for flag, _, _ in rows] == list(theirs)
    without_effect = {flag_of(name) for name in accepted_without_effect()}
    for flag, status, text in rows:
        expected = {"same", "different"}
        if flag in REFUSED:
            assert text == REFUSED[flag]
            expected = {"refused"}
        elif flag in without_effect:
            expected = {"no effect"}
        assert status in expected and (status == "same" or text), flag


def test_flags_without_effect_are_said_and_change_no_other_setting(theirs):
    without_effect = {flag_of(name) for name in accepted_without_effect()}
    assert without_effect <= theirs.keys()
    line = [word for flag in sorted(without_effect) for word in example(theirs[flag])]
    config, _ = parse_command_line(["--train-data", "x.tar", *line])
    plain, _ = parse_command_line(["--train-data", "x.tar"])
    names = accepted_without_effect()
    assert all(getattr(config, name) not in (None, False) for name in names)
    unsaid = {name: getattr(plain, name) for name in names}
    assert dataclasses.replace(config, **unsaid) == plain

    class World:
        world_size = 1

        def __init__(self) -> None:
            self.said: list[str] = []
            self.print = self.said.append

    world = World()
    note_without_effect(resolve(config), world)  # type: ignore[arg-type]
    (said,) = world.said
    assert {*said.partition(": accepted")[0].split(", ")} == without_effect
    quiet = World()
    note_without_effect(resolve(plain), quiet)  # type: ignore[arg-type]
    assert not quiet.said
