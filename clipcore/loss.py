"""The contrastive losses over one rank or many, under open_clip's names.

Legend: B rows of one side on this rank, G of the other on all ranks, K pairs of all ranks, E embedding size.

One distributed mode, which is always right: ``clipcore.strip``. What a rank returns is its part of the loss times the
number of ranks, so that averaging the parameters' gradients, as DistributedDataParallel does, gives exactly the gradient
of the loss of the whole batch. With equal shares it is the mean over the rank's own pairs. Shares may differ and be empty.
The maths is in ``clipcore.kernels.contrastive`` and ``clipcore.kernels.sigmoid``.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from clipcore.distributed import all_reduce_, gather_rows
from clipcore.kernels import contrastive, launch
from clipcore.kernels.contrastive import Plan, Targets, contrastive_loss, contrastive_terms
from clipcore.kernels.contrastive.targets import (
    TargetSide,
    check_label_smoothing,
    even_targets,
)
from clipcore.kernels.logits.pairs import SAME_ID, WORKSPACE_BYTES, choose_operand
from clipcore.kernels.sigmoid import sigmoid_loss
from clipcore.strip import CompleteLse, CompleteSum, Ranks, Side, Strip


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
        wire_dtype: what features travel in between ranks; None for their own.
        uneven: on GPUs, whether ranks may have different numbers of rows: the host then waits for these numbers. On the
            CPU they always may.
        group: the ranks that share the loss, ``rank`` and ``world_size`` among them; None for all.

    A subclass that overrides ``get_logits`` gets open_clip's computation from it, with the matrix in memory.

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
            _say_once(
                "ClipLoss ignores local_loss and gather_with_grad: it always computes the exact loss of the "
                "global batch, as open_clip does with both"
            )
        check_label_smoothing(label_smoothing)
        _check_same_id(same_id)
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.cache_labels, self.use_horovod = cache_labels, use_horovod
        self.rank, self.world_size = rank, world_size
        self.label_smoothing, self.same_id = label_smoothing, same_id
        self.ranks = Ranks(rank, world_size, wire_dtype, uneven, group)
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
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
    ) -> Any:
        """The loss of this rank's pairs, as a mean (module docstring).

        Args:
            image_features, text_features: [B, E], L2-normalised, pair i in row i of both. Either side may have more
                rows: extra negatives of the other side, on all ranks.
            logit_scale: what the cosine is multiplied with, ``model.logit_scale.exp()``; a scalar.
            logit_bias: accepted; one constant added to all logits changes neither this loss nor its gradients.
            output_dict: return ``{"contrastive_loss": loss}``. May stand in the place of logit_bias.
            image_ids, text_ids: int64, one a row, both or none; rows of equal ids belong together, on whichever rank they
                are. ``same_id="ignore"`` leaves them out as negatives, ``"positive"`` makes them positives.

        Raises:
            ValueError: shapes that are no pairs, or a rank that is in another call than this one.
        """
        if isinstance(logit_bias, bool):
            logit_bias, output_dict = None, logit_bias
        _check_pairs(image_features, text_features)
        logit_scale = _as_factor(logit_scale, image_features)
        _check_ids(image_ids, text_ids)
        if type(self).get_logits is not ClipLoss.get_logits:
            if self.world_size > 1:
                raise ValueError(
                    "a get_logits of your own sees this rank's pairs only: use it on one rank, or pass image_ids and "
                    "text_ids, extra rows or label_smoothing, which this loss knows over ranks"
                )
            loss = self._dense(image_features, text_features, logit_scale, logit_bias)
        elif self.world_size > 1:
            sides = Side(image_features, image_ids), Side(text_features, text_ids)
            loss = self._over_ranks(*sides, logit_scale)
        else:
            loss = contrastive_loss(
                *(image_features, text_features, logit_scale),
                normalize=False,
                same_id=self.same_id,
                image_ids=image_ids,
                text_ids=text_ids,
                label_smoothing=self.label_smoothing,
                **self.memory,
            )
        if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
            loss = loss + 0 * logit_bias.sum()  # its gradient is 0, not absent
        return {"contrastive_loss": loss} if output_dict else loss

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """open_clip's: the column of each row's pair."""
        return torch.arange(num_logits, device=device)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """open_clip's, for one rank: the logits of each image and of each text, [B, B] in memory. `forward` needs none."""
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
        """The loss of a subclass's own logits."""
        image_logits, text_logits = self.get_logits(image, text, scale, logit_bias=bias)
        labels = self.get_ground_truth(image.device, image_logits.shape[0])
        return (F.cross_entropy(image_logits, labels) + F.cross_entropy(text_logits, labels)) / 2

    def memory_bytes(self, image_features: Tensor, text_features: Tensor) -> int:
        """What `forward` and its backward hold at their peak beside these features and their gradients."""
        chosen = self.plan(image_features, text_features)
        asked = self.memory["workspace_bytes"]
        workspace = _workspace_bytes(image_features, text_features, self.world_size, asked)
        return workspace + (chosen.stash_bytes if chosen.stash else 0)

    def plan(self, image_features: Tensor, text_features: Tensor) -> Plan:
        """How `forward` will compute the loss of these features; `str` says it in one line."""
        stash_bytes, operand_dtype = self.memory["stash_bytes"], self.memory["operand_dtype"]
        text_GE = text_features[:1].expand(len(text_features) * self.world_size, -1)
        return contrastive.plan(
            image_features, text_GE, stash_bytes=stash_bytes, operand_dtype=operand_dtype
        )

    def _over_ranks(self, image: Side, text: Side, scale: Tensor | float) -> Tensor:
        """This rank's part of the loss of all ranks' pairs, times the number of ranks."""
        strip = self.ranks.strip(image, text)
        kept, settings = strip.kept, {"normalize": False, **self.memory}
        settings["operand_dtype"] = strip.operand(settings["operand_dtype"])
        all_rows = kept.rows.new_empty(1, kept.rows.shape[1]).expand(sum(strip.shards), -1)
        chosen = contrastive.plan(
            *(kept.rows, all_rows),
            stash_bytes=settings["stash_bytes"],
            operand_dtype=settings["operand_dtype"],
        )
        targets = None
        if self.label_smoothing > 0 or (kept.ids is not None and self.same_id == "positive"):
            targets = self._targets(strip)
        row_lse_B: Tensor | None = None
        row_target_B = kept.rows.new_zeros(len(kept.rows), dtype=torch.float64)
        column_lse: dict[int, Tensor] = {}
        column_target: dict[int, Tensor] = {}
        for block in strip.blocks():
            terms = contrastive_terms(
                *(kept.rows, block.rows, scale),
                first_label=block.first_label,
                image_ids=kept.ids,
                text_ids=block.ids,
                same_id=self.same_id,
                targets=None if targets is None else targets.columns(block.columns),
                stash=chosen.stash,
                **settings,
            )
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
        own, group = strip.own, self.ranks.group
        column_lse_G = CompleteLse.apply(_in_order(column_lse), group)
        column_target_G = _in_order(column_target)
        if targets is not None:  # parts of a target lie on every rank
            column_target_G = CompleteSum.apply(column_target_G, group)
        row_loss_B = row_lse_B - row_target_B
        column_loss_B = column_lse_G[own] - column_target_G[own]
        wide = launch.accumulate_dtype(torch.promote_types(image.rows.dtype, text.rows.dtype))
        if kept.ids is None or self.same_id == "ignore":
            pairs = slice(0, strip.num_own_pairs)
            total = row_loss_B[pairs].sum() + column_loss_B[pairs].sum()
            return (total * (self.world_size / (2 * strip.num_pairs))).to(wide)
        assert targets is not None
        # The mean over all ranks' rows that have a positive.
        totals, counts = [], []
        for loss_B, weight_B in (
            (row_loss_B, targets.row_positive_B),
            (column_loss_B, targets.column_positive_G[own]),
        ):
            totals.append(torch.where(weight_B > 0, loss_B, 0.0).sum())
            counts.append((weight_B > 0).sum().double())
        shared = torch.stack(counts)
        all_reduce_(shared, "count of positives", group=group)
        return (self.world_size / 2 * (torch.stack(totals) / shared).sum()).to(wide)

    def _targets(self, strip: Strip) -> Targets:
        """Of this rank's rows and of all columns; positives and valid pairs are counted over all ranks."""
        kept, group = strip.kept, self.ranks.group
        num_rows, num_columns = sum(strip.kept_shards), sum(strip.shards)
        rows = TargetSide(None, None, None, len(kept.rows), num_columns)
        columns = TargetSide(None, None, None, num_columns, num_rows)
        if kept.ids is not None:
            assert strip.own_ids is not None
            ids_G, ids_K = strip.all_ids(), gather_rows(kept.ids, group)
            pairs = slice(0, strip.num_own_pairs)
            equal_B, equal_own = torch.zeros_like(kept.ids), torch.zeros_like(strip.own_ids)
            equal_B[pairs] = (kept.ids[pairs] == strip.own_ids[pairs]).to(kept.ids.dtype)
            equal_own[pairs] = equal_B[pairs]
            equal_G = gather_rows(equal_own, group) if self.same_id == "ignore" else None
            rows = rows._replace(ids_N=kept.ids, other_ids_M=ids_G, is_own_equal_N=equal_B)
            columns = columns._replace(ids_N=ids_G, other_ids_M=ids_K, is_own_equal_N=equal_G)
        return even_targets(rows, columns, self.same_id, self.label_smoothing, kept.rows.device)


class SigLipLoss(nn.Module):
    """SigLIP's sigmoid loss: the sum over all pairs of images and texts, over the number of images (open_clip's call).

    Args:
        cache_labels: accepted, nothing to cache.
        rank, world_size: this process's place; ``world_size > 1`` needs an initialised process group.
        dist_impl: open_clip's ways to exchange texts, "bidir", "shift", "reduce" or "gather"; accepted, the texts are
            always gathered once and compared in blocks, so that memory does not grow with the number of ranks.
        same_id: what equal ids mean, see `forward`: "ignore" or "positive".
        wire_dtype, uneven, group: as of `ClipLoss`.
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
        wire_dtype: torch.dtype | None = None,
        uneven: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(
                f"dist_impl has to be bidir, shift, reduce, gather or None, got {dist_impl!r}"
            )
        _check_same_id(same_id)
        self.cache_labels, self.dist_impl = cache_labels, dist_impl
        self.rank, self.world_size = rank, world_size
        self.ranks = Ranks(rank, world_size, wire_dtype, uneven, group)
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
            image_features, text_features: [B, E], L2-normalised, pair i in row i of both. Either side may have more
                rows: extra negatives of the other side, on all ranks.
            logit_scale: what the cosine is multiplied with, ``model.logit_scale.exp()``; a scalar.
            logit_bias: what is added to the logits, ``model.logit_bias``; a scalar, None for 0.
            output_dict: return ``{"contrastive_loss": loss}``.
            image_ids, text_ids: int64, one a row, both or none; rows of equal ids belong together, on whichever rank
                they are. ``same_id="ignore"`` leaves them out as negatives, ``"positive"`` makes them positives.

        Raises:
            ValueError: shapes that are no pairs, or a rank that is in another call than this one.
        """
        _check_pairs(image_features, text_features)
        logit_scale = _as_factor(logit_scale, image_features)
        _check_ids(image_ids, text_ids)
        bias = _as_factor(0.0 if logit_bias is None else logit_bias, image_features)
        if self.world_size > 1:
            sides = Side(image_features, image_ids), Side(text_features, text_ids)
            loss = self._over_ranks(*sides, logit_scale, bias)
        else:
            loss = sigmoid_loss(
                *(image_features, text_features, logit_scale, bias),
                image_ids=image_ids,
                text_ids=text_ids,
                **self.settings,
            )
        return {"contrastive_loss": loss} if output_dict else loss

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """open_clip's: 1 on the diagonal, -1 elsewhere, [B, B] in memory. `forward` needs none."""
        signs_BB = -torch.ones((num_logits, num_logits), device=device, dtype=dtype)
        return signs_BB if negative_only else signs_BB.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """open_clip's: the logits of one rank, [B, B] in memory. `forward` needs none."""
        logits_BB = logit_scale * image_features @ text_features.T
        return logits_BB if logit_bias is None else logits_BB + logit_bias

    def _over_ranks(
        self, image: Side, text: Side, scale: Tensor | float, bias: Tensor | float
    ) -> Tensor:
        """This rank's part of the loss of all ranks' pairs, times the number of ranks."""
        strip = self.ranks.strip(image, text)
        settings = dict(self.settings)
        settings["operand_dtype"] = strip.operand(settings["operand_dtype"])
        kept = strip.kept
        total: Tensor | None = None
        for block in strip.blocks():
            loss = sigmoid_loss(
                *(kept.rows, block.rows, scale, bias),
                first_label=block.first_label,
                image_ids=kept.ids,
                text_ids=block.ids,
                **settings,
            )
            total = loss if total is None else total + loss
        assert total is not None
        # The operation divides by its number of rows, open_clip by that of the images.
        return total * (max(1, len(kept.rows)) * self.world_size / max(1, strip.num_images))

    def memory_bytes(self, image_features: Tensor, text_features: Tensor) -> int:
        """What `forward` and its backward hold at their peak beside these features and their gradients."""
        asked = self.settings["workspace_bytes"]
        return _workspace_bytes(image_features, text_features, self.world_size, asked)

    def plan(self, image_features: Tensor, text_features: Tensor) -> str:
        """How `forward` will compute the loss of these features, in one line."""
        B, E = image_features.shape
        G = self.world_size * len(text_features)
        dtype = choose_operand(image_features, text_features, self.settings["operand_dtype"])
        return (
            f"sigmoid loss of {B:,} x {G:,} x {E} on {image_features.device.type}: one pass, 3 products in "
            f"{str(dtype).removeprefix('torch.')}"
        )


def _workspace_bytes(image_BE: Tensor, text_BE: Tensor, world_size: int, asked: int | None) -> int:
    """Of a loss without a stash: a block of logits, sums of the size of rows, and over ranks the texts of all."""
    B, G, E = len(image_BE), world_size * len(text_BE), image_BE.shape[1]
    if asked is None:
        asked = WORKSPACE_BYTES[image_BE.device.type]
    gathered = 0 if world_size == 1 else 2 * 4 * G * E
    return min(asked, 4 * B * G) + 12 * 8 * (B + G) + gathered


def _in_order(parts: dict[int, Tensor]) -> Tensor:
    """Parts of all columns, by their first one, one behind the other."""
    return torch.cat([parts[first] for first in sorted(parts)])


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _check_same_id(same_id: str) -> None:
    if same_id not in SAME_ID:
        raise ValueError(f"same_id has to be one of {SAME_ID}, got {same_id!r}")


def _check_ids(image_ids: Tensor | None, text_ids: Tensor | None) -> None:
    if (image_ids is None) != (text_ids is None):
        raise ValueError("image_ids and text_ids: pass both or none")


def _as_factor(factor: Tensor | float, features: Tensor) -> Tensor | float:
    """A scale or bias as the operations take it; a number on the host is no reason to refuse, nor is an integer."""
    if not isinstance(factor, Tensor):
        return factor
    return factor.to(features.device) if factor.is_floating_point() else factor.to(features)


def _check_pairs(image_BE: Tensor, text_BE: Tensor) -> None:
    """ValueError unless rows can be pairs."""
    if not image_BE.ndim == text_BE.ndim == 2 or image_BE.shape[1] != text_BE.shape[1]:
        raise ValueError(
            "image_features and text_features must be pairs of one shape [B, E] (or [G, E] with extra rows of one), "
            f"got {tuple(image_BE.shape)} and {tuple(text_BE.shape)}"
        )
