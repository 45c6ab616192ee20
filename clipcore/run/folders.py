"""Where runs live, how one is found again, and the settings in its folder.

A run's folder holds config.json, metrics.jsonl, checkpoints/step_XXXXXXXX/, report.html, and copies of the vocabulary and,
if a file described it, of the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from clipcore.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    committed_names,
    load_checkpoint,
    load_latest,
)
from clipcore.data.transforms import EARLIER_MAX_PIXELS
from clipcore.files import is_file, is_folder, read_regular, write_durably
from clipcore.ranks.distributed import World, all_reduce_sum, broadcast_object, is_main
from clipcore.run.config import ConfigError, TrainConfig, flag_of
from clipcore.run.recipe import RunConfig
from clipcore.towers.architectures import MODEL_FILE, described_in, find_model, is_model_file

_MAX_CONFIG_BYTES, _MAX_NOTE_BYTES = 1 << 22, 1 << 12
CONFIG_FILE, LAUNCH_FILE = "config.json", ".launch"
# What each launch decides for itself; the process group has its timeout already when a run is resumed.
LAUNCH_SETTINGS = frozenset({"logs", "name", "resume", "new_log", "timeout", "profile"})
# What says which run is meant, and nothing of what it is.
_RUN_NAMING_SETTINGS = frozenset({"logs", "name", "resume", "new_log"})

# A change of these makes a new plan of the step's memory, and a new choice of what the loss's stash may take.
_PLANNED_BY = frozenset(
    {"step_memory", "loss_stash", "loss_workspace", "precision", "grad_checkpointing", "device"}
)
# Not ``batch_size``: a launch that says the same batch in open_clip's words has to keep its bits.
_STASH_CHOSEN_BY = frozenset(
    {"global_batch_size", "step_memory", "loss_stash", "precision", "device", "siglip"}
)


def find_run(
    config: TrainConfig, launch: str | None, print_line: Callable[[str], None]
) -> Path | None:
    """Return the folder of the run that ``--name`` or ``--resume`` names, None for a new run.

    ``--resume latest`` without a name is the run that this launch has begun, else the one whose newest checkpoint was
    written last, whether that can be read or not.

    Args:
        launch: as of ``launch_id``.
        print_line: called with a note on each folder that was passed over.
    """
    logs = Path(config.logs)
    if config.resume not in (None, "latest"):
        return run_folder(Path(config.resume))
    if config.name:
        return logs / config.name
    if config.resume is None:
        return None
    return _run_of_launch(logs, launch, print_line) or _newest_run(logs, print_line)


def check_run_is_there(config: TrainConfig, given: frozenset[str], run_dir: Path | None) -> None:
    """Raise ConfigError where ``--resume latest`` is all that was said and there is nothing to resume.

    Beside settings it begins the run that they are of, so that the first launch may have the command of all.

    Args:
        given: the names of the settings that the user gave.
        run_dir: what ``find_run`` has found.
    """
    if config.resume != "latest" or given - _RUN_NAMING_SETTINGS:
        return
    if run_dir is not None and (
        is_file(run_dir / CONFIG_FILE) or committed_names(run_dir / "checkpoints")
    ):
        return
    looked = f"no folder in {config.logs} holds a checkpoint (a run without one is found by --name)"
    if run_dir is not None:
        looked = f"{run_dir} holds neither a checkpoint nor a {CONFIG_FILE}"
    raise ConfigError(
        f"--resume latest finds no run to resume: {looked}; name the folder of all runs with --logs, or give the settings "
        "of a run to begin"
    )


def find_checkpoint(config: TrainConfig, run_dir: Path, world: World) -> Checkpoint | None:
    """Return the checkpoint that a run begins from, the same on all ranks; None at its beginning.

    ``--resume latest`` takes the newest whole one of the run, and begins where there was never any, so that a job script can
    always pass it.

    Raises:
        ConfigError: the run exists and is not resumed.
        CheckpointError: the path that was given holds no loadable checkpoint, all of a run are damaged, or ranks found
            different ones.
    """
    checkpoint = _find_checkpoint(config, run_dir, world)
    step = checkpoint.step if checkpoint is not None else 0
    first = broadcast_object(step)
    if (num_others := int(all_reduce_sum([float(step != first)])[0])) > 0:
        raise CheckpointError(
            f"{num_others} of {world.world_size} ranks do not find the checkpoint of step {first} that rank 0 finds; "
            "--logs has to be a folder that all machines share"
        )
    return checkpoint


def _find_checkpoint(config: TrainConfig, run_dir: Path, world: World) -> Checkpoint | None:
    """Return what this rank finds."""
    directory = run_dir / "checkpoints"
    if config.resume is None:
        if committed_names(directory):
            raise ConfigError(
                f"the run {run_dir} has checkpoints already; continue it with --resume latest or choose another --name"
            )
        return None
    if config.resume != "latest":
        return open_run(Path(config.resume))[0]
    checkpoint = load_latest(directory, lazily=True)
    if checkpoint is None:
        world.print(f"--resume latest: no checkpoint in {run_dir} yet, starting from the beginning")
    return checkpoint


def run_folder(path: Path) -> Path:
    """Return the folder of a run, given that or one of its checkpoints.

    Raises:
        CheckpointError: it is neither.
    """
    if is_folder(path / "checkpoints") or is_file(path / CONFIG_FILE):
        return path
    if not is_folder(path):
        raise CheckpointError(f"{path} does not exist")
    folder = path.absolute().parent
    if not is_file(path / MANIFEST) or folder.name != "checkpoints":
        raise CheckpointError(
            f"{path} is neither the folder of a run nor a checkpoint in its folder checkpoints"
        )
    return folder.parent


def is_run(path: Path) -> bool:
    """Return whether a folder is that of a run with checkpoints, or one of them."""
    if not is_folder(path):
        return False
    return bool(committed_names(path / "checkpoints")) or is_file(path / MANIFEST)


def open_run(path: Path) -> tuple[Checkpoint, Path]:
    """Return the checkpoint at ``path``, or the newest of the run there, and the run's folder.

    Tensors are read when they are asked for.

    Raises:
        CheckpointError: neither is there.
    """
    if run_folder(path) != path:
        return load_checkpoint(path, lazily=True), run_folder(path)
    checkpoint = load_latest(path / "checkpoints", lazily=True)
    if checkpoint is None:
        raise CheckpointError(
            f"{path} has no checkpoint yet; give a run that has, or one of its checkpoints"
        )
    return checkpoint, path


def launch_id() -> str | None:
    """Return a name of the torchrun that started this process, the same after a restart; None without torchrun."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return run and f"{run} {socket.gethostname()} {os.getppid()}"


def is_restart(run_dir: Path) -> bool:
    """Return whether this launch has begun the run of that folder already, the same on all ranks: torchrun has started its
    processes anew, which go on with the settings and the plan of their predecessors."""
    note, launch = run_dir / LAUNCH_FILE, launch_id()
    is_begun = is_main() and launch and is_file(note) and _read_note(note) == launch.encode()
    return bool(broadcast_object(is_begun))


def _read_note(note: Path) -> bytes:
    return read_regular(note, _MAX_NOTE_BYTES)


def _run_of_launch(
    logs: Path, launch: str | None, print_line: Callable[[str], None]
) -> Path | None:
    """Return the run under ``logs`` that a launch has begun last, as ``write_config`` noted it."""
    begun: dict[Path, int] = {}
    if launch is None:
        return None
    for path in _folders(logs):
        note = path / LAUNCH_FILE
        try:
            if is_file(note) and _read_note(note) == launch.encode():
                begun[path] = note.stat().st_mtime_ns
        except OSError as error:
            # Such as a run of another user.
            print_line(f"--resume latest: passed over {path}: {error.strerror}")
    return max(begun, key=begun.__getitem__) if begun else None


def _newest_run(logs: Path, print_line: Callable[[str], None]) -> Path | None:
    """Return the run under ``logs`` whose newest checkpoint was written last, be it damaged."""
    written: dict[Path, int] = {}
    for path in _folders(logs):
        try:
            for name in committed_names(path / "checkpoints"):
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile by its own run
                    time_ns = (path / "checkpoints" / name).stat().st_mtime_ns
                    written[path] = max(time_ns, written.get(path, 0))
        except (CheckpointError, OSError) as error:
            print_line(f"--resume latest: passed over {path}: {error}")
    return max(written, key=written.__getitem__) if written else None


def _folders(logs: Path) -> list[Path]:
    """Return the folders in the folder of all runs; none where that is not there yet."""
    try:
        return sorted(logs / name for name in os.listdir(logs) if is_folder(logs / name))
    except FileNotFoundError:
        return []


def resumed_config(
    run_dir: Path, config: TrainConfig, given: frozenset[str], world: World
) -> TrainConfig:
    """Return the settings of a run to resume, overlaid with those that the user gives; print each difference."""
    path = run_dir / CONFIG_FILE
    try:
        saved = json.loads(read_regular(path, _MAX_CONFIG_BYTES))
        if not isinstance(saved, dict):
            raise ValueError(f"it holds a {type(saved).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"cannot read the settings of the run to resume, {path}: {error}; put the file back, or begin a new run of the "
            "same settings from its weights with --pretrained"
        ) from error
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    settings: dict[str, Any] = {"max_pixels": EARLIER_MAX_PIXELS}
    settings |= {name: value for name, value in saved.items() if name in known}
    settings["model"] = described_in(run_dir, settings.get("model"))
    again = {n: getattr(config, n) for n in sorted(given - LAUNCH_SETTINGS)}
    changed = {name for name, value in again.items() if settings.get(name) != value}
    for name in sorted(changed):
        world.print(f"{flag_of(name)} was {settings.get(name)} in this run, now {again[name]}")
    # The plan was made for other memory; a micro-batch that is given holds, and only what to keep beside it is open.
    open_plan = {"micro_batch_size": None, "keep_graphs": None}
    if given & {"batch_size", "accum_freq"}:
        settings |= {"global_batch_size": None, **open_plan}
    elif changed & _PLANNED_BY:
        settings |= open_plan
    elif "micro_batch_size" in changed:
        settings["keep_graphs"] = None
    # Nor was the budget of the loss's stash chosen for this.
    if changed & _STASH_CHOSEN_BY:
        settings["gpu_stash_bytes"] = None
    # The optimizer's settings are of a model, unless they are given again.
    if "model" in changed:
        settings |= dict.fromkeys(("beta1", "beta2", "eps"))
    # Nor was the number of threads measured for this.
    if changed & {"device", "workers"}:
        settings["threads"] = None
    settings |= again
    own = {name: getattr(config, name) for name in LAUNCH_SETTINGS}
    try:
        return TrainConfig(**{**settings, **own})
    except ConfigError as error:
        raise ConfigError(
            f"{error}; the run's settings are in {path}: put them back as they were, or give the flag again"
        ) from error


def new_run_dir(config: RunConfig) -> Path:
    """Return the folder of a new run, named by date, model and batch where the user gives no name."""
    stamp = datetime.now().strftime("%Y_%m_%d-%H_%M_%S")
    model = config.model.replace("/", "-")
    if is_model_file(config.model):
        model = Path(config.model).stem
    name = f"{stamp}-model_{model}-b_{config.global_batch_size}"
    return Path(config.logs) / (name if config.name is None else config.name)


def write_config(run_dir: Path, config: RunConfig) -> None:
    """Write the settings as config.json in the run's folder, and beside them which launch writes there.

    If a file described the model, the run gets a description of its own, so that it does not need that file again.
    """
    if is_model_file(config.model):
        described = json.dumps(find_model(config.model).to_dict(), indent=2) + "\n"
        write_durably(run_dir / MODEL_FILE, described.encode())
    text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    write_durably(run_dir / CONFIG_FILE, text.encode())
    write_durably(run_dir / LAUNCH_FILE, (launch_id() or "").encode())
