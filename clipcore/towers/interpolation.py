"""The model between two models of one architecture, such as those before and after fine-tuning.

Source: Wortsman et al. 2021 (WiSE-FT, arXiv 2109.01903): weights between the two are often more accurate than both, on the
data of the fine-tuning and on others.
"""

from __future__ import annotations

import copy
import dataclasses

import torch

from clipcore.towers.architectures import ModelConfig
from clipcore.towers.model import CLIP


def interpolated(start: CLIP, end: CLIP, alpha: float) -> CLIP:
    """Return a copy of ``end`` with the weights (1 - alpha) start + alpha end, in float32.

    At 0 and 1 the weights are bit for bit those of ``start`` and ``end``. Counts, which are whole numbers, are the end's.

    Args:
        start, end: on one device; the scale is averaged as a logarithm, as it is stored.
        alpha: from 0 to 1.

    Raises:
        ValueError: alpha is out of its range, or the models are of different architectures.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is from 0, the start, to 1, the end; got {alpha:g}")
    if _architecture(start.config) != _architecture(end.config):
        raise ValueError(
            f"weights are interpolated between two states of one model, and these are of {start.config.describe()} and of "
            f"{end.config.describe()}; take the model that the second was fine-tuned from"
        )
    result = copy.deepcopy(end).float()
    first, last = start.state_dict(), end.state_dict()
    with torch.no_grad():
        for name, value in result.state_dict().items():
            if alpha == 0:
                value.copy_(first[name])
            elif alpha < 1 and value.is_floating_point():
                value.copy_((1 - alpha) * first[name].float() + alpha * last[name].float())
    return result


def _architecture(config: ModelConfig) -> ModelConfig:
    """Return an architecture without what weights replace, and without what only training uses."""
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, patch_dropout=0.0),
        init_logit_scale=0.0,
        init_logit_bias=None if config.init_logit_bias is None else 0.0,
    )
