"""Embeddings and ids that the losses are tested on, and what exact means."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ["random", "identical", "matched", "zero rows", "huge"]


def embeddings(
    B: int, G: int, E: int, kind: str = "random", dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Rows of several lengths; pairs are somewhat alike."""
    image, text = torch.randn(B, E, dtype=torch.float64), torch.randn(G, E, dtype=torch.float64)
    num_pairs = min(B, G)
    if kind == "random":
        text[:num_pairs] += 0.5 * image[:num_pairs]
    if kind == "matched":
        text[:num_pairs] = image[:num_pairs] + 1e-3 * text[:num_pairs]
    if kind == "identical":
        image, text = image[:1].expand(B, E).clone(), image[:1].expand(G, E).clone()
    if kind == "zero rows":
        image[:: max(1, B // 3)] = 0
        text[-1] = 0
    if kind == "huge":
        image, text = 1e15 * image, 1e15 * text
    return image.to(dtype), text.to(dtype)


def unit_embeddings(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    image, text = embeddings(*shape)
    return F.normalize(image).to(dtype), F.normalize(text).to(dtype)


def ids_for(option: dict[str, object], B: int, G: int, device: str = "cpu") -> dict[str, object]:
    """Return the option, with ids that each occur on several rows."""
    if "same_id" not in option:
        return dict(option)
    image_ids, text_ids = torch.arange(B) // 3, torch.arange(G) // 3
    return {**option, "image_ids": image_ids.to(device), "text_ids": text_ids.to(device)}


def assert_exact(actual: list[Tensor], expected: list[Tensor], length: float = 1.0) -> None:
    """To 1e-12 in float64: [loss, d_image, d_text, others]; gradients of rows `length` long as of unit rows."""
    lengths = (1.0, length, length, *[1.0] * (len(expected) - 3))
    for ours, theirs, unit in zip(actual, expected, lengths, strict=True):
        limit = 1e-12 * max(1.0, (unit * theirs).abs().max().item())
        assert (unit * (ours - theirs)).abs().max().item() <= limit
