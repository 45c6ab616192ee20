"""The command ``python -m clipcore.classify``; ``arguments.py`` has its flags and its exit status."""

from __future__ import annotations

from clipcore.classify.arguments import PROGRAM, build_parser
from clipcore.terminal import answer_early, complain, printable

if __name__ == "__main__":
    answer_early(build_parser().parse_args)

import io
import os
import signal
import sys
from collections.abc import Sequence

from clipcore.classify.classification import run_classification
from clipcore.classify.output import print_json, print_summary, print_table, write_file
from clipcore.ranks.failures import end_with


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    # A name of a class or a file may have letters that the terminal's encoding lacks.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parsed = build_parser().parse_args(arguments)
    try:
        classified = run_classification(parsed)
        for path in parsed.out:
            write_file(classified, path)
    except KeyboardInterrupt:
        complain(PROGRAM, "stopped")
        return 128 + signal.SIGINT
    except Exception as error:
        return end_with(PROGRAM, error, "take a smaller model")
    try:
        if parsed.json:
            print_json(classified)
        else:
            if not parsed.out:
                print_table(classified)
            if len(classified.paths) > 1:
                print_summary(classified)
            for path in parsed.out:
                print(f"written to {printable(str(path))}")
        sys.stdout.flush()
    except OSError as error:
        # Python would try to write the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has enough, such as head
            return 0
        print(f"{PROGRAM}: error: standard output: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
