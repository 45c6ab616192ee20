"""Numbers that no run can go on from: which tensor they are in, the newest checkpoint without them, and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from clipcore.checkpoint import CheckpointError, committed, load_checkpoint
from clipcore.ranks.distributed import broadcast_object, gather_objects, is_main
from clipcore.run.grad_cache import StepOutput
from clipcore.run.optim import local_part


class NonFiniteError(RuntimeError):
    """The loss, a gradient or the state is not finite; the message names the step and the first bad tensor."""


def first_fault(groups: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that no training can go on from, and why; None if there is none.

    A tensor is at fault if an element is not finite, or if it is a second moment or a count of steps and negative, whose
    root or power makes the next update not finite. The device is waited for once, unless there is a fault.
    """
    tensors = {
        f"{group}: {name}": local_part(value)
        for group, named in groups.items()
        for name, value in named.items()
        if value.is_floating_point()
    }
    checks = {name: _is_sound(name, value) for name, value in tensors.items()}
    by_device: dict[torch.device, list[Tensor]] = {}
    for check in checks.values():
        by_device.setdefault(check.device, []).append(check)
    if all(bool(torch.stack(those).all()) for those in by_device.values()):
        return None

    name = next(name for name, check in checks.items() if not check)
    reason = "is negative" if tensors[name].isfinite().all() else "is not finite"
    return f"{name} {reason}"


def _is_sound(name: str, value: Tensor) -> Tensor:
    """Return whether all elements are finite, and those of second moments and step counts not negative: bool []."""
    if name.endswith((".exp_avg_sq", ".step")):
        return (value.isfinite() & (value >= 0)).all()
    return value.isfinite().all()


def newest_sound(directory: Path) -> Path | None:
    """Return the newest checkpoint in a directory whose tensors are all finite; None if there is none."""
    try:
        paths = committed(directory)
    except CheckpointError:
        return None
    for path in paths:
        try:
            checkpoint = load_checkpoint(path, lazily=True)
        except CheckpointError:
            continue
        # One tensor at a time in memory.
        is_sound = all(
            first_fault({group: {name: tensors[name]}}) is None
            for group, tensors in checkpoint.tensors.items()
            for name in tensors
        )
        if is_sound:
            return path
    return None


def check_sound(fault: str | None, run_dir: Path, consequence: str, error: type[Exception]) -> None:
    """Raise, on all ranks alike, if a rank's weights, moments or average hold what no step can go on from.

    Args:
        fault: of this rank, as of ``RunState.first_fault``.
        consequence: what does not happen then.
        error: to raise; its message names the tensor, and the newest checkpoint without such a fault.
    """
    faults = [fault for fault in gather_objects(fault) if fault is not None]
    if not faults:
        return
    raise error(f"{consequence}: {faults[0]}; {remedy(run_dir, shared_sound_checkpoint(run_dir))}")


def shared_sound_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint of a run that is finite, as rank 0 finds it; called by all."""
    return broadcast_object(newest_sound(run_dir / "checkpoints") if is_main() else None)


def remedy(run_dir: Path, sound: Path | None) -> str:
    """Return what to do after a run that went wrong, given its newest checkpoint that is finite."""
    if sound is None:
        return f"{run_dir} has no checkpoint that is finite; start again with a lower --lr or a longer --warmup"
    return (
        f"the newest checkpoint that is finite is {sound.name}: try a lower --lr, a longer --warmup or --grad-clip-norm 1, "
        f"then {resume_hint(sound)}"
    )


def describe_non_finite(step_index: int, output: StepOutput, model: nn.Module, advice: str) -> str:
    """Return which tensor went bad first, in the order in which a step computes them, and the advice."""
    names = ("image_features", "text_features", "logit_scale", "logit_bias")
    values = (output.image_features_BE, output.text_features_BE, *output.scalars)
    suspects = dict(zip(names, values, strict=False)) | {"loss": output.loss}
    parameters = dict(model.named_parameters())
    gradients = {f"gradient of {n}": p.grad for n, p in parameters.items() if p.grad is not None}
    # A bad weight explains everything after it, so that weights come first.
    ordered = {**parameters, **suspects, **gradients}
    # Of what is split, this rank's rows: the ranks may stop at different tensors, so that none may ask the others.
    bad = next((n for n, value in ordered.items() if not local_part(value).isfinite().all()), None)
    where = f"{bad} is the first tensor that is not finite" if bad else "it came from another rank"
    return f"the loss or a gradient of step {step_index + 1} is not finite; {where}. Nothing was updated; {advice}"


def resume_hint(run_dir: Path) -> str:
    """Return the command that continues a run."""
    return f"python -m clipcore.train --resume {run_dir}"
