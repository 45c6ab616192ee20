"""Checkpoints: folders that are whole or not there; ``clipcore.towers.weights`` reads files that other people wrote.

A checkpoint is a folder, ``step_00000042``: one safetensors file a group of tensors, state.json, and manifest.json with
the size and the SHA-256 of each and of itself. A room of its own, since weights, data and runs all meet it.

===============  =================================================================
``manifest.py``  the names and manifests: which is the newest, which is damaged
``read.py``      reads one, after comparing every byte of it
``write.py``     writes one, of one process or of several together
``lock.py``      one writing process a directory
===============  =================================================================
"""

from clipcore.checkpoint.lock import run_lock
from clipcore.checkpoint.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    STATE,
    CheckpointError,
    UnreadableError,
    committed,
    committed_names,
    latest_checkpoint,
    step_name,
)
from clipcore.checkpoint.read import (
    Checkpoint,
    TensorGroup,
    load_checkpoint,
    load_latest,
    read_safetensors,
)
from clipcore.checkpoint.write import Writers, make_newest, save_checkpoint

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST",
    "STATE",
    "Checkpoint",
    "CheckpointError",
    "TensorGroup",
    "UnreadableError",
    "Writers",
    "committed",
    "committed_names",
    "latest_checkpoint",
    "load_checkpoint",
    "load_latest",
    "make_newest",
    "read_safetensors",
    "run_lock",
    "save_checkpoint",
    "step_name",
]
