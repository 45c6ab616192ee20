"""Build the extension clipcore._C from csrc/, and serve as pip's build backend; everything else is in pyproject.toml.

An extension works with exactly one torch: the one that imports it. pip builds in an isolated environment, so this file
asks the target interpreter, outside the isolation, for its torch. If pyproject.toml accepts that torch, the build compiles
against it. Otherwise the backend requests a torch from pip: the newest that pyproject.toml accepts, which pip then installs
into the target too.

Parts that a machine cannot compile are left out with a message of one line; ``CLIPCORE_BUILD=require`` makes that an error.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from setuptools import Extension, setup
from setuptools.build_meta import (  # noqa: F401  # hooks of the build backend
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.build_py import build_py

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

ROOT = Path(__file__).resolve().parent

# Commands that compile; the others (sdist and metadata) need no torch.
COMPILING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}

# A note beside the extension's place tells why a part was left out; clipcore/native.py shows it.
LIBRARY = "_C" + str(sysconfig.get_config_var("EXT_SUFFIX"))
NOTE = str(Path(LIBRARY).with_suffix(".txt"))

DEFAULT_TOOLKIT = Path("/usr/local/cuda")

# Printed by the target interpreter: its torch's path and version. Importing torch would take seconds.
ASK_FOR_TORCH = """
import importlib.metadata, importlib.util, json
spec = importlib.util.find_spec("torch")
if spec is not None and spec.origin:
    print(json.dumps([spec.origin, importlib.metadata.version("torch")]))
"""

# No code reads errno or traps after a square root, so loops with one may be vectorised.
VECTORS = ["-fno-math-errno", "-fno-trapping-math"] if sys.platform != "win32" else []
# For ATen's parallel loops, if torch uses OpenMP. The library is not linked, so its functions resolve to torch's copy, and
# there is one thread pool. Clang would need headers that it does not ship.
IS_CLANG = "clang" in os.environ.get("CXX", "")
OPENMP = ["-fopenmp"] if sys.platform == "linux" and not IS_CLANG else []

EXTENSION, CUDA_KERNELS = "its extension", "its CUDA kernels"
WITHOUT_EXTENSION = (
    "On a CPU, attention, resizing of images and AdamW are slower without it, and several ranks "
    "gather by torch.distributed"
)
WITHOUT_CUDA = "Without them several GPUs pack what they gather in more launches, by torch"
REMEDY = (
    "`CLIPCORE_BUILD=require pip install -e .` in the checkout builds it, or shows why it cannot."
)


class CannotBuild(Exception):
    """The machine lacks something to build a part; the message names it, as the end of a sentence."""


# --- The torch to build against ---


def required_torch() -> Requirement:
    """Return the torch requirement that pyproject.toml states."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return next(r for r in map(Requirement, stated) if r.name == "torch")


@cache
def target_torch() -> tuple[Path, str] | None:
    """Return the folder that holds the target environment's torch, and its version; None if it has none.

    pip runs an isolated build with the target's own interpreter, and isolates it through PYTHONPATH. The same interpreter
    without that variable therefore sees the target environment, with or without system site-packages. pip also disables
    the user's site-packages, which are used outside a virtual environment.
    """
    hidden = {"PYTHONPATH"} | ({"PYTHONNOUSERSITE"} if sys.prefix == sys.base_prefix else set())
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
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


def fitting_torch() -> Path | None:
    """Return the folder of the target's torch if pyproject.toml accepts it, so that pip keeps it; else None."""
    target = target_torch()
    if target is None or not required_torch().specifier.contains(target[1], prereleases=True):
        return None
    return target[0]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Return the requirements besides pyproject.toml's: a torch, if the target has none that fits."""
    return [] if fitting_torch() else [str(required_torch()), "numpy"]


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Return no requirements: an sdist compiles nothing."""
    return []


@contextmanager
def first_on_path(folder: Path | None) -> Iterator[None]:
    """Put one folder first on sys.path, and remove it afterwards.

    Only torch may be imported from it: the target's setuptools may be older than the build needs.
    """
    if folder is None:
        yield
        return
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def import_torch() -> ModuleType:
    """Import the torch to build against."""
    with first_on_path(fitting_torch()):
        try:
            import torch
            import torch.utils.cpp_extension
        except (ImportError, OSError) as error:
            raise CannotBuild(f"the build cannot import torch ({first_line(error)})") from error
    print(f"clipcore._C: torch {torch.__version__} in {Path(torch.__file__).parent}")
    return torch


# --- Compilers ---


def output_of(command: list[str | Path], folder: Path = ROOT) -> tuple[int, str]:
    """Return a program's exit status and output.

    Raises:
        CannotBuild: the system cannot start it, for example because it is for another processor.
    """
    try:
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        raise CannotBuild(f"{command[0]} does not start: {error.strerror}") from error
    return done.returncode, done.stdout


def first_error(command: list[str | Path], name: str, source: str) -> str | None:
    """Compile a few lines, and return the compiler's first error; None if it succeeds."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_text(source)
        status, printed = output_of([*command, name], Path(folder))
    if status == 0:
        return None
    lines = printed.strip().splitlines() or [f"exit status {status}"]
    return next((line.strip() for line in lines if "error" in line), lines[-1].strip())


def check_cxx(torch: ModuleType) -> None:
    """Raise CannotBuild if there is no C++ compiler, or no Python headers."""
    compiler = torch.utils.cpp_extension.get_cxx_compiler()
    command = shlex.split(compiler)
    if not command or shutil.which(command[0]) is None:
        raise CannotBuild(f"there is no C++ compiler (`{compiler}`; CXX names another)")
    include = f"-I{sysconfig.get_path('include')}"
    error = first_error([*command, "-fsyntax-only", include], "probe.cpp", "#include <Python.h>\n")
    if error is not None:
        raise CannotBuild(f"`{compiler}` does not compile for this Python: {error}")


def find_toolkit(torch: ModuleType) -> Path | None:
    """Return the CUDA toolkit to compile with; None if torch has no CUDA or the machine has no nvcc.

    Raises:
        CannotBuild: there is an nvcc, but not of torch's CUDA release, or it does not compile here.
    """
    wanted = torch.version.cuda
    if wanted is None:
        return None
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        Path(nvcc).resolve().parents[1] if nvcc else None,
        DEFAULT_TOOLKIT,
    ]
    incomplete, unfit = [], []
    for home in dict.fromkeys(Path(candidate) for candidate in candidates if candidate):
        if not (home / "bin/nvcc").exists():
            continue
        libraries = [home / folder / "libcudart.so" for folder in ("lib64", "lib")]
        if not (home / "include/cuda_runtime.h").exists() or not any(
            library.exists() for library in libraries
        ):
            # For example a script on the PATH, with its toolkit elsewhere.
            incomplete.append(f"{home} has an nvcc, but not cuda_runtime.h and libcudart.so")
            continue
        try:
            fault = fault_of_nvcc(home / "bin/nvcc", wanted)
        except CannotBuild as error:
            fault = str(error)
        if fault is None:
            return home
        unfit.append(fault)
    for reason in unfit + incomplete:
        raise CannotBuild(reason)
    return None


def fault_of_nvcc(nvcc: Path, wanted: str) -> str | None:
    """Return why an nvcc does not fit a torch of that CUDA release; None if it fits."""
    release = re.search(r"release ([\d.]+)", output_of([nvcc, "--version"])[1])
    if release is None or release.group(1).split(".")[0] != wanted.split(".")[0]:
        found = f"CUDA {release.group(1)}" if release else "an unknown CUDA release"
        return f"{nvcc} is of {found}, and torch of CUDA {wanted}"
    # nvcc refuses host compilers newer than itself. torch passes it CC, not CXX.
    host = ["-ccbin", os.environ["CC"]] if os.environ.get("CC") else []
    error = first_error(
        [nvcc, *host, "-c", "-o", os.devnull], "probe.cu", "__global__ void probe() {}\n"
    )
    return None if error is None else f"{nvcc} does not compile: {error}"


def architecture_flags(torch: ModuleType, toolkit: Path) -> list[str]:
    """Return nvcc's flags for every architecture that it knows, with PTX of the last one for later GPUs.

    Return no flags if torch's build helper chooses the architectures, from TORCH_CUDA_ARCH_LIST or else from the visible
    GPUs. Without either, as in a container's build or on a login node, the helper fails.
    """
    if os.environ.get("TORCH_CUDA_ARCH_LIST") or torch.cuda.device_count():
        return []
    _, listed = output_of([toolkit / "bin/nvcc", "--list-gpu-arch"])
    known = sorted({int(number) for number in re.findall(r"compute_(\d+)\b", listed)})
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}", "--threads=0"]


# --- The build ---


def extension(torch: ModuleType, toolkit: Path | None) -> Extension:
    """Return clipcore._C, with the CUDA kernels if there is a toolkit."""
    cpp_extension = torch.utils.cpp_extension
    extension_type = cpp_extension.CppExtension
    suffixes, macros = [".cpp"], [("CLIPCORE_CUDA_VERSION", f'"{torch.version.cuda}"')]
    flags = {"cxx": ["-O2", "-g0", "-Wall", *VECTORS, *OPENMP]}
    if toolkit is not None:
        extension_type = cpp_extension.CUDAExtension
        suffixes.append(".cu")
        macros.append(("CLIPCORE_WITH_CUDA", None))
        flags["nvcc"] = ["-O3", *architecture_flags(torch, toolkit)]
    return extension_type(
        name="clipcore._C",
        sources=sorted(
            str(path.relative_to(ROOT))
            for path in (ROOT / "csrc").iterdir()
            if path.suffix in suffixes
        ),
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.h")),
        define_macros=macros,
        extra_compile_args=flags,
    )


def lacking(what: str, reason: object) -> str:
    """Return the line about a part that this machine cannot build; exit if the user requires it."""
    if os.environ.get("CLIPCORE_BUILD") == "require":
        raise SystemExit(f"clipcore lacks {what}: {reason} (CLIPCORE_BUILD=require)")
    without = WITHOUT_CUDA if what == CUDA_KERNELS else WITHOUT_EXTENSION
    return f"clipcore was installed without {what}: {reason}. {without}. {REMEDY}"


def leave_note(library: Path, note: str | None, is_built: bool) -> None:
    """Write the note beside the extension's place, or remove an earlier one; remove an extension that was not built now.

    An earlier extension belongs to other sources, or to another torch.
    """
    if note is None:
        library.with_name(NOTE).unlink(missing_ok=True)
    else:
        library.parent.mkdir(parents=True, exist_ok=True)
        library.with_name(NOTE).write_text(note + "\n")
        print(note, file=sys.stderr)
    if not is_built:
        library.unlink(missing_ok=True)


def commands(torch: ModuleType, note: str | None) -> dict[str, type]:
    """Return the command that builds the first extension of ext_modules that compiles, and writes the note."""

    class BuildExtension(torch.utils.cpp_extension.BuildExtension):
        note: str | None = None

        def run(self) -> None:
            super().run()
            leave_note(Path(self.get_ext_fullpath("clipcore._C")), self.note, bool(self.extensions))

        def build_extensions(self) -> None:
            self.note = note
            wanted = list(self.extensions)
            for i, candidate in enumerate(wanted):
                self.extensions[:] = [candidate]
                try:
                    super().build_extensions()
                    return
                except Exception as error:
                    what = CUDA_KERNELS if i + 1 < len(wanted) else EXTENSION
                    self.note = lacking(what, first_line(error))
            self.extensions[:] = []

    return {"build_ext": BuildExtension}


def build() -> None:
    """Build all parts that this machine can compile, and print one line about the others."""
    level = os.environ.get("CLIPCORE_BUILD", "")
    if level not in ("", "require"):
        raise SystemExit(f"CLIPCORE_BUILD={level} is unknown: unset it, or set it to `require`")
    # A compiler needs up to 2 GB for torch's headers; more jobs than sources do not help.
    os.environ.setdefault("MAX_JOBS", str(max(1, min(os.cpu_count() or 1, 4))))

    try:
        torch = import_torch()
        check_cxx(torch)
    except CannotBuild as reason:
        build_without(lacking(EXTENSION, reason))
        return

    note = None
    try:
        toolkit = find_toolkit(torch)
    except CannotBuild as reason:
        toolkit, note = None, lacking(CUDA_KERNELS, reason)
    print(f"clipcore._C: {f'CUDA toolkit {toolkit}' if toolkit else 'C++ only'}")

    # The first one that compiles is used.
    candidates = [extension(torch, None)]
    if toolkit is not None:
        # Replaces a CUDA_HOME that does not fit.
        torch.utils.cpp_extension.CUDA_HOME = str(toolkit)
        candidates.insert(0, extension(torch, toolkit))
    setup(ext_modules=candidates, cmdclass=commands(torch, note))


def build_without(note: str) -> None:
    """Build the package without an extension, and write the note into it."""

    class BuildPy(build_py):
        def run(self) -> None:
            super().run()
            package = (ROOT if self.editable_mode else Path(self.build_lib)) / "clipcore"
            leave_note(package / LIBRARY, note, is_built=False)

    setup(cmdclass={"build_py": BuildPy})


def first_line(error: BaseException) -> str:
    """Return an error's message, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


if __name__ == "__main__":
    if COMPILING & set(sys.argv):
        build()
    else:
        setup()
