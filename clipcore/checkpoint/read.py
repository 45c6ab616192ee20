"""Reads checkpoints. All files are first compared with the manifest's hashes, and no pickle is read.

Several processes may have written a checkpoint (``write.py``). The reader need not know how many.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from clipcore.checkpoint.manifest import (
    CHUNK_BYTES,
    MAX_JSON_BYTES,
    STATE,
    CheckpointError,
    UnreadableError,
    opened,
    read_manifest,
    refusal,
    scan,
)
from clipcore.terminal import printable

_GROUP_FILE = re.compile(r"(.+?)(?:-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """The arguments of ``save_checkpoint``, read back and verified.

    Attributes:
        step: steps done.
        tensors: by group and name; dicts, or ``TensorGroup``s if they are read lazily.
        state: the JSON values.
        path: its folder.
    """

    step: int
    tensors: dict[str, Mapping[str, Tensor]]
    state: dict[str, Any]
    path: Path


def load_checkpoint(
    path: Path, map_location: str | torch.device = "cpu", lazily: bool = False
) -> Checkpoint:
    """Read one checkpoint, after comparing every file with the hash in its manifest.

    Args:
        path: its folder, ``.../step_00000042``.
        map_location: device of the tensors.
        lazily: read each tensor on access, so that unused tensors take no memory. The files stay open, and so remain
            readable even if the checkpoint is removed.

    Raises:
        CheckpointError: it does not exist, or a file in it is missing, truncated or changed.
    """
    path = Path(path)
    manifest = read_manifest(path)
    state: dict[str, Any] = {}
    groups: dict[str, list[Path]] = {}
    # Sorted by name, the parts of a group are in rank order.
    for name, record in sorted(manifest["files"].items()):
        _verify(path / name, record)
        if name == STATE:
            state = _read_state(path / name)
        if (match := _GROUP_FILE.fullmatch(name)) is not None:
            groups.setdefault(match.group(1), []).append(path / name)
    tensors: dict[str, Mapping[str, Tensor]] = {}
    for group, paths in groups.items():
        lazy = TensorGroup(paths, map_location)
        tensors[group] = lazy if lazily else dict(lazy)
    return Checkpoint(manifest["step"], tensors, state, path)


def load_latest(
    directory: Path, map_location: str | torch.device = "cpu", lazily: bool = False
) -> Checkpoint | None:
    """Return the newest intact checkpoint, and warn of each newer damaged one; None if there are no checkpoints.

    The arguments are those of ``load_checkpoint``.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged, or one cannot be read.
    """
    failures: dict[Path, CheckpointError] = {}
    while True:
        # Listed again each time, because a writing run may have removed a listed checkpoint.
        readable, damaged = scan(Path(directory))
        present = [*damaged, *readable]
        remaining = [path for path in present if path not in failures]
        if not remaining:
            break
        try:
            checkpoint = load_checkpoint(remaining[0], map_location, lazily)
        except UnreadableError:
            raise
        except CheckpointError as error:
            failures[remaining[0]] = error
            continue
        for path in failures.keys() & set(present):
            warnings.warn(printable(f"skipped {path.name}: {failures[path]}"), stacklevel=2)
        return checkpoint
    reasons = [str(error) for path, error in failures.items() if path in present]
    if reasons:
        raise CheckpointError(f"no checkpoint in {directory} can be loaded: {'; '.join(reasons)}")
    return None


def _verify(path: Path, record: Mapping[str, Any]) -> None:
    remedy = "use another checkpoint of this run, and remove this one"
    with opened(path) as file:
        if (size := os.fstat(file.fileno()).st_size) != record["bytes"]:
            raise CheckpointError(
                f"{path} is damaged: it has {size:,} bytes, not {record['bytes']:,}; {remedy}"
            )
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != record["sha256"]:
        raise CheckpointError(f"{path} is damaged: its content has changed; {remedy}")


def _read_state(path: Path) -> dict[str, Any]:
    """Return the JSON values of a checkpoint."""
    with opened(path) as file:
        content = file.read(MAX_JSON_BYTES)
    try:
        state = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(state).__name__}")
    return state


class TensorGroup(Mapping[str, Tensor]):
    """The tensors in the files of one group; each access reads a tensor again, into its own memory.

    Args:
        paths: the group's files in rank order.
        device: device of the tensors.
    """

    def __init__(self, paths: Iterable[Path], device: str | torch.device) -> None:
        self._device = device
        # By tensor name: the files that hold a part of it, and how many rows each holds.
        self._parts: dict[str, list[tuple[Any, int]]] = {}
        self._tails: dict[str, list[int] | None] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(
                    f"{path} is not a readable safetensors file: {error}"
                ) from error
            # Not every version of safetensors raises OSError for a file that was removed.
            except (OSError, RuntimeError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise refusal(path, error) from error
                raise CheckpointError(f"cannot read {path}: {error}") from error
            for name in file.keys():  # noqa: SIM118  # it is not a dict
                shape = file.get_slice(name).get_shape()
                self._parts.setdefault(name, []).append((file, shape[0] if shape else 1))
                self._tails.setdefault(name, shape[1:] if shape else None)

    def shape(self, name: str) -> torch.Size:
        """Return the shape of the whole tensor."""
        tail = self._tails[name]
        if tail is None:
            return torch.Size(())
        return torch.Size((sum(rows for _, rows in self._parts[name]), *tail))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop`` of a tensor with at least one axis; only these are read."""
        parts, first = [], 0
        for file, num_rows in self._parts[name]:
            low, high = max(start - first, 0), min(stop - first, num_rows)
            if low < high:
                parts.append(file.get_slice(name)[low:high])
            first += num_rows
        if not parts:
            return self._parts[name][0][0].get_tensor(name)[:0].to(self._device, copy=True)
        # Each part is a view of the mapped file until the parts are joined.
        return torch.cat(parts).to(self._device)

    def __getitem__(self, name: str) -> Tensor:
        if self._tails[name] is None:
            ((file, _),) = self._parts[name]
            return file.get_tensor(name).to(self._device, copy=True)
        return self.rows(name, 0, self.shape(name)[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def read_safetensors(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, in their own memory; raise CheckpointError if it is damaged."""
    try:
        tensors = load_file(path, device=str(device))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    # On the CPU they are views of the mapped file, so a pruned checkpoint would stay on the disk.
    return {name: t.clone() if t.device.type == "cpu" else t for name, t in tensors.items()}
