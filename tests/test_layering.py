"""Rooms lie one above the other, and imports go strictly downwards: read off the syntax trees."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

import pytest

from clipcore.moved import MOVED

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parent.parent

# From the bottom to the top: rooms, and the modules that lie beside them. A file may import those of lower layers, and
# the files of its own room.
LAYERS = [
    {"files", "moved", "native", "number_texts", "packages", "page_style", "progress", "terminal"},
    {"checkpoint", "hub_vocabulary", "kernels", "ranks"},
    {"data", "loss"},
    {"towers"},
    {"tokenizer_arguments"},
    {"tokenizer"},
    {"run"},
    {"evaluate"},
    {"report"},
    {"export", "interpolate_arguments", "inspection_arguments"},
    {"classify", "features", "inspection", "interpolate", "train"},
    {"commands"},
]

FILES = sorted(
    [*ROOT.glob("clipcore/*.py"), *ROOT.glob("clipcore/*/*.py"), *ROOT.glob("clipcore/*/*/*.py")]
)


def module_of(path: Path) -> str:
    """Return the name that a file of the package is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def room(module: str) -> str:
    """Return "data" for ``clipcore.data.tar``, and "train" for ``clipcore.train``."""
    return module.split(".")[1]


def level(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> set[str]:
    """Return every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            within = {f"{module}.{alias.name}" for alias in node.names}
            found |= within & (MODULES.keys() | MOVED.keys())
            # Names of the package itself come from its files.
            if not within <= MODULES.keys():
                found.add(module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    if path == ROOT / "clipcore/__init__.py":
        return
    mine = room(module_of(path))
    for module in imports(path):
        top = module.partition(".")[0]
        assert top not in ("tests", "bench", "kernels"), f"{path} imports {module}"
        if not module.startswith("clipcore.") or module == "clipcore._C":
            continue
        allowed = level(room(module)) < level(mine) or room(module) == mine
        assert allowed, f"{mine} may not import {module}"


def test_modules_import_each_other_in_no_circle() -> None:
    below = {module: imports(path) & MODULES.keys() for module, path in MODULES.items()}
    # The package itself comes first, whatever is imported.
    below.pop("clipcore")
    while below:
        lowest = {module for module, others in below.items() if not others & below.keys()}
        assert lowest, f"a circle among {sorted(below)}"
        for module in lowest:
            del below[module]


def test_every_module_has_a_layer() -> None:
    rooms = {room(module) for module in MODULES if module != "clipcore"}
    assert rooms == set().union(*LAYERS)
    assert sum(map(len, LAYERS)) == len(rooms)


def test_every_room_names_its_files() -> None:
    for folder in (
        "checkpoint",
        "classify",
        "data",
        "features",
        "loss",
        "ranks",
        "report",
        "run",
        "towers",
    ):
        told = ast.get_docstring(parsed(ROOT / "clipcore" / folder / "__init__.py"))
        files = {path.name for path in (ROOT / "clipcore" / folder).glob("*.py")}
        listed = {line.split("``")[1] for line in told.splitlines() if line.startswith("``")}
        assert listed == files - {"__init__.py"}, folder


def test_earlier_names_of_modules_are_used_nowhere() -> None:
    folders = [ROOT / name for name in ("bench", "tests", ".ci")]
    for path in [*FILES, *(path for folder in folders for path in folder.rglob("*.py"))]:
        used = imports(path)
        # Names to replace, such as "clipcore.train.main".
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = node.value.split(".")
                used |= {".".join(parts[:2])} if len(parts) > 2 else set()
        assert not used & MOVED.keys(), path


def test_kernels_import_torch_and_triton_only():
    for path in (ROOT / "kernels").glob("**/*.py"):
        for module in imports(path):
            top = module.partition(".")[0]
            third_party = top not in sys.stdlib_module_names
            assert not third_party or top in ("torch", "triton", "clipcore"), module
            ours = ("clipcore.kernels", "clipcore.native")
            assert top != "clipcore" or module == "clipcore" or module.startswith(ours), module


def test_the_folder_kernels_shadows_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "clipcore" / "kernels").is_symlink()
