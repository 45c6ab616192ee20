"""The contrastive losses over one rank or many, under open_clip's names.

Legend: B pairs on this rank, G pairs of the global batch, E embedding size.

One distributed mode, which is always right: each rank keeps its B image rows, gathers the G text rows,
computes its strip of the similarity once, completes the column sums over the ranks (the sigmoid loss has none), and
gives the gradient of the mean over its B rows. Averaging the parameters' gradients over ranks, as
DistributedDataParallel does, then gives exactly the gradient of the loss of the whole batch. The maths is in
``clipcore.kernels.contrastive`` and ``clipcore.kernels.sigmoid``.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp

from clipcore.distributed import all_gather_with_grad, all_reduce_, gather_rows
from clipcore.kernels import contrastive, logits, tiles
from clipcore.kernels.contrastive import Plan, contrastive_loss, contrastive_terms
from clipcore.kernels.sigmoid import sigmoid_loss


class ClipLoss(nn.Module):
    """InfoNCE between images and texts, averaged over both directions (open_clip's names and call).

    Args:
        local_loss, gather_with_grad: accepted for open_clip's callers; the loss is always the exact one that both
            together stand for.
        cache_labels: accepted, nothing to cache.
        rank, world_size: this process's place; ``world_size > 1`` needs an initialised process group.
        use_horovod: accepted if false.
        label_smoothing: in [0, 1), as in torch's cross-entropy.
        same_id: what equal ids mean, see `forward`: "ignore" or "positive".
        stash_bytes, workspace_bytes, operand_dtype: how the loss may use memory and what a GPU multiplies, see
            `clipcore.kernels.contrastive.contrastive_loss`.

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
        use_horovod: bool = False,
        *,
        label_smoothing: float = 0.0,
        same_id: str = "ignore",
        stash_bytes: int | None = None,
        workspace_bytes: int | None = None,
        operand_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod is not supported: start the ranks with torchrun")
        if world_size > 1 and local_loss != gather_with_grad:
            warnings.warn(
                "ClipLoss ignores local_loss and gather_with_grad: it always computes the exact loss of the "
                "global batch, as open_clip does with both",
                stacklevel=2,
            )
        contrastive.check_label_smoothing(label_smoothing)
        self.rank = rank
        self.world_size = world_size
        self.label_smoothing = label_smoothing
        self.same_id = same_id
        self.memory: dict[str, Any] = {
            "stash_bytes": stash_bytes,
            "workspace_bytes": workspace_bytes,
            "operand_dtype": operand_dtype,
        }

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
    ) -> Any:
        """The mean loss over this rank's pairs.

        Args:
            image_features, text_features: [B, E], L2-normalised, pair i in row i of both; the same B on every rank. On
                one rank either side may have more rows: extra negatives of the other side.
            logit_scale: what the cosine is multiplied with, ``model.logit_scale.exp()``; a scalar.
            logit_bias: accepted; one constant added to all logits changes neither this loss nor its gradients.
            output_dict: return ``{"contrastive_loss": loss}``.
            image_ids, text_ids: int64, one a row, both or none; rows of equal ids belong together, on whichever rank they
                are. ``same_id="ignore"`` leaves them out as negatives, ``"positive"`` makes them positives.

        Raises:
            ValueError: shapes that are no pairs.
        """
        _check_pairs(image_features, text_features, self.world_size)
        settings = {"normalize": False, "same_id": self.same_id, **self.memory}
        if self.world_size > 1:
            loss = self._strip_loss(
                image_features, text_features, logit_scale, image_ids, text_ids, settings
            )
        else:
            loss = contrastive_loss(
                *(image_features, text_features, logit_scale),
                image_ids=image_ids,
                text_ids=text_ids,
                label_smoothing=self.label_smoothing,
                **settings,
            )
        if logit_bias is not None and logit_bias.requires_grad:
            loss = loss + 0 * logit_bias.sum()  # its gradient is 0, not absent
        return {"contrastive_loss": loss} if output_dict else loss

    def plan(self, image_features: Tensor, text_features: Tensor) -> Plan:
        """How `forward` will compute the loss of these features; `str` says it in one line."""
        stash_bytes, operand_dtype = self.memory["stash_bytes"], self.memory["operand_dtype"]
        text_GE = text_features[:1].expand(len(text_features) * self.world_size, -1)
        return contrastive.plan(
            image_features, text_GE, stash_bytes=stash_bytes, operand_dtype=operand_dtype
        )

    def _strip_loss(
        self,
        image_BE: Tensor,
        text_BE: Tensor,
        scale: Tensor | float,
        image_ids: Tensor | None,
        text_ids: Tensor | None,
        settings: dict[str, Any],
    ) -> Tensor:
        """The mean over this rank's rows and columns of the loss of all ranks' pairs."""
        B = len(image_BE)
        dtype = tiles.accumulate_dtype(torch.promote_types(image_BE.dtype, text_BE.dtype))
        text_GE = _gather_text(image_BE, text_BE, settings)
        own = slice(self.rank * B, self.rank * B + B)
        image_ids_G = None if image_ids is None else gather_rows(image_ids)
        text_ids_G = None if text_ids is None else gather_rows(text_ids)
        targets = None
        if image_ids_G is not None or self.label_smoothing > 0:
            targets = contrastive.uniform_targets(
                *(text_GE, text_GE, 0, image_ids_G, text_ids_G),
                *(self.same_id, self.label_smoothing),
            )
            rows = (targets.row_positive_B[own], targets.row_uniform_B[own])
            targets = contrastive.Targets(*rows, *targets[2:])
        terms = contrastive_terms(
            *(image_BE, text_GE, scale),
            first_label=own.start,
            image_ids=image_ids,
            text_ids=text_ids_G,
            targets=targets,
            **settings,
        )
        column_lse_G = _CompleteLse.apply(terms.column_lse_G)
        column_target_G = terms.column_target_G
        if targets is not None:  # parts of a target lie on every rank
            column_target_G = _CompleteSum.apply(column_target_G)
        row_loss_B = terms.row_lse_B - terms.row_target_B
        column_loss_B = (column_lse_G - column_target_G)[own]
        by_id = image_ids is not None and self.same_id == "positive"
        if not by_id:
            return ((row_loss_B.mean() + column_loss_B.mean()) / 2).to(dtype)
        assert targets is not None
        parts = []
        for loss_B, weight_B in (
            (row_loss_B, targets.row_positive_B),
            (column_loss_B, targets.column_positive_G[own]),
        ):
            # The mean over all ranks' rows that have a positive, times the number of ranks: they average.
            has_positive_B = weight_B > 0
            count = has_positive_B.sum().double()
            all_reduce_(count, "count of positives")
            parts.append(torch.where(has_positive_B, loss_B, 0.0).sum() * (self.world_size / count))
        return ((parts[0] + parts[1]) / 2).to(dtype)


class SigLipLoss(nn.Module):
    """SigLIP's sigmoid loss: the sum over all pairs of images and texts, over the number of images (open_clip's call).

    Args:
        cache_labels: accepted, nothing to cache.
        rank, world_size: this process's place; ``world_size > 1`` needs an initialised process group.
        dist_impl: open_clip's ways to exchange texts, "bidir", "shift", "reduce" or "gather"; accepted, the texts are
            always gathered once and compared in blocks, so that memory does not grow with the number of ranks.
        same_id: what equal ids mean, see `forward`: "ignore" or "positive".
        workspace_bytes, operand_dtype: how the loss may use memory and what a GPU multiplies, see
            `clipcore.kernels.sigmoid.sigmoid_loss`.

    Source: Zhai et al. 2023 (arXiv 2303.15343).

    >>> loss = SigLipLoss()(image_features, text_features, logit_scale, logit_bias)  # doctest: +SKIP
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        same_id: str = "ignore",
        workspace_bytes: int | None = None,
        operand_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(
                f"dist_impl has to be bidir, shift, reduce, gather or None, got {dist_impl!r}"
            )
        self.rank = rank
        self.world_size = world_size
        self.settings: dict[str, Any] = {
            "normalize": False,
            "same_id": same_id,
            "workspace_bytes": workspace_bytes,
            "operand_dtype": operand_dtype,
        }

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
    ) -> Any:
        """The loss of this rank's images with the texts of all ranks, over the number of these images.

        Args:
            image_features, text_features: [B, E], L2-normalised, pair i in row i of both; the same B on every rank. On
                one rank either side may have more rows: extra negatives of the other side.
            logit_scale: what the cosine is multiplied with, ``model.logit_scale.exp()``; a scalar.
            logit_bias: what is added to the logits, ``model.logit_bias``; a scalar, None for 0.
            output_dict: return ``{"contrastive_loss": loss}``.
            image_ids, text_ids: int64, one a row, both or none; rows of equal ids belong together, on whichever rank
                they are. ``same_id="ignore"`` leaves them out as negatives, ``"positive"`` makes them positives.

        Raises:
            ValueError: shapes that are no pairs.
        """
        _check_pairs(image_features, text_features, self.world_size)
        settings, first_label = dict(self.settings), 0
        if self.world_size > 1:
            first_label = self.rank * len(image_features)
            text_features = _gather_text(image_features, text_features, settings)
            text_ids = None if text_ids is None else gather_rows(text_ids)
        loss = sigmoid_loss(
            *(image_features, text_features, logit_scale),
            0.0 if logit_bias is None else logit_bias,
            first_label=first_label,
            image_ids=image_ids,
            text_ids=text_ids,
            **settings,
        )
        return {"contrastive_loss": loss} if output_dict else loss


def _check_pairs(image_BE: Tensor, text_BE: Tensor, world_size: int) -> None:
    """ValueError unless rows can be pairs; more of one side only on one rank, where nobody takes them for his own."""
    fit = image_BE.ndim == text_BE.ndim == 2 and image_BE.shape[1] == text_BE.shape[1]
    if not fit or (world_size > 1 and len(image_BE) != len(text_BE)):
        more = "" if world_size > 1 else " (or [G, E] with extra rows of one)"
        raise ValueError(
            f"image_features and text_features must be pairs of one shape [B, E]{more}, "
            f"got {tuple(image_BE.shape)} and {tuple(text_BE.shape)}"
        )


def _gather_text(image_BE: Tensor, text_BE: Tensor, settings: dict[str, Any]) -> Tensor:
    """All ranks' texts, in float32 so that their gradients add up in it; a GPU still multiplies what was given."""
    if image_BE.is_cuda:
        asked = settings["operand_dtype"]
        settings["operand_dtype"] = logits.operand_dtype(image_BE, text_BE, asked)
    dtype = tiles.accumulate_dtype(torch.promote_types(image_BE.dtype, text_BE.dtype))
    return all_gather_with_grad(text_BE.to(dtype))


class _CompleteLse(torch.autograd.Function):
    """log sum over ranks of exp(lse); the gradient is that of the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, lse_G: Tensor) -> Tensor:
        # The maximum first, so that no exponential overflows.
        maximum_G = lse_G.clone()
        all_reduce_(maximum_G, "columns' maximum", ReduceOp.MAX)
        total_G = (lse_G - maximum_G).exp()
        all_reduce_(total_G, "columns' sum")
        complete_G = total_G.log_() + maximum_G
        ctx.save_for_backward(lse_G, complete_G)
        return complete_G

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_G: Tensor) -> Tensor:
        lse_G, complete_G = ctx.saved_tensors
        grad_G = grad_G.contiguous().clone()
        all_reduce_(grad_G, "columns' gradient")
        return grad_G * (lse_G - complete_G).exp()


class _CompleteSum(torch.autograd.Function):
    """The sum over ranks; the gradient is that of the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, part_G: Tensor) -> Tensor:
        complete_G = part_G.clone()
        all_reduce_(complete_G, "columns' targets")
        return complete_G

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_G: Tensor) -> Tensor:
        grad_G = grad_G.contiguous().clone()
        all_reduce_(grad_G, "columns' gradient")
        return grad_G
