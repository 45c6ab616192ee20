"""Learning-rate schedules, the optimizer's groups and state, and the moving average."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clipcore.run.optim import (
    ExponentialMovingAverage,
    adam_defaults,
    build_optimizer,
    gradient_norm,
    is_decayed,
    load_optimizer_tensors,
    optimizer_tensors,
)
from clipcore.run.schedule import learning_rate

pytestmark = pytest.mark.fast


def rates(num_steps: int = 100, **settings: object) -> list[float]:
    settings = {
        "schedule": "cosine",
        "lr_peak": 2.0,
        "num_steps": num_steps,
        "warmup_steps": 10,
        **settings,
    }
    return [learning_rate(step, **settings) for step in range(num_steps)]


def test_warm_up_is_linear_and_reaches_the_peak():
    assert rates()[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates()[10] == 2.0


def test_cosine_ends_near_zero_and_halves_in_the_middle():
    assert rates()[55] == pytest.approx(1.0)
    assert rates()[-1] == pytest.approx(1 + math.cos(math.pi * 89 / 90))


def test_const_and_cooldown():
    assert set(rates(schedule="const")[10:]) == {2.0}
    cooled = rates(schedule="const-cooldown", cooldown_steps=20, cooldown_end=0.5)
    assert cooled[79] == 2.0 and cooled[80] == 2.0 and cooled[90] == pytest.approx(1.25)


def test_cosine_agrees_with_open_clip():
    from open_clip_train.scheduler import cosine_lr

    group = {"lr": 0.0}
    theirs = cosine_lr(type("Optimizer", (), {"param_groups": [group]})(), 2.0, 10, 100)
    assert rates() == [theirs(step) for step in range(100)]


def test_gains_and_biases_are_not_decayed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm(4), nn.Linear(4, 2))
    decayed = {n for n, p in model.named_parameters() if is_decayed(n, p)}
    assert decayed == {"0.weight", "3.weight"}
    optimizer = build_optimizer(model, lr=1.0, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    assert [len(g["params"]) for g in optimizer.param_groups] == [6, 2]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.2]


def test_table_18():
    assert adam_defaults(is_resnet=True) == (0.9, 0.999, 1e-8)
    assert adam_defaults(is_resnet=False) == (0.9, 0.98, 1e-6)


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def new_run() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    return model, build_optimizer(model, lr=0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)


def test_state_round_trip_continues_bit_for_bit():
    straight, optimizer = new_run()
    train_steps(straight, optimizer, range(6))

    first, first_optimizer = new_run()
    train_steps(first, first_optimizer, range(3))
    second, second_optimizer = new_run()
    second.load_state_dict(first.state_dict())
    load_optimizer_tensors(second_optimizer, second, optimizer_tensors(first_optimizer, first))
    train_steps(second, second_optimizer, range(3, 6))
    assert all(
        torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True)
    )


def test_state_of_other_parameters_is_refused():
    model, optimizer = new_run()
    train_steps(model, optimizer, range(1))
    tensors = optimizer_tensors(optimizer, model)
    model[0].requires_grad_(False)
    locked = build_optimizer(model, lr=0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    with pytest.raises(ValueError, match=r"0\.(weight|bias)"):
        load_optimizer_tensors(locked, model, tensors)


def test_moving_average_forgets_the_start_and_keeps_counters():
    model = nn.BatchNorm1d(2)
    average = ExponentialMovingAverage(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.num_batches_tracked.fill_(7)
    average.update(model, step=0)  # the warm-up's decay: 1/10
    assert torch.allclose(average.shadow["weight"], torch.full((2,), 0.1 * 1 + 0.9 * 3))
    assert average.shadow["num_batches_tracked"] == 7
    average.update(model, step=100)
    assert torch.allclose(average.shadow["weight"], torch.full((2,), (2.8 + 3) / 2))


def test_gradient_norm_is_over_all_parameters():
    model = nn.Linear(2, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 2), 2.0), torch.full((2,), 1.0)
    assert gradient_norm(model.parameters()) == pytest.approx(math.sqrt(4 * 4 + 2))
