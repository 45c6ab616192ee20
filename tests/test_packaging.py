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
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch
import torch.utils.cpp_extension
from runs import PROGRAMS, ROOT

from clipcore import native, train

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
    """Return what the command prints; if it fails, raise an assertion with all of its output."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    # The build back end calls ninja by its name: it lies beside this interpreter.
    beside = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([beside, environment.get("PATH", "")])
    # All that the toolkit knows take half a minute more.
    environment.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of a checkout's files, so that the checkout itself stays clean."""
    copy = tmp_path_factory.mktemp("tree")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                copy / name,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__", "*.so", "_C.*.txt"),
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
            is_built = path.suffix in {".so", ".pyc"} or path.match("_C.*.txt")
            # The map of the kernels is for who reads the sources.
            is_of_sources = path.name == "README.md"
            if "__pycache__" not in path.parts and not is_built and not is_of_sources:
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
    folders = {path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py")}
    expected = sorted({path.stem for path in (ROOT / "kernels").glob("*.py")} | folders)
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


@pytest.fixture
def setup() -> ModuleType:
    """setup.py as a module: the build backend, and what it decides."""
    return setup_module_of(ROOT)


def test_build_isolation_does_not_hide_the_torch_of_the_target(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolated = tmp_path / "torch"
    isolated.mkdir()
    (isolated / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder, version = setup.target_torch()
    assert folder == Path(torch.__file__).parents[1]
    assert version.partition("+")[0] == torch.__version__.partition("+")[0]
    assert setup.required_torch().specifier.contains(version)
    assert not setup.required_torch().specifier.contains("2.10.0")


def test_build_asks_for_torch_only_where_the_target_has_none_that_fits(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setup.get_requires_for_build_wheel() == []
    assert setup.get_requires_for_build_editable() == []
    for target in (None, (Path("site-packages"), "2.10.1")):
        monkeypatch.setattr(setup, "target_torch", lambda found=target: found)
        assert setup.get_requires_for_build_wheel() == [str(setup.required_torch()), "numpy"]
    assert setup.get_requires_for_build_sdist() == []


@pytest.mark.parametrize("toolkit", [None, Path("/usr/local/cuda")], ids=str)
def test_cuda_kernels_are_built_where_there_is_a_toolkit(
    setup: ModuleType, toolkit: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(toolkit))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    extension = setup.extension(torch, toolkit)
    kernels = [source for source in extension.sources if source.endswith(".cu")]
    assert kernels == (["csrc/pack_kernels.cu"] if toolkit else [])
    assert (("CLIPCORE_WITH_CUDA", None) in extension.define_macros) == bool(toolkit)
    # An object file is named after its source without the suffix: two of one name would overwrite each other.
    stems = [Path(source).stem for source in extension.sources]
    assert len(set(stems)) == len(stems) >= 3


def toolkit_of(folder: Path, nvcc: str, headers: bool = True) -> Path:
    """Make a CUDA toolkit whose nvcc is a shell script."""
    names = ["bin/nvcc"] + ["include/cuda_runtime.h", "lib/libcudart.so"] * headers
    for name in names:
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(f"#!/bin/sh\n{nvcc}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("cards", [0, 1])
@pytest.mark.parametrize("listed", ["", "8.0;9.0+PTX"])
def test_architectures_are_the_toolkits_without_a_card_and_a_list(
    setup: ModuleType, cards: int, listed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit = toolkit_of(tmp_path, "printf 'compute_80\\ncompute_100\\ncompute_90\\n'")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    flags = [flag for flag in setup.architecture_flags(torch, toolkit) if "arch=" in flag]
    if cards or listed:
        assert flags == []
        return
    machine_code = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90, 100)]
    assert flags == [*machine_code, "-gencode=arch=compute_100,code=compute_100"]


OTHER_RELEASE = "echo 'Cuda compilation tools, release 12.4, V12.4.131'"
NEWER_COMPILER = """
case "$*" in
    --version) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
    *) echo 'In file included from cuda_runtime.h:82,' >&2
       echo 'host_config.h:143:2: error: #error -- unsupported GNU version!' >&2
       exit 1 ;;
esac"""


@pytest.mark.parametrize(
    ("nvcc", "headers", "said"),
    [
        (OTHER_RELEASE, True, r"nvcc is of CUDA 12\.4, and torch of CUDA 13\.0"),
        (NEWER_COMPILER, True, r"nvcc does not compile: .*unsupported GNU version!"),
        (OTHER_RELEASE, False, r"has an nvcc, but not cuda_runtime\.h"),
    ],
    ids=["other release", "newer compiler", "no headers"],
)
def test_toolkit_that_does_not_fit_is_named(
    setup: ModuleType,
    nvcc: str,
    headers: bool,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one whose fault lies deepest, whatever a script on the PATH lacks."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(setup, "DEFAULT_TOOLKIT", toolkit_of(tmp_path / "cuda", nvcc, headers))
    on_path = toolkit_of(tmp_path / "local", "exit 1", headers=False)
    monkeypatch.setenv("PATH", f"{on_path / 'bin'}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    with pytest.raises(setup.CannotBuild, match=said):
        setup.find_toolkit(torch)


def test_program_that_does_not_start_is_a_reason(setup: ModuleType, tmp_path: Path) -> None:
    program = tmp_path / "nvcc"
    program.write_bytes(b"\x7fELF of another processor")
    program.chmod(0o755)
    with pytest.raises(setup.CannotBuild, match="does not start"):
        setup.output_of([program])


def test_no_toolkit_is_no_fault(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(setup, "DEFAULT_TOOLKIT", tmp_path)
    for name in ("PATH", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    assert setup.find_toolkit(torch) is None
    monkeypatch.setattr(torch.version, "cuda", None)
    assert setup.find_toolkit(torch) is None


@pytest.mark.parametrize("compiler", ["", "no-such-compiler", "env false"])
def test_no_compiler_is_a_reason(
    setup: ModuleType, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(setup.CannotBuild, match=r"no C\+\+ compiler|does not compile for this"):
        setup.check_cxx(torch)


@pytest.mark.parametrize(("failing", "missed"), [(0, None), (1, "CUDA kernels"), (2, "extension")])
def test_first_candidate_that_compiles_is_built(
    setup: ModuleType, failing: int, missed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def compile_or_fail(command: Any) -> None:
        tried.append(command.extensions[0].sources[0])
        if len(tried) <= failing:
            raise RuntimeError("Error compiling objects for extension")

    monkeypatch.setattr(
        torch.utils.cpp_extension.BuildExtension, "build_extensions", compile_or_fail
    )
    monkeypatch.delenv("CLIPCORE_BUILD", raising=False)
    candidates = [setup.Extension("clipcore._C", [name]) for name in ("with.cu", "without.cpp")]
    distribution = setuptools.Distribution({"ext_modules": list(candidates)})
    command = setup.commands(torch, None)["build_ext"](distribution)
    command.ensure_finalized()

    command.build_extensions()
    assert tried == ["with.cu", "without.cpp"][: failing + 1]
    assert [e.sources for e in command.extensions] == [
        [name] for name in tried[failing : failing + 1]
    ]
    if missed is None:
        assert command.note is None
    else:
        assert f"without its {missed}: Error compiling objects" in command.note

    monkeypatch.setenv("CLIPCORE_BUILD", "require")
    tried.clear()
    command.extensions[:] = candidates
    if failing:
        with pytest.raises(SystemExit, match="lacks its CUDA kernels: Error compiling objects"):
            command.build_extensions()
    else:
        command.build_extensions()


def test_failed_editable_build_takes_the_earlier_extension_away(
    setup: ModuleType, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, note = (tree / "clipcore" / name for name in (setup.LIBRARY, setup.NOTE))
    compiler = tmp_path / "c++"
    # Python's headers compile, the sources do not.
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fsyntax-only*) exit 0 ;; *) exit 1 ;; esac\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    program = f"import setup; setup.build_editable({str(tmp_path)!r})"

    monkeypatch.setenv("CLIPCORE_BUILD", "require")
    library.touch()
    with pytest.raises(AssertionError, match="lacks its "):
        run(sys.executable, "-c", program, cwd=tree)
    assert library.exists() and not note.exists()

    monkeypatch.delenv("CLIPCORE_BUILD")
    run(sys.executable, "-c", program, cwd=tree)
    assert "without its extension: " in note.read_text()
    assert not library.exists()
    note.unlink()


def test_machine_without_compiler_installs_and_says_so(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("CLIPCORE_BUILD", raising=False)
    (tmp_path / "wheel").mkdir()
    wheel = built(tree, "wheel", tmp_path / "wheel")
    assert wheel.name.endswith("py3-none-any.whl")

    target = installed(wheel, tmp_path)
    program = PROGRAMS / "print_what_was_left_out.py"
    printed = run(sys.executable, program, cwd=tmp_path, path=target)
    assert printed.count("\n") == 1
    assert "without its extension: there is no C++ compiler (`no-such-compiler`" in printed
    assert "attention" in printed and "CLIPCORE_BUILD=require pip install" in printed

    for level, said in [("require", "lacks its extension: there is no"), ("no", "is unknown: ")]:
        monkeypatch.setenv("CLIPCORE_BUILD", level)
        with pytest.raises(AssertionError, match=said):
            built(tree, "wheel", tmp_path)


def test_missing_kernels_are_said_to_several_gpus_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the note that a build with an unfit nvcc leaves there.
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    for has_kernels in (True, False):
        extension = SimpleNamespace(has_cuda_kernels=lambda has=has_kernels: has)
        monkeypatch.setattr(native, "load", lambda extension=extension: extension)
        assert native.left_out() is None
        said = native.left_out(on_several_gpus=True)
        assert (said is None) == has_kernels
    assert "without an nvcc" in said and "pip install -e ." in said
    monkeypatch.setattr(native, "load", lambda: None)
    assert "without its extension" in native.left_out()


def test_run_begins_with_what_was_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "left_out", lambda several: "installed without its extension")
    assert train.main(["--resume", str(tmp_path / "no-run"), "--logs", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "installed without its extension\n"
    assert said.err.count("\n") == 1 and "no-run" in said.err


def test_extension_for_another_torch_ends_a_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise native.WrongBuildError("_C.so was built for another torch")

    monkeypatch.setattr(native, "load", refuse)
    assert train.main(["--resume", str(tmp_path / "no-run"), "--logs", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "was built for another torch" in said.err
    assert not list(tmp_path.iterdir())


def test_cuda_kernels_include_no_header_of_torch() -> None:
    for name in ("pack_kernels.cu", "pack_kernels.h"):
        included = re.findall(r"#include [<\"](.*)[>\"]", (ROOT / "csrc" / name).read_text())
        own = {"pack_kernels.h", "algorithm", "cstdint"}
        assert included and all(header in own or header.startswith("cuda_") for header in included)
