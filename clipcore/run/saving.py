"""When a run saves its state, and how its log goes on from a checkpoint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from clipcore.checkpoint import Checkpoint, latest_checkpoint, step_name
from clipcore.data.remote import RemoteError
from clipcore.ranks.distributed import World
from clipcore.ranks.signals import DataWaitError
from clipcore.run.config import TrainConfig
from clipcore.run.faults import NonFiniteError, check_sound, resume_hint
from clipcore.run.metrics import LogError, LogMark, MetricsLogger, compare_log, set_log_aside
from clipcore.run.state import RunState, log_mark


def is_due(count: int, every: int | None) -> bool:
    """Return whether ``count`` is a multiple of ``every``; 0 and None mean never."""
    return every is not None and every > 0 and count % every == 0


def minutes_passed(since_s: float, minutes: float | None) -> bool:
    """Return whether ``minutes`` have passed since the monotonic time ``since_s``; None means never."""
    return minutes is not None and time.monotonic() - since_s >= 60 * minutes


def save(state: RunState, run_dir: Path, config: TrainConfig, log: MetricsLogger) -> None:
    """Save the state as it is; by all ranks together where the model is split, else by the main one."""
    state.elapsed_s, state.log_mark = log.elapsed_s, log.sync()
    state.save(run_dir, config.keep_checkpoints)


@contextlib.contextmanager
def saved_when_data_stops(
    state: RunState, run_dir: Path, config: TrainConfig, log: MetricsLogger, num_steps: int
) -> Iterator[None]:
    """Save the last whole step where data stops to come, unless it is saved, and say how to go on.

    A wait for data is given up only by a run of one process. Of several, the main one saves when a network fails it,
    unless each has a part of the model.
    """
    first_step = state.step
    try:
        yield
    except (DataWaitError, RemoteError) as error:
        if isinstance(error, RemoteError) and (config.fsdp or not log.writes):
            raise
        newest = latest_checkpoint(run_dir / "checkpoints")
        is_saved = newest is not None and newest.name == step_name(state.step)
        if state.step > first_step and not is_saved:
            check_sound(
                state.first_fault(), run_dir, f"step {state.step} was not saved", NonFiniteError
            )
            save(state, run_dir, config, log)
        if state.step > 0:
            log.print(f"saved step {state.step} of {num_steps}; go on with: {resume_hint(run_dir)}")
        else:
            log.print("there was no step to save")
        raise


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
        world.print(f"--new-log: metrics.jsonl begins behind step {checkpoint.step}{kept}")
        return LogMark()
    return mark
