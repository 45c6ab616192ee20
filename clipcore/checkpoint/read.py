"""Reads checkpoints: no byte of them counts before all are compared with the manifest, and no pickle is read.

A checkpoint may be the work of several processes (``write.py``). Whoever reads it need not know how many.
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
    """What ``save_checkpoint`` was given, read back and verified.

    Attributes:
        step: steps done.
        tensors: by group and name; dicts, or where asked for ``TensorGroup``s.
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
    """Reads one checkpoint, after comparing every byte of it with its manifest.

    Args:
        path: its folder, ``.../step_00000042``.
        map_location: device of the tensors.
        lazily: read each tensor when it is asked for, so that what is not asked for takes no memory; the files stay open
            meanwhile, and so readable when the checkpoint is removed.

    Raises:
        CheckpointError: it is not there, or something in it is missing, cut short or changed.
    """
    path = Path(path)
    manifest = read_manifest(path)
    state: dict[str, Any] = {}
    groups: dict[str, list[Path]] = {}
    # By name: the parts of a group in the order of their ranks.
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
    """The newest checkpoint that is whole; warns of each newer one that is not. None where there was never any.

    The arguments are those of ``load_checkpoint``.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged, or one cannot be read.
    """
    failures: dict[Path, CheckpointError] = {}
    while True:
        # Read anew each time: a run that is writing may have removed what was listed before.
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
    """The tensors in the files of one group, read when asked for, each time anew and into memory of their own.

    Args:
        paths: of the group's files in the order of ranks.
        device: of what is read.
    """

    def __init__(self, paths: Iterable[Path], device: str | torch.device) -> None:
        self._device = device
        # By name: the files that hold a part of the tensor, with its rows there.
        self._parts: dict[str, list[tuple[Any, int]]] = {}
        self._tails: dict[str, list[int] | None] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error
            # A file that is gone meanwhile is no OSError to every version of safetensors.
            except (OSError, RuntimeError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise refusal(path, error) from error
                raise CheckpointError(f"cannot read {path}: {error}") from error
            for name in file.keys():  # noqa: SIM118  # it is no dict
                shape = file.get_slice(name).get_shape()
                self._parts.setdefault(name, []).append((file, shape[0] if shape else 1))
                self._tails.setdefault(name, shape[1:] if shape else None)

    def shape(self, name: str) -> torch.Size:
        """Of the whole tensor."""
        tail = self._tails[name]
        if tail is None:
            return torch.Size(())
        return torch.Size((sum(rows for _, rows in self._parts[name]), *tail))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor that has an axis; no others are read."""
        parts, first = [], 0
        for file, num_rows in self._parts[name]:
            low, high = max(start - first, 0), min(stop - first, num_rows)
            if low < high:
                parts.append(file.get_slice(name)[low:high])
            first += num_rows
        if not parts:
            return self._parts[name][0][0].get_tensor(name)[:0].to(self._device, copy=True)
        # What was read is a view of the mapped file, until it is joined.
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
    """The tensors of a safetensors file, in memory of their own; raises CheckpointError where it is damaged."""
    try:
        tensors = load_file(path, device=str(device))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error
    # On the CPU they are views of the mapped file, which would keep a pruned checkpoint on the disk.
    return {name: t.clone() if t.device.type == "cpu" else t for name, t in tensors.items()}
