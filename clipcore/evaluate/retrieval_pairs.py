"""Opens images with captions as retrieval sets, in any layout of training data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipcore.data import PairSource
from clipcore.data.drawing import DrawnSource
from clipcore.data.parquet import ParquetSource
from clipcore.data.pictures import ChosenRows, by_picture
from clipcore.data.sources import MixtureSource
from clipcore.data.tar import TarImages
from clipcore.data.transforms import Decoder
from clipcore.evaluate.splits import (
    EvaluationSet,
    Split,
    files_fingerprint,
    keys_of,
    left_out_notes,
    members_hash,
    opened_once,
)
from clipcore.evaluate.suites import main_metric


def pairs_split(name: str, rows: PairSource, folder: str | Path, decoder: Decoder) -> Split:
    """Return a split of images with captions; each image occurs once, with the captions of all its rows.

    Args:
        name: the name of the split.
        rows: the pairs, from ``open_source``.
        folder: the folder of the pairs.
        decoder: the decoder that reads them.
    """
    source = by_picture(rows)
    return Split(
        name=name,
        source=source,
        labels_N=None,
        fingerprint=lambda: fingerprint_of_pairs(rows, folder, decoder),
        keys=lambda: keys_of(source),
        notes=left_out_notes(name, source),
    )


def pairs_set(name: str, rows: PairSource, folder: str | Path, decoder: Decoder) -> EvaluationSet:
    """Return a data set with one split, test, for retrieval; the arguments are those of ``pairs_split``."""
    return EvaluationSet(
        name=name,
        task="retrieval",
        classnames=(),
        templates=(),
        split_names=("test",),
        main_metric=main_metric(name, "retrieval"),
        open_split=opened_once(lambda split: pairs_split(split, rows, folder, decoder)),
    )


def fingerprint_of_pairs(rows: PairSource, folder: str | Path, decoder: Decoder) -> str:
    """Return a hash of the names, sizes and times of the files that hold a source's images; see ``pairs_split``."""
    return files_fingerprint(_files_of(rows), folder, len(rows), _choice_of(rows), decoder)


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


def _choice_of(source: Any) -> tuple[object, ...]:
    """Return an object that identifies a source's images among others in the same files."""
    if isinstance(source, MixtureSource):
        return tuple(_choice_of(part) for part in source.parts)
    if isinstance(source, ChosenRows):
        return (hashlib.sha256(source.rows_N.tobytes()).hexdigest(), *_choice_of(source.table))
    if isinstance(source, ParquetSource):
        return (source.image_column,)
    if isinstance(source, DrawnSource):
        return (source.name,)
    return (members_hash(source.shards),) if isinstance(source, TarImages) else ()
