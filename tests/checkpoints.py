"""Small checkpoints, each of which says by its bits which one it is."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from clipcore.checkpoint import Checkpoint, save_checkpoint


def groups(mark: int) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a checkpoint, others for each mark."""
    generator = torch.Generator().manual_seed(mark)
    weight = torch.randn(6, 7, generator=generator)
    return {
        "model": {"weight": weight, "tied": weight, "scale": torch.tensor(float(mark))},
        "optimizer": {"weight.step": torch.tensor(float(mark)), "weight.exp_avg": weight * 2},
    }


def save(directory: Path, step: int, mark: int | None = None, keep: int | None = 2) -> Path:
    """Write a checkpoint of a mark, which is its step if none is given."""
    mark = step if mark is None else mark
    return save_checkpoint(directory, step, groups(mark), {"mark": mark}, keep)


def mark_of(checkpoint: Checkpoint | None) -> int:
    """Return a checkpoint's mark; raise unless it is there and whole, bit for bit."""
    assert checkpoint is not None, "there is no checkpoint"
    mark: int = checkpoint.state["mark"]
    expected = groups(mark)
    assert checkpoint.tensors.keys() == expected.keys()
    for group, tensors in expected.items():
        assert checkpoint.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.tensors[group][name], tensor), f"{name} has other bits"
    return mark
