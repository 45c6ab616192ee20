"""Evaluate models on labelled data sets: ``python -m clipcore.evaluate zero-shot --checkpoint RUN --data DIR``.

Exit status: 0 for success; 2 for a mistake in the arguments, a data set or model that could not be evaluated (the others
were), or too little memory; 70 for a bug in clipcore; 130 for Ctrl-C. Finished results are in the folder of results.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from clipcore.data.loader import JUDGED_ROWS
from clipcore.data.transforms import MAX_PIXELS
from clipcore.evaluate import bias_study, overlap_study, retrieval_study, studies
from clipcore.evaluate.runner import run_measures
from clipcore.ranks.failures import end_with
from clipcore.terminal import Parser, complain, steady_output

PROGRAM = "clipcore.evaluate"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, text: str, run: Callable[[argparse.Namespace], int]
    ) -> argparse.ArgumentParser:
        # Only full names: a new flag could change the meaning of an abbreviation.
        command = commands.add_parser(
            name, allow_abbrev=False, help=text, description=f"{text[0].upper()}{text[1:]}."
        )
        command.set_defaults(run=run)
        return command

    zero_shot = add("zero-shot", "classify images by the names of their classes", run_measures)
    prompts = add("prompts", "compare prompts on the same images", run_measures)
    probe = add("linear-probe", "fit a linear classifier to features", run_measures)
    few_shot = add("few-shot", "fit linear classifiers to a few images a class", run_measures)
    retrieval = add("retrieval", "find captions of images, and images of captions", run_measures)
    overlap = add("overlap", "look for a data set's images among the training images", run_measures)
    bias = add("bias", "compare answers between groups of people", run_measures)
    everything = add(
        "all", "run every evaluation that the data sets have the inputs for", run_measures
    )
    for command in (zero_shot, prompts, probe, few_shot, retrieval, overlap, bias, everything):
        _add_models(command)
        _add_data(command)
        _add_running(command)
    for command in (zero_shot, few_shot, overlap, bias, everything):
        _add_templates(command)
    for command in (probe, few_shot, everything):
        _add_probe(command)
    for command in (few_shot, everything):
        _add_shots(command)
    for command in (retrieval, everything):
        retrieval_study.add_arguments(command.add_argument_group("retrieval"))
    for command, is_required in ((overlap, True), (everything, False)):
        overlap_study.add_arguments(command.add_argument_group("overlap"), is_required)
    for command in (bias, everything):
        bias_study.add_arguments(command.add_argument_group("bias"))

    robustness = add(
        "robustness", "compare accuracies with and without a shift of the images", _studied
    )
    robustness.set_defaults(study=studies.run_robustness)
    studies.add_robustness_arguments(robustness)
    scaling = add("scaling", "fit a power law to errors of models of several sizes", _studied)
    scaling.set_defaults(study=studies.run_scaling)
    studies.add_scaling_arguments(scaling)
    compare = add("compare", "compare two models, or zero-shot with a probe, set by set", _studied)
    compare.set_defaults(study=studies.run_compare)
    studies.add_compare_arguments(compare)
    report = add("report", "draw one page of a folder of results", _report)
    report.add_argument("results", metavar="RESULTS", help="a folder of results")
    report.add_argument("--output", metavar="FILE", help="the page [RESULTS/report.html]")
    return parser


def _add_models(parser: argparse.ArgumentParser) -> None:
    models = parser.add_argument_group("models")
    models.add_argument(
        "--checkpoint", nargs="+", default=[], metavar="RUN", help="runs' folders, or checkpoints"
    )
    models.add_argument(
        "--pretrained",
        nargs="+",
        default=[],
        metavar="FILE",
        help="weights of OpenAI, open_clip or transformers, or runs",
    )
    models.add_argument(
        "--model", metavar="NAME", help="architecture of --pretrained [read off its shapes]"
    )
    models.add_argument("--bpe-path", metavar="FILE", help="vocabulary of --pretrained [OpenAI's]")


def _add_data(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data sets")
    data.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="SET",
        help="class folders, wds folders of CLIP_benchmark, tables, files of features, or glyphs, icons, and their "
        "glyphs/shift, glyphs/seen-shift, glyphs/style",
    )
    data.add_argument(
        "--suite",
        metavar="NAME",
        help="paper27, vtab+, shift (of ImageNet), datacomp38, or a file of names",
    )
    data.add_argument("--root", metavar="DIR", help="where the suite's data sets are")
    data.add_argument(
        "--strict", action="store_true", help="end with status 2 if a suite's data set is missing"
    )
    data.add_argument("--img-key", metavar="NAME", help="a table's column of images [by its name]")
    data.add_argument(
        "--label-key", metavar="NAME", help="a table's column of labels [by its name]"
    )
    data.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help=f"most pixels of a picture; larger ones are not read [{MAX_PIXELS}]",
    )
    data.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.01,
        metavar="X",
        help=f"share of a data set's images, or of {JUDGED_ROWS} where it has fewer, that may be unreadable [0.01]",
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    running = parser.add_argument_group("running")
    running.add_argument(
        "--output", default="results", metavar="DIR", help="folder of results [results]"
    )
    running.add_argument(
        "--features", metavar="DIR", help="where features are kept [OUTPUT/features]"
    )
    running.add_argument(
        "--half-cache", action="store_true", help="keep features as float16, in half the space"
    )
    running.add_argument(
        "--batch-size", type=int, default=256, metavar="N", help="images encoded at once [256]"
    )
    running.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that read images [0]"
    )
    running.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads on a CPU [one or all, whichever is faster]",
    )
    running.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda [a GPU where there is one]",
    )
    running.add_argument("--json", action="store_true", help="print JSON instead of lines")


def _add_templates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--templates",
        action="append",
        default=[],
        metavar="TEXT",
        help="prompt with {} for the name; repeat it to average several [the data set's own]",
    )


def _add_probe(parser: argparse.ArgumentParser) -> None:
    probe = parser.add_argument_group("probes")
    probe.add_argument(
        "--C", type=float, metavar="X", help="inverse strength of the penalty [searched for]"
    )
    probe.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        metavar="X",
        help="share of the training images to choose C by, without a val split [0.1]",
    )
    probe.add_argument("--normalize", action="store_true", help="scale features to unit length")
    probe.add_argument(
        "--after-projection", action="store_true", help="fit to the features after the projection"
    )
    probe.add_argument(
        "--save-classifier", action="store_true", help="write weights and bias as .npz"
    )


def _add_shots(parser: argparse.ArgumentParser) -> None:
    shots = parser.add_argument_group("few-shot")
    shots.add_argument(
        "--shots",
        metavar="K,K",
        help="images a class [those of 1,2,4,8,16 that half of the classes have]",
    )
    shots.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="random choices of the images [5]"
    )


def _studied(arguments: argparse.Namespace) -> int:
    """Run a study of results; return the exit status."""
    print(arguments.study(arguments))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    """Draw the page; return the exit status."""
    # Matplotlib is imported only when needed: see ``runner``.
    from clipcore.evaluate.page import write_page

    output = Path(arguments.output) if arguments.output else None
    print(f"the page is {write_page(Path(arguments.results), output)}")
    return 0


@steady_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parsed = build_parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
    except KeyboardInterrupt:
        complain(PROGRAM, "stopped; the finished results are in the folder of results")
        return 128 + signal.SIGINT
    except Exception as error:
        return end_with(PROGRAM, error, "use a smaller --batch-size")
    return status


if __name__ == "__main__":
    sys.exit(main())
