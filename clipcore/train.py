"""The training run, read from top to bottom: ``python -m clipcore.train``.

Settings, data, model, optimizer, resume, then one loop; at the end the report. The state of a run is (weights, moments,
moving average, step): the order of the data, the crops and the dropout are functions of the seed and the step, so that
a run continues bit for bit from any of its checkpoints.

Exit status: 0 done; 1 stopped by a loss, gradient or weight that is not finite; 2 a mistake in the settings or the data, a
file that cannot be read or written, or too little memory; 3 ended because another rank died or kept the others waiting for
longer than ``--timeout``; 4 stopped, after saving a checkpoint, because a process that reads data was killed; 5
``--verify-gradients`` found gradients that are not those of the loss; 70 a fault of clipcore's own; 128 + n stopped by
signal n, after saving a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn

from clipcore import native
from clipcore.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    make_newest,
    run_lock,
    step_name,
)
from clipcore.data import PairSource, WorkerLostError
from clipcore.data.embedded import EMBEDDED
from clipcore.data.loader import Batch, PairLoader
from clipcore.data.transforms import ImageTransform
from clipcore.evaluate.tasks import EvaluationPlan
from clipcore.files import is_file, make_directory
from clipcore.ranks import watchdog
from clipcore.ranks.distributed import (
    World,
    all_reduce_sum,
    barrier,
    broadcast_object,
    broadcast_tensors,
    close_distributed,
    gather_objects,
    init_distributed,
    is_main,
)
from clipcore.ranks.failures import end_with
from clipcore.ranks.signals import DATA_WAIT_S, REPEAT_S, DataWaitError, Interrupt, signal_ignored
from clipcore.report.collect import report_run
from clipcore.run import memory
from clipcore.run.collapse import CollapseWatch
from clipcore.run.config import (
    ConfigError,
    TrainConfig,
    in_global_batches,
    parse_command_line,
    reporters,
    resolve,
    warmup_steps,
)
from clipcore.run.grad_cache import Found
from clipcore.run.metrics import (
    Logbook,
    LogError,
    LogMark,
    PartClock,
    compare_log,
    read_metrics,
    set_log_aside,
)
from clipcore.run.optim import (
    ExponentialMovingAverage,
    adam_defaults,
    build_optimizer,
    clipped_step,
    gradient_norm,
    local_part,
)
from clipcore.run.parts import (
    augmentation,
    build_loss,
    build_model,
    build_tokenizer,
    captions_sha256,
    check_compiler,
    lock_towers,
    name_of_data,
    open_training_source,
    tower_widths,
    with_size_of,
)
from clipcore.run.profile import PROFILE_FOLDER, StepProfile, check_long_enough
from clipcore.run.schedule import learning_rate
from clipcore.run.sharding import replicate, shard
from clipcore.run.state import (
    CONFIG_FILE,
    RunState,
    check_run_is_there,
    find_checkpoint,
    find_run,
    is_restart,
    launch_id,
    log_mark,
    new_run_dir,
    newest_sound,
    resumed_config,
    write_config,
)
from clipcore.run.threads import most_threads
from clipcore.run.train_step import TrainingStep
from clipcore.run.verify import VerificationError, verify_gradients
from clipcore.terminal import complain, steady_output
from clipcore.tokenizer import VOCABULARY_FILE
from clipcore.towers.model import CLIP

WORKER_LOST_STATUS = 4
WRONG_GRADIENTS_STATUS = 5


class NonFiniteError(RuntimeError):
    """The loss, a gradient or the state is not finite; the message names the step and the first bad tensor."""


def train(config: TrainConfig, given: frozenset[str], world: World) -> int:
    """Make one run, from its settings to its report; return the exit status.

    Args:
        given: the names of the settings that the user gave, which win over those of a resumed run.
    """
    on_several_gpus = world.device.type == "cuda" and world.world_size > 1
    if (note := native.left_out(on_several_gpus)) is not None:
        world.say(note)

    with contextlib.ExitStack() as stack:
        run_dir = None
        if world.is_main:
            run_dir = find_run(config, launch_id(), world.say)
            check_run_is_there(config, given, run_dir)
            run_dir = run_dir or new_run_dir(in_global_batches(resolve(config), world.world_size))
            make_directory(run_dir)
            # Before anything in it is read: another run that is still writing there could commit a step behind our back.
            stack.enter_context(run_lock(run_dir))
        return train_in(Path(broadcast_object(str(run_dir))), config, given, world)


def train_in(run_dir: Path, config: TrainConfig, given: frozenset[str], world: World) -> int:
    """Make one run in its folder, which no other run writes to; arguments and result as of ``train``."""
    # Settings
    checkpoint = find_checkpoint(config, run_dir, world)
    has_settings = world.is_main and config.resume == "latest" and is_file(run_dir / CONFIG_FILE)
    is_begun = checkpoint is not None or broadcast_object(has_settings) or is_restart(run_dir)
    if is_begun:
        config = resumed_config(run_dir, config, given, world)
    config = in_global_batches(resolve(config), world.world_size)
    note_without_effect(config, world)
    if not is_begun and "model" not in given:
        note_default_model(config, world)
    make_deterministic()
    config = set_threads(config, "threads" in given, world)
    if world.device.type == "cpu":
        memory.keep_freed()

    # Log
    mark = LogMark()
    if checkpoint is not None and world.is_main:
        mark = continue_log(run_dir, checkpoint, config.new_log, world)

    # Data
    source = open_training_source(config)
    tokenizer = build_tokenizer(config, run_dir, checkpoint is not None, source)
    config = with_size_of(tokenizer, config, world.say)

    # Model
    is_split = config.fsdp and world.world_size > 1
    torch.manual_seed(config.seed)
    device = torch.device("cpu") if is_split else world.device
    model = build_model(config, tokenizer.vocab_size, checkpoint, device, world.say)
    size = model.visual.image_size
    transform = ImageTransform(size, is_train=True, **model.images, **augmentation(config))
    eval_transform = ImageTransform(size, is_train=False, **model.images)
    tokenizer.context_length = model.context_length
    lock_towers(model, config)
    model.set_grad_checkpointing(config.grad_checkpointing)
    if is_split:
        shard(model, world)

    # Order and length
    global_batch_size, epochs = config.global_batch_size or 1, config.epochs or 1
    loader = PairLoader(
        source,
        transform,
        tokenizer,
        global_batch_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.world_size,
        workers=config.workers or 0,
        max_bad_fraction=config.max_bad_fraction,
    )
    steps_per_epoch = (config.train_num_samples or len(source)) // global_batch_size
    if not steps_per_epoch:
        raise ConfigError(
            f"--train-num-samples {config.train_num_samples} is less than one batch of {global_batch_size}; "
            "raise it or lower --global-batch-size"
        )
    num_steps = epochs * steps_per_epoch
    # A resumed run has the warm-up that it began with, whether from the user or cut from the recipe's.
    is_chosen = "warmup" in given or is_begun
    config = dataclasses.replace(
        config, warmup=warmup_steps(config, is_chosen, num_steps), name=run_dir.name
    )

    # Optimizer
    beta1, beta2, eps = adam_defaults(model.is_resnet)
    optimizer = build_optimizer(
        model,
        lr=config.lr or 0.0,
        betas=(
            beta1 if config.beta1 is None else config.beta1,
            beta2 if config.beta2 is None else config.beta2,
        ),
        eps=eps if config.eps is None else config.eps,
        weight_decay=config.wd or 0.0,
        moments=config.adam_moments,
        seed=config.seed,
    )
    ema = ExponentialMovingAverage(model, config.ema_decay) if config.ema_decay else None
    precision = config.precision or ("amp_bf16" if world.device.type == "cuda" else "fp32")
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "amp")
    loss_fn = build_loss(config, world, global_batch_size)

    # Resume
    digest = captions_sha256(source)
    identity = {
        "model": model.config.to_dict(),
        "vocabulary": tokenizer.sha256,
        "data": name_of_data(source, digest, checkpoint, world.say),
        "image decoder": config.image_decoder,
    }
    # Of weights that say so, for whoever uses the run's.
    if model.images:
        identity["images"] = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in model.images.items()
        }
    state = RunState(model, optimizer, scaler, ema, identity, global_batch_size, digest)
    if checkpoint is not None:
        state.load(checkpoint)
        state.log_mark = mark
        check_state(state, run_dir, f"{checkpoint.path} cannot be resumed from", CheckpointError)
    begun_from = checkpoint.path if checkpoint is not None else None
    del checkpoint  # its files stay open, and on the disk, for as long as it is there
    if config.profile:
        check_long_enough(num_steps - state.step)

    towers: nn.Module = model
    if config.torchcompile:
        if world.device.type == "cpu":
            check_compiler()
        towers = cast(nn.Module, torch.compile(model))
    training = TrainingStep(
        *(model, towers, loss_fn, world, precision, config.seed, global_batch_size),
        *(scaler.scale, config.micro_batch_size, config.keep_graphs),
        with_ids=config.duplicate_captions != "negative",
    )
    if world.world_size > 1 and not is_split:
        with watchdog.collective("comparison of the models"):
            training.reduced = replicate(towers)
    evaluations = EvaluationPlan(config, world, tokenizer, eval_transform)

    with contextlib.ExitStack() as stack:
        if world.is_main:
            if begun_from is not None:
                make_newest(begun_from)
            write_config(run_dir, config)
            tokenizer.save(run_dir / VOCABULARY_FILE)
        is_alone = world.world_size == 1
        interrupt = stack.enter_context(
            Interrupt(0.0 if is_alone else REPEAT_S, DATA_WAIT_S if is_alone else None)
        )
        log = stack.enter_context(
            Logbook(
                run_dir if world.is_main else None,
                num_steps=num_steps,
                first_step=state.step,
                mark=state.log_mark,
                elapsed_s=state.elapsed_s,
                reporters=reporters(config),
                config=dataclasses.asdict(config),
                quiet=config.quiet,
            )
        )
        log.say(describe(config, model, source, world, num_steps, state.step, run_dir))
        for line in evaluations.describe_sources(source):
            log.say(line)
        warmup = 0 if config.skip_scheduler else config.warmup or 0
        watch = CollapseWatch(
            global_batch_size, config.siglip, warmup, config.grad_clip_norm is not None
        )
        earlier = read_metrics(run_dir)[0] if log.writes and state.step else []
        if said := watch.see_all(earlier):
            log.say(said)
        clock = PartClock(state.timings)
        batches = loader.batches(state.step)
        saved_at, first_step = time.monotonic(), state.step
        stack.enter_context(saved_when_data_stops(state, run_dir, config, log, num_steps))
        if state.step > state.evaluated_step and state.step % steps_per_epoch == 0:
            epoch = state.step // steps_per_epoch
            evaluate_epoch(state, evaluations, log, epoch, state.step == num_steps)
            clock.charge("evaluation")

        profiled = stack.enter_context(
            StepProfile(
                run_dir / PROFILE_FOLDER if config.profile and world.is_main else None,
                world.device,
                tower_widths(model),
                training.dtype,
                state.timings,
            )
        )
        for step in range(first_step, num_steps):
            watchdog.at_step(step + 1)
            profiled.begin_step()
            lost: WorkerLostError | None = None
            try:
                batch = next(batches)
            except WorkerLostError as error:
                lost = error
                # Saved before this process, whose memory may be short too, reads the batch, and all ranks finish the step.
                is_whole = world.is_main and not is_split and step > first_step
                if is_whole and state.first_fault() is None:
                    save(state, run_dir, config, log)
                batch = loader.batch(step)
            clock.charge("data")
            if step == first_step:
                config = prepare_steps(training, batch, step, config, run_dir, log)
                clock.charge("plan")

            lr = scheduled_lr(config, step, num_steps, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            found = training.gradients(batch, step, clock.charge, log.progress)
            scaler.unscale_(optimizer)
            grad_norm = gradient_norm(model.parameters())
            clock.charge("backward")

            # One small all-reduce, so that every rank decides alike: to update, to stop, to save.
            finite = found.loss.isfinite() & (grad_norm.isfinite() | scaler.is_enabled())
            (
                mean_loss,
                num_broken,
                num_bad,
                num_transparent,
                num_signalled,
                num_lost,
                num_late,
            ) = all_reduce_sum(
                [
                    found.loss.item() / world.world_size,
                    float(not finite),
                    len(batch.bad),
                    batch.num_transparent,
                    interrupt.signal_number > 0,
                    lost is not None,
                    world.is_main and minutes_passed(saved_at, config.save_every_minutes),
                ]
            )
            if num_broken:
                sound = shared_sound_checkpoint(run_dir)
                raise NonFiniteError(
                    describe_non_finite(step, found, model, remedy(run_dir, sound))
                )

            clipped_step(optimizer, scaler, model.parameters(), grad_norm, config.grad_clip_norm)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            model.clamp_logit_scale_()
            if ema is not None:
                ema.update(model, step)
            clock.charge("optimizer")

            state.step += 1
            state.bad_samples += int(num_bad)
            if num_transparent and not state.transparent:
                log.say(f"step {state.step}: transparent pictures are laid over white")
            state.transparent += int(num_transparent)
            for key, reason in batch.bad:
                log.say(f"step {state.step}: replaced {key}: {reason}")
            length = grad_norm.item()
            log.step(
                {
                    "step": state.step,
                    "epoch": round(state.step / steps_per_epoch, 4),
                    "loss": mean_loss,
                    "lr": lr,
                    "logit_scale": model.logit_scale.exp().item(),
                    "grad_norm": length,
                    "bad_samples": state.bad_samples,
                },
                num_pairs=global_batch_size,
                every=config.log_every_n_steps,
            )
            if said := watch.see(state.step, mean_loss, length):
                log.say(said)

            del batch, found  # which may be large, before the next are there
            if said := profiled.end_step():
                log.say(said)
                clock.charge("profile")
            epoch, into_epoch = divmod(state.step, steps_per_epoch)
            is_last = state.step == num_steps
            is_stopping = num_signalled + num_lost > 0
            if (
                is_last
                or is_stopping
                or num_late
                or (not into_epoch and is_due(epoch, config.save_frequency))
                or is_due(state.step, config.save_every_steps)
            ):
                check_state(state, run_dir, f"step {state.step} was not saved", NonFiniteError)
                if world.is_main or is_split:
                    save(state, run_dir, config, log)
                saved_at = time.monotonic()
                clock.charge("checkpoint")
            # After the checkpoint, so that what goes wrong in an evaluation costs no training; a resumed run makes up for
            # one that was not made, and a signal leaves no time for it.
            if not into_epoch and not is_stopping:
                evaluate_epoch(state, evaluations, log, epoch, is_last)
                clock.charge("evaluation")
            if is_stopping:
                if lost is not None:
                    complain("clipcore.train", f"stopped: {lost}")
                log.say(
                    f"saved step {state.step} of {num_steps}; go on with: {resume_hint(run_dir)}"
                )
                status = WORKER_LOST_STATUS if num_lost else interrupt.exit_status
                break
        else:
            report_run(run_dir, config, state, evaluations, source, log, watch)
            status = 0
    # All leave together: when the first process ends, torchrun stops the others, rank 0 in its checkpoint if need be.
    barrier()
    return status


def continue_log(run_dir: Path, checkpoint: Checkpoint, may_begin: bool, world: World) -> LogMark:
    """Return from where metrics.jsonl goes on: the checkpoint's mark, or the beginning of a new one.

    Args:
        may_begin: set a metrics.jsonl that is not as the checkpoint left it aside, and begin a new one.

    Raises:
        LogError: it is not as the checkpoint left it, and may not be set aside.
    """
    mark = log_mark(checkpoint)
    try:
        compare_log(run_dir, mark)
    except LogError:
        if not may_begin:
            raise
        aside = set_log_aside(run_dir)
        kept = f"; what was there is {aside}" if aside is not None else ""
        world.say(f"--new-log: metrics.jsonl begins behind step {checkpoint.step}{kept}")
        return LogMark()
    return mark


@contextlib.contextmanager
def saved_when_data_stops(
    state: RunState, run_dir: Path, config: TrainConfig, log: Logbook, num_steps: int
) -> Iterator[None]:
    """Save the last whole step where a wait for data is given up, unless it is saved, and say how to go on."""
    first_step = state.step
    try:
        yield
    except DataWaitError:
        newest = latest_checkpoint(run_dir / "checkpoints")
        is_saved = newest is not None and newest.name == step_name(state.step)
        if state.step > first_step and not is_saved:
            check_state(state, run_dir, f"step {state.step} was not saved", NonFiniteError)
            save(state, run_dir, config, log)
        if state.step > 0:
            log.say(f"saved step {state.step} of {num_steps}; go on with: {resume_hint(run_dir)}")
        else:
            log.say("there was no step to save")
        raise


def save(state: RunState, run_dir: Path, config: TrainConfig, log: Logbook) -> None:
    """Save the state as it is; by all ranks together where the model is split, else by the main one."""
    state.elapsed_s, state.log_mark = log.elapsed_s, log.sync()
    state.save(run_dir, config.keep_checkpoints)


def check_state(state: RunState, run_dir: Path, consequence: str, error: type[Exception]) -> None:
    """Raise, on all ranks alike, if weights, moments or average hold what no step can go on from.

    Args:
        consequence: what does not happen then.
        error: to raise; its message names the tensor, and the newest checkpoint without such a fault.
    """
    faults = [fault for fault in gather_objects(state.first_fault()) if fault is not None]
    if not faults:
        return
    raise error(f"{consequence}: {faults[0]}; {remedy(run_dir, shared_sound_checkpoint(run_dir))}")


def shared_sound_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint of a run that is finite, as rank 0 finds it; called by all."""
    return broadcast_object(newest_sound(run_dir / "checkpoints") if is_main() else None)


def remedy(run_dir: Path, sound: Path | None) -> str:
    """Return what to do after a run that went wrong, given its newest checkpoint that is finite."""
    if sound is None:
        return f"{run_dir} has no checkpoint that is finite; begin anew with a lower --lr or a longer --warmup"
    return (
        f"the newest checkpoint that is finite is {sound.name}: try a lower --lr, a longer --warmup or --grad-clip-norm 1, "
        f"then {resume_hint(sound)}"
    )


def prepare_steps(
    training: TrainingStep,
    batch: Batch,
    step: int,
    config: TrainConfig,
    run_dir: Path,
    log: Logbook,
) -> TrainConfig:
    """Choose threads and plan the steps where that is not done yet, and verify their gradients on request.

    Return the settings with both, which a resumed run takes over.
    """
    was = config
    if config.threads is None and training.world.device.type == "cpu":
        timed = training.set_faster_threads(batch, step)
        log.say(str(timed))
        config = dataclasses.replace(config, threads=timed.number)
    if training.needs_plan():
        log.say(str(training.plan(batch, step, config.step_memory)))
        config = dataclasses.replace(
            config, micro_batch_size=training.micro_batch_size, keep_graphs=training.kept
        )
    if log.writes and config != was:
        write_config(run_dir, config)
    log.say(training.describe_loss())
    if config.verify_gradients:
        log.say(verify_gradients(training, batch, step))
    return config


def evaluate_epoch(
    state: RunState, evaluations: EvaluationPlan, log: Logbook, epoch: int, is_last: bool
) -> None:
    """The evaluations due after ``epoch`` epochs, noted as made."""
    model = state.evaluated_model()
    # BatchNorm's statistics are each rank's own after a step; the checkpoint has rank 0's.
    broadcast_tensors(model.buffers())
    with log.whole_or_nothing():
        evaluations.run(model, log, state.step, epoch, is_last)
    state.evaluated_step = state.step


def make_deterministic() -> None:
    """The same bits on every run of one machine; an operation that cannot promise it warns once."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling fresh memory would cost a pass over every activation; the kernels' tests poison it instead.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def note_without_effect(config: TrainConfig, world: World) -> None:
    """Says which settings are taken from open_clip's users but change nothing."""
    names = (
        "local_loss",
        "gather_with_grad",
        "dataset_resampled",
        "lock_text_freeze_layer_norm",
        "save_most_recent",
    )
    if flags := [f"--{name.replace('_', '-')}" for name in names if getattr(config, name)]:
        world.say(f"{', '.join(flags)}: accepted, without effect (see --help)")
    if config.fsdp and world.world_size == 1:
        world.say("--fsdp: one process has nobody to split the model with, and trains it whole")


def note_default_model(config: TrainConfig, world: World) -> None:
    """Say that there are small models, where the default one would take hours on a CPU."""
    if world.device.type == "cpu" and config.train_data not in EMBEDDED:
        world.say(
            f"{config.model} is the default model, and a step of it takes many seconds without a GPU; --model ViT-glyphs is "
            "a small one, with --tokenizer train for a small vocabulary"
        )


def set_threads(config: TrainConfig, is_chosen: bool, world: World) -> TrainConfig:
    """Set how many threads of the CPU compute; return the settings with the number, or with None if it is to be measured.

    --threads decides, else OMP_NUM_THREADS of the first rank (which torchrun sets to 1 for several ranks of a machine), else
    what a resumed run began with, where this machine has as many to give.
    """
    if world.device.type != "cpu":
        if is_chosen and config.threads is not None:
            torch.set_num_threads(config.threads)
        return config

    most = most_threads(world.world_size, config.workers or 0)
    number, note = config.threads, None
    if not is_chosen and "OMP_NUM_THREADS" in os.environ:
        number = torch.get_num_threads()
        if config.threads not in (None, number):
            note = f"OMP_NUM_THREADS is {number}, where this run had {config.threads}"
    elif not is_chosen and number is not None and number > most:
        note = f"this run had {number} threads, and here it may have {most}"
        number = None
    if note is not None:
        world.say(f"{note}: sums may round otherwise than before (--threads N to choose)")

    number = broadcast_object(1 if number is None and most == 1 else number)
    torch.set_num_threads(number or most)
    return dataclasses.replace(config, threads=number)


def scheduled_lr(config: TrainConfig, step: int, num_steps: int, steps_per_epoch: int) -> float:
    """The learning rate of a step under the settings."""
    assert config.lr is not None and config.warmup is not None
    if config.skip_scheduler:
        return config.lr
    return learning_rate(
        step,
        schedule=config.lr_scheduler,
        lr_peak=config.lr,
        num_steps=num_steps,
        warmup_steps=config.warmup,
        cooldown_steps=(config.epochs_cooldown or 0) * steps_per_epoch,
        cooldown_end=config.lr_cooldown_end,
        cooldown_power=config.lr_cooldown_power,
    )


def is_due(count: int, every: int | None) -> bool:
    """Whether ``count`` is a multiple of ``every``; 0 and None mean never."""
    return bool(every) and count % (every or 1) == 0


def minutes_passed(since_s: float, minutes: float | None) -> bool:
    """Whether ``minutes`` have passed since the monotonic time ``since_s``; None means never."""
    return minutes is not None and time.monotonic() - since_s >= 60 * minutes


def describe_non_finite(step: int, found: Found, model: nn.Module, advice: str) -> str:
    """Return which tensor went bad first, in the order in which a step computes them, and the advice."""
    names = ("image_features", "text_features", "logit_scale", "logit_bias")
    suspects = dict(zip(names, (*found[1:3], *found.scalars), strict=False)) | {"loss": found.loss}
    parameters = dict(model.named_parameters())
    gradients = {f"gradient of {n}": p.grad for n, p in parameters.items() if p.grad is not None}
    # A bad weight explains everything after it, so that weights come first.
    ordered = {**parameters, **suspects, **gradients}
    # Of what is split, this rank's rows: the ranks may stop at different tensors, so that none may ask the others.
    bad = next((n for n, value in ordered.items() if not local_part(value).isfinite().all()), None)
    where = f"{bad} is the first tensor that is not finite" if bad else "it came from another rank"
    return f"the loss or a gradient of step {step + 1} is not finite; {where}. Nothing was updated; {advice}"


def resume_hint(run_dir: Path) -> str:
    """The command that continues a run."""
    return f"python -m clipcore.train --resume {run_dir}"


def describe(
    config: TrainConfig,
    model: CLIP,
    source: PairSource,
    world: World,
    num_steps: int,
    first_step: int,
    run_dir: Path,
) -> str:
    """What is about to happen, in a few lines."""
    image_m = sum(p.numel() for p in model.visual.parameters()) / 1e6
    all_m = sum(p.numel() for p in model.parameters()) / 1e6
    resumed = f", from step {first_step}" if first_step else ""
    return (
        f"{config.model}: {all_m:.1f} M parameters, {image_m:.1f} M of them in the image tower\n"
        f"{source.name}: {len(source):,} pairs; {config.epochs} epochs of batch "
        f"{config.global_batch_size} = {num_steps:,} steps{resumed}, "
        f"on {world.world_size} x {world.device.type}\n"
        f"writing to {run_dir}"
    )


@steady_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; mistakes of the user end in one line on standard error."""
    try:
        config, given = parse_command_line(arguments)
        world = init_distributed(config.device, config.timeout)
        with watchdog.report_failure():
            return train(config, given, world)
    except watchdog.RankError as error:
        rank = os.environ.get("RANK")
        complain("clipcore.train", f"rank {rank} ends: {error}")
        # At once: to take the group apart would wait for collectives that never end.
        os._exit(watchdog.EXIT_STATUS)
    except KeyboardInterrupt:
        # Before the first step: from there on a signal is noted, and the step in hand saved.
        with signal_ignored(signal.SIGINT):
            complain("clipcore.train", "stopped before the first step; there was nothing to save")
        return 128 + signal.SIGINT
    except NonFiniteError as error:
        complain("clipcore.train", f"stopped: {error}")
        return 1
    except VerificationError as error:
        complain("clipcore.train", f"stopped: {error}")
        return WRONG_GRADIENTS_STATUS
    except DataWaitError as error:
        complain("clipcore.train", f"stopped: {error}")
        return error.exit_status
    except WorkerLostError as error:
        complain("clipcore.train", f"stopped: {error}")
        return WORKER_LOST_STATUS
    except Exception as error:
        return end_with(
            "clipcore.train",
            error,
            "lower --step-memory or --micro-batch-size, or set --grad-checkpointing",
        )
    finally:
        close_distributed()


if __name__ == "__main__":
    sys.exit(main())
