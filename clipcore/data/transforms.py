"""From the bytes of a picture to the model's input: decoding, crop, normalisation.

Legend: B images, S side of the model's image.

Training: a random square, resized bicubically, as in the paper ("a random square crop from resized images is the only
data augmentation", Radford et al. 2021, section 2.4), or open_clip's RandomResizedCrop. Evaluation: the short side
resized bicubically to S, then the centre; equal to open_clip's to the bit.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipcore.data.pairs import BadSample

# The mean and standard deviation of the images that CLIP was trained on (openai/CLIP, clip.py).
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

# A picture that claims more pixels is a decompression bomb, or at least a mistake: Pillow's own limit.
MAX_PIXELS = 89_478_485
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
DECODERS = ("pillow", "simplejpeg")


def decode_image(data: bytes, decoder: str = "pillow") -> Image.Image:
    """The picture as RGB.

    Args:
        data: a JPEG, PNG, WebP, BMP or GIF file (its first frame); the size in its header is checked before decoding.
        decoder: ``simplejpeg`` decodes JPEGs faster, and a level or so differently.

    Raises:
        BadSample: no picture, a broken one, or one that is too large.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise BadSample(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
        if decoder == "simplejpeg" and image.format == "JPEG" and image.mode in ("RGB", "L"):
            import simplejpeg

            return Image.fromarray(simplejpeg.decode_jpeg(data, colorspace="RGB"))
        return image.convert("RGB")
    except BadSample:
        raise
    except Exception as error:
        # Pillow's plugins raise whatever their parsers stumble over; all of it means a broken picture.
        raise BadSample(f"not a readable image ({type(error).__name__}: {error})") from error


class ImageTransform:
    """The preprocessing of a model: ``transform(image)`` is its input.

    Args:
        image_size: S, pixels.
        is_train: random crop in place of the centre.
        scale: share of the area that the random crop keeps, smallest and largest.
        ratio: None for square crops; (3/4, 4/3) is open_clip's RandomResizedCrop.
        mean, std: of the normalisation, by colour.
    """

    def __init__(
        self,
        image_size: int,
        is_train: bool,
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] | None = None,
        mean: Sequence[float] = OPENAI_MEAN,
        std: Sequence[float] = OPENAI_STD,
    ) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"the crop keeps a share of the area between 0 and 1, got {scale}")
        self.image_size, self.is_train = image_size, is_train
        self.scale, self.ratio = scale, ratio
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        """A picture to float32 [3, S, S], normalised. Random crops follow torch's generator."""
        rng = None
        if self.is_train:
            rng = np.random.default_rng(int(torch.randint(2**62, ())))
        return normalize_images(torch.from_numpy(self.crop(image, rng))[None], self.mean, self.std)[0]

    def crop(
        self, image: Image.Image | np.ndarray, rng: np.random.Generator | None = None
    ) -> np.ndarray:
        """A picture to uint8 [3, S, S]: the random crop of ``rng``, or the centre without one."""
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        if rng is None or not self.is_train:
            resized = self._centre(image)
        elif self.ratio is None:
            resized = self._random_square(image, rng)
        else:
            resized = self._random_resized_crop(image, rng, self.ratio)
        if resized.mode == "L":
            return np.repeat(np.asarray(resized)[None], 3, 0)
        return np.ascontiguousarray(np.asarray(resized.convert("RGB")).transpose(2, 0, 1))

    def _centre(self, image: Image.Image) -> Image.Image:
        """The rounding is torchvision's, in Resize and in CenterCrop."""
        size = self.image_size
        short, long = min(image.size), max(image.size)
        other = int(size * long / short)
        target = (size, other) if image.width <= image.height else (other, size)
        if image.size != target:
            image = image.resize(target, Image.Resampling.BICUBIC)
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        return image.crop((left, top, left + size, top + size))

    def _random_square(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        area, x, y = rng.random(3)
        low, high = self.scale
        side = min(image.size) * math.sqrt(low + (high - low) * area)
        left, top = x * (image.width - side), y * (image.height - side)
        box = (left, top, left + side, top + side)
        return image.resize((self.image_size,) * 2, Image.Resampling.BICUBIC, box=box)

    def _random_resized_crop(
        self, image: Image.Image, rng: np.random.Generator, ratio: tuple[float, float]
    ) -> Image.Image:
        """torchvision's: ten tries for a rectangle inside the picture, else the largest central one."""
        width, height = image.size
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                break
        else:
            aspect = min(max(width / height, ratio[0]), ratio[1])
            w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
            left, top = (width - w) // 2, (height - h) // 2
        cut = image.crop((left, top, left + w, top + h))
        return cut.resize((self.image_size,) * 2, Image.Resampling.BICUBIC)


def normalize_images(images_B3SS: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [B, 3, S, S] to float32 of mean 0 and deviation 1 by colour, on the images' device; the arithmetic, and so
    the bits, are torchvision's ToTensor and Normalize."""
    mean_3 = torch.tensor(mean, dtype=torch.float32, device=images_B3SS.device)
    std_3 = torch.tensor(std, dtype=torch.float32, device=images_B3SS.device)
    images = images_B3SS.to(torch.float32).div_(255)
    return images.sub_(mean_3[:, None, None]).div_(std_3[:, None, None])


def image_transform(
    image_size: int,
    is_train: bool,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageTransform:
    """The preprocessing for a model of ``image_size`` (open_clip's name)."""
    return ImageTransform(image_size, is_train, mean=mean or OPENAI_MEAN, std=std or OPENAI_STD)
