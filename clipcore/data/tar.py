"""Tar shards in the WebDataset layout, read by index.

A sample is the run of members that share a name up to the first dot: ``0001.jpg`` and ``0001.txt``, or ``0001.json``
with a ``caption``. A shard is scanned once for where its samples lie; the result is kept beside it as
``<shard>.index.npz`` (or in the user's cache where the folder is read-only) and is used while size and time of the shard
stay the same. Members are read in place; nothing is ever extracted, and only regular files are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipcore.data.pairs import BadSample, DataError, Pair, StringTable, clean_caption
from clipcore.data.transforms import decode_image

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("txt", "json")
BLOCK = 512
MAX_NAME_BYTES = 4096
INDEX_VERSION = 1
MAX_OPEN_SHARDS = 64


@dataclass(frozen=True)
class Member:
    """A regular file in a tar archive: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


def scan_members(path: Path) -> Iterator[Member]:
    """The regular files of an uncompressed tar archive, by their headers alone.

    Raises:
        DataError: missing, compressed, truncated, or no tar archive.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"cannot open the shard {path}: {error.strerror}") from error
    try:
        yield from _scan(path, descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _scan(path: Path, descriptor: int, total: int) -> Iterator[Member]:
    position, long_name = 0, None
    while position + BLOCK <= total:
        header = os.pread(descriptor, BLOCK, position)
        if header.count(0) == BLOCK:
            return
        _check_header(path, header, position)
        size, kind, start = _parse_number(path, header[124:136]), header[156:157], position + BLOCK
        if size > total - start:
            raise DataError(
                f"the shard {path} is truncated or corrupt: a member at byte {position} claims {size} bytes of "
                f"{total - start} left"
            )
        position = start + (size + BLOCK - 1) // BLOCK * BLOCK
        if kind in (b"L", b"x"):
            if size > MAX_NAME_BYTES:
                raise DataError(f"the shard {path} is corrupt: a name of {size} bytes at {start}")
            long_name = _long_name(kind, os.pread(descriptor, size, start)) or long_name
            continue
        if kind in (b"0", b"\0", b"7"):
            yield Member(long_name or _short_name(header), start, size)
        # Folders, links, devices and sparse files are no data.
        if kind != b"g":
            long_name = None
    if position > total or not total:
        raise DataError(f"the shard {path} is truncated: it ends in the middle of a member")


def _check_header(path: Path, header: bytes, position: int) -> None:
    """The checksum of a header counts its own eight bytes as spaces."""
    expected = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    stored = header[148:156].strip(b"\0 ")
    if _is_octal(stored) and int(stored, 8) == expected:
        return
    if header[:2] == b"\x1f\x8b":
        raise DataError(
            f"the shard {path} is compressed; unpack it with gunzip, images gain nothing by it"
        )
    raise DataError(
        f"the shard {path} is corrupt or no tar archive (bad header at byte {position}); fetch it again or leave it out"
    )


def _is_octal(text: bytes) -> bool:
    return bool(text) and all(c in b"01234567" for c in text)


def _parse_number(path: Path, field: bytes) -> int:
    """An octal number, or a positive base-256 one."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.strip(b"\0 ")
    if not _is_octal(text):
        raise DataError(f"the shard {path} is corrupt: a member's size is {field!r}")
    return int(text, 8)


def _short_name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:262] == b"ustar" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _long_name(kind: bytes, data: bytes) -> str | None:
    """The name in a GNU long-name member or in a pax header."""
    if kind == b"L":
        return data.split(b"\0")[0].decode("utf-8", "surrogateescape")
    for record in data.split(b"\n"):
        _, _, assignment = record.partition(b" ")
        key, _, value = assignment.partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
    return None


def split_name(name: str) -> tuple[str, str]:
    """(key, extension): WebDataset splits a name at the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of a shard lie: for each [image offset, image size, caption offset, caption size, is JSON]."""

    places_N5: np.ndarray
    keys: StringTable


def build_index(path: Path) -> ShardIndex:
    """Scans a shard for samples that have both an image and a caption.

    Raises:
        DataError: an unreadable shard, a member that occurs twice, or no sample at all.
    """
    places, keys = [], []
    for key, members in _samples(path):
        image = next((members[e] for e in IMAGE_EXTENSIONS if e in members), None)
        kind = next((e for e in CAPTION_EXTENSIONS if e in members), None)
        if image is not None and kind is not None:
            text = members[kind]
            places.append((image.offset, image.size, text.offset, text.size, kind == "json"))
            keys.append(key)
    if not places:
        raise DataError(
            f"the shard {path} holds no sample with an image ({', '.join(IMAGE_EXTENSIONS)}) and a caption (txt, json)"
        )
    return ShardIndex(np.array(places, dtype=np.int64), StringTable(keys))


def _samples(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    current, members = None, dict[str, Member]()
    for member in scan_members(path):
        key, extension = split_name(member.name)
        if key != current:
            if current is not None:
                yield current, members
            current, members = key, {}
        if extension in members:
            raise DataError(f"the shard {path} holds {member.name} twice")
        members[extension] = member
    if current is not None:
        yield current, members


def load_index(path: Path) -> ShardIndex:
    """The index of a shard: the kept one while the shard is unchanged, else a new one, which is kept."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(
            f"cannot find the shard {path}: {error.strerror}; check the pattern of --train-data"
        ) from error
    stamp = np.array([INDEX_VERSION, status.st_size, status.st_mtime_ns])
    places = [path.with_name(path.name + ".index.npz"), _cache_path(path)]
    for place in places:
        try:
            with np.load(place, allow_pickle=False) as kept:
                if np.array_equal(kept["stamp"], stamp):
                    keys = kept["keys"].tobytes().decode("utf-8", "surrogatepass").split("\0")
                    return ShardIndex(kept["places"], StringTable(keys))
        except (OSError, ValueError, KeyError, EOFError):
            continue
    index = build_index(path)
    keys_text = "\0".join(index.keys[i] for i in range(len(index.keys)))
    arrays = {
        "stamp": stamp,
        "places": index.places_N5,
        "keys": np.frombuffer(keys_text.encode("utf-8", "surrogatepass"), dtype=np.uint8),
    }
    any(_write_atomically(place, arrays) for place in places)
    return index


def _cache_path(path: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return root / "clipcore" / f"{digest}.index.npz"


def _write_atomically(place: Path, arrays: dict[str, np.ndarray]) -> bool:
    """Whether the file could be written; an index that cannot be kept is made again next time."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, suffix=".tmp", delete=False) as file:
            np.savez(file, **arrays)
        os.replace(file.name, place)
    except OSError:
        return False
    return True


class TarSource:
    """The pairs of a list of shards, in the order of the list.

    Raises:
        DataError: a shard that is missing or cannot be read.
    """

    def __init__(self, paths: Sequence[Path], decoder: str = "pillow") -> None:
        self.paths, self.decoder = list(paths), decoder
        self.name = f"tar shards {self.paths[0].name}" + (f" to {self.paths[-1].name}" if len(paths) > 1 else "")
        self.indexes = [load_index(path) for path in self.paths]
        self._ends = np.cumsum([len(index.places_N5) for index in self.indexes])
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Pair:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[shard - 1]) if shard else 0)
        image_at, image_size, text_at, text_size, is_json = self.indexes[shard].places_N5[row].tolist()
        key = f"{self.paths[shard].name}/{self.indexes[shard].keys[row]}"
        text = self._read(shard, text_at, text_size)
        caption = _json_caption(text, key) if is_json else clean_caption(text, key)
        try:
            image = decode_image(self._read(shard, image_at, image_size), self.decoder)
        except BadSample as error:
            raise BadSample(f"{key}: {error}") from error
        return Pair(image, caption, key)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        if shard not in self._open:
            if len(self._open) >= MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            try:
                self._open[shard] = os.open(self.paths[shard], os.O_RDONLY)
            except OSError as error:
                raise DataError(f"the shard {self.paths[shard]} is gone: {error.strerror}") from error
        self._open.move_to_end(shard)
        data = os.pread(self._open[shard], size, offset)
        if len(data) < size:
            raise DataError(f"the shard {self.paths[shard]} has shrunk since it was indexed")
        return data


def _json_caption(data: bytes, key: str) -> str | tuple[str, ...]:
    try:
        record = json.loads(data)
    except ValueError as error:
        raise BadSample(f"{key}: the JSON cannot be read") from error
    found = None
    if isinstance(record, dict):
        found = next((record[name] for name in ("caption", "text") if record.get(name)), None)
    if isinstance(found, list) and found and all(isinstance(item, str) for item in found):
        return tuple(clean_caption(item, key) for item in found)
    if not isinstance(found, str):
        raise BadSample(f"{key}: the JSON has no caption")
    return clean_caption(found, key)
