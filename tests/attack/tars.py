"""Mutated shards: each sample that is read is one that was there, and nothing is read twice."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np

from attack.fuzz import (
    NUM_CASES,
    Sample,
    check_refused,
    common_start,
    digest,
    mutated,
    sample_of,
)
from attack.harness import Attack
from attack.images import noise, picture_file
from clipcore.data import DataError
from clipcore.data.raw import encode_raw
from clipcore.data.tar import MAX_NAME_BYTES, TarSource
from clipcore.data.transforms import decode_image

_BLOCK = 512
# A few changed letters make no key of another.
_KEYS = ("anchor", "bridge", "candle", "dragon")
_LONG = "folder/" * 20


@dataclass(frozen=True)
class _Part:
    """A member of a shard: its name, and where its headers, its last header, its content and the next member begin."""

    name: str
    start: int
    header: int
    data: int
    end: int

    @property
    def key(self) -> str:
        return next(key for key in _KEYS if key in self.name)


@dataclass(frozen=True)
class _Shard:
    """A whole shard, its members, and what its samples give by their short keys."""

    content: bytes
    parts: tuple[_Part, ...]
    samples: Mapping[str, Sample]
    layout: str


@dataclass(frozen=True)
class _Mutant:
    """A mutated shard.

    Attributes:
        content: its bytes.
        touched: keys of the samples that may be changed or gone.
        expected: "read" where all others have to be there, a word of the refusal, or "" for either, in which case those
            others may be gone, but not changed, and those before the damage are there.
    """

    content: bytes
    touched: frozenset[str]
    expected: str = ""


def make_shard(layout: str) -> _Shard:
    """Return a shard of four samples in a layout of tar."""
    captions = {key: f"the {key} of a shard" for key in _KEYS}
    images = {
        "anchor": ("jpg", picture_file("JPEG")),
        "bridge": ("png", picture_file("PNG")),
        "candle": ("npy", encode_raw(np.asarray(noise("RGB")))),
        "dragon": ("webp", picture_file("WebP")),
    }
    samples = {
        key: (captions[key], digest(noise("RGB") if kind == "npy" else decode_image(data)))
        for key, (kind, data) in images.items()
    }
    members = [(f"{key}.{kind}", data) for key, (kind, data) in images.items()]
    texts = [(f"{key}.txt", caption.encode()) for key, caption in captions.items()]
    texts[1] = ("bridge.json", json.dumps({"caption": captions["bridge"]}).encode())
    # In the first layout each caption is behind its picture, in others all are at the end.
    pairs = zip(members, texts, strict=True)
    ordered = list(itertools.chain(*pairs)) if layout == "ustar" else [*members, *texts]

    formats = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT}
    stream, names = io.BytesIO(), []
    with tarfile.open(
        fileobj=stream, mode="w", format=formats.get(layout, tarfile.GNU_FORMAT)
    ) as archive:
        for name, data in ordered:
            member = tarfile.TarInfo(_LONG + name if layout == "long names" else name)
            member.size = len(data)
            member.mtime = (
                1234.5 if layout == "pax" else 1234
            )  # a fraction needs an extended header
            names.append(member.name)
            archive.addfile(member, io.BytesIO(data))
    stream.seek(0)
    with tarfile.open(fileobj=stream) as archive:
        parts = tuple(
            _Part(
                member.name,
                member.offset,
                member.offset_data - _BLOCK,
                member.offset_data,
                member.offset_data + -(-member.size // _BLOCK) * _BLOCK,
            )
            for member in archive
        )
    assert [part.name for part in parts] == names
    return _Shard(stream.getvalue(), parts, samples, layout)


def with_checksum(content: bytearray, at: int) -> None:
    """Put the right checksum into the header at a place."""
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = f"{sum(content[at : at + _BLOCK]):06o}\0 ".encode()


def header_of(name: str, size: int, kind: bytes = b"0") -> bytes:
    """Return a header block."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = f"{size:011o}\0".encode()
    block[156:157] = kind
    with_checksum(block, 0)
    return bytes(block)


def padded(data: bytes) -> bytes:
    """Return a member's content in whole blocks."""
    return data + bytes(-len(data) % _BLOCK)


def record(key: str, value: str) -> bytes:
    """Return a record of an extended header of pax."""
    body = f" {key}={value}\n".encode()
    length = len(body)
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def extended(content: bytes, kind: bytes = b"x") -> bytes:
    """Return an extended header with its content."""
    return header_of("././@PaxHeader", len(content), kind) + padded(content)


def _inserted(shard: _Shard, part: _Part, blocks: bytes) -> bytes:
    return shard.content[: part.header] + blocks + shard.content[part.header :]


def _of_part(part: _Part) -> frozenset[str]:
    return frozenset({part.key})


def flip_data(shard: _Shard, part: _Part, dice: random.Random) -> _Mutant:
    """Damage the content of a member."""
    content = bytearray(shard.content)
    for _ in range(dice.choice([1, 3, 30])):
        content[dice.randrange(part.data, part.end)] = dice.randrange(256)
    return _Mutant(bytes(content), _of_part(part), "read")


def flip_header(shard: _Shard, part: _Part, dice: random.Random) -> _Mutant:
    """Damage a header, with the right checksum or the old one."""
    content = bytearray(shard.content)
    at = dice.choice([part.start, part.header])
    for _ in range(dice.choice([1, 1, 2, 20])):
        place = dice.choice([dice.randrange(_BLOCK), 124 + dice.randrange(12), 156])
        content[at + place] = dice.choice([dice.randrange(256), 0x80, 0xFF, 0x30, 0x37])
    if dice.randrange(3):
        with_checksum(content, at)
    return _Mutant(bytes(content), _of_part(part))


def flip_name(shard: _Shard, part: _Part, dice: random.Random) -> _Mutant:
    """Damage the first letters of a name."""
    content = bytearray(shard.content)
    for _ in range(dice.choice([1, 2])):
        content[part.header + dice.randrange(4)] = dice.randrange(256)
    with_checksum(content, part.header)
    return _Mutant(bytes(content), _of_part(part), "read")


def write_size(shard: _Shard, part: _Part, dice: random.Random) -> _Mutant:
    """Write the size of a member in another form, or another size."""
    content = bytearray(shard.content)
    size = int(content[part.header + 124 : part.header + 135], 8)
    right = [
        f"{size:o}".rjust(11).encode() + b" ",
        f"{size:012o}".encode(),
        b"\x80" + size.to_bytes(11, "big"),
    ]
    wrong = [
        (b"\xff" * 12, "valid size"),
        (b"\x81" + size.to_bytes(11, "big"), "valid size"),
        (f"-{size:010o}\0".encode(), "valid size"),
        (b"0x000000010\0", "valid size"),
        (b"\x80" + b"\xff" * 11, "cut off"),
        (b"77777777777\0", "cut off"),
        (b"\x80" + dice.randrange(1 << 16).to_bytes(11, "big"), ""),
        (f"{dice.randrange(1 << 16):011o}\0".encode(), ""),
        (bytes(12), ""),
    ]
    is_right = bool(dice.randrange(2))
    field, expected = (dice.choice(right), "read") if is_right else dice.choice(wrong)
    content[part.header + 124 : part.header + 136] = field
    with_checksum(content, part.header)
    return _Mutant(bytes(content), frozenset() if is_right else _of_part(part), expected)


def write_kind(shard: _Shard, part: _Part, dice: random.Random) -> _Mutant:
    """Make a member something else than a file."""
    content = bytearray(shard.content)
    words = {b"1": "hard link", b"2": "symbolic link", b"3": "character device", b"S": "sparse"}
    words |= {b"4": "block device", b"6": "a pipe", b"M": "continued"}
    kind = dice.choice([*words, b"5", b"7", b"\0", b"A", b"V", b"\xff"])
    content[part.header + 156 : part.header + 157] = kind
    content[part.header + 157 : part.header + 168] = b"/etc/passwd"
    with_checksum(content, part.header)
    # Of a folder no content follows, which puts a header where there is none.
    expected = words.get(kind, "" if kind == b"5" else "read")
    return _Mutant(bytes(content), frozenset() if kind in b"7\0" else _of_part(part), expected)


def insert_link(shard: _Shard, part: _Part, dice: random.Random) -> _Mutant:
    """Put a link or a device before a member."""
    kind, word = dice.choice([(b"1", "hard link"), (b"2", "symbolic link"), (b"6", "a pipe")])
    blocks = header_of("../../etc/link.jpg", 0, kind)
    return _Mutant(_inserted(shard, part, blocks), frozenset(), word)


def insert_pax(shard: _Shard, part: _Part, dice: random.Random) -> _Mutant:
    """Put an extended header of pax before a member."""
    size = int(shard.content[part.header + 124 : part.header + 135], 8)
    kind = dice.choice([b"x", b"x", b"g"])
    harmless = [
        record("comment", "x" * dice.randrange(900)),
        record("size", str(size)),
        record("mtime", "1e400") * 9,
        record("size", str(size)) + bytes(9) + b"not read",
        b"",
    ]
    damaged = [
        b"99999 path=a\n",
        b"path=a",
        b"0 path=a\n",
        b"-9 path=a\n",
        b"9999999999999999999999 path=a\n",
        record("path", "a")[:-1] + b" ",
        record("size", "-1"),
        record("size", "1" * 30),
        record("size", "\u0661"),
    ]
    sparse = record("GNU.sparse.size", "999") + record("GNU.sparse.name", "b.jpg")
    content, expected = dice.choice(
        [
            (dice.choice(harmless), "read"),
            (dice.choice(damaged), "extended header"),
            (sparse, "sparse"),
        ]
    )
    if kind == b"g":  # whose content is not used
        expected = "read"
    is_other = False
    if expected == "read" and kind == b"x" and not dice.randrange(3):
        content, is_other = record("path", "an/other name.jpg"), True
    touched = _of_part(part) if is_other else frozenset[str]()
    return _Mutant(_inserted(shard, part, extended(content, kind)), touched, expected)


def insert_long_name(shard: _Shard, part: _Part, dice: random.Random) -> _Mutant:
    """Put a long name before a member."""
    length = dice.choice([0, 1, 100, 4096, 4097, 1 << 20, 1 << 32])
    if length <= 4096:
        name = bytes(dice.choices(b"/.\xffabc\n\0", k=length))
        # The later of two names counts.
        blocks = header_of("././@LongLink", length, b"L") + padded(name)
        return _Mutant(_inserted(shard, part, blocks), _of_part(part), "read")
    blocks = header_of("././@LongLink", length, dice.choice([b"L", b"K", b"x", b"g"]))
    return _Mutant(_inserted(shard, part, blocks), frozenset(), "extended header of")


def insert_zeros(shard: _Shard, part: _Part, dice: random.Random) -> _Mutant:
    """End the archive before a member."""
    return _Mutant(_inserted(shard, part, bytes(_BLOCK)), _of_part(part))


def cut(shard: _Shard, part: _Part, dice: random.Random) -> _Mutant:
    """Cut the file off somewhere in a member or before it."""
    end = dice.choice([part.start, part.data, part.end, dice.randrange(part.start, part.end)])
    return _Mutant(shard.content[:end], _of_part(part))


def write_twice(shard: _Shard, part: _Part, dice: random.Random) -> _Mutant:
    """Repeat a member."""
    return _Mutant(shard.content[: part.end] + shard.content[part.start :], frozenset(), "twice")


def append_another(shard: _Shard, part: _Part, dice: random.Random) -> _Mutant:
    """Put another archive behind the end, where nothing is read."""
    return _Mutant(shard.content + shard.content, frozenset(), "read")


def compress(shard: _Shard, part: _Part, dice: random.Random) -> _Mutant:
    """Compress the archive."""
    level = dice.randrange(1, 10)
    packer = zlib.compressobj(level, zlib.DEFLATED, 31)
    return _Mutant(packer.compress(shard.content) + packer.flush(), frozenset(), "gunzip")


def mutate_anywhere(shard: _Shard, part: _Part, dice: random.Random) -> _Mutant:
    """Change bytes anywhere."""
    return _Mutant(mutated(shard.content, dice), frozenset(_KEYS))


MUTATIONS: dict[str, Callable[[_Shard, _Part, random.Random], _Mutant]] = {
    "data": flip_data,
    "header": flip_header,
    "name": flip_name,
    "size": write_size,
    "kind": write_kind,
    "link": insert_link,
    "pax": insert_pax,
    "long name": insert_long_name,
    "zeros": insert_zeros,
    "cut": cut,
    "twice": write_twice,
    "appended": append_another,
    "compressed": compress,
    "anywhere": mutate_anywhere,
}


class Tars(Attack):
    """A shard is mutated; it is refused by name, or its samples are read, those that are whole as they were.

    No byte is asked for more than once for the index and once for a sample, whatever sizes the headers claim.
    """

    fast: ClassVar[int] = 400

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._shards = {
            layout: make_shard(layout) for layout in ("ustar", "gnu", "pax", "long names")
        }

    def cases(self) -> Mapping[str, Any]:
        kinds = list(itertools.product(self._shards, MUTATIONS))
        named = {f"untouched, {layout}": (layout, None, 0) for layout in self._shards}
        for number in range(NUM_CASES - len(named)):
            layout, mutation = kinds[number % len(kinds)]
            named[f"{number}, {layout}, {mutation}"] = (layout, mutation, number)
        return named

    def attempt(self, what: Any, folder: Path) -> str:
        layout, mutation, seed = what
        shard, dice, path = self._shards[layout], random.Random(seed), folder / "a.tar"
        mutant = _Mutant(shard.content, frozenset(), "read")
        if mutation is not None:
            mutant = MUTATIONS[mutation](shard, dice.choice(shard.parts), dice)
        path.write_bytes(mutant.content)
        try:
            found = self._samples(path, len(mutant.content))
        except DataError as error:
            said = check_refused(error, path)
            assert mutant.expected != "read", f"it is refused: {said}"
            assert mutant.expected in said, f"{mutant.expected!r} is not why: {said}"
            return "refused"

        assert mutant.expected in ("read", ""), f"it is read, although {mutant.expected!r}"
        before = common_start(shard.content, mutant.content)
        for key, sample in shard.samples.items():
            name = _LONG + key if layout == "long names" else key
            ends = [part.end for part in shard.parts if part.key == key]
            if max(ends) <= len(before) or (mutant.expected and key not in mutant.touched):
                assert name in found, f"{key} is gone"
                assert found[name] == sample, f"{key} has become {found[name]}"
            elif key not in mutant.touched and name in found:
                assert found[name] == sample, f"{key} has become {found[name]}"
        return "read" if found.keys() == shard.samples.keys() else "read in part"

    def _samples(self, path: Path, size: int) -> dict[str, Sample]:
        """Return what the samples of a shard give, by their keys; raise where too many bytes are asked for."""
        pread, asked = os.pread, 0
        # Two bytes tell a compressed file; a header, and a long name behind it, may reach beyond the end.
        allowed = 2 * size + 2 + _BLOCK + MAX_NAME_BYTES

        def counted(descriptor: int, number: int, offset: int) -> bytes:
            nonlocal asked
            asked += number
            assert asked <= allowed, f"{asked} bytes are asked for of {size}"
            return pread(descriptor, number, offset)

        found: dict[str, Sample] = {}
        with mock.patch.object(os, "pread", counted):
            source = TarSource([str(path)])
            for index in range(len(source)):
                sample, key = sample_of(source, index)
                found[key.partition("/")[2]] = sample
            source.close()
        return found
