"""Tar shards in the WebDataset layout, read in any order through a byte index.

A sample is the members with equal names up to the first dot of the last path component: ``a/0001.jpg`` with
``a/0001.txt``, or with ``a/0001.json`` whose object has a caption field. If the text after the first dot is not a known
suffix, names are compared up to the last dot, so that ``shot 1.5 mm.jpg`` finds its caption. Members without a sample are
counted. Raw pixels, ``a/0001.npy`` (``raw.py``), may replace the image file.

The index holds the positions of each image and caption. It is made by one pass over the headers on first use, and kept
beside the shard in ``<shard>.clipcore-index``, else in the user's cache folder, else in memory. It is valid for one size
and modification time of the shard. A shard may be a URL: its index is in the cache folder, valid for one size and version.

A member that clipcore wrote has a hash of its bytes in the header, as the owner's name ``xxh3=1a2b3c4d``, which other
readers ignore. Images and captions are compared with it as they are read.

Nothing is extracted, and names serve only as keys. The headers are read by a dedicated scanner, which accepts regular
files and refuses everything that could point elsewhere (links, devices, sparse files) or that does not fit in the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import threading
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import xxhash

from clipcore.data import BadSample, DataError, LeftOut, Pair, checked_captions, printable
from clipcore.data.local_copies import LocalCopies, is_whole, place_of
from clipcore.data.random_access import FileState, LocalFile, RemoteFile, open_at, state_of
from clipcore.data.raw import RAW_SUFFIX, decode_raw, is_raw
from clipcore.data.remote import BLOCK_BYTES, is_remote, shown, without_query
from clipcore.data.remote import state_of as remote_state_of
from clipcore.data.transforms import Decoder, decode_image
from clipcore.files import cache_folder, read_regular, written_aside

IMAGE_SUFFIXES = ("jpg", "png", "jpeg", "webp")
# In this order: if a sample has both, the .npy is usually not the picture but, for example, an embedding.
MEMBER_IMAGE_SUFFIXES = (*IMAGE_SUFFIXES, RAW_SUFFIX)
CAPTION_SUFFIXES = ("txt", "json")
# Pictures of unsupported kinds, which are counted so that they are not lost silently.
OTHER_IMAGE_SUFFIXES = tuple("gif bmp tif tiff jfif avif heic heif jxl jp2 svg".split())
MAX_NAME_BYTES = 4096  # limit of a long name or an extended header
MAX_IMAGE_BYTES = 1 << 28
MAX_CAPTION_BYTES = 1 << 20
MAX_OPEN_SHARDS = 64
# Remote shards that are copied and indexed at a time, and the bytes between an image and its caption that are cheaper to
# read than a second request.
_SHARDS_AT_ONCE = 8
_MAX_GAP_BYTES = 1 << 16

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_OCTAL = re.compile(rb" *([0-7]*) *(?:\0.*)?", re.DOTALL)
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a pipe",
    b"S": "a sparse file",
    b"M": "a file continued from another archive",
}
_KNOWN_SUFFIXES = {*MEMBER_IMAGE_SUFFIXES, *CAPTION_SUFFIXES, *OTHER_IMAGE_SUFFIXES}
# The owner's name of a member that was written with the hash of its bytes.
_CHECKSUM = re.compile(rb"xxh3=([0-9a-f]{8})\0*")
# The key ends at the first dot of the last path component; the rest is the suffix.
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_METADATA = re.compile(r"__[^/]*__(/|$)")


class Member(NamedTuple):
    """A regular file in a shard: its name, the position of its bytes, and their hash if the header has it, else 0."""

    name: str
    offset: int
    size: int
    checksum: int = 0


def checksum_of(content: bytes) -> int:
    """Return the lower 32 bits of the XXH3 hash of a member's bytes."""
    return xxhash.xxh3_64_intdigest(content) & 0xFFFFFFFF


def checksum_name(content: bytes) -> str:
    """Return the owner's name that records the hash of a member's bytes in its header."""
    return f"xxh3={checksum_of(content):08x}"


def scan_members(path: str, left_out: LeftOut | None = None) -> Iterator[Member]:
    """Return the regular files of a tar file, read from its headers only.

    Args:
        left_out: counts a missing end-of-archive mark.

    Raises:
        DataError: the file is not a tar file, is truncated, or holds something other than plain files and folders.
    """
    with open_at(path, ahead=BLOCK_BYTES) as file:
        end = file.state.size
        if end == 0:
            _refuse(path, "is empty; copy or write the shard again")
        if file.read_at(2, 0) == b"\x1f\x8b":
            _refuse(path, "is compressed, and samples are read at random; gunzip it first")
        offset, long_name, pax = 0, "", dict[str, str]()
        while offset < end:
            header = file.read_at(_BLOCK, offset)
            if header == _ZEROS:
                return
            kind, size, name = _parse_header(path, header, offset)
            data = offset + _BLOCK
            if kind in (b"L", b"K", b"x", b"g"):
                if size > MAX_NAME_BYTES:
                    _refuse(path, f"has an extended header of {size} bytes at byte {offset}")
                block = file.read_at(size, data)
                if kind == b"L":
                    long_name = block.rstrip(b"\0").decode("utf-8", "replace")
                elif kind == b"x":
                    pax = _parse_pax(path, block, offset)
            else:
                name = pax.get("path", long_name or name)
                size = _decimal_size(path, pax["size"], offset) if "size" in pax else size
                size = 0 if kind == b"5" else size  # a folder's size is only a hint; no data follow
                long_name, pax = "", {}
            if data + size > end:
                _refuse(
                    path,
                    f"is cut off or damaged: {printable(name)!r} at byte {offset} needs {size} bytes, "
                    f"{max(end - data, 0)} are left; copy the shard again",
                )
            if kind in _REFUSED:
                _refuse(
                    path,
                    f"holds {_REFUSED[kind]}, {printable(name)!r}; shards hold plain files "
                    "(write them with tar --dereference --hard-dereference)",
                )
            if kind in (b"0", b"\0", b"7") and not name.endswith("/"):
                match = _CHECKSUM.fullmatch(header, 265, 297)
                yield Member(name, data, size, int(match[1], 16) if match else 0)
            offset = data + -(-size // _BLOCK) * _BLOCK
    # All programs end the tar files that they write with blocks of zeros, but not all readers require these.
    if left_out is not None:
        left_out.add("shard without its end, which may be cut off", os.path.basename(path))


def _refuse(path: str, reason: str) -> NoReturn:
    raise DataError(f"{shown(path)} {reason}")


def _parse_header(path: str, header: bytes, offset: int) -> tuple[bytes, int, str]:
    """Return (type, size, name) of a header block."""
    if len(header) < _BLOCK or not _has_checksum(header):
        what = "is not a tar file" if offset == 0 else f"is damaged at byte {offset}"
        _refuse(path, f"{what}: the header's checksum is wrong; copy or write the shard again")
    size_field = header[124:136]
    if size_field[0] & 0x80:
        # Base 256 for large files. A set bit below the flag makes the size negative or far too large.
        size = int.from_bytes(size_field[1:], "big") if size_field[0] == 0x80 else -1
    else:
        size = _octal(size_field)
    if size < 0:
        _refuse(path, f"has a header without a valid size at byte {offset}; write the shard again")
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return header[156:157], size, name.decode("utf-8", "replace")


def _has_checksum(header: bytes) -> bool:
    """Return whether the sum of the bytes, with spaces in the checksum's own field, equals the header's checksum."""
    # The low half of Adler-32 is one more than the sum of the bytes modulo 65521; it is ten times as fast as a sum.
    total = zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF
    stated = _octal(header[148:156])
    return stated >= 0 and (stated + 1) % 65521 == total


def _octal(field: bytes) -> int:
    """Return the number in a field, or -1."""
    match = _OCTAL.fullmatch(field)
    return int(match[1] or b"0", 8) if match else -1


def _parse_pax(path: str, block: bytes, offset: int) -> dict[str, str]:
    """Return the records "length key=value\\n" of an extended header."""
    records, start = {}, 0
    while start < len(block) and block[start]:
        length, _, _ = block[start : start + 8].partition(b" ")
        record = block[start : start + int(length)] if length.isdigit() else b""
        key, equals, value = record[len(length) + 1 : -1].partition(b"=")
        if not equals or not record.endswith(b"\n") or len(record) != int(length):
            _refuse(path, f"has a damaged extended header at byte {offset}; write the shard again")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        start += len(record)
    if any(key.startswith("GNU.sparse") for key in records):
        _refuse(path, f"holds a sparse file at byte {offset}; write it without --sparse")
    return records


def _decimal_size(path: str, text: str, offset: int) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text):
        _refuse(path, f"has an extended header without a valid size at byte {offset}")
    return int(text)


@dataclass(frozen=True)
class ShardIndex:
    """The positions of a shard's samples, in the order of their first members.

    Columns of int64 [N]: image offset, image size, caption offset, caption size, whether the caption is JSON, end of
    the key in ``keys``. ``state`` is the shard's when it was read; ``left_out`` counts the members without a sample.
    ``labels`` are the concatenated bytes of the labels; an index of captions has none. ``checksums_2N`` are the
    hash of each image and caption, 0 where the header has none; [2, 0] if no header of the shard has one.
    """

    path: str
    state: FileState
    columns_6N: np.ndarray
    keys: np.ndarray
    left_out: LeftOut = field(default_factory=LeftOut)
    labels: bytes = b""
    checksums_2N: np.ndarray = field(default_factory=lambda: np.zeros((2, 0), np.uint32))

    def __len__(self) -> int:
        return self.columns_6N.shape[1]

    def key(self, row: int) -> str:
        start = self.columns_6N[5, row - 1] if row else 0
        return bytes(self.keys[start : self.columns_6N[5, row]]).decode("utf-8", "replace")

    def checksums(self, row: int) -> list[int]:
        """Return the hash of a sample's image and of its caption, 0 for one that is not known."""
        return self.checksums_2N[:, row].tolist() if self.checksums_2N.size else [0, 0]


def split_name(name: str) -> tuple[str, str] | None:
    """Return (key, suffix) of a member: its name up to the first dot of the last component, and the rest.

    Return None for a member without a sample: a name without a suffix, or a program's own file.
    """
    match = None if _METADATA.match(name) else _KEY.fullmatch(name)
    return None if match is None else (match[1].removeprefix("./"), match[2])


def build_index(path: str) -> ShardIndex:
    """Return the index of a shard, from its headers. Images and captions without a partner are skipped and counted.

    Raises:
        DataError: see ``scan_members``; or a member occurs twice.
    """
    state = state_of(path)
    left_out = LeftOut()
    samples: dict[str, dict[str, Member]] = {}
    dotted: dict[str, dict[str, Member]] = {}
    for member in scan_members(path, left_out):
        if (parts := split_name(member.name)) is None:
            continue
        key, suffix = parts[0], parts[1].lower()
        stem, _, last = suffix.rpartition(".")
        group = samples
        if stem and last in _KNOWN_SUFFIXES:
            key, suffix, group = f"{key}.{parts[1][: len(stem)]}", last, dotted
        if suffix in OTHER_IMAGE_SUFFIXES:
            left_out.add("picture of another kind", member.name)
        elif suffix in _KNOWN_SUFFIXES:
            members = group.setdefault(key, {})
            if suffix in members:
                _refuse(path, f"holds {printable(member.name)!r} twice; write the shard again")
            members[suffix] = member
    for key, members in dotted.items():
        # "1.mask.png" is an unused field of sample 1; if it has its own text, it is a sample.
        if _first_part(key) not in samples or ("txt" in members and _image_of(members)):
            samples[key] = members
        else:
            _count_further(members, None, left_out)

    columns, keys, checksums = array("q"), bytearray(), array("q")
    for key, members in samples.items():
        image, caption = _image_of(members), _caption_of(members)
        _count_further(members, image, left_out)
        if image is not None and caption is not None:
            keys += printable(key).encode("utf-8", "replace")
            is_json = int("txt" not in members)
            row = (image.offset, image.size, caption.offset, caption.size, is_json, len(keys))
            columns.extend(row)
            checksums.extend((image.checksum, caption.checksum))
        elif image is not None and not image.name.lower().endswith(f".{RAW_SUFFIX}"):
            left_out.add("image without a caption", image.name)
        elif caption is not None:
            left_out.add("caption without an image", caption.name)
    return made_index(path, state, columns, keys, left_out, checksums)


def made_index(
    path: str,
    state: FileState,
    columns: array[int],
    keys: bytearray,
    left_out: LeftOut,
    checksums: array[int],
    labels: bytes = b"",
) -> ShardIndex:
    """Return the index of a shard, given what was collected of its samples one after the other; see ``ShardIndex``."""
    return ShardIndex(
        path,
        state,
        np.frombuffer(columns, np.int64).reshape(-1, 6).T.copy(),
        np.frombuffer(bytes(keys), np.uint8),
        left_out,
        labels,
        _checksum_columns(checksums),
    )


def _checksum_columns(checksums: Sequence[int]) -> np.ndarray:
    """Return the hash of images and captions, in turn, as uint32 [2, N]; [2, 0] if all of them are 0."""
    if not any(checksums):
        return np.zeros((2, 0), np.uint32)
    return np.array(checksums, np.uint32).reshape(-1, 2).T.copy()


def _image_of(members: Mapping[str, Member]) -> Member | None:
    return next((members[s] for s in MEMBER_IMAGE_SUFFIXES if s in members), None)


def _count_further(members: Mapping[str, Member], used: Member | None, left_out: LeftOut) -> None:
    """Count the pictures of a group besides the one that is used; a .npy member there is usually an embedding."""
    for suffix in IMAGE_SUFFIXES:
        if suffix in members and members[suffix] != used:
            left_out.add("further picture of a sample", members[suffix].name)


def _caption_of(members: Mapping[str, Member]) -> Member | None:
    return members.get("txt") or members.get("json")


def _first_part(key: str) -> str:
    """Return a key up to the first dot of its last component."""
    folder, slash, last = key.rpartition("/")
    return folder + slash + last.partition(".")[0]


# Magic, size and modification time of the shard, samples, bytes of the keys and of the skipped members, samples with
# checksums; then the columns, the checksums, the keys, the skipped members as JSON, the labels if the index has any, and a
# CRC-32 of all that.
_SIDECAR = struct.Struct("<8sQQQQQQ")
# 1 did not count .npy members as images, 2 did not count skipped members, 3 lost samples with dots, 4 had no checksums.
_MAGIC = b"CLIPIDX5"


class LabelIndex(NamedTuple):
    """The format of an index of labels instead of captions: its file's suffix, the bytes of a label, its builder."""

    suffix: str
    bytes_a_label: int
    build: Callable[[str], ShardIndex]


def load_index(
    path: str, kind: LabelIndex | None = None, copies: LocalCopies | None = None
) -> ShardIndex:
    """Return the index of a shard: from its sidecar file if that is current, else built and saved.

    Args:
        kind: the kind of an index of labels; None for an index of captions.
        copies: where a shard that is a URL is copied to, if it fits [the user's, without a limit of their own].

    Raises:
        DataError: the shard cannot be read; see also ``build_index`` and ``kind.build``.
    """
    try:
        if is_remote(path):
            there = remote_state_of(path)
            # Before the index, whose one pass then reads the copy.
            (copies or LocalCopies()).take(path, there)
            state = FileState(there.size, there.version)
        else:
            state = state_of(path)
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror}") from None
    places: Sequence[Path] = sidecar_paths(path)
    if kind is not None:
        places = [place.with_suffix(kind.suffix) for place in places]
    bytes_a_label = 0 if kind is None else kind.bytes_a_label
    for place in places:
        if (index := _read_sidecar(place, path, state, bytes_a_label)) is not None:
            return index
    try:
        index = build_index(path) if kind is None else kind.build(path)
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror}") from None
    if index.state != state:
        raise DataError(f"{shown(path)} was changed while it was read; start again")
    for place in places:
        try:
            _write_sidecar(place, index)
            break
        except OSError:
            continue  # without a writable folder, each start costs one pass over the headers
    return index


def load_indices(paths: Sequence[str], copies: LocalCopies) -> list[ShardIndex]:
    """Return the indices of shards as ``load_index`` does; URLs are copied and indexed several at a time."""
    if not any(map(is_remote, paths)):
        return [load_index(path) for path in paths]
    stopped = threading.Event()

    def check_stopped() -> None:
        if stopped.is_set():
            raise _StoppedError

    def load(path: str) -> ShardIndex:
        check_stopped()
        return load_index(path, None, copies._replace(check_stopped=check_stopped))

    with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
        futures = [pool.submit(load, path) for path in paths]
        try:
            for future in as_completed(futures):
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            # Ctrl-C, or an error of one shard, must not wait for whole copies of others.
            stopped.set()
            for future in futures:
                future.cancel()
            raise


class _StoppedError(Exception):
    """Another shard has failed."""


def sidecar_paths(path: str) -> Sequence[Path]:
    """Return the possible places of a shard's index: beside it, and in the user's cache folder; of a URL only there."""
    where = path if is_remote(path) else os.path.abspath(path)
    digest = hashlib.sha256(where.encode("utf-8", "surrogateescape")).hexdigest()
    in_cache = cache_folder() / f"{digest[:32]}.clipcore-index"
    return [in_cache] if is_remote(path) else [Path(path + ".clipcore-index"), in_cache]


def _write_sidecar(place: Path, index: ShardIndex) -> None:
    left_out = index.left_out.to_json().encode()
    sizes = (len(index), len(index.keys), len(left_out), index.checksums_2N.shape[1])
    head = _SIDECAR.pack(_MAGIC, *index.state, *sizes)
    columns = index.columns_6N.astype("<i8").tobytes() + index.checksums_2N.astype("<u4").tobytes()
    body = head + columns + index.keys.tobytes() + left_out + index.labels
    place.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(place) as file:
        file.write(body + struct.pack("<I", zlib.crc32(body)))


def _read_sidecar(
    place: Path, path: str, state: FileState, bytes_a_label: int = 0
) -> ShardIndex | None:
    """Return the saved index, or None if it is missing, damaged, or of another state of the shard."""
    try:
        # Bounded by the size of the headers and labels, plus the JSON of the skipped members.
        content = read_regular(place, state.size + MAX_CAPTION_BYTES)
    except OSError:
        return None
    if len(content) < _SIDECAR.size + 4:
        return None
    body, checksum = content[:-4], int.from_bytes(content[-4:], "little")
    magic, size, version, num_samples, num_bytes, num_left_out, num_checksums = (
        _SIDECAR.unpack_from(body)
    )
    keys_at = _SIDECAR.size + 48 * num_samples + 8 * num_checksums
    end = keys_at + num_bytes + num_left_out
    if (
        (magic, size, version) != (_MAGIC, *state)
        or num_checksums not in (0, num_samples)
        or len(body) != end + num_samples * bytes_a_label
        or zlib.crc32(body) != checksum
    ):
        return None
    columns = np.frombuffer(body, "<i8", 6 * num_samples, _SIDECAR.size).reshape(6, num_samples)
    checksums = np.frombuffer(body, "<u4", 2 * num_checksums, keys_at - 8 * num_checksums)
    keys = np.frombuffer(body, np.uint8, num_bytes, keys_at)
    offsets, sizes = columns[0:4:2], columns[1:4:2]
    # Only this module writes it, but it may lie in a shared folder: no offset may lead out of the shard.
    if num_samples and (columns.min() < 0 or (offsets > size - sizes).any()):
        return None
    if (np.diff(columns[5], prepend=0) < 0).any() or (num_samples and columns[5, -1] > num_bytes):
        return None
    try:
        left_out = LeftOut.from_json(body[end - num_left_out : end])
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    checksums_2N = checksums.reshape(2, num_checksums)
    return ShardIndex(path, state, columns, keys, left_out, body[end:], checksums_2N)


class TarImages:
    """The images of tar shards, in the order of the shards.

    Args:
        shards: the indices of the shards.
        decoder: see ``decode_image``.
        name: for messages.

    Attributes:
        left_out: the members without a sample, in all shards.
    """

    def __init__(self, shards: Sequence[ShardIndex], decoder: Decoder | str, name: str) -> None:
        self.name = name
        self.shards = list(shards)
        self._ends = np.cumsum([len(shard) for shard in self.shards])
        self._decoder = decoder
        self._open: OrderedDict[int, LocalFile | RemoteFile] = OrderedDict()
        self.left_out = LeftOut()
        for shard in self.shards:
            self.left_out.update(shard.left_out)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key(self, index: int) -> str:
        """Return the name of a sample: its shard's name and its key there."""
        return self._place(index)[1]

    def picture(self, index: int) -> tuple[Any, str]:
        """Return the picture of a sample and its key; raise BadSample."""
        number, key, (image_at, image_size, _, _, _), (checksum, _) = self._place(index)
        if image_size > MAX_IMAGE_BYTES:
            raise BadSample(f"{image_size} bytes are too large", key)
        try:
            data = self._read(number, image_at, image_size, checksum, key)
            # Recognised by the content, like other formats.
            return decode_raw(data) if is_raw(data) else decode_image(data, self._decoder), key
        except BadSample as error:
            raise BadSample(error.reason, key) from None

    def _place(self, index: int) -> tuple[int, str, list[int], list[int]]:
        """Return the shard's index, the key, the first five columns and the checksums of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self.shards[number]
        row = index - (int(self._ends[number]) - len(shard))
        key = f"{os.path.basename(without_query(shard.path))}/{shard.key(row)}"
        return number, key, shard.columns_6N[:5, row].tolist(), shard.checksums(row)

    def _read(self, number: int, offset: int, size: int, checksum: int, key: str) -> bytes:
        try:
            data = self._shard(number).read_at(size, offset)
        except OSError as error:
            raise BadSample(f"reading failed: {error.strerror}", key) from None
        if len(data) != size:
            raise BadSample("the shard is cut off", key)
        if checksum and checksum_of(data) != checksum:
            raise BadSample(
                "the shard is damaged: its bytes do not match their checksum; copy or prepare the shard again",
                key,
            )
        return data

    def _shard(self, number: int) -> LocalFile | RemoteFile:
        """Return an open shard; if too many are open, close the least recently used one."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.shards[number]
        file = self._open[number] = open_at(shard.path, shard.state)
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return file

    def close(self) -> None:
        """Close the shards; the next read opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def __getstate__(self) -> dict[str, object]:
        # Open files cannot be pickled; the other process opens its own.
        return {**self.__dict__, "_open": OrderedDict()}


class TarSource(TarImages):
    """The pairs of tar shards, in the order of the shards: see ``clipcore.data.PairSource``.

    Args:
        paths: the shards.
        caption_keys: fields of a JSON member that may hold the caption; the first one present is used.
        decoder: see ``decode_image``.
        name: for messages [the last component of the first shard].
        copies: as of ``load_index``.

    Attributes:
        left_out: the members without a sample, in all shards.
        noted: the shards that are URLs and have no local copy.

    Raises:
        DataError: a shard cannot be read, or none of them holds a sample.
    """

    def __init__(
        self,
        paths: Sequence[str],
        caption_keys: Sequence[str] = ("caption",),
        decoder: Decoder | str = "pillow",
        name: str = "",
        copies: LocalCopies | None = None,
    ) -> None:
        copies = copies or LocalCopies()
        shards = load_indices(paths, copies)
        super().__init__(shards, decoder, name or os.path.basename(paths[0]))
        self.noted = LeftOut()
        self._are_remote = any(map(is_remote, paths))
        for shard in shards:
            if is_remote(shard.path) and not is_whole(
                place_of(shard.path, *shard.state), shard.state.size
            ):
                reason = f"shard read by byte ranges, as its copy does not fit into {copies.described()} (--data-cache-gb)"
                self.noted.add(reason, os.path.basename(without_query(shard.path)))
        self._caption_keys = tuple(caption_keys)
        if not len(self):
            where = paths[0] if len(paths) == 1 else self.name
            raise DataError(
                f"{where} holds no samples: an image (.{', .'.join(MEMBER_IMAGE_SUFFIXES)}) needs a member of the same "
                f"name that ends in .txt or .json{self.left_out.found()}"
            )

    def __getitem__(self, index: int) -> Pair:
        if self._are_remote:
            self._prefetch(index)
        captions = self.captions(index)
        image, key = self.picture(index)
        return Pair(image, captions, key)

    def captions(self, index: int) -> str | tuple[str, ...]:
        """Return the caption or captions of a sample; raise BadSample."""
        number, key, columns, (_, checksum) = self._place(index)
        _, image_size, caption_at, caption_size, is_json = columns
        if image_size > MAX_IMAGE_BYTES or caption_size > MAX_CAPTION_BYTES:
            raise BadSample(f"{image_size} + {caption_size} bytes are too large", key)
        caption = self._read(number, caption_at, caption_size, checksum, key)
        return checked_captions(self._json_caption(caption, key) if is_json else caption, key)

    def _prefetch(self, index: int) -> None:
        """Read a sample's image and caption by one request if they are neighbours in a shard without a copy."""
        number, _, (image_at, image_size, caption_at, caption_size, _), _ = self._place(index)
        start, stop = (
            min(image_at, caption_at),
            max(image_at + image_size, caption_at + caption_size),
        )
        is_small = image_size <= MAX_IMAGE_BYTES and caption_size <= MAX_CAPTION_BYTES
        if is_small and stop - start <= image_size + caption_size + _MAX_GAP_BYTES:
            self._shard(number).prefetch(start, stop)

    def _json_caption(self, data: bytes, key: str) -> object:
        try:
            record = json.loads(data)
        except (ValueError, RecursionError):
            raise BadSample("damaged JSON", key) from None
        fields = record if isinstance(record, dict) else {}
        for name in self._caption_keys:
            if name in fields:
                return fields[name]
        raise BadSample(f"no {' or '.join(self._caption_keys)} in the JSON member", key)
