"""The contrastive loss over one rank or many.

Legend: B pairs on this rank, G pairs of the global batch, E embedding size.

One distributed mode, which is always right: each rank keeps its B image rows, gathers the G text rows,
computes its strip of the similarity once, completes the column sums over the ranks, and gives the gradient
of the mean over its B rows. Averaging the parameters' gradients over ranks, as DistributedDataParallel does,
then gives exactly the gradient of the loss of the whole batch. The maths is in ``clipcore.kernels.contrastive``.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipcore.distributed import all_gather_with_grad
from clipcore.kernels.contrastive import similarity_gradients, similarity_lse


class ClipLoss(nn.Module):
    """InfoNCE between images and texts, averaged over both directions (open_clip's names and call).

    Args:
        local_loss, gather_with_grad: accepted for open_clip's callers; the loss is always the exact one that both
            together stand for.
        cache_labels: accepted, nothing to cache.
        rank, world_size: this process's place; ``world_size > 1`` needs an initialised process group.

    Source: Radford et al. 2021, figure 3.

    >>> loss = ClipLoss()(image_features, text_features, logit_scale)  # doctest: +SKIP
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        if world_size > 1 and local_loss != gather_with_grad:
            warnings.warn(
                "ClipLoss ignores local_loss and gather_with_grad: it always computes the exact loss of the "
                "global batch, as open_clip does with both",
                stacklevel=2,
            )
        self.rank = rank
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """The mean loss over this rank's pairs.

        Args:
            image_features, text_features: [B, E], L2-normalised, pair i in row i of both; the same B on every rank.
            logit_scale: what the cosine is multiplied with, ``model.logit_scale.exp()``; a scalar.
            logit_bias: accepted; one constant added to all logits changes neither this loss nor its gradients.
            output_dict: return ``{"contrastive_loss": loss}``.

        Raises:
            ValueError: shapes that are no pairs.
        """
        if image_features.shape != text_features.shape or image_features.ndim != 2:
            raise ValueError(
                "image_features and text_features must be pairs of one shape [B, E], "
                f"got {tuple(image_features.shape)} and {tuple(text_features.shape)}"
            )
        # 16-bit features lose nothing here: the sums and the softmax want float32.
        dtype = torch.promote_types(image_features.dtype, torch.float32)
        image_BE, text_BE = image_features.to(dtype), text_features.to(dtype)
        scale = torch.as_tensor(logit_scale, dtype=dtype, device=image_BE.device).reshape(())
        text_GE = all_gather_with_grad(text_BE) if self.world_size > 1 else text_BE
        loss = _StripLoss.apply(image_BE, text_GE, scale, self.rank * len(image_BE))
        return {"contrastive_loss": loss} if output_dict else loss


class _StripLoss(torch.autograd.Function):
    """Mean loss of a strip of B image rows against all G text rows, positives from column ``first_label``."""

    @staticmethod
    def forward(
        ctx: Any, image_BE: Tensor, text_GE: Tensor, scale: Tensor, first_label: int
    ) -> Tensor:
        with torch.autocast(image_BE.device.type, enabled=False):
            row_lse_B, column_lse_G = similarity_lse(image_BE, text_GE, scale)
            if len(text_GE) > len(image_BE):
                column_lse_G = _all_reduce_logsumexp(column_lse_G)
            own = slice(first_label, first_label + len(image_BE))
            positive_B = scale * (image_BE * text_GE[own]).sum(1)
            loss = (row_lse_B + column_lse_G[own] - 2 * positive_B).mean() / 2
        ctx.save_for_backward(image_BE, text_GE, scale, row_lse_B, column_lse_G)
        ctx.first_label = first_label
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_loss.device.type, enabled=False):
            image_BE, text_GE, scale, row_lse_B, column_lse_G = ctx.saved_tensors
            gradients = similarity_gradients(
                image_BE, text_GE, scale, row_lse_B, column_lse_G, ctx.first_label
            )
        return (*(gradient * grad_loss for gradient in gradients), None)


def _all_reduce_logsumexp(lse_G: Tensor) -> Tensor:
    """log sum over ranks of exp(lse): the maximum first, so that no exponential overflows."""
    maximum_G = lse_G.clone()
    dist.all_reduce(maximum_G, dist.ReduceOp.MAX)
    total_G = (lse_G - maximum_G).exp()
    dist.all_reduce(total_G)
    return total_G.log_() + maximum_G
