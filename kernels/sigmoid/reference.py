"""The reference of the sigmoid loss: the matrix of logits, each a question of its own.

Legend and maths: ``clipcore.kernels.sigmoid``.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels.logits.pairs import Pairs
from clipcore.kernels.logits.reference import logits_ref


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
    pairs = Pairs(image_ids, text_ids, first_label, same_id)
    z_BG, valid_BG, positive_BG = logits_ref(image_BE, text_GE, scale, normalize, pairs)
    z_BG = z_BG + bias
    sign_BG = 2 * positive_BG.to(z_BG.dtype) - 1
    return -F.logsigmoid(sign_BG * z_BG).masked_fill(~valid_BG, 0).sum() / len(image_BE)
