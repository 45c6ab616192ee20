"""Opens what ``--train-data`` names: tar shards, tables, parquet, folders, synthetic pairs, and mixtures of them."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clipcore.data.pairs import DataError, Pair, PairSource
from clipcore.data.tables import ParquetSource, csv_source, folder_source, jsonl_source
from clipcore.data.tar import TarSource
from clipcore.data.transforms import DECODERS

KINDS = {
    ".tar": "webdataset",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
}


def open_source(
    train_data: str,
    dataset_type: str = "auto",
    *,
    img_key: str = "filepath",
    caption_key: str = "title",
    separator: str = "\t",
    upsampling_factors: str | None = None,
    decoder: str = "pillow",
) -> PairSource:
    """The pairs that a path or pattern names.

    Args:
        train_data: a file, a folder, or a pattern with ``{000..099}``, ``{a,b}`` or ``*``; ``a::b`` mixes sources.
        dataset_type: ``webdataset``, ``csv``, ``jsonl``, ``parquet``, ``folder``, ``synthetic``; ``auto`` goes by the
            name's ending.
        img_key, caption_key, separator: of a table.
        upsampling_factors: ``1::2``, how often each mixed source is seen in an epoch, relative to its size; as many
            numbers as sources.
        decoder: one of ``pillow``, ``simplejpeg``.

    Raises:
        DataError: names the file and the remedy.
    """
    if decoder not in DECODERS:
        raise DataError(f"--image-decoder knows {', '.join(DECODERS)}, not {decoder!r}")
    if decoder == "simplejpeg":
        _need_simplejpeg()
    parts = train_data.split("::")
    opened = [_open_one(part, dataset_type, img_key, caption_key, separator, decoder) for part in parts]
    if upsampling_factors is None:
        return opened[0] if len(opened) == 1 else MixtureSource(opened, [1.0] * len(opened))
    try:
        factors = [float(factor) for factor in upsampling_factors.split("::")]
    except ValueError:
        factors = []
    if len(factors) != len(opened) or not all(0 < factor < math.inf for factor in factors):
        raise DataError(
            f"--train-data-upsampling-factors {upsampling_factors} should be {len(opened)} positive numbers joined by "
            "'::', one for each source of --train-data"
        )
    return MixtureSource(opened, factors)


def _need_simplejpeg() -> None:
    try:
        import simplejpeg  # noqa: F401
    except ImportError as error:
        raise DataError('--image-decoder simplejpeg needs it: pip install "clipcore[jpeg]"') from error


def _open_one(
    pattern: str, kind: str, img_key: str, caption_key: str, separator: str, decoder: str
) -> PairSource:
    if kind == "synthetic":
        return SyntheticSource()
    paths = expand(pattern)
    if kind == "auto":
        is_folder = len(paths) == 1 and paths[0].is_dir()
        kind = "folder" if is_folder else KINDS.get(paths[0].suffix.lower(), "")
        if not kind:
            raise DataError(
                f"cannot tell what {pattern} is: no such folder, and no ending of {', '.join(KINDS)}; set --dataset-type"
            )
    if kind == "webdataset":
        return TarSource(paths, decoder)
    if missing := next((path for path in paths if not path.exists()), None):
        raise DataError(f"there is no {missing}; check --train-data")
    if kind == "parquet":
        return ParquetSource(paths, img_key, caption_key, decoder)
    sources: list[PairSource] = []
    for path in paths:
        if kind == "folder":
            sources.append(folder_source(path, decoder))
        elif kind == "jsonl":
            sources.append(jsonl_source(path, img_key, caption_key, decoder))
        else:
            sources.append(csv_source(path, img_key, caption_key, separator, decoder))
    return sources[0] if len(sources) == 1 else MixtureSource(sources, [1.0] * len(sources))


def expand(pattern: str) -> list[Path]:
    """The paths of a pattern: ``{000..012}`` and ``{a,b}`` as a shell expands them, then ``*``, ``?`` and ``[]``.

    Raises:
        DataError: a pattern that matches nothing.
    """
    paths: list[Path] = []
    for name in _expand_braces(pattern):
        if any(mark in name for mark in "*?[") and not Path(name).exists():
            found = sorted(glob.glob(name))
            if not found:
                raise DataError(f"nothing matches {name}; check --train-data")
            paths += map(Path, found)
        else:
            paths.append(Path(name))
    return paths


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    body, before, after = match.group(1), pattern[: match.start()], pattern[match.end() :]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    if span is not None:
        low, high = span.groups()
        width = max(len(low), len(high)) if low.startswith("0") or high.startswith("0") else 0
        step = 1 if int(low) <= int(high) else -1
        options = [str(i).zfill(width) for i in range(int(low), int(high) + step, step)]
    elif "," in body:
        options = body.split(",")
    else:
        raise DataError(f"cannot expand {{{body}}} in {pattern}; write {{000..099}} or {{a,b}}")
    return [name for option in options for name in _expand_braces(before + option + after)]


class MixtureSource:
    """Several sources as one: an epoch sees each ``factor`` times, the fraction as that share of its samples.

    The samples of the fraction are spread evenly over the source, and the same in every epoch.
    """

    def __init__(self, sources: Sequence[PairSource], factors: Sequence[float]) -> None:
        self.sources = list(sources)
        self.name = " + ".join(source.name for source in sources)
        counts = [max(1, round(len(s) * f)) for s, f in zip(sources, factors, strict=True)]
        self._counts = counts
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Pair:
        part = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[part - 1]) if part else 0)
        size, count = len(self.sources[part]), self._counts[part]
        whole, rest = divmod(count, size)
        if row >= whole * size:
            return self.sources[part][(row - whole * size) * size // rest]
        return self.sources[part][row % size]


class SyntheticSource:
    """Pictures of noise with numbered captions: for timing a run without its data."""

    name = "synthetic pairs"

    def __init__(self, size: int = 100_000, image_size: int = 256) -> None:
        self.size, self.image_size = size, image_size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Pair:
        rng = np.random.default_rng(index)
        pixels = rng.integers(0, 256, (self.image_size, self.image_size, 3), dtype=np.uint8)
        return Pair(pixels, f"a picture of noise, number {index}", f"synthetic/{index}")
