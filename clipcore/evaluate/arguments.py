"""Evaluate models on labelled data sets: ``python -m clipcore.evaluate zero-shot --checkpoint RUN --data DIR``.

Exit status: 0 for success; 2 for a mistake in the arguments, a data set or model that could not be evaluated (the others
were), or too little memory; 70 for a bug in clipcore; 130 for Ctrl-C. Finished results are in the folder of results.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from clipcore.data import MAX_PIXELS
from clipcore.data.choices import DATASET_TYPES, GLYPHS, ICONS, JUDGED_ROWS
from clipcore.evaluate.label_lists import PAPER
from clipcore.evaluate.results import LINEAR_PROBE, RETRIEVAL, ZERO_SHOT
from clipcore.terminal import Parser

PROGRAM = "clipcore.evaluate"
# What ``overlap`` compares.
DESCRIPTORS = ("model", "pixels")
# The recalls of ``retrieval``, and the largest that the kernel of top K has.
RANKS, MAX_RANK = (1, 5, 10), 128


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; ``command`` is the name of the evaluation."""
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        # Only full names: a new flag could change the meaning of an abbreviation.
        return commands.add_parser(
            name, allow_abbrev=False, help=text, description=f"{text[0].upper()}{text[1:]}."
        )

    zero_shot = add("zero-shot", "classify images by the names of their classes")
    prompts = add("prompts", "compare prompts on the same images")
    probe = add("linear-probe", "fit a linear classifier to features")
    few_shot = add("few-shot", "fit linear classifiers to a few images a class")
    retrieval = add("retrieval", "find captions of images, and images of captions")
    overlap = add("overlap", "look for a data set's images among the training images")
    bias = add("bias", "compare answers between groups of people")
    everything = add("all", "run every evaluation that the data sets have the inputs for")
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
        add_retrieval_arguments(command.add_argument_group("retrieval"))
    for command, is_required in ((overlap, True), (everything, False)):
        add_overlap_arguments(command.add_argument_group("overlap"), is_required)
    for command in (bias, everything):
        add_bias_arguments(command.add_argument_group("bias"))

    robustness = add("robustness", "compare accuracies with and without a shift of the images")
    add_robustness_arguments(robustness)
    scaling = add("scaling", "fit a power law to errors of models of several sizes")
    add_scaling_arguments(scaling)
    compare = add("compare", "compare two models, or zero-shot with a probe, set by set")
    add_compare_arguments(compare)
    report = add("report", "draw one page of a folder of results")
    report.add_argument("results", metavar="RESULTS", help="a folder of results")
    report.add_argument("--output", metavar="FILE", help="the page [RESULTS/report.html]")
    return parser


def add_one_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``load_model``."""
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument(
        "--checkpoint", metavar="RUN", help="a run's folder, or one of its checkpoints"
    )
    weights.add_argument(
        "--pretrained",
        metavar="FILE",
        help="weights of OpenAI, open_clip or transformers, or a run",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="architecture of --pretrained [from the shapes of its weights]",
    )
    parser.add_argument("--bpe-path", metavar="FILE", help="vocabulary of --pretrained [OpenAI's]")


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


def add_retrieval_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the arguments of the command ``retrieval`` only."""
    parser.add_argument(
        "--recall-k",
        type=_rank,
        nargs="+",
        default=list(RANKS),
        metavar="K",
        help="recalls among the K nearest, beside the recall at 1 [1 5 10]",
    )


def _rank(text: str) -> int:
    """Return the k of a recall from its text, for argparse."""
    is_number = text.isascii() and text.isdigit() and len(text) < 4
    if not is_number or not 1 <= int(text) <= MAX_RANK:
        raise argparse.ArgumentTypeError(
            f"a K is a whole number from 1 to {MAX_RANK}, got {text!r}"
        )
    return int(text)


def add_overlap_arguments(parser: argparse._ActionsContainer, is_required: bool = True) -> None:
    """Add the arguments of the command ``overlap`` only."""
    parser.add_argument(
        "--train-data",
        required=is_required,
        metavar="DATA",
        help="what was trained on, as for training: files, folders, patterns, or "
        f"{GLYPHS}, {ICONS}; a folder of images means all of them, with and without captions",
    )
    parser.add_argument(
        "--dataset-type",
        choices=DATASET_TYPES,
        default="auto",
        help="kind of the training data [by its ending]",
    )
    parser.add_argument(
        "--csv-img-key", default="filepath", metavar="NAME", help="its column of images [filepath]"
    )
    parser.add_argument(
        "--csv-caption-key", default="title", metavar="NAME", help="its column of captions [title]"
    )
    parser.add_argument(
        "--csv-separator", metavar="C", help="between its columns [read off its header]"
    )
    parser.add_argument(
        "--threshold",
        type=_threshold,
        metavar="COSINE",
        help="cosine from which on two images are one [proposed from altered copies, at a precision of 99%%]",
    )
    parser.add_argument(
        "--descriptor",
        choices=DESCRIPTORS,
        default="model",
        help="what is compared: the model's image features, or coarse pixels [model]",
    )


def _threshold(text: str) -> float:
    """Return a threshold from its text, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"a threshold is a cosine above 0 and at most 1, such as 0.95, got {text!r}"
        )
    return value


def add_bias_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the arguments of the command ``bias`` only."""
    parser.add_argument(
        "--groups",
        metavar="NAMES",
        help="columns of the table that name groups, joined by commas [those called group:NAME; race,gender,age of "
        "faces]",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="labels that people may be given, a file of one a line; "
        f"'{PAPER}' takes the paper's 21 with its categories",
    )
    parser.add_argument(
        "--categories",
        metavar="FILE.json",
        help='labels by category, such as {"crime": ["thief", "criminal"]}',
    )
    parser.add_argument(
        "--add-class",
        action="append",
        default=[],
        metavar="NAME",
        help="measure the categories again with this label more, such as child; may be repeated",
    )


def add_robustness_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``run_robustness``."""
    _add_results(parser)
    parser.add_argument(
        "--baseline",
        metavar="fit|FILE.csv",
        help="models without robustness: a table with the column model and one for each set; or a line through the "
        "folder's own probes, else its zero-shot models",
    )
    parser.add_argument(
        "--in",
        dest="in_name",
        metavar="NAME",
        help="the set without the shift [imagenet1k, glyphs or icons]",
    )
    parser.add_argument(
        "--out",
        dest="out_names",
        metavar="NAME",
        nargs="+",
        default=[],
        help="sets under a shift [the known ones that are there]",
    )


def add_scaling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``run_scaling``."""
    _add_results(parser)
    parser.add_argument(
        "--gmacs",
        type=Path,
        metavar="FILE",
        help="compute of the models: csv with the columns model, gmacs, and maybe pretrained and samples; or a JSON object "
        "of numbers by model [of one image, by the model's shape]",
    )
    parser.add_argument(
        "--bins",
        type=int,
        metavar="N",
        help="fit to the best model of each of N bins of compute, as LAION does with 5 [to all models]",
    )


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``run_compare``."""
    parser.add_argument("a", type=Path, metavar="A", help="a folder of results, or one result")
    parser.add_argument(
        "b",
        type=Path,
        nargs="?",
        metavar="B",
        help="what A is compared with [zero-shot with the linear probe of the same model in A]",
    )
    for side in "ab":
        parser.add_argument(
            f"--task-{side}",
            choices=(ZERO_SHOT, LINEAR_PROBE, RETRIEVAL),
            help=f"which results of {side.upper()} [the first of these that is there]",
        )
        parser.add_argument(
            f"--model-{side}",
            metavar="NAME",
            help=f"which model of {side.upper()}: architecture, weights, or both with a space [the only one]",
        )
    _add_output(parser, "A")


def _add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, help="a folder of results")
    _add_output(parser, "that of the results")


def _add_output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help=f"where the study is written [{default}]"
    )
