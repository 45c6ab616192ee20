"""Mutated pictures, shards, captions and tables by the thousand: each is read rightly, or refused in one line."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import os
import random
import struct
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
import regex
from PIL import Image

from attack.harness import Attack, redirected
from clipcore.data import BadSample, DataError, PairSource
from clipcore.data.raw import encode_raw
from clipcore.data.sources import open_source
from clipcore.data.tar import MAX_NAME_BYTES, TarSource
from clipcore.data.transforms import DECODERS, MAX_PIXELS, Decoder, decode_image
from clipcore.tokenizer import (
    Tokenizer,
    VocabularyError,
    byte_tokenizer,
    clean,
    get_tokenizer,
    train_tokenizer,
)

NUM_CASES = 10_000

# ---------------------------------------------------------------------------------------------------------------------
# What they share
# ---------------------------------------------------------------------------------------------------------------------

# Numbers of four bytes at which sizes and signs turn over.
_EXTREMES = [struct.pack(">I", n) for n in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF)]


def mutated(data: bytes, dice: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """Return bytes after some random changes, of which each may be small, a cut, or a part of ``others``."""
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 5, 30])):
        if not changed:
            break
        # The first bytes of a file say what the rest is.
        at = dice.randrange(min(len(changed), dice.choice([64, len(changed), len(changed)])))
        size = dice.randrange(1, 64)
        match dice.randrange(16):
            case 0 | 1 | 2 | 3 | 4:
                changed[at] ^= 1 << dice.randrange(8)
            case 5 | 6 | 7:
                changed[at] = dice.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF, dice.randrange(256)])
            case 8 | 9:
                changed[at : at + 4] = dice.choice(_EXTREMES)
            case 10 | 11:
                del changed[at : at + size]
            case 12:
                changed[at:at] = dice.randbytes(size)
            case 13:
                begin = dice.randrange(len(changed))
                changed[at:at] = changed[begin : begin + size]
            case 14:
                other = dice.choice(others or [data])
                begin = dice.randrange(len(other))
                changed[at : at + size] = other[begin : begin + dice.choice([size, len(other)])]
            case 15:
                del changed[at:]
    return bytes(changed)


def common_start(one: bytes, other: bytes) -> bytes:
    """Return the bytes with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))]


def check_bad(error: BadSample) -> None:
    """Raise unless what is said of a sample is fit for one line of a terminal."""
    assert 0 < len(error.reason) < 500, f"the reason has {len(error.reason)} characters"
    assert str(error).isprintable(), f"the reason is {error.reason!r}"


def check_refused(error: DataError, path: Path) -> str:
    """Raise unless a message is one line that names a file; return the message."""
    said = str(error)
    assert str(path) in said, f"the message does not name the file: {said!r}"
    # What else a terminal does not show is taken out where it is printed.
    assert len(said.splitlines()) == 1 and len(said) < 1000, f"the message is {said!r}"
    return said


def digest(image: Image.Image | np.ndarray) -> tuple[Any, int]:
    """Return the shape and a checksum of a picture's pixels."""
    pixels = np.asarray(image)
    return pixels.shape, zlib.crc32(pixels.tobytes())


# What reading a sample gives: its captions and the checksum of its picture; None where it is a bad sample.
Sample = tuple[Any, Any] | None


def sample_of(source: PairSource, index: int) -> tuple[Sample, str]:
    """Return a sample and its key."""
    try:
        pair = source[index]
    except BadSample as error:
        check_bad(error)
        return None, error.key
    return (pair.caption, digest(pair.image)), pair.key


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

# Of an interlaced PNG's passes: first row and column, and steps between them.
_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
_LAST_PASS = (1, 0, 2, 1)


def noise(mode: str, seed: int = 0) -> Image.Image:
    """Return a picture of a few thousand pixels, smooth enough to be compressed; 0 is one of 48 x 40."""
    dice = random.Random(seed)
    coarse = Image.frombytes("RGBA", (6, 5), dice.randbytes(120))
    size = (dice.randrange(1, 80), dice.randrange(1, 80)) if seed else (48, 40)
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    """Return a picture as a file."""
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def interlaced_png(image: Image.Image) -> bytes:
    """Return an RGB picture as an interlaced PNG, which Pillow reads and does not write."""
    pixels = np.asarray(image)
    lines = [
        b"\0" + line.tobytes()
        for top, left, down, right in (*_PASSES, _LAST_PASS)
        for line in pixels[top::down, left::right]
        if line.size
    ]
    header = struct.pack(">2I5B", image.width, image.height, 8, 2, 0, 0, 1)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(b"".join(lines)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(itertools.starmap(png_chunk, chunks.items()))


def with_checksums(data: bytes) -> bytes:
    """Return a PNG whose chunks have the right checksums, so that its damage is not seen before it is decoded."""
    mended, at = bytearray(data), 8
    while at + 12 <= len(mended):
        size = int.from_bytes(mended[at : at + 4], "big")
        checksum = zlib.crc32(mended[at + 4 : at + 8 + size])
        if at + 12 + size <= len(mended):
            mended[at + 8 + size : at + 12 + size] = struct.pack(">I", checksum)
        at += 12 + size
    return bytes(mended)


# By kind: mode, format, and how it is encoded.
_ENCODINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "JPEG": ("RGB", "JPEG", {}),
    "JPEG, progressive": ("RGB", "JPEG", {"progressive": True}),
    "JPEG, 4:4:4 with restarts": ("RGB", "JPEG", {"subsampling": 0, "restart_marker_blocks": 2}),
    "JPEG, CMYK": ("CMYK", "JPEG", {}),
    "JPEG, progressive CMYK": ("CMYK", "JPEG", {"progressive": True}),
    "JPEG, grey": ("L", "JPEG", {}),
    "PNG": ("RGB", "PNG", {}),
    "PNG, palette": ("P", "PNG", {}),
    "PNG, palette with transparency": ("P", "PNG", {"transparency": 3}),
    "PNG, RGBA": ("RGBA", "PNG", {}),
    "PNG, grey and alpha": ("LA", "PNG", {}),
    "PNG, 16 bits": ("I;16", "PNG", {}),
    "PNG, 1 bit": ("1", "PNG", {}),
    "PNG, interlaced": ("RGB", "interlaced", {}),
    "PNG, animated": ("RGB", "PNG", {"save_all": True}),
    "WebP": ("RGB", "WEBP", {}),
    "WebP, lossless": ("RGB", "WEBP", {"lossless": True}),
    "WebP, RGBA": ("RGBA", "WEBP", {}),
    "WebP, animated": ("RGB", "WEBP", {"save_all": True}),
    "GIF": ("RGB", "GIF", {}),
    "BMP": ("RGB", "BMP", {}),
    "TIFF": ("RGB", "TIFF", {}),
}


def picture_file(kind: str, seed: int = 0) -> bytes:
    """Return the file of a picture."""
    mode, name, settings = _ENCODINGS[kind]
    if mode == "I;16":
        shallow = np.asarray(noise("L", seed)).astype(np.uint16)
        return encoded(Image.fromarray(shallow * 257), name)
    image = noise(mode, seed)
    if name == "interlaced":
        return interlaced_png(image)
    if "save_all" in settings:
        frames = [noise(mode, n).resize(image.size) for n in (1, 2)]
        settings = {**settings, "append_images": frames}
    return encoded(image, name, **settings)


# Pictures that are not read, whatever is in them.
_OTHER_KINDS = ("GIF", "BMP", "TIFF")


class Images(Attack):
    """A picture's file is mutated; it is decoded to RGB within the limit, or a bad sample, each time alike."""

    fast: ClassVar[int] = 400

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._files = {kind: picture_file(kind) for kind in _ENCODINGS}

    def cases(self) -> Mapping[str, Any]:
        kinds = list(itertools.product(DECODERS, [*self._files, "noise"]))
        named = {}
        for number in range(NUM_CASES):
            decoder, kind = kinds[number % len(kinds)]
            is_whole = kind != "noise" and number // len(kinds) % 8 == 0
            what = "whole" if is_whole else "mutated"
            named[f"{number}, {what}, {decoder}, {kind}"] = (decoder, kind, number, is_whole)
        return named

    def attempt(self, what: Any, folder: Path) -> str:
        name, kind, seed, is_whole = what
        dice = random.Random(seed)
        if is_whole:
            self._check_whole(picture_file(kind, seed), kind, name)
            return "decoded whole"

        data = dice.randbytes(dice.randrange(2000)) if kind == "noise" else self._files[kind]
        # The last of these is less than the mutated pictures have.
        decoder = Decoder(name, dice.choice([0, 16]), dice.choice([MAX_PIXELS, 4000, 1919]))
        data = mutated(data, dice, list(self._files.values()))
        if dice.randrange(2) and data.startswith(b"\x89PNG"):
            data = with_checksums(data)
        # What a library says would be said of each such sample of a run.
        output = folder / "output"
        with redirected(output):
            outcome, again = self._outcome(data, decoder), self._outcome(data, decoder)
        assert outcome == again, f"the same file gives {outcome}, then {again}"
        assert (said := output.read_text(errors="replace")) == "", f"a library said {said[:200]!r}"
        return outcome[0]

    def _outcome(self, data: bytes, decoder: Decoder) -> tuple[str, Any]:
        """Return whether a file is decoded, with its checksum or the reason."""
        try:
            picture = decode_image(data, decoder)
        except BadSample as error:
            check_bad(error)
            assert "Memory" not in error.reason, error.reason
            return "bad sample", error.reason
        assert isinstance(picture, Image.Image) and picture.mode == "RGB", (
            f"the mode is {picture.mode}"
        )
        num_pixels = picture.width * picture.height
        assert 0 < num_pixels <= decoder.max_pixels, f"it has {num_pixels} pixels"
        return "decoded", digest(picture)

    def _check_whole(self, data: bytes, kind: str, decoder: str) -> None:
        """Raise unless a whole file gives the pixels that Pillow itself does, over white, or is refused for its kind."""
        if kind in _OTHER_KINDS:
            assert self._outcome(data, Decoder(decoder))[0] == "bad sample"
            return
        picture = decode_image(data, decoder)
        expected = Image.open(io.BytesIO(data))
        assert picture.size == expected.size and picture.mode == "RGB"
        if expected.has_transparency_data:
            layers = np.asarray(expected.convert("RGBA")).astype(float)
            share = layers[..., 3:] / 255
            pixels, most = layers[..., :3] * share + 255 * (1 - share), 1.0
        else:
            # Another library may round otherwise.
            pixels = np.asarray(expected.convert("RGB")).astype(float)
            most = 2.0 if decoder == "simplejpeg" else 0.0
        difference = abs(np.asarray(picture) - pixels).max()
        assert difference <= most, f"a pixel differs by {difference}"


# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------

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


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------

_PIECES: dict[str, Sequence[str]] = {
    "words": (
        "a",
        "Cat's",
        "DON'T",
        "42nd",
        "naïve",
        "ΣΊΣΥΦΟΣ",
        "İstanbul",
        "ﬁne",
        "ＦＵＬＬ",
        "straße",
        "日本語",
    ),
    "entities": (
        "&amp;",
        "&amp;amp;lt;",
        "&#39;",
        "&#x1F600;",
        "&#0;",
        "&#xD800;",
        "&#1114112;",
        "&eacute",
        "&",
        "&#",
        ";",
    ),
    "spaces": (
        " ",
        "\t",
        "\n",
        "\r",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x1f",
        "\x85",
        "\xa0",
        "\u1680",
        "\u2003",
        "\u2028",
        "\u3000",
    ),
    "hidden": (
        "\0",
        "\x07",
        "\x1b[31m",
        "\x7f",
        "\xad",
        "\u200b",
        "\u200d",
        "\u2060",
        "\ufeff",
        "\ufff9",
        "\U000e0041",
    ),
    "directions": ("\u202e", "\u202d", "\u2066", "\u2069", "\u061c", "\u200f", "שלום", "مرحبا"),
    "marks": (
        "\u0301",
        "\u0345",
        "\u0323",
        "\u20dd",
        "\ufe0f",
        "\u0e33",
        "\u1ab0",
        "e\u0301",
        "q\u0307\u0323",
    ),
    "emoji": ("😀", "👩🏽‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "1️⃣", "\U0001f3fb"),
    "surrogates": ("\ud800", "\udfff", "\ud83d\ude00", "\ude00\ud83d"),
    "mojibake": ("cafÃ©", "â€œquotedâ€\x9d", "Ã¢â‚¬â„¢", "ÐŸÑ€Ð¸", "æ—¥æœ¬"),
    "specials": (
        "<|endoftext|>",
        "</w>",
        "Ġ",
        "##",
        "''",
        "'S",
        "'ſ",
        "_",
        "--",
        "$9.99",
        "\\u0041",
        "\\x00",
    ),
}
_PLANES = (
    (0, 0x80),
    (0x80, 0x250),
    (0x300, 0x370),
    (0x250, 0x10000),
    (0x10000, 0x20000),
    (0x20000, 0x110000),
)
_LONGEST = 20_000


def hostile_text(dice: random.Random) -> str:
    """Return a text of whatever Unicode has."""
    parts = list[str]()
    for _ in range(dice.randrange(10)):
        pieces = dice.choice([*_PIECES.values(), ()])
        if pieces:
            parts += dice.choices(pieces, k=dice.choice([1, 1, 3]))
        else:
            plane = dice.choice(_PLANES)
            parts += map(chr, dice.choices(range(*plane), k=dice.randrange(1, 6)))
    text = dice.choice(["", " ", " ", "  "]).join(parts)
    if not dice.randrange(40):
        text = (text * _LONGEST)[: dice.randrange(_LONGEST)]
    return text


def simple_tokenizer() -> ModuleType:
    """Return open_clip/tokenizer.py, without the package around it."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(os.environ):  # which it changes
        spec.loader.exec_module(module)
    return module


def is_younger(text: str) -> bool:
    """Return whether a text has letters or digits that are younger than this Python's Unicode, which count elsewhere."""
    return any(
        unicodedata.category(c) == "Cn" and regex.match(r"[\p{L}\p{N}]", c) for c in set(text)
    )


class Captions(Attack):
    """A text of hostile Unicode gets the ids of open_clip, in rows of the right form, and comes back from them."""

    fast: ClassVar[int] = 400

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        dice = random.Random(0)
        words = [*_PIECES["words"], *_PIECES["emoji"]]
        captions = [" ".join(dice.choices(words, k=4)) for _ in range(200)]
        self._tokenizers = {
            "small": train_tokenizer(captions, 600),
            "bytes": byte_tokenizer(),
        }
        self._theirs: Any = None
        try:
            self._tokenizers["openai"] = get_tokenizer()
        except VocabularyError:
            return
        if importlib.util.find_spec("open_clip") is not None:
            self._theirs = simple_tokenizer().SimpleTokenizer()

    def cases(self) -> Mapping[str, Any]:
        # OpenAI's is what others are compared with.
        names = (
            ["openai", "small", "openai", "bytes"]
            if "openai" in self._tokenizers
            else ["small", "bytes"]
        )
        return {
            f"{number}, {names[number % len(names)]}": (names[number % len(names)], number)
            for number in range(NUM_CASES)
        }

    def attempt(self, what: Any, folder: Path) -> str:
        name, seed = what
        tokenizer, dice = self._tokenizers[name], random.Random(seed)
        text = hostile_text(dice)
        ids = tokenizer.encode(text)
        assert ids == tokenizer.encode(text), "the same text gets other ids"
        assert all(0 <= number < tokenizer.vocab_size - 2 for number in ids), f"{ids}"
        self._check_row(tokenizer, text, ids, dice.choice([2, 3, 16, 77]))
        outcome = self._come_back(tokenizer, text, ids)

        if name != "openai" or self._theirs is None or is_younger(clean(text)):
            return outcome
        try:
            expected = self._theirs.encode(text)
        except Exception:
            return f"{outcome}, open_clip fails"
        assert ids == expected, f"{text!r} is {ids}, in open_clip {expected}"
        return f"{outcome}, as open_clip's"

    def _check_row(self, tokenizer: Tokenizer, text: str, ids: list[int], length: int) -> None:
        """Raise unless a row has start, ids, end and padding, and is cut where it is long."""
        rows = tokenizer([text], length)
        assert tuple(rows.shape) == (1, length)
        kept = ids[: length - 2]
        expected = [tokenizer.sot_token_id, *kept, tokenizer.eot_token_id]
        expected += [0] * (length - len(expected))
        assert rows[0].tolist() == expected, f"the row is {rows[0].tolist()}, not {expected}"

    def _come_back(self, tokenizer: Tokenizer, text: str, ids: list[int]) -> str:
        """Return whether the text of ids has the same ids; raise where it has other letters."""
        decoded = tokenizer.decode(ids)
        # Which no piece takes in.
        expected = clean(text).replace("\u0345", "")
        assert decoded.replace(" ", "") == expected.replace(" ", ""), f"{text!r} is {decoded!r}"
        if clean(decoded) != decoded:  # such as an entity in an entity in an entity
            return "cleaned again"
        assert tokenizer.encode(decoded) == ids, f"{decoded!r} does not keep its ids"
        return "came back"


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------

NUM_ROWS = 6
_WORDS = ("a red square", "zwei grüne Kreise", "three, 3, III", "四", "five & more;", "6")
_PATHS = tuple(f"images/{row}.png" for row in range(NUM_ROWS))
_SEPARATORS = {"csv": ",", "tsv": "\t", "quoted.csv": ",", "metadata.csv": ","}
FORMATS = (*_SEPARATORS, "jsonl", "metadata.jsonl", "parquet", "folder")


def csv_line(fields: Sequence[str], separator: str, is_quoted: bool = False) -> str:
    """Return a row of a table; a field with the separator is quoted."""
    return separator.join(f'"{f}"' if separator in f or is_quoted else f for f in fields) + "\n"


def table_of(kind: str) -> bytes:
    """Return a whole table of a kind of text."""
    if kind.endswith("jsonl"):
        records = ({"file_name": p, "caption": w} for p, w in zip(_PATHS, _WORDS, strict=True))
        return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    separator = _SEPARATORS[kind]
    header = ("file_name", "text") if kind == "metadata.csv" else ("filepath", "title")
    words = _WORDS
    if kind in ("csv", "metadata.csv"):
        words = tuple(w.replace(",", ";") for w in _WORDS)  # so that no quote is there
    rows = zip(_PATHS, words, strict=True)
    lines = [csv_line(row, separator, kind == "quoted.csv") for row in rows]
    return (csv_line(header, separator) + "".join(lines)).encode()


def parquet_of(images: Sequence[bytes]) -> bytes:
    """Return a parquet table whose pages have checksums."""
    stream = io.BytesIO()
    cells = [{"bytes": image, "path": None} for image in images]
    table = pyarrow.table({"image": cells, "caption": list(_WORDS)})
    pyarrow.parquet.write_table(table, stream, row_group_size=4, write_page_checksum=True)
    return stream.getvalue()


def flipped_pages(content: bytes, dice: random.Random) -> bytes:
    """Return a parquet table with some bits changed before its description, which is at its end."""
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    changed = bytearray(content)
    for _ in range(dice.choice([1, 1, 3])):
        changed[dice.randrange(4, end)] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _with_row(content: bytes, row: int, change: Callable[[bytes], bytes]) -> bytes:
    """Return a table one of whose lines is changed; -1 is the header's."""
    lines = content.splitlines(keepends=True)
    lines[row + 1] = change(lines[row + 1])
    return b"".join(lines)


def _cell(change: Callable[[bytes], bytes], number: int) -> Callable[[bytes], bytes]:
    """Return a change of a line, given that of its last or first cell."""

    def changed(line: bytes) -> bytes:
        separator = b"\t" if b"\t" in line else b","
        cells = line.removesuffix(b"\n").split(separator, 1)
        cells[number] = change(cells[number])
        return separator.join(cells) + b"\n"

    return changed


# What a change of a whole table of text has to give: all of its pairs, a word of the refusal, or what becomes of the third.
_ALL = "all"
_Edit = tuple[Callable[[bytes], bytes], "str | Sample | tuple[str, None]"]
_THIRD = 2


def _third(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda content: _with_row(content, _THIRD, change)


def _caption(text: bytes) -> Callable[[bytes], bytes]:
    return _third(_cell(lambda _: text, 1))


def _image(text: bytes) -> Callable[[bytes], bytes]:
    return _third(_cell(lambda _: text, 0))


def _with_field(line: bytes, field: bytes) -> bytes:
    """Return a line with a field more."""
    separator = b"\t" if b"\t" in line else b","
    return line.removesuffix(b"\n") + separator + field + b"\n"


# Of csv and tsv: a change, and _ALL, a word of the refusal, None for a bad sample, or ("caption", text).
CSV_EDITS: dict[str, tuple[Callable[[bytes], bytes], Any]] = {
    "byte-order mark": (lambda c: b"\xef\xbb\xbf" + c, _ALL),
    "CRLF": (lambda c: c.replace(b"\n", b"\r\n"), _ALL),
    "both line ends": (lambda c: c.replace(b"\n", b"\r\n", 3), _ALL),
    "CR": (lambda c: c.replace(b"\n", b"\r"), _ALL),
    "no last line end": (lambda c: c.removesuffix(b"\n"), _ALL),
    "blank lines": (lambda c: c.replace(b"\n", b"\n\n\r\n"), _ALL),
    "UTF-16": (lambda c: c.decode().encode("utf-16"), "UTF-8"),
    "Latin-1": (lambda c: c.replace("ü".encode(), b"\xfc"), "UTF-8"),
    "surrogate": (_caption(b"\xed\xa0\x80"), "UTF-8"),
    "overlong": (_caption(b"\xc0\xaf"), "UTF-8"),
    "empty": (lambda c: b"", "no column"),
    "zeros": (lambda c: bytes(1000), "no column"),
    "header only": (lambda c: c[: c.index(b"\n") + 1], "no rows"),
    "no header": (lambda c: c[c.index(b"\n") + 1 :], "no column"),
    "other header": (lambda c: c.replace(b"t", b"T", 2), "no column"),
    "open quote": (_caption(b'"open'), "unexpected end of data"),
    "text behind a quote": (_caption(b'"open" shut'), "expected after"),
    "long line": (_caption(b"x" * (1 << 21)), "more than 1048576 characters"),
    "long field": (_caption(b"x" * (1 << 18)), "field larger"),
    "NUL": (_caption(b"a\0b"), ("caption", "a b")),
    "empty caption": (_caption(b" \0 "), None),
    "quotes inside": (_caption(b'6" of a "pipe"'), ("caption", '6" of a "pipe"')),
    "quoted quotes": (_caption(b'"6"" of\na pipe"'), ("caption", '6" of\na pipe')),
    "no caption": (_third(lambda line: b"images/2.png\n"), None),
    "no path": (_image(b""), None),
    "more fields": (_third(lambda line: _with_field(line, b"more")), None),
    "an empty field more": (_third(lambda line: _with_field(line, b"")), _ALL),
    "absent": (_image(b"images/9.png"), None),
    "a folder": (_image(b"images"), None),
    "a path of NUL": (_image(b"images/2.png\0"), None),
    "a long path": (_image(b"a/" * 5000), None),
    "a device": (_image(b"/dev/zero"), None),
    "up and down": (_image(b"images/../images/2.png"), _ALL),
}
# Of values of one record of jsonl, as JSON.
JSON_CAPTIONS: dict[str, Any] = {
    "7": None,
    "null": None,
    "true": None,
    "NaN": None,
    "1" * 5000: None,
    "-1e999": None,
    '""': None,
    '" \\u0000\\n"': None,
    "[]": None,
    "[1, null]": None,
    "[" * 50_000 + "]" * 50_000: None,
    '{"a": "b"}': None,
    '["one", "two"]': ("one", "two"),
    '["one", ["two"], 3]': ("one",),
    '"\\ud83d\\ude00"': "😀",
    '"a\\ud800b"': "a?b",
    '"\\ufeffmark"': "mark",
    '"first", "caption": "second"': "second",
    f'"{"x" * 10_000}"': "x" * 8192,
    f'"{"x" * (1 << 20)}"': None,
    '"cut': None,
    '"single\x01"': None,
}
JSON_IMAGES = (
    "7",
    "null",
    "[]",
    "{}",
    '""',
    '"images"',
    '"absent.png"',
    '"images/2.png\\u0000"',
    '"\\ud800"',
)


def _json_edits() -> dict[str, tuple[Callable[[bytes], bytes], Any]]:
    """Return what is done to a jsonl table, and what it has to give, as of ``CSV_EDITS``."""

    def record(image: str, caption: str) -> Callable[[bytes], bytes]:
        line = f'{{"file_name": {image}, "caption": {caption}}}\n'.encode()
        return _lines_edit(line)

    edits: dict[str, tuple[Callable[[bytes], bytes], Any]] = {
        name: CSV_EDITS[name]
        for name in ("byte-order mark", "CRLF", "both line ends", "no last line end", "blank lines")
    }
    edits |= {
        "empty": (lambda c: b"", "no lines"),
        "zeros": (lambda c: bytes(1000), "no JSON"),
        "CR": (lambda c: c.replace(b"\n", b"\r"), "no JSON"),
        "UTF-16": (lambda c: c.decode().encode("utf-16"), "no JSON"),
        "other names": (lambda c: c.replace(b"caption", b"Caption"), "no column"),
        "a list": (lambda c: b'["file_name", "caption"]\n' + c, "no JSON object"),
        "depth": (lambda c: b"[" * 100_000 + b"\n" + c, "no JSON"),
        "Latin-1": (_lines_edit(b'{"file_name": "images/2.png", "caption": "\xfc"}\n'), None),
        "a row of depth": (_lines_edit(b'{"a": ' * 50_000 + b"\n"), None),
        "a row of text": (_lines_edit(b"no JSON\n"), None),
        "a row behind a row": (_lines_edit(b"{}{}\n"), None),
        "an empty record": (_lines_edit(b"{}\n"), None),
        "up and down": (record('"images/../images/2.png"', json.dumps(_WORDS[_THIRD])), _ALL),
    }
    image = f'"{_PATHS[_THIRD]}"'
    for value, expected in JSON_CAPTIONS.items():
        result = expected if expected is None else ("caption", expected)
        edits[f"caption {value[:30]!r}"] = (record(image, value), result)
    for value in JSON_IMAGES:
        edits[f"image {value!r}"] = (record(value, '"text"'), None)
    return edits


def _lines_edit(line: bytes) -> Callable[[bytes], bytes]:
    """Return a change that puts a line in place of a jsonl table's third."""
    return lambda content: _with_row(content, _THIRD - 1, lambda _: line)


JSON_EDITS = _json_edits()


class Tables(Attack):
    """A table is mutated; it is refused by name, or its rows are read, those that are whole in their places."""

    fast: ClassVar[int] = 400

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "images").mkdir()
        self._files = list[bytes]()
        for row, path in enumerate(_PATHS):
            self._files.append(encoded(Image.new("RGB", (8, 8), (40 * row, 9, 99)), "PNG"))
            (folder / path).write_bytes(self._files[-1])
        images = [digest(decode_image(data)) for data in self._files]
        self._pairs: list[Sample] = list(zip(_WORDS, images, strict=True))
        self._parquet = parquet_of(self._files)

    def cases(self) -> Mapping[str, Any]:
        named: dict[str, Any] = {f"untouched, {kind}": (kind, "untouched", 0) for kind in FORMATS}
        edits = [
            (kind, edit)
            for kind, those in {"csv": CSV_EDITS, "tsv": CSV_EDITS, "jsonl": JSON_EDITS}.items()
            for edit in those
        ]
        for number in range(NUM_CASES - len(named)):
            kind = FORMATS[number % len(FORMATS)]
            mode = ("edit", "a row", "anywhere")[number % 3]
            if mode == "edit":
                kind, edit = edits[number // 3 % len(edits)]
                named[f"{number}, {kind}, {edit}"] = (kind, mode, edit)
            else:
                named[f"{number}, {kind}, {mode}"] = (kind, mode, number)
        return named

    def attempt(self, what: Any, folder: Path) -> str:
        kind, mode, seed = what
        if kind == "folder":
            return self._try_folder(folder, random.Random(seed), mode)
        path = folder / (kind if kind.startswith("metadata") else f"pairs.{kind}")
        (folder / "images").symlink_to(self.folder / "images")
        content = self._parquet if kind == "parquet" else table_of(kind)
        pairs = self._pairs
        if kind in ("csv", "metadata.csv"):
            pairs = [(pair[0].replace(",", ";"), pair[1]) for pair in pairs if pair]
        if mode == "untouched":
            found = self._read(path, content, kind)
            assert found == pairs, f"{found}"
            return "untouched"
        if mode == "edit":
            return self._try_edit(path, content, kind, seed, pairs)

        dice = random.Random(seed)
        if kind == "parquet":
            damaged = flipped_pages(content, dice) if mode == "a row" else mutated(content, dice)
            return self._try_parquet(path, damaged, pairs)
        if mode == "a row":
            return self._try_row(path, content, kind, dice, pairs)
        return self._try_anywhere(path, content, mutated(content, dice), kind, pairs)

    def _read(self, path: Path, content: bytes, kind: str) -> list[Sample] | str:
        """Return what the rows of a table give, or why it is refused."""
        path.write_bytes(content)
        is_folder = kind.startswith("metadata")
        opened = path.parent if is_folder else path
        separator = _SEPARATORS.get(kind, ",")
        try:
            source = open_source(str(opened), separator=separator)
            return [sample_of(source, index)[0] for index in range(len(source))]
        except DataError as error:
            return check_refused(error, opened)

    def _try_edit(
        self, path: Path, content: bytes, kind: str, edit: str, pairs: list[Sample]
    ) -> str:
        """Make a known change of a table; raise unless it gives what is known."""
        change, expected = (JSON_EDITS if kind == "jsonl" else CSV_EDITS)[edit]
        found = self._read(path, change(content), kind)
        if isinstance(expected, str) and expected != _ALL:
            assert isinstance(found, str) and expected in found, f"not {expected!r}: {found}"
            return "edited and refused"
        wanted = list(pairs)
        if expected is None:
            wanted[_THIRD] = None
        elif expected != _ALL:
            third = pairs[_THIRD]
            wanted[_THIRD] = (expected[1], third and third[1])
        assert found == wanted, f"{found}, not {wanted}"
        return "edited and read"

    def _try_row(
        self, path: Path, content: bytes, kind: str, dice: random.Random, pairs: list[Sample]
    ) -> str:
        """Mutate one row without its line's end and quotes; raise unless all others are in their places."""
        row = dice.randrange(NUM_ROWS)
        is_json = kind.endswith("jsonl")
        forbidden = b"\n" if is_json else b'\n\r"'

        def change(line: bytes) -> bytes:
            changed = mutated(line.removesuffix(b"\n"), dice)
            return bytes(b for b in changed if b not in forbidden) + b"\n"

        damaged = _with_row(content, row - is_json, change)
        found = self._read(path, damaged, kind)
        if isinstance(found, str):
            if is_json:
                assert row == 0, f"one row of jsonl has it refused: {found}"
            else:
                assert not _is_utf8(damaged), f"one row has it refused: {found}"
            return "refused"
        behind = NUM_ROWS - 1 - row
        assert len(found) in (NUM_ROWS - 1, NUM_ROWS), f"{len(found)} rows of {NUM_ROWS}"
        assert found[:row] == pairs[:row], f"rows before row {row} are {found[:row]}"
        assert found[len(found) - behind :] == pairs[row + 1 :], f"rows after row {row} are {found}"
        return "read"

    def _try_anywhere(
        self, path: Path, content: bytes, damaged: bytes, kind: str, pairs: list[Sample]
    ) -> str:
        """Mutate a table anywhere; raise unless the rows before the damage, and if no quote is there those behind it, are
        in their places, and what is new comes of lines that are new."""
        found = self._read(path, damaged, kind)
        is_json = kind.endswith("jsonl")
        prefix = common_start(content, damaged)
        most = min(len(content), len(damaged)) - len(prefix)
        suffix = common_start(content[::-1], damaged[::-1])[:most][::-1]
        before = max(prefix.count(b"\n") - (not is_json), 0)
        behind = max(suffix.count(b"\n") - 1, 0)
        if isinstance(found, str):
            if is_json:
                assert before == 0, f"a later row of jsonl has it refused: {found}"
            elif before and kind != "quoted.csv":
                is_known = not _is_utf8(damaged) or b'"' in damaged[len(prefix) :]
                assert is_known, f"a later row has it refused: {found}"
            return "refused"

        assert found[:before] == pairs[:before], f"{before} rows before the damage are {found}"
        has_header = prefix.count(b"\n") > 0 or is_json
        if has_header and b'"' not in (b"" if is_json else damaged):
            behind = min(behind, NUM_ROWS - before)
            rest = pairs[NUM_ROWS - behind :]
            assert found[len(found) - behind :] == rest, (
                f"{behind} rows behind the damage are {found}"
            )
        lines = set(content.splitlines())
        num_new = sum(line not in lines for line in damaged.splitlines())
        strange = [sample for sample in found if sample is not None and sample not in pairs]
        assert len(strange) <= num_new, f"{num_new} lines are new, and {strange} come of them"
        return "read"

    def _try_parquet(self, path: Path, damaged: bytes, pairs: list[Sample]) -> str:
        """Read a mutated parquet table; raise for a pair that was not there, or that is elsewhere."""
        found = self._read(path, damaged, "parquet")
        if isinstance(found, str):
            return "refused"
        for row, sample in enumerate(found):
            assert sample is None or sample in pairs, f"row {row} is {sample}"
        if len(found) == NUM_ROWS:
            moved = [n for n, s in enumerate(found) if s is not None and s != pairs[n]]
            assert not moved, f"rows {moved} are those of others"
        return "read"

    def _try_folder(self, folder: Path, dice: random.Random, mode: str) -> str:
        """Mutate one caption's file of a folder, its name or its picture; raise unless all others are read."""
        row = dice.randrange(NUM_ROWS)
        for number, word in enumerate(_WORDS):
            content, picture = word.encode(), self._files[number]
            if number == row and mode != "untouched":
                if mode == "a row":
                    content = mutated(content, dice)
                else:
                    picture = mutated(picture, dice)
            (folder / f"{number}.txt").write_bytes(content)
            (folder / f"{number}.png").write_bytes(picture)
        source = open_source(str(folder))
        found = [sample_of(source, index)[0] for index in range(len(source))]
        assert len(found) == NUM_ROWS, f"{len(found)} of {NUM_ROWS} pictures"
        others = [n for n in range(NUM_ROWS) if n != row or mode == "untouched"]
        assert [found[n] for n in others] == [self._pairs[n] for n in others], f"{found}"
        return "untouched" if mode == "untouched" else "read" if found[row] else "bad sample"


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return False
    return True
