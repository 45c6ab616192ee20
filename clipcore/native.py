"""The compiled part of clipcore: find clipcore._C, and refuse one built for another torch.

The extension is compiled against one torch and one CUDA. Beside another torch it fails on a missing
symbol, or, worse, does not fail. So its record of both is read from the file before it is loaded. A
checkout that was never installed has no extension: every operation then takes its PyTorch path.
What it gathers has the same bits then; attention on the CPU is slower and rounds otherwise.
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

# The sentence that csrc/bindings.cpp compiles in.
_RECORD = re.compile(rb"clipcore\._C was built for torch ([\w.]+) with CUDA ([\w.]+);")

_REMEDY = (
    "Build it again for this torch: `pip install -e .` in the clipcore checkout, or, to build with "
    "exactly the packages that are installed, `pip install --no-build-isolation --no-deps -e .`."
)


class WrongBuildError(ImportError):
    """clipcore._C was built for another torch or CUDA; the message names both, and the command that mends it."""


def _check_versions(library: Path) -> None:
    """Raise WrongBuildError when the library was built for another torch or CUDA than the running one.

    The release is compared, without its local part: 2.13.0 and 2.13.0+cu130 are one build.
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
    """Return the extension module clipcore._C, or None where it was never built.

    Raises:
        WrongBuildError: the extension was built for another torch or CUDA than the running one.
    """
    spec = importlib.util.find_spec("clipcore._C")
    if spec is None or spec.origin is None:
        return None
    _check_versions(Path(spec.origin))
    return importlib.import_module("clipcore._C")


def left_out(on_several_gpus: bool = False) -> str | None:
    """Return what the build left out, why, and how to build it, in one line; None where nothing of it is missed.

    Args:
        on_several_gpus: whether the CUDA kernels of the gather are missed too where the machine had no nvcc.

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
