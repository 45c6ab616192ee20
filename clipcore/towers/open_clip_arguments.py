"""open_clip's arguments that clipcore's functions lack: accepted if they change nothing, otherwise refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class _Accepted(NamedTuple):
    """The values of an argument that request clipcore's own behaviour, and the remedy for other values."""

    values: tuple[Any, ...]
    remedy: str


_ARGUMENTS = {
    "jit": _Accepted((False, None), "record the model with torch.jit.trace"),
    "force_custom_text": _Accepted(
        (False, None), "leave it out: weights of both layouts load into one"
    ),
    "force_preprocess_cfg": _Accepted(
        (None, {}), "give image_mean, image_std and image_resize_mode"
    ),
    "pretrained_image": _Accepted((False, None), "give the weights of a whole CLIP as pretrained"),
    "pretrained_text": _Accepted(
        (True, False, None), "give the weights of a whole CLIP as pretrained"
    ),
    "pretrained_image_path": _Accepted((None,), "give the weights of a whole CLIP as pretrained"),
    "pretrained_text_path": _Accepted((None,), "give the weights of a whole CLIP as pretrained"),
    "pretrained_hf": _Accepted(
        (True, False, None), "give the weights of a whole CLIP as pretrained"
    ),
    "return_transform": _Accepted((True, None), "use only the first returned value"),
    "weights_only": _Accepted((True, None), "leave it out: no code in a file of weights is run"),
    "image_interpolation": _Accepted((None, "bicubic"), "leave it out: images are resized bicubic"),
}
# Nothing is downloaded, so nothing is cached.
_WITHOUT_EFFECT = {"cache_dir", "cache_args"}


def check_others(function: str, others: Mapping[str, Any], own: Iterable[str]) -> None:
    """Refuse arguments that would change what a function returns.

    Args:
        function: the function's name.
        others: arguments that it does not have.
        own: names of its arguments, for a hint.

    Raises:
        TypeError: the argument is unknown; the message names the nearest one.
        ValueError: it is open_clip's argument, and requests something that clipcore lacks; the message names the remedy.
    """
    for name, value in others.items():
        if name in _WITHOUT_EFFECT:
            continue
        if name not in _ARGUMENTS:
            near = difflib.get_close_matches(name, [*own, *_ARGUMENTS], n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"{function}() has no argument {name!r}{hint}")
        accepted = _ARGUMENTS[name]
        if not any(type(value) is type(v) and value == v for v in accepted.values):
            raise ValueError(f"{name}={value!r} exists only in open_clip; {accepted.remedy}")
