"""The losses that bench_contrastive.py measures: clipcore's, its peers', and plain PyTorch ones.

Each takes (image [N, E], text [N, E], scale) or, for the sigmoid loss, (image, text, scale, bias), with rows of length one,
and returns the loss. A peer that is not installed, or that needs a missing GPU, is left out with the reason.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from harness import is_wanted, leaving_out
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clipcore.kernels.contrastive import contrastive_loss
from clipcore.kernels.sigmoid import sigmoid_loss

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from openclip import import_open_clip

Loss = Callable[..., Tensor]


def shared_similarity(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Compute the loss from one N x N matrix for both directions: the fastest dense form."""
    logits = scale * image @ text.T
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def checkpointed_chunks(image: Tensor, text: Tensor, scale: Tensor, rows: int = 1024) -> Tensor:
    """Compute row chunks under torch's checkpoint, with a running log-sum-exp of the columns."""

    def chunk(part: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        z = (scale * part @ text.T).float()
        return z.logsumexp(1), z.logsumexp(0), z.diagonal(first)

    column = torch.full((len(text),), -torch.inf, device=text.device)
    total = torch.zeros((), device=image.device)
    for first in range(0, len(image), rows):
        row, part, positive = checkpoint(
            chunk, image[first : first + rows], first, use_reentrant=False
        )
        column = torch.logaddexp(column, part)
        total = total + (row - 2 * positive).sum()
    return (total + column.sum()) / (2 * len(image))


def _inf_cl() -> Loss:
    from inf_cl import cal_flash_loss

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        directions = ((image, text), (text, image))
        return sum(cal_flash_loss(x, y, scale=scale).mean() for x, y in directions) / 2

    return loss


def _cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        labels = torch.arange(len(image), device=image.device)
        directions = ((image, text), (text, image))
        # filter_eps=None: its default drops gradients that matter from 4,096 pairs on.
        return (
            sum(
                linear_cross_entropy((scale * x).to(x.dtype), y, labels, filter_eps=None)
                for x, y in directions
            )
            / 2
        )

    return loss


def _siglip_kernel() -> Loss:
    from siglip_kernel import fused_siglip_loss

    return lambda image, text, scale, bias: fused_siglip_loss(image, text, scale.log(), bias)


def _clipcore(loss: Loss, **settings: object) -> Callable[[], Loss]:
    return lambda: functools.partial(loss, normalize=False, **settings)


# name -> (how to get it, whether it needs a GPU, whether it holds the N x N matrix)
SOFTMAX: dict[str, tuple[Callable[[], Loss], bool, bool]] = {
    "clipcore stash": (_clipcore(contrastive_loss, stash_bytes=2**40), False, True),
    "clipcore recompute": (_clipcore(contrastive_loss, stash_bytes=0), False, False),
    "clipcore fused": (_clipcore(contrastive_loss, stash_bytes=0, engine="fused"), True, False),
    "open_clip": (lambda: import_open_clip().loss.ClipLoss(), False, True),
    "open_clip compiled": (
        lambda: torch.compile(import_open_clip().loss.ClipLoss()),
        False,
        True,
    ),
    "shared similarity": (lambda: shared_similarity, False, True),
    "shared similarity compiled": (lambda: torch.compile(shared_similarity), False, True),
    "checkpointed chunks": (lambda: checkpointed_chunks, False, False),
    "inf_cl": (_inf_cl, True, False),
    "cut-cross-entropy x 2": (_cut_cross_entropy, True, False),
}
SIGMOID: dict[str, tuple[Callable[[], Loss], bool, bool]] = {
    "clipcore": (_clipcore(sigmoid_loss), False, False),
    "clipcore fused": (_clipcore(sigmoid_loss, engine="fused"), True, False),
    "open_clip": (lambda: import_open_clip().loss.SigLipLoss(), False, True),
    "open_clip compiled": (
        lambda: torch.compile(import_open_clip().loss.SigLipLoss()),
        False,
        True,
    ),
    "siglip-kernel": (_siglip_kernel, True, False),
}


def providers(
    table: dict[str, tuple[Callable[[], Loss], bool, bool]], on_gpu: bool, names: list[str] | None
) -> Iterator[tuple[str, Loss, bool]]:
    """Return (name, loss, whether it holds the N x N matrix) of each loss that can run here."""
    for name, (get, needs_gpu, dense) in table.items():
        if (names and name not in names) or not is_wanted(name):
            continue
        if needs_gpu and not on_gpu:
            print(f"{name}: needs a GPU", flush=True)
            continue
        loss_fn = None
        with leaving_out(name):
            loss_fn = get()
        if loss_fn is not None:
            yield name, loss_fn, dense


def bare_products(image: Tensor, text: Tensor, count: int) -> Callable[[], None]:
    """Compute the 3 or 4 matrix products that any loss needs, in blocks of at most 16,384 x 16,384."""
    side = 16384
    x, y = image.detach(), text.detach()
    block = torch.empty(min(side, len(x)), min(side, len(y)), dtype=x.dtype, device=x.device)
    d_x, d_y = torch.zeros_like(x), torch.zeros_like(y)

    def run() -> None:
        for rows in range(0, len(x), side):
            for columns in range(0, len(y), side):
                left, right = x[rows : rows + side], y[columns : columns + side]
                part = block[: len(left), : len(right)]
                for _ in range(count - 2):
                    torch.mm(left, right.T, out=part)
                d_x[rows : rows + side].addmm_(part, right)
                d_y[columns : columns + side].addmm_(part.T, left)

    return run
