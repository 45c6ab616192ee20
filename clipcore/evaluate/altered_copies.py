"""Altered copies of pictures, as they occur on the web: cropped, stretched, recompressed, or in other colours.

Source: Radford et al. 2021, appendix C, whose duplicate detector was trained on such pairs. The kind and strength of a
picture's alteration depend only on its key.
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

# Pictures are reduced to this many pixels a side before they are copied; camera pictures would take seconds.
_MAX_SIDE = 1024
# Smallest share of each side that a cropped copy keeps.
_LEAST_SIDE = 0.85
# Largest factor by which a copy is stretched in width or height.
_MOST_STRETCH = 1.3
# The range of JPEG qualities: the worst one, and Pillow's best one.
_QUALITY = (30, 80)
# Largest change of each channel of a tinted copy, as a factor and in levels of 255.
_MOST_GAIN, _MOST_SHIFT = 0.2, 20

Alteration = Callable[[Image.Image, np.random.Generator], Image.Image]


def altered_copy(picture: Picture, key: str) -> Image.Image:
    """Return an altered copy of a picture in RGB.

    Args:
        picture: a PIL image, or uint8 [H, W] or [H, W, 3].
        key: its name, a hash of which chooses among ``ALTERATIONS``.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:8], "big")
    rng = np.random.default_rng(seed)
    alter = list(ALTERATIONS.values())[int(rng.integers(len(ALTERATIONS)))]
    return alter(shrunk(picture, _MAX_SIDE), rng)


def cropped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return a part of an image at a random position."""
    sides = [max(1, round(side * rng.uniform(_LEAST_SIDE, 1))) for side in image.size]
    left, top = (
        int(rng.integers(whole - part + 1)) for whole, part in zip(image.size, sides, strict=True)
    )
    return image.crop((left, top, left + sides[0], top + sides[1]))


def stretched(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return an image with another aspect ratio."""
    exponent = rng.uniform(-1, 1) * math.log(_MOST_STRETCH)
    width = max(1, round(image.width * math.exp(exponent)))
    return image.resize((width, image.height), Image.Resampling.BICUBIC)


def recompressed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return an image after compression as a low-quality JPEG."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=int(rng.integers(*_QUALITY)))
    content.seek(0)
    with Image.open(content) as copy:
        return copy.convert("RGB")


def tinted(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return an image with other colours: each channel is scaled and shifted."""
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
    """Return a picture in RGB, reduced to a largest side length in the same ratio."""
    image = as_image(picture).convert("RGB")  # a copy, even of a picture in RGB
    image.thumbnail((max_side, max_side))
    return image


def picture_uri(picture: Picture, max_side: int) -> str:
    """Return a picture, reduced to a largest side length, as a PNG in a data URI for a page."""
    content = io.BytesIO()
    shrunk(picture, max_side).save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode("ascii")
