"""Folders of results that tests of studies read: of published models, and of values that a test chooses."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from clipcore.evaluate.results import Result, write_result

FIGURES = Path(__file__).parent / "figures"
ZERO_SHOT, PROBE = "zeroshot_classification", "linear_probe"


def put(
    folder: Path,
    dataset: str,
    value: float,
    model: str = "ViT-B-32",
    pretrained: str = "openai",
    task: str = ZERO_SHOT,
    metric: str = "acc1",
    **details: Any,
) -> None:
    """Write a result whose main metric has a value."""
    name = f"lp_{metric}" if task == PROBE else metric
    result = Result(
        dataset, model, pretrained, task, {name: value}, {"main_metric": name, **details}
    )
    write_result(folder, result)


def note_of(study: dict[str, Any], words: str) -> str:
    """Return the one note of a study that has these words."""
    (note,) = [note for note in study["notes"] if words in note]
    return note


def put_papers_model(folder: Path) -> None:
    """Write the accuracies of the paper's table 16, zero-shot and with a probe, under the names of the hub."""
    for dataset, zero_shot, probe in (
        ("wds_imagenet1k", 0.762, 0.854),
        ("wds_imagenetv2", 0.701, 0.759),
        ("wds_imagenet_sketch", 0.602, 0.574),
    ):
        put(folder, dataset, zero_shot, "ViT-L-14-336")
        put(folder, dataset, probe, "ViT-L-14-336", task=PROBE)


def write_baseline(path: Path, unit: float = 1.0) -> Path:
    """Write the testbed's 85 models, in % or as shares, under the names of our data sets."""
    with open(FIGURES / "shift_standard_models.csv", newline="") as table, open(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(["family", "model", "imagenet1k", "imagenetv2", "imagenet-sketch"])
        for row in csv.DictReader(table):
            values = [float(row[name]) / unit for name in ("val", "v2", "sketch")]
            writer.writerow(["a CNN", row["model"], *values])
    return path


# The paper's, by size, and their mean errors on 38 data sets.
RESNETS = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")
MEAN_ERRORS = (0.5190, 0.4967, 0.4812, 0.4330, 0.3939)


def put_resnets(folder: Path) -> None:
    """Write two sets for each of the paper's ResNets whose mean error is that of 38 sets."""
    for name, error in zip(RESNETS, MEAN_ERRORS, strict=True):
        put(folder, "wds_imagenet1k", 1 - error + 0.0625, name)
        put(folder, "food101", 1 - error - 0.0625, name)
