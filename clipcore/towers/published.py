"""What an installed open_clip knows of published weights and of ImageNet's names; clipcore itself downloads nothing.

open_clip is not imported, because it imports torchvision: single files of it are.
"""

from __future__ import annotations

import difflib
import functools
import importlib.machinery
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from clipcore.packages import package_folder
from clipcore.towers.architectures import (
    OPENAI_MODELS,
    OPENAI_NAMES,
    QUICK_GELU_SUFFIX,
    UnknownModelError,
    find_model,
)

LOCAL_PREFIX, HUB_PREFIX = "local-dir:", "hf-hub:"
# open_clip's prompts and names of classes for ImageNet.
IMAGENET_NAMES = ("OPENAI_IMAGENET_TEMPLATES", "SIMPLE_IMAGENET_TEMPLATES", "IMAGENET_CLASSNAMES")
_INSTALL = "pip install open_clip_torch"
# A package of open_clip's files under another name, whose __init__ does not run.
_PACKAGE = "_clipcore_open_clip"


def __getattr__(name: str) -> Any:
    """Return one of ``IMAGENET_NAMES`` from an installed open_clip; raise ImportError if there is none."""
    if name not in IMAGENET_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = open_clip_file("zero_shot_metadata")
    if module is None:
        raise ImportError(f"{name} is part of open_clip: {_INSTALL}")
    return getattr(module, name)


@functools.cache
def open_clip_file(name: str) -> ModuleType | None:
    """Return one module of an installed open_clip, without importing the package; None if it is not installed."""
    folder = package_folder("open_clip")
    if folder is None:
        return None
    if _PACKAGE not in sys.modules:
        package = ModuleType(_PACKAGE)
        package.__path__ = [str(folder)]
        package.__spec__ = importlib.machinery.ModuleSpec(_PACKAGE, None, is_package=True)
        sys.modules[_PACKAGE] = package
    return importlib.import_module(f"{_PACKAGE}.{name}")


def _table() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Return open_clip's table of published weights, by model and tag; empty if it is not installed."""
    module = open_clip_file("pretrained")
    return {} if module is None else module._PRETRAINED


def list_pretrained(as_str: bool = False) -> list[Any]:
    """Return (model, tag) of published weights for models that clipcore has, from an installed open_clip's table.

    Nothing is downloaded: ``create_model(model, tag)`` says in its error how to get the file.

    Args:
        as_str: return "model:tag" instead.

    Returns:
        an empty list if open_clip is not installed.
    """
    pairs = [(model, tag) for model, tags in _table().items() if _is_known(model) for tag in tags]
    return [":".join(pair) for pair in pairs] if as_str else pairs


def _is_known(model: str) -> bool:
    try:
        find_model(model)
    except UnknownModelError:
        return False
    return True


def place_of(model_name: str) -> tuple[str, str] | None:
    """Return open_clip's schema of a name and what follows it, such as ("local-dir:", "folder"); None for other names.

    Raises:
        ValueError: nothing follows.
    """
    for prefix in (LOCAL_PREFIX, HUB_PREFIX):
        if model_name.startswith(prefix):
            if model_name == prefix:
                raise ValueError(f"nothing follows {prefix!r}: give a folder, {LOCAL_PREFIX}FOLDER")
            return prefix, model_name.removeprefix(prefix)
    return None


def hub_remedy(repository: str, file: str = "") -> str:
    """Return the command that downloads a repository of the Hugging Face hub, or one file of it, and what to give then."""
    folder = repository.rpartition("/")[2]
    if file:
        return f"hf download {repository} {file} --local-dir {folder}, and give {folder}/{file}"
    return f"hf download {repository} --local-dir {folder}, and give the folder"


def refuse_hub(model_name: str, repository: str) -> None:
    """Raise the UnknownModelError that says how to get the model of an ``hf-hub:`` name."""
    folder = repository.rpartition("/")[2]
    command = f"hf download {repository} --local-dir {folder}"
    raise UnknownModelError(
        f"{model_name}: clipcore downloads nothing; run {command}, and give {LOCAL_PREFIX}{folder}"
    )


def how_to_get(model_name: str, tag: str) -> str | None:
    """Return in a line how to get published weights, for an error; None if there are none of that tag for any model.

    Args:
        model_name: a model's name, in any spelling of ``find_model``.
        tag: open_clip's name of the weights, such as ``openai`` or ``laion2b_s34b_b79k``.
    """
    name = OPENAI_NAMES.get(model_name, model_name)
    table = _table()
    wanted = tag.lower().replace("-", "_")
    for candidate in (name, name + QUICK_GELU_SUFFIX, name.removesuffix(QUICK_GELU_SUFFIX)):
        if entry := table.get(candidate, {}).get(wanted):
            return f"clipcore downloads nothing: {_source(entry)}"
    if not table:
        return _without_table(name, wanted)
    if any(wanted in tags for tags in table.values()):
        tags = list(table.get(name, {}))
        near = difflib.get_close_matches(wanted, tags, n=3, cutoff=0.3) or tags[:3]
        known = f"there are {', '.join(near)}, among others" if near else "open_clip knows none"
        return f"there are no weights {tag!r} for {model_name}; {known}"
    return None


def _source(entry: Mapping[str, Any]) -> str:
    """Return where an entry of open_clip's table is, as a command."""
    if place := entry.get("hf_hub"):
        repository, _, file = place.rpartition("/")
        return f"run {hub_remedy(repository, file)} as pretrained"
    url = entry.get("url", "")
    return f"run curl -LO {url}, and give {url.rpartition('/')[2]} as pretrained"


def _without_table(name: str, tag: str) -> str | None:
    """Return what is known of a tag without open_clip: the names of OpenAI's files."""
    base = name.removesuffix(QUICK_GELU_SUFFIX)
    if tag == "openai" and base in OPENAI_MODELS:
        return (
            f"clipcore downloads nothing: give OpenAI's file, {openai_file(base)}, as pretrained; {_INSTALL} lets this "
            "message name its address"
        )
    return None


def openai_file(name: str) -> str:
    """Return the name of OpenAI's file of weights, given open_clip's name of the model."""
    return "ViT-L-14-336px.pt" if name == "ViT-L-14-336" else f"{name}.pt"


def openai_address(name: str) -> str:
    """Return the address of OpenAI's file, or its name if open_clip is not installed."""
    entry = _table().get(name, {}).get("openai", {})
    return entry.get("url") or openai_file(name)
