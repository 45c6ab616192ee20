"""Estimates how long a run takes on a CPU, from the FLOPs of a pair and the speed of a matrix product."""

from __future__ import annotations

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from clipcore.ranks.distributed import World
from clipcore.run import flops
from clipcore.run.parts import lock_towers
from clipcore.run.recipe import RunConfig, recipe_name
from clipcore.towers.factory import create_model
from clipcore.towers.model import CLIP

assert flops  # its formulas are registered on import

# A run of fewer hours is not mentioned.
NOTED_HOURS = 2.0
# Of a caption: about as many as those of the web have. A step leaves the padding after them out.
_CAPTION_TOKENS = 16
# Pixels and tokens that use a weight, at most, and the FLOPs a second of the slowest CPU.
_MOST_POSITIONS = 4096
_LEAST_RATE = 1e10
_PRODUCT_SIDE = 768
_MEASURED_S = 0.05


def flops_per_pair(config: RunConfig, vocab_size: int) -> int:
    """Return the FLOPs of one pair's features and gradients, counted on a model without values.

    The loss is not among them: at 32,768 pairs it is less than a hundredth of ViT-B-32.
    """
    model = create_model(
        config.model,
        device="meta",
        force_image_size=config.force_image_size,
        force_patch_dropout=config.force_patch_dropout,
        force_vocab_size=vocab_size,
    ).train()
    lock_towers(model, config)
    side = model.visual.image_size
    num_tokens = model.context_length
    if model.ignores_padding:
        num_tokens = min(_CAPTION_TOKENS, num_tokens)
    # Of a batch, since BatchNorm takes no single image.
    images = torch.zeros(2, 3, *(side if isinstance(side, tuple) else (side, side)), device="meta")
    tokens = torch.ones(2, num_tokens, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        image_BE, text_BE = model(images, tokens)[:2]
        total = image_BE.sum() + text_BE.sum()
        if total.requires_grad:
            total.backward()
    return counter.get_total_flops() // 2


def flops_per_second() -> float:
    """Return the FLOPs that this process computes in a second, by the best of some matrix products in float32."""
    matrix = torch.ones(_PRODUCT_SIDE, _PRODUCT_SIDE)
    best, begun = float("inf"), time.monotonic()
    while time.monotonic() - begun < _MEASURED_S or best == float("inf"):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2 * _PRODUCT_SIDE**3 / best


def hours_note(config: RunConfig, model: CLIP, num_steps: int, world: World) -> str | None:
    """Return in a line how long a run on a CPU takes at least, and what takes less; None if it is short, or on a GPU.

    Args:
        model: the run's model.
        num_steps: the steps that are still to be made.
    """
    num_pairs = config.global_batch_size * num_steps
    num_weights = sum(weight.numel() for weight in model.parameters())
    # Most runs are so short that nothing has to be counted or measured.
    is_short = 6 * num_weights * _MOST_POSITIONS * num_pairs < NOTED_HOURS * 3600 * _LEAST_RATE
    if world.device.type != "cpu" or not world.is_main or is_short:
        return None
    total = flops_per_pair(config, model.config.text.vocab_size) * num_pairs
    rate = flops_per_second() * world.world_size
    hours = total / rate / 3600
    if hours < NOTED_HOURS:
        return None
    is_small = recipe_name(config) == "small"
    less = "fewer --epochs" if is_small else "--preset small, which is a small model"
    return (
        f"{config.model} computes {total:.1e} FLOP in {num_steps:,} steps: at least {hours:,.0f} hours at the "
        f"{rate / 1e9:,.0f} GFLOP/s of this CPU; it takes less on a GPU, or with {less}"
    )
