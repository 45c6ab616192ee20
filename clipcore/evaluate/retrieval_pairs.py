"""Images with captions as sets for retrieval: whatever a model can be trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipcore.data import PairSource
from clipcore.data.parquet import ParquetSource
from clipcore.data.pictures import ChosenRows, by_picture
from clipcore.data.sources import MixtureSource
from clipcore.data.tar import TarImages
from clipcore.evaluate.splits import (
    EvaluationSet,
    Split,
    files_fingerprint,
    keys_of,
    left_out_notes,
    opened_once,
)
from clipcore.evaluate.suites import main_metric


def pairs_split(name: str, rows: PairSource, folder: str | Path) -> Split:
    """Return a split of images with captions, each image once with the captions of all rows that name it.

    Args:
        name: of the split.
        rows: the pairs as ``open_source`` reads them.
        folder: in which they lie.
    """
    source = by_picture(rows)
    return Split(
        name=name,
        source=source,
        labels_N=None,
        fingerprint=lambda: files_fingerprint(_files_of(rows), folder, len(rows), _choice_of(rows)),
        keys=lambda: keys_of(source),
        notes=left_out_notes(name, source),
    )


def pairs_set(name: str, rows: PairSource, folder: str | Path) -> EvaluationSet:
    """Return a data set of one split, test, for retrieval; arguments as of ``pairs_split``."""
    return EvaluationSet(
        name=name,
        task="retrieval",
        classnames=(),
        templates=(),
        split_names=("test",),
        main_metric=main_metric(name, "retrieval"),
        open_split=opened_once(lambda split: pairs_split(split, rows, folder)),
    )


def _files_of(source: Any) -> Iterator[str]:
    """Yield the paths of the files that hold a source's images."""
    if isinstance(source, MixtureSource):
        for part in source.parts:
            yield from _files_of(part)
    elif isinstance(source, ChosenRows) and isinstance(source.table, ParquetSource):
        yield source.table.path
    elif isinstance(source, ParquetSource):
        yield source.path
    elif isinstance(source, TarImages):
        yield from (shard.path for shard in source.shards)
    elif hasattr(source, "picture_names"):
        yield from source.picture_names()


def _choice_of(source: PairSource) -> bytes:
    """Return what tells a choice of rows from another of the same table."""
    return source.rows_N.tobytes() if isinstance(source, ChosenRows) else b""
