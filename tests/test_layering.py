"""Imports go strictly downwards, read off the syntax trees."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parent.parent

# From the bottom to the top; a module may import those of lower layers only, and kernels each other.
LAYERS = [
    {"native", "torchscript", "terminal", "files", "page_style", "number_texts"},
    {"roll_call", "failures"},
    {"kernels", "architectures"},
    {
        "distributed",
        "schedule",
        "collapse",
        "optim",
        "tokenizer",
        "checkpoint",
        "interrupt",
        "logbook",
        "report",
        "memory",
        "packing",
        "ceilings",
        "flops",
    },
    {"data", "traffic"},
    {"profile", "config", "modules", "convert", "open_clip_arguments"},
    {"descriptions"},
    {"weights"},
    {"vision", "text"},
    {"resnet"},
    {"model", "grad_cache"},
    {"loss", "step_plan", "sharding", "threads"},
    {"step"},
    {"verify"},
    {"run_state"},
    {"loading"},
    {"evaluate"},
    {"run_report", "run_parts"},
    {"train", "classify"},
]
WITHIN = {"kernels", "data", "loss", "evaluate"}  # rooms whose files may import each other


def room(module: str) -> str:
    """``clipcore.data.tar`` lies in ``data``."""
    return module.split(".")[1] if "." in module else "clipcore"


def level(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            if node.module in (
                "clipcore",
                "clipcore.kernels",
                "clipcore.data",
                "clipcore.loss",
                "clipcore.evaluate",
            ):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(
    [*ROOT.glob("clipcore/*.py"), *ROOT.glob("clipcore/*/*.py"), *ROOT.glob("clipcore/*/*/*.py")]
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    parts = path.relative_to(ROOT / "clipcore").with_suffix("").parts
    if parts == ("__init__",):
        return
    mine = parts[0]
    for module in imports(path):
        top = module.partition(".")[0]
        assert top not in ("tests", "bench", "kernels"), f"{path} imports {module}"
        if top != "clipcore" or module.count(".") == 0:
            continue
        other = room(module)
        if any(other in layer for layer in LAYERS):
            allowed = level(other) < level(mine) or (other == mine and mine in WITHIN)
            assert allowed, f"{mine} may not import {module}"


def test_every_module_has_a_layer():
    rooms = {path.relative_to(ROOT / "clipcore").with_suffix("").parts[0] for path in FILES} - {
        "__init__"
    }
    assert rooms == set().union(*LAYERS)


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
