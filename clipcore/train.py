"""The training run, read from top to bottom: ``python -m clipcore.train``.

Settings, data, model, optimizer, resume, then one loop, and the report at the end. The state of a run is (weights, moments,
moving average, step). The order of the data, the crops and the dropout are functions of the seed and the step, so that a
run continues bit for bit from any of its checkpoints.

Exit status:
    0: done
    1: stopped by a loss, gradient or weight that is not finite
    2: an error in the settings or the data, a file that cannot be read or written, or too little memory
    3: another rank died, or kept the others waiting for longer than ``--timeout``
    4: stopped, after saving a checkpoint, because a data loader process was killed
    5: ``--verify-gradients`` met gradients that are not those of the loss
    70: a fault of clipcore's own
    128 + n: stopped by signal n, after saving a checkpoint
"""

from __future__ import annotations

from clipcore.run.command_line import check_command_line, parse_command_line
from clipcore.terminal import answer_early, complain, steady_output

if __name__ == "__main__":
    answer_early(check_command_line)

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from clipcore import native
from clipcore.checkpoint import CheckpointError, make_newest, run_lock
from clipcore.data import WorkerLostError
from clipcore.data.transforms import ImageTransform
from clipcore.evaluate.tasks import EvaluationPlan
from clipcore.export.interpolations import START_FOLDER, keep_start, write_interpolations
from clipcore.files import is_file, make_directory
from clipcore.ranks import watchdog
from clipcore.ranks.distributed import (
    World,
    all_reduce_sum,
    barrier,
    broadcast_object,
    broadcast_tensors,
    close_distributed,
    init_distributed,
)
from clipcore.ranks.failures import end_with
from clipcore.ranks.signals import DATA_WAIT_S, REPEAT_S, DataWaitError, Interrupt, signal_ignored
from clipcore.report.collect import report_run
from clipcore.run import memory
from clipcore.run.collapse import CollapseWatch
from clipcore.run.config import ConfigError, TrainConfig, wise_alphas
from clipcore.run.duration import hours_note
from clipcore.run.faults import (
    NonFiniteError,
    check_sound,
    describe_non_finite,
    remedy,
    resume_hint,
    shared_sound_checkpoint,
)
from clipcore.run.folders import (
    CONFIG_FILE,
    check_run_is_there,
    find_checkpoint,
    find_run,
    is_restart,
    launch_id,
    new_run_dir,
    resumed_config,
    write_config,
)
from clipcore.run.metrics import LogMark, MetricsLogger, PartClock, read_metrics
from clipcore.run.optim import (
    ExponentialMovingAverage,
    build_optimizer,
    clipped_step,
    gradient_norm,
    layer_rates,
)
from clipcore.run.parts import (
    adapt,
    augmentation,
    build_loader,
    build_loss,
    build_model,
    build_tokenizer,
    captions_sha256,
    check_compiler,
    identity_of,
    lock_towers,
    name_of_data,
    open_training_source,
    tower_widths,
    with_size_of,
)
from clipcore.run.profile import PROFILE_FOLDER, StepProfile, check_long_enough
from clipcore.run.recipe import finetune_note, resolve, warmup_steps
from clipcore.run.saving import (
    continue_log,
    is_due,
    minutes_passed,
    save,
    saved_when_data_stops,
)
from clipcore.run.setup import (
    describe,
    make_deterministic,
    note_without_effect,
    open_log,
    prepare_steps,
)
from clipcore.run.sharding import replicate, shard
from clipcore.run.state import RunState
from clipcore.run.teacher import build_teacher
from clipcore.run.threads import set_threads
from clipcore.run.train_step import TrainingStep
from clipcore.run.verify import VerificationError
from clipcore.towers.lora import ADAPTER_FOLDER, write_adapter

WORKER_LOST_STATUS = 4
WRONG_GRADIENTS_STATUS = 5
_STATUS: dict[type[Exception], int] = {
    NonFiniteError: 1,
    WorkerLostError: WORKER_LOST_STATUS,
    VerificationError: WRONG_GRADIENTS_STATUS,
}


def train(config: TrainConfig, given: frozenset[str], world: World) -> int:
    """Make one run, from its settings to its report; return the exit status.

    Args:
        given: the names of the settings that the user gave, which win over those of a resumed run.
    """
    on_several_gpus = world.device.type == "cuda" and world.world_size > 1
    if (note := native.left_out(on_several_gpus)) is not None:
        world.print(note)

    if config.resume is None:
        resolve(config, world.world_size)  # so that a mistake in the settings ends all ranks alike
    with contextlib.ExitStack() as stack:
        run_dir = None
        if world.is_main:
            run_dir = find_run(config, launch_id(), world.print)
            check_run_is_there(config, given, run_dir)
            run_dir = run_dir or new_run_dir(resolve(config, world.world_size))
            make_directory(run_dir)
            # Before anything in it is read: another run that is still writing there could commit a step behind our back.
            stack.enter_context(run_lock(run_dir))
        return train_in(Path(broadcast_object(str(run_dir))), config, given, world)


def train_in(run_dir: Path, given_config: TrainConfig, given: frozenset[str], world: World) -> int:
    """Make one run in its folder, which no other run writes to; arguments and result as of ``train``."""
    # Settings
    checkpoint = find_checkpoint(given_config, run_dir, world)
    is_latest = given_config.resume == "latest"
    has_settings = world.is_main and is_latest and is_file(run_dir / CONFIG_FILE)
    is_begun = checkpoint is not None or broadcast_object(has_settings) or is_restart(run_dir)
    if is_begun:
        given_config = resumed_config(run_dir, given_config, given, world)
    config = resolve(given_config, world.world_size)
    note_without_effect(config, world)
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
    config = with_size_of(tokenizer, config, world.print)

    # Model
    is_split = config.fsdp and world.world_size > 1
    torch.manual_seed(config.seed)
    # A model that is split is made on the CPU: whole, it may not fit a GPU.
    device = torch.device("cpu") if is_split else world.device
    model = build_model(config, tokenizer.vocab_size, checkpoint, device, world.print)
    size = model.visual.image_size
    transform = ImageTransform(size, is_train=True, **model.images, **augmentation(config))
    eval_transform = ImageTransform(size, is_train=False, **model.images)
    tokenizer.context_length = model.context_length
    if config.wise_alpha is not None or config.lora_rank is not None:
        keep_start(model, tokenizer, run_dir, world, checkpoint is None)
    teacher = build_teacher(config, model, tokenizer, world.device)
    lock_towers(model, config)
    adapt(model, config, None if checkpoint is None else run_dir / START_FOLDER)
    model.set_grad_checkpointing(config.grad_checkpointing)
    if is_split:
        shard(model, world)

    # Order and length
    loader = build_loader(config, source, transform, tokenizer, world, model.ignores_padding)
    num_samples = len(source) if config.train_num_samples is None else config.train_num_samples
    # An epoch has whole batches only.
    steps_per_epoch = num_samples // config.global_batch_size
    if not steps_per_epoch:
        raise ConfigError(
            f"--train-num-samples {config.train_num_samples} is less than one batch of {config.global_batch_size}; "
            "raise it or lower --global-batch-size"
        )
    num_steps = config.epochs * steps_per_epoch
    # A resumed run has the warm-up that it began with, whether from the user or cut from the recipe's.
    warmup = warmup_steps(config, "warmup" in given or is_begun, num_steps)
    config = dataclasses.replace(config, warmup=warmup, name=run_dir.name)
    if note := finetune_note(given_config, config, "warmup" in given or is_begun):
        world.print(note)

    # Optimizer
    optimizer = build_optimizer(
        model,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.wd,
        moments=config.adam_moments,
        seed=config.seed,
        rates=layer_rates(model, config.image_layer_decay, config.text_layer_decay),
    )
    ema = ExponentialMovingAverage(model, config.ema_decay) if config.ema_decay else None
    precision = config.precision_on(world.device.type)
    # Without a factor on the loss, float16 gradients underflow.
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "amp")

    # Resume
    digest = captions_sha256(source)
    data = name_of_data(source, digest, checkpoint, world.print)
    identity = identity_of(model, tokenizer, data, config.image_decoder)
    state = RunState(model, optimizer, scaler, ema, identity, config.global_batch_size, digest)
    begun_from = None
    if checkpoint is not None:
        begun_from = checkpoint.path
        state.load(checkpoint)
        state.log_mark = mark
        cause = f"{checkpoint.path} cannot be resumed from"
        check_sound(state.first_fault(), run_dir, cause, CheckpointError)
    del checkpoint  # its files stay open, and on the disk, for as long as it is there
    if config.profile:
        check_long_enough(num_steps - state.step)

    # Step
    if config.torchcompile:
        check_compiler(world.device)
    training = TrainingStep(
        model=model,
        loss_fn=build_loss(config, world, config.global_batch_size),
        world=world,
        precision=precision,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        scale_loss=scaler.scale,
        micro_batch_size=config.micro_batch_size,
        num_kept_graphs=config.keep_graphs,
        with_ids=config.duplicate_captions != "negative",
        teacher=teacher,
    )
    if world.world_size > 1 and not is_split:
        with watchdog.collective("comparison of the models"):
            training.reduced = replicate(model)
    evaluations = EvaluationPlan(config, world, tokenizer, eval_transform)

    with contextlib.ExitStack() as stack:
        # Files, log and signals
        if world.is_main:
            if begun_from is not None:
                make_newest(begun_from)
            write_config(run_dir, config)
            tokenizer.save(run_dir / tokenizer.file_name)
        is_alone = world.world_size == 1
        interrupt = stack.enter_context(
            Interrupt(0.0 if is_alone else REPEAT_S, DATA_WAIT_S if is_alone else None)
        )
        log = stack.enter_context(open_log(config, state, run_dir, num_steps, world))
        log.print(describe(config, model, source, world, num_steps, state.step, run_dir))
        for line in evaluations.describe_sources(source):
            log.print(line)
        if note := hours_note(config, model, num_steps - state.step, world):
            log.print(note)
        watch = CollapseWatch(
            config.global_batch_size,
            config.siglip,
            0 if config.skip_scheduler else config.warmup,
            config.grad_clip_norm is not None,
            teacher is not None,
        )
        earlier = read_metrics(run_dir)[0] if log.writes and state.step else []
        if note := watch.see_all(earlier):
            log.print(note)

        # Before the first step
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

        # Steps are counted from 0 here; the state, the log and all messages count the steps done.
        for step_index in range(first_step, num_steps):
            watchdog.at_step(step_index + 1)
            profiled.begin_step()

            # Batch
            lost = ""
            try:
                batch = next(batches)
            except WorkerLostError as error:
                # Its text alone: the error holds this frame, and with it the process group, beyond the end of the run.
                lost = str(error)
                # Saved before this process, whose memory may be short too, reads the batch, and all ranks finish the step.
                is_whole = world.is_main and not is_split and step_index > first_step
                if is_whole and state.first_fault() is None:
                    save(state, run_dir, config, log)
                batch = loader.batch(step_index)
            clock.charge("data")
            if step_index == first_step:
                try:
                    config = prepare_steps(training, batch, step_index, config, run_dir, log)
                except ConfigError:
                    # Ctrl-C reaches a compiler's processes too, and it fails for that alone.
                    if interrupt.signal_number:
                        raise KeyboardInterrupt from None
                    raise
                clock.charge("plan")

            # Gradients
            lr = config.learning_rate(step_index, num_steps, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_rate"]
            output = training.gradients(batch, step_index, clock.charge, log.progress)
            scaler.unscale_(optimizer)
            grad_norm = gradient_norm(model.parameters())  # of the whole model, before clipping
            clock.charge("backward")

            # Agree: one small all-reduce, so that every rank decides alike to update, to stop, to save.
            # In one transfer, since the host waits for the device here; a float64 holds both numbers exactly.
            loss, norm = torch.stack([output.loss.double(), grad_norm.double()]).tolist()
            # A gradient that overflows under a loss scaler is no fault: the scaler leaves the update out.
            is_finite = math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled())
            is_late = minutes_passed(saved_at, config.save_every_minutes)
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
                    loss / world.world_size,
                    not is_finite,
                    len(batch.bad),
                    batch.num_transparent,
                    interrupt.signal_number > 0,
                    bool(lost),
                    world.is_main and is_late,
                ]
            )
            if num_broken:
                advice = remedy(run_dir, shared_sound_checkpoint(run_dir))
                raise NonFiniteError(describe_non_finite(step_index, output, model, advice))

            # Update
            clipped_step(optimizer, scaler, model.parameters(), grad_norm, config.grad_clip_norm)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            model.clamp_logit_scale_()
            if ema is not None:
                ema.update(model, step_index)
            clock.charge("optimizer")

            # Log
            state.step += 1
            state.bad_samples += int(num_bad)
            if num_transparent and not state.transparent:
                log.print(f"step {state.step}: transparent pictures are laid over white")
            state.transparent += int(num_transparent)
            for key, reason in batch.bad:
                log.print(f"step {state.step}: replaced {key}: {reason}")
            row = {
                "step": state.step,
                "epoch": round(state.step / steps_per_epoch, 4),
                "loss": mean_loss,
                "lr": lr,
                "logit_scale": model.logit_scale.exp().item(),  # of the updated model: the host waits again
                "grad_norm": norm,
                "bad_samples": state.bad_samples,
            }
            log.step(row, num_pairs=config.global_batch_size, every=config.log_every_n_steps)
            if note := watch.see(state.step, mean_loss, norm):
                log.print(note)
            del batch, output  # which may be large, before the next are there
            if note := profiled.end_step():
                log.print(note)
                clock.charge("profile")

            # Save, evaluate, stop
            epoch, into_epoch = divmod(state.step, steps_per_epoch)
            is_last = state.step == num_steps
            is_stopping = num_signalled + num_lost > 0
            should_save = any(
                (
                    is_last,
                    is_stopping,
                    num_late > 0,
                    into_epoch == 0 and is_due(epoch, config.save_frequency),
                    is_due(state.step, config.save_every_steps),
                )
            )
            if should_save:
                consequence = f"step {state.step} was not saved"
                check_sound(state.first_fault(), run_dir, consequence, NonFiniteError)
                if world.is_main or is_split:
                    save(state, run_dir, config, log)
                saved_at = time.monotonic()
                clock.charge("checkpoint")
            # After the checkpoint, so that what goes wrong in an evaluation costs no training; a resumed run makes up for
            # one that was not made, and a signal leaves no time for it.
            if into_epoch == 0 and not is_stopping:
                evaluate_epoch(state, evaluations, log, epoch, is_last)
                clock.charge("evaluation")
            if is_stopping:
                if lost:
                    complain("clipcore.train", f"stopped: {lost}")
                log.print(
                    f"saved step {state.step} of {num_steps}; go on with: {resume_hint(run_dir)}"
                )
                status = WORKER_LOST_STATUS if num_lost else interrupt.exit_status
                break
        else:
            write_interpolations(
                state, evaluations, tokenizer, log, run_dir, wise_alphas(config), config.epochs
            )
            if config.lora_rank is not None and world.is_main:
                make_directory(run_dir / ADAPTER_FOLDER)
                write_adapter(model, run_dir / ADAPTER_FOLDER, str(run_dir / START_FOLDER))
                log.print(f"adapter: {run_dir / ADAPTER_FOLDER}")
            report_run(run_dir, config, state, evaluations, source, log, watch)
            status = 0
    # All leave together: when the first process ends, torchrun stops the others, rank 0 in its checkpoint if need be.
    barrier()
    return status


def evaluate_epoch(
    state: RunState, evaluations: EvaluationPlan, log: MetricsLogger, epoch: int, is_last: bool
) -> None:
    """Make the evaluations that are due after ``epoch`` epochs, and note that they are made."""
    model = state.evaluated_model()
    # BatchNorm's statistics are each rank's own after a step; the checkpoint has rank 0's.
    broadcast_tensors(model.buffers())
    with log.whole_or_nothing():
        evaluations.run(model, log, state.step, epoch, is_last)
    state.evaluated_step = state.step


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
    except (NonFiniteError, VerificationError, WorkerLostError, DataWaitError) as error:
        complain("clipcore.train", f"stopped: {error}")
        return error.exit_status if isinstance(error, DataWaitError) else _STATUS[type(error)]
    except Exception as error:
        return end_with(
            "clipcore.train",
            error,
            "lower --step-memory or --micro-batch-size, or set --loss-stash 0 or --grad-checkpointing",
        )
    finally:
        close_distributed()


if __name__ == "__main__":
    sys.exit(main())
