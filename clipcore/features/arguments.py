"""Write a model's features of images: ``python -m clipcore.features IMAGES_OR_DATA... --out X.npy --checkpoint RUN``.

IMAGES_OR_DATA are image files, folders of them, tar shards, tables, or glyphs or icons. X.npy has a row for each image that
can be read, for numpy.load("X.npy", mmap_mode="r"); X.txt names the rows, one a line; X.json holds the settings, the hash
of the model, and the images that cannot be read. With --text the rows are those of the captions.

A process may be killed at any time: the same command continues, and the file has the same bits.

Exit status: 0 done, 2 a mistake in the arguments, an unreadable file or too little memory, 70 a fault of clipcore's own,
130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from clipcore.data import MAX_PIXELS
from clipcore.data.choices import DEFAULT_CAPTION_KEY, DEFAULT_IMAGE_KEY, JUDGED_ROWS
from clipcore.evaluate.arguments import add_one_model
from clipcore.terminal import Parser

PROGRAM = "clipcore.features"
DTYPES = ("float32", "float16")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=f"python -m {PROGRAM}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "data",
        nargs="+",
        metavar="IMAGES_OR_DATA",
        help="image files, folders, or what --train-data takes: tar shards, a table, glyphs, icons",
    )
    add("--out", type=Path, required=True, metavar="X.npy", help="the file of features")
    add_one_model(parser)
    add("--text", action="store_true", help="features of the captions instead of the images")
    add("--normalize", action="store_true", help="scale features to unit length")
    add("--dtype", choices=DTYPES, default="float32", help="of the file [float32]")
    add("--batch-size", type=int, default=256, metavar="N", help="rows encoded at once [256]")
    add("--workers", type=int, default=0, metavar="N", help="processes that read images [0]")
    add("--device", help="cpu or cuda [a GPU where there is one]")
    add(
        "--max-bad-fraction",
        type=float,
        default=0.01,
        metavar="X",
        help=f"share of the images, or of {JUDGED_ROWS} where they are fewer, that may be unreadable [0.01]",
    )
    add(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help=f"most pixels of an image; a larger one counts as unreadable [{MAX_PIXELS}]",
    )
    add(
        "--csv-img-key",
        default=DEFAULT_IMAGE_KEY,
        metavar="KEY",
        help=f"a table's column of images [{DEFAULT_IMAGE_KEY}]",
    )
    add(
        "--csv-caption-key",
        default=DEFAULT_CAPTION_KEY,
        metavar="KEY",
        help=f"its column of captions [{DEFAULT_CAPTION_KEY}]",
    )
    add("--csv-separator", metavar="SEP", help="between its columns [read off its header]")
    add("--quiet", action="store_true", help="show no progress")
    return parser
