"""``--loss-stash`` and ``--loss-workspace``: what they say to the loss, and what a run decides, records and keeps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import RankPool

from clipcore.loss import ClipLoss, SigLipLoss
from clipcore.ranks.distributed import World
from clipcore.run import train_step
from clipcore.run.command_line import parse_command_line
from clipcore.run.config import TrainConfig
from clipcore.run.folders import resumed_config
from clipcore.run.memory_plan import shared_stash_bytes
from clipcore.run.parts import build_loss
from clipcore.run.recipe import RunConfig, resolve
from clipcore.run.setup import prepare_steps
from clipcore.run.train_step import TrainingStep
from clipcore.towers.factory import create_model

ALONE = World(0, 1, 0, torch.device("cpu"))
GPU = World(0, 1, 0, torch.device("cuda", 0))
# More than a GPU keeps as they are whatever is free.
NUM_PAIRS = 8192


def config_of(line: str = "") -> RunConfig:
    return resolve(parse_command_line(line.split())[0])


def step_of(world: World, loss_fn: ClipLoss | SigLipLoss, precision: str) -> TrainingStep:
    """Return a step that has nothing to plan."""
    model = create_model("ViT-nano-8-32")
    return TrainingStep(
        model=model,
        loss_fn=loss_fn,
        world=world,
        precision=precision,
        seed=0,
        global_batch_size=NUM_PAIRS,
        scale_loss=lambda loss: loss,
        micro_batch_size=NUM_PAIRS,
    )


@pytest.fixture
def gpu_default(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let a stash on a GPU take so many bytes by default; return them."""
    monkeypatch.setattr(train_step, "default_stash_bytes", lambda device: 2**34)
    return 2**34


# What the flags say to the loss


@pytest.mark.fast
def test_the_flags_are_the_losss_options_in_gb() -> None:
    options = build_loss(config_of("--loss-stash 2.5 --loss-workspace 0.25"), ALONE, 8).options
    assert (options.stash_bytes, options.workspace_bytes) == (2_500_000_000, 250_000_000)
    assert build_loss(config_of("--loss-stash 0"), ALONE, 8).options.stash_bytes == 0
    options = build_loss(config_of("--siglip --loss-workspace 0.25"), ALONE, 8).options
    assert (options.stash_bytes, options.workspace_bytes) == (None, 250_000_000)
    for line in ("", "--siglip"):
        options = build_loss(config_of(line), ALONE, 8).options
        assert (options.stash_bytes, options.workspace_bytes) == (None, None)


# What a run decides


@pytest.mark.fast
@pytest.mark.parametrize("precision", ["amp_bf16", "amp_bfloat16", "amp", "bf16"])
def test_features_of_16_bits_have_the_default(precision: str) -> None:
    assert shared_stash_bytes(2**34, precision) == 2**34


@pytest.mark.fast
def test_features_of_float32_have_no_stash_unless_it_is_asked_for(gpu_default: int) -> None:
    assert shared_stash_bytes(2**34, "fp32") == 0
    given = ClipLoss(stash_bytes=5)
    assert step_of(GPU, given, "fp32").choose_stash(None) is None and given.stash_bytes == 5


@pytest.mark.fast
def test_a_gpu_decides_for_the_softmax_loss_alone(gpu_default: int) -> None:
    loss_fn = ClipLoss()
    step = step_of(GPU, loss_fn, "amp_bf16")
    assert step.choose_stash(None) == loss_fn.stash_bytes == gpu_default
    assert step_of(GPU, SigLipLoss(), "amp_bf16").choose_stash(None) is None
    on_cpu = ClipLoss()
    assert step_of(ALONE, on_cpu, "fp32").choose_stash(None) is None and on_cpu.stash_bytes is None


@pytest.mark.fast
def test_a_step_of_little_memory_has_a_small_stash(gpu_default: int) -> None:
    assert step_of(GPU, ClipLoss(), "amp_bf16").choose_stash(0.8) == 200_000_000
    assert step_of(GPU, ClipLoss(), "amp_bf16").choose_stash(1000.0) == gpu_default


@pytest.mark.fast
@pytest.mark.parametrize("precision", ["amp_bf16", "fp32"])
def test_a_small_batch_is_left_to_the_loss_which_keeps_its_logits(
    gpu_default: int, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    loss_fn = ClipLoss()
    step = step_of(GPU, loss_fn, precision)
    step.global_batch_size = 4096
    assert step.choose_stash(None) is None and loss_fn.stash_bytes is None
    step.global_batch_size = 4097
    assert step.choose_stash(None) is not None


def stash_on_rank(world: World, precision: str) -> int:
    return shared_stash_bytes(2 ** (34 - world.rank), precision)


def test_ranks_agree_on_the_least(pool_of_two: RankPool) -> None:
    assert pool_of_two.run(stash_on_rank, "amp_bf16") == [2**33, 2**33]
    assert pool_of_two.run(stash_on_rank, "fp32") == [0, 0]


# What it records and keeps


def recorded(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "config.json").read_text())


def prepare(step: TrainingStep, config: RunConfig, run_dir: Path) -> RunConfig:
    batch: Any = SimpleNamespace()
    log: Any = SimpleNamespace(writes=True, print=lambda message: None)
    return prepare_steps(step, batch, 0, config, run_dir, log)


@pytest.mark.fast
@pytest.mark.parametrize(("precision", "expected"), [("amp_bf16", 2**34), ("fp32", 0)])
def test_the_decision_is_recorded_and_kept(
    gpu_default: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    expected: int,
) -> None:
    """Also where there is no plan to make, and although less memory is free when the run goes on."""
    monkeypatch.setattr(TrainingStep, "describe_loss", lambda self: "")
    config = config_of(f"--global-batch-size {NUM_PAIRS} --precision {precision}")
    step = step_of(GPU, build_loss(config, GPU, NUM_PAIRS), precision)
    assert not step.needs_plan()
    config = prepare(step, config, tmp_path)
    assert recorded(tmp_path)["gpu_stash_bytes"] == config.gpu_stash_bytes == expected
    assert config.loss_stash is None

    again = resolve(resumed_config(tmp_path, TrainConfig(), frozenset(), ALONE))
    monkeypatch.setattr(train_step, "default_stash_bytes", lambda device: 2**20)
    step = step_of(GPU, build_loss(again, GPU, NUM_PAIRS), precision)
    assert isinstance(step.loss_fn, ClipLoss) and step.loss_fn.stash_bytes == expected
    assert prepare(step, again, tmp_path) == again
    # On a machine without a GPU it says nothing.
    assert build_loss(again, ALONE, NUM_PAIRS).options.stash_bytes is None


@pytest.mark.fast
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", 2**34 + 1),
        (f"--epochs 9 --batch-size {NUM_PAIRS}", 2**34 + 1),  # the batch that it had
        ("--loss-stash 3", None),
        ("--precision fp32", None),
        ("--step-memory 2", None),
        ("--device cuda", None),
        ("--global-batch-size 16", None),
        ("--siglip", None),
    ],
)
def test_a_resumed_run_decides_anew_where_memory_is_another(
    tmp_path: Path, line: str, expected: int | None
) -> None:
    config = config_of(f"--global-batch-size {NUM_PAIRS} --precision amp_bf16")
    config = dataclasses.replace(config, gpu_stash_bytes=2**34 + 1)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    resumed = resumed_config(tmp_path, *parse_command_line(line.split()), ALONE)
    assert resumed.gpu_stash_bytes == expected


@pytest.mark.fast
def test_a_stash_that_the_user_gave_stays(tmp_path: Path) -> None:
    config = config_of(f"--global-batch-size {NUM_PAIRS} --precision amp_bf16 --loss-stash 0")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    for line in ("", "--precision fp32", "--step-memory 2", "--device cuda"):
        resumed = resumed_config(tmp_path, *parse_command_line(line.split()), ALONE)
        assert resumed.loss_stash == 0


@pytest.mark.fast
def test_the_stash_is_chosen_before_the_plan_which_leaves_room_for_it(
    gpu_default: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def plan(step: TrainingStep, *_: Any) -> str:
        assert isinstance(step.loss_fn, ClipLoss)
        seen.append(step.loss_fn.stash_bytes)
        return ""

    monkeypatch.setattr(TrainingStep, "describe_loss", lambda self: "")
    monkeypatch.setattr(TrainingStep, "plan", plan)
    step = step_of(GPU, ClipLoss(), "amp_bf16")
    step.micro_batch_size = None
    prepare(step, config_of(f"--global-batch-size {NUM_PAIRS}"), tmp_path)
    assert seen == [gpu_default]


@pytest.mark.fast
def test_another_model_has_its_own_settings_of_adam(tmp_path: Path) -> None:
    config = config_of("--model ViT-nano-8-32")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    for line, expected in (("", (0.9, 0.98, 1e-6)), ("--model RN50", (0.9, 0.999, 1e-8))):
        resumed = resolve(resumed_config(tmp_path, *parse_command_line(line.split()), ALONE))
        assert (resumed.beta1, resumed.beta2, resumed.eps) == expected


@pytest.mark.fast
def test_other_memory_of_the_loss_is_another_plan(tmp_path: Path) -> None:
    config = config_of("--global-batch-size 8 --micro-batch-size 2 --keep-graphs 3")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    for line in ("--loss-stash 1", "--loss-workspace 1"):
        resumed = resumed_config(tmp_path, *parse_command_line(line.split()), ALONE)
        assert (resumed.micro_batch_size, resumed.keep_graphs) == (None, None)
    resumed = resumed_config(tmp_path, *parse_command_line([]), ALONE)
    assert (resumed.micro_batch_size, resumed.keep_graphs) == (2, 3)
