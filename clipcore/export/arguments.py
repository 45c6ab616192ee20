"""Write a model for another package: ``python -m clipcore.export RUN_OR_FILE --to open_clip OUT``.

Each target is a folder with weights, preprocessing and vocabulary:

  open_clip     open_clip.create_model("local-dir:OUT")
  transformers  CLIPModel.from_pretrained("OUT"), CLIPProcessor.from_pretrained("OUT")
  openai        clip.load("OUT/model.pt")
  onnx          image.onnx and text.onnx, for any batch size

Before it says done, the command loads what it has written, also with the other package if that is installed, and compares
features.

Exit status: 0 done, 2 a mistake in the arguments, a model that the target cannot hold, or too little memory, 70 a fault of
clipcore's own. Unless it is done, there is no OUT.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from clipcore.terminal import Parser

PROGRAM = "clipcore.export"
TARGETS = ("open_clip", "openai", "transformers", "onnx")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=f"python -m {PROGRAM}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="RUN_OR_FILE",
        help="a run or one of its checkpoints; weights of OpenAI, open_clip or transformers",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the new folder")
    parser.add_argument("--to", required=True, choices=TARGETS, help="what OUT is for")
    parser.add_argument(
        "--model", metavar="NAME", help="architecture of weights that do not describe it"
    )
    parser.add_argument("--bpe-path", metavar="FILE", help="vocabulary of weights [OpenAI's]")
    return parser
