"""Preprocessing: evaluation equal to open_clip's to the bit, crops a function of the generator, damage a BadSample."""

from __future__ import annotations

import io
import itertools
import math
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from openclip import import_open_clip
from PIL import Image, ImageFile, WebPImagePlugin
from PIL.PngImagePlugin import PngInfo

from clipcore.data import BadSample, headers
from clipcore.data.transforms import (
    MAX_PIXELS,
    MAX_RESIZED_PIXELS,
    OPENAI_MEAN,
    OPENAI_STD,
    Decoder,
    ImageTransform,
    decode_image,
    image_transform,
    normalize_images,
    random_box,
    stack_images,
    was_transparent,
)

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import bombs

pytestmark = pytest.mark.fast

SIZES = [
    (32, 32),
    (33, 32),
    (32, 33),
    (37, 64),
    (640, 481),
    (100, 31),
    (31, 100),
    (7, 5),
    (1, 9),
    (224, 225),
]


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(
        0, 256, (height, width, 4), np.uint8
    )
    return Image.fromarray(pixels, "RGBA").convert(mode)


def encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [32, 224, 15])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "LA", "1", "I;16"])
def test_evaluation_equals_open_clip_to_the_bit(size, mode):
    open_clip = import_open_clip()
    theirs = open_clip.image_transform(size, is_train=False, mean=OPENAI_MEAN, std=OPENAI_STD)
    ours = image_transform(size, is_train=False)
    for width, height in SIZES:
        image = (
            Image.new("I;16", (width, height), 77) if mode == "I;16" else noise(width, height, mode)
        )
        assert torch.equal(ours(image), theirs(image)), (width, height)
        crop = torch.from_numpy(ours.crop(image))
        assert torch.equal(normalize_images(crop, ours.mean, ours.std), theirs(image))


def test_training_crops_are_those_of_torchvision_for_the_same_box():
    import_open_clip()
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as reference

    transform = ImageTransform(32, is_train=True)
    for width, height in SIZES:
        image = noise(width, height)
        for seed in range(20):
            left, top, w, h = random_box(
                width, height, transform.scale, transform.ratio, np.random.default_rng(seed)
            )
            theirs = reference.resized_crop(
                image, top, left, h, w, [32, 32], InterpolationMode.BICUBIC
            )
            ours = transform.crop(image, np.random.default_rng(seed))
            assert np.array_equal(ours.transpose(1, 2, 0), np.asarray(theirs))
    image, rng = noise(640, 481), np.random.default_rng(0)
    assert not np.array_equal(transform.crop(image, rng), transform.crop(image, rng))


@pytest.mark.parametrize(
    ("scale", "ratio"),
    [((0.3, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (3 / 4, 4 / 3)), ((1, 1), (5, 6))],
)
def test_the_same_uniform_numbers_give_torchvisions_box(monkeypatch, scale, ratio):
    import_open_clip()
    from torchvision.transforms import RandomResizedCrop

    for width, height in [(40, 40), (64, 48), (300, 100), (20, 200), (9, 1)]:
        for seed in range(50):
            draws = np.random.default_rng(seed).random(40).reshape(10, 4)
            # torchvision draws area, then ratio; for a box that fits, then top, then left.
            turn = itertools.count()
            place = iter((3, 2))

            class Uniform:
                def uniform_(self, low, high, draws=draws, turn=turn):  # type: ignore[no-untyped-def]
                    attempt, which = divmod(next(turn), 2)
                    value = float(low) + (float(high) - float(low)) * draws[attempt, which]
                    return torch.tensor(value, dtype=torch.float64)

            def randint(low, high, size, draws=draws, turn=turn, place=place):  # type: ignore[no-untyped-def]
                attempt = next(turn) // 2 - 1
                return torch.tensor(low + int((high - low) * draws[attempt, next(place)]))

            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", lambda *_: Uniform())
                patch.setattr(torch, "randint", randint)
                image = Image.new("L", (width, height))
                top, left, h, w = RandomResizedCrop.get_params(image, scale, ratio)
            ours = random_box(width, height, scale, ratio, np.random.default_rng(seed))
            assert ours == (left, top, w, h)


def test_areas_and_ratios_cover_their_ranges_evenly():
    rng = np.random.default_rng(0)
    boxes = [random_box(1000, 1000, (0.2, 0.5), (3 / 4, 4 / 3), rng) for _ in range(4000)]
    areas = np.array([w * h for _, _, w, h in boxes]) / 1e6
    logs = np.log([w / h for _, _, w, h in boxes]) / math.log(4 / 3)
    lefts = np.array([left / (1000 - w) for left, _, w, _ in boxes])
    for values, low, high in ((areas, 0.2, 0.5), (logs, -1, 1), (lefts, 0, 1)):
        counts, _ = np.histogram(values, 20, (low - 0.002, high + 0.002))
        assert abs(counts - 200).max() < 5 * math.sqrt(
            200
        )  # five standard deviations of a fixed draw


def test_square_crops_keep_squares_square():
    circle = Image.new("L", (60, 60), 0)
    transform = ImageTransform(32, is_train=True, ratio=None, scale=(0.5, 0.5))
    crop = transform.crop(circle, np.random.default_rng(0))
    assert crop.shape == (3, 32, 32)
    gradient = Image.fromarray(np.tile(np.arange(0, 240, 2, dtype=np.uint8), (60, 1)))
    crop = transform.crop(gradient, np.random.default_rng(1))
    steps = np.diff(crop[0, 16].astype(int))[4:-4]
    assert abs(steps.mean() - 2 * 60 * math.sqrt(0.5) / 32) < 0.1


def test_arrays_are_images_and_grey_ones_have_three_equal_channels():
    grey = np.asarray(noise(40, 40, "L"))
    for transform in (ImageTransform(32, True), ImageTransform(32, False)):
        crops = [transform.crop(x, np.random.default_rng(0)) for x in (grey, Image.fromarray(grey))]
        assert np.array_equal(crops[0], crops[1]) and crops[0].dtype == np.uint8
        assert (crops[0] == crops[0][:1]).all() and crops[0].flags.c_contiguous
    colour = np.asarray(noise(40, 40))
    stacked = stack_images([Image.fromarray(grey), Image.fromarray(colour)])
    assert np.array_equal(stacked[1], colour.transpose(2, 0, 1))
    assert np.array_equal(stacked[0], np.broadcast_to(grey, (3, 40, 40)))


def test_without_a_generator_crops_follow_torchs():
    transform, image = ImageTransform(32, is_train=True), noise(60, 50)
    torch.manual_seed(3)
    first = [transform(image) for _ in range(2)]
    torch.manual_seed(3)
    assert torch.equal(first[0], transform(image)) and not torch.equal(first[0], first[1])
    assert first[0].shape == (3, 32, 32) and first[0].dtype == torch.float32


def test_normalised_images_of_all_values_and_other_types():
    values = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    exact = (
        values.double() / 255 - torch.tensor(OPENAI_MEAN).double().view(3, 1, 1)
    ) / torch.tensor(OPENAI_STD).double().view(3, 1, 1)
    single = normalize_images(values)
    # Three roundings of at most half a unit in the last place of values below 3.
    assert (single - exact).abs().max() < 3 * 2**-23
    assert torch.equal(normalize_images(values, dtype=torch.bfloat16), single.bfloat16())
    for wrong in (values.float(), values[0, 0], values[:, :1]):
        with pytest.raises(ValueError, match=r"uint8 \[..., 3, S, S\]"):
            normalize_images(wrong)


@pytest.mark.parametrize("settings", [{"scale": (0, 1)}, {"scale": (1, 0.5)}, {"ratio": (0, 1)}])
def test_settings_that_cannot_be(settings):
    with pytest.raises(ValueError, match="crop"):
        ImageTransform(32, True, **settings)


@pytest.mark.parametrize("settings", [{"mean": (0.5, 0.5)}, {"std": 0.5}])
def test_means_and_deviations_are_of_three_channels(settings):
    with pytest.raises(ValueError, match="mean and std are three numbers each"):
        ImageTransform(32, False, **settings)


def over_white(image: Image.Image) -> Image.Image:
    """Each channel over white by its definition, rounded."""
    pixels = np.asarray(image).astype(float)
    alpha = pixels[..., 3:] / 255
    return Image.fromarray((alpha * pixels[..., :3] + (1 - alpha) * 255).round().astype(np.uint8))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(3, 32, 32), TypeError, "takes a PIL image, got Tensor; open a file"),
        ("picture.jpg", TypeError, "takes a PIL image, got str"),
        (None, TypeError, "got NoneType"),
        (np.zeros((32, 32, 3), np.float32), ValueError, r"an array of float32 \[32, 32, 3\]"),
        (np.zeros((3, 32, 32), np.uint8), ValueError, r"an array of uint8 \[3, 32, 32\]"),
        (np.zeros((32, 32, 4), np.uint8), ValueError, r"an array of uint8 \[32, 32, 4\]"),
        (np.zeros((0, 32, 3), np.uint8), ValueError, "has no pixels"),
        (Image.new("RGB", (0, 3)), ValueError, "has no pixels"),
    ],
)
@pytest.mark.parametrize("is_train", [False, True])
def test_what_is_no_picture_is_named(image, error, message, is_train):
    with pytest.raises(error, match=message):
        ImageTransform(32, is_train)(image)


def test_transparent_pictures_lie_over_white_and_are_told_apart():
    hidden = np.zeros((4, 4, 4), np.uint8)
    hidden[..., 0] = 255  # red where nothing shows
    hidden[1:3, 1:3] = (0, 0, 255, 255)
    hidden[0, 0] = (0, 0, 0, 128)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 1), 1)
    grey = Image.new("L", (4, 4), 9)
    grey.putpixel((1, 1), 7)
    pictures = {
        "RGBA": encoded(Image.fromarray(hidden), "PNG"),
        "WebP": encoded(Image.fromarray(hidden), "WEBP", lossless=True, exact=True),
        "palette": encoded(palette, "PNG", transparency=0),
        "colour": encoded(grey, "PNG", transparency=9),
    }
    for kind, data in pictures.items():
        picture = decode_image(data)
        assert picture.mode == "RGB" and picture.getpixel((3, 3)) == (255, 255, 255), kind
        assert was_transparent(picture), kind
    assert decode_image(pictures["RGBA"]).getpixel((0, 0)) == (127, 127, 127)
    assert decode_image(pictures["RGBA"]).getpixel((1, 1)) == (0, 0, 255)
    assert decode_image(pictures["colour"]).getpixel((1, 1)) == (7, 7, 7)

    # Opaque pictures with a channel for it, others, and arrays are not.
    opaque = hidden.copy()
    opaque[..., 3] = 255
    plain = decode_image(encoded(Image.fromarray(opaque), "PNG"))
    assert np.array_equal(np.asarray(plain), opaque[..., :3]) and not was_transparent(plain)
    assert not was_transparent(hidden)
    # Nor can a file claim it in its notes.
    notes = PngInfo()
    notes.add_text("clipcore: was transparent", "True")
    assert not was_transparent(decode_image(encoded(noise(4, 4), "PNG", pnginfo=notes)))


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "LA", "I;16", "1"])
def test_decoding_is_pillows_conversion_to_rgb(decoder, mode):
    kinds = {
        "RGB": ("JPEG", "PNG", "WEBP"),
        "L": ("JPEG", "PNG"),
        "CMYK": ("JPEG",),
        "RGBA": ("PNG", "WEBP"),
    }
    for kind in kinds.get(mode, ("PNG",)):
        image = Image.new("I;16", (21, 13), 7000) if mode == "I;16" else noise(21, 13, mode)
        data = encoded(image, kind)
        ours = decode_image(data, decoder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about palettes with transparency
            theirs = Image.open(io.BytesIO(data))
            if theirs.has_transparency_data:
                theirs = over_white(theirs.convert("RGBA"))
            theirs = theirs.convert("RGB")
        assert ours.mode == "RGB" and ours.size == (21, 13)
        gap = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max()
        # Another decoder may round a colour differently by a little; Pillow itself may not.
        assert gap == 0 if decoder == "pillow" or kind != "JPEG" or mode == "CMYK" else gap <= 8


def test_orientation_is_not_applied_and_the_first_frame_counts():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(noise(20, 10), "JPEG", exif=exif)).size == (20, 10)
    frames = [noise(20, 10), noise(20, 10, "L").convert("RGB")]
    for kind in ("WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert np.array_equal(np.asarray(decode_image(data)), np.asarray(frames[0]))


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
@pytest.mark.parametrize("kind", bombs.HEADERS)
def test_bombs_are_refused_before_they_are_decoded(decoder, kind, monkeypatch):
    for holder in (ImageFile.ImageFile, WebPImagePlugin.WebPImageFile):
        monkeypatch.setattr(holder, "load", lambda *_: pytest.fail("pixels were decoded"))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_: pytest.fail("pixels were decoded"))
    with pytest.raises(pytest.fail.Exception, match="decoded"):  # what a picture does
        decode_image(bombs.encoded(kind), decoder)
    for width, height in bombs.SIZES:
        # Pillow has a limit of its own, twice as high, when it opens a file.
        with pytest.raises(BadSample, match=r"pixels are more than|exceeds limit") as caught:
            decode_image(bombs.HEADERS[kind](width, height), decoder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
@pytest.mark.parametrize("kind", bombs.SLOW)
def test_files_that_are_made_to_be_slow_are_refused_by_their_headers(decoder, kind, monkeypatch):
    data = bombs.SLOW[kind]()
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_: pytest.fail("pixels were decoded"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("pixels were decoded"))
    if not kind.startswith("scans"):  # which are judged by the size, too
        monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("the file was parsed"))
        header = "decode_jpeg_header"
        monkeypatch.setattr(simplejpeg, header, lambda *_: pytest.fail("the file was parsed"))
    with pytest.raises(BadSample, match=r"made to be slow|half of --max-pixels") as caught:
        decode_image(data, decoder)
    assert "\n" not in str(caught.value)


def test_a_png_with_megabytes_beside_its_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(headers, "_MAX_CHUNK_BYTES", 1000)
    decode_image(bombs.png_of_chunks(1, content=bytes(1000)))
    with pytest.raises(BadSample, match="1001 bytes beside the pixels are too large"):
        decode_image(bombs.png_of_chunks(1, content=bytes(1001)))
    # Pixels may be as large as they are.
    monkeypatch.setattr(headers, "_MAX_CHUNK_BYTES", 20)
    decode_image(encoded(noise(48, 40), "PNG"))


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_usual_files_of_many_parts_are_decoded(decoder):
    image = noise(64, 48)
    usual = [
        encoded(image, "JPEG", progressive=True),
        bombs.jpeg_of_parts(b"\xff\xe4\0\6abcd", 60),
        bombs.jpeg_of_parts(b"\xff", 60),
        bombs.png_of_chunks(900),
        bombs.animated_webp(32, 16),
        encoded(image, "WEBP"),
        encoded(image, "WEBP", lossless=True),
        encoded(image, "WEBP", exif=b"Exif\0\0abcd"),
    ]
    for data in usual:
        assert decode_image(data, decoder).mode == "RGB"


def test_a_jpeg_has_the_more_scans_the_smaller_it_is():
    before = headers.count_scans(bombs.jpeg_of_scans(16, 16, 1)) - 1
    assert before == 9
    for pixels, most in ((MAX_PIXELS, 24), (MAX_PIXELS // 10, 240), (1, 500)):
        headers.check_scans(bombs.jpeg_of_scans(16, 16, most - before), pixels, MAX_PIXELS)
        with pytest.raises(BadSample, match=f"{most + 1} scans"):
            headers.check_scans(bombs.jpeg_of_scans(16, 16, most + 1 - before), pixels, MAX_PIXELS)


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
@pytest.mark.parametrize("progressive", [False, True])
def test_only_scans_that_are_decoded_count(decoder, progressive):
    """Not what lies behind the picture, such as a phone's film, nor in a segment, such as a preview."""
    film, preview = random.Random(0).randbytes(2**21), b"\xff\xda" * 600
    assert film.count(b"\xff\xda") > 24
    data = bytearray(encoded(noise(64, 48), "JPEG", progressive=progressive, comment=preview))
    assert decode_image(bytes(data) + film, decoder).size == (64, 48)
    # A comment between two scans may hold the marker of the end.
    scan = data.rindex(b"\xff\xda")
    comment = b"\xff\xfe\0\x06\xff\xd9\xff\xda"
    changed = bytes(data[:scan]) + comment + bytes(data[scan:])
    assert (
        headers.count_scans(changed)
        == headers.count_scans(bytes(data))
        == (10 if progressive else 1)
    )


def test_scans_of_separate_components_count():
    """A baseline JPEG whose frame has three components and whose first scan has one."""
    data = encoded(noise(64, 48), "JPEG")
    at = data.index(b"\xff\xda")
    one = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" + b"\x55" * 40
    assert headers.count_scans(data[:at] + one * 700 + b"\xff\xd9" + one) == 700


def test_sides_of_a_webp_are_those_that_its_decoder_finds():
    for size, settings in itertools.product(
        [(1, 1), (300, 5), (7, 260)], [{}, {"lossless": True}, {"exif": b"Exif\0\0a"}]
    ):
        assert headers._webp_size(encoded(noise(*size), "WEBP", **settings)) == size


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_the_limit_of_pixels_is_a_setting(decoder):
    for kind, cost in (("JPEG", 1), ("PNG", 1), ("WEBP", 2)):
        data = encoded(noise(60, 50), kind)
        limit = cost * 3000
        assert decode_image(data, Decoder(decoder, 0, limit)).size == (60, 50)
        with pytest.raises(BadSample, match=f"60 x 50 pixels are more than .*{limit} reads it"):
            decode_image(data, Decoder(decoder, 0, limit - cost))


def test_a_thin_image_is_refused_before_it_is_enlarged():
    thin = Image.new("RGB", (1, 60_000))
    with pytest.raises(BadSample, match=f"more than {MAX_RESIZED_PIXELS}"):
        ImageTransform(224, is_train=False).crop(thin)
    assert ImageTransform(224, is_train=True).crop(thin, np.random.default_rng(0)).shape == (
        3,
        224,
        224,
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"\xff\xd8\xff",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"8BPS\0\1" + bytes(100),
        b"SIMPLE  =                    T" + bytes(2880),
        encoded(noise(9, 9), "TIFF"),
        encoded(noise(9, 9), "BMP"),
        encoded(noise(9, 9), "GIF"),
        encoded(noise(9, 9), "ICO"),
    ],
)
@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_other_formats_are_bad_samples(data, decoder):
    with pytest.raises(BadSample):
        decode_image(data, decoder)
