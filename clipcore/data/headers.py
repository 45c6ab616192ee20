"""Checks of the cost of decoding a picture, read off its file before a decoder opens it.

Decoders go through a file's parts one by one in Python, and each scan of a progressive JPEG covers all pixels, so small
files can take seconds. An animated WebP takes the memory of its whole canvas, whatever its frames show.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from clipcore.data import BadSample

# Parts (segments of a JPEG, chunks of a PNG) that any file may have, and the bytes that allow one more part. Encoders
# write chunks of several KB; a file of many parts of a few bytes was made to be slow.
_MAX_PARTS, _BYTES_A_PART = 1000, 512
# Limits on the scans of a JPEG, each of which costs time per pixel: for any picture, and for the largest one. Encoders
# write about ten.
_MAX_SCANS, _SCANS_OF_LARGEST = 500, 24
# A WebP takes about twice the memory of other pictures of its size, for animation canvases and half-resolution colours.
_WEBP_COST = 2

# Compressed chunks of a PNG (a profile and texts), each inflated to 1 MiB at most.
_MAX_INFLATED, _INFLATED = 64, {b"iCCP", b"zTXt", b"iTXt"}

# A decoder copies the parts that hold no pixels.
_MAX_CHUNK_BYTES = 1 << 24

_FILLERS = re.compile(rb"\xff+")
# Within coded pixels a zero or a restart marker follows 0xff.
_MARKER = re.compile(rb"\xff[^\0\x01\xd0-\xd8\xff]")
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA
# Starts of frames, but for tables of Huffman codes (C4), JPG (C8) and arithmetic conditioning (CC).
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
# Markers without a length, or whose length Pillow does not read; it goes on with the next byte.
_BARE = {0x00, 0x01, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)}


def check_header(data: bytes, max_pixels: int) -> None:
    """Raise BadSample for a JPEG, PNG or WebP file that costs far more than a picture of ``max_pixels`` pixels.

    Files of other kinds are refused later, by the decoder.
    """
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        width, height = _webp_size(data)
        remedy = f", half of --max-pixels, as a WebP takes twice the memory; {_WEBP_COST * width * height} reads it"
        check_size(width, height, max_pixels // _WEBP_COST, remedy)


def check_size(width: int, height: int, max_pixels: int, remedy: str = "") -> None:
    """Raise BadSample for a picture with too many pixels, or with none."""
    if width * height > max_pixels:
        raise BadSample(f"{width} x {height} pixels are more than {max_pixels}{remedy}")
    if width < 1 or height < 1:
        raise BadSample(f"{width} x {height} pixels")


def check_scans(data: bytes, num_pixels: int, max_pixels: int) -> None:
    """Raise BadSample for a JPEG with so many scans that decoding takes seconds."""
    scans = count_scans(data)
    if scans > min(_MAX_SCANS, _SCANS_OF_LARGEST * max_pixels // max(num_pixels, 1)):
        raise BadSample(
            f"{scans} scans of {num_pixels} pixels are made to be slow; encode it again"
        )


def count_scans(data: bytes) -> int:
    """Return the number of scans that a decoder goes through; 1 for a non-progressive JPEG in one scan.

    Raises:
        BadSample: there are too many other parts between them.
    """
    num_components, is_progressive = 0, False
    for marker, at in _segments(data):
        if marker in _FRAMES:
            num_components = data[at + 9] if at + 9 < len(data) else 0
            is_progressive = marker in _PROGRESSIVE
        elif marker == _START_OF_SCAN:
            if not num_components:
                return 1
            if not is_progressive and data[at + 4 : at + 5] >= bytes([num_components]):
                return 1
            break
    else:
        return 1

    scans = num_parts = 0
    while (match := _MARKER.search(data, at)) is not None:
        marker, at = data[match.start() + 1], match.end()
        if marker == _END_OF_IMAGE:
            break
        scans += marker == _START_OF_SCAN
        num_parts += 1
        _refuse_parts(data, num_parts)
        at += int.from_bytes(data[at : at + 2], "big")
    return scans


def _refuse_parts(data: bytes, num_parts: int) -> None:
    if num_parts > _MAX_PARTS + len(data) // _BYTES_A_PART:
        raise BadSample("so many parts of a few bytes are made to be slow; encode it again")


def _check_jpeg(data: bytes) -> None:
    """Check the segments before the first scan and the bytes between them, which decoders skip one by one."""
    for _ in _segments(data):
        pass


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, position) of a JPEG up to its first scan; raise BadSample for too many parts."""
    at, num_parts = 2, 0
    while at + 1 < len(data):
        if data[at] != 0xFF:
            junk_end = data.find(b"\xff", at)
            junk_end = junk_end if junk_end >= 0 else len(data)
        else:
            junk_end = _FILLERS.match(data, at).end() - 1  # type: ignore[union-attr]
        num_parts += 1 + junk_end - at
        _refuse_parts(data, num_parts)
        at = junk_end
        if at + 1 >= len(data) or data[at] != 0xFF:
            return
        marker = data[at + 1]
        yield marker, at
        if marker == _START_OF_SCAN:
            return
        at += 2 if marker in _BARE else 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def _check_png(data: bytes) -> None:
    at, num_parts, num_inflated = 8, 0, 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            return
        num_parts += 1
        if size > _MAX_CHUNK_BYTES and kind not in (b"IDAT", b"fdAT"):
            raise BadSample(f"{size} bytes beside the pixels are too large; encode it again")
        num_inflated += kind in _INFLATED
        _refuse_parts(data, num_parts)
        if num_inflated > _MAX_INFLATED:
            raise BadSample(
                f"more than {_MAX_INFLATED} compressed texts are made to be slow; encode it again"
            )
        at += 12 + size


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a WebP's canvas, (1, 1) where the header is cut off."""
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8 " and len(data) >= 30:
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return 1, 1
