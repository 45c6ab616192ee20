"""Opens the source of pairs that ``--train-data`` names."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from clipcore.data import BadSample, DataError, LeftOut, Pair, PairSource, printable, remote
from clipcore.data.caption_lists import CAPTION_LIST_SUFFIXES, open_caption_list
from clipcore.data.choices import DATASET_TYPES, DEFAULT_CAPTION_KEY, DEFAULT_IMAGE_KEY
from clipcore.data.folders import open_folder
from clipcore.data.local_copies import LocalCopies
from clipcore.data.parquet import ParquetSource
from clipcore.data.remote import PACKAGES, check_url, is_remote, shown, without_query
from clipcore.data.tables import (
    CsvSource,
    JsonlSource,
    caption_columns,
)
from clipcore.data.tar import TarSource
from clipcore.data.transforms import MAX_PIXELS, Decoder, check_decoder

__all__ = ["BadSample", "DataError", "MixtureSource", "Pair", "PairSource", "open_source"]

_SUFFIX_TYPES = {
    ".tar": "webdataset",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    # Not a --dataset-type: a file with another suffix is never a list of captions.
    **dict.fromkeys(CAPTION_LIST_SUFFIXES, "captions"),
}
_MAX_EXPANSION = 1_000_000
# Samples whose captions make a vocabulary: more take minutes and change few merges.
_MAX_SPREAD_SAMPLES = 200_000
MAX_FACTOR = 1_000_000


def open_source(
    train_data: str | Sequence[str],
    dataset_type: str = "auto",
    *,
    img_key: str = DEFAULT_IMAGE_KEY,
    caption_key: str = DEFAULT_CAPTION_KEY,
    separator: str | None = None,
    quotes: bool = True,
    upsampling_factors: str | None = None,
    decoder: str = "pillow",
    min_side: int = 0,
    max_pixels: int = MAX_PIXELS,
    cache_gb: float | None = None,
) -> PairSource:
    """Open image-caption pairs.

    Args:
        train_data: a file, a folder, or a pattern of them: ``{0000..0012}`` and ``{a,b}`` as in a shell, ``*`` and
            ``?`` (quote them); several joined by ``::`` or in a list. A folder that holds ``.tar`` files means those; a
            ``.txt`` or ``.token`` file is a table of captions, see ``open_caption_list``. Shards, folders of shards and
            tables may be URLs, see ``clipcore.data.remote``, and so may the images that a table names.
        dataset_type: one of ``DATASET_TYPES``; ``auto`` decides by the suffixes. ``synthetic`` needs no data.
        img_key, caption_key, separator, quotes: for csv tables, see ``CsvSource``. Where a table has no column of the two
            default names, and in other formats, the first usual name that is present is used (``image``, ``caption``,
            ``text``, ...).
        upsampling_factors: one number for each part between ``::``, such as ``1::2.5``: how often a sample of that part
            is seen, relative to the others; see ``MixtureSource``.
        decoder, min_side, max_pixels: see ``clipcore.data.transforms.Decoder``.
        cache_gb: how many GB local copies of URLs may take, see ``clipcore.data.local_copies``.

    Raises:
        DataError: the data are missing, damaged, empty or of an unknown kind; one line that names the remedy.

    Example:
        >>> source = open_source("shards/{00000..00041}.tar")  # doctest: +SKIP
        >>> source[0].caption  # doctest: +SKIP
        'a dog on a beach'
    """
    if dataset_type not in DATASET_TYPES:
        raise DataError(f"the data set types are {', '.join(DATASET_TYPES)}; got {dataset_type!r}")
    check_decoder(decoder)
    if dataset_type == "synthetic":
        return SyntheticSource()
    table = _Table(img_key, caption_key, separator, quotes)
    patterns = train_data.split("::") if isinstance(train_data, str) else list(train_data)
    chosen, copies = Decoder(decoder, min_side, max_pixels), LocalCopies(cache_gb)
    parts = [_open_part(part, dataset_type, chosen, table, copies) for part in patterns]
    if upsampling_factors is not None:
        return MixtureSource(parts, parse_factors(upsampling_factors, len(parts)))
    return parts[0] if len(parts) == 1 else MixtureSource(parts)


def parse_factors(text: str, num_parts: int) -> list[float]:
    """Return the numbers of ``--train-data-upsampling-factors``."""
    try:
        factors = [float(word) for word in text.split("::")]
    except ValueError:
        raise DataError(
            f"--train-data-upsampling-factors are numbers joined by ::, got {text!r}"
        ) from None
    if len(factors) != num_parts or not all(0 < factor < float("inf") for factor in factors):
        raise DataError(
            f"--train-data-upsampling-factors needs a positive number for each of the {num_parts} parts of the data, "
            f"got {text!r}"
        )
    return factors


class _Table(NamedTuple):
    """The settings for csv tables."""

    img_key: str
    caption_key: str
    separator: str | None
    quotes: bool


def _open_part(
    pattern: str, dataset_type: str, decoder: Decoder, table: _Table, copies: LocalCopies
) -> PairSource:
    """Return the source of one part between ``::``."""
    if pattern.startswith("pipe:"):
        raise DataError(
            f"{printable(pattern)}: what a command prints cannot be read at random; name the URL itself "
            f"({', '.join(f'{kind}://' for kind in PACKAGES)}), or a local path"
        )
    paths = expand_pattern(pattern)
    name = os.path.basename(os.path.normpath(without_query(pattern)))
    compressed: list[str] = []
    if dataset_type in ("auto", "webdataset") and is_folder(paths[0]):
        shards = [shard for path in paths for shard in list_shards(path)]
        compressed = [
            os.path.basename(shard)
            for path in paths
            for ending in ("*.tar.*", "*.tgz")
            for shard in sorted(glob.glob(f"{glob.escape(path)}/{ending}"))
            if shard.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst"))
        ]
        paths, dataset_type = (shards, "webdataset") if shards else (paths, dataset_type)
    kind = _detect(paths[0]) if dataset_type == "auto" else dataset_type
    if kind == "webdataset":
        named_caption = None if table.caption_key == DEFAULT_CAPTION_KEY else table.caption_key
        source = TarSource(paths, caption_columns(named_caption), decoder, name, copies)
        for shard in compressed:
            source.left_out.add("compressed shard, to be gunzipped", shard)
        return source
    if len(paths) > 1:
        parts = [_open_part(path, kind, decoder, table, copies) for path in paths]
        return MixtureSource(parts, name=name)
    if is_remote(paths[0]):
        return _open_remote_table(paths[0], kind, decoder, table, copies)
    return _open_local(paths[0], kind, decoder, table, None)


def _open_remote_table(
    url: str, kind: str, decoder: Decoder, table: _Table, copies: LocalCopies
) -> PairSource:
    """Return the pairs of a table that is a URL, read from its local copy."""
    if kind == "folder":
        raise DataError(
            f"{shown(url)} holds no .tar files, and other folders are read from local disks only; name the shards or the "
            "table in it, or copy it first"
        )
    copy = copies.take(url, remote.state_of(url))
    if copy is None:
        raise DataError(
            f"{shown(url)}: there is no room for the table's local copy in {copies.described()}; raise --data-cache-gb "
            "or CLIPCORE_DATA_CACHE_GB, or make room in the user's cache folder"
        )
    try:
        return _open_local(str(copy), kind, decoder, table, os.path.dirname(without_query(url)))
    except DataError as error:
        # The user knows the URL, and not the path of its copy.
        raise DataError(str(error).replace(str(copy), shown(url))) from None


def _open_local(
    path: str, kind: str, decoder: Decoder, table: _Table, folder: str | None
) -> PairSource:
    """Return the pairs of one table or folder.

    Args:
        folder: where relative paths of images begin [the table's folder].
    """
    named_image = None if table.img_key == DEFAULT_IMAGE_KEY else table.img_key
    named_caption = None if table.caption_key == DEFAULT_CAPTION_KEY else table.caption_key
    if kind == "csv":
        keys = (table.img_key, table.caption_key, table.separator)
        return CsvSource(path, *keys, decoder=decoder, quotes=table.quotes, folder=folder)
    if kind == "captions":
        columns = (named_image, named_caption, table.separator)
        return open_caption_list(path, *columns, decoder, table.quotes, folder)
    if kind == "folder":
        return open_folder(path, named_image, named_caption, decoder, table.quotes)
    if kind == "jsonl":
        return JsonlSource(path, named_image, named_caption, decoder, folder)
    return ParquetSource(path, named_image, named_caption, decoder)


def is_folder(path: str) -> bool:
    """Return whether a path is a folder; a URL is one if its last part has no suffix of data, or ends with a slash."""
    if not is_remote(path):
        return os.path.isdir(path)
    suffix = os.path.splitext(without_query(path))[1].lower()
    return path.endswith("/") or suffix not in (*_SUFFIX_TYPES, ".gz", ".tgz")


def list_shards(folder: str) -> list[str]:
    """Return the tar files in a folder, in order; raise RemoteError for a URL that cannot be listed."""
    if is_remote(folder):
        return remote.list_objects(f"{folder.rstrip('/')}/*.tar")
    return sorted(glob.glob(f"{glob.escape(folder)}/*.tar"))


def _detect(path: str) -> str:
    """Return the kind of data by the path's suffix."""
    if is_folder(path):
        return "folder"
    suffix = os.path.splitext(without_query(path))[1].lower()
    if path.lower().endswith((".tar.gz", ".tgz")):
        return "webdataset"  # whose reader names the remedy
    if suffix in _SUFFIX_TYPES:
        return _SUFFIX_TYPES[suffix]
    if not os.path.exists(path):
        raise DataError(f"there is no {path}")
    raise DataError(
        f"{path}: the suffix does not tell the kind of data; name it with --dataset-type "
        f"({', '.join(DATASET_TYPES[1:])})"
    )


def expand_pattern(pattern: str) -> list[str]:
    """Return the paths of a pattern, at least one: braces are expanded first, then ``*`` and ``?`` match existing files.

    Raises:
        DataError: a brace is not closed, or no file matches.
    """
    paths: list[str] = []
    for path in expand_braces(pattern):
        if is_remote(path):
            paths += _expand_url(path)
        elif os.path.exists(path) or not re.search(r"[*?]", path):
            paths.append(path)
        elif not (found := sorted(glob.glob(path, recursive=True))):
            raise DataError(f"no file matches the pattern {path}")
        else:
            paths += found
    return paths


def _expand_url(url: str) -> list[str]:
    """Return the URLs of a pattern; in a URL of http, a question mark begins the query."""
    check_url(url)
    if not re.search(r"[*?]", without_query(url)):
        return [url]
    if not (found := remote.list_objects(url)):
        raise DataError(f"no object matches the pattern {shown(url)}")
    return found


def expand_braces(pattern: str) -> list[str]:
    """Yield the expansions of ``{0000..0012}`` (width kept) and ``{a,b}`` in order, as in a shell, also nested."""
    if os.path.exists(pattern):
        return [pattern]
    choices: list[list[str]] = []
    count = 1
    for text, group in _split_braces(pattern):
        expanded = [text] if group is None else _alternatives(group, pattern)
        count *= len(expanded)
        if count > _MAX_EXPANSION:
            raise DataError(f"{pattern} means more than {_MAX_EXPANSION} files")
        choices.append(expanded)
    return ["".join(words) for words in itertools.product(*choices)]


def _split_braces(pattern: str) -> list[tuple[str, str | None]]:
    """Yield (literal, None) and ("", content of braces) in turn."""
    pieces: list[tuple[str, str | None]] = []
    depth, start = 0, 0
    for position, char in enumerate(pattern):
        if char == "{":
            if depth == 0:
                pieces.append((pattern[start:position], None))
                start = position + 1
            depth += 1
        elif char == "}" and depth:
            depth -= 1
            if depth == 0:
                pieces.append(("", pattern[start:position]))
                start = position + 1
    if depth:
        raise DataError(f"{pattern}: a brace is not closed")
    return [*pieces, (pattern[start:], None)]


def _alternatives(group: str, pattern: str) -> list[str]:
    """Return the alternatives in one pair of braces."""
    if (ends := re.fullmatch(r"(\d+)\.\.(\d+)", group)) is not None:
        first, last = int(ends[1]), int(ends[2])
        if abs(last - first) >= _MAX_EXPANSION:
            raise DataError(f"{pattern} means more than {_MAX_EXPANSION} files")
        width = max(map(len, ends.groups())) if "0" in (ends[1][0], ends[2][0]) else 0
        step = 1 if last >= first else -1
        return [f"{number:0{width}d}" for number in range(first, last + step, step)]
    words, depth = [""], 0
    for char in group:
        depth += (char == "{") - (char == "}")
        if char == "," and not depth:
            words.append("")
        else:
            words[-1] += char
    if len(words) == 1:
        raise DataError(
            f"{pattern}: {{{group}}} is neither a range such as {{000..012}} nor a list"
        )
    return [path for word in words for path in expand_braces(word)]


def names_pairs(data: str) -> bool:
    """Return whether a name is one of data with images, by its form: a folder, URL, pattern, mixture, shard or table.

    Another file is text, such as captions of which each has a line.
    """
    kind = _SUFFIX_TYPES.get(os.path.splitext(data)[1].lower())
    is_one_file = not any(sign in data for sign in ("::", "{", "*", "?")) or os.path.exists(data)
    return not is_one_file or is_folder(data) or is_remote(data) or kind not in (None, "captions")


def spread_captions(source: PairSource) -> Iterator[str]:
    """Yield the captions of evenly spread samples, of all where they are few; those that cannot be read are left out."""
    number = min(len(source), _MAX_SPREAD_SAMPLES)
    for place in range(number):
        try:
            captions = source.captions(place * len(source) // number)
        except BadSample:
            continue
        yield from [captions] if isinstance(captions, str) else captions


def left_out_of(source: PairSource) -> LeftOut:
    """Return the items that a source skips; none for sources that skip nothing."""
    return getattr(source, "left_out", None) or LeftOut()


def noted_of(source: PairSource) -> LeftOut:
    """Return the settings that a source inferred from its files; none for sources that infer nothing."""
    return getattr(source, "noted", None) or LeftOut()


class MixtureSource:
    """Several sources as one: see ``clipcore.data.PairSource``.

    An epoch reads every sample of the source with the smallest factor once, and every sample of another source
    factor / smallest times. If that is not an integer, an evenly spread part of its samples is read once more. The relative
    frequencies are thus those of open_clip's upsampling factors, which multiply a source's natural share, its size.

    Args:
        parts: the sources, in the order of their indices.
        factors: one positive number each [all equal].
        name: for messages [the names of the parts].
    """

    def __init__(
        self, parts: Sequence[PairSource], factors: Sequence[float] | None = None, name: str = ""
    ) -> None:
        self.parts = list(parts)
        factors = [1.0] * len(self.parts) if factors is None else factors
        self.name = name or "::".join(part.name for part in self.parts)
        self.left_out, self.noted = LeftOut(), LeftOut()
        for part in self.parts:
            self.left_out.update(left_out_of(part))
            self.noted.update(noted_of(part))
        smallest, largest = min(factors), max(factors)
        if largest > MAX_FACTOR * smallest:
            raise DataError(
                f"the factors {largest:g} and {smallest:g} of mixed sources are further apart than {MAX_FACTOR:,} times"
            )
        lengths = [
            round(
                len(part) * factor / smallest if factor < 1e100 else len(part) * (factor / smallest)
            )
            for part, factor in zip(self.parts, factors, strict=True)
        ]
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Pair:
        number, row = self.locate(index)
        return self.parts[number][row]

    def captions(self, index: int) -> str | Sequence[str]:
        """Return the caption or captions of a sample; raise BadSample."""
        number, row = self.locate(index)
        return self.parts[number].captions(row)

    def locate(self, index: int) -> tuple[int, int]:
        """Return (source, index in it) of a sample of the mixture."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        length = int(self._ends[number]) - start
        return number, (index - start) * len(self.parts[number]) // length


class SyntheticSource:
    """Noise with numbered captions, to time a run without data."""

    name = "synthetic"

    def __init__(self, num_samples: int = 1_000_000, image_size: int = 224) -> None:
        self._num_samples = num_samples
        self._image_size = image_size

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shape = (self._image_size, self._image_size, 3)
        noise = np.random.default_rng(index).integers(0, 256, shape, np.uint8)
        return Pair(noise, self.captions(index), f"synthetic/{index}")

    def captions(self, index: int) -> str:
        """Return the caption of a picture."""
        return f"picture number {index} of noise"
