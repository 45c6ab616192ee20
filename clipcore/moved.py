"""Modules that lay at the top of the package before there were rooms: their earlier names still import them.

``import clipcore.model`` gives the module ``clipcore.towers.model`` itself, so that a function that is replaced in one is
replaced in the other. Two are not here: ``clipcore.checkpoint`` and ``clipcore.report`` are rooms now, which hold the names
that these modules had.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

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


class MovedModules:
    """Finder and loader of modules under their earlier names."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for an earlier name, None for any other."""
        return ModuleSpec(name, self) if name in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Import the module under its present name."""
        module = importlib.import_module(MOVED[spec.name])
        # The import system puts the earlier name's spec into the module: `exec_module` takes it out again.
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module, which ran under its present name, as it was."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Let the earlier names be imported."""
    # Before the finders of files: one of another installation would find the module that it still has there.
    sys.meta_path.insert(0, MovedModules())
