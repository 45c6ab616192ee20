"""Measures the robustness of the models in a folder of results, from accuracies on data sets and their shifted forms.

Source: Radford et al. 2021, section 3.3. The maths is in ``robustness.py``. Accuracies are shares, from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from clipcore.data import DataError, LeftOut, printable
from clipcore.evaluate.model_tables import read_rows
from clipcore.evaluate.results import LINEAR_PROBE, ZERO_SHOT, Result, read_results, set_key
from clipcore.evaluate.robustness import (
    BaselineFit,
    effective_robustness,
    fit_baseline,
    gap_closed,
)
from clipcore.evaluate.same_weights import one_name_each
from clipcore.evaluate.scores import Model, listed, scores_of, share

# Default data sets and their shifted forms.
_SHIFTS_OF_IMAGENET = (
    "imagenetv2",
    "imagenet-sketch",
    "imagenet-a",
    "imagenet-r",
    "objectnet",
    "imagenet-o",
)
_SHIFTS = {
    "imagenet1k": _SHIFTS_OF_IMAGENET,
    "glyphs": ("glyphs-shift",),
    "icons": ("icons-shift",),
}
FIT = "fit"
_FIT_NOTE = (
    "the line goes through the probes of this folder, which are not models trained on one data set alone: what it shows is "
    "robustness beyond theirs"
)

_OWN_NOTE = (
    "the line goes through the zero-shot models of this folder, such as checkpoints of one run, as no probe has both "
    "accuracies: what it shows is robustness beyond theirs"
)


class Accuracies(NamedTuple):
    """Accuracies of one model without and with a shift; None if it was not evaluated."""

    model: Model
    kind: Literal["zero-shot", "probe", "baseline"]
    inside: float | None
    outside: float | None


@dataclass(frozen=True)
class BaselineTable:
    """A user's table of accuracies of models that were trained on a single data set.

    Attributes:
        name: name of the file.
        models: names of the models.
        accuracies: shares by the key of the data set, one per model; None for an empty cell.
        note: a note on how the table was interpreted.
    """

    name: str
    models: list[str]
    accuracies: dict[str, list[float | None]]
    note: str | None

    def rows(self, inside: str, outside: str) -> list[Accuracies]:
        """Return the accuracies on a pair of data sets."""
        columns = self.accuracies[inside], self.accuracies[outside]
        return [
            Accuracies(Model(name, ""), "baseline", x, y)
            for name, x, y in zip(self.models, *columns, strict=True)
        ]


def robustness_study(
    results: Path,
    baseline: str | None = None,
    in_name: str | None = None,
    out_names: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the accuracy that the models in a folder of results keep under shifts, in the format of ``robustness.json``.

    Args:
        results: a folder; its zero-shot classifiers and linear probes are used, by their accuracy.
        baseline: a csv table with a column ``model`` and one per data set, in percent if any value is above 1; or "fit", the
            line through the folder's own probes, or its zero-shot models if no probe has both accuracies; or None.
        in_name: the data set without the shift [ImageNet, glyphs or icons].
        out_names: data sets under a shift [all known ones in the folder].

    Raises:
        DataError: a set is missing, no model was evaluated on a pair, or a baseline cannot be fitted.
    """
    left_out = LeftOut()
    found, _ = one_name_each(read_results(results), left_out)
    zero_shot = scores_of(found, ZERO_SHOT, left_out)
    probes = scores_of(found, LINEAR_PROBE, left_out)
    there: dict[str, Result] = {}
    for scores in (*zero_shot.values(), *probes.values()):
        for name, result in scores.items():
            there.setdefault(name, result)

    chosen = _named_pairs(results, there, in_name, out_names)
    table = None
    if baseline is not None and baseline != FIT:
        table = _read_baseline(Path(baseline), {name for pair in chosen for name in pair})
    notes = list[str]()
    if table is not None and table.note:
        notes.append(table.note)

    pairs = []
    for inside, outside in chosen:
        rows = _accuracies(zero_shot, "zero-shot", inside, outside)
        rows += _accuracies(probes, "probe", inside, outside)
        names = printable(there[inside].dataset), printable(there[outside].dataset)
        line = origin = None
        if table is not None:
            origin, models = table.name, table.rows(inside, outside)
            line = _fit(models, origin, names, left_out)
            rows += models
        elif baseline == FIT:
            origin = FIT
            models = [row for row in rows if row.kind == "probe"]
            note = _FIT_NOTE
            if all(row.inside is None or row.outside is None for row in models):
                models, note = [row for row in rows if row.kind == "zero-shot"], _OWN_NOTE
            notes.append(note)
            line = _fit(models, origin, names, left_out)
        pairs.append(_pair(names, rows, line, origin, left_out))
        notes += _class_note(there[inside], there[outside])

    if not any(model["kind"] != "baseline" for pair in pairs for model in pair["models"]):
        raise DataError(
            f"{results} has no model with accuracies on both sets of a pair; left out: {left_out}"
        )
    if left_out:
        notes.append(f"left out: {left_out}")
    return {"study": "robustness", "pairs": pairs, "notes": list(dict.fromkeys(notes))}


def _named_pairs(
    folder: Path, there: dict[str, Result], in_name: str | None, out_names: Sequence[str]
) -> list[tuple[str, str]]:
    """Return the keys of the sets of each pair; raise DataError if there is none."""
    sets = listed(result.dataset for result in there.values())
    for name in (in_name, *out_names):
        if name is not None and set_key(name) not in there:
            raise DataError(f"{folder} has no accuracy on {printable(name)}; it has {sets}")

    roots = [name for name in _SHIFTS if name in there] if in_name is None else [set_key(in_name)]
    if out_names and len(roots) != 1:
        raise DataError(
            f"--out needs --in, the data set that it is a shifted form of: one of {sets}"
        )
    named = list(map(set_key, out_names))
    pairs = [
        (root, out)
        for root in roots
        for out in named or _SHIFTS.get(root, ())
        if out in there and out != root
    ]
    if not pairs:
        raise DataError(
            f"{folder} has no data set with a shifted form of it, but {sets}; name them with --in and --out"
        )
    return pairs


def _accuracies(
    scores: dict[Model, dict[str, Result]],
    kind: Literal["zero-shot", "probe"],
    inside: str,
    outside: str,
) -> list[Accuracies]:
    """Return the accuracies of the models that were evaluated on at least one of the two sets."""
    found = []
    for model, results in scores.items():
        x, y = (
            share(results[name], "acc1") if name in results else None for name in (inside, outside)
        )
        if x is not None or y is not None:
            found.append(Accuracies(model, kind, x, y))
    return found


def _read_baseline(path: Path, sets: Iterable[str]) -> BaselineTable:
    """Return a table's columns of data sets; raise DataError for a missing column or an invalid accuracy."""
    columns, rows = read_rows(path)
    named = {set_key(column): column for column in columns if column != "model"}
    values: dict[str, list[float | None]] = {}
    for name in sorted(sets):
        if name not in named:
            raise DataError(
                f"{path} has no column {printable(name)}; its columns are {listed(columns)}"
            )
        values[name] = [row.number(named[name]) for row in rows]

    # The whole table is in one unit.
    most = max((x for column in values.values() for x in column if x is not None), default=0.0)
    unit = 100.0 if most > 1 else 1.0
    for name, column in values.items():
        for row, value in zip(rows, column, strict=True):
            if value is not None and not 0 <= value <= unit:
                raise DataError(
                    f"{row.where}: {printable(named[name])} is {value:g}, not an accuracy from 0 to {unit:g}; correct it"
                )
    shares = {
        name: [None if value is None else value / unit for value in column]
        for name, column in values.items()
    }
    percent = f"{printable(path.name)} is read in %: its largest accuracy is {most:g}"
    models = [row.cells["model"].strip() for row in rows]
    return BaselineTable(path.name, models, shares, percent if unit > 1 else None)


def _fit(
    rows: Sequence[Accuracies], origin: str, names: tuple[str, str], left_out: LeftOut
) -> BaselineFit:
    """Return the line through models that have both accuracies; raise DataError for fewer than two models."""
    both = [
        (row.inside, row.outside)
        for row in rows
        if row.inside is not None and row.outside is not None
    ]
    try:
        line = fit_baseline([x for x, _ in both], [y for _, y in both])
    except ValueError as error:
        what = "the models of this folder" if origin == FIT else origin
        raise DataError(
            f"no baseline of {names[0]} and {names[1]} from {what}: {error}; give a table of models "
            "trained on one data set as --baseline FILE.csv, or leave --baseline out"
        ) from None
    if num_infinite := len(both) - line.num_models:
        reason = "model of the baseline with an accuracy of 0 or 1, whose logit is infinite"
        left_out.add(reason, names[1], num_infinite)
    return line


def _pair(
    names: tuple[str, str],
    rows: Sequence[Accuracies],
    line: BaselineFit | None,
    origin: str | None,
    left_out: LeftOut,
) -> dict[str, Any]:
    """Return a pair in the format of the JSON file; count models without both accuracies."""
    probe_outside = {row.model: row.outside for row in rows if row.kind == "probe"}
    models = []
    for row in rows:
        if row.inside is None or row.outside is None:
            lacking = names[0] if row.inside is None else names[1]
            left_out.add(f"{row.kind} without accuracy on {lacking}", str(row.model))
            continue
        effective, closed = _relative_to_line(line, row.inside, row.outside)
        # For its probe, the accuracy under the shift is enough.
        other = probe_outside.get(row.model) if row.kind == "zero-shot" else None
        relative = None if other is None else row.outside - other
        models.append(
            {
                "model": row.model.model,
                "pretrained": row.model.pretrained,
                "in_accuracy": row.inside,
                "out_accuracy": row.outside,
                "effective": effective,
                "gap_closed": closed,
                "relative": relative,
                "kind": row.kind,
            }
        )
    baseline = None
    if line is not None:
        baseline = {
            "slope": line.slope,
            "intercept": line.intercept,
            "r2": line.r2,
            "num_models": line.num_models,
            "from": origin,
        }
    return {"in": names[0], "out": names[1], "baseline": baseline, "models": models}


def _relative_to_line(
    line: BaselineFit | None, inside: float, outside: float
) -> tuple[float | None, float | None]:
    """Return effective robustness and gap closed; None without a line, or if the line is undefined there."""
    # The logit of an accuracy of 0 or 1 is infinite.
    if line is None or inside in (0, 1):
        return None, None
    with np.errstate(over="ignore"):
        effective = effective_robustness(line, inside, outside)
        closed = gap_closed(line, inside, outside)
    return effective, None if math.isnan(closed) else closed


def _class_note(inside: Result, outside: Result) -> list[str]:
    """Return the note on sets with different classes, whose accuracies are not comparable."""
    counts = [result.details.get("num_classes") for result in (inside, outside)]
    if any(type(count) is not int for count in counts) or counts[0] == counts[1]:
        return []
    return [
        f"{printable(outside.dataset)} has {counts[1]} classes and {printable(inside.dataset)} {counts[0]}: the paper "
        "compares accuracies on the same classes"
    ]
