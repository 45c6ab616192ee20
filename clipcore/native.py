"""The compiled part of clipcore: finds clipcore._C, and refuses one built for another torch.

The extension is compiled against one torch and one CUDA. Beside another torch it fails on a missing
symbol, or, worse, does not fail. So the versions are compared once, before the first call. A
checkout that was never installed has no extension: every operation then takes its PyTorch path,
which is the reference and gives the same bits.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from types import ModuleType

_REMEDY = (
    "Build it again for this torch: `pip install -e .` in the clipcore checkout, or, to build with "
    "exactly the packages that are installed, `pip install --no-build-isolation --no-deps -e .`."
)


def _described(torch_version: str, cuda_version: str) -> str:
    return f"torch {torch_version} ({f'CUDA {cuda_version}' if cuda_version else 'no CUDA'})"


def _check_versions(extension: ModuleType) -> None:
    """Raises ImportError when the extension was built for another torch than the running one."""
    release = re.match(r"\d+\.\d+\.\d+", torch.__version__)
    running = (release.group() if release else torch.__version__, torch.version.cuda or "")
    built = (extension.torch_version, extension.cuda_version)
    if built != running:
        raise ImportError(
            f"clipcore._C ({extension.__file__}) was built for {_described(*built)}, "
            f"but this is {_described(*running)}. {_REMEDY}"
        )


@functools.cache
def load() -> ModuleType | None:
    """The extension module clipcore._C, or None where it was never built.

    Raises:
        ImportError: the extension is there but belongs to another torch; the message names both
            versions where the extension can still say its own, and the command that mends it.
    """
    if importlib.util.find_spec("clipcore._C") is None:
        return None
    try:
        extension = importlib.import_module("clipcore._C")
    except ImportError as error:
        running = _described(torch.__version__, torch.version.cuda or "")
        raise ImportError(
            f"clipcore._C does not load beside {running}; it was built for another torch or "
            f"another Python ({error}). {_REMEDY}"
        ) from error
    _check_versions(extension)
    return extension
