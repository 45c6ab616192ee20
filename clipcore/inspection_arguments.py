"""Show what a file or folder of weights says about its model: ``python -m clipcore.inspect FILE``.

It names the architecture, the activation, the preprocessing, the vocabulary, the number of parameters, what is missing, and
the call that loads the weights. No code in a file runs.

Exit status: 0 the weights load, 1 they do not, 2 a mistake in the arguments, an unreadable file or too little memory, 70 a
fault of clipcore's own.
"""

from __future__ import annotations

import argparse

from clipcore.terminal import Parser


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog="python -m clipcore.inspect", description=__doc__)
    parser.add_argument(
        "weights",
        nargs="+",
        metavar="FILE",
        help="weights of OpenAI, open_clip or transformers, or their folder; a checkpoint or a run of clipcore",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    return parser
