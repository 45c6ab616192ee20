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
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from clipcore.evaluate.loading import load_model
from clipcore.export.write import TARGETS, export_model
from clipcore.ranks.failures import end_with
from clipcore.terminal import Parser, complain, steady_output

PROGRAM = "clipcore.export"


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


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Have SIGTERM unwind, as Ctrl-C does, so that no temporary folder stays."""

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@steady_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parsed = build_parser().parse_args(arguments)
    try:
        loaded = load_model(None, parsed.source, parsed.model, parsed.bpe_path)
        with _stopped_by_sigterm():
            export_model(loaded.model, loaded.tokenizer, parsed.to, parsed.out, print)
    except KeyboardInterrupt:
        is_there = parsed.out.exists() and any(parsed.out.iterdir())
        complain(PROGRAM, f"stopped; {parsed.out} is {'whole' if is_there else 'not made'}")
        return 128 + signal.SIGINT
    except Exception as error:
        return end_with(PROGRAM, error, "export it on a larger machine")
    print(f"{parsed.out}: {loaded.name} for {parsed.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
