"""Write the model between two states of one: ``python -m clipcore.interpolate START END --alpha 0.5 OUT``.

Its weights are (1 - alpha) START + alpha END, in float32. START is what END was fine-tuned from; they are runs, their
checkpoints, or weights of OpenAI, open_clip or transformers. OUT is a folder for all commands of clipcore (--pretrained OUT)
and for open_clip (local-dir:OUT), with END's preprocessing and vocabulary.

Exit status: 0 done, 2 a mistake in the arguments, two different models, or too little memory, 70 a fault of clipcore's own.
Unless it is done, there is no OUT.

Source: Wortsman et al. 2021 (WiSE-FT).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from clipcore.terminal import Parser

PROGRAM = "clipcore.interpolate"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=f"python -m {PROGRAM}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("start", metavar="START", help="a run, a checkpoint or weights")
    parser.add_argument("end", metavar="END", help="the same, after fine-tuning")
    parser.add_argument("out", metavar="OUT", type=Path, help="the new folder")
    parser.add_argument(
        "--alpha", required=True, type=float, metavar="X", help="from 0, START, to 1, END"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="architecture of weights that do not describe it"
    )
    parser.add_argument("--bpe-path", metavar="FILE", help="vocabulary of weights [OpenAI's]")
    return parser
