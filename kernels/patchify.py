"""Images to the matrix that the patch embedding multiplies: normalise, crop, flip, cut into patches, cast, in one pass.

Legend: B images of H x W pixels, S side of the crop, p side of a patch, P patches (S // p by S // p, row by row),
K = 3 p p elements of a patch in the order (channel, row, column) of conv1.weight.flatten(1), Kpad = K rounded up to 8.

    out[b, patch, k] = (x / 255 - mean_c) / std_c         x = the pixel; 0 for K <= k < Kpad

float images lie in [0, 1] and are not divided by 255. Pixels on the right and below that fill no patch are left out, as
a strided convolution does. The padding (588 -> 592 for p = 14) aligns every row to 16 bytes; without it a matrix product
leaves its fast path. The weight takes as many columns of zeros.

Precision: float32 with correctly rounded divisions, so that the result has the bits of `normalize_images` before the
one rounding to the output's dtype. A division by a constant d is three instructions (Markstein 1990): q = x r with
r = 1 / d, then q + r (x - q d) with fused multiply-adds.
Traffic: uint8 B 3 S S read, 2 B P Kpad written in 16 bits; about 7 FLOPs an element. Floor: its bytes over the memory
bandwidth. Determinism: each element is computed by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels import launch
from clipcore.kernels.launch import tl, triton

# Kpad is a multiple of this: 16 bytes of 16-bit elements.
MULTIPLE = 8
# Elements that the CPU normalises at once, so that they stay in its cache between the passes.
CPU_ELEMENTS = 2**20


def padded_width(patch_size: int) -> int:
    """Return Kpad, the number of columns of the patch matrix."""
    width = 3 * patch_size**2
    return width + -width % MULTIPLE


def patchify_ref(
    images: Tensor,
    patch_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    *,
    dtype: torch.dtype,
    size: int | None = None,
    crops: Tensor | None = None,
) -> Tensor:
    """Compute the patch matrix step by step; float64 images are normalised in float64. This is the reference."""
    if crops is not None and size is not None:
        images = _crop(images, crops, size)
    wide = torch.promote_types(images.dtype, torch.float32)
    x = images.to(wide) / 255 if images.dtype == torch.uint8 else images.to(wide)
    if mean is not None and std is not None:
        mean_C11, std_C11 = (
            torch.tensor(v, dtype=wide, device=x.device).view(3, 1, 1) for v in (mean, std)
        )
        x = (x - mean_C11) / std_C11
    patches = _patches(x, patch_size)
    return F.pad(patches, (0, -patches.shape[-1] % MULTIPLE)).to(dtype)


def _crop(images: Tensor, crops: Tensor, size: int) -> Tensor:
    """Return the square of each image, [B, 3, S, S], mirrored where its flip is not 0."""
    cut = [images[:0, :, :size, :size]]
    for image, (top, left, flip) in zip(images, crops.tolist(), strict=True):
        crop = image[None, :, top : top + size, left : left + size]
        cut.append(crop.flip(-1) if flip else crop)
    return torch.cat(cut)


def _patches(x: Tensor, patch_size: int) -> Tensor:
    """Return images [B, 3, H, W] as [B, P, K], without the pixels that fill no patch."""
    rows, columns = x.shape[2] // patch_size, x.shape[3] // patch_size
    cut = x[:, :, : rows * patch_size, : columns * patch_size]
    split = cut.unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size))
    # Sizes are given in full: -1 is ambiguous for an empty batch.
    return split.permute(0, 2, 4, 1, 3, 5).reshape(
        len(x), rows * columns, x.shape[1] * patch_size**2
    )


@triton.jit
def _divide(x, divisor, reciprocal):
    """Return x / divisor, correctly rounded: the reciprocal's product, corrected by its exact remainder."""
    quotient = x * reciprocal
    return tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)


@triton.jit
def _of_channel(c, first, second, third):
    return tl.where(c == 0, first, tl.where(c == 1, second, third))


@triton.jit
def _patchify_kernel(
    image_ptr,
    crop_ptr,
    patch_ptr,
    stride_b,
    stride_c,
    stride_y,
    num_rows,
    num_patches,
    num_columns,
    size,
    largest_top,
    largest_left,
    mean_0,
    mean_1,
    mean_2,
    std_0,
    std_1,
    std_2,
    reciprocal_0,
    reciprocal_1,
    reciprocal_2,
    PATCH: tl.constexpr,
    K: tl.constexpr,
    KPAD: tl.constexpr,
    COUNTS: tl.constexpr,
    CROP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute BLOCK_N rows by BLOCK_K columns of the patch matrix; terms of a row or a column alone are computed once."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    b = n // num_patches
    y = n % num_patches // num_columns * PATCH
    x = (n % num_patches % num_columns * PATCH)[:, None] + (k % PATCH)[None, :]
    if CROP:
        inside = n < num_rows
        top = tl.load(crop_ptr + 3 * b, mask=inside, other=0).to(tl.int32)
        left = tl.load(crop_ptr + 3 * b + 1, mask=inside, other=0).to(tl.int32)
        flip = tl.load(crop_ptr + 3 * b + 2, mask=inside, other=0) != 0
        y += tl.minimum(tl.maximum(top, 0), largest_top)
        left = tl.minimum(tl.maximum(left, 0), largest_left)
        x = left[:, None] + tl.where(flip[:, None], size - 1 - x, x)
    c = k // (PATCH * PATCH)
    column = c * stride_c + (k // PATCH % PATCH) * stride_y
    pointers = image_ptr + (b.to(tl.int64) * stride_b + y * stride_y)[:, None]
    pixel = tl.load(
        pointers + (x + column[None, :]),
        mask=(n < num_rows)[:, None] & (k < K)[None, :],
        other=0,
    ).to(tl.float32)
    if COUNTS:
        pixel = _divide(pixel, 255.0, 1.0 / 255.0)
    mean = _of_channel(c, mean_0, mean_1, mean_2)[None, :]
    std = _of_channel(c, std_0, std_1, std_2)[None, :]
    reciprocal = _of_channel(c, reciprocal_0, reciprocal_1, reciprocal_2)[None, :]
    value = tl.where((k < K)[None, :], _divide(pixel - mean, std, reciprocal), 0.0)
    tl.store(
        patch_ptr + n.to(tl.int64)[:, None] * KPAD + k[None, :],
        value.to(patch_ptr.dtype.element_ty),
        mask=(n < num_rows)[:, None] & (k < KPAD)[None, :],
    )


# architecture -> BLOCK_N, BLOCK_K, num_warps. 64 columns are a few rows of pixels. A warp that has to load bytes one by
# one (crops, odd p) then touches few cache lines, which consecutive patches share. Not yet measured.
_LAUNCH_TABLE = {80: (64, 64, 4), 90: (64, 64, 4), 100: (64, 64, 4)}


def _launch_config(
    num_rows: int, columns: int, device: torch.device
) -> tuple[tuple[int, int], dict[str, int]]:
    block_n, block_k, num_warps = _LAUNCH_TABLE[launch.architecture(device)]
    config = {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": num_warps}
    return (triton.cdiv(num_rows, block_n), triton.cdiv(columns, block_k)), config


def patchify_fwd_triton(
    images: Tensor,
    crops: Tensor | None,
    patch_size: int,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Launch the kernel on arguments that `patchify` has checked; size is the crop's rows and columns of pixels."""
    # A channel's offset is a 32-bit number in the kernel.
    fits = images.stride(3) == 1 and 3 * images.stride(1) < 2**31
    images = images if fits else images.contiguous()
    num_images, _, height, width = images.shape
    num_columns = size[1] // patch_size
    num_patches = size[0] // patch_size * num_columns
    columns = padded_width(patch_size)
    patches = torch.empty((num_images, num_patches, columns), dtype=dtype, device=images.device)
    if patches.numel() == 0:
        return patches
    # In float32, so that each reciprocal is that of the divisor which the kernel gets.
    stds = torch.tensor(std, dtype=torch.float32)
    reciprocals = (1 / stds).tolist()
    grid, config = _launch_config(num_images * num_patches, columns, images.device)
    _patchify_kernel[grid](
        image_ptr=images,
        crop_ptr=images if crops is None else crops.contiguous(),
        patch_ptr=patches,
        stride_b=images.stride(0),
        stride_c=images.stride(1),
        stride_y=images.stride(2),
        num_rows=num_images * num_patches,
        num_patches=num_patches,
        num_columns=num_columns,
        size=size[1],
        largest_top=height - size[0],
        largest_left=width - size[1],
        **{f"mean_{c}": mean[c] for c in range(3)},
        **{f"std_{c}": std[c] for c in range(3)},
        **{f"reciprocal_{c}": reciprocals[c] for c in range(3)},
        PATCH=patch_size,
        K=3 * patch_size**2,
        KPAD=columns,
        COUNTS=images.dtype == torch.uint8,
        CROP=crops is not None,
        **config,
    )
    return patches


def patchify_fwd_torch(
    images: Tensor,
    crops: Tensor | None,
    patch_size: int,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Compute the same in PyTorch, a few images at a time: normalise, cast, and move into place."""
    height, width = size
    rows, columns = height // patch_size, width // patch_size
    used = 3 * patch_size**2
    patches = images.new_empty((len(images), rows * columns, padded_width(patch_size)), dtype=dtype)
    patches[:, :, used:] = 0
    places = patches[:, :, :used].unflatten(2, (3, patch_size, patch_size))
    places = places.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5)
    wide = launch.accumulate_dtype(images.dtype)
    mean_C11, std_C11 = (
        torch.tensor(v, dtype=wide, device=images.device).view(3, 1, 1) for v in (mean, std)
    )
    step = max(1, CPU_ELEMENTS // (3 * height * width))
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        x = images[part] if crops is None else _crop(images[part], crops[part], height)
        x = x.to(wide, copy=True)
        x = x.div_(255) if images.dtype == torch.uint8 else x
        x = x.sub_(mean_C11).div_(std_C11).to(dtype)
        x = x[:, :, : rows * patch_size, : columns * patch_size]
        places[part] = x.unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size))
    return patches


@torch.library.custom_op("clipcore::patchify_fwd", mutates_args=())
def _patchify_fwd(
    images: Tensor,
    crops: Tensor | None,
    patch_size: int,
    height: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    in_triton = images.is_cuda and torch.float64 not in (images.dtype, dtype)
    forward = patchify_fwd_triton if in_triton else patchify_fwd_torch
    with launch.on_device(images.device):
        return forward(images, crops, patch_size, (height, width), mean, std, dtype)


@_patchify_fwd.register_fake
def _(
    images: Tensor,
    crops: Tensor | None,
    patch_size: int,
    height: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    num_patches = (height // patch_size) * (width // patch_size)
    return images.new_empty((images.shape[0], num_patches, padded_width(patch_size)), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, _, ctx.patch_size, _, _, _, ctx.std, _ = inputs
    ctx.shape, ctx.dtype = images.shape, images.dtype


def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    """Return the gradient of float images: patches put back, over the channel's deviation; 0 outside the patches."""
    p, (num_images, channels, height, width) = ctx.patch_size, ctx.shape
    rows, columns = height // p, width // p
    wide = torch.promote_types(upstream.dtype, torch.float32)
    grad = upstream[:, :, : channels * p * p].unflatten(2, (channels, p, p))
    grad = grad.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5).to(wide)
    grad = grad.reshape(num_images, channels, rows * p, columns * p)
    grad = grad / torch.tensor(ctx.std, dtype=wide, device=grad.device).view(3, 1, 1)
    grad = F.pad(grad, (0, width - columns * p, 0, height - rows * p)).to(ctx.dtype)
    return grad, None, None, None, None, None, None, None


_patchify_fwd.register_autograd(_backward, setup_context=_setup_context)
launch.register_autocast("patchify_fwd", num_operands=0)


def patchify(
    images: Tensor,
    patch_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    *,
    dtype: torch.dtype,
    size: int | None = None,
    crops: Tensor | None = None,
) -> Tensor:
    """Return the patch matrix [B, P, Kpad] of images, normalised.

    Its product with the padded patch weights is the embedding. Differentiable in float images; uint8 ones have no gradient.

    Args:
        images: [B, 3, H, W], uint8 in 0..255 or floating-point in [0, 1].
        patch_size: p, pixels.
        mean, std: of each channel, after scaling to [0, 1]. Both None: floats are already normalised and stay as they
            are, bytes are only scaled.
        dtype: of the result: float32, float16, bfloat16 or float64.
        size: S, pixels, with `crops`; None takes the whole images.
        crops: integers [B, 3] on the images' device, (top, left, flip) of each uint8 image: the square of side S from
            there, mirrored left to right where flip is not 0. On the CPU a square that leaves the image is refused.
            On a GPU the host does not read the values; the kernel moves top and left to the nearest square inside.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, an image holds no patch, or (CPU) a crop leaves its image.

    >>> patchify(torch.zeros(2, 3, 28, 28), 14, None, None, dtype=torch.float32).shape
    torch.Size([2, 4, 592])
    """
    _check_images(images, patch_size, mean, std, dtype)
    height, width = images.shape[2:]
    if (size is None) != (crops is None):
        raise ValueError("size and crops belong together: give both or none")
    if crops is not None and size is not None:
        _check_crops(images, size, crops)
        height = width = size
    if min(height, width) < patch_size:
        raise ValueError(f"an image of {height} x {width} pixels holds no patch of {patch_size}")
    mean, std = (0.0, 0.0, 0.0) if mean is None else mean, (1.0, 1.0, 1.0) if std is None else std
    return torch.ops.clipcore.patchify_fwd(
        images, crops, patch_size, height, width, list(mean), list(std), dtype
    )


def _check_images(
    images: Tensor,
    patch_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> None:
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images have to be [B, 3, H, W], got {list(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images have to be uint8 or floating-point, got {images.dtype}")
    if patch_size < 1:
        raise ValueError(f"patch_size has to be at least 1, got {patch_size}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype has to be a floating-point type, got {dtype}")
    if (mean is None) != (std is None):
        raise ValueError("mean and std belong together: give both or none")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != 3:
            raise ValueError(f"{name} has to be three numbers, got {list(values)}")


def _check_crops(images: Tensor, size: int, crops: Tensor) -> None:
    num_images, _, height, width = images.shape
    if images.dtype != torch.uint8:
        raise ValueError(
            f"crops are for uint8 images, got {images.dtype}: crop float images before"
        )
    if crops.shape != (num_images, 3) or crops.is_floating_point():
        raise ValueError(
            f"crops have to be integers [{num_images}, 3], got {crops.dtype} {list(crops.shape)}"
        )
    if crops.device != images.device:
        raise ValueError(f"crops are on {crops.device} and images on {images.device}: move one")
    if not 1 <= size <= min(height, width):
        raise ValueError(f"size {size} does not fit into images of {height} x {width} pixels")
    if crops.device.type == "cpu" and num_images > 0:
        largest = torch.tensor([height - size, width - size])
        if bool(((crops[:, :2] < 0) | (crops[:, :2] > largest)).any()):
            raise ValueError(
                f"a crop of {size} pixels leaves its image of {height} x {width}: top and left lie between 0 "
                f"and {largest.tolist()}"
            )
