"""The reference of the contrastive loss: the matrix of logits, and a cross-entropy of its rows and columns.

Legend and maths: ``clipcore.kernels.contrastive``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipcore.kernels.logits.pairs import Pairs
from clipcore.kernels.logits.reference import logits_ref


def contrastive_ref(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor | float,
    *,
    normalize: bool = False,
    first_label: int = 0,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same_id: str = "ignore",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the loss by the B x G matrix, in the promoted dtype of the embeddings, differentiable."""
    pairs = Pairs(image_ids, text_ids, first_label, same_id)
    z_BG, valid_BG, positive_BG = logits_ref(image_BE, text_GE, scale, normalize, pairs)
    return (
        _cross_entropy_ref(z_BG, valid_BG, positive_BG, label_smoothing)
        + _cross_entropy_ref(z_BG.T, valid_BG.T, positive_BG.T, label_smoothing)
    ) / 2


def _cross_entropy_ref(z: Tensor, valid: Tensor, positive: Tensor, smoothing: float) -> Tensor:
    """Return the mean cross-entropy of the rows that have a positive."""
    rows = positive.any(1)
    z, valid, positive = z[rows], valid[rows], positive[rows]
    log_p = z.masked_fill(~valid, -torch.inf).log_softmax(1).masked_fill(~valid, 0)
    positive, valid = positive.to(z.dtype), valid.to(z.dtype)
    target = (1 - smoothing) * positive / positive.sum(1, keepdim=True)
    target = target + smoothing * valid / valid.sum(1, keepdim=True)
    return -(target * log_p).sum(1).mean()
