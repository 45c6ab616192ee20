"""Imports modules under the names that they had at the top of the package, before they moved into subpackages.

``import clipcore.model`` returns the module ``clipcore.towers.model`` itself, so a function that is replaced in one is
replaced in the other. Names that went from one module into another are not kept. Two modules are not here:
``clipcore.checkpoint`` and ``clipcore.report`` are now packages, which export the names that these modules had.
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
    """A finder and loader of modules under their earlier names."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for an earlier name, None for any other."""
        return ModuleSpec(name, self) if name in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Import the module under its current name."""
        module = importlib.import_module(MOVED[spec.name])
        # The import system sets the module's spec to the earlier name's; `exec_module` restores it.
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's spec; the module has already run under its current name."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Make the earlier names importable."""
    # Before the file finders: another installation's finder would find its own module of that name.
    sys.meta_path.insert(0, MovedModules())
