"""InfoNCE of image and text embeddings, both directions from one similarity, in bounded memory.

Legend: B image rows of this rank, G text rows of the global batch, E embedding size, C rows of a chunk.

With ``z_bg = scale * <image_b, text_g>`` and the positive of image row ``b`` in column ``first_label + b``::

    row_lse_b    = log sum_g exp(z_bg)                 every column of a row is here: complete
    column_lse_g = log sum_b exp(z_bg)                 rows of other ranks still have to be added
    loss         = 1/(2B) * sum_b [row_lse_b + column_lse_{first_label+b} - 2 z_{b,first_label+b}]
    G_bg         = exp(z_bg - row_lse_b) + exp(z_bg - column_lse_g) - 2 * [g == first_label + b]
    d_image      = scale/(2B) * G @ text,    d_text = scale/(2B) * G^T @ image,
    d_scale      = 1/(2B) * sum_bg G_bg * z_bg / scale

The similarity is computed in chunks of rows, once for the sums and once more for the gradients: four
matrix products (8 B G E FLOP) and a workspace of at most ``WORKSPACE_BYTES``, whatever B and G are.
Sums run in float32 (float64 for float64 input) in a fixed order, so the same input gives the same bits.

The loss itself, over one rank or many, is ``clipcore.loss.ClipLoss``; this file is its arithmetic. Source:
Radford et al. 2021 (arXiv 2103.00020), figure 3; the sharded form follows from it term by term.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WORKSPACE_BYTES = 64 * 2**20


def contrastive_ref(image_NE: Tensor, text_NE: Tensor, scale: Tensor | float) -> Tensor:
    """The whole loss of N pairs on one device, by the N x N matrix: the reference, never the training path."""
    logits_NN = scale * image_NE @ text_NE.T
    labels_N = torch.arange(len(image_NE), device=image_NE.device)
    return (F.cross_entropy(logits_NN, labels_N) + F.cross_entropy(logits_NN.T, labels_N)) / 2


def chunk_rows(num_columns: int, dtype: torch.dtype) -> int:
    """Rows of the similarity that fit ``WORKSPACE_BYTES`` together with one temporary of the same size."""
    return max(1, WORKSPACE_BYTES // (2 * dtype.itemsize * max(1, num_columns)))


def similarity_lse(image_BE: Tensor, text_GE: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of every row [B] and of every column [G] of ``scale * image @ text^T``.

    The columns cover the B rows given; combine ranks or further rows by log-add-exp. B may be 0.
    """
    _check_embeddings(image_BE, text_GE)
    row_lse_B = image_BE.new_empty(len(image_BE))
    column_lse_G = image_BE.new_full((len(text_GE),), -torch.inf)
    step = chunk_rows(len(text_GE), image_BE.dtype)
    for start in range(0, len(image_BE), step):
        rows = slice(start, start + step)
        logits_CG = (image_BE[rows] * scale) @ text_GE.T
        row_lse_B[rows] = logits_CG.logsumexp(1)
        column_lse_G = torch.logaddexp(column_lse_G, logits_CG.logsumexp(0))
    return row_lse_B, column_lse_G


def similarity_gradients(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor,
    row_lse_B: Tensor,
    column_lse_G: Tensor,
    first_label: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the loss (module docstring) for an upstream gradient of one.

    Returns:
        d_image [B, E], complete; d_text [G, E], the part of these B rows; d_scale, a scalar, likewise.
    """
    d_image_BE = torch.empty_like(image_BE)
    d_text_GE = torch.zeros_like(text_GE)
    d_scale = torch.zeros_like(scale)
    weight = 1 / (2 * max(1, len(image_BE)))
    step = chunk_rows(len(text_GE), image_BE.dtype)
    for start in range(0, len(image_BE), step):
        rows = slice(start, start + step)
        cosine_CG = image_BE[rows] @ text_GE.T
        logits_CG = cosine_CG * scale
        grad_CG = (logits_CG - row_lse_B[rows, None]).exp_()
        grad_CG += logits_CG.sub_(column_lse_G).exp_()
        # The positives lie on a diagonal that starts at column first_label + start.
        grad_CG.diagonal(first_label + start)[: len(grad_CG)] -= 2
        d_scale += weight * torch.dot(grad_CG.flatten(), cosine_CG.flatten())
        grad_CG *= scale * weight
        d_image_BE[rows] = grad_CG @ text_GE
        d_text_GE.addmm_(grad_CG.T, image_BE[rows])
    return d_image_BE, d_text_GE, d_scale


def _check_embeddings(image_BE: Tensor, text_GE: Tensor) -> None:
    if image_BE.ndim != 2 or text_GE.ndim != 2 or image_BE.shape[1] != text_GE.shape[1]:
        raise ValueError(
            "image_features and text_features must be [B, E] and [G, E] with one E, "
            f"got {tuple(image_BE.shape)} and {tuple(text_GE.shape)}"
        )
