"""The command line of ``python -m clipcore.train``, derived from the fields of ``TrainConfig``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from clipcore.run.config import (
    ACCEPTED,
    COST,
    DATA,
    EVALUATION,
    MODEL,
    OPTIMISATION,
    RECORDED,
    RUN,
    ConfigError,
    TrainConfig,
    flag_of,
    kinds,
)
from clipcore.run.open_clip_flags import describe_unknown
from clipcore.terminal import complain, is_printable, printable

# Endings of files of weights.
_WEIGHTS_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")


class _Parser(argparse.ArgumentParser):
    """One clear line for a mistake."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class _Joined(argparse.Action):
    """Joins the words behind a flag."""

    def __init__(self, *args: Any, joined_by: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._joined_by = joined_by

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, self._joined_by.join(values or ()))


class _Lines(argparse.HelpFormatter):
    """One line per flag."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=37, width=118)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Return a description in lines, without a break within a flag."""
        return textwrap.fill(
            text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its help fits on two screens."""
    parser = _Parser(
        prog="python -m clipcore.train",
        # A description of its own would be an empty line below it, and the help has two screens.
        usage="python -m clipcore.train [--train-data DATA] [--model NAME] [--global-batch-size N] ...\n"
        "Train a CLIP. Without arguments: two minutes on the embedded pictures of writing.",
        formatter_class=_Lines,
        allow_abbrev=False,
        add_help=False,
    )
    groups = {
        name: parser.add_argument_group(name, _reasons() if name == ACCEPTED else None)
        for name in (DATA, MODEL, OPTIMISATION, COST, EVALUATION, RUN, ACCEPTED)
    }
    for field in dataclasses.fields(TrainConfig):
        group, help = field.metadata["group"], field.metadata["help"]
        if group == RECORDED:
            continue
        add, kind = groups[group].add_argument, kinds()[field.name].type
        if group == ACCEPTED:
            help = argparse.SUPPRESS  # the group's description names them
        if kind is bool:
            add(flag_of(field.name), action="store_true", help=help)
            continue
        if field.default not in (None, ""):
            help += " [%(default)s]"
        arguments = {"metavar": kind.__name__.upper(), **field.metadata["arguments"]}
        if (joined_by := field.metadata["joined_by"]) is not None:
            arguments |= {"nargs": "+", "action": _Joined, "joined_by": joined_by}
        add(flag_of(field.name), type=kind, default=field.default, help=help, **arguments)
    # In a group of its own it would take three lines of the two screens.
    groups[RUN].add_argument("-h", "--help", action="help", help="show this help and exit")
    # A bare --resume means the newest checkpoint.
    resume = next(action for action in parser._actions if action.dest == "resume")
    resume.nargs, resume.const = "?", "latest"
    # open_clip takes a height and a width too.
    size = next(action for action in parser._actions if action.dest == "force_image_size")
    size.nargs = "+"
    return parser


def accepted_without_effect() -> list[str]:
    """Return the names of the settings that are taken from open_clip's users and change nothing."""
    fields = dataclasses.fields(TrainConfig)
    return [field.name for field in fields if field.metadata["group"] == ACCEPTED]


def _reasons() -> str:
    """Return in a sentence which flags have no effect, and why."""
    flags: dict[str, list[str]] = {}
    for field in dataclasses.fields(TrainConfig):
        if field.metadata["group"] == ACCEPTED:
            flags.setdefault(field.metadata["help"], []).append(flag_of(field.name))
    return ", ".join(f"{' '.join(names)} ({reason})" for reason, names in flags.items())


def check_command_line() -> None:
    """Exit with one line for a mistake in the process's command line, as argparse does."""
    try:
        parse_command_line()
    except ConfigError as error:
        complain("clipcore.train", f"error: {error}")
        raise SystemExit(2) from None


_UNSET = object()


def parse_command_line(
    arguments: Sequence[str] | None = None,
) -> tuple[TrainConfig, frozenset[str]]:
    """Return the settings that the flags give, and the names of those that were given.

    Raises:
        ConfigError: an unknown flag (with the nearest one that exists) or a value that cannot work.
    """
    parser = build_parser()
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    # argparse leaves attributes that exist alone: what is still unset afterwards was not given.
    unset = argparse.Namespace(**dict.fromkeys(names, _UNSET))
    namespace, unknown = parser.parse_known_args(
        sys.argv[1:] if arguments is None else arguments, unset
    )
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        raise ConfigError(describe_unknown(unknown[0], known))

    given = {name: value for name, value in vars(namespace).items() if value is not _UNSET}
    if sizes := given.get("force_image_size"):
        if len(set(sizes)) > 1:
            raise ConfigError(f"images are square: --force-image-size {min(sizes)}")
        given["force_image_size"] = sizes[0]
    name = given.get("name")
    if name is not None and (name in (".", "..") or "/" in name or not is_printable(name)):
        raise ConfigError(f"--name is of one folder in --logs, without a slash; got {name!r}")
    for name in ("logs", "name", "resume"):
        # safetensors opens nothing else.
        if not _is_utf8(str(given.get(name, ""))):
            raise ConfigError(
                f"--{name} {printable(str(given[name]))} is not UTF-8; rename the folder"
            )
    _check_purpose(given)
    return TrainConfig(**given), frozenset(given)


def _check_purpose(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for a command line that means something else than to train, or to resume a run."""
    resume = str(given.get("resume", ""))
    is_weights = os.path.splitext(resume)[1] in _WEIGHTS_SUFFIXES
    if os.path.isfile(resume) or (is_weights and not os.path.isdir(resume)):
        raise ConfigError(
            f"--resume continues a run of clipcore, and names its folder or one of its checkpoints; to begin a run from the "
            f"weights in a file, --pretrained {printable(resume)}"
        )
    evaluated = [
        flag_of(name) for name in ("imagenet_val", "imagenet_v2", "val_data") if name in given
    ]
    if evaluated and not given.keys() & {"train_data", "resume", "dataset_type", "preset"}:
        raise ConfigError(
            f"{' and '.join(evaluated)} without --train-data: to evaluate a model, python -m clipcore.evaluate zero-shot or "
            "retrieval, with --data; to train on the embedded data, --train-data glyphs"
        )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
