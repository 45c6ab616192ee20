"""Reads and writes results of evaluations: one JSON file per model, data set and task, with CLIP_benchmark's keys.

``clip_benchmark build`` reads these files. Values for which it has no key are under an additional key, ``clipcore``.
``eval_results.jsonl`` beside them has the format of datacomp's evaluations.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipcore.data import DataError, printable
from clipcore.files import is_folder, make_directory, read_regular, write_durably
from clipcore.towers.architectures import is_finite_number, shortened

# Tasks of CLIP_benchmark, and our own.
ZERO_SHOT, LINEAR_PROBE, RETRIEVAL = (
    "zeroshot_classification",
    "linear_probe",
    "zeroshot_retrieval",
)
PROMPTS, FEW_SHOT, OVERLAP, BIAS = "prompt_gains", "few_shot", "overlap", "bias"
TASKS = (ZERO_SHOT, LINEAR_PROBE, RETRIEVAL, PROMPTS, FEW_SHOT, OVERLAP, BIAS)

LINES_FILE = "eval_results.jsonl"
# The largest results hold 120 small pictures. In memory, lists of lists take forty times their text.
_MAX_RESULT_BYTES = 1 << 22
_MAX_NAME_CHARS = 180
# Main metrics of a result that names none, such as CLIP_benchmark's own: the first one present is used.
_USUAL_METRICS = {
    ZERO_SHOT: ("acc1", "mean_average_precision"),
    LINEAR_PROBE: ("lp_acc1", "lp_mean_average_precision"),
    RETRIEVAL: ("mean_recall@1", "image_retrieval_recall@5"),
}


@dataclass(frozen=True)
class Result:
    """The result of one evaluation of one model on one data set.

    Attributes:
        dataset: its name.
        model: the architecture, such as "ViT-B-32".
        pretrained: the weights, as the user named them.
        task: one of ``TASKS``.
        metrics: by CLIP_benchmark's names, shares from 0 to 1; None if a metric does not apply.
        details: all other values, of JSON's types; ``main_metric`` names the main metric.
        language: language of the class names and captions.
        written_ns: modification time of its file, in nanoseconds; 0 for a result that was not read.
    """

    dataset: str
    model: str
    pretrained: str
    task: str
    metrics: dict[str, float | None]
    details: dict[str, Any] = field(default_factory=dict)
    language: str = "en"
    written_ns: int = field(default=0, compare=False)

    @property
    def main_metric(self) -> str | None:
        """The main metric; if none is named, the task's usual one, or None."""
        stated = self.details.get("main_metric")
        if isinstance(stated, str):
            return stated
        usual = _USUAL_METRICS.get(self.task, ())
        return next((name for name in usual if name in self.metrics), None)

    @property
    def value(self) -> float | None:
        """The main metric's value."""
        return self.metrics.get(self.main_metric or "")

    @property
    def file_name(self) -> str:
        """The name of its file, which is unique and follows CLIP_benchmark's template."""
        parts = (self.dataset, self.pretrained, self.model, self.language, self.task)
        stem = "_".join(map(_in_file_name, parts[:-1]))
        # Two paths may be equal without their slashes, and "a_b" of "c" would equal "a" of "b_c".
        is_altered = any(_in_file_name(part) != part for part in parts)
        is_ambiguous = any("_" in part for part in parts[1:-1])
        if is_altered or is_ambiguous or len(stem) + len(self.task) >= _MAX_NAME_CHARS:
            digest = hashlib.sha256(_encoded("\0".join(parts))).hexdigest()[:8]
            stem = f"{stem[: _MAX_NAME_CHARS - 60]}_{digest}"
        return f"{stem}_{_in_file_name(self.task)}.json"

    def to_dict(self) -> dict[str, Any]:
        """Return the object for its file.

        Raises:
            ValueError: a number is not finite, which JSON does not have; the message names the metric.
        """
        for name, value in self.metrics.items():
            if value is not None and not is_finite_number(value):
                raise ValueError(
                    f"{printable(name)} of {printable(self.model)} on {printable(self.dataset)} is {shortened(value)}, not "
                    "a finite number; a metric that does not apply is None"
                )
        record: dict[str, Any] = {
            "dataset": self.dataset,
            "model": self.model,
            "pretrained": self.pretrained,
            "task": self.task,
            "metrics": self.metrics,
            "language": self.language,
            "clipcore": self.details,
        }
        try:
            json.dumps(record, allow_nan=False)
        except ValueError as error:
            raise ValueError(
                f"the details of {printable(self.model)} on {printable(self.dataset)} are not JSON: {error}"
            ) from None
        return record


def write_result(folder: Path, result: Result) -> Path:
    """Write a result into a folder, replacing an older one of the same model, data set and task; return its path.

    The file of a result that was read keeps its modification time, which tells what was measured last.

    Raises:
        ValueError: a number is not finite, or the result is too large to be read again.
        OSError: it cannot be written; an older one is untouched.
    """
    text = json.dumps(result.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)
    content = _encoded(text + "\n")
    if len(content) > _MAX_RESULT_BYTES:
        raise ValueError(
            f"the {result.task} result of {printable(result.dataset)} has {len(content) >> 20} MB, more than "
            f"{_MAX_RESULT_BYTES >> 20}: ask for fewer groups or labels"
        )
    make_directory(folder)
    path = folder / result.file_name
    write_durably(path, content)
    if result.written_ns:
        os.utime(path, ns=(result.written_ns, result.written_ns))
    return path


def read_results(folder: Path) -> list[Result]:
    """Return the results in a folder, including CLIP_benchmark's own, in the order of their files' names.

    Raises:
        DataError: the folder is missing or has no results, or a result cannot be read.
    """
    try:
        if not is_folder(folder):
            raise DataError(
                f"there is no folder of results {folder}; python -m clipcore.evaluate zero-shot --output {folder} makes it"
            )
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".json")
    except OSError as error:
        raise DataError(f"cannot read the folder of results {folder}: {error.strerror}") from None
    found = [result for path in paths if (result := _read(path))]
    if not found:
        raise DataError(
            f"{folder} holds no results; python -m clipcore.evaluate zero-shot --output {folder} writes them"
        )
    return found


def read_result(path: Path) -> Result:
    """Return the result in one file, which may be CLIP_benchmark's; raise DataError."""
    result = _read(path)
    if result is None:
        raise DataError(
            f"{path} is not a result of an evaluation: it has no dataset, model, pretrained and task"
        )
    return result


def _read(path: Path) -> Result | None:
    """Return the result in a file; None for another kind of file."""
    try:
        content = read_regular(path, _MAX_RESULT_BYTES + 1)
        written_ns = path.stat().st_mtime_ns
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > _MAX_RESULT_BYTES:
        raise DataError(
            f"{path} has more than {_MAX_RESULT_BYTES >> 20} MB, which no result has; remove it"
        )
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {printable(str(error))}; remove it") from None
    keys = ("dataset", "model", "pretrained", "task")
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
        return None
    metrics, details = record.get("metrics"), record.get("clipcore", {})
    language = record.get("language")
    if not isinstance(metrics, dict) or not isinstance(details, dict):
        raise DataError(f"{path} has no metrics; evaluate it again, or remove it")
    return Result(
        dataset=record["dataset"],
        model=record["model"],
        pretrained=record["pretrained"],
        task=record["task"],
        metrics={str(name): _number(value) for name, value in metrics.items()},
        details=details,
        language=language if isinstance(language, str) else "en",
        written_ns=written_ns,
    )


def _number(value: object) -> float | None:
    """Return a metric; None if it is not a finite number, such as CLIP_benchmark's acc5 for few classes."""
    return value if is_finite_number(value) else None  # type: ignore[return-value]


def write_lines(folder: Path, results: Iterable[Result]) -> None:
    """Write one line per zero-shot and retrieval result into a folder's file, as datacomp's evaluations do."""
    lines = [
        json.dumps(_line(result), allow_nan=False, ensure_ascii=False) + "\n"
        for result in results
        if result.task in (ZERO_SHOT, RETRIEVAL)
    ]
    if lines:
        write_durably(folder / LINES_FILE, _encoded("".join(lines)))


def _line(result: Result) -> Mapping[str, Any]:
    return {
        "key": re.sub(r"^wds[/_-]", "", result.dataset),
        "dataset": result.dataset,
        "metrics": {**result.metrics, "main_metric": result.value},
        "model": result.model,
        "pretrained": result.pretrained,
    }


def set_key(dataset: str) -> str:
    """Return a data set's normalised name, which is the same for the spellings of its copies on the hub.

    >>> set_key("wds/vtab/cifar10"), set_key("wds_imagenet_sketch_test")
    ('vtab-cifar10', 'imagenet-sketch')
    """
    name = re.sub(r"^wds[/_-]", "", dataset.lower()).removesuffix("_test")
    return name.replace("/", "-").replace("_", "-")


def models_of(results: Iterable[Result]) -> list[tuple[str, str]]:
    """Return the distinct (model, pretrained) of results, in their order."""
    return list(dict.fromkeys((result.model, result.pretrained) for result in results))


def _encoded(text: str) -> bytes:
    """Return a text as UTF-8; JSON escapes replace characters that cannot be encoded, as in a path in another encoding."""
    return text.encode("utf-8", "backslashreplace")


def _in_file_name(text: str) -> str:
    """Return a text that is safe as a part of a file's name."""
    return re.sub(r"[^\w.+-]", "-", text.replace("/", "-"), flags=re.ASCII)


def find_result(folder: Path, like: Result) -> Result | None:
    """Return the result of the same model, data set and task in a folder; None if there is none."""
    path = folder / like.file_name
    return _read(path) if path.is_file() else None
