"""Fine-tuning: what a run trains, with which rates, and from which weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipcore.data.embedded import EMBEDDED
from clipcore.ranks.distributed import World
from clipcore.run.command_line import parse_command_line
from clipcore.run.parts import lock_towers
from clipcore.run.recipe import resolve
from clipcore.run.setup import describe
from clipcore.towers.factory import create_model

ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ("", ("visual.", "transformer.", "token", "positional", "ln_final", "text_proj", "logit")),
        ("--lock-image", ("transformer.", "token", "positional", "ln_final", "text_proj", "logit")),
        ("--lock-image --lock-image-unlocked-groups 1 --lock-text", ("visual.proj", "logit")),
    ],
)
def test_a_run_says_how_many_parameters_it_trains(flags, trained):
    config = resolve(parse_command_line(["--model", "ViT-nano-8-32", *flags.split()])[0])
    model = create_model("ViT-nano-8-32")
    lock_towers(model, config)
    said = describe(config, model, EMBEDDED["glyphs"].open("train"), ALONE, 10, 0, Path("run"))
    sizes = {name: value.numel() for name, value in model.state_dict().items()}
    num_image = sum(size for name, size in sizes.items() if name.startswith("visual."))
    num_trained = sum(size for name, size in sizes.items() if name.startswith(trained))
    assert said.splitlines()[0] == (
        f"ViT-nano-8-32: {sum(sizes.values()):,} parameters, {num_image:,} of them in the image tower; "
        f"{num_trained:,} are trained"
    )
