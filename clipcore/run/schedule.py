"""Learning-rate schedules: functions of the step alone, so that a resumed run needs no scheduler state.

Source of the default: Radford et al. 2021, section 2.5 (linear warm-up, cosine decay); names as in open_clip.
"""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "const", "const-cooldown")


def learning_rate(
    step: int,
    *,
    schedule: str,
    lr_peak: float,
    num_steps: int,
    warmup_steps: int,
    cooldown_steps: int = 0,
    cooldown_end: float = 0.0,
    cooldown_power: float = 1.0,
) -> float:
    """Return the learning rate of ``step``, counted from 0.

    Args:
        schedule: ``cosine`` to zero, ``const``, or ``const-cooldown`` (polynomial to ``cooldown_end`` over the last
            ``cooldown_steps`` steps).
        lr_peak: after warm-up; warm-up is linear from ``lr_peak / warmup_steps``.

    >>> learning_rate(0, schedule="cosine", lr_peak=1.0, num_steps=10, warmup_steps=2)
    0.5
    """
    if step < warmup_steps:
        return lr_peak * (step + 1) / warmup_steps
    if schedule == "cosine":
        angle = math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps)
        return 0.5 * (1 + math.cos(angle)) * lr_peak
    cooldown_start = num_steps - cooldown_steps
    if schedule == "const" or step < cooldown_start:
        return lr_peak
    left = 1 - (step - cooldown_start) / cooldown_steps
    return cooldown_end + (lr_peak - cooldown_end) * left**cooldown_power
