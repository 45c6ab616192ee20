"""Builds the extension clipcore._C from csrc/; everything else is in pyproject.toml.

An extension fits exactly one torch: the one that imports it. pip builds in an isolated environment
with a torch of its own, which may be another version than the one already installed. So setup.py
asks the target interpreter, outside of the isolation, for its torch, and compiles against that one
when it satisfies the requirement in pyproject.toml (otherwise pip is about to replace it, by the
release that the isolated environment has too).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from setuptools import setup

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent

# Printed by the target interpreter: where its torch lies, its version and its CUDA. Importing torch
# would take seconds and is not needed for that.
ASK_FOR_TORCH = """
import importlib.metadata, importlib.util, json
spec = importlib.util.find_spec("torch")
if spec is not None and spec.origin:
    print(json.dumps([spec.origin, importlib.metadata.version("torch")]))
"""

# Nobody reads errno or traps after a square root, so that loops with one may become vectors.
VECTORS = ["-fno-math-errno", "-fno-trapping-math"] if sys.platform != "win32" else []
# For ATen's parallel loops, where torch has them by OpenMP. The library is not linked: its functions are then those of
# the one that torch brought, and there is one pool of threads. Clang would want headers that it does not bring.
IS_CLANG = "clang" in os.environ.get("CXX", "")
OPENMP = ["-fopenmp"] if sys.platform == "linux" and not IS_CLANG else []


def target_torch() -> tuple[Path, str] | None:
    """The folder that holds the target environment's torch, and its version; None without one.

    pip runs an isolated build with the target's own interpreter and adds the isolation through
    PYTHONPATH; the same interpreter without that variable therefore sees the target environment
    as it is, with or without system site-packages.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    asked = subprocess.run(
        [sys.executable, "-c", ASK_FOR_TORCH],
        env=environment,
        cwd=Path(sys.executable).parent,
        capture_output=True,
        text=True,
    )
    if asked.returncode != 0 or not asked.stdout.strip():
        return None
    origin, version = json.loads(asked.stdout.splitlines()[-1])
    return Path(origin).parents[1], version


def required_torch() -> Requirement:
    """The torch requirement as pyproject.toml states it."""
    stated = re.search(r'"(torch[<>=~!][^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert stated is not None, "pyproject.toml requires torch"
    return Requirement(stated.group(1))


@contextmanager
def first_on_path(folder: Path | None) -> Iterator[None]:
    """Puts one folder first on sys.path, and takes it away again.

    Only torch may come from there: the target's setuptools can be older than the build needs.
    """
    if folder is None:
        yield
        return
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def cuda_toolkit(torch_cuda: str) -> Path | None:
    """A CUDA toolkit that can compile and link for that CUDA version of torch; None without one."""
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        str(Path(nvcc).resolve().parents[1]) if nvcc else None,
        "/usr/local/cuda",
    ]
    for candidate in filter(None, candidates):
        home = Path(candidate)
        needed = ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart.so")
        if not all((home / name).exists() for name in needed):
            continue
        printed = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True)
        release = re.search(r"release (\d+)\.", printed.stdout)
        if release is not None and release.group(1) == torch_cuda.split(".")[0]:
            return home
    return None


def import_torch() -> tuple[object, Path | None]:
    """Imports the torch to build against, and points its cpp_extension to the CUDA toolkit."""
    target = target_torch()
    fits = target is not None and required_torch().specifier.contains(target[1], prereleases=True)
    with first_on_path(target[0] if target is not None and fits else None):
        import torch

        toolkit = cuda_toolkit(torch.version.cuda) if torch.version.cuda else None
        if toolkit is not None:
            os.environ["CUDA_HOME"] = str(toolkit)
        import torch.utils.cpp_extension
    print(f"clipcore._C: torch {torch.__version__} in {Path(torch.__file__).parent}")
    print(f"clipcore._C: {f'CUDA toolkit {toolkit}' if toolkit else 'C++ only'}")
    return torch, toolkit


def build_settings() -> dict[str, object]:
    """ext_modules and cmdclass for setup()."""
    torch, toolkit = import_torch()
    cpp_extension = torch.utils.cpp_extension
    # One compiler needs up to 2 GB for torch's headers; more jobs than sources do not help.
    os.environ.setdefault("MAX_JOBS", str(max(1, min(os.cpu_count() or 1, 4))))
    extension_type = cpp_extension.CUDAExtension if toolkit else cpp_extension.CppExtension
    suffixes, macros = [".cpp"], [("CLIPCORE_CUDA_VERSION", f'"{torch.version.cuda}"')]
    if toolkit:
        suffixes.append(".cu")
        macros.append(("CLIPCORE_WITH_CUDA", None))
    extension = extension_type(
        name="clipcore._C",
        sources=sorted(
            str(path.relative_to(ROOT))
            for path in (ROOT / "csrc").iterdir()
            if path.suffix in suffixes
        ),
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.h")),
        define_macros=macros,
        extra_compile_args={"cxx": ["-O2", "-g0", "-Wall", *VECTORS, *OPENMP], "nvcc": ["-O3"]},
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
    }


if __name__ == "__main__":
    setup(**build_settings())
