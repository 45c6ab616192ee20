"""Results of evaluations: one JSON file for each model, data set and task, under the keys of CLIP_benchmark.

Its own ``clip_benchmark build`` reads them. What it has no key for is under one more, ``clipcore``. Beside them lies
``eval_results.jsonl``, in the form of datacomp's evaluations.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipcore.data import DataError, printable
from clipcore.files import read_regular, write_durably

# Tasks of CLIP_benchmark, and ours beside them.
ZERO_SHOT, LINEAR_PROBE, RETRIEVAL = (
    "zeroshot_classification",
    "linear_probe",
    "zeroshot_retrieval",
)
PROMPTS, FEW_SHOT, OVERLAP, BIAS = "prompt_gains", "few_shot", "overlap", "bias"
TASKS = (ZERO_SHOT, LINEAR_PROBE, RETRIEVAL, PROMPTS, FEW_SHOT, OVERLAP, BIAS)

LINES_FILE = "eval_results.jsonl"
_MAX_RESULT_BYTES = 1 << 26
_MAX_NAME_CHARS = 180


@dataclass(frozen=True)
class Result:
    """What one evaluation of one model on one data set found.

    Attributes:
        dataset: its name.
        model: the architecture, such as "ViT-B-32".
        pretrained: which weights, as the user named them.
        task: one of ``TASKS``.
        metrics: by CLIP_benchmark's names, shares from 0 to 1; None where a metric does not apply.
        details: all else, of JSON's kinds of values; ``main_metric`` names the metric that stands for the whole.
        language: of the class names and captions.
    """

    dataset: str
    model: str
    pretrained: str
    task: str
    metrics: dict[str, float | None]
    details: dict[str, Any] = field(default_factory=dict)
    language: str = "en"

    @property
    def value(self) -> float | None:
        """The main metric's value."""
        name = self.details.get("main_metric")
        return self.metrics.get(name) if isinstance(name, str) else None

    @property
    def file_name(self) -> str:
        """The name of its file, after CLIP_benchmark's template, which no other result has."""
        parts = (self.dataset, self.pretrained, self.model, self.language, self.task)
        name = "_".join(_in_file_name(part) for part in parts)
        if len(name) > _MAX_NAME_CHARS or any(_in_file_name(part) != part for part in parts):
            # Two paths may look alike without their slashes.
            digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
            name = f"{name[: _MAX_NAME_CHARS - 60]}_{digest}_{self.task}"
        return f"{name}.json"

    def to_dict(self) -> dict[str, Any]:
        """Return the object that its file holds; raise ValueError for a number that is not finite."""
        record: dict[str, Any] = {
            "dataset": self.dataset,
            "model": self.model,
            "pretrained": self.pretrained,
            "task": self.task,
            "metrics": self.metrics,
            "language": self.language,
            "clipcore": self.details,
        }
        json.dumps(record, allow_nan=False)
        return record


def write_result(folder: Path, result: Result) -> Path:
    """Write a result into a folder, in place of an older one of the same model, data set and task; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / result.file_name
    content = json.dumps(result.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)
    write_durably(path, content.encode() + b"\n")
    _write_lines(folder)
    return path


def read_results(folder: Path) -> list[Result]:
    """Return the results in a folder, CLIP_benchmark's own among them, in the order of their files' names.

    Raises:
        DataError: there is no folder, none in it, or one that cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder of results {folder}")
    found = [result for path in sorted(folder.glob("*.json")) if (result := _read(path))]
    if not found:
        raise DataError(
            f"{folder} holds no results; python -m clipcore.evaluate zero-shot --output {folder} writes them"
        )
    return found


def _read(path: Path) -> Result | None:
    """Return the result in a file; None of another kind of file."""
    try:
        record = json.loads(read_regular(path, _MAX_RESULT_BYTES))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {printable(str(error))}; remove it") from None
    keys = ("dataset", "model", "pretrained", "task")
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
        return None
    metrics, details = record.get("metrics"), record.get("clipcore", {})
    if not isinstance(metrics, dict) or not isinstance(details, dict):
        raise DataError(f"{path} has no metrics; evaluate it anew, or remove it")
    numbers = {str(name): _number(value) for name, value in metrics.items()}
    language = str(record.get("language", "en"))
    dataset, model, pretrained, task = (record[key] for key in keys)
    return Result(dataset, model, pretrained, task, numbers, details, language)


def _number(value: object) -> float | None:
    """Return a metric; None where it is not a finite number, as CLIP_benchmark's acc5 of few classes is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # of a whole number of many digits
        return None


def _write_lines(folder: Path) -> None:
    """Write the line of each zero-shot and retrieval result, as datacomp's evaluations do."""
    lines = [
        json.dumps(_line(result), allow_nan=False, ensure_ascii=False) + "\n"
        for result in read_results(folder)
        if result.task in (ZERO_SHOT, RETRIEVAL)
    ]
    if lines:
        write_durably(folder / LINES_FILE, "".join(lines).encode())


def _line(result: Result) -> Mapping[str, Any]:
    key = re.sub(r"^wds[_-]", "", result.dataset)
    return {
        "key": key,
        "dataset": result.dataset,
        "metrics": {**result.metrics, "main_metric": result.value},
        "model": result.model,
        "pretrained": result.pretrained,
    }


def models_of(results: Iterable[Result]) -> list[tuple[str, str]]:
    """Return (model, pretrained) of results, each once, in their order."""
    return list(dict.fromkeys((result.model, result.pretrained) for result in results))


def _in_file_name(text: str) -> str:
    """Return a text fit for a part of a file's name."""
    return re.sub(r"[^\w.+-]", "-", text.replace("/", "-"), flags=re.ASCII)


def find_result(folder: Path, like: Result) -> Result | None:
    """Return the result of the same model, data set and task in a folder; None where there is none."""
    path = folder / like.file_name
    return _read(path) if path.is_file() else None
