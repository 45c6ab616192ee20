"""What a run does between its settings and its first step: deterministic arithmetic, notes, and the plan of a step."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from clipcore.data import PairSource
from clipcore.data.loader import Batch
from clipcore.ranks.distributed import World
from clipcore.run.command_line import accepted_without_effect
from clipcore.run.config import flag_of, reporters
from clipcore.run.folders import write_config
from clipcore.run.metrics import MetricsLogger
from clipcore.run.recipe import RunConfig
from clipcore.run.state import RunState
from clipcore.run.train_step import TrainingStep
from clipcore.run.verify import verify_gradients
from clipcore.towers.model import CLIP


def make_deterministic() -> None:
    """Have torch give the same bits on every run of one machine, and round no more than ``--precision`` says.

    An operation that cannot give the same bits warns once. The settings are torch's own, for the whole process, so only a
    run makes them: importing clipcore or making a model changes none.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling fresh memory would cost a pass over every activation; the kernels' tests poison it instead.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    sum_in_float32()


def sum_in_float32() -> None:
    """Have a GPU's libraries add up products in float32, and not round the operands of float32 products.

    torch lets cuBLAS add partial sums of a 16-bit product in 16 bits, and cuDNN round float32 operands of a convolution to
    TF32. The environment can ask for more, such as ``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE``.
    """
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = False
    products.allow_fp16_reduced_precision_reduction = False
    products.allow_fp16_accumulation = False
    # The older two of torch's spellings: after the newer `fp32_precision` of convolutions alone, reading `allow_tf32`
    # raises, and torch's compiler reads it.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def note_without_effect(config: RunConfig, world: World) -> None:
    """Print which of the given settings change nothing."""
    names = accepted_without_effect()
    if flags := [flag_of(name) for name in names if getattr(config, name) not in (None, False)]:
        world.print(f"{', '.join(flags)}: accepted, without effect (see --help)")
    if config.fsdp and world.world_size == 1:
        world.print("--fsdp: one process has nobody to split the model with, and trains it whole")


def prepare_steps(
    training: TrainingStep,
    batch: Batch,
    step_index: int,
    config: RunConfig,
    run_dir: Path,
    log: MetricsLogger,
) -> RunConfig:
    """Choose threads, the loss's stash and the micro-batches where they are open; compile, and verify gradients, on request.

    The choices are made once, the same on all ranks, and written into config.json.

    Returns:
        The settings with the choices, which a resumed run takes over.
    """
    was = config
    if config.threads is None and training.world.device.type == "cpu":
        timed = training.set_faster_threads(batch, step_index)
        log.print(str(timed))
        config = dataclasses.replace(config, threads=timed.number)
    # After the threads, for whose number code is compiled, and before the plan, which measures what runs.
    if config.torchcompile:
        log.print(str(training.compile_blocks(batch, step_index)))
    # Before the plan, which leaves room for the loss.
    if (stash_bytes := training.choose_stash(config.step_memory)) is not None:
        config = dataclasses.replace(config, gpu_stash_bytes=stash_bytes)
    if training.needs_plan():
        log.print(str(training.plan(batch, step_index, config.step_memory)))
        config = dataclasses.replace(
            config,
            micro_batch_size=training.micro_batch_size,
            keep_graphs=training.num_kept_graphs,
        )
    if log.writes and config != was:
        write_config(run_dir, config)
    log.print(training.describe_loss())
    if config.verify_gradients:
        log.print(verify_gradients(training, batch, step_index))
    return config


def open_log(
    config: RunConfig, state: RunState, run_dir: Path, num_steps: int, world: World
) -> MetricsLogger:
    """Open the log of a run where its state has left it; only the main rank writes."""
    return MetricsLogger(
        run_dir if world.is_main else None,
        num_steps=num_steps,
        first_step=state.step,
        mark=state.log_mark,
        elapsed_s=state.elapsed_s,
        reporters=reporters(config),
        config=dataclasses.asdict(config),
        quiet=config.quiet,
    )


def describe(
    config: RunConfig,
    model: CLIP,
    source: PairSource,
    world: World,
    num_steps: int,
    first_step: int,
    run_dir: Path,
) -> str:
    """Return in a few lines what is about to happen."""
    num_image = sum(p.numel() for p in model.visual.parameters())
    num_all = sum(p.numel() for p in model.parameters())
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    resumed = f", from step {first_step}" if first_step else ""
    return (
        f"{config.model}: {num_all:,} parameters, {num_image:,} of them in the image tower; {num_trained:,} are trained\n"
        f"{source.name}: {len(source):,} pairs; {config.epochs} epochs of batch "
        f"{config.global_batch_size} = {num_steps:,} steps{resumed}, "
        f"on {world.world_size} x {world.device.type}\n"
        f"writing to {run_dir}"
    )
