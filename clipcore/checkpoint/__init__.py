"""Checkpoints, written atomically: a folder is complete or absent. ``clipcore.towers.weights`` reads other people's files.

A checkpoint is a folder, ``step_00000042``. It holds one safetensors file for each group of tensors, state.json, and
manifest.json with the size and SHA-256 of every file and of itself.

===============  =================================================================
``manifest.py``  the names and manifests: which one is newest, which are damaged
``read.py``      reads one, after comparing its hashes
``write.py``     writes one, from one process or from several together
``lock.py``      one writing process per directory
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
