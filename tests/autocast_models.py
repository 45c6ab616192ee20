"""The forward passes whose operators are compared under torch's own autocast and under that of bench/fake_gpu.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from openclip import import_open_clip
from torch import Tensor, nn

from clipcore.data.packing import PackedText, pack_captions
from clipcore.loss import ClipLoss
from clipcore.towers.architectures import find_model
from clipcore.towers.factory import create_model

Place = Callable[[Tensor], Tensor]
NUM_PAIRS = 4


def of_models(
    name: str,
) -> Iterator[tuple[str, nn.Module, Callable[[Place], list[Any]], Callable[..., Any]]]:
    """Yield for each package: its name, the model without values, what places its inputs on a device, towers with loss."""
    package = import_open_clip()
    size = find_model(name).vision.image_size
    tokens = torch.randint(1, 100, (NUM_PAIRS, 77))
    tokens[:, 20] = 49407
    tokens[:, 21:] = 0

    def of(model: Any, loss: Any) -> Callable[..., Any]:
        def forward(images: Tensor, text: Any) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                return loss(*model(images, text)[:3])

        return forward

    ours = create_model(name, device="meta").requires_grad_(False)
    pixels = torch.empty(NUM_PAIRS, 3, size, size, dtype=torch.uint8)
    packed = pack_captions(tokens)
    yield (
        *("clipcore", ours),
        lambda place: [place(pixels), PackedText(*map(place, packed))],
        of(ours, ClipLoss()),
    )
    with torch.device("meta"):
        theirs = package.create_model(name, load_weights=False, device="meta")
    theirs.requires_grad_(False)
    yield (
        *("open_clip", theirs),
        lambda place: [place(pixels.float()), place(tokens)],
        of(theirs, package.loss.ClipLoss()),
    )


def attention(query: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stand in for torch's attention, which chooses a kernel by the GPU."""
    return query.clone()
