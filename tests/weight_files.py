"""Files and folders of weights as clipcore, open_clip, OpenAI and transformers write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from clipcore.checkpoint import save_checkpoint
from clipcore.towers.convert import to_hf
from clipcore.towers.descriptions import hf_config
from clipcore.towers.model import CLIP


def saved(path: Path, model: nn.Module) -> Path:
    """Save a bare state dict, which says nothing about its model but shapes."""
    torch.save(model.state_dict(), path)
    return path


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """Return noise that is always the same."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def hf_folder(folder: Path, model: CLIP, images: dict[str, Any] | None = None) -> Path:
    """Write a folder as transformers does."""
    folder.mkdir(exist_ok=True)
    save_file(to_hf(model.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)))
    if images is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder


def hub_folder(folder: Path, model: CLIP, images: dict[str, Any] | None = None) -> Path:
    """Write a folder as open_clip pushes it to a hub."""
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    content = {"model_cfg": model.config.to_dict(), "preprocess_cfg": images or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


def run_folder(folder: Path, model: CLIP) -> Path:
    """Make a run with one checkpoint."""
    identity = {"model": model.config.to_dict(), "images": model.images}
    save_checkpoint(
        folder / "checkpoints", 1, {"model": model.state_dict()}, {"identity": identity}
    )
    return folder


class QuickGELU(nn.Module):
    """As OpenAI's code has it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Archived(nn.Module):
    """A model's weights in modules with a stated activation, which is all that an archive tells."""

    def __init__(
        self, weights: dict[str, Tensor], activation: nn.Module | None, extras: bool
    ) -> None:
        super().__init__()
        for name, value in weights.items():
            *path, last = name.split(".")
            parent: nn.Module = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.register_parameter(last, nn.Parameter(value.clone()))
        self.gelu = activation or nn.Identity()
        if extras:
            for name in ("input_resolution", "context_length", "vocab_size"):
                self.register_buffer(name, torch.tensor(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.gelu(x)


def archive(
    path: Path, model: CLIP, activation: nn.Module | None = None, extras: bool = True
) -> Path:
    """Write a TorchScript file, as OpenAI releases its weights."""
    module = Archived(model.state_dict(), activation, extras)
    torch.jit.trace(module, torch.ones(2), check_trace=False).save(path)
    return path


def extras_file(path: Path, model: CLIP) -> Path:
    """Save the state dict of OpenAI's archive."""
    extras = {n: torch.tensor(32) for n in ("input_resolution", "context_length", "vocab_size")}
    torch.save({**model.state_dict(), **extras}, path)
    return path


WRITERS = {
    "transformers": hf_folder,
    "file of transformers": lambda path, model: hf_folder(path, model) / "model.safetensors",
    "hub": hub_folder,
    "run": run_folder,
    "checkpoint": lambda path, model: run_folder(path, model) / "checkpoints/step_00000001",
    "file of a checkpoint": lambda path, model: (
        run_folder(path, model) / "checkpoints/step_00000001/model.safetensors"
    ),
    "classes of an archive": lambda path, model: archive(
        path, model, QuickGELU() if model.config.quick_gelu else nn.GELU(), extras=False
    ),
}
