"""CLIP's loss beside that of a teacher's probabilities, over one rank or many: open_clip's DistillClipLoss.

Legend: B rows on this rank, G on all ranks, N pairs of all ranks, E embedding size of the student, F of the teacher.

    contrastive = 1/2 [mean_b (r_b - z_bb) + mean_g (c_g - z_gg)]
    distillation = 1/2 [mean_b (r_b - sum_g q_bg z_bg) + mean_g (c_g - sum_b u_bg z_bg)]

with the student's logits z and their log-sum-exps r over a row and c over a column, which both share, and the teacher's
probabilities q of a row's texts and u of a column's images. The second is the cross-entropy between the teacher's and the
student's probabilities. No [G, G] matrix is held: ``clipcore.kernels.contrastive`` and ``soft_targets.py`` walk in blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.contrastive import ContrastiveTerms, contrastive_terms
from clipcore.kernels.logits.pairs import WORKSPACE_BYTES
from clipcore.loss.clip import ClipLoss
from clipcore.loss.options import as_factor, check_pairs
from clipcore.loss.shard import CompleteLse, Side
from clipcore.loss.soft_targets import Teacher, rows_of_a_block, soft_target
from clipcore.ranks.distributed import gather_rows


def distill_ref(
    image_BE: Tensor,
    text_BE: Tensor,
    scale: Tensor | float,
    teacher_image_BF: Tensor,
    teacher_text_BF: Tensor,
    teacher_scale: Tensor | float,
) -> Tensor:
    """Return the distillation loss by whole matrices, differentiable."""
    logits_BB = scale * image_BE @ text_BE.T
    taught_BB = teacher_scale * teacher_image_BF @ teacher_text_BF.T
    row_loss, column_loss = (
        -(taught.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        for taught, logits in ((taught_BB, logits_BB), (taught_BB.T, logits_BB.T))
    )
    return (row_loss + column_loss) / 2


class _Given(NamedTuple):
    """A teacher's features of this rank's images, of the texts that they are compared with, and its scale."""

    image_BF: Tensor
    text_GF: Tensor
    scale: Tensor


class DistillClipLoss(ClipLoss):
    """InfoNCE, and the cross-entropy to a teacher's softmax over the same batch (open_clip's names and call).

    Arguments are those of ``ClipLoss``, without ``label_smoothing`` and ``same_id``: the teacher's probabilities take their
    place.

    Source: Hinton et al. 2015; open_clip's ``DistillClipLoss``.

    >>> loss_fn = DistillClipLoss()
    >>> contrastive, distill = loss_fn(*features, scale, *teacher_features, teacher_scale)  # doctest: +SKIP
    """

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> Any:
        """Return both losses of this rank's pairs, each a mean; their sum is what is trained.

        Averaged over ranks they are exactly those of all pairs, and so are the gradients; see ``clipcore.loss``.

        Args:
            image_features, text_features: the student's, [B, E], L2-normalised, pair i in row i of both.
            logit_scale: the factor of the cosine, a scalar.
            dist_image_features, dist_text_features: the teacher's of the same pairs, [B, F], L2-normalised; they get no
                gradient, and neither does its scale.
            dist_logit_scale: the teacher's factor.
            output_dict: return ``{"contrastive_loss": ..., "distill_loss": ...}`` instead of a tuple.

        Raises:
            ValueError: the shapes are not those of equally many pairs, or an option has no meaning here.
        """
        self._check_options()
        check_pairs(image_features, text_features, None, None)
        check_pairs(dist_image_features, dist_text_features, None, None)
        counts = {
            len(rows)
            for rows in (image_features, text_features, dist_image_features, dist_text_features)
        }
        if len(counts) > 1:
            raise ValueError(
                "the teacher's features are of the student's pairs, so that all four have as many rows; got "
                f"{len(image_features)}, {len(text_features)}, {len(dist_image_features)} and {len(dist_text_features)}"
            )
        scale = launch.as_scalar(
            "logit_scale", as_factor(logit_scale, image_features), image_features, text_features
        )
        teacher_scale = launch.as_scalar(
            "dist_logit_scale",
            as_factor(dist_logit_scale, dist_image_features),
            dist_image_features,
            dist_text_features,
        )
        given = _Given(
            dist_image_features.detach(), dist_text_features.detach(), teacher_scale.detach()
        )
        compute = self._of_one_rank if self.world_size == 1 else self._of_ranks
        wide = launch.accumulate_dtype(
            torch.promote_types(image_features.dtype, text_features.dtype)
        )
        contrastive, distill = (
            loss.to(wide) for loss in compute(image_features, text_features, scale, given)
        )
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill

    def _check_options(self) -> None:
        """Raise ValueError for an option that has no meaning beside a teacher."""
        if self.label_smoothing > 0:
            raise ValueError(
                "a teacher's probabilities take the place of label smoothing: leave label_smoothing out"
            )
        if type(self).get_logits is not ClipLoss.get_logits:
            raise ValueError(
                "DistillClipLoss holds no logits, so a custom get_logits has no effect: leave it out"
            )

    def _of_one_rank(
        self, image: Tensor, text: Tensor, scale: Tensor, given: _Given
    ) -> tuple[Tensor, Tensor]:
        """Return both losses of all pairs."""
        terms = contrastive_terms(
            image,
            text,
            scale,
            normalize=False,
            stash_bytes=self.options.stash_bytes,
            workspace_bytes=self.options.workspace_bytes,
            operand_dtype=self.options.operand_dtype,
        )
        row_lse_B, column_lse_B = self._sums_of_teacher(given)
        teacher = Teacher(given.image_BF, given.text_GF, given.scale, row_lse_B, column_lse_B)
        target = soft_target(image, text, scale, teacher, self._workspace_bytes(image))
        return _losses(terms, target, 1 / (2 * len(image)))

    def _of_ranks(
        self, image: Tensor, text: Tensor, scale: Tensor, given: _Given
    ) -> tuple[Tensor, Tensor]:
        """Return this rank's parts of the losses of all ranks' pairs, times the number of ranks."""
        group = self.loss_group.group
        shard = self.loss_group.shard(Side(image, None), Side(text, None))
        terms = self._terms_of_rows(shard, None, scale)

        given = given._replace(text_GF=gather_rows(given.text_GF, group))
        row_lse_B, column_lse_G = self._sums_of_teacher(given)
        # Without a gradient: nothing in it has one.
        column_lse_G = CompleteLse.apply(column_lse_G, group)
        teacher = Teacher(given.image_BF, given.text_GF, given.scale, row_lse_B, column_lse_G)
        workspace_bytes = self._workspace_bytes(image)
        parts = [
            soft_target(image, block.rows, scale, teacher.of_texts(block.columns), workspace_bytes)
            for block in shard.blocks()
        ]
        target = torch.stack(parts).sum()
        return _losses(terms, target, self.world_size / (2 * shard.num_pairs))

    @torch.no_grad()
    def _sums_of_teacher(self, given: _Given) -> tuple[Tensor, Tensor]:
        """Return the log-sum-exps of the rows and of the columns of the teacher's logits, of products in float32."""
        terms = contrastive_terms(
            given.image_BF,
            given.text_GF,
            given.scale,
            normalize=False,
            workspace_bytes=self.options.workspace_bytes,
            operand_dtype=torch.float32 if given.image_BF.is_cuda else None,
        )
        return terms.row_lse_B, terms.column_lse_G

    def _workspace_bytes(self, features: Tensor) -> int:
        given = self.options.workspace_bytes
        return WORKSPACE_BYTES[features.device.type] if given is None else given

    def memory_bytes(self, image_features: Tensor, text_features: Tensor) -> int:
        """Return the peak bytes of `forward` and its backward, without these features, the teacher's and gradients.

        A teacher's features are taken to be as wide as these.
        """
        B, G, E = len(image_features), self.world_size * len(text_features), image_features.shape[1]
        wide = launch.accumulate_dtype(image_features.dtype)
        block_rows = min(B, rows_of_a_block(G, wide, self._workspace_bytes(image_features)))
        # The gradients that the forward pass makes, the sums of the teacher's logits, its texts of all ranks, two blocks.
        made = wide.itemsize * (B + G) * E + 8 * (B + G)
        gathered = 0 if self.world_size == 1 else wide.itemsize * G * E
        blocks = 2 * wide.itemsize * block_rows * G
        return super().memory_bytes(image_features, text_features) + made + gathered + blocks


def _losses(terms: ContrastiveTerms, target: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return both losses from the sums of this rank's rows and columns, times a factor."""
    # Differences of a row first: those of pairs that are found with near certainty are small.
    row_losses_B = terms.row_lse_B - terms.row_target_B
    column_losses_B = terms.column_lse_G - terms.column_target_G
    contrastive = row_losses_B.sum() + column_losses_B.sum()
    distill = terms.row_lse_B.sum() + terms.column_lse_G.sum() - target
    return contrastive * factor, distill * factor
