"""Imports modules under other names: those that they had at the top of the package, before they moved into subpackages.

``import clipcore.model`` returns the module ``clipcore.towers.model`` itself, so a function that is replaced in one is
replaced in the other. Names that went from one module into another are not kept. Two modules are not here:
``clipcore.checkpoint`` and ``clipcore.report`` are now packages, which export the names that these modules had.
``python -m clipcore.inspect`` runs inspection.py: a file inspect.py would stand in for Python's own module of that name
wherever the folder clipcore/ is on the path, as in ``python clipcore/train.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

ALIASES = {"clipcore.inspect": "clipcore.inspection"}
MOVED = {
    "clipcore.architectures": "clipcore.towers.architectures",
    "clipcore.ceilings": "clipcore.run.ceilings",
    "clipcore.collapse": "clipcore.run.collapse",
    "clipcore.config": "clipcore.run.config",
    "clipcore.convert": "clipcore.towers.convert",
    "clipcore.descriptions": "clipcore.towers.descriptions",
    "clipcore.distributed": "clipcore.ranks.distributed",
    "clipcore.failures": "clipcore.ranks.failures",
    "clipcore.flops": "clipcore.run.flops",
    "clipcore.grad_cache": "clipcore.run.grad_cache",
    "clipcore.interrupt": "clipcore.ranks.signals",
    "clipcore.loading": "clipcore.evaluate.loading",
    "clipcore.logbook": "clipcore.run.metrics",
    "clipcore.memory": "clipcore.run.memory",
    "clipcore.model": "clipcore.towers.model",
    "clipcore.modules": "clipcore.towers.modules",
    "clipcore.open_clip_arguments": "clipcore.towers.open_clip_arguments",
    "clipcore.optim": "clipcore.run.optim",
    "clipcore.packing": "clipcore.data.packing",
    "clipcore.profile": "clipcore.run.profile",
    "clipcore.resnet": "clipcore.towers.resnet",
    "clipcore.roll_call": "clipcore.ranks.watchdog",
    "clipcore.run_parts": "clipcore.run.parts",
    "clipcore.run_report": "clipcore.report.collect",
    "clipcore.run_state": "clipcore.run.state",
    "clipcore.schedule": "clipcore.run.schedule",
    "clipcore.sharding": "clipcore.run.sharding",
    "clipcore.step": "clipcore.run.train_step",
    "clipcore.step_plan": "clipcore.run.memory_plan",
    "clipcore.text": "clipcore.towers.text",
    "clipcore.threads": "clipcore.run.threads",
    "clipcore.torchscript": "clipcore.towers.torchscript",
    "clipcore.traffic": "clipcore.run.traffic",
    "clipcore.verify": "clipcore.run.verify",
    "clipcore.vision": "clipcore.towers.vision",
    "clipcore.weights": "clipcore.towers.weights",
}


_PLACES = ALIASES | MOVED


class MovedModules:
    """A finder and loader of modules under their other names."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for another name of a module, None for anything else."""
        return ModuleSpec(name, self) if name in _PLACES else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Import the module under its current name."""
        module = importlib.import_module(_PLACES[spec.name])
        # The import system sets the module's spec to the earlier name's; `exec_module` restores it.
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's spec; the module has already run under its current name."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state

    def get_code(self, name: str) -> CodeType | None:
        """Return what ``python -m`` runs under this name."""
        spec = importlib.util.find_spec(_PLACES[name])
        assert spec is not None
        code: CodeType | None = spec.loader.get_code(_PLACES[name])  # type: ignore[union-attr]
        return code


def install() -> None:
    """Make the earlier names importable."""
    # Before the file finders: another installation's finder would find its own module of that name.
    sys.meta_path.insert(0, MovedModules())
