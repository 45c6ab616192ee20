"""Write a model for other packages: ``python -m clipcore.export RUN_OR_FILE --to open_clip OUT``.

========================  ================================================================
``__main__.py``           the command
``arguments.py``          its flags
``write.py``              a folder, written aside and checked before it gets its name
``interpolations.py``     the models between a run's first weights and its last
``vocabulary.py``         the tokenizer files of transformers
``onnx_towers.py``        the towers as ONNX
``check.py``              loads what was written, by clipcore and by the package that it is for
========================  ================================================================
"""

from __future__ import annotations

import importlib
from typing import Any

# Resolved on first use, so that the command answers --help before it imports torch.
_HOMES = {"TARGETS": "arguments", "export_model": "write"}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipcore.export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"clipcore.export.{_HOMES[name]}"), name)
