"""What the sums over rows and columns of the logits become: logarithms, their checks, and the factors of gradients.

Legend and maths: ``clipcore.kernels.contrastive``. Everything here is of the size of the rows, never of the logits.
Numbers in powers of two have ``_log2`` in their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.contrastive.targets import Targets
from clipcore.kernels.logits.pairs import LOG2E, LossInputs

# exp(z - o) is at most 2^101 (e^70) for logits up to the scale; float64 has room for any scale of use.
HEADROOM = {torch.float32: 101.0, torch.float64: 900.0}


def exponents(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Return (scale_log2, offset_log2), float64 of one element: sums are of exp2(cosine * scale_log2 - offset_log2)."""
    headroom = HEADROOM[launch.accumulate_dtype(inputs.operand)]
    scale_log2 = inputs.scale.double().reshape(()) * LOG2E
    return scale_log2, (scale_log2.abs() - headroom).clamp(min=0).ceil()


class Sums(NamedTuple):
    """Sums over rows and columns while a walk fills them, float64.

    Without spread targets a positive is known by its place, and stays out of the sums of exponentials.
    """

    row_B: Tensor  # of exponentials
    column_G: Tensor
    row_target_log2_B: Tensor  # logits of targets; -inf of a row without a positive
    column_target_log2_G: Tensor


def new_sums(inputs: LossInputs, targets: Targets | None) -> Sums:
    """Return the sums before the first block."""
    device = inputs.image_BE.device
    no_target = -torch.inf if targets is None else 0.0
    lengths = len(inputs.image_BE), len(inputs.text_GE)
    rows, columns = (torch.zeros(n, dtype=torch.float64, device=device) for n in lengths)
    row_targets, column_targets = (
        torch.full((n,), no_target, dtype=torch.float64, device=device) for n in lengths
    )
    return Sums(rows, columns, row_targets, column_targets)


class RunningMax(NamedTuple):
    """What a running maximum finds for one side; of no meaning for trusted rows."""

    rest_lse_log2_N: Tensor  # without the positive where its place makes it known
    target_log2_N: Tensor  # the target logit, of the same numbers


class Logarithms(NamedTuple):
    """What the sums came to."""

    row_lse_log2_B: Tensor
    column_lse_log2_G: Tensor
    row_rest_B: Tensor  # 1 - probability of the row's positive, where its place makes it known
    column_rest_G: Tensor
    # What the powers of a row's gradient are taken off: the offset of all, or its own.
    row_offset_log2_B: Tensor
    column_offset_log2_G: Tensor

    def untrusted(self, offset_log2: Tensor) -> tuple[Tensor, Tensor]:
        """Return bool [B] and [G]: the rows and the columns that have an offset of their own."""
        return self.row_offset_log2_B != offset_log2, self.column_offset_log2_G != offset_log2

    def completed(
        self,
        inputs: LossInputs,
        by_place: bool,
        untrusted: Sequence[Tensor],
        running: Sequence[RunningMax],
    ) -> Logarithms:
        """Return the logarithms with what a running maximum found for untrusted rows; the others keep their bits."""
        _, offset_log2 = exponents(inputs)
        sides = []
        for lse, rest, chosen, found in zip(self[:2], self[2:4], untrusted, running, strict=True):
            own = found.rest_lse_log2_N
            if by_place:
                own = torch.logaddexp2(found.rest_lse_log2_N, found.target_log2_N)
            # A row without a valid pair has nothing: no rest, and no offset of its own.
            own_rest = torch.where(own == -torch.inf, 0.0, torch.exp2(found.rest_lse_log2_N - own))
            below = torch.where(own.isfinite(), own.floor(), offset_log2)
            sides.append(
                (
                    torch.where(chosen, own, lse),
                    torch.where(chosen, own_rest, rest),
                    torch.where(chosen, below, offset_log2),
                )
            )
        rows, columns = sides
        return Logarithms(rows[0], columns[0], rows[1], columns[1], rows[2], columns[2])


def trusted_range(sums: Sums, wide: torch.dtype) -> tuple[float, float]:
    """Return the least and the greatest sum that exponentials in a dtype make exact. A NaN is outside of neither.

    Terms below the smallest normal number are lost: harmless where all of them together are below the sum's last place.
    One over the sum has to be a normal number too.
    """
    info = torch.finfo(wide)
    return 2 * max(len(sums.row_B), len(sums.column_G)) * info.tiny / info.eps, 1 / info.tiny


def logarithms(
    inputs: LossInputs, by_place: bool, sums: Sums, wide: torch.dtype
) -> tuple[Logarithms, tuple[Tensor, Tensor]]:
    """Return the logarithms of the sums, and which rows and which columns are not to be trusted.

    With ids or spread targets the sums are whole, else positives are added here.

    Args:
        by_place: whether positives are known by their place.
        wide: what the exponentials were summed in.
    """
    least, most = trusted_range(sums, wide)
    _, offset_log2 = exponents(inputs)

    lse, rests, untrusted = [], [], []
    for rest, target_log2 in (
        (sums.row_B, sums.row_target_log2_B),
        (sums.column_G, sums.column_target_log2_G),
    ):
        total = rest + torch.exp2(target_log2 - offset_log2) if by_place else rest
        log2 = total.log2() + offset_log2
        # A row of one pair: the logarithm of a power need not give the exponent back to the last bit.
        lse.append(torch.where(rest == 0, target_log2, log2) if by_place else log2)
        rests.append(rest / total)
        untrusted.append((total < least) | (total > most))

    offsets = [offset_log2.repeat(len(total)) for total in lse]
    logs = Logarithms(lse[0], lse[1], rests[0], rests[1], offsets[0], offsets[1])
    return logs, (untrusted[0], untrusted[1])


class Outputs(NamedTuple):
    """What the forward returns: the terms of the loss in powers of two, and what the backward needs beside them."""

    row_lse_log2_B: Tensor  # the first six are Logarithms
    column_lse_log2_G: Tensor
    row_rest_B: Tensor
    column_rest_G: Tensor
    row_offset_log2_B: Tensor
    column_offset_log2_G: Tensor
    row_target_log2_B: Tensor
    column_target_log2_G: Tensor
    stash_BG: Tensor  # empty without a stash; the dense matrix in float32 where that is kept
    ranges: Tensor  # of the stash's tiles on a GPU

    @property
    def logarithms(self) -> Logarithms:
        """Those of the sums."""
        return Logarithms._make(self[:6])

    @property
    def has_stash(self) -> bool:
        """Whether the logits were kept."""
        return self.stash_BG.numel() > 0


class Upstream(NamedTuple):
    """Upstream gradients of the terms, as the gradient pass adds them up: per row and column of the logits."""

    row_lse_B: Tensor
    column_lse_G: Tensor
    row_positive_B: Tensor
    row_uniform_B: Tensor
    column_positive_G: Tensor
    column_uniform_G: Tensor

    @classmethod
    def from_terms(
        cls, upstream: Sequence[Tensor], targets: Targets | None, logs: Logarithms
    ) -> Upstream:
        """Make them of the gradients of (row_lse, column_lse, row_target, column_target).

        Without targets a positive's gradient is whole here: P - 1 = -rest has no cancellation to suffer.
        """
        row_lse, column_lse, row_target, column_target = upstream
        if targets is None:
            at_row = (row_lse + row_target) - row_lse * logs.row_rest_B
            at_column = (column_lse + column_target) - column_lse * logs.column_rest_G
            return cls(row_lse, column_lse, at_row, at_row, at_column, at_column)
        return cls(
            row_lse,
            column_lse,
            row_target * targets.row_positive_B,
            row_target * targets.row_uniform_B,
            column_target * targets.column_positive_G,
            column_target * targets.column_uniform_G,
        )

    def over_largest(self) -> tuple[Upstream, Tensor]:
        """Return the gradients over their largest element, and that element, so that a block's are of order one."""
        largest = torch.cat(self).abs().amax()
        divisor = torch.where(largest > 0, largest, 1.0)
        return Upstream._make(part / divisor for part in self), largest

    def factors(self, logs: Logarithms) -> tuple[Tensor, Tensor]:
        """Return what exp2(power - offset) is multiplied with, per row and per column, for the gradient of the lse."""
        return (
            _factor(self.row_lse_B, logs.row_lse_log2_B, logs.row_offset_log2_B),
            _factor(self.column_lse_G, logs.column_lse_log2_G, logs.column_offset_log2_G),
        )

    def to(self, dtype: torch.dtype) -> Upstream:
        """Return every part in another dtype."""
        return Upstream._make(part.to(dtype) for part in self)

    def block(self, rows: slice, columns: slice) -> Upstream:
        """Return the part of a block."""
        return Upstream(
            self.row_lse_B[rows],
            self.column_lse_G[columns],
            self.row_positive_B[rows],
            self.row_uniform_B[rows],
            self.column_positive_G[columns],
            self.column_uniform_G[columns],
        )


def _factor(upstream: Tensor, lse_log2: Tensor, offset_log2: Tensor) -> Tensor:
    """Return the factors of one side. A row without a valid pair has no gradient."""
    return torch.where(lse_log2 == -torch.inf, 0.0, upstream * torch.exp2(offset_log2 - lse_log2))


def counted_rows(
    num_rows: int, num_columns: int, weights: Sequence[Tensor], first_label: int
) -> tuple[slice, slice]:
    """Return the rows and the columns among which those lie that have a positive.

    Args:
        weights: of the positives of rows and of columns, where they tell which have one; else empty, and place tells.
    """
    if weights:
        return slice(0, num_rows), slice(0, num_columns)
    start = max(0, -first_label)
    stop = max(start, min(num_rows, num_columns - first_label))
    return slice(start, stop), slice(start + first_label, stop + first_label)


def mean_loss(
    terms: Sequence[Tensor], weights: Sequence[Tensor], first_label: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the loss of (row_lse, column_lse, row_target, column_target), the mean over both sides' rows that count.

    Args:
        terms: in powers of two.
        weights: see ``counted_rows``; a row counts where its own is above 0.
        dtype: of the loss.

    Returns:
        The loss, and how many rows and how many columns count, float64 [2]. NaN where none does.
    """
    row_lse_B, column_lse_G, row_target_B, column_target_G = (term / LOG2E for term in terms)
    losses = row_lse_B - row_target_B, column_lse_G - column_target_G
    counted = counted_rows(len(row_lse_B), len(column_lse_G), weights, first_label)
    if weights:
        counts = torch.stack([(weight_N > 0).sum() for weight_N in weights]).double()
        row_loss, column_loss = (
            torch.where(weight_N > 0, loss_N, 0.0).sum() / count
            for loss_N, weight_N, count in zip(losses, weights, counts, strict=True)
        )
    else:
        counts = row_lse_B.new_tensor([rows.stop - rows.start for rows in counted])
        row_loss, column_loss = (
            loss_N[rows].mean() for loss_N, rows in zip(losses, counted, strict=True)
        )
    return ((row_loss + column_loss) / 2).to(dtype), counts


def mean_gradients(
    upstream: Tensor,
    counts: Tensor,
    weights: Sequence[Tensor],
    shape: tuple[int, int],
    first_label: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the four terms of ``mean_loss``, for an upstream gradient of the loss.

    Args:
        shape: how many rows and how many columns there are.
    """
    counted = counted_rows(shape[0], shape[1], weights, first_label)
    shares = upstream.double() / 2 / counts
    sides = []
    for i, num_rows in enumerate(shape):
        grad_N = counts.new_zeros(num_rows)
        grad_N[counted[i]] = shares[i]
        if weights:
            grad_N = torch.where(weights[i] > 0, grad_N, 0.0)
        sides.append((grad_N / LOG2E, -grad_N / LOG2E))
    (row_lse_B, row_target_B), (column_lse_G, column_target_G) = sides
    return row_lse_B, column_lse_G, row_target_B, column_target_G
