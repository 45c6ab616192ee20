"""The command line of ``python -m clipcore.tokenizer``, and sizes of vocabularies. It imports nothing that takes long."""

from __future__ import annotations

import argparse
from pathlib import Path

from clipcore.terminal import Parser

OPENAI_VOCAB_SIZE = 49408
# The entries of a vocabulary without merges.
BYTE_VOCAB_SIZE = 514


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="python -m clipcore.tokenizer", description="Learn a vocabulary from captions."
    )
    parser.add_argument(
        "--train",
        required=True,
        metavar="DATA",
        help="text file, a caption a line; or what --train-data takes: shards, a table, a folder, a URL, 'glyphs'",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=OPENAI_VOCAB_SIZE,
        metavar="N",
        help=f"entries, at least {BYTE_VOCAB_SIZE} [{OPENAI_VOCAB_SIZE}]",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("vocabulary.txt.gz"),
        metavar="FILE",
        help="where to write it [vocabulary.txt.gz]",
    )
    return parser
