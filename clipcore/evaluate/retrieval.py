"""Retrieval in both directions: captions of an image, and images of a caption.

Legend: N images, M texts, E embedding size.

Source: Radford et al. 2021, section 3.1.5 and table 13 (recall at 1, 5 and 10).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipcore.kernels.similarity_topk import similarity_topk


def retrieval_recall(
    image_features_NE: Tensor,
    text_features_ME: Tensor,
    text_owner_M: Tensor | None = None,
    ranks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Return recall at k in both directions; the N x M similarities are never held.

    Args:
        text_owner_M: index of the image that each text describes, [M] below N, for several captions per image [texts and
            images are pairs in order].
        ranks: the k of the recalls; those larger than the gallery are left out.

    Returns:
        ``image_to_text_R@k``: share of images with one of their captions among the k nearest texts;
        ``text_to_image_R@k``: share of texts with their image among the k nearest images.

    Raises:
        ValueError: there is nothing to retrieve, or the owners do not fit.
    """
    num_images, num_texts = len(image_features_NE), len(text_features_ME)
    owner_M = torch.arange(num_texts) if text_owner_M is None else text_owner_M
    owner_M = owner_M.to(image_features_NE.device)
    if not num_images or len(owner_M) != num_texts or int(owner_M.max()) >= num_images:
        raise ValueError(
            f"{num_texts} texts with {len(owner_M)} owners do not describe {num_images} images"
        )
    report: dict[str, float] = {}
    for direction, queries, gallery in (
        ("image_to_text", image_features_NE, text_features_ME),
        ("text_to_image", text_features_ME, image_features_NE),
    ):
        usable = [k for k in ranks if k <= len(gallery)]
        if not usable:
            continue
        _, nearest = similarity_topk(queries, gallery, max(usable))
        if direction == "image_to_text":
            right = owner_M[nearest] == torch.arange(num_images, device=nearest.device)[:, None]
        else:
            right = nearest == owner_M[:, None]
        for k in usable:
            report[f"{direction}_R@{k}"] = right[:, :k].any(1).double().mean().item()
    return report
