"""SigLIP's sigmoid loss over one rank or many, under open_clip's names.

Legend: B rows of one side on this rank, G of the other on all ranks, E embedding size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipcore.kernels.logits.pairs import choose_operand
from clipcore.kernels.sigmoid import sigmoid_loss
from clipcore.loss.options import LossOptions, as_factor, check_pairs
from clipcore.loss.shard import LossGroup, Side


class SigLipLoss(nn.Module):
    """SigLIP's sigmoid loss: the sum over all pairs of images and texts, divided by the number of images (open_clip's call).

    Args:
        cache_labels: accepted; there is nothing to cache.
        rank, world_size: this process's place; ``world_size > 1`` needs an initialised process group.
        dist_impl: open_clip's ways to exchange texts, "bidir", "shift", "reduce" or "gather". All are accepted, but the
            texts are always gathered once and compared in blocks, so memory does not grow with the number of ranks.
        chunk_size: accepted, as in open_clip 4, where it limits memory; here ``workspace_bytes`` does.
        same_id: the meaning of equal ids, "ignore" or "positive", see `forward`.
        wire_dtype, uneven, group: see `ClipLoss`.
        workspace_bytes, operand_dtype: memory limit of the loss and the dtype of a GPU's products, see
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
        chunk_size: int | None = None,
        *,
        same_id: str = "ignore",
        workspace_bytes: int | None = None,
        operand_dtype: torch.dtype | None = None,
        wire_dtype: torch.dtype | None = None,
        uneven: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(
                f"dist_impl must be bidir, shift, reduce, gather or None, got {dist_impl!r}"
            )
        if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 0):
            raise ValueError(f"chunk_size is a number of rows, or None, got {chunk_size!r}")
        self.cache_labels, self.dist_impl = cache_labels, dist_impl
        self.rank, self.world_size = rank, world_size
        self.loss_group = LossGroup(rank, world_size, wire_dtype, uneven, group)
        self.options = LossOptions(
            same_id=same_id, workspace_bytes=workspace_bytes, operand_dtype=operand_dtype
        )

    @property
    def same_id(self) -> str:
        """The meaning of equal ids."""
        return self.options.same_id

    @same_id.setter
    def same_id(self, same_id: str) -> None:
        self.options = dataclasses.replace(self.options, same_id=same_id)

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
        """Return the loss of this rank's images with the texts of all ranks, divided by the number of these images.

        Args:
            image_features, text_features: [B, E], L2-normalised, pair i in row i of both. Either side may have more
                rows: extra negatives of the other side, on all ranks.
            logit_scale: the factor of the cosine, ``model.logit_scale.exp()``; a scalar.
            logit_bias: a constant added to the logits, ``model.logit_bias``; a scalar, None for 0.
            output_dict: return ``{"contrastive_loss": loss}``.
            image_ids, text_ids: int64, one per row, both or none. Rows with equal ids belong together, on any rank.
                ``same_id="ignore"`` removes them from the negatives, ``"positive"`` makes them positives.

        Raises:
            ValueError: the shapes are not pairs, or a rank is in another call than this one.
        """
        check_pairs(image_features, text_features, image_ids, text_ids)
        logit_scale = as_factor(logit_scale, image_features)
        bias = as_factor(0.0 if logit_bias is None else logit_bias, image_features)
        image, text = Side(image_features, image_ids), Side(text_features, text_ids)
        if self.world_size > 1:
            loss = self._over_ranks(image, text, logit_scale, bias)
        else:
            loss = self._of_block(image, text, 0, logit_scale, bias, self.options.operand_dtype)
        return {"contrastive_loss": loss} if output_dict else loss

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """Return open_clip's ground truth: 1 on the diagonal, -1 elsewhere, [B, B] in memory. `forward` does not use it."""
        signs_BB = -torch.ones((num_logits, num_logits), device=device, dtype=dtype)
        return signs_BB if negative_only else signs_BB.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """Return open_clip's logits of one rank, [B, B] in memory. `forward` does not use them."""
        logits_BB = logit_scale * image_features @ text_features.T
        return logits_BB if logit_bias is None else logits_BB + logit_bias

    def _over_ranks(
        self, image: Side, text: Side, scale: Tensor | float, bias: Tensor | float
    ) -> Tensor:
        """Return this rank's part of the loss of all ranks' pairs, times the number of ranks."""
        shard = self.loss_group.shard(image, text)
        operand = shard.operand(self.options.operand_dtype)
        total: Tensor | None = None
        for block in shard.blocks():
            side = Side(block.rows, block.ids)
            loss = self._of_block(shard.resident, side, block.first_label, scale, bias, operand)
            total = loss if total is None else total + loss
        assert total is not None

        # The operation divides by its number of rows, open_clip by the number of images.
        num_rows = max(1, len(shard.resident.rows))
        return total * (num_rows * self.world_size / max(1, shard.num_images))

    def _of_block(
        self,
        image: Side,
        text: Side,
        first_label: int,
        scale: Tensor | float,
        bias: Tensor | float,
        operand: torch.dtype | None,
    ) -> Tensor:
        """Return the loss of a block of rows and columns; the first row's pair is at column ``first_label``."""
        return sigmoid_loss(
            image.rows,
            text.rows,
            scale,
            bias,
            normalize=False,
            first_label=first_label,
            image_ids=image.ids,
            text_ids=text.ids,
            same_id=self.options.same_id,
            workspace_bytes=self.options.workspace_bytes,
            operand_dtype=operand,
        )

    def memory_bytes(self, image_features: Tensor, text_features: Tensor) -> int:
        """Return the peak bytes of `forward` and its backward, without these features and their gradients."""
        return self.options.workspace(image_features, text_features, self.world_size)

    def plan(self, image_features: Tensor, text_features: Tensor) -> str:
        """Return in one line how `forward` will compute the loss of these features."""
        B, E = image_features.shape
        G = self.world_size * len(text_features)
        dtype = choose_operand(image_features, text_features, self.options.operand_dtype)
        return (
            f"sigmoid loss of {B:,} x {G:,} x {E} on {image_features.device.type}: one pass, 3 products in "
            f"{str(dtype).removeprefix('torch.')}"
        )
