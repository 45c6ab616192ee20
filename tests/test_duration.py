"""How long a run takes on a CPU: what it computes is counted exactly, and hours are said before they are spent."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clipcore.ranks.distributed import World
from clipcore.run import duration
from clipcore.run.command_line import parse_command_line
from clipcore.run.duration import flops_per_pair, hours_note
from clipcore.run.recipe import RunConfig, resolve
from clipcore.towers.factory import create_model

pytestmark = pytest.mark.fast

CPU = World(0, 1, 0, torch.device("cpu"))
VOCAB_SIZE = 500


def settings(*words: str) -> RunConfig:
    return resolve(parse_command_line(["--train-data", "a.csv", *words])[0])


def test_the_flops_of_a_pair_are_those_of_a_real_model_and_draw_no_random_numbers():
    config, before = settings("--model", "ViT-nano-8-32"), torch.random.get_rng_state()
    counted = flops_per_pair(config, VOCAB_SIZE)
    assert torch.equal(torch.random.get_rng_state(), before)
    model = create_model("ViT-nano-8-32", force_vocab_size=VOCAB_SIZE).train()
    # The largest id, where a caption ends, is the last one.
    tokens = torch.arange(1, min(16, model.context_length) + 1).repeat(2, 1)
    with FlopCounterMode(display=False) as counter:
        image_BE, text_BE, _ = model(torch.zeros(2, 3, 32, 32), tokens)
        (image_BE.sum() + text_BE.sum()).backward()
    assert counted == counter.get_total_flops() // 2 > 0
    # What is not trained has no gradient, and patches that are dropped are not computed.
    for words in (["--lock-image"], ["--force-patch-dropout", "0.5"], ["--force-image-size", "16"]):
        less = flops_per_pair(settings("--model", "ViT-nano-8-32", *words), VOCAB_SIZE)
        assert 0 < less < counted


def test_a_siglip_reads_the_padding_of_captions_too(tmp_path):
    """It has a logit bias beside the scale, and its tokens see all of the row."""
    described = create_model("ViT-nano-8-32").config.to_dict() | {"init_logit_bias": -10}
    counted = []
    for sees_all in (False, True):
        described["text_cfg"] |= {"context_length": 32, "no_causal_mask": sees_all}
        (tmp_path / "m.json").write_text(json.dumps(described))
        config = settings("--model", str(tmp_path / "m.json"))
        counted.append(flops_per_pair(config, VOCAB_SIZE))
    assert 1 < counted[1] / counted[0] < 2


def test_a_run_of_hours_on_a_cpu_is_said_with_the_small_preset(monkeypatch):
    config = settings("--model", "ViT-nano-8-32", "--global-batch-size", "1000")
    model = create_model("ViT-nano-8-32", device="meta", force_vocab_size=VOCAB_SIZE)
    num_steps = 10**9
    total = flops_per_pair(config, VOCAB_SIZE) * 1000 * num_steps
    monkeypatch.setattr(duration, "flops_per_second", lambda: total / 36_001)
    assert hours_note(config, model, num_steps, CPU) == (
        f"ViT-nano-8-32 computes {total:.1e} FLOP in 1,000,000,000 steps: at least 10 hours at the "
        f"{total / 36_001e9:,.0f} GFLOP/s of this CPU; it takes less on a GPU, or with --preset small, which is a small "
        "model"
    )
    # Five ranks share the work, of which one speaks; a run of less than two hours is not mentioned.
    five = dataclasses.replace(CPU, world_size=5)
    assert "at least 2 hours" in (hours_note(config, model, num_steps, five) or "")
    assert hours_note(config, model, num_steps - 10**6, five) is None
    assert hours_note(config, model, num_steps, dataclasses.replace(five, rank=1)) is None
    assert hours_note(config, model, num_steps, World(0, 1, 0, torch.device("cuda"))) is None
    small = dataclasses.replace(config, preset="small")
    assert (hours_note(small, model, num_steps, CPU) or "").endswith("or with fewer --epochs")


def test_a_short_run_is_neither_counted_nor_measured(monkeypatch):
    config = settings("--model", "ViT-nano-8-32", "--global-batch-size", "8")
    model = create_model("ViT-nano-8-32", force_vocab_size=VOCAB_SIZE)
    for name in ("flops_per_pair", "flops_per_second"):
        monkeypatch.delattr(duration, name)
    assert hours_note(config, model, 100, CPU) is None
