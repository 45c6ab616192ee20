"""Weights that other people wrote: files and folders of every origin to tensors by name, without running their code."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipcore.architectures import ModelConfig
from clipcore.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    load_latest,
    read_safetensors,
)
from clipcore.data import printable
from clipcore.descriptions import read_description, recorded_images
from clipcore.files import read_regular
from clipcore.torchscript import (
    TorchScriptError,
    TorchScriptWeights,
    is_torchscript,
    read_torchscript,
)

# Files of a model's folder as open_clip and Hugging Face name them, the preferred first.
_WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class Weights:
    """Weights by name, and what their file or folder says about their model.

    Attributes:
        tensors: on the CPU, under the names of their origin.
        config: the model, where it is described.
        quick_gelu: whether its activation is QuickGELU; None where nothing says so.
        images: how its images are prepared, as arguments of ``ImageTransform``; empty where nothing says so.
        witness: what says all this, as the beginning of a sentence.
    """

    tensors: dict[str, Tensor]
    config: ModelConfig | None = None
    quick_gelu: bool | None = None
    images: dict[str, Any] = field(default_factory=dict)
    witness: str = ""


def load_state_dict_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of ``read_weights``."""
    return read_weights(path).tensors


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Return weights, on the CPU, from a file or folder of whatever origin; no code in them runs.

    Takes a safetensors file; a PyTorch file of tensors, bare or under "state_dict" or "model"; OpenAI's TorchScript
    archives (clipcore/torchscript.py); a folder that holds one of them under its usual name; a checkpoint or run of
    clipcore (its moving average where there is one). ``module.`` and ``_orig_mod.`` before all names are taken off.

    What the model is like is read off open_clip_config.json, config.json and preprocessor_config.json beside a file of a
    usual name, off a run's own record, and off the classes of a TorchScript archive.

    Raises:
        CheckpointError: there is no such file, it holds no weights, is damaged, or wants to run code.
        ConversionError: the description beside it is damaged, or of a model that clipcore does not have.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    try:
        start = read_regular(path, 64)
    except OSError as error:
        raise CheckpointError(f"cannot read the weights {path}: {error.strerror}") from error
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights; fetch them with git lfs pull"
        )
    is_in_checkpoint = (path.parent / MANIFEST).is_file()
    is_described = path.name in _WEIGHT_FILES and not is_in_checkpoint
    described = read_description(path.parent) if is_described else None
    try:
        classes: frozenset[str] = frozenset()
        if path.suffix == ".safetensors":
            content: object = read_safetensors(path, "cpu")
        elif is_torchscript(path):
            archive = _load_torchscript(path)
            content, classes = archive.tensors, archive.classes
        else:
            content = _load_pickled_tensors(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot read the weights {path}: {error.strerror or error}"
        ) from error

    tensors, is_openai = _unwrap(content, path)
    if is_in_checkpoint:
        # A file of a checkpoint, whose run says what its model is like.
        return _of_run(load_checkpoint(path.parent, lazily=True), tensors)
    if described is not None:
        config = described.config
        witness = f"{described.origin} says"
        return Weights(tensors, config, config.quick_gelu, described.images, witness)
    activations = classes & {"QuickGELU", "GELU"}
    if len(activations) == 1:
        return Weights(tensors, None, "QuickGELU" in activations, {}, f"the code in {path} says")
    if is_openai:
        names = ", ".join(_OPENAI_EXTRAS)
        return Weights(tensors, None, True, {}, f"{path} holds {names}, as OpenAI's files do:")
    return Weights(tensors)


def _load_folder(path: Path) -> Weights:
    if (path / MANIFEST).is_file():
        checkpoint: Checkpoint | None = load_checkpoint(path)
    else:
        inner = path / "checkpoints"
        checkpoint = load_latest(inner if inner.is_dir() else path)
    if checkpoint is not None:
        groups = checkpoint.tensors
        if not groups.keys() & {"ema", "model"}:
            raise CheckpointError(f"{checkpoint.path} holds no model")
        return _of_run(checkpoint, dict(groups["ema" if "ema" in groups else "model"]))
    for name in _WEIGHT_FILES:
        if (path / name).is_file():
            return read_weights(path / name)
    raise CheckpointError(
        f"{path} holds no weights: neither a checkpoint of a run nor any of {', '.join(_WEIGHT_FILES)}"
    )


def _of_run(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> Weights:
    """Return the weights of a checkpoint with what the run noted about its model."""
    identity = checkpoint.state.get("identity")
    # Tensors that somebody saved as a checkpoint without a run.
    if not isinstance(identity, dict) or not isinstance(identity.get("model"), dict):
        return Weights(tensors)
    try:
        config = ModelConfig.from_dict(identity["model"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.path} is of a model that cannot be made: {error}"
        ) from error
    images = recorded_images(identity, checkpoint.path)
    witness = f"the run of {checkpoint.path} says"
    return Weights(tensors, config, config.quick_gelu, images, witness)


def _load_torchscript(path: Path) -> TorchScriptWeights:
    try:
        return read_torchscript(path)
    except TorchScriptError as error:
        raise CheckpointError(
            f"cannot read weights from the TorchScript archive {path}: {error}; download it again, or save the model's "
            "state_dict() where you trust its origin"
        ) from error


def _load_pickled_tensors(path: Path) -> object:
    """torch.load that builds tensors and plain containers only."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"nsupported (?:global: )?GLOBAL ([\w.]+)", str(error))
        if wanted is not None:
            raise CheckpointError(
                f"{path} is refused: loading it would call {wanted.group(1)}, which weights do not need; nothing was "
                "run. Ask for the weights as safetensors, or convert them where you trust their origin"
            ) from None
        raise CheckpointError(
            f"{path} is not a file of weights, or is damaged; download it again"
        ) from None
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
    ) as error:
        reason = printable((str(error).splitlines() or [type(error).__name__])[0])
        raise CheckpointError(
            f"{path} is not a file of weights, or is damaged ({reason}); download it again"
        ) from None


def _unwrap(content: object, path: Path) -> tuple[dict[str, Tensor], bool]:
    """Return the weights inside what a file holds, under their plain names, and whether it has the extras of OpenAI's."""
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no weights: it is a {type(content).__name__}")
    weights: dict[str, Tensor] = {}
    is_openai = all(name in content for name in _OPENAI_EXTRAS)
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} holds more than weights by name: {name!r} is a {type(value).__name__}"
            )
        if name not in _OPENAI_EXTRAS:
            weights[name] = value
    while prefix := next(
        (p for p in ("module.", "_orig_mod.") if weights and all(n.startswith(p) for n in weights)),
        None,
    ):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights, is_openai
