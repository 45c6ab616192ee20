"""Bicubic resizing of pictures: Pillow's results to the bit, by clipcore._C's faster sums where it was built."""

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
    """The picture as PIL's."""
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)


def resize_bicubic(picture: Picture, width: int, height: int) -> Picture:
    """The picture in another size; of one in colour that the kernel takes, an array [height, width, 3].

    Args:
        picture: PIL's, or uint8 [H, W] or [H, W, 3].
    """
    if (resize := exact_resize()) is not None and (pixels := _pixels(picture)) is not None:
        return resize(pixels, width, height).transpose(1, 2, 0)
    return as_image(picture).resize((width, height), Image.Resampling.BICUBIC)


def _pixels(picture: Picture) -> np.ndarray | None:
    """A picture in colour as an array whose rows are in one piece, None of another picture."""
    if isinstance(picture, Image.Image):
        return np.asarray(picture) if picture.mode == "RGB" else None
    if picture.ndim == 3 and picture.shape[2] == 3 and picture.strides[1:] == (3, 1):
        return picture
    return None


@functools.cache
def exact_resize() -> Resize | None:
    """The compiled kernel, in the order of passes in which it agrees with the installed Pillow, if there is one."""
    if (kernel := compiled_kernel()) is None:
        return None
    return next(filter(agrees_with_pillow, (by_shape(kernel), rows_first(kernel))), None)


def compiled_kernel() -> Kernel | None:
    """clipcore._C's; None where it was not built, or for another torch: Pillow's results are the same."""
    try:
        return getattr(native.load(), "resample_bicubic", None)
    except ImportError:
        return None


def by_shape(kernel: Kernel) -> Resize:
    """As Pillow 13: columns come first where the height loses more than twice as many pixels as the width."""

    def resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
        lost_height, lost_width = pixels.shape[0] - height, pixels.shape[1] - width
        return kernel(pixels, width, height, lost_height > max(2 * lost_width, 0))

    return resize


def rows_first(kernel: Kernel) -> Resize:
    """As earlier ones: always in the same order."""
    return lambda pixels, width, height: kernel(pixels, width, height, False)


def agrees_with_pillow(resize: Resize) -> bool:
    """Whether noise comes out equal, reduced and enlarged: another compiler or Pillow may round a coefficient otherwise."""
    rng = np.random.default_rng(0)
    for width, height in ((224, 224), (31, 60), (20, 40), (70, 43), (50, 20)):
        pixels = rng.integers(0, 2, (67, 61, 3), np.uint8) * np.uint8(255)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        if not np.array_equal(resize(pixels, width, height), np.asarray(image).transpose(2, 0, 1)):
            return False
    return True
