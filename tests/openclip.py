"""open_clip as an oracle for tests, also beside a CPU build of torch."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from clipcore.towers.model import CLIP


@functools.cache
def import_open_clip() -> ModuleType:
    """Return the package open_clip.

    It imports torchvision, whose wheel cannot load its compiled operators beside a CPU torch and then fails on
    registering their shapes. Declaring the two operators first, which nothing here calls, lets the rest import.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        # The declaration lasts as long as the library object.
        import_open_clip.library = library  # type: ignore[attr-defined]
    import open_clip

    return open_clip


def theirs_of(model: CLIP) -> Any:
    """Return open_clip's model of the same shape."""
    open_clip = import_open_clip()
    config = model.config.to_dict()
    config.pop("vision_cfg"), config.pop("text_cfg")
    described = model.config.to_dict()
    return open_clip.CLIP(
        vision_cfg=open_clip.CLIPVisionCfg(**described["vision_cfg"]),
        text_cfg=open_clip.CLIPTextCfg(**described["text_cfg"]),
        **config,
    )


def simple_tokenizer() -> ModuleType:
    """Return open_clip/tokenizer.py alone: the package around it needs a torchvision that loads."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(os.environ):  # which it changes
        spec.loader.exec_module(module)
    return module
