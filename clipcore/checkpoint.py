"""Checkpoints that are whole or not there; ``clipcore.weights`` reads files that other people wrote.

A checkpoint is a folder, ``step_00000042``: one safetensors file a group of tensors, state.json, and manifest.json with
the size and the SHA-256 of each and of itself. It is written aside, put on the disk, and then renamed, so that a crash
at any moment leaves the ones before it and either all or nothing of the new one. No pickle is read on this path.

The newest checkpoint is the one committed last, by the sequence number in its manifest: a run that went back to step 10
goes on from there, not from a step 40 that it abandoned.

Names that begin with ``.tmp_`` are left-overs, removed by the next save; ``.displaced_step_X`` is a checkpoint whose
successor of the same step was being put in its place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

FORMAT = "clipcore checkpoint"
FORMAT_VERSION = 1
MANIFEST, STATE = "manifest.json", "state.json"

_COMMITTED = re.compile(r"(?:\.displaced_)?(step_\d{8,})")
_CHUNK_BYTES = 1 << 24
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message names the file and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """What ``save_checkpoint`` was given, read back and verified.

    Attributes:
        step: steps done.
        tensors: by group and name.
        state: the JSON values.
        path: its folder.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int | None = None,
) -> Path:
    """Writes a checkpoint, then removes all but the newest ``keep``; returns its folder.

    One process writes to a directory at a time (see ``run_lock``). Tensors of any device, stride and shared storage are
    written one after the other, without a second copy of the whole.

    Args:
        directory: of the run's checkpoints; made where it is missing.
        step: steps done; a checkpoint of the same step is replaced.
        tensors: tensors by group ("model", "optimizer", ...) and name.
        state: values that JSON can hold.
        keep: checkpoints to keep, at least 1 [all].

    Raises:
        CheckpointError: the disk is full, or the directory cannot be written. The older checkpoints are untouched.
    """
    assert step >= 0 and (keep is None or keep >= 1), (step, keep)
    directory = Path(directory)
    files: dict[str, Iterable[bytes | memoryview]] = {
        f"{group}.safetensors": _safetensors_chunks(named) for group, named in tensors.items()
    }
    files[STATE] = [json.dumps(state, indent=2).encode()]
    final = directory / f"step_{step:08d}"
    temporary = directory / f".tmp_{final.name}"
    try:
        _make_directory(directory)
        _remove_leftovers(directory)
        _write_folder(temporary, step, _next_sequence(directory), files)
        _commit(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(_write_failure(directory, step, tensors, error)) from error
    try:
        _remove_leftovers(directory)
        _prune(directory, keep)
    except OSError as error:
        warnings.warn(f"cannot remove an old checkpoint in {directory}: {error}", stacklevel=2)
    return final


def _safetensors_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: the length of the header, the header, the tensors."""
    # Wide types first, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPE_NAMES:
            raise CheckpointError(f"{name} is {tensor.dtype}, which a safetensors file cannot hold")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def _write_folder(
    folder: Path, step: int, sequence: int, files: Mapping[str, Iterable[bytes | memoryview]]
) -> None:
    """All files of a checkpoint, the manifest last, each on the disk before the next begins."""
    os.mkdir(folder)
    records = {name: _write_file(folder / name, chunks) for name, chunks in files.items()}
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "step": step,
        "sequence": sequence,
        "files": records,
    }
    _write_file(folder / MANIFEST, [_manifest_text(manifest)])
    _sync_directory(folder)


def _write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            digest.update(view)
            size += len(view)
            while len(view):
                view = view[os.write(descriptor, view[:_CHUNK_BYTES]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _manifest_text(fields: Mapping[str, Any]) -> bytes:
    """The manifest with its own hash in it: any changed byte shows."""
    body = json.dumps(fields, sort_keys=True).encode()
    signed = {**fields, "sha256": hashlib.sha256(body).hexdigest()}
    return (json.dumps(signed, indent=2, sort_keys=True) + "\n").encode()


def _make_directory(directory: Path) -> None:
    """Makes a directory, and puts its name on the disk."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    """Puts the names in a directory on the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot; their renames are durable on their own terms.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _commit(temporary: Path, final: Path) -> None:
    """Gives a whole checkpoint its name; a former one of that name stays loadable until the new one is there."""
    displaced = final.with_name(f".displaced_{final.name}")
    if final.exists():
        os.rename(final, displaced)
    try:
        os.rename(temporary, final)
    except OSError:
        if displaced.exists():
            os.rename(displaced, final)
        raise
    _sync_directory(final.parent)


def _remove_leftovers(directory: Path) -> None:
    """Removes what an interrupted save, or this one, has left behind."""
    for path in sorted(directory.glob(".tmp_*")):
        shutil.rmtree(path)
    for path in sorted(directory.glob(".displaced_*")):
        if path.with_name(path.name.removeprefix(".displaced_")).exists():
            _remove(path)


def _remove(path: Path) -> None:
    """Takes a checkpoint away at one stroke, so that none is ever half there, and then deletes it."""
    doomed = path.with_name(f".tmp_old_{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _prune(directory: Path, keep: int | None) -> None:
    readable, _ = _scan(directory)
    for path in readable[keep:] if keep is not None else []:
        _remove(path)


def _write_failure(
    directory: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], error: OSError
) -> str:
    reason = error.strerror or str(error)
    remedy = "make the folder writable or choose another one"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed = sum(t.numel() * t.element_size() for g in tensors.values() for t in g.values())
        reason += f" ({needed / 1e6:,.1f} MB are needed)"
        remedy = "free some space or keep fewer checkpoints"
    return (
        f"cannot write the checkpoint of step {step} to {directory}: {reason}; the older ones are untouched. To go "
        f"on, {remedy}"
    )


def _scan(directory: Path) -> tuple[list[Path], list[Path]]:
    """The checkpoints of a directory: those with a readable manifest, the newest first, and the others."""
    try:
        names = [name for name in os.listdir(directory) if _COMMITTED.fullmatch(name)]
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise CheckpointError(f"cannot read {directory}: {error.strerror}") from error
    sequences: dict[Path, int] = {}
    damaged: list[Path] = []
    for path in (Path(directory) / name for name in sorted(names)):
        try:
            sequences[path] = _read_manifest(path)["sequence"]
        except CheckpointError:
            damaged.append(path)
    return sorted(sequences, key=sequences.__getitem__, reverse=True), damaged


def _next_sequence(directory: Path) -> int:
    readable, _ = _scan(directory)
    return 1 + (_read_manifest(readable[0])["sequence"] if readable else 0)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        content = (folder / MANIFEST).read_bytes()
    except OSError as error:
        what = "holds no checkpoint" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}: {MANIFEST}: {error.strerror}") from error
    try:
        fields = json.loads(content)
        fields.pop("sha256")
        is_intact = _manifest_text(fields) == content and fields["format"] == FORMAT
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        is_intact = False
    if not is_intact:
        raise CheckpointError(
            f"{folder / MANIFEST} is damaged; use another checkpoint of this run, and remove this one"
        )
    if fields["version"] > FORMAT_VERSION:
        raise CheckpointError(f"{folder} was written by a newer clipcore; update to read it")
    return dict(fields)


def load_checkpoint(path: Path, map_location: str | torch.device = "cpu") -> Checkpoint:
    """Reads one checkpoint, after comparing every byte of it with its manifest.

    Args:
        path: its folder, ``.../step_00000042``.
        map_location: device of the tensors.

    Raises:
        CheckpointError: it is not there, or something in it is missing, cut short or changed.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    tensors, state = {}, {}
    for name, record in manifest["files"].items():
        assert Path(name).name == name, name
        try:
            _verify(path / name, record)
            if name == STATE:
                state = json.loads((path / name).read_bytes())
            else:
                group = name.removesuffix(".safetensors")
                tensors[group] = read_safetensors(path / name, map_location)
        except OSError as error:
            raise CheckpointError(f"cannot read {path / name}: {error.strerror}") from error
    return Checkpoint(manifest["step"], tensors, state, path)


def _verify(path: Path, record: Mapping[str, Any]) -> None:
    remedy = "use another checkpoint of this run, and remove this one"
    with open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) != record["bytes"]:
            raise CheckpointError(
                f"{path} is damaged: it has {size:,} bytes, not {record['bytes']:,}; {remedy}"
            )
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != record["sha256"]:
        raise CheckpointError(f"{path} is damaged: its content has changed; {remedy}")


def read_safetensors(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own; raises CheckpointError where it is damaged."""
    try:
        tensors = load_file(path, device=str(device))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error
    # On the CPU they are views of the mapped file, which would keep a pruned checkpoint on the disk.
    return {name: t.clone() if t.device.type == "cpu" else t for name, t in tensors.items()}


def latest_checkpoint(directory: Path) -> Path | None:
    """The folder of the checkpoint committed last, by its manifest alone; None where there is none."""
    readable, _ = _scan(Path(directory))
    return readable[0] if readable else None


def load_latest(directory: Path, map_location: str | torch.device = "cpu") -> Checkpoint | None:
    """The newest checkpoint that is whole; warns of each newer one that is not. None where there was never any.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    failures: dict[Path, CheckpointError] = {}
    while True:
        # Read anew each time: a run that is writing may have removed what was listed before.
        readable, damaged = _scan(Path(directory))
        present = [*damaged, *readable]
        remaining = [path for path in present if path not in failures]
        if not remaining:
            break
        try:
            checkpoint = load_checkpoint(remaining[0], map_location)
        except CheckpointError as error:
            failures[remaining[0]] = error
            continue
        for path in failures.keys() & set(present):
            warnings.warn(f"skipped {path.name}: {failures[path]}", stacklevel=2)
        return checkpoint
    reasons = [str(error) for path, error in failures.items() if path in present]
    if reasons:
        raise CheckpointError(f"no checkpoint in {directory} can be loaded: {'; '.join(reasons)}")
    return None


_locked: set[Path] = set()


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Holds a directory for one writing process; the system lets go of it when the process ends, however it ends.

    Raises:
        CheckpointError: another run holds it.
    """
    directory = Path(directory).resolve()
    path = directory / ".lock"
    busy = f"another run is writing to {directory}"
    remedy = "wait for it, stop it, or choose another folder"
    # A lock of the process, not of the open file: forked workers that outlive a killed run do not hold it. Such
    # locks do not conflict within a process, and end when any descriptor of the file is closed: hence the set.
    if directory in _locked:
        raise CheckpointError(f"{busy} (this process); {remedy}")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise CheckpointError(f"cannot write to {directory}: {error.strerror}") from error
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(f"cannot lock {path}: {error.strerror}") from error
            owner = os.read(descriptor, 200).decode(errors="replace").strip()
            raise CheckpointError(f"{busy} ({owner or 'starting'}); {remedy}") from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        _locked.add(directory)
        yield
    finally:
        _locked.discard(directory)
        os.close(descriptor)
