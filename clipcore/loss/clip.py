"""CLIP's contrastive loss over one rank or many, under open_clip's names.

Legend: B rows of one side on this rank, G of the other on all ranks, K rows of this side on all ranks, E embedding size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from clipcore.kernels import launch
from clipcore.kernels.contrastive import (
    ContrastiveTerms,
    Plan,
    Targets,
    contrastive_loss,
    contrastive_terms,
    plan,
)
from clipcore.kernels.contrastive.targets import TargetSide, even_targets
from clipcore.loss.options import LossOptions, as_factor, check_pairs, warn_once
from clipcore.loss.shard import CompleteLse, CompleteSum, LogitShard, LossGroup, Side
from clipcore.ranks.distributed import all_reduce_, gather_rows


class ClipLoss(nn.Module):
    """InfoNCE between images and texts, averaged over both directions (open_clip's names and call).

    Args:
        local_loss, gather_with_grad: accepted for open_clip's callers; the loss is always the exact one, as with both.
        cache_labels: accepted; there is nothing to cache.
        rank, world_size: this process's place; ``world_size > 1`` needs an initialised process group.
        use_horovod: must be false.
        label_smoothing: in [0, 1), as in torch's cross-entropy.
        same_id: the meaning of equal ids, "ignore" or "positive", see `forward`.
        stash_bytes, workspace_bytes, operand_dtype: memory limits of the loss and the dtype of a GPU's products, see
            `clipcore.kernels.contrastive.contrastive_loss`.
        wire_dtype: dtype of features in transfer between ranks; None for their own.
        uneven: whether ranks on GPUs may have different numbers of rows; the host then waits for these numbers. On the CPU
            they always may.
        group: the ranks that share the loss, ``rank`` and ``world_size`` among them; None for all.

    In a subclass that overrides ``get_logits``, the loss is open_clip's computation with that matrix in memory.

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
        wire_dtype: torch.dtype | None = None,
        uneven: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod is not supported: start the ranks with torchrun")
        if local_loss or gather_with_grad:
            warn_once(
                "ClipLoss ignores local_loss and gather_with_grad: it always computes the exact loss of the "
                "global batch, as open_clip does with both"
            )
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.cache_labels, self.use_horovod = cache_labels, use_horovod
        self.rank, self.world_size = rank, world_size
        self.loss_group = LossGroup(rank, world_size, wire_dtype, uneven, group)
        self.options = LossOptions(
            same_id=same_id,
            label_smoothing=label_smoothing,
            stash_bytes=stash_bytes,
            workspace_bytes=workspace_bytes,
            operand_dtype=operand_dtype,
        )

    @property
    def same_id(self) -> str:
        """The meaning of equal ids."""
        return self.options.same_id

    @same_id.setter
    def same_id(self, same_id: str) -> None:
        self.options = dataclasses.replace(self.options, same_id=same_id)

    @property
    def label_smoothing(self) -> float:
        """The share of a target that is spread evenly over all valid pairs."""
        return self.options.label_smoothing

    @label_smoothing.setter
    def label_smoothing(self, label_smoothing: float) -> None:
        self.options = dataclasses.replace(self.options, label_smoothing=label_smoothing)

    @property
    def stash_bytes(self) -> int | None:
        """The largest size of a stash; None decides it once per process."""
        return self.options.stash_bytes

    @stash_bytes.setter
    def stash_bytes(self, stash_bytes: int | None) -> None:
        self.options = dataclasses.replace(self.options, stash_bytes=stash_bytes)

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
        """Return the loss of this rank's pairs, as a mean; see ``clipcore.loss``.

        Args:
            image_features, text_features: [B, E], L2-normalised, pair i in row i of both. Either side may have more
                rows: extra negatives of the other side, on all ranks.
            logit_scale: the factor of the cosine, ``model.logit_scale.exp()``; a scalar.
            logit_bias: accepted; one constant added to all logits changes neither this loss nor its gradients.
            output_dict: return ``{"contrastive_loss": loss}``. It may be passed in the position of logit_bias.
            image_ids, text_ids: int64, one per row, both or none. Rows with equal ids belong together, on any rank.
                ``same_id="ignore"`` removes them from the negatives, ``"positive"`` makes them positives.

        Raises:
            ValueError: the shapes are not pairs, or a rank is in another call than this one.
        """
        if isinstance(logit_bias, bool):
            logit_bias, output_dict = None, logit_bias
        check_pairs(image_features, text_features, image_ids, text_ids)
        logit_scale = as_factor(logit_scale, image_features)
        if type(self).get_logits is not ClipLoss.get_logits:
            if image_ids is not None or self.label_smoothing > 0:
                raise ValueError(
                    "a custom get_logits supports neither ids nor label smoothing: leave them out, or get_logits"
                )
            if self.world_size > 1:
                raise ValueError(
                    "a custom get_logits covers only this rank's pairs: use it on one rank, or pass image_ids and "
                    "text_ids, extra rows or label_smoothing, which this loss knows over ranks"
                )
            loss = self._dense(image_features, text_features, logit_scale, logit_bias)
        elif self.world_size > 1:
            image, text = Side(image_features, image_ids), Side(text_features, text_ids)
            loss = self._over_ranks(image, text, logit_scale)
        else:
            loss = contrastive_loss(
                image_features,
                text_features,
                logit_scale,
                normalize=False,
                image_ids=image_ids,
                text_ids=text_ids,
                same_id=self.same_id,
                label_smoothing=self.label_smoothing,
                stash_bytes=self.options.stash_bytes,
                workspace_bytes=self.options.workspace_bytes,
                operand_dtype=self.options.operand_dtype,
            )
        if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
            loss = loss + 0 * logit_bias.sum()  # its gradient is 0, not None
        return {"contrastive_loss": loss} if output_dict else loss

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """Return open_clip's ground truth: the column of each row's pair."""
        return torch.arange(num_logits, device=device)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return open_clip's logits of images and of texts for one rank, [B, B] in memory. `forward` does not use them."""
        logits_BB = logit_scale * image_features @ text_features.T
        if logit_bias is not None:
            logits_BB = logits_BB + logit_bias
        return logits_BB, logits_BB.T

    def _dense(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor | float,
        bias: Tensor | float | None,
    ) -> Tensor:
        """Return the loss of a subclass's own logits."""
        image_logits, text_logits = self.get_logits(image, text, scale, logit_bias=bias)
        labels = self.get_ground_truth(image.device, image_logits.shape[0])
        return (F.cross_entropy(image_logits, labels) + F.cross_entropy(text_logits, labels)) / 2

    def memory_bytes(self, image_features: Tensor, text_features: Tensor) -> int:
        """Return the peak bytes of `forward` and its backward, without these features and their gradients."""
        chosen = self.plan(image_features, text_features)
        workspace = self.options.workspace(image_features, text_features, self.world_size)
        return workspace + chosen.kept_bytes

    def plan(self, image_features: Tensor, text_features: Tensor) -> Plan:
        """Return how `forward` will compute the loss of these features; `str` describes it in one line."""
        text_GE = text_features[:1].expand(len(text_features) * self.world_size, -1)
        return plan(
            image_features,
            text_GE,
            stash_bytes=self.options.stash_bytes,
            operand_dtype=self.options.operand_dtype,
        )

    def _over_ranks(self, image: Side, text: Side, scale: Tensor | float) -> Tensor:
        """Return this rank's part of the loss of all ranks' pairs, times the number of ranks."""
        shard = self.loss_group.shard(image, text)
        by_id = shard.resident.ids is not None and self.same_id == "positive"
        targets = self._targets(shard) if by_id or self.label_smoothing > 0 else None
        terms = self._terms_of_rows(shard, targets, scale)
        row_loss_B = terms.row_lse_B - terms.row_target_B
        column_loss_B = terms.column_lse_G - terms.column_target_G

        wide = launch.accumulate_dtype(torch.promote_types(image.rows.dtype, text.rows.dtype))
        if not by_id:
            pairs = slice(0, shard.num_own_pairs)
            total = row_loss_B[pairs].sum() + column_loss_B[pairs].sum()
            return (total * (self.world_size / (2 * shard.num_pairs))).to(wide)

        # The mean over all ranks' rows that have a positive.
        assert targets is not None
        totals, counts = [], []
        for loss_B, weight_B in (
            (row_loss_B, targets.row_positive_B),
            (column_loss_B, targets.column_positive_G[shard.own]),
        ):
            totals.append(torch.where(weight_B > 0, loss_B, 0.0).sum())
            counts.append((weight_B > 0).sum().double())
        shared = torch.stack(counts)
        all_reduce_(shared, "count of positives", group=self.loss_group.group)
        return (self.world_size / 2 * (torch.stack(totals) / shared).sum()).to(wide)

    def _terms_of_rows(
        self, shard: LogitShard, targets: Targets | None, scale: Tensor | float
    ) -> ContrastiveTerms:
        """Return the terms of each of this rank's rows, and of each of its columns, over all ranks' logits."""
        resident, operand = shard.resident, shard.operand(self.options.operand_dtype)
        # Decided once for the whole shard, not for each of its blocks.
        all_rows = resident.rows.new_empty(1, resident.rows.shape[1]).expand(sum(shard.shards), -1)
        chosen = plan(
            resident.rows,
            all_rows,
            stash_bytes=self.options.stash_bytes,
            operand_dtype=operand,
        )

        row_target_B = resident.rows.new_zeros(len(resident.rows), dtype=torch.float64)
        row_lse_B: Tensor | None = None
        column_lse: dict[int, Tensor] = {}
        column_target: dict[int, Tensor] = {}
        for block in shard.blocks():
            terms = contrastive_terms(
                resident.rows,
                block.rows,
                scale,
                normalize=False,
                first_label=block.first_label,
                image_ids=resident.ids,
                text_ids=block.ids,
                same_id=self.same_id,
                targets=None if targets is None else targets.columns(block.columns),
                stash=chosen.stash,
                engine=chosen.engine,
                workspace_bytes=self.options.workspace_bytes,
                operand_dtype=operand,
            )
            # If this started at -inf, the gradient would be NaN where both are -inf.
            row_lse_B = (
                terms.row_lse_B
                if row_lse_B is None
                else torch.logaddexp(row_lse_B, terms.row_lse_B)
            )
            if targets is not None or block.is_own:
                row_target_B = row_target_B + terms.row_target_B
            column_lse[block.columns.start] = terms.column_lse_G
            column_target[block.columns.start] = terms.column_target_G
        assert row_lse_B is not None

        group = self.loss_group.group
        column_lse_G = CompleteLse.apply(_in_order(column_lse), group)
        column_target_G = _in_order(column_target)
        if targets is not None:  # every rank has parts of a target
            column_target_G = CompleteSum.apply(column_target_G, group)
        return ContrastiveTerms(
            row_lse_B, column_lse_G[shard.own], row_target_B, column_target_G[shard.own]
        )

    def _targets(self, shard: LogitShard) -> Targets:
        """Return the targets of this rank's rows and of all columns; pairs are counted over all ranks."""
        resident, group = shard.resident, self.loss_group.group
        num_rows, num_columns = sum(shard.resident_shards), sum(shard.shards)
        rows = TargetSide(None, None, None, len(resident.rows), num_columns)
        columns = TargetSide(None, None, None, num_columns, num_rows)
        if resident.ids is not None:
            assert shard.own_ids is not None
            ids_G, ids_K = shard.all_ids(), gather_rows(resident.ids, group)
            rows = rows._replace(ids_N=resident.ids, other_ids_M=ids_G)
            columns = columns._replace(ids_N=ids_G, other_ids_M=ids_K)
            if self.same_id == "ignore":
                pairs = slice(0, shard.num_own_pairs)
                equal_B, equal_own = torch.zeros_like(resident.ids), torch.zeros_like(shard.own_ids)
                equal_B[pairs] = (resident.ids[pairs] == shard.own_ids[pairs]).long()
                equal_own[pairs] = equal_B[pairs]
                rows = rows._replace(is_own_equal_N=equal_B)
                columns = columns._replace(is_own_equal_N=gather_rows(equal_own, group))
        device = resident.rows.device
        return even_targets(rows, columns, self.same_id, self.label_smoothing, device)


def _in_order(parts: dict[int, Tensor]) -> Tensor:
    """Return the parts of all columns, concatenated in the order of their first columns."""
    return torch.cat([parts[first] for first in sorted(parts)])
