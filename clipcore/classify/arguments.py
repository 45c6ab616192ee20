"""Name what is in an image: ``python -m clipcore.classify IMAGE... --labels "a, b, c" --checkpoint RUN``.

For more than one image a summary follows, with the accuracy where their folders are named as labels.

Exit status: 0 done, 2 a mistake in the arguments, an unreadable file or too little memory, 70 a fault of clipcore's own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from clipcore.data import MAX_PIXELS
from clipcore.evaluate.arguments import add_one_model
from clipcore.terminal import Parser

PROGRAM = "clipcore.classify"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="JPEG, PNG or WebP files, or folders of them"
    )
    parser.add_argument(
        "--labels",
        required=True,
        help="names separated by commas, or a file with one name per line",
    )
    parser.add_argument(
        "--templates",
        action="append",
        metavar="TEXT",
        help="prompt with {} for the name; repeat it to average several [a photo of a {}. for --pretrained, else {}]",
    )
    add_one_model(parser)
    parser.add_argument(
        "--top", type=int, default=5, metavar="K", help="names shown for each image [5]"
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help=f"most pixels of an image; a larger one is refused [{MAX_PIXELS}]",
    )
    parser.add_argument("--device", help="cpu or cuda [a GPU where there is one]")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--out",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="write what is found to FILE.csv or FILE.json instead of the table; may be repeated",
    )
    return parser
