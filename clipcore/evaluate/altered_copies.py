"""Copies of pictures as they turn up elsewhere: cropped, stretched, compressed again, or in other colours.

Source: Radford et al. 2021, appendix C, whose detector of duplicates was trained on such pairs. Which alteration a picture
gets, and how strong it is, depends on its key alone.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from clipcore.data.resample import Picture, as_image

# Copies are made of pictures of at most so many pixels a side: those of cameras would take seconds.
_MAX_SIDE = 1024
# A cropped copy keeps at least so large a part of each side.
_LEAST_SIDE = 0.85
# A stretched copy is at most so many times wider, or higher, than the picture.
_MOST_STRETCH = 1.3
# JPEG's quality, from the worst on, and what Pillow takes for its best.
_QUALITY = (30, 80)
# Each channel of a tinted copy is at most so much brighter or darker, as a factor and in levels of 255.
_MOST_GAIN, _MOST_SHIFT = 0.2, 20

Alteration = Callable[[Image.Image, np.random.Generator], Image.Image]


def altered_copy(picture: Picture, key: str) -> Image.Image:
    """Return an altered copy of a picture in RGB.

    Args:
        picture: PIL's, or uint8 [H, W] or [H, W, 3].
        key: its name, a hash of which chooses among ``ALTERATIONS``.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:8], "big")
    rng = np.random.default_rng(seed)
    alter = list(ALTERATIONS.values())[int(rng.integers(len(ALTERATIONS)))]
    return alter(shrunk(picture, _MAX_SIDE), rng)


def cropped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return a part of an image, at a random place."""
    sides = [max(1, round(side * rng.uniform(_LEAST_SIDE, 1))) for side in image.size]
    left, top = (
        int(rng.integers(whole - part + 1)) for whole, part in zip(image.size, sides, strict=True)
    )
    return image.crop((left, top, left + sides[0], top + sides[1]))


def stretched(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return an image whose width over its height is another."""
    exponent = rng.uniform(-1, 1) * math.log(_MOST_STRETCH)
    width = max(1, round(image.width * math.exp(exponent)))
    return image.resize((width, image.height), Image.Resampling.BICUBIC)


def recompressed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return an image as a JPEG of low quality shows it."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=int(rng.integers(*_QUALITY)))
    content.seek(0)
    with Image.open(content) as copy:
        return copy.convert("RGB")


def tinted(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return an image with other colours: each channel times a factor, and moved."""
    gain = 1 + rng.uniform(-_MOST_GAIN, _MOST_GAIN, 3)
    shift = rng.uniform(-_MOST_SHIFT, _MOST_SHIFT, 3)
    pixels = np.asarray(image) * gain + shift
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


ALTERATIONS: dict[str, Alteration] = {
    "crop": cropped,
    "aspect": stretched,
    "JPEG": recompressed,
    "tint": tinted,
}


def shrunk(picture: Picture, max_side: int) -> Image.Image:
    """Return a picture in RGB with sides of at most so many pixels, in the same ratio."""
    image = as_image(picture).convert("RGB")  # a copy, also of a picture in RGB
    image.thumbnail((max_side, max_side))
    return image


def picture_uri(picture: Picture, max_side: int) -> str:
    """Return a picture of at most so many pixels a side as a PNG in a data URI, as a page shows it."""
    content = io.BytesIO()
    shrunk(picture, max_side).save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode("ascii")
