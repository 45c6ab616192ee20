"""Measures retrieval on a data set: encodes its captions once, and returns recalls under CLIP_benchmark's names.

Legend: N images, M captions, E embedding size.

Source: Radford et al. 2021, table 13. CLIP_benchmark names a recall after the retrieved side. ``image_retrieval_recall@k``
is the share of captions that find their image, ``text_retrieval_recall@k`` the share of images that find one of their
captions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipcore.data import BadSample, DataError, PairSource, printable
from clipcore.data.loader import trim_tokens
from clipcore.evaluate.arguments import RANKS
from clipcore.evaluate.features import SplitFeatures
from clipcore.evaluate.retrieval import retrieval_recall
from clipcore.towers.model import CLIP

# CLIP_benchmark's names of the directions of ``retrieval_recall``.
_NAMES = {
    "image_retrieval_recall": "text_to_image_R",
    "text_retrieval_recall": "image_to_text_R",
}
_CAPTIONS_AT_ONCE = 256

EncodeText = Callable[[list[str]], Tensor]


def text_encoder(
    model: CLIP, tokenizer: Callable[[list[str]], Tensor], device: str | torch.device
) -> EncodeText:
    """Return a function from texts to their unit features [M, E] on the device."""

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        tokens_ML = tokenizer(texts)
        tokens_ML = trim_tokens(tokens_ML) if model.ignores_padding else tokens_ML
        return model.encode_text(tokens_ML.to(device), normalize=True).float()

    return encode


def measure_retrieval(
    features: SplitFeatures,
    encode_text: EncodeText,
    ranks: Sequence[int] = RANKS,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Return the metrics and the details of a result: recalls in both directions.

    The N x M similarities are never held. An image without a readable caption is left out, and counted in a note.

    Args:
        features: features of a split whose source has each image once, with all of its captions.
        encode_text: see ``text_encoder``.
        ranks: the k of the recalls; 1 is always among them. A recall is None if k is larger than the gallery.
        progress: is called with the number of captions encoded since its last call.

    Raises:
        DataError: the features are from a file, or no image has a caption.
        ValueError: features are not finite.
    """
    source = features.split.source
    if source is None:
        raise DataError(
            "a file of features has no captions; give a data set of images and captions"
        )
    image_NE = features.whole(projected=True, unit=True)
    text_features, owners, bad = [], list[int](), list[BadSample]()
    for texts, owner_M in _caption_batches(source, features.rows_N, bad):
        text_features.append(encode_text(texts))
        owners += owner_M
        if progress is not None:
            progress(len(texts))
    if not text_features:
        raise DataError(
            f"no image of {source.name} has a readable caption; retrieval needs captions"
        )

    # Images without a caption cannot be retrieved, nor retrieve one.
    has_caption_N = torch.zeros(len(image_NE), dtype=torch.bool)
    has_caption_N[owners] = True
    place_N = has_caption_N.cumsum(0) - 1
    image_NE, text_ME = image_NE[has_caption_N.to(image_NE.device)], torch.cat(text_features)
    if not (image_NE.isfinite().all() and text_ME.isfinite().all()):
        raise ValueError("the model's features are not finite; its weights are not usable")

    ranks = sorted({1, *ranks})
    recalls = retrieval_recall(image_NE, text_ME.to(image_NE), place_N[owners], ranks)
    metrics = {
        f"{name}@{k}": recalls.get(f"{direction}@{k}")
        for k in ranks
        for name, direction in _NAMES.items()
    }
    metrics["mean_recall@1"] = sum(recalls[f"{direction}@1"] for direction in _NAMES.values()) / 2
    details = {
        "main_metric": "mean_recall@1",
        "num_images": len(image_NE),
        "num_texts": len(text_ME),
        "notes": _notes(bad),
    }
    return metrics, details


def _caption_batches(
    source: PairSource, rows_N: np.ndarray, bad: list[BadSample]
) -> Iterator[tuple[list[str], list[int]]]:
    """Yield captions with the row indices of their images; add images without captions to ``bad``."""
    texts, owners = list[str](), list[int]()
    for place, row in enumerate(rows_N.tolist()):
        try:
            captions = source.captions(row)
        except BadSample as error:
            bad.append(error)
            continue
        those = [captions] if isinstance(captions, str) else list(captions)
        texts += those
        owners += [place] * len(those)
        # An image may have any number of captions.
        while len(texts) >= _CAPTIONS_AT_ONCE:
            yield texts[:_CAPTIONS_AT_ONCE], owners[:_CAPTIONS_AT_ONCE]
            del texts[:_CAPTIONS_AT_ONCE], owners[:_CAPTIONS_AT_ONCE]
    if texts:
        yield texts, owners


def _notes(bad: Sequence[BadSample]) -> list[str]:
    if not bad:
        return []
    return [f"{len(bad)} images without a readable caption, such as {printable(str(bad[0]))}"]
