"""open_clip as an oracle for tests, also beside a CPU build of torch."""

from __future__ import annotations

import functools
from types import ModuleType

import torch


@functools.cache
def import_open_clip() -> ModuleType:
    """The package open_clip.

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
