"""The compiled part of clipcore: finds clipcore._C, and refuses one built for another torch.

The extension is compiled against one torch and one CUDA. With another torch it fails on a missing
symbol or, worse, does not fail. So its record of both is read from the file before it is loaded. A
checkout that was never installed has no extension, and every operation then uses its PyTorch path.
Gathered rows then have the same bits; attention on the CPU is slower and rounds differently.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from types import ModuleType

# The sentence that csrc/bindings.cpp compiles into the library.
_RECORD = re.compile(rb"clipcore\._C was built for torch ([\w.]+) with CUDA ([\w.]+);")

_REMEDY = (
    "Build it again for this torch: `pip install -e .` in the clipcore checkout, or, to build with "
    "exactly the packages that are installed, `pip install --no-build-isolation --no-deps -e .`."
)


class WrongBuildError(ImportError):
    """clipcore._C was built for another torch or CUDA; the message names both, and the command that fixes it."""


def _check_versions(library: Path) -> None:
    """Raise WrongBuildError when the library was built for another torch or CUDA than the running one.

    Only the release is compared, without its local part: 2.13.0 and 2.13.0+cu130 are the same build.
    """
    record = _RECORD.search(library.read_bytes())
    built = "unknown versions"
    if record is not None:
        built = "torch {} with CUDA {}".format(*(version.decode() for version in record.groups()))
    release = re.match(r"\d+\.\d+\.\d+", torch.__version__)
    assert release is not None, torch.__version__
    running = f"torch {release.group()} with CUDA {torch.version.cuda}"
    if built != running:
        raise WrongBuildError(f"{library} was built for {built}, but this is {running}. {_REMEDY}")


@functools.cache
def load() -> ModuleType | None:
    """Return the extension module clipcore._C, or None if it was never built.

    Raises:
        WrongBuildError: the extension was built for another torch or CUDA than the running one.
    """
    spec = importlib.util.find_spec("clipcore._C")
    if spec is None or spec.origin is None:
        return None
    _check_versions(Path(spec.origin))
    return importlib.import_module("clipcore._C")


def left_out(on_several_gpus: bool = False) -> str | None:
    """Return one line about what the build left out, why, and how to build it; None if nothing useful is missing.

    Args:
        on_several_gpus: whether the gather's CUDA kernels count as missing if the machine had no nvcc.

    Raises:
        WrongBuildError: the extension was built for another torch or CUDA than the running one.
    """
    extension = load()
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX")).rpartition(".")[0]
    # setup.py writes the note.
    note = Path(__file__).with_name(f"_C{suffix}.txt")
    if note.exists():
        return note.read_text().strip()
    if extension is None:
        return f"clipcore runs without its extension, which was never built. {_REMEDY}"
    if on_several_gpus and not extension.has_cuda_kernels():
        return (
            "clipcore was built without an nvcc: several GPUs pack what they gather in more launches, by torch. "
            f"With one of CUDA {torch.version.cuda} on the PATH: {_REMEDY}"
        )
    return None
