"""Decodes bytes to images, crops them, and makes normalised tensors.

Legend: B images, S pixels of a side.

In evaluation the result is bit-identical to open_clip's ``image_transform``: bicubic resize of the shortest side,
centre crop, RGB, [0, 1], mean and standard deviation; and so with its other modes and bilinear interpolation.

In training the paper takes "a random square crop from resized images" and no other augmentation (Radford et al. 2021,
section 2.3). The default is open_clip's version of it, ``RandomResizedCrop(S, scale=(0.9, 1.0))`` with sides in the ratio
of 3/4 to 4/3, so that results are comparable; with ``ratio=None`` crops are square. With ``resize`` the crop is exactly the
paper's: the shorter side is resized, then S x S pixels are cut out; an image that already has this size is not resized.

As in open_clip and webdataset, the orientation in a JPEG's EXIF block is ignored.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from clipcore.data import MAX_PIXELS, BadSample, DataError
from clipcore.data.choices import DECODERS
from clipcore.data.headers import check_header, check_scans, check_size
from clipcore.data.resample import Picture, as_image, resize_bicubic

# OpenAI's values, computed on its training images.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
# open_clip's names of them.
OPENAI_DATASET_MEAN, OPENAI_DATASET_STD = OPENAI_MEAN, OPENAI_STD

FORMATS = ("JPEG", "PNG", "WEBP")
RESIZE_MODES = ("shortest", "squash", "longest")
INTERPOLATIONS = ("bicubic", "bilinear")
# open_clip's augmentations that clipcore does not have. In open_clip too they are off by default.
_OTHER_AUGMENTATIONS = (
    "color_jitter",
    "color_jitter_prob",
    "gray_scale_prob",
    "re_prob",
    "re_count",
    "use_timm",
)
# A key in a picture's info dict, from which everything that a file wrote has been removed.
_TRANSPARENT = "clipcore: was transparent"
EARLIER_MAX_PIXELS = 89_478_485  # the limit in runs and prepared shards that do not record one
# Limit for a resized picture before the crop: a picture of 1 x 1,000s of pixels becomes one of 100s x millions.
MAX_RESIZED_PIXELS = 1 << 24
_CROP_ATTEMPTS = 10
# A JPEG may be halved on decoding as long as it stays this many times larger than its resized size: the gap at which
# Pillow's own ``thumbnail`` calls the result close to that of a full decoding.
REDUCING_GAP = 2


class Decoder(NamedTuple):
    """The settings for decoding images.

    ``name`` is the library for JPEG files. If a JPEG's shorter side is at least two, four or eight times ``min_side``, it is
    decoded at 1/2, 1/4 or 1/8 of its size, which the format supports and which is faster; 0 decodes all in full. Pictures
    with more than ``max_pixels`` pixels (half as many for a WebP) are bad samples.
    """

    name: str = "pillow"
    min_side: int = 0
    max_pixels: int = MAX_PIXELS


def check_decoder(decoder: str) -> None:
    """Raise DataError for a decoder that is unknown or not installed."""
    if decoder not in DECODERS:
        raise DataError(f"the image decoders are {', '.join(DECODERS)}; got {decoder!r}")
    if decoder == "simplejpeg":
        try:
            import simplejpeg  # noqa: F401
        except ImportError:
            raise DataError(
                "--image-decoder simplejpeg needs the package: pip install 'clipcore[jpeg]'"
            ) from None


def decode_image(data: bytes, decoder: Decoder | str = "pillow") -> Image.Image:
    """Return the picture in the bytes of a JPEG, PNG or WebP file, the first frame of an animated one, as RGB.

    A transparent picture is laid over white, because no viewer shows the colours under transparent pixels;
    ``was_transparent`` then returns true.

    Args:
        data: the whole file.
        decoder: ``pillow``, or ``simplejpeg`` for JPEG files of one or three channels; Pillow decodes the rest (PNG,
            WebP, CMYK), by a fixed rule on the header. A ``Decoder`` also sets the smallest size.

    Raises:
        BadSample: another format, damage, or a picture that would cost far more than others of the allowed size, because
            of its pixels, its scans, or a header of too many parts.
    """
    if not data:
        raise BadSample("the image file is empty")
    chosen = decoder if isinstance(decoder, Decoder) else Decoder(decoder)
    try:
        check_header(data, chosen.max_pixels)
        if chosen.name == "simplejpeg" and data[:2] == b"\xff\xd8":
            return _decode_simplejpeg(data, chosen)
        return _decode_pillow(data, chosen)
    except BadSample:
        raise
    except Image.UnidentifiedImageError:
        raise BadSample(f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except Exception as error:
        # Decoders raise nearly everything on damaged files: OSError, SyntaxError, struct.error, IndexError, ...
        raise BadSample(f"unreadable image: {str(error) or type(error).__name__}") from None


def _decode_pillow(data: bytes, decoder: Decoder) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns of sizes that the check below refuses, and of broken EXIF blocks, which are not used.
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_pixels(data, *image.size, decoder.max_pixels)
            if (part := _reduction(*image.size, decoder.min_side)) > 1:
                # Has no effect on other formats. Pillow uses the largest reduction that keeps both sides.
                image.draft(None, (image.width // part, image.height // part))
            return _as_rgb(image)


def _as_rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB, laid over white where a pixel is transparent; do not use ``image`` afterwards.

    Copies are avoided, because a picture takes 4 bytes per pixel.
    """
    if image.has_transparency_data:
        layers = image if image.mode == "RGBA" else image.convert("RGBA")
        if layers.getchannel("A").getextrema()[0] != 255:
            if layers is not image:
                image.close()
            white = Image.new("RGB", layers.size, "white")
            white.paste(layers, mask=layers)
            white.info = {_TRANSPARENT: True}
            return white

    if image.mode == "RGB":
        image.load()
        picture = image
    else:
        picture = image.convert("RGB")
    picture.info = {}
    return picture


def _check_pixels(data: bytes, width: int, height: int, max_pixels: int) -> None:
    """Raise BadSample for a picture with too many pixels, or a JPEG with too many scans for its pixels."""
    check_size(width, height, max_pixels, f"; --max-pixels {width * height} reads it")
    if data.startswith(b"\xff\xd8"):
        check_scans(data, width * height, max_pixels)


def was_transparent(image: Picture) -> bool:
    """Return whether ``decode_image`` has laid this picture over white."""
    return isinstance(image, Image.Image) and _TRANSPARENT in image.info


def _decode_simplejpeg(data: bytes, decoder: Decoder) -> Image.Image:
    import simplejpeg

    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _check_pixels(data, width, height, decoder.max_pixels)
    if colorspace not in ("Gray", "YCbCr", "RGB"):
        return _decode_pillow(data, decoder)
    part = _reduction(width, height, decoder.min_side)
    least = {"min_height": -(-height // part), "min_width": -(-width // part)}
    return Image.fromarray(simplejpeg.decode_jpeg(data, "RGB", **(least if part > 1 else {})))


def _reduction(width: int, height: int, min_side: int) -> int:
    """Return the divisor of a JPEG's sides on decoding: 8, 4, 2 or 1."""
    parts = min(width, height) // min_side if min_side else 1
    return next(part for part in (8, 4, 2, 1) if part <= max(parts, 1))


class ImageTransform:
    """The preprocessing of a model: ``transform(image)`` is a normalised float32 tensor [3, S, S].

    Args:
        image_size: S, at least 1; or (S, S).
        is_train: whether crops are random instead of central.
        mean, std: per channel, after scaling to [0, 1].
        scale: smallest and largest share of the area that a random crop keeps.
        ratio: smallest and largest width over height of a random crop, before it is resized to a square; None for
            square crops, whose area is a share of the largest square's.
        resize: pixels of the shorter side, at least S: images are resized to it and S x S pixels cut out at random, in
            place of ``scale`` and ``ratio``.
        resize_mode: one of ``RESIZE_MODES``, for the centre crop, open_clip's names: ``shortest`` resizes the shorter side
            to S and cuts the longer one, ``squash`` resizes both to S, ``longest`` resizes the longer side to S and pads the
            shorter one.
        interpolation: one of ``INTERPOLATIONS``, for the centre crop; random crops are resized bicubic, as in open_clip.
        fill_color: value of every channel in the padding of ``longest``, 0 to 255.

    Example:
        >>> transform = ImageTransform(224, is_train=False)
        >>> transform(Image.new("RGB", (640, 480))).shape
        torch.Size([3, 224, 224])
    """

    # Only other values become attributes of the object: a cache of features is found by these attributes, and those of
    # bicubic interpolation without padding stay valid.
    interpolation = "bicubic"
    fill_color = 0

    def __init__(
        self,
        image_size: int | Sequence[int],
        is_train: bool,
        mean: Sequence[float] = OPENAI_MEAN,
        std: Sequence[float] = OPENAI_STD,
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] | None = (3 / 4, 4 / 3),
        resize: int | None = None,
        resize_mode: str = "shortest",
        interpolation: str = "bicubic",
        fill_color: int = 0,
    ) -> None:
        image_size = square_side(image_size)
        if type(image_size) is not int or image_size < 1:
            raise ValueError(f"the side of the images is a number of pixels, got {image_size!r}")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"the scale of a crop is a range within (0, 1], got {scale}")
        if ratio is not None and not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"the ratio of a crop is a positive range, got {ratio}")
        if resize is not None and resize < image_size:
            raise ValueError(
                f"no crop of {image_size} pixels fits images resized to {resize}; --aug-resize is at least the model's "
                f"{image_size}"
            )
        if any(np.shape(values) != (3,) for values in (mean, std)):
            raise ValueError(
                f"mean and std are three numbers each, of a channel, got {mean} and {std}"
            )
        if resize_mode not in RESIZE_MODES:
            raise ValueError(f"the resize mode is {' or '.join(RESIZE_MODES)}, got {resize_mode!r}")
        if interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"the interpolation is {' or '.join(INTERPOLATIONS)}, got {interpolation!r}"
            )
        if type(fill_color) is not int or not 0 <= fill_color <= 255:
            raise ValueError(
                f"fill_color is a whole number from 0 to 255, of every channel, got {fill_color!r}"
            )
        self.image_size = image_size
        self.is_train = is_train
        self.mean = tuple(map(float, mean))
        self.std = tuple(map(float, std))
        self.scale = scale
        self.ratio = ratio
        self.resize = resize
        self.resize_mode = resize_mode
        if interpolation != type(self).interpolation:
            self.interpolation = interpolation
        if fill_color != type(self).fill_color:
            self.fill_color = fill_color

    @property
    def min_side(self) -> int:
        """Smallest length of a JPEG's shorter side on decoding: see ``Decoder``."""
        if self.resize is not None:
            return REDUCING_GAP * self.resize
        widest = 1.0 if self.ratio is None else max(self.ratio[1], 1 / self.ratio[0])
        return math.ceil(REDUCING_GAP * self.image_size * math.sqrt(widest / self.scale[0]))

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Tensor:
        return normalize_images(torch.from_numpy(self.crop(image, rng)), self.mean, self.std)

    def crop(self, image: Picture, rng: np.random.Generator | None = None) -> np.ndarray:
        """Return one image for ``normalize_images``, uint8 [3, S, S]; the arguments are those of ``crop_image``."""
        return stack_images([self.crop_image(image, rng)])[0]

    def crop_image(self, image: Picture, rng: np.random.Generator | None = None) -> Picture:
        """Return the crop as an image of S x S pixels; a view if the image is an array that needs no resizing.

        Args:
            image: a PIL image or a uint8 array [H, W] or [H, W, 3].
            rng: draws the crop in training [torch's generator].

        Raises:
            BadSample: the image is so long and thin that resizing it would need more than ``MAX_RESIZED_PIXELS`` pixels.
        """
        _check_picture(image)
        if not self.is_train:
            return self._centre_crop(image)
        if rng is None:
            # torch gives each DataLoader worker its own seed; a generator stored here would be the same in all.
            rng = np.random.default_rng(int(torch.randint(1 << 62, ())))
        if self.resize is not None:
            return self._window(image, self.resize, rng)
        if self.ratio is None:
            return self._square_crop(as_image(image), rng)
        size = self.image_size
        left, top, width, height = random_box(*sides(image), self.scale, self.ratio, rng)
        box = cut(image, left, top, width, height)
        return box if (width, height) == (size, size) else resize_bicubic(box, size, size)

    def _window(self, image: Picture, resize: int, rng: np.random.Generator) -> Picture:
        image = resize_shorter(image, resize)
        size, (width, height) = self.image_size, sides(image)
        x, y = rng.random(2).tolist()
        return cut(image, int(x * (width - size + 1)), int(y * (height - size + 1)), size, size)

    def _square_crop(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        area, x, y = rng.random(3).tolist()
        side = min(image.size) * math.sqrt(self.scale[0] + (self.scale[1] - self.scale[0]) * area)
        left, top = x * (image.width - side), y * (image.height - side)
        size = (self.image_size, self.image_size)
        return image.resize(
            size, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
        )

    def _centre_crop(self, image: Picture) -> Picture:
        size = self.image_size
        if self.resize_mode == "squash":
            return _resize(image, size, size, self.interpolation)
        if self.resize_mode == "longest":
            width, height = _sides_within(*sides(image), size)
            return _pad(_resize(image, width, height, self.interpolation), size, self.fill_color)
        image = resize_shorter(image, size, self.interpolation)
        width, height = sides(image)
        # Half a pixel is rounded to even, as in Python and torchvision.
        return cut(image, round((width - size) / 2), round((height - size) / 2), size, size)

    def __repr__(self) -> str:
        kind = {"squash": "squashed", "longest": f"padded with {self.fill_color}"}.get(
            self.resize_mode, "centre crop"
        )
        if self.interpolation != "bicubic":
            kind += f", {self.interpolation}"
        kind = f"random crop of {self.scale} of the area" if self.is_train else kind
        return f"ImageTransform({self.image_size}, {kind}, mean={self.mean}, std={self.std})"


def _check_picture(image: object) -> None:
    """Raise TypeError or ValueError unless it is a PIL image or uint8 pixels, with at least one pixel."""
    remedy = "open a file with PIL.Image.open(path), or give uint8 pixels as an array [H, W, 3]"
    if not isinstance(image, Image.Image | np.ndarray):
        raise TypeError(
            f"the preprocessing takes a PIL image, got {type(image).__name__}; {remedy}"
        )
    if isinstance(image, np.ndarray):
        is_picture = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
        if image.dtype != np.uint8 or not is_picture:
            raise ValueError(
                f"the preprocessing takes a PIL image, got an array of {image.dtype} {list(image.shape)}; {remedy}"
            )
    if not all(sides(image)):
        raise ValueError("the picture has no pixels")


def image_transform(
    image_size: int | Sequence[int],
    is_train: bool,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    resize_mode: str | None = None,
    interpolation: str | None = None,
    fill_color: int = 0,
    aug_cfg: Any = None,
) -> ImageTransform:
    """Return the preprocessing for a model of ``image_size``; open_clip's function.

    Args:
        image_size: side of the images, pixels; or (side, side).
        is_train: whether crops are random.
        mean, std: three numbers, or one for all channels [OpenAI's].
        resize_mode, fill_color: see ``ImageTransform`` [shortest, 0].
        interpolation: see ``ImageTransform``; open_clip's ``random`` is bicubic without timm [bicubic].
        aug_cfg: see ``crop_settings``.

    Raises:
        ValueError: a value that the preprocessing does not have; the message names it.
        TypeError: an unknown key of ``aug_cfg``.
    """
    return ImageTransform(
        image_size,
        is_train,
        mean=OPENAI_MEAN if mean is None else channels(mean),
        std=OPENAI_STD if std is None else channels(std),
        resize_mode=resize_mode or "shortest",
        interpolation=plain_interpolation(interpolation or "bicubic"),
        fill_color=fill_color,
        **crop_settings(aug_cfg),
    )


def square_side(image_size: int | Sequence[int]) -> int:
    """Return the side of a square image, given it or (side, side); raise ValueError if it is not square."""
    if isinstance(image_size, Sequence) and not isinstance(image_size, str):
        if len(image_size) not in (1, 2) or image_size[0] != image_size[-1]:
            raise ValueError(f"the models' images are square, got {tuple(image_size)}")
        image_size = image_size[0]
    return image_size


def channels(values: Sequence[float] | float) -> Sequence[float]:
    """Return a value for each of the three channels, given these or one for all."""
    return (float(values),) * 3 if isinstance(values, int | float) else values


def plain_interpolation(interpolation: str) -> str:
    """Return the interpolation that open_clip's ``random`` stands for without timm, bicubic; others are unchanged."""
    return "bicubic" if interpolation == "random" else interpolation


def _pair(name: str, value: object) -> tuple[float, float]:
    numbers = list(value) if isinstance(value, Sequence) else []
    if len(numbers) != 2 or not all(isinstance(number, int | float) for number in numbers):
        raise ValueError(f"aug_cfg's {name} is a pair such as (0.9, 1.0), got {value!r}")
    return numbers[0], numbers[1]


def _pixels(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"aug_cfg's resize is a number of pixels, got {value!r}")
    return value


def crop_settings(aug_cfg: Any) -> dict[str, Any]:
    """Return open_clip's ``aug_cfg`` as arguments of ``ImageTransform``.

    Args:
        aug_cfg: a dict or open_clip's ``AugmentationCfg``, with ``scale`` and ``ratio`` of the random crop; None in it means
            the default. ``resize`` is clipcore's own. ``ratio`` works, while open_clip needs timm for it.

    Raises:
        ValueError: an augmentation that clipcore does not have is on.
        TypeError: neither clipcore nor open_clip has such a key.
    """
    if dataclasses.is_dataclass(aug_cfg) and not isinstance(aug_cfg, type):
        aug_cfg = dataclasses.asdict(aug_cfg)
    if aug_cfg is not None and not isinstance(aug_cfg, Mapping):
        raise TypeError(f"aug_cfg is a dict such as {{'scale': (0.9, 1.0)}}, got {aug_cfg!r}")
    settings = {}
    for name, value in (aug_cfg or {}).items():
        if name in ("scale", "ratio", "resize"):
            if value is not None:
                settings[name] = _pixels(value) if name == "resize" else _pair(name, value)
        elif name not in _OTHER_AUGMENTATIONS:
            known = ["scale", "ratio", "resize", *_OTHER_AUGMENTATIONS]
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"aug_cfg has no key {name!r}{hint}")
        elif value:
            raise ValueError(
                f"aug_cfg's {name}={value!r} exists only in open_clip; leave it out: the paper's only augmentation is the "
                "random crop (scale, ratio)"
            )
    return settings


def sides(image: Picture) -> tuple[int, int]:
    """Return (width, height) of a picture."""
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def cut(image: Picture, left: int, top: int, width: int, height: int) -> Picture:
    """Return a part of a picture; a view if it is an array."""
    if isinstance(image, np.ndarray):
        return image[top : top + height, left : left + width]
    return image.crop((left, top, left + width, top + height))


def _resize(image: Picture, width: int, height: int, interpolation: str) -> Picture:
    """Return the picture in another size; the same object if it has that size."""
    if sides(image) == (width, height):
        return image
    if interpolation == "bicubic":
        return resize_bicubic(image, width, height)
    return as_image(image).resize((width, height), Image.Resampling.BILINEAR)


def _sides_within(width: int, height: int, size: int) -> tuple[int, int]:
    """Return the sides of a picture whose longer side becomes ``size``, rounded as in open_clip.

    A side that would be rounded to 0, of a picture more than 2 S times as long as wide, is 1; open_clip fails there.
    """
    ratio = max(width / size, height / size)
    return max(1, round(width / ratio)), max(1, round(height / ratio))


def _pad(picture: Picture, size: int, fill_color: int) -> Picture:
    """Return the picture in the middle of a square of one colour, as torchvision pads."""
    width, height = sides(picture)
    if (width, height) == (size, size):
        return picture
    image, right, below = as_image(picture), size - width, size - height
    border = (right // 2, below // 2, (right + 1) // 2, (below + 1) // 2)
    num_channels = len(image.getbands())
    fill: Any = (fill_color,) * num_channels if num_channels > 1 else fill_color
    padded = ImageOps.expand(image, border, fill)
    if image.mode == "P":
        palette = image.getpalette()
        assert palette is not None
        padded.putpalette(palette)
    return padded


def resize_shorter(image: Picture, size: int, interpolation: str = "bicubic") -> Picture:
    """Return the picture with ``size`` pixels on its shorter side, as torchvision does; the same object if it has them.

    Raises:
        BadSample: the result would have more than ``MAX_RESIZED_PIXELS`` pixels.
    """
    width, height = sides(image)
    if width <= height:
        new_width, new_height = size, int(size * height / width)
    else:
        new_width, new_height = int(size * width / height), size
    check_size(new_width, new_height, MAX_RESIZED_PIXELS, " as resized; crop it")
    return _resize(image, new_width, new_height, interpolation)


def random_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Return (left, top, width, height) of a random crop, with the distribution of torchvision's RandomResizedCrop.

    The area is uniform in ``scale``, the ratio of the sides log-uniform in ``ratio``, and the position uniform. After ten
    draws that do not fit, the crop is the largest centred box of an allowed ratio.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    # All draws at once, so that a sample always uses the same number of random numbers.
    draws = rng.random(4 * _CROP_ATTEMPTS).tolist()
    for k in range(0, len(draws), 4):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * draws[k])
        aspect = math.exp(low + (high - low) * draws[k + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[k + 2] * (width - w + 1)), int(draws[k + 3] * (height - h + 1)), w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (width - w) // 2, (height - h) // 2, w, h


def stack_images(images: Sequence[Picture]) -> np.ndarray:
    """Stack images of one size into uint8 [B, 3, S, S]; pictures that are not RGB are converted."""
    width, height = sides(images[0])
    pictures = [image for image in images if isinstance(image, Image.Image) and image.mode == "L"]
    if len(pictures) == len(images):
        return _stack_grey(pictures, width, height)
    stacked = np.empty((len(images), 3, height, width), np.uint8)
    # One by one, so that a picture is still in the processor's cache when its planes are separated.
    for planes, image in zip(stacked, images, strict=True):
        if isinstance(image, Image.Image) and image.mode not in ("RGB", "L"):
            image = image.convert("RGB")
        pixels = np.asarray(image)
        planes[...] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return stacked


def _stack_grey(images: Sequence[Image.Image], width: int, height: int) -> np.ndarray:
    # All are pasted into one tall picture, because each export from Pillow costs 15 us.
    sheet = Image.new("L", (width, height * len(images)))
    for i, image in enumerate(images):
        sheet.paste(image, (0, i * height))
    pixels = np.asarray(sheet).reshape(len(images), 1, height, width)
    return np.ascontiguousarray(np.broadcast_to(pixels, (len(images), 3, height, width)))


def normalize_images(
    images: Tensor,
    mean: Sequence[float] = OPENAI_MEAN,
    std: Sequence[float] = OPENAI_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return (x / 255 - mean) / std, on the images' device; in float32, bit-identical to the host's result.

    Args:
        images: uint8 [..., 3, S, S].
        dtype: dtype of the result, rounded once at the end.
    """
    if images.dtype != torch.uint8 or images.dim() < 3 or images.shape[-3] != 3:
        raise ValueError(
            f"images are uint8 [..., 3, S, S], got {images.dtype} {tuple(images.shape)}"
        )

    def on_device(values: Sequence[float]) -> Tensor:
        # Filled there: torch.tensor would copy them from pageable memory, and the host would wait for the GPU.
        return torch.cat([images.new_full((1, 1, 1), v, dtype=torch.float32) for v in values])

    # Divisors are tensors, because CUDA divides by a Python number through its reciprocal, which rounds twice.
    x = images.to(torch.float32).div_(on_device((255.0,)))
    return x.sub_(on_device(mean)).div_(on_device(std)).to(dtype)
