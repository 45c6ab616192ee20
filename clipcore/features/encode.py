"""Encodes the images or the captions of a source, batch by batch.

A batch is always the same samples, wherever a process has begun, so that a feature has the same bits.

Legend: B rows of a batch, E embedding size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipcore.data import BadSample, PairSource
from clipcore.data.loader import eval_batches, no_tokens, trim_tokens
from clipcore.data.sources import MixtureSource
from clipcore.data.transforms import ImageTransform, normalize_images
from clipcore.evaluate.features import exact_convolutions
from clipcore.towers.model import CLIP


@dataclass(frozen=True)
class Encoded:
    """The features of a batch.

    Attributes:
        end: number of samples of the source up to here, those of the batch included.
        features_BE: float32.
        keys: name of the sample of each row.
        unreadable: (key, reason) of each sample that has no row.
        num_transparent: pictures that were laid over white.
    """

    end: int
    features_BE: np.ndarray
    keys: list[str]
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    num_transparent: int = 0


def encode_images(
    model: CLIP,
    transform: ImageTransform,
    source: PairSource,
    start: int,
    batch_size: int,
    workers: int = 0,
    normalize: bool = False,
) -> Iterator[Encoded]:
    """Yield the features of a source's images, without its first ``start`` samples, which are whole batches."""
    batches = eval_batches(source, transform, no_tokens, batch_size, workers=workers, start=start)
    end = start
    with contextlib.closing(batches), torch.no_grad(), exact_convolutions():
        for batch in batches:
            end += len(batch.indices) + len(batch.bad)
            images = batch.images.to(model.logit_scale.device)
            features_BE = torch.zeros(0, model.config.embed_dim)
            if len(images):
                images = normalize_images(images, transform.mean, transform.std)
                features_BE = model.encode_image(images, normalize=normalize)
            yield Encoded(end, _array(features_BE), batch.keys, batch.bad, batch.num_transparent)


def encode_captions(
    model: CLIP,
    tokenizer: Callable[[list[str]], Tensor],
    source: PairSource,
    start: int,
    batch_size: int,
    normalize: bool = False,
) -> Iterator[Encoded]:
    """Yield the features of a source's captions, without its first ``start`` samples, which are whole batches."""
    for begin in range(start, len(source), batch_size):
        end = min(begin + batch_size, len(source))
        captions, keys, unreadable = list[str](), list[str](), list[tuple[str, str]]()
        for index in range(begin, end):
            key = _name_of(source, index)
            try:
                found = source.captions(index)
            except BadSample as error:
                unreadable.append((error.key or key, error.reason))
                continue
            those = [found] if isinstance(found, str) else list(found)
            captions += those
            keys += [key] * len(those)
        features = [torch.zeros(0, model.config.embed_dim)]
        with torch.no_grad():
            for at in range(0, len(captions), batch_size):
                tokens_BL = tokenizer(captions[at : at + batch_size])
                tokens_BL = trim_tokens(tokens_BL) if model.ignores_padding else tokens_BL
                tokens_BL = tokens_BL.to(model.logit_scale.device)
                features.append(model.encode_text(tokens_BL, normalize=normalize).float().cpu())
        yield Encoded(end, _array(torch.cat(features)), keys, unreadable)


def _name_of(source: Any, index: int) -> str:
    """Return the name of a sample, without reading it; a row's number where it has none."""
    if isinstance(source, MixtureSource):
        part, row = source.locate(index)
        return _name_of(source.parts[part], row)
    key = getattr(source, "key", None)
    return f"{source.name}, row {index + 1}" if key is None else key(index)


def _array(features_BE: Tensor) -> np.ndarray:
    return features_BE.float().cpu().numpy()
