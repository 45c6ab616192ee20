"""How the targets of the contrastive loss spread over positives and valid pairs: T and U of the maths.

Legend and maths: ``clipcore.kernels.contrastive``. N rows of one side, M of the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipcore.kernels.logits.pairs import Pairs


class Targets(NamedTuple):
    """The weight of a positive and of any valid pair, by row and by column."""

    row_positive_B: Tensor
    row_uniform_B: Tensor
    column_positive_G: Tensor
    column_uniform_G: Tensor

    def contiguous(self) -> Targets:
        """Return the weights as the kernels read them, one after the other."""
        return Targets._make(weight.contiguous() for weight in self)

    def columns(self, columns: slice) -> Targets:
        """Return the targets of some columns."""
        return self._replace(
            column_positive_G=self.column_positive_G[columns],
            column_uniform_G=self.column_uniform_G[columns],
        )

    def relative_uniform(self) -> tuple[Tensor, Tensor]:
        """Return the uniform weights of rows and of columns over their positives', float32; 0 without a positive."""
        sides = self[:2], self[2:]
        rows, columns = (
            torch.where(positive > 0, uniform / positive, 0.0).float()
            for positive, uniform in sides
        )
        return rows, columns


class TargetSide(NamedTuple):
    """One side's rows, and what their targets depend on.

    Attributes:
        ids_N: theirs; None without ids.
        other_ids_M: of all rows of the other side, on all ranks.
        is_own_equal_N: int64, 1 where a row's partner by position exists and has its id.
        num_rows: N.
        num_others: M, on all ranks.
    """

    ids_N: Tensor | None
    other_ids_M: Tensor | None
    is_own_equal_N: Tensor | None
    num_rows: int
    num_others: int


def uniform_targets(image_BE: Tensor, text_GE: Tensor, pairs: Pairs, smoothing: float) -> Targets:
    """Return the targets of one rank's rows; see ``even_targets``."""
    B, G = len(image_BE), len(text_GE)
    exchanged = pairs.exchanged()
    sides = [
        TargetSide(
            side.image_ids,
            side.text_ids,
            # By id position means nothing.
            _equal_to_partner(side.image_ids, side.text_ids, side.first_label)
            if pairs.same_id == "ignore"
            else None,
            num_rows,
            num_others,
        )
        for side, num_rows, num_others in ((pairs, B, G), (exchanged, G, B))
    ]
    return even_targets(sides[0], sides[1], pairs.same_id, smoothing, image_BE.device)


def even_targets(
    rows: TargetSide, columns: TargetSide, same_id: str, smoothing: float, device: torch.device
) -> Targets:
    """Return targets that are spread evenly over positives, and by a share ``smoothing`` over all valid pairs.

    float64: a third in float32 would shift a target of 100 by 3e-6, for all rows alike.
    """
    weights = [_even_weights(side, same_id, smoothing, device) for side in (rows, columns)]
    return Targets(weights[0][0], weights[0][1], weights[1][0], weights[1][1])


def _even_weights(
    side: TargetSide, same_id: str, smoothing: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the weights of a positive and of any valid pair of each row, 0 where there are none."""
    has_ids = side.ids_N is not None and side.other_ids_M is not None
    if not has_ids or same_id == "positive":
        # The same of all rows, divided as tensors are: by a product with the reciprocal.
        uniform = smoothing * (1 / side.num_others) if side.num_others > 0 else 0.0
        uniform_N = torch.full((side.num_rows,), uniform, dtype=torch.float64, device=device)
    if not has_ids:
        return torch.full_like(uniform_N, 1 - smoothing), uniform_N

    assert side.ids_N is not None and side.other_ids_M is not None
    same_N = count_equal(side.ids_N, side.other_ids_M)
    if same_id == "positive":
        return _share(1 - smoothing, same_N), uniform_N

    # A pair by position is valid, also if its ids are equal.
    assert side.is_own_equal_N is not None
    uniform_N = _share(smoothing, side.num_others - (same_N - side.is_own_equal_N))
    return torch.full_like(uniform_N, 1 - smoothing), uniform_N


def _share(total: float, counts_N: Tensor) -> Tensor:
    """Return a total over each count, float64; 0 over nothing."""
    return (total / counts_N.double()).masked_fill_(counts_N == 0, 0.0)


def count_equal(ids_N: Tensor, others_M: Tensor) -> Tensor:
    """Return how many of the others equal each id, int64 [N], in O((N + M) log M)."""
    ordered_M = others_M.sort().values
    ids_N = ids_N.contiguous()
    last = torch.searchsorted(ordered_M, ids_N, right=True)
    return last - torch.searchsorted(ordered_M, ids_N)


def _equal_to_partner(
    ids_N: Tensor | None, others_M: Tensor | None, first_label: int
) -> Tensor | None:
    """Return 1 where the partner by position exists and has the same id, int64 [N]; None without ids."""
    if ids_N is None or others_M is None:
        return None
    N, M = len(ids_N), len(others_M)
    equal_N = torch.zeros_like(ids_N)
    start, stop = max(0, -first_label), min(N, M - first_label)
    if start < stop:
        partners = others_M[start + first_label : stop + first_label]
        equal_N[start:stop] = (ids_N[start:stop] == partners).to(ids_N.dtype)
    return equal_N


def check_label_smoothing(label_smoothing: float) -> None:
    """Raise ValueError unless it is a share of a target that leaves some."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing has to be in [0, 1), got {label_smoothing}")
