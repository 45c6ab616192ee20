"""Notice a run that has collapsed: all images get one feature and all captions one, and the loss is that of guessing.

Legend: B pairs of a global batch.

The softmax loss of equal features is ln(B). The sigmoid loss of equal logits is least where each pair has probability 1/B:
ln(B) + (B - 1) ln(B / (B - 1)). Features that are all the same give almost no gradient, so that a run seldom leaves this
place by itself. A run that has not begun to learn stands there too, but its gradient is as long as ever; and in the warm-up
nothing is said.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# How near to guessing the loss is, in nats; how short the gradient, over what is usual in the run; and for how many steps.
LOSS_MARGIN, GRADIENT_SHARE, NUM_STEPS = 0.01, 0.1, 20
# So many steps are enough at the end of a run.
NUM_LAST_STEPS = 5
# The usual length of the gradient is one that so many steps have reached: a few spikes do not count.
NUM_LONGEST = 10


def loss_of_guessing(num_pairs: int, is_sigmoid: bool) -> float:
    """Return the loss where all images have one feature, and all captions one, in nats."""
    loss = math.log(num_pairs)
    if is_sigmoid and num_pairs > 1:
        loss += (num_pairs - 1) * math.log(num_pairs / (num_pairs - 1))
    return loss


@dataclass
class Collapse:
    """Steps at which the loss stood at that of guessing, having lost its gradient.

    Attributes:
        first, last: of these steps, both included.
        num_seen: how many of them were seen; a log may hold fewer.
        grad_norm: at the last.
        usual: length of the gradient before the loss came to that of guessing.
    """

    first: int
    last: int
    num_seen: int
    grad_norm: float
    usual: float


class CollapseWatch:
    """Watches the steps of a run, those before a resume included.

    Args:
        num_pairs: B.
        is_sigmoid: whether the loss is SigLIP's.
        warmup: steps whose loss says nothing yet.
        is_clipped: whether the gradient's length is limited already.
        is_distilled: whether the cross-entropy to a teacher is added, which guessing has at ln(B) too.

    Attributes:
        collapses: every collapse so far, the newest last; one that is going on has the last step as its end.
    """

    def __init__(
        self,
        num_pairs: int,
        is_sigmoid: bool,
        warmup: int,
        is_clipped: bool = False,
        is_distilled: bool = False,
    ) -> None:
        self.collapses: list[Collapse] = []
        self._num_pairs, self._is_sigmoid, self._warmup = num_pairs, is_sigmoid, warmup
        self._is_clipped = is_clipped
        self._is_distilled = is_distilled
        self._loss = loss_of_guessing(num_pairs, is_sigmoid) * (2 if is_distilled else 1)
        self._longest = _Longest()
        # Of the steps since the loss came to that of guessing: they are not what is usual, unless it leaves again.
        self._standing = _Longest()
        self._current: Collapse | None = None

    def see(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Take in a step; return a line at the step at which a collapse is noticed, or is over.

        A step whose gradient overflowed is passed over, as is every step of a single pair, whose loss is always 0.
        """
        if not math.isfinite(grad_norm) or self._num_pairs < 2:
            return None
        if step <= self._warmup or not abs(loss - self._loss) <= LOSS_MARGIN:
            return self._leave(step, grad_norm)

        self._standing.add(grad_norm)
        # Once noticed it ends with the loss alone: a gradient that comes and goes changes nothing yet.
        if not self.is_collapsed and not grad_norm < GRADIENT_SHARE * self._longest.usual:
            self._current = None
            return None
        current = self._current
        if current is None:
            current = self._current = Collapse(step, step, 0, grad_norm, self._longest.usual)
        current.last, current.grad_norm = step, grad_norm
        current.num_seen += 1
        return self._notice(NUM_STEPS)

    def end(self) -> str | None:
        """Return what is to be said at the end of a run that stands in a collapse, noticed or just begun."""
        self._notice(NUM_LAST_STEPS)
        return self._describe_current()

    def see_all(self, rows: Iterable[Mapping[str, Any]]) -> str | None:
        """Take in the steps that a log holds; return a line if the last stands in a collapse.

        What is no number, such as a norm that overflowed, is passed over.
        """
        for row in rows:
            step, loss, grad_norm = (row.get(key) for key in ("step", "loss", "grad_norm"))
            if isinstance(step, int) and isinstance(loss, float) and isinstance(grad_norm, float):
                self.see(step, loss, grad_norm)
        return self._describe_current()

    def describe(self, collapse: Collapse) -> str:
        """Return what has happened, and the remedy."""
        if collapse is not self._current:
            what = f"had collapsed: its loss stood at {self._level} from step {collapse.first} to {collapse.last}"
            remedy = ""
        else:
            what = f"has collapsed: its loss has been {self._level} since step {collapse.first}"
            clip = "" if self._is_clipped else ", --grad-clip-norm 1"
            remedy = f". It is unlikely to recover: start again with a lower --lr{clip} or a longer --warmup"
        return (
            f"the run {what}, with a gradient of {collapse.grad_norm:.2g} where {collapse.usual:.2g} was usual, as if all "
            f"images had one feature and all captions one{remedy}"
        )

    @property
    def is_collapsed(self) -> bool:
        """Return whether a collapse that was noticed is going on."""
        return bool(self.collapses) and self.collapses[-1] is self._current

    def _describe_current(self) -> str | None:
        return self.describe(self.collapses[-1]) if self.is_collapsed else None

    def _notice(self, num_steps: int) -> str | None:
        """Note the current collapse once it has so many steps."""
        current = self._current
        if current is None or self.is_collapsed or current.num_seen < num_steps:
            return None
        self.collapses.append(current)
        return f"step {current.last}: {self.describe(current)}"

    def _leave(self, step: int, grad_norm: float) -> str | None:
        """Take in a step whose loss is another."""
        was, self._current = (self._current if self.is_collapsed else None), None
        if was is None:
            for standing in self._standing.heap:
                self._longest.add(standing)
        self._standing = _Longest()
        self._longest.add(grad_norm)
        if was is None:
            return None
        return (
            f"step {step}: the loss has left {self._level}, where it stood since step {was.first}"
        )

    @property
    def _level(self) -> str:
        is_sum = self._is_sigmoid or self._is_distilled
        what = "that of guessing" if is_sum else f"ln({self._num_pairs})"
        return f"{what}, {self._loss:.3f}"


class _Longest:
    """The lengths of the longest gradients seen."""

    def __init__(self) -> None:
        self.heap: list[float] = []

    def add(self, grad_norm: float) -> None:
        heapq.heappush(self.heap, grad_norm)
        if len(self.heap) > NUM_LONGEST:
            heapq.heappop(self.heap)

    @property
    def usual(self) -> float:
        """Return the length that ``NUM_LONGEST`` of them have reached; the median if there are fewer."""
        if len(self.heap) == NUM_LONGEST:
            return self.heap[0]
        return sorted(self.heap)[len(self.heap) // 2] if self.heap else 0.0
