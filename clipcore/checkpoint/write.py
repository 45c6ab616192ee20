"""Writes checkpoints atomically.

A checkpoint is written to a temporary folder, fsynced, and then renamed. A crash at any moment thus leaves the older
checkpoints intact, and the new one complete or absent.

Several processes may write a checkpoint together (``Writers``). Each writes its own file in every group, with its shard
of the split tensors: ``model-00002-of-00003.safetensors``. The shards, joined in order along the first axis, are the
tensor. Replicated tensors are in the first file only.

``.tmp_step_X`` and ``.tmp_old_step_X`` are left by a crash, and the next save removes them. ``.displaced_step_X`` is a
checkpoint that was being replaced by a new one of the same step. Other names in the directory are left alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from clipcore.checkpoint.manifest import (
    CHUNK_BYTES,
    COMMITTED,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    STATE,
    CheckpointError,
    UnreadableError,
    manifest_text,
    next_sequence,
    read_manifest,
    scan,
    step_name,
)
from clipcore.files import make_directory, sync_directory, write_durably

T = TypeVar("T")

_LEFT_OVER = re.compile(r"\.tmp_(?:old_)?(?:\.displaced_)?step_\d{8,}")
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


@dataclass(frozen=True)
class Writers:
    """The processes that write a checkpoint together; by default, this one alone.

    Attributes:
        rank: this process's rank, counted from 0.
        num_ranks: the number of processes.
        gather: called by all processes; returns the values that they passed, in rank order.
    """

    rank: int = 0
    num_ranks: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    def file_name(self, group: str) -> str:
        """Return the file name of this process's part of a group."""
        part = f"-{self.rank + 1:05d}-of-{self.num_ranks:05d}" if self.num_ranks > 1 else ""
        return f"{group}{part}.safetensors"

    def together(self, act: Callable[[], T]) -> list[T]:
        """Run ``act`` on every process and return all results; if it fails on one, every process raises."""
        result: T | None = None
        failure: Exception | None = None
        try:
            result = act()
        except Exception as error:
            failure = error
        outcomes = self.gather((result, None if failure is None else str(failure)))
        if failure is not None:
            raise failure
        for rank, (_, reason) in enumerate(outcomes):
            if reason is not None:
                raise CheckpointError(f"rank {rank} of {self.num_ranks}: {reason}")
        return [value for value, _ in outcomes]

    def by_first(self, act: Callable[[], T]) -> T:
        """Run ``act`` on the first process only, and return its result on all."""
        first = self.together(lambda: act() if self.rank == 0 else None)[0]
        return first  # type: ignore[return-value]


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int | None = None,
    writers: Writers = Writers(),
) -> Path:
    """Write a checkpoint, then remove all but the newest ``keep``; return its folder.

    One run writes to a directory at a time (see ``run_lock``). Tensors of any device, stride and shared storage are
    written one after the other, without a second copy of the whole.

    Args:
        directory: holds the run's checkpoints, the same for all writers; it is created if missing.
        step: steps done; a checkpoint of the same step is replaced.
        tensors: tensors by group ("model", "optimizer", ...) and name. Each writer passes its shard of a split tensor,
            which may have no rows; only the first writer passes the replicated tensors.
        state: values that JSON can hold; the first writer's are saved.
        keep: checkpoints to keep, at least 1 [all].
        writers: the processes that make this call together, each with its own tensors.

    Raises:
        CheckpointError: the disk is full or the directory cannot be written, for any of the writers; all of them raise.
            The older checkpoints are untouched.
    """
    assert step >= 0 and (keep is None or keep >= 1), (step, keep)
    directory = Path(directory)
    files: dict[str, Iterable[bytes | memoryview]] = {
        writers.file_name(group): _safetensors_chunks(named) for group, named in tensors.items()
    }
    if writers.rank == 0:
        files[STATE] = [json.dumps(state, indent=2).encode()]
    final = directory / step_name(step)
    temporary = directory / f".tmp_{final.name}"

    def begin() -> None:
        with _checkpoint_errors(directory, step, tensors):
            make_directory(directory)
            _remove_leftovers(directory)
            os.mkdir(temporary)

    def write() -> dict[str, Any]:
        with _checkpoint_errors(directory, step, tensors):
            return {name: _write_file(temporary / name, chunks) for name, chunks in files.items()}

    def commit() -> None:
        with _checkpoint_errors(directory, step, tensors):
            _write_manifest(temporary, step, next_sequence(directory), records, writers)
            _commit(temporary, final)

    try:
        writers.by_first(begin)
        records = {n: record for part in writers.together(write) for n, record in part.items()}
        writers.by_first(commit)
    except BaseException:
        if writers.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if writers.rank == 0:
        try:
            _remove_leftovers(directory)
            _prune(directory, keep, final)
        except (OSError, UnreadableError) as error:
            warnings.warn(f"cannot remove an old checkpoint in {directory}: {error}", stacklevel=2)
    return final


@contextlib.contextmanager
def _checkpoint_errors(
    directory: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]]
) -> Iterator[None]:
    """Re-raise an OSError of the enclosed code as a CheckpointError with a remedy."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(_write_failure(directory, step, tensors, error)) from error


def _safetensors_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file: the length of the header, the header, the tensors."""
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


def _write_manifest(
    folder: Path, step: int, sequence: int, records: Mapping[str, Any], writers: Writers
) -> None:
    """Write the manifest, the last file of a checkpoint, after all others are on the disk."""
    manifest = {
        "format": FORMAT,
        # The format number is the lowest that fits, so that an older clipcore can read the checkpoint.
        "version": FORMAT_VERSION if writers.num_ranks > 1 else 1,
        "step": step,
        "sequence": sequence,
        "files": dict(records),
    }
    _write_file(folder / MANIFEST, [manifest_text(manifest)])
    sync_directory(folder)


def _write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            digest.update(view)
            size += len(view)
            while len(view):
                view = view[os.write(descriptor, view[:CHUNK_BYTES]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _commit(temporary: Path, final: Path) -> None:
    """Rename a complete checkpoint to its final name; an old one of that name stays loadable until then."""
    displaced = final.with_name(f".displaced_{final.name}")
    if final.exists():
        os.rename(final, displaced)
    try:
        os.rename(temporary, final)
    except OSError:
        if displaced.exists():
            os.rename(displaced, final)
        raise
    sync_directory(final.parent)


def _remove_leftovers(directory: Path) -> None:
    """Remove the temporary folders of an interrupted save or of this one."""
    for path in sorted(directory.glob(".tmp_*")):
        if _LEFT_OVER.fullmatch(path.name):
            _delete(path)
    for path in sorted(directory.glob(".displaced_*")):
        if (
            COMMITTED.fullmatch(path.name)
            and path.with_name(path.name.removeprefix(".displaced_")).exists()
        ):
            _remove(path)


def _remove(path: Path) -> None:
    """Rename a checkpoint, then delete it, so that a crash never leaves half of one."""
    doomed = path.with_name(f".tmp_old_{path.name}")
    os.rename(path, doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    """Delete a folder with its content, or a file or link of that name; a link's target stays."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _prune(directory: Path, keep: int | None, written: Path) -> None:
    """Remove all but the newest ``keep`` checkpoints (None keeps all), but never the one just written."""
    if keep is None:
        return
    readable, _ = scan(directory)
    older = [path for path in readable if path != written]
    for path in older[keep - 1 :]:
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


def make_newest(path: Path) -> None:
    """Make a checkpoint the newest of its directory, as if it had been committed last.

    A run that resumes from it truncates its log at that step. If the run were then killed before its next save, a later
    checkpoint would not match the log.
    """
    fields = read_manifest(path)
    sequence = next_sequence(path.parent)
    if fields["sequence"] + 1 < sequence:
        write_durably(path / MANIFEST, manifest_text({**fields, "sequence": sequence}))
