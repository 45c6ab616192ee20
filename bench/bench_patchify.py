"""patchify against PyTorch's normalise, permute and cast, torch.compile of it, and a copy of the same bytes.

python bench/bench_patchify.py [--batch 1024] [--patches 16 14 32] [--device cpu]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle

import torch
from harness import parse, record, run
from torch import Tensor

from clipcore.data.transforms import OPENAI_MEAN, OPENAI_STD, normalize_images
from clipcore.kernels.patchify import padded_width, patchify

SIZE = 224


def eager(images: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    """Make the patches without clipcore, and without the padding, which would cost another copy."""
    grid = SIZE // patch_size
    x = normalize_images(images, OPENAI_MEAN, OPENAI_STD, dtype)
    x = x[:, :, : grid * patch_size, : grid * patch_size]
    x = x.reshape(len(x), 3, grid, patch_size, grid, patch_size).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(len(x), grid * grid, -1)


def rotating(fn: Callable[[Tensor], object], buffers: list[Tensor]) -> Callable[[], object]:
    """Return fn on one buffer after the other, so that no cache serves it."""
    turn = cycle(buffers)
    return lambda: fn(next(turn))


def bench_case(patch_size: int, batch: int, dtype: torch.dtype, device: torch.device) -> None:
    def pixels(side: int) -> list[Tensor]:
        shape = (batch, 3, side, side)
        kinds = {"dtype": torch.uint8, "device": device}
        return [torch.randint(0, 256, shape, **kinds) for _ in range(3)]

    images, larger = pixels(SIZE), pixels(SIZE + 32)
    num_rows = batch * (SIZE // patch_size) ** 2
    written = num_rows * padded_width(patch_size) * dtype.itemsize
    bytes_moved = images[0].numel() + written
    # A copy that reads and writes half each of the bytes that the operation moves.
    halves = [
        torch.randint(0, 256, (bytes_moved // 2,), dtype=torch.uint8, device=device)
        for _ in range(2)
    ]
    crops = torch.randint(0, 33, (batch, 3), device=device)
    crops[:, 2] %= 2

    def ours(x: Tensor) -> Tensor:
        return patchify(x, patch_size, OPENAI_MEAN, OPENAI_STD, dtype=dtype)

    def cropped(x: Tensor) -> Tensor:
        numbers = (OPENAI_MEAN, OPENAI_STD)
        return patchify(x, patch_size, *numbers, dtype=dtype, size=SIZE, crops=crops)

    plain = partial(eager, patch_size=patch_size, dtype=dtype)
    fns = {
        "clipcore": rotating(ours, images),
        "clipcore, crops and flips": rotating(cropped, larger),
        "eager": rotating(plain, images),
        "torch.compile": rotating(torch.compile(plain), images),
        "copy of the bytes": lambda: halves[0].copy_(halves[1]),
    }
    case = {"B": batch, "S": SIZE, "p": patch_size, "dtype": str(dtype).removeprefix("torch.")}
    record("patchify", fns, device=device, flops=7.0 * written, bytes_moved=bytes_moved, **case)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--patches", type=int, nargs="+", default=[16, 14, 32])
    arguments = parse(parser, ["tests/test_patchify.py"], argv)
    device = arguments.device
    on_gpu = device.type == "cuda"
    for dtype in (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16):
        for patch_size in arguments.patches:
            bench_case(patch_size, arguments.batch or (1024 if on_gpu else 16), dtype, device)


if __name__ == "__main__":
    run(main)
