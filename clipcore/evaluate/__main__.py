"""The command ``python -m clipcore.evaluate``; ``arguments.py`` has its flags and its exit status."""

from __future__ import annotations

from clipcore.evaluate.arguments import PROGRAM, build_parser
from clipcore.terminal import answer_early, complain, steady_output

if __name__ == "__main__":
    answer_early(build_parser().parse_args)

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from clipcore.evaluate.runner import run_measures
from clipcore.evaluate.studies import RUN
from clipcore.ranks.failures import end_with


def run(arguments: argparse.Namespace) -> int:
    """Do what a command line asks for; return the exit status."""
    if arguments.command in RUN:
        print(RUN[arguments.command](arguments))
        return 0
    if arguments.command != "report":
        return run_measures(arguments)
    # Matplotlib is imported only when needed: see ``runner``.
    from clipcore.evaluate.page import write_page

    output = Path(arguments.output) if arguments.output else None
    print(f"the page is {write_page(Path(arguments.results), output)}")
    return 0


@steady_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parsed = build_parser().parse_args(arguments)
    try:
        return run(parsed)
    except KeyboardInterrupt:
        complain(PROGRAM, "stopped; the finished results are in the folder of results")
        return 128 + signal.SIGINT
    except Exception as error:
        return end_with(PROGRAM, error, "use a smaller --batch-size")


if __name__ == "__main__":
    sys.exit(main())
