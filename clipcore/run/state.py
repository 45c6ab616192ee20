"""What a run is between two steps, and how it goes into a checkpoint and comes back."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipcore.checkpoint import (
    Checkpoint,
    CheckpointError,
    TensorGroup,
    Writers,
    save_checkpoint,
)
from clipcore.data.transforms import ImageTransform
from clipcore.run.faults import first_fault
from clipcore.run.folders import open_run
from clipcore.run.metrics import LogMark
from clipcore.run.optim import (
    ExponentialMovingAverage,
    load_optimizer_tensors,
    optimizer_tensors,
)
from clipcore.run.sharding import OwnRows, checkpoint_writers, gathered, is_sharded, own_parts
from clipcore.tokenizer import Tokenizer, open_vocabulary, vocabulary_of_run
from clipcore.towers.architectures import ModelConfig, is_finite_number, shortened
from clipcore.towers.descriptions import recorded_images
from clipcore.towers.loading import model_of, shape_differences
from clipcore.towers.lora import adapter_of, load_adapter, merged
from clipcore.towers.model import CLIP

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
        # Readers of a checkpoint get whole weights, and a run that goes on what it trains.
        if adapter := adapter_of(self.model):
            groups |= {"model": merged(self.model).state_dict(), "adapter": adapter}
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
        adapter = adapter_of(self.model)
        if ("adapter" in groups) != bool(adapter):
            raise CheckpointError(
                f"{checkpoint.path} is of a run {'with' if 'adapter' in groups else 'without'} --lora-rank; resume with the "
                "settings that wrote it, or start anew with --pretrained"
            )
        if not adapter:
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
        if adapter:
            load_adapter(self.model, groups["adapter"])
        else:
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
        if adapter_of(self.model):
            return merged(self.model)
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
    groups, path = checkpoint.tensors, vocabulary_of_run(run_dir)
    try:
        config = ModelConfig.from_dict(identity.get("model"))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path} cannot be made a model: {error}") from error
    tokenizer = open_vocabulary(path, config.text)
    if tokenizer.sha256 != identity.get("vocabulary"):
        raise CheckpointError(
            f"{path} is not the vocabulary that {checkpoint.path} was trained with"
        )
    try:
        weights = dict(groups["ema" if "ema" in groups else "model"])
        model = model_of(config, weights, str(checkpoint.path)).to(device)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path} cannot be made a model: {error}") from error
    tokenizer.context_length = model.context_length
    model.set_images(recorded_images(identity, checkpoint.path))
    transform = ImageTransform(model.visual.image_size, is_train=False, **model.images)
    return model.eval(), transform, tokenizer
