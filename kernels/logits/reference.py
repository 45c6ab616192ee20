"""What the references of the losses have in common: the matrix of logits, and which of its pairs count.

Legend: ``clipcore.kernels.logits``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipcore.kernels.logits.pairs import Pairs
from clipcore.kernels.normalize import normalize_ref


def logits_ref(
    image_BE: Tensor, text_GE: Tensor, scale: Tensor | float, normalize: bool, pairs: Pairs
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logits, valid, positive), [B, G]: logits in the promoted dtype of the embeddings, and bool.

    Args:
        normalize: divide rows by their lengths.
        pairs: which pairs count, and which of them belong together.
    """
    dtype = torch.promote_types(image_BE.dtype, text_GE.dtype)
    x_BE, y_GE = image_BE.to(dtype), text_GE.to(dtype)
    if normalize:
        x_BE, y_GE = normalize_ref(x_BE), normalize_ref(y_GE)
    z_BG = scale * x_BE @ y_GE.T

    label_BG = torch.zeros_like(z_BG, dtype=torch.bool)
    label_BG.diagonal(pairs.first_label).fill_(True)
    valid_BG, positive_BG = torch.ones_like(label_BG), label_BG
    if pairs.image_ids is not None and pairs.text_ids is not None:
        same_BG = pairs.image_ids[:, None] == pairs.text_ids
        if pairs.same_id == "positive":
            positive_BG = same_BG
        else:
            valid_BG = label_BG | ~same_BG
    return z_BG, valid_BG, positive_BG
