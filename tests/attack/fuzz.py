"""What the attacks on readers share: random changes of bytes, and what a refusal has to look like."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipcore.data import BadSample, DataError, PairSource

NUM_CASES = 10_000

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
