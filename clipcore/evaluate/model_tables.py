"""Reads a user's tables of models for a study: accuracies of baseline models, or the compute of models."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcore.data import DataError
from clipcore.evaluate.scores import Model, listed
from clipcore.files import not_utf8, read_regular
from clipcore.towers.architectures import OPENAI_NAMES, is_finite_number, shortened

# More rows than any table of models has.
_MAX_BYTES, _MAX_ROWS = 1 << 20, 10_000
_COMPUTE_COLUMNS = ("gmacs", "compute")


@dataclass(frozen=True)
class Row:
    """A row of a table, by column.

    Attributes:
        where: the file and the line, for messages.
    """

    where: str
    cells: Mapping[str, str]

    def number(self, column: str) -> float | None:
        """Return a cell's number, None for an empty cell; raise DataError if it is not a finite number."""
        cell = self.cells[column].strip()
        if not cell:
            return None
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(
                f"{self.where}: {column} is {shortened(cell)}, not a number; correct it"
            )
        return value


def read_rows(path: Path) -> tuple[list[str], list[Row]]:
    """Return the columns of a csv table and its rows.

    Raises:
        DataError: it cannot be read, has no column ``model``, two equal column names, or a row of another length.
    """
    content = _read(path)
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        columns = [name.strip() for name in next(reader, [])]
        if "model" not in columns or len(set(columns)) < len(columns):
            raise DataError(
                f"{path} is a table with a column model, and each column once; its first line has {listed(columns)}"
            )
        rows = []
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if cells and len(cells) != len(columns):
                raise DataError(
                    f"{where}: {len(cells)} fields under {len(columns)} columns; correct it"
                )
            if cells:
                rows.append(Row(where, dict(zip(columns, cells, strict=True))))
            if len(rows) > _MAX_ROWS:
                raise DataError(
                    f"{path} has more than {_MAX_ROWS:,} rows, which no table of models has"
                )
    except csv.Error as error:
        raise DataError(f"{path} is not a csv table: {error}; correct it") from None
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(str(path), error)) from None
    return columns, rows


def read_compute(path: Path) -> dict[Model, float]:
    """Return the compute of models in a csv table or a JSON object; an empty ``pretrained`` stands for all weights.

    A table has the columns ``model`` and ``gmacs`` (or ``compute``), and may have ``pretrained`` and ``samples``, the number
    of training images, by which the GMACs are multiplied. An object has numbers by model.

    Raises:
        DataError: it cannot be read, or has no positive number for a model, or two numbers.
    """
    pairs = _json_pairs(path) if path.suffix.lower() == ".json" else _csv_pairs(path)
    found: dict[Model, float] = {}
    for where, model, compute in pairs:
        if compute is None or not 0 < compute < math.inf:
            raise DataError(f"{where}: the compute of {model} is not a positive number; correct it")
        if model in found:
            raise DataError(
                f"{where}: {model} is there twice; remove one, or tell them by pretrained"
            )
        found[model] = compute
    return found


def compute_of(table: Mapping[Model, float], model: Model) -> float | None:
    """Return the compute of a model by its weights, else by its architecture; None for an unknown one."""
    name = _spelled(model.model)
    return table.get(Model(name, model.pretrained), table.get(Model(name, "")))


def _csv_pairs(path: Path) -> list[tuple[str, Model, float | None]]:
    columns, rows = read_rows(path)
    column = next((name for name in _COMPUTE_COLUMNS if name in columns), None)
    if column is None:
        raise DataError(f"{path} has no column gmacs or compute; its columns are {listed(columns)}")
    found = []
    for row in rows:
        compute = row.number(column)
        if "samples" in columns and compute is not None:
            compute *= row.number("samples") or 0.0
        model = Model(_spelled(row.cells["model"].strip()), row.cells.get("pretrained", "").strip())
        found.append((row.where, model, compute))
    return found


def _json_pairs(path: Path) -> list[tuple[str, Model, float | None]]:
    try:
        record: Any = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}; correct it") from None
    if not isinstance(record, dict):
        raise DataError(f'{path} is not an object of numbers by model, such as {{"ViT-B-32": 4.4}}')
    return [
        (str(path), Model(_spelled(name), ""), value if is_finite_number(value) else None)
        for name, value in record.items()
    ]


def _read(path: Path) -> bytes:
    try:
        content = read_regular(path, _MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > _MAX_BYTES:
        raise DataError(f"{path} has more than 1 MB, which no table of models has")
    return content


def _spelled(name: str) -> str:
    """Return a model's name as open_clip spells it."""
    return OPENAI_NAMES.get(name, name)
