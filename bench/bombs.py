"""Pictures for bench_memory.py: small files with many pixels in their headers, slow files, and the largest accepted."""

from __future__ import annotations

import io
import itertools
import random
import struct
import zlib
from collections.abc import Callable

from PIL import Image

# The second last is the smallest that is refused.
SIZES = ((30_000, 30_000), (16_000, 16_000), (5_000, 5_201), (65_000, 65_000))


def encoded(kind: str, mode: str = "RGB", **settings: object) -> bytes:
    """Encode a black picture of 16 x 16 pixels."""
    stream = io.BytesIO()
    Image.new(mode, (16, 16)).save(stream, kind, **settings)
    return stream.getvalue()


def png_bomb(width: int, height: int) -> bytes:
    """Make a PNG of these sides with a thousand bytes of pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(bytes(1000))

    chunks = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, pixels)
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpeg_bomb(width: int, height: int) -> bytes:
    """Make a JPEG with these sides in its start of frame."""
    data = bytearray(encoded("JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_bomb(width: int, height: int) -> bytes:
    """Make a WebP with these sides in its lossless header, or in its extended one if they need more than 14 bits."""
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


def jpeg_of_scans(width: int, height: int, scans: int) -> bytes:
    """Make a progressive JPEG of these sides that repeats its last scan, which refines pixels, so many times."""
    data = bytearray(encoded("JPEG", progressive=True))
    at = data.index(b"\xff\xc2")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    at = data.rindex(b"\xff\xda")
    return bytes(data[:at] + data[at:-2] * scans + data[-2:])


def jpeg_of_parts(part: bytes, count: int) -> bytes:
    """Make a JPEG with so many equal parts between its first marker and the others."""
    data = encoded("JPEG")
    return data[:2] + part * count + data[2:]


def png_of_chunks(count: int, kind: bytes = b"prVt", content: bytes = b"") -> bytes:
    """Make a PNG with so many equal chunks before its pixels."""
    data = encoded("PNG")
    at = data.index(b"IDAT") - 4
    body = kind + content
    chunk = struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
    return data[:at] + chunk * count + data[at:]


def jpeg_of_comments(count: int) -> bytes:
    """Make a progressive JPEG with so many empty comments before its last scan."""
    data = encoded("JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + b"\xff\xfe\0\2" * count + data[at:]


def animated_webp(width: int, height: int) -> bytes:
    """Make a WebP of two frames of 16 x 16 pixels on a canvas of these sides."""
    frames = {"save_all": True, "append_images": [Image.new("RGB", (16, 16), "white")]}
    data = bytearray(encoded("WEBP", **frames))
    data[24:27] = (width - 1).to_bytes(3, "little")
    data[27:30] = (height - 1).to_bytes(3, "little")
    return bytes(data)


# Each would take seconds or hundreds of megabytes, although its pixels are few enough.
SLOW: dict[str, Callable[[], bytes]] = {
    "scans": lambda: jpeg_of_scans(4_000, 4_000, 200),
    "scans of a small one": lambda: jpeg_of_scans(16, 16, 600),
    "empty segments": lambda: jpeg_of_parts(b"\xff\xfe\0\2", 1 << 20),
    "filler": lambda: jpeg_of_parts(b"\xff", 1 << 22),
    "junk": lambda: jpeg_of_parts(b"\0", 1 << 22),
    "markers without a length": lambda: jpeg_of_parts(b"\xff\x01", 1 << 21),
    # Their length is not read, and the following bytes are read one by one.
    "segments without a handler": lambda: jpeg_of_parts(b"\xff\xf0\x7f\xff" + bytes(0x7FFD), 40),
    "scans and comments": lambda: jpeg_of_comments(1 << 20),
    "chunks": lambda: png_of_chunks(1 << 20),
    "profiles": lambda: png_of_chunks(900, b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 20))),
    "canvas": lambda: animated_webp(5_000, 2_601),
}


NUM_BOMBS = len(HEADERS) * len(SIZES) + len(SLOW)


def all_bombs() -> list[bytes]:
    """Make one of each format and size, and all the slow ones."""
    large = [make(*size) for make, size in itertools.product(HEADERS.values(), SIZES)]
    return large + [make() for make in SLOW.values()]


def picture_of(mode: str, width: int, height: int, kind: str, **settings: object) -> bytes:
    """Encode coarse noise, which compresses like a photograph."""
    noise = Image.frombytes(
        "RGBA", (width // 8, height // 8), random.Random(0).randbytes(width * height // 16)
    )
    stream = io.BytesIO()
    noise.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(
        stream, kind, **settings
    )
    return stream.getvalue()


# As many pixels as are decoded by default, without --max-pixels.
LARGEST: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: picture_of("RGB", 5000, 5200, "JPEG"),
    "JPEG, progressive, 4:4:4": lambda: picture_of(
        "RGB", 5000, 5200, "JPEG", progressive=True, subsampling=0
    ),
    "JPEG, progressive, CMYK": lambda: picture_of("CMYK", 5000, 5200, "JPEG", progressive=True),
    "JPEG of 24 scans": lambda: jpeg_of_scans(5000, 5200, 15),
    "PNG": lambda: picture_of("RGB", 5000, 5200, "PNG", compress_level=1),
    "PNG, RGBA": lambda: picture_of("RGBA", 5000, 5200, "PNG", compress_level=1),
    "PNG, LA": lambda: picture_of("LA", 5000, 5200, "PNG", compress_level=1),
    "WEBP": lambda: picture_of("RGB", 5000, 2600, "WEBP", method=0),
    "WEBP, lossless, RGBA": lambda: picture_of("RGBA", 5000, 2600, "WEBP", lossless=True, method=0),
    "WEBP, animated": lambda: animated_webp(5000, 2600),
}
