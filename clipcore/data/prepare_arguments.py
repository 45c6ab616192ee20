"""The command line of ``python -m clipcore.data.prepare``. It imports nothing that takes long."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from clipcore.data import MAX_PIXELS
from clipcore.data.choices import (
    DATASET_TYPES,
    DECODERS,
    DEFAULT_CAPTION_KEY,
    DEFAULT_IMAGE_KEY,
    PREPARED_FORMATS,
    SHARD_SIZE,
)
from clipcore.terminal import Parser


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser; flags that the training has too keep their names."""
    parser = Parser(
        prog="python -m clipcore.data.prepare",
        description="Turn image-caption pairs into tar shards of small JPEGs or raw pixels, which train faster.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "source",
        nargs="?",
        default=argparse.SUPPRESS,
        help="what --train-data takes: tar shards, a table, a folder, 'glyphs', 'icons'",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the shards")
    add(
        "--format",
        choices=PREPARED_FORMATS,
        default="jpeg",
        help="JPEG files, or .npy files of pixels",
    )
    add("--size", type=int, default=256, metavar="N", help="shorter side, pixels; never enlarged")
    add("--quality", type=int, default=95, metavar="N", help="of the JPEG files, 1 to 100")
    add("--shard-size", type=int, default=SHARD_SIZE, metavar="N", help="samples of a shard")
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=int, default=cores, metavar="N", help="processes")
    add("--image-decoder", choices=DECODERS, default="pillow", help="JPEG decoder")
    add("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help="of a picture")
    add("--dataset-type", choices=DATASET_TYPES, default="auto", help="kind of the source")
    add("--csv-img-key", default=DEFAULT_IMAGE_KEY, metavar="KEY", help="image column of a table")
    add("--csv-caption-key", default=DEFAULT_CAPTION_KEY, metavar="KEY", help="its caption column")
    add(
        "--csv-separator",
        metavar="SEP",
        help="separator of a csv table [tab, or , ; | by its header]",
    )
    add("--csv-no-quotes", action="store_true", help="quotation marks in a csv table are text")
    add("--check", action="store_true", help="only compare the shards in DIR with their hashes")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def parse_command_line(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the settings of a command line; a mistake is one line, and ends the process with status 2."""
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    if not (parsed.check or "source" in parsed):
        parser.error("the following arguments are required: source")
    return parsed
