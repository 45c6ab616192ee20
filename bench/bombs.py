"""Pictures for bench_memory.py: small files whose headers promise more pixels than a decoder may allocate."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Callable

from PIL import Image

# The second last is the smallest that is refused; its pixels would take 268 MB.
SIZES = ((30_000, 30_000), (16_000, 16_000), (10_000, 8_948), (65_000, 65_000))


def encoded(kind: str, mode: str = "RGB", **settings: object) -> bytes:
    """Encodes a black picture of 16 x 16 pixels."""
    stream = io.BytesIO()
    Image.new(mode, (16, 16)).save(stream, kind, **settings)
    return stream.getvalue()


def png_bomb(width: int, height: int) -> bytes:
    """Makes a PNG of these sides with a thousand bytes of pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(bytes(1000))

    chunks = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, pixels)
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpeg_bomb(width: int, height: int) -> bytes:
    """Makes a JPEG whose start of frame has these sides."""
    data = bytearray(encoded("JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_bomb(width: int, height: int) -> bytes:
    """Makes a WebP whose lossless header has these sides, or its extended one where they need more than 14 bits."""
    if max(width, height) <= 2**14:
        data = bytearray(encoded("WEBP", lossless=True))
        at = data.index(b"VP8L") + 9  # the name, the length and a signature
        flags = data[at + 3] >> 4
        data[at : at + 4] = (flags << 28 | height - 1 << 14 | width - 1).to_bytes(4, "little")
        return bytes(data)

    data = bytearray(encoded("WEBP", "RGBA", exif=b"Exif\0\0abcd"))
    assert data[12:16] == b"VP8X"
    data[24:27] = (width - 1).to_bytes(3, "little")
    data[27:30] = (height - 1).to_bytes(3, "little")
    return bytes(data)


HEADERS: dict[str, Callable[[int, int], bytes]] = {
    "PNG": png_bomb,
    "JPEG": jpeg_bomb,
    "WEBP": webp_bomb,
}


def all_bombs() -> list[bytes]:
    """Makes one of each format and size."""
    return [make(*size) for make, size in itertools.product(HEADERS.values(), SIZES)]
