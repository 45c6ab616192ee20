"""What a run is between two steps, how it goes into a checkpoint and comes back, and where runs live.

A run's folder holds config.json, metrics.jsonl, checkpoints/step_XXXXXXXX/, report.html, and a copy of the
vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipcore.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    TensorGroup,
    Writers,
    committed_names,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)
from clipcore.data.transforms import EARLIER_MAX_PIXELS, ImageTransform
from clipcore.files import is_file, is_folder, read_regular, write_durably
from clipcore.ranks.distributed import World, all_reduce_sum, broadcast_object, is_main
from clipcore.run.config import ConfigError, TrainConfig, flag_of
from clipcore.run.faults import first_fault
from clipcore.run.metrics import LogMark
from clipcore.run.optim import (
    ExponentialMovingAverage,
    load_optimizer_tensors,
    optimizer_tensors,
)
from clipcore.run.recipe import RunConfig
from clipcore.run.sharding import OwnRows, checkpoint_writers, gathered, is_sharded, own_parts
from clipcore.tokenizer import VOCABULARY_FILE, Tokenizer
from clipcore.towers.architectures import ModelConfig, is_finite_number, shortened
from clipcore.towers.descriptions import recorded_images
from clipcore.towers.model import CLIP, model_of, shape_differences

# What a run notes in a checkpoint, by name.
_RECORD: dict[str, type | tuple[type, ...]] = {
    "identity": dict,
    "evaluated_step": int,
    "bad_samples": int,
    "elapsed_s": (int, float),
    "timings": dict,
    "metrics_bytes": int,
    "scaler": dict,
}
# In newer checkpoints.
_OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "global_batch_size": int,
    "transparent": int,
    "metrics_sha256": str,
    "captions_sha256": str,
}
_SCALER_STATE = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
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
_STASH_CHOSEN_BY = frozenset({"global_batch_size", "step_memory", "precision", "device", "siglip"})


@dataclass
class RunState:
    """Everything that changes from step to step.

    Attributes:
        step: steps done.
        identity: what a checkpoint must share with the run that loads it: model, vocabulary, data.
        global_batch_size: pairs of a step, on all ranks; a checkpoint must share it too, since it counts in steps.
        captions_sha256: of the data, as of ``parts.captions_sha256``: it is known by this under another name.
        evaluated_step: the last step after which the evaluations of an epoch's end were made.
        bad_samples: replaced so far, on all ranks.
        transparent: pictures laid over white so far, on all ranks.
        elapsed_s: seconds of training so far, over all processes of the run.
        timings: seconds by part of the run.
        log_mark: the end of metrics.jsonl at the last checkpoint.
    """

    model: CLIP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ExponentialMovingAverage | None
    identity: dict[str, Any]
    global_batch_size: int
    captions_sha256: str | None = None
    step: int = 0
    evaluated_step: int = 0
    bad_samples: int = 0
    transparent: int = 0
    elapsed_s: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)
    log_mark: LogMark = field(default_factory=LogMark)

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the groups of tensors of a checkpoint."""
        # A sharded model's state_dict() brings back the split parameters, under which the optimizer keeps its state.
        groups: dict[str, Mapping[str, Tensor]] = {
            "model": self.model.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.model),
        }
        if self.ema is not None:
            groups["ema"] = self.ema.shadow
        return groups

    def save(self, run_dir: Path, keep: int) -> None:
        """Write the checkpoint of this step, and drop all but the newest ``keep`` (0 keeps all).

        Called by one rank; by all ranks together where the model is sharded.
        """
        record = {
            "identity": self.identity,
            "global_batch_size": self.global_batch_size,
            "captions_sha256": self.captions_sha256,
            "evaluated_step": self.evaluated_step,
            "bad_samples": self.bad_samples,
            "transparent": self.transparent,
            "elapsed_s": self.elapsed_s,
            "timings": self.timings,
            "metrics_bytes": self.log_mark.size,
            "metrics_sha256": self.log_mark.sha256,
            "scaler": self.scaler.state_dict(),
        }
        groups, writers = self.tensors(), Writers()
        if is_sharded(self.model):
            writers = checkpoint_writers(self.model)
            groups = {name: own_parts(group, writers.rank) for name, group in groups.items()}
        save_checkpoint(run_dir / "checkpoints", self.step, groups, record, keep or None, writers)

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the same run.

        Raises:
            CheckpointError: it belongs to another model, vocabulary or data set.
        """
        record = run_record(checkpoint)
        if (saved := record.get("global_batch_size")) not in (None, self.global_batch_size):
            raise CheckpointError(
                f"{checkpoint.path} counts its steps in global batches of {saved} pairs, and this run has "
                f"{self.global_batch_size}; leave --batch-size and --accum-freq out and choose --global-batch-size "
                f"{saved} again, or start anew with --pretrained"
            )
        for key, value in self.identity.items():
            if record["identity"].get(key) != value:
                raise CheckpointError(
                    f"{checkpoint.path} is of another {key}: {record['identity'].get(key)!r}, but this run has "
                    f"{value!r}; resume with the settings that wrote it, or start anew with --pretrained"
                )
        if self.ema is not None and "ema" not in checkpoint.tensors:
            raise CheckpointError(
                f"{checkpoint.path} holds no moving average; resume without --ema-decay"
            )
        groups = checkpoint.tensors
        _check_weights(checkpoint, "model", self.model.state_dict())
        if self.ema is not None:
            _check_weights(checkpoint, "ema", self.ema.shadow)
        # A loss scaler may have left out every step so far.
        if not groups["optimizer"] and checkpoint.step > 0 and not record["scaler"]:
            raise CheckpointError(
                f"{checkpoint.path} lacks the optimizer's moments; use another checkpoint of the run"
            )
        if is_sharded(self.model):
            groups = {name: OwnRows(group, self.model) for name, group in groups.items()}
        self.model.load_state_dict(groups["model"])
        load_optimizer_tensors(self.optimizer, self.model, groups["optimizer"])
        if self.ema is not None:
            self.ema.load(groups["ema"])
        # Empty where the run computed without one until now: the scaler then starts anew.
        if record["scaler"]:
            self.scaler.load_state_dict(record["scaler"])
        self.step = checkpoint.step
        self.evaluated_step = record["evaluated_step"]
        self.bad_samples = record["bad_samples"]
        transparent = record.get("transparent")  # not in older checkpoints
        self.transparent = transparent if isinstance(transparent, int) else 0
        self.elapsed_s = record["elapsed_s"]
        self.timings = dict(record["timings"])
        self.log_mark = log_mark(checkpoint)

    def first_fault(self) -> str | None:
        """Return which tensor, of weights, moments and average, no step can go on from, as the function of that name.

        Of a split tensor this rank's rows count. The loss scaler's factor counts as a tensor.
        """
        if self.scaler.is_enabled() and not 0 < self.scaler.get_scale() < math.inf:
            return f"the loss scaler's factor is {self.scaler.get_scale()}"
        return first_fault(self.tensors())

    def evaluated_model(self) -> CLIP:
        """Return the model to evaluate and to ship: the moving average where there is one.

        A sharded model gives a whole copy, made anew by all ranks together.
        """
        if is_sharded(self.model):
            return gathered(self.model, None if self.ema is None else self.ema.shadow)
        if self.ema is None:
            return self.model
        if not hasattr(self, "_averaged"):
            self._averaged = copy.deepcopy(self.model)
        self._averaged.load_state_dict(self.ema.shadow)
        return self._averaged


def _check_weights(checkpoint: Checkpoint, group: str, own: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless a group of a checkpoint has the names and shapes of a model's weights."""
    found = checkpoint.tensors[group]
    is_lazy = isinstance(found, TensorGroup)  # whose tensors are not read for their shapes
    shapes = {name: found.shape(name) if is_lazy else found[name].shape for name in found}  # type: ignore[attr-defined]
    if differing := shape_differences(shapes, {name: value.shape for name, value in own.items()}):
        raise CheckpointError(
            f"{checkpoint.path} is not of the model that it says: {', '.join(differing[:3])}; use another checkpoint of the "
            "run"
        )


def run_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a run noted in a checkpoint beside its tensors.

    Raises:
        CheckpointError: something that is read of it is missing or of another type.
    """
    record = checkpoint.state
    there = {key: kind for key, kind in _OPTIONAL.items() if record.get(key) is not None}
    for key, kind in (_RECORD | there).items():
        value = record.get(key)
        is_sound = not isinstance(value, int | float) or _is_count(value)
        if not isinstance(value, kind) or not is_sound:
            raise CheckpointError(
                f"{checkpoint.path} is not of a run: its {key} is {shortened(value)}"
            )
    scaler = record["scaler"]
    if scaler and not _is_scaler(scaler):
        raise CheckpointError(
            f"{checkpoint.path} is not of a run: its scaler is {shortened(scaler)}"
        )
    if not all(map(_is_count, record["timings"].values())):
        raise CheckpointError(f"{checkpoint.path} is not of a run: its timings are no numbers")
    if "model" not in checkpoint.tensors or "optimizer" not in checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.path} is not of a run: it lacks weights or moments")
    return record


def _is_count(value: object) -> bool:
    """Return whether a value is a number from 0 to what 63 bits hold."""
    return is_finite_number(value) and 0 <= value < 2**63  # type: ignore[operator]


def _is_scaler(state: Mapping[str, Any]) -> bool:
    """Return whether a loss scaler can go on from a state."""
    scale, growth, backoff, interval, tracker = (state.get(key) for key in _SCALER_STATE)
    factors = (scale, growth, backoff)
    for value in factors:
        # JSON's whole numbers may be beyond what a tensor is made of.
        most = 2**63 if isinstance(value, int) else torch.finfo(torch.float32).max
        if not is_finite_number(value) or not 0 < value < most:  # type: ignore[operator]
            return False
    counts = (interval, tracker)
    return all(type(v) is int and 0 <= v < 2**31 for v in counts) and interval != 0


def log_mark(checkpoint: Checkpoint) -> LogMark:
    """Return how far metrics.jsonl went at a checkpoint."""
    record = run_record(checkpoint)
    return LogMark(record["metrics_bytes"], record.get("metrics_sha256"))


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
        settings["loss_stash"] = None
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
    name = f"{stamp}-model_{model}-b_{config.global_batch_size}"
    return Path(config.logs) / (name if config.name is None else config.name)


def write_config(run_dir: Path, config: TrainConfig) -> None:
    """Write the settings as config.json in the run's folder, and beside them which launch writes there."""
    text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    write_durably(run_dir / CONFIG_FILE, text.encode())
    write_durably(run_dir / LAUNCH_FILE, (launch_id() or "").encode())


def load_run(
    path: Path, device: str | torch.device = "cpu"
) -> tuple[CLIP, ImageTransform, Tokenizer]:
    """Return the model of a run or of one of its checkpoints, in evaluation mode, with its preprocessing and tokenizer.

    A run gives its newest checkpoint; weights are the moving average where the run kept one.

    Raises:
        CheckpointError: no loadable checkpoint there, or its vocabulary is not to be found.
    """
    checkpoint, run_dir = open_run(path)
    identity = run_record(checkpoint)["identity"]
    tokenizer = Tokenizer.from_file(run_dir / VOCABULARY_FILE)
    if tokenizer.sha256 != identity.get("vocabulary"):
        raise CheckpointError(
            f"{run_dir / VOCABULARY_FILE} is not the vocabulary that {checkpoint.path} was trained with"
        )
    groups = checkpoint.tensors
    try:
        config = ModelConfig.from_dict(identity.get("model"))
        weights = dict(groups["ema" if "ema" in groups else "model"])
        model = model_of(config, weights, str(checkpoint.path)).to(device)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path} cannot be made a model: {error}") from error
    tokenizer.context_length = model.context_length
    model.set_images(recorded_images(identity, checkpoint.path))
    transform = ImageTransform(model.visual.image_size, is_train=False, **model.images)
    return model.eval(), transform, tokenizer
