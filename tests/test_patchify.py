"""Patch matrices: the reference against a convolution, both devices' paths against it, crops, gradients, arguments."""

from __future__ import annotations

import pytest
import torch
from aot import assert_compiled_well, compiled
from numerics import DEVICES, KERNEL_DEVICE, KERNEL_DTYPES, assert_accurate
from torch import Tensor
from torch.nn import functional as F

from clipcore.data.transforms import OPENAI_MEAN, OPENAI_STD, normalize_images
from clipcore.kernels.patchify import (
    padded_width,
    patchify,
    patchify_fwd_triton,
    patchify_ref,
)

OPENAI = (OPENAI_MEAN, OPENAI_STD)
PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
# Patch size, and H and W of the images: those of published models, one patch, and sides that are not multiples.
SHAPES = [(16, 64, 64), (14, 56, 56), (32, 64, 64), (8, 8, 8), (7, 40, 50), (14, 30, 47), (1, 3, 5)]


def pixels(num_images: int, height: int, width: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    images = torch.randint(0, 256, (num_images, 3, height, width), dtype=torch.uint8)
    return images if dtype == torch.uint8 else (images.float() / 255).to(dtype)


def some_crops(num_images: int, height: int, width: int, size: int) -> Tensor:
    """Random ones, and among them all four corners."""
    top, left = (torch.randint(0, n - size + 1, (num_images,)) for n in (height, width))
    crops = torch.stack([top, left, torch.arange(num_images) % 2], 1)
    corners = [
        (0, 0, 1),
        (height - size, 0, 0),
        (0, width - size, 0),
        (height - size, width - size, 1),
    ]
    crops[: len(corners)] = torch.tensor(corners)[:num_images]
    return crops


# 1. The reference.


@pytest.mark.fast
@pytest.mark.parametrize(("patch_size", "height", "width"), SHAPES)
def test_reference_times_padded_weight_is_the_convolution(
    patch_size: int, height: int, width: int
) -> None:
    images = torch.rand(2, 3, height, width, dtype=torch.float64)
    weight = torch.randn(5, 3, patch_size, patch_size, dtype=torch.float64)
    flat = F.pad(weight.flatten(1), (0, padded_width(patch_size) - 3 * patch_size**2))
    found = patchify_ref(images, patch_size, *OPENAI, dtype=torch.float64) @ flat.T
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in OPENAI)
    expected = F.conv2d((images - mean) / std, weight, stride=patch_size).flatten(2).mT
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.fast
def test_reference_of_bytes_has_the_bits_of_the_host() -> None:
    """Normalised in float32 as images from the data loader are; every pixel value in every channel."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    found = patchify_ref(images, 4, *OPENAI, dtype=torch.float32)
    plain = patchify_ref(normalize_images(images, *OPENAI), 4, None, None, dtype=torch.float32)
    assert torch.equal(found, plain)


# 2. Both paths against it.


@pytest.mark.fast
@pytest.mark.parametrize(("patch_size", "height", "width"), SHAPES)
@pytest.mark.parametrize("source", [torch.uint8, torch.float32, torch.float16, torch.float64])
def test_cpu_has_the_bits_of_the_reference(
    patch_size: int, height: int, width: int, source: torch.dtype, poisoned_memory: None
) -> None:
    images = pixels(3, height, width, source)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = patchify(images, patch_size, *OPENAI, dtype=dtype)
        assert torch.equal(found, patchify_ref(images, patch_size, *OPENAI, dtype=dtype))
    assert (found[..., 3 * patch_size**2 :] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_crops_have_the_bits_of_the_reference(device: str) -> None:
    for patch_size, height, width, size in [(8, 40, 50, 32), (14, 30, 30, 30), (7, 33, 60, 31)]:
        images = pixels(6, height, width)
        crops = some_crops(6, height, width, size)
        keywords = {"dtype": torch.float32, "size": size}
        expected = patchify_ref(images, patch_size, *OPENAI, crops=crops, **keywords)
        for integer in (torch.int64, torch.int32):
            moved = crops.to(device, integer)
            found = patchify(images.to(device), patch_size, *OPENAI, crops=moved, **keywords)
            assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("source", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("patch_size", "height", "width"), SHAPES)
def test_kernel(
    patch_size: int,
    height: int,
    width: int,
    source: torch.dtype,
    dtype: torch.dtype,
    poisoned_memory: None,
) -> None:
    images = pixels(2, height, width, source)
    found = patchify_fwd_triton(
        images.to(KERNEL_DEVICE), None, patch_size, (height, width), *OPENAI, dtype
    ).cpu()
    reference = patchify_ref(images, patch_size, *OPENAI, dtype=dtype)
    wide = images.double() / 255 if source == torch.uint8 else images.double()
    exact = patchify_ref(wide, patch_size, *OPENAI, dtype=torch.float64)
    assert_accurate("patches", found, reference, exact)
    assert (found[..., 3 * patch_size**2 :] == 0).all()
    # The interpreter's fused multiply-add is not fused.
    assert KERNEL_DEVICE == "cpu" or source != torch.uint8 or torch.equal(found, reference)


def test_kernel_crops_and_flips_and_keeps_to_the_image() -> None:
    """Without a normalisation, so that a wrong pixel is told from a rounding."""
    images = pixels(5, 40, 52)
    crops = some_crops(5, 40, 52, 32)
    beyond = crops.clone()
    beyond[0, :2], beyond[3, :2] = torch.tensor([-9, -1]), torch.tensor([41, 1000])
    expected = patchify_ref(images, 8, None, None, dtype=torch.float32, size=32, crops=crops)
    for asked in (crops, crops.int(), beyond):
        arguments = images.to(KERNEL_DEVICE), asked.to(KERNEL_DEVICE), 8, (32, 32), *PLAIN
        found = patchify_fwd_triton(*arguments, torch.float32).cpu()
        assert_accurate("patches", found, expected, expected.double())


@pytest.mark.parametrize("device", DEVICES)
def test_views_are_read_in_place(device: str) -> None:
    whole = pixels(4, 40, 40).to(device)
    for images in (whole[::2, :, 3:35, 5:37], whole.permute(0, 1, 3, 2), whole.flip(1)):
        found = patchify(images, 8, *OPENAI, dtype=torch.float32)
        expected = patchify(images.contiguous(), 8, *OPENAI, dtype=torch.float32)
        assert torch.equal(found, expected)


# 3. Ahead of time.


def aot_launches() -> None:
    """Every row of the launch table at the models' patch sizes, with crops (bytes one by one) and without."""
    for patch_size, side, source, dtype, cropped in [
        (16, 224, torch.uint8, torch.bfloat16, False),
        (16, 256, torch.uint8, torch.bfloat16, True),
        (14, 224, torch.uint8, torch.bfloat16, False),
        (14, 224, torch.float32, torch.float32, False),
    ]:
        images = torch.empty(64, 3, side, side, dtype=source, device="meta")
        crops = torch.empty(64, 3, dtype=torch.int64, device="meta") if cropped else None
        patchify_fwd_triton(images, crops, patch_size, (224, 224), *OPENAI, dtype)


def test_ahead_of_time_without_spills_in_the_memory_there_is() -> None:
    assert_compiled_well(compiled("test_patchify"))


# The public function.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (13, 10)])
def test_gradients_of_float_images(device: str, height: int, width: int) -> None:
    images = torch.rand(2, 3, height, width, dtype=torch.float64, requires_grad=True)

    def patches(x: Tensor) -> Tensor:
        return patchify(x, 4, *OPENAI, dtype=torch.float64)

    assert torch.autograd.gradcheck(patches, images)
    upstream = torch.randn_like(patches(images))
    (exact,) = torch.autograd.grad(patches(images), images, upstream)
    leaf = images.detach().to(device, torch.float32).requires_grad_()
    found = patchify(leaf, 4, *OPENAI, dtype=torch.float32)
    (grad,) = torch.autograd.grad(found, leaf, upstream.to(device, torch.float32))
    reference = patchify_ref(leaf, 4, *OPENAI, dtype=torch.float32)
    (expected,) = torch.autograd.grad(reference, leaf, upstream.to(device, torch.float32))
    assert_accurate("gradient", grad.cpu(), expected.cpu(), exact)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    numbers = [list(v) for v in OPENAI]
    crops = torch.tensor([[1, 2, 0], [3, 0, 1]], device=device)
    for images, chosen in [
        (pixels(2, 17, 18), crops),
        (pixels(2, 17, 18), None),
        (pixels(2, 17, 18, torch.float32).requires_grad_(), None),
    ]:
        side = (12, 12) if chosen is not None else (17, 18)
        arguments = (images.to(device), chosen, 5, *side, *numbers, torch.float32)
        torch.library.opcheck(torch.ops.clipcore.patchify_fwd, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph_with_equal_results(device: str) -> None:
    def embedded(images: Tensor) -> Tensor:
        return patchify(images, 4, *OPENAI, dtype=torch.float32).sum(2)

    images = pixels(2, 9, 9).to(device)
    whole = torch.compile(embedded, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(images), embedded(images))


@pytest.mark.parametrize("device", DEVICES)
def test_no_images(device: str) -> None:
    crops = torch.empty(0, 3, dtype=torch.int64, device=device)
    for keywords in ({}, {"size": 16, "crops": crops}):
        images = torch.empty(0, 3, 32, 32, dtype=torch.uint8, device=device)
        found = patchify(images, 8, *OPENAI, dtype=torch.float32, **keywords)
        assert found.shape == (0, 4 if keywords else 16, 192)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.ones(3, 8, 8)}, r"\[B, 3, H, W\], got \[3, 8, 8\]"),
        ({"images": torch.ones(2, 3, 8, 8, dtype=torch.int64)}, "uint8 or floating-point"),
        ({"patch_size": 9}, "8 x 8 pixels holds no patch of 9"),
        ({"patch_size": 0}, "at least 1, got 0"),
        ({"dtype": torch.int8}, "floating-point type"),
        ({"std": None}, "mean and std"),
        ({"mean": (0.0,)}, "three numbers"),
        ({"size": 8}, "size and crops"),
        ({"size": 9, "crops": torch.zeros(2, 3, dtype=torch.int64)}, "size 9 does not fit"),
        ({"size": 8, "crops": torch.zeros(2, 2, dtype=torch.int64)}, r"integers \[2, 3\]"),
        ({"size": 8, "crops": torch.tensor([[0, 0, 0], [0, 1, 0]])}, "leaves its image"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, object], message: str) -> None:
    usual = {"images": pixels(2, 8, 8), "patch_size": 4, "mean": OPENAI_MEAN, "std": OPENAI_STD}
    with pytest.raises(ValueError, match=message):
        patchify(**{**usual, "dtype": torch.float32, **arguments})
