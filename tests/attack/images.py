"""Mutated pictures: each is decoded, the same each time, or is a bad sample."""

from __future__ import annotations

import io
import itertools
import random
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from attack.fuzz import (
    NUM_CASES,
    check_bad,
    digest,
    mutated,
)
from attack.harness import Attack, redirected
from clipcore.data import BadSample
from clipcore.data.transforms import DECODERS, MAX_PIXELS, Decoder, decode_image

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
