"""The commands that an installation puts on the path, such as ``clipcore-train``.

They do what ``python -m clipcore.train`` does. Each reads its flags before it imports its work, and with it torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from clipcore.terminal import answer_early


def train() -> int:
    """Run ``clipcore.train``; return the exit status."""
    from clipcore.run.command_line import check_command_line

    return _run("clipcore.train", check_command_line)


def classify() -> int:
    """Run ``clipcore.classify``; return the exit status."""
    from clipcore.classify.arguments import build_parser

    return _run("clipcore.classify.__main__", build_parser().parse_args)


def evaluate() -> int:
    """Run ``clipcore.evaluate``; return the exit status."""
    from clipcore.evaluate.arguments import build_parser

    return _run("clipcore.evaluate.__main__", build_parser().parse_args)


def export() -> int:
    """Run ``clipcore.export``; return the exit status."""
    from clipcore.export.arguments import build_parser

    return _run("clipcore.export.__main__", build_parser().parse_args)


def features() -> int:
    """Run ``clipcore.features``; return the exit status."""
    from clipcore.features.arguments import build_parser

    return _run("clipcore.features.__main__", build_parser().parse_args)


def inspect() -> int:
    """Run ``clipcore.inspect``; return the exit status."""
    from clipcore.inspection_arguments import build_parser

    return _run("clipcore.inspection", build_parser().parse_args)


def interpolate() -> int:
    """Run ``clipcore.interpolate``; return the exit status."""
    from clipcore.interpolate_arguments import build_parser

    return _run("clipcore.interpolate", build_parser().parse_args)


def _run(module: str, parse: Callable[[], object]) -> int:
    """Read the command line, then import a module and call its ``main``."""
    answer_early(parse)
    main: Any = importlib.import_module(module).main
    status: int = main()
    return status
