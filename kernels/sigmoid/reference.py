"""The reference of the sigmoid loss: the matrix of logits, each a question of its own.

Legend and maths: ``clipcore.kernels.sigmoid``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels.normalize import normalize_ref


def sigmoid_ref(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    normalize: bool = False,
    first_label: int = 0,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same_id: str = "ignore",
) -> Tensor:
    """Return the loss by the B x G matrix, in the promoted dtype of the embeddings, differentiable."""
    dtype = torch.promote_types(image_BE.dtype, text_GE.dtype)
    x_BE, y_GE = image_BE.to(dtype), text_GE.to(dtype)
    if normalize:
        x_BE, y_GE = normalize_ref(x_BE), normalize_ref(y_GE)
    z_BG = scale * x_BE @ y_GE.T + bias
    positive_BG = torch.zeros_like(z_BG, dtype=torch.bool)
    positive_BG.diagonal(first_label).fill_(True)
    valid_BG = torch.ones_like(positive_BG)
    if image_ids is not None and text_ids is not None:
        same_BG = image_ids[:, None] == text_ids
        if same_id == "positive":
            positive_BG = same_BG
        else:
            valid_BG = positive_BG | ~same_BG
    sign_BG = 2 * positive_BG.to(z_BG.dtype) - 1
    return -F.logsigmoid(sign_BG * z_BG).masked_fill(~valid_BG, 0).sum() / len(x_BE)
