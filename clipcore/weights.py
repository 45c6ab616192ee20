"""Weights that other people wrote: files and folders of every origin to tensors by name, without running their code."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from clipcore.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    load_latest,
    read_safetensors,
)
from clipcore.data import printable
from clipcore.torchscript import TorchScriptError, is_torchscript, read_torchscript

# Files of a model's folder as open_clip and Hugging Face name them, the preferred first.
_WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")


def load_state_dict_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return weights by name, on the CPU, from a file or folder of whatever origin; no code in them runs.

    Takes a safetensors file; a PyTorch file of tensors, bare or under "state_dict" or "model"; OpenAI's TorchScript
    archives (clipcore/torchscript.py); a folder that holds one of them under its usual name; a checkpoint or run of
    clipcore (its moving average where there is one). ``module.`` and ``_orig_mod.`` before all names are taken off.

    Raises:
        CheckpointError: there is no such file, it holds no weights, is damaged, or wants to run code.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"cannot read the weights {path}: {error.strerror}") from error
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights; fetch them with git lfs pull"
        )
    if path.suffix == ".safetensors":
        return _unwrap(read_safetensors(path, "cpu"), path)
    try:
        read = _load_torchscript if is_torchscript(path) else _load_pickled_tensors
        return _unwrap(read(path), path)
    except OSError as error:
        raise CheckpointError(
            f"cannot read the weights {path}: {error.strerror or error}"
        ) from error


def _load_folder(path: Path) -> dict[str, Tensor]:
    if (path / MANIFEST).is_file():
        checkpoint: Checkpoint | None = load_checkpoint(path)
    else:
        inner = path / "checkpoints"
        checkpoint = load_latest(inner if inner.is_dir() else path)
    if checkpoint is not None:
        groups = checkpoint.tensors
        if not groups.keys() & {"ema", "model"}:
            raise CheckpointError(f"{checkpoint.path} holds no model")
        return dict(groups["ema" if "ema" in groups else "model"])
    for name in _WEIGHT_FILES:
        if (path / name).is_file():
            return load_state_dict_file(path / name)
    raise CheckpointError(
        f"{path} holds no weights: neither a checkpoint of a run nor any of {', '.join(_WEIGHT_FILES)}"
    )


def _load_torchscript(path: Path) -> dict[str, Tensor]:
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


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    """The weights inside what a file holds, under their plain names."""
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no weights: it is a {type(content).__name__}")
    weights: dict[str, Tensor] = {}
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
    return weights
