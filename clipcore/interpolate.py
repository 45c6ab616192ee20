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
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from clipcore.evaluate.loading import LoadedModel, load_model
from clipcore.export.write import export_model
from clipcore.ranks.failures import end_with
from clipcore.run.folders import is_run
from clipcore.terminal import Parser, complain, steady_output
from clipcore.towers.interpolation import interpolated
from clipcore.towers.loading import load_checkpoint
from clipcore.towers.model import CLIP

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


def load_start(path: str, end: LoadedModel) -> CLIP:
    """Return a model of END's architecture with the weights at ``path``.

    Raises:
        ValueError: they are of another model, or were trained with another vocabulary or preprocessing.
    """
    if is_run(Path(path)):
        loaded = load_model(path)
        if loaded.tokenizer.sha256 != end.tokenizer.sha256:
            raise ValueError(
                f"{path} and {end.pretrained} were trained with different vocabularies, so that their weights have no mean; "
                "take the model that the second was fine-tuned from"
            )
        start = loaded.model
    else:
        start = CLIP(end.model.config)
        load_checkpoint(start, path)
    for name in start.images.keys() & end.model.images.keys():
        if start.images[name] != end.model.images[name]:
            raise ValueError(
                f"{path} and {end.pretrained} have different preprocessing: {name} is {start.images[name]} and "
                f"{end.model.images[name]}; take the model that the second was fine-tuned from"
            )
    return start


@steady_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parsed = build_parser().parse_args(arguments)
    try:
        end = load_model(None, parsed.end, parsed.model, parsed.bpe_path)
        model = interpolated(load_start(parsed.start, end), end.model, parsed.alpha)
        export_model(model, end.tokenizer, "open_clip", parsed.out, print)
    except KeyboardInterrupt:
        complain(PROGRAM, f"stopped; {parsed.out} is not made")
        return 128 + signal.SIGINT
    except Exception as error:
        return end_with(PROGRAM, error, "interpolate on a larger machine")
    print(
        f"{parsed.out}: {end.name}, {parsed.alpha:g} of the way from {parsed.start} to {parsed.end}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
