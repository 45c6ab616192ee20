"""open_clip's arguments that clipcore's models lack: accepted if they change nothing, otherwise refused by name."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class _Accepted(NamedTuple):
    """The values of an argument that request clipcore's own behaviour, and the remedy for other values."""

    values: tuple[Any, ...]
    remedy: str


_TOWER = "give a file of weights as pretrained_{0}_path"
_ARGUMENTS = {
    "jit": _Accepted((False, None), "record the model with torch.jit.trace"),
    "pretrained_image": _Accepted((False, None), _TOWER.format("image")),
    "pretrained_text": _Accepted((True, False, None), _TOWER.format("text")),
    "pretrained_hf": _Accepted((True, False, None), _TOWER.format("text")),
    "weights_only": _Accepted((True, None), "leave it out: no code in a file of weights is run"),
    "nonscalar_logit_scale": _Accepted(
        (False, None), "leave it out: weights with a scale of one element load too"
    ),
}


def check_values(given: Mapping[str, Any]) -> None:
    """Refuse a value of open_clip's arguments that would change what a function returns.

    Raises:
        ValueError: the value requests something that clipcore lacks; the message names the remedy.
    """
    for name, value in given.items():
        accepted = _ARGUMENTS[name]
        if not any(type(value) is type(v) and value == v for v in accepted.values):
            raise ValueError(f"{name}={value!r} exists only in open_clip; {accepted.remedy}")


def check_others(function: str, others: Mapping[str, Any], own: Iterable[str]) -> None:
    """Refuse arguments that a function does not have, and those of open_clip that would change what it returns.

    Args:
        function: the function's name.
        others: arguments that it does not have.
        own: names of its arguments, for a hint.

    Raises:
        TypeError: the argument is unknown; the message names the nearest one.
        ValueError: see ``check_values``.
    """
    for name in others:
        if name not in _ARGUMENTS:
            near = difflib.get_close_matches(name, [*own, *_ARGUMENTS], n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"{function}() has no argument {name!r}{hint}")
    check_values(others)


def check_load_weights(load_weights: object) -> None:
    """Raise ValueError unless it is a truth value: in open_clip 2 the precision stood in its place."""
    if type(load_weights) is not bool:
        raise ValueError(
            f"load_weights is {load_weights!r}, not True or False; precision is the fourth argument since open_clip 3: give "
            "it by keyword, precision=..."
        )


@functools.cache
def note_custom_text() -> None:
    """Warn once that ``force_custom_text`` changes nothing."""
    warnings.warn(
        "force_custom_text changes nothing: weights of both layouts load into one model, whose state dict has CLIP's names",
        stacklevel=4,
    )
