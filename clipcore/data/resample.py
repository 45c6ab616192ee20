"""Bicubic resizing of pictures: bit-identical to Pillow's, with clipcore._C's faster kernel where it was built."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image

from clipcore import native

Picture = Image.Image | np.ndarray
# uint8 [H, W, 3], width and height to uint8 [3, height, width]; the last argument says whether columns come first.
Kernel = Callable[[np.ndarray, int, int, bool], np.ndarray]
Resize = Callable[[np.ndarray, int, int], np.ndarray]


def as_image(picture: Picture) -> Image.Image:
    """Return the picture as a PIL image."""
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)


def resize_bicubic(picture: Picture, width: int, height: int) -> Picture:
    """Return the picture in another size; an array [height, width, 3] if the kernel resizes it, which takes colour only.

    Args:
        picture: a PIL image, or uint8 [H, W] or [H, W, 3].
    """
    if (resize := exact_resize()) is not None and (pixels := _pixels(picture)) is not None:
        return resize(pixels, width, height).transpose(1, 2, 0)
    return as_image(picture).resize((width, height), Image.Resampling.BICUBIC)


def _pixels(picture: Picture) -> np.ndarray | None:
    """Return a colour picture as an array with contiguous rows; None for other pictures."""
    if isinstance(picture, Image.Image):
        return np.asarray(picture) if picture.mode == "RGB" else None
    if picture.ndim == 3 and picture.shape[2] == 3 and picture.strides[1:] == (3, 1):
        return picture
    return None


@functools.cache
def exact_resize() -> Resize | None:
    """Return the compiled kernel with the pass order that agrees with the installed Pillow; None if neither does."""
    if (kernel := compiled_kernel()) is None:
        return None
    return next(filter(agrees_with_pillow, (by_shape(kernel), rows_first(kernel))), None)


def compiled_kernel() -> Kernel | None:
    """Return clipcore._C's kernel; None if it was not built, or for another torch: Pillow's results are the same."""
    try:
        return getattr(native.load(), "resample_bicubic", None)
    except ImportError:
        return None


def by_shape(kernel: Kernel) -> Resize:
    """Resize in Pillow 13's order: columns first if the height loses more than twice as many pixels as the width."""

    def resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
        lost_height, lost_width = pixels.shape[0] - height, pixels.shape[1] - width
        return kernel(pixels, width, height, lost_height > max(2 * lost_width, 0))

    return resize


def rows_first(kernel: Kernel) -> Resize:
    """Resize in the order of earlier Pillows, which is always the same."""
    return lambda pixels, width, height: kernel(pixels, width, height, False)


def agrees_with_pillow(resize: Resize) -> bool:
    """Return whether reduced and enlarged noise is equal: another compiler or Pillow may round coefficients differently."""
    rng = np.random.default_rng(0)
    for width, height in ((224, 224), (31, 60), (20, 40), (70, 43), (50, 20)):
        pixels = rng.integers(0, 2, (67, 61, 3), np.uint8) * np.uint8(255)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        if not np.array_equal(resize(pixels, width, height), np.asarray(image).transpose(2, 0, 1)):
            return False
    return True
