"""bfloat16 moments and weights in a run: against torch's optimizer, saved, loaded, split among ranks, resumed."""

from __future__ import annotations

import copy
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import DEVICES
from ranks import RankPool
from runs import NANO, RunServer, assert_same_bits, final_state
from shards import write_csv
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from clipcore.ranks.distributed import World
from clipcore.run.optim import (
    MOMENTS,
    AdamW,
    ExponentialMovingAverage,
    build_optimizer,
    clipped_step,
    gradient_norm,
    load_optimizer_tensors,
    optimizer_tensors,
)
from clipcore.run.sharding import shard
from clipcore.run.state import RunState
from clipcore.towers.factory import create_model

SETTINGS = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}


def new_run(
    moments: str = "bf16", device: str = "cpu", weights: torch.dtype = torch.float32
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Linear(30, 2)).to(device, weights)
    return model, build_optimizer(model, **SETTINGS, moments=moments, seed=5)


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x.to(next(model.parameters()))).square().mean().backward()
        optimizer.step()


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_the_first_step_is_torchs_and_later_ones_stay_close(device: str) -> None:
    """A step uses the moments before they are rounded, so that the first differs by float32 roundings alone."""
    (model, optimizer), (other, theirs) = new_run(device=device), new_run("fp32", device)
    assert isinstance(optimizer, AdamW) and isinstance(theirs, torch.optim.AdamW)
    for num_steps, tolerance in ((1, 1e-5), (10, 2e-2)):
        train_steps(model, optimizer, range(num_steps))
        train_steps(other, theirs, range(num_steps))
        for mine, reference in zip(model.parameters(), other.parameters(), strict=True):
            assert (mine - reference).abs().max() <= tolerance * reference.abs().max()
    assert all(s[key].dtype == torch.bfloat16 for s in optimizer.state.values() for key in MOMENTS)


KINDS = [("bf16", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.bfloat16)]


@pytest.mark.parametrize("way", ["tensors", "state_dict"])
@pytest.mark.parametrize(("moments", "weights"), KINDS)
@pytest.mark.parametrize("device", DEVICES)
def test_state_round_trip_continues_bit_for_bit(
    device: str, moments: str, weights: torch.dtype, way: str
) -> None:
    straight, optimizer = new_run(moments, device, weights)
    train_steps(straight, optimizer, range(6))
    first, first_optimizer = new_run(moments, device, weights)
    train_steps(first, first_optimizer, range(3))
    second, second_optimizer = new_run(moments, device, weights)
    second.load_state_dict(first.state_dict())
    if way == "tensors":
        saved = optimizer_tensors(first_optimizer, first)
        expected = torch.bfloat16 if moments == "bf16" else torch.float32
        assert {t.dtype for n, t in saved.items() if "exp_avg" in n} == {expected}
        load_optimizer_tensors(second_optimizer, second, saved)
    else:
        second_optimizer.load_state_dict(first_optimizer.state_dict())
    train_steps(second, second_optimizer, range(3, 6))
    assert_equal(straight, second)


def test_moments_of_the_other_kind_are_converted() -> None:
    for before, after, dtype in [
        ("fp32", "bf16", torch.bfloat16),
        ("bf16", "fp32", torch.float32),
    ]:
        (model, optimizer), (other, theirs) = new_run(before), new_run(after)
        train_steps(model, optimizer, range(3))
        load_optimizer_tensors(theirs, other, optimizer_tensors(optimizer, model))
        for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
            for key in MOMENTS:
                expected = optimizer.state[parameter][key].to(dtype)
                assert torch.equal(theirs.state[twin][key], expected)
        train_steps(other, theirs, range(3, 4))
        assert all(int(state["step"]) == 4 for state in theirs.state.values())


def test_a_scale_of_the_gradients_and_a_closure() -> None:
    (model, optimizer), (other, theirs) = new_run(), new_run()
    train_steps(model, optimizer, range(1))
    train_steps(other, theirs, range(1))
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None
        twin.grad = parameter.grad * 0.25
    assert isinstance(optimizer, AdamW)
    loss = optimizer.step(lambda: torch.ones(()), grad_scale=torch.tensor(0.25))
    theirs.step()
    assert loss == 1.0
    assert_equal(model, other)


def test_weights_of_16_bits_follow_steps_far_below_their_last_place() -> None:
    """A thousand steps of 2e-5, each a two-hundredth of a weight's last place: to nearest, none of them would be seen."""
    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    settings = {**SETTINGS, "lr": 2e-5, "weight_decay": 0.0}
    optimizer = build_optimizer(nn.ParameterList([weight]), **settings, moments="fp32")
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # 0.98 with a standard error of about 0.004 / 64 of the mean.
    assert weight.dtype == torch.bfloat16 and abs(weight.detach().double().mean() - 0.98) < 4e-4


def test_clipping_of_16_bits_is_not_rounded_and_norms_are_float32() -> None:
    (model, optimizer), (other, theirs) = (new_run(weights=torch.bfloat16) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        parameter.grad = torch.randn_like(parameter)
        twin.grad = parameter.grad.clone()
    exact = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()  # type: ignore[union-attr]
    norm = gradient_norm(model.parameters())
    assert norm.dtype == torch.float32 and abs(norm / exact - 1) < 1e-6
    clipped_step(optimizer, scaler, model.parameters(), norm, 0.5)
    assert isinstance(theirs, AdamW)
    theirs.step(grad_scale=0.5 / (norm + 1e-6))
    assert_equal(model, other)
    assert gradient_norm(model.parameters()) == norm  # the gradients are as they were


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_and_new_groups_draw_their_own_bits(how: str) -> None:
    model, optimizer = new_run()
    train_steps(model, optimizer, range(2))
    pair = (model, optimizer)
    other, copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    train_steps(model, optimizer, range(2, 4))
    train_steps(other, copied, range(2, 4))
    assert_equal(model, other)
    late = nn.Parameter(torch.ones(8))
    copied.add_param_group({"params": [late]})
    late.grad = torch.ones(8)
    copied.step()
    assert len(set(copied._numbers.values())) == len(copied._numbers) == 7


def test_weights_of_any_memory_format_are_trained_and_resumed() -> None:
    """Channels last, from the start or from the second step on, where the state is as it was; as torch but for rounding."""
    torch.manual_seed(0)
    weight, gradients = torch.randn(8, 3, 4, 4), torch.randn(4, 8, 3, 4, 4)
    settings = {**SETTINGS, "lr": 1e-3}

    def trained(make: Any, formats: list[torch.memory_format]) -> Tensor:
        parameter = nn.Parameter(weight.clone())
        optimizer = make([parameter])
        for gradient, memory_format in zip(gradients, formats, strict=True):
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
            parameter.grad = gradient.clone()
            optimizer.step()
            other = make([parameter])
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer = other
        return parameter.detach()

    plain, last = torch.contiguous_format, torch.channels_last
    expected = trained(lambda p: torch.optim.AdamW(p, **settings), [plain] * 4)
    for formats in ([last] * 4, [plain, last, last, plain]):
        found = trained(lambda p: AdamW(p, **settings), formats)
        assert (found - expected).abs().max() < 0.1 * (expected - weight).abs().max()


def test_another_seed_is_part_of_the_state() -> None:
    (model, optimizer), (other, theirs) = new_run(), new_run()
    train_steps(model, optimizer, range(2))
    other.load_state_dict(model.state_dict())
    theirs.param_groups[0]["seed"] = 99
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_steps(model, optimizer, range(2, 4))
    train_steps(other, theirs, range(2, 4))
    assert_equal(model, other)


def test_an_average_of_16_bit_weights_is_float32() -> None:
    model, _ = new_run(weights=torch.bfloat16)
    average = ExponentialMovingAverage(model, 0.999)
    before = {name: value.clone() for name, value in average.shadow.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    average.update(model, 10**6)
    for name, value in model.state_dict().items():
        assert average.shadow[name].dtype == torch.float32
        expected = before[name] + 0.001 * (value.float() - before[name])
        assert torch.allclose(average.shadow[name], expected, rtol=1e-6)


# Split among ranks.


def clip_steps(world: World | None) -> dict[str, Tensor]:
    """Weights and moments after two steps with gradients that do not depend on the ranks."""
    torch.manual_seed(0)
    model = create_model("ViT-nano-8-32", precision="fp32")
    if world is not None:
        shard(model, world)
    optimizer = build_optimizer(model, **SETTINGS, moments="bf16", seed=9)
    for step in range(2):
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(1000 * step + number)
            gradient = torch.randn(parameter.shape, generator=generator)
            mesh = getattr(parameter, "device_mesh", None)
            if mesh is not None:
                gradient = distribute_tensor(gradient, mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step()
    state = RunState(
        model, optimizer, torch.amp.GradScaler("cpu", enabled=False), None, {}, global_batch_size=1
    )
    tensors = {f"{g}/{n}": t for g, named in state.tensors().items() for n, t in named.items()}
    whole: dict[str, Any] = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in tensors.items()
    }
    return {name: value.detach().clone() for name, value in whole.items()}


def test_a_split_model_has_the_bits_of_a_whole_one(pool_of_two: RankPool) -> None:
    expected = clip_steps(None)
    for found in pool_of_two.run(clip_steps):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


# Whole runs.


def flags(tmp_path: Path, name: str, table: Path, *extra: str) -> list[str]:
    line = ["--logs", str(tmp_path), "--name", name, "--train-data", str(table), *NANO]
    return [*line, "--batch-size", "8", "--lr", "1e-3", "--save-every-steps", "1", *extra]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_resumed_bit_for_bit_and_may_change_its_moments(
    server: RunServer, tmp_path: Path, precision: str
) -> None:
    table = write_csv(tmp_path, num_pairs=40)
    chosen = ["--adam-moments", "bf16", "--epochs", "3", "--grad-clip-norm", "0.5"]
    chosen += ["--precision", precision, "--ema-decay", "0.9", "--verify-gradients"]
    num_events = server.counted(flags(tmp_path, "straight", table, *chosen), tmp_path / "a")
    line = flags(tmp_path, "broken", table, *chosen, "--resume", "latest")
    run = server.start(line, tmp_path / "b", signals=[(num_events // 2, signal.SIGTERM)])
    assert run.wait() == 143, run.text
    assert server.run(line, tmp_path / "b")[0] == 0
    assert_same_bits(tmp_path / "straight", tmp_path / "broken")
    tensors, _ = final_state(tmp_path / "straight")
    moments = {n: t.dtype for n, t in tensors.items() if n.endswith(MOMENTS)}
    assert moments and set(moments.values()) == {torch.bfloat16}
    matrix = tensors["model/visual.transformer.resblocks.0.mlp.c_fc.weight"]
    assert matrix.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)

    again = ["--epochs", "4", "--resume", "latest"]
    status, text = server.run(
        flags(tmp_path, "straight", table, *again, "--adam-moments", "fp32"), tmp_path / "a"
    )
    assert status == 0 and "--adam-moments was bf16 in this run, now fp32" in text, text
    tensors, _ = final_state(tmp_path / "straight")
    assert {t.dtype for n, t in tensors.items() if n.endswith(MOMENTS)} == {torch.float32}


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="fp32 or bf16, got 'fp8'"):
        new_run("fp8")
