"""Studies of folders of results, without a model: their command lines, files and tables for the terminal.

================  ==============================================================
``robustness``    accuracy that models keep under shifts, ``robustness_study.py``
``scaling``       the law of error and compute, ``scaling_study.py``
``compare``       two models, or zero-shot and probe, ``comparison.py``
================  ==============================================================

A study is a dict, the content of its JSON file: ``robustness.json``, ``scaling.json`` or ``compare.json``. Its key ``notes``
lists what was left out and how the input was interpreted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipcore.data import printable
from clipcore.evaluate.comparison import compare
from clipcore.evaluate.robustness_study import robustness_study
from clipcore.evaluate.scaling_study import scaling_study
from clipcore.files import is_file, make_directory, write_durably
from clipcore.number_texts import decimal, percent, signed_points

STUDIES = ("robustness", "scaling", "compare")
_MAX_CELL_CHARS = 48
# Keys that `clip_benchmark build` requires in each JSON file of a folder.
_NEIGHBOURLY = {"model": "", "pretrained": "", "metrics": {}}


def run_robustness(arguments: argparse.Namespace) -> str:
    """Compute and write a study of robustness; return its text for the terminal; raise DataError or OSError."""
    study = robustness_study(
        arguments.results, arguments.baseline, arguments.in_name, arguments.out_names
    )
    return _written(study, arguments.output or arguments.results)


def run_scaling(arguments: argparse.Namespace) -> str:
    """Compute and write a study of scaling; return its text for the terminal; raise ValueError or OSError."""
    if arguments.bins is not None and arguments.bins < 1:
        raise ValueError(f"--bins is at least 1, got {arguments.bins}")
    study = scaling_study(arguments.results, arguments.gmacs, arguments.bins)
    return _written(study, arguments.output or arguments.results)


def run_compare(arguments: argparse.Namespace) -> str:
    """Compute and write a comparison; return its text for the terminal; raise DataError or OSError."""
    study = compare(
        arguments.a,
        arguments.b,
        task_a=arguments.task_a,
        task_b=arguments.task_b,
        model_a=arguments.model_a,
        model_b=arguments.model_b,
    )
    beside = arguments.a.parent if is_file(arguments.a) else arguments.a
    return _written(study, arguments.output or beside)


RUN = {"robustness": run_robustness, "scaling": run_scaling, "compare": run_compare}


def _written(study: dict[str, Any], folder: Path) -> str:
    path = write_study(folder, study)
    return f"{print_study(study)}\nwritten to {printable(str(path))}"


# Files


def write_study(folder: Path, study: dict[str, Any]) -> Path:
    """Write a study into a folder, replacing an older one of its kind; return its path.

    Raises:
        OSError: it cannot be written; the old one is untouched.
    """
    make_directory(folder)
    path = folder / f"{study['study']}.json"
    content = json.dumps({**study, **_NEIGHBOURLY}, indent=2, allow_nan=False)
    write_durably(path, content.encode() + b"\n")
    return path


# Tables for the terminal


def print_study(study: dict[str, Any]) -> str:
    """Return a study as text for the terminal: tables of aligned columns, and the notes."""
    tables = {"robustness": _robustness, "scaling": _scaling, "compare": _comparison}
    lines = tables[study["study"]](study)
    lines += [f"note: {printable(note)}" for note in study.get("notes", ())]
    return "\n".join(lines)


def _robustness(study: dict[str, Any]) -> list[str]:
    lines = []
    for pair in study["pairs"]:
        lines.append(f"{printable(pair['in'])} -> {printable(pair['out'])}{_line_of(pair)}")
        rows = [["model", "weights", "kind", "in", "out", "effective", "gap closed", "relative"]]
        # The many models of a baseline are not listed; the line describes them.
        models = [model for model in pair["models"] if model["kind"] != "baseline"]
        for model in sorted(models, key=lambda model: -model["out_accuracy"]):
            rows.append(
                [
                    model["model"],
                    model["pretrained"],
                    model["kind"],
                    percent(model["in_accuracy"]),
                    percent(model["out_accuracy"]),
                    signed_points(model["effective"]),
                    percent(model["gap_closed"]),
                    signed_points(model["relative"]),
                ]
            )
        lines += [*_table(rows, num_texts=3), ""]
    return lines


def _line_of(pair: dict[str, Any]) -> str:
    """Return the baseline of a pair in words."""
    line = pair["baseline"]
    if line is None:
        return ", without a baseline"
    origin = "this folder" if line["from"] == "fit" else printable(line["from"])
    return (
        f", baseline of {line['num_models']} models of {origin}: logit(out) = {decimal(line['slope'], '.3f')} logit(in) "
        f"{decimal(line['intercept'], '+.3f')}, r2 {line['r2']:.3f}"
    )


def _scaling(study: dict[str, Any]) -> list[str]:
    law, prediction = study["law"], study["prediction"]
    rows = [["model", "weights", study["unit"], "error"]]
    for model in study["models"]:
        compute = f"{model['compute']:.4g}"
        rows.append([model["model"], model["pretrained"], compute, percent(model["error"])])
    lines = [f"{printable(study['metric'])} by {study['unit']}", *_table(rows, num_texts=2), ""]
    lines.append(
        f"error = {law['factor']:.5g} compute^{decimal(law['exponent'], '.5f')}, r2 {law['r2']:.4f}, of "
        f"{law['num_models']} points"
    )
    if prediction is None:
        lines.append("no prediction: the smaller models make no law")
    else:
        lines.append(
            f"the smaller models predict {percent(prediction['predicted'])} for the largest, "
            f"{printable(prediction['model'])}; it has {percent(prediction['actual'])}"
        )
    return lines


def _comparison(study: dict[str, Any]) -> list[str]:
    rows = [["set", "metric", "a", "b", "a - b"]]
    for one in study["sets"]:
        values = [percent(one["a"]), percent(one["b"]), signed_points(one["difference"])]
        rows.append([one["dataset"], one["metric"], *values])
    lines = [f"a: {printable(study['a'])}", f"b: {printable(study['b'])}"]
    lines += [*_table(rows, num_texts=2), ""]
    lines.append(
        f"a wins {study['wins']} of {len(study['sets'])} sets, loses {study['losses']}, ties {study['ties']}"
    )
    if study["pearson"] is not None:
        lines.append(f"Pearson r {decimal(study['pearson'], '.3f')}")
    if study["slope"] is not None:
        interval = ""
        if study["interval"] is not None:
            low, high = study["interval"]
            interval = f", 95% bootstrap {decimal(low, '.3f')} to {decimal(high, '.3f')}"
        lines.append(f"slope of a on b {decimal(study['slope'], '.3f')}{interval}")
    return lines


def _table(rows: Sequence[Sequence[str]], num_texts: int) -> list[str]:
    """Return rows as lines of aligned columns: the first ones to the left, numbers to the right."""
    cells = [[_cell(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if place < num_texts else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _cell(text: str) -> str:
    """Return a text for one cell; for a long text, such as a path, its end."""
    shown = printable(text)
    return shown if len(shown) <= _MAX_CELL_CHARS else f"...{shown[3 - _MAX_CELL_CHARS :]}"
