"""What pip builds from this tree: a wheel, an sdist and a wheel from it, used from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.utils.cpp_extension
from runs import PROGRAMS, ROOT

from clipcore import native

SHIPPED = [
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "CONTRIBUTING.md",
    "csrc",
    "kernels",
    "clipcore",
]


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """What the command prints; an assertion with all of its output when it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    # The build back end calls ninja by its name: it lies beside this interpreter.
    beside = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([beside, environment.get("PATH", "")])
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a checkout holds, so that the checkout itself stays clean."""
    copy = tmp_path_factory.mktemp("tree")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                copy / name,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__", "*.so"),
            )
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def built(source: Path, kind: str, folder: Path) -> Path:
    run(
        *(sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check"),
        *(f"--{kind}", "--outdir", folder, source),
        cwd=folder,
    )
    (product,) = folder.iterdir()
    return product


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tree, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tree, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def sdist_wheel(
    tree: Path, wheel: Path, sdist: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Built from the sdist in the place of the tree, where ninja finds the objects of the wheel.

    It compiles again only what differs; a source or header that the sdist lacks fails the build.
    """
    aside = tmp_path_factory.mktemp("aside") / "tree"
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked)
    (source,) = unpacked.iterdir()
    tree.rename(aside)
    source.rename(tree)
    (aside / "build").rename(tree / "build")
    for assembled in (tree / "build").glob("lib*"):
        shutil.rmtree(assembled)
    try:
        return built(tree, "wheel", tmp_path_factory.mktemp("sdist-wheel"))
    finally:
        tree.rename(unpacked / "used")
        aside.rename(tree)


def installed(wheel: Path, folder: Path) -> Path:
    target = folder / "site"
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"),
        *("--target", target, wheel),
        cwd=folder,
    )
    return target


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(wheel, tmp_path_factory.mktemp("target"))


def package_files() -> set[str]:
    """Every file below clipcore/ that belongs to the package, kernels/ through its link."""
    found = set()
    for folder, _, names in os.walk(ROOT / "clipcore", followlinks=True):
        for name in names:
            path = Path(folder, name)
            if "__pycache__" not in path.parts and path.suffix not in {".so", ".pyc"}:
                found.add(path.relative_to(ROOT).as_posix())
    return found


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    in_package = {name for name in held if not name.startswith("clipcore-")}
    compiled = "clipcore/_C" + sysconfig.get_config_var("EXT_SUFFIX")
    assert in_package == package_files() | {compiled}
    assert any(name.endswith("/licenses/LICENSE") for name in held)


def test_sdist_holds_the_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()}
    assert package_files() | sources | {"setup.py", "pyproject.toml", "LICENSE"} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


@pytest.mark.parametrize("origin", ["wheel", "sdist_wheel"])
def test_installed_package_loads(
    origin: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    target = installed(request.getfixturevalue(origin), tmp_path)
    # Away from the checkout.
    program = PROGRAMS / "visit_installed_package.py"
    printed = run(sys.executable, program, target, cwd=tmp_path, path=target)
    expected = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    assert printed.split() == ["kernels:", *expected]


def test_checkout_without_installation_has_no_extension(tree: Path) -> None:
    program = PROGRAMS / "load_extension_of_checkout.py"
    assert run(sys.executable, program, cwd=tree, path=tree).strip() == "None"


def test_another_torch_is_named_with_the_remedy(target: Path, tmp_path: Path) -> None:
    program = PROGRAMS / "load_extension_with_another_torch.py"
    printed = run(sys.executable, program, "2.12.1+cpu", cwd=tmp_path, path=target)
    release = torch.__version__.partition("+")[0]
    assert f"was built for torch {release} with CUDA {torch.version.cuda}, but this is" in printed
    assert "but this is torch 2.12.1 with CUDA" in printed
    assert "pip install -e ." in printed and "--no-build-isolation" in printed


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (b"clipcore._C was built for torch 2.13.0 with CUDA 11.0;", "torch 2.13.0 with CUDA 11.0"),
        (b"a library without a record", "unknown versions"),
    ],
)
def test_another_library_is_refused_unloaded(tmp_path: Path, record: bytes, said: str) -> None:
    library = tmp_path / "_C.so"
    library.write_bytes(b"\x7fELF\0" + record + b"\0")
    with pytest.raises(ImportError, match=f"_C.so was built for {said}, but this is torch "):
        native._check_versions(library)


def setup_module_of(tree: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("clipcore_setup", tree / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_isolation_does_not_hide_the_torch_of_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolated = tmp_path / "torch"
    isolated.mkdir()
    (isolated / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    setup = setup_module_of(ROOT)
    folder, version = setup.target_torch()
    assert folder == Path(torch.__file__).parents[1]
    assert version.partition("+")[0] == torch.__version__.partition("+")[0]
    assert setup.required_torch().specifier.contains(version)
    assert not setup.required_torch().specifier.contains("2.10.0")


@pytest.mark.parametrize("toolkit", [None, Path("/usr/local/cuda")], ids=str)
def test_cuda_kernels_are_built_where_there_is_a_toolkit(
    toolkit: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_module_of(ROOT)
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(toolkit))
    monkeypatch.setattr(setup, "import_torch", lambda: (torch, toolkit))
    monkeypatch.setenv("MAX_JOBS", "1")
    (extension,) = setup.build_settings()["ext_modules"]
    kernels = [source for source in extension.sources if source.endswith(".cu")]
    assert kernels == (["csrc/pack_kernels.cu"] if toolkit else [])
    assert (("CLIPCORE_WITH_CUDA", None) in extension.define_macros) == bool(toolkit)
    # An object file is named after its source without the suffix: two of one name would overwrite each other.
    stems = [Path(source).stem for source in extension.sources]
    assert len(set(stems)) == len(stems) >= 3


def test_cuda_kernels_include_no_header_of_torch() -> None:
    for name in ("pack_kernels.cu", "pack_kernels.h"):
        included = re.findall(r"#include [<\"](.*)[>\"]", (ROOT / "csrc" / name).read_text())
        own = {"pack_kernels.h", "algorithm", "cstdint"}
        assert included and all(header in own or header.startswith("cuda_") for header in included)
