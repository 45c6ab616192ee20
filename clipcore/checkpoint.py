"""Checkpoints that are whole or not there; ``clipcore.weights`` reads files that other people wrote.

A checkpoint is a folder, ``step_00000042``: one safetensors file a group of tensors, state.json, and manifest.json with
the size and the SHA-256 of each and of itself. It is written aside, put on the disk, and then renamed, so that a crash
at any moment leaves the ones before it and either all or nothing of the new one. No pickle is read on this path.

Several processes may write one together (``Writers``), each a file of its own in every group, with the rows that it
holds: ``model-00002-of-00003.safetensors``. A tensor of the group is then its parts in all the files, in order, joined
along the first axis; one that is not split is in the first file alone. Whoever reads need not know how many wrote.

The newest checkpoint is the one committed last, by the sequence number in its manifest: a run that went back to step 10
goes on from there, not from a step 40 that it abandoned.

``.tmp_step_X`` and ``.tmp_old_step_X`` are left-overs, removed by the next save; ``.displaced_step_X`` is a checkpoint whose
successor of the same step was being put in its place. Other names in the directory are left alone.

A checkpoint is damaged when it lacks something or holds something else than its manifest says; it is then passed over, with
a warning. One that cannot be read (a disk's error, no permission) may be whole: that is an error, so that no run goes on
from an older one, and no save takes its place, as if it were not there.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from clipcore.files import (
    NotRegularError,
    make_directory,
    open_own,
    open_regular,
    sync_directory,
    write_durably,
)
from clipcore.terminal import printable

T = TypeVar("T")

FORMAT = "clipcore checkpoint"
# 1: every group is one file. 2: it may be several.
FORMAT_VERSION = 2
MANIFEST, STATE = "manifest.json", "state.json"

_COMMITTED = re.compile(r"(?:\.displaced_)?(step_\d{8,})")
_LEFT_OVER = re.compile(r"\.tmp_(?:old_)?(?:\.displaced_)?step_\d{8,}")
_GROUP_FILE = re.compile(r"(.+?)(?:-\d{5}-of-\d{5})?\.safetensors")
_CHUNK_BYTES = 1 << 24
_MAX_JSON_BYTES = 1 << 24  # of the manifest and of the state
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


# What opening a file says where there is none, or something else in its place.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO}


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message names the file and the remedy."""


class UnreadableError(CheckpointError):
    """The system refuses to read a checkpoint, which may be whole."""


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


@dataclass(frozen=True)
class Writers:
    """The processes that write a checkpoint together; by default, this one alone.

    Attributes:
        rank: of this process, counted from 0.
        num_ranks: how many they are.
        gather: called by all alike; returns what each passed, in the order of ranks.
    """

    rank: int = 0
    num_ranks: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    def file_name(self, group: str) -> str:
        """Of this process's part of a group."""
        part = f"-{self.rank + 1:05d}-of-{self.num_ranks:05d}" if self.num_ranks > 1 else ""
        return f"{group}{part}.safetensors"

    def together(self, act: Callable[[], T]) -> list[T]:
        """What ``act`` returned on each; where it failed on one, all raise, so that none waits for another."""
        result: T | None = None
        failure: Exception | None = None
        try:
            result = act()
        except Exception as error:
            failure = error
        told = self.gather((result, None if failure is None else str(failure)))
        if failure is not None:
            raise failure
        for rank, (_, reason) in enumerate(told):
            if reason is not None:
                raise CheckpointError(f"rank {rank} of {self.num_ranks}: {reason}")
        return [value for value, _ in told]

    def by_first(self, act: Callable[[], T]) -> T:
        """What ``act`` returned on the first, which alone acts."""
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
    """Writes a checkpoint, then removes all but the newest ``keep``; returns its folder.

    One run writes to a directory at a time (see ``run_lock``). Tensors of any device, stride and shared storage are
    written one after the other, without a second copy of the whole.

    Args:
        directory: of the run's checkpoints, the same for all writers; made where it is missing.
        step: steps done; a checkpoint of the same step is replaced.
        tensors: tensors by group ("model", "optimizer", ...) and name. Of a tensor that several writers share each
            passes its rows, be they none; of any other the first alone passes all.
        state: values that JSON can hold; the first writer's counts.
        keep: checkpoints to keep, at least 1 [all].
        writers: who calls this together, each with its own tensors.

    Raises:
        CheckpointError: the disk is full, or the directory cannot be written, for one of the writers; all of them raise.
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
        with _told(directory, step, tensors):
            make_directory(directory)
            _remove_leftovers(directory)
            os.mkdir(temporary)

    def write() -> dict[str, Any]:
        with _told(directory, step, tensors):
            return {name: _write_file(temporary / name, chunks) for name, chunks in files.items()}

    def commit() -> None:
        with _told(directory, step, tensors):
            _write_manifest(temporary, step, _next_sequence(directory), records, writers)
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
def _told(
    directory: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]]
) -> Iterator[None]:
    """Raise an OSError within it as a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(_write_failure(directory, step, tensors, error)) from error


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


def _write_manifest(
    folder: Path, step: int, sequence: int, records: Mapping[str, Any], writers: Writers
) -> None:
    """The last file of a checkpoint, when all others are on the disk."""
    manifest = {
        "format": FORMAT,
        # What an older clipcore can read is marked so.
        "version": FORMAT_VERSION if writers.num_ranks > 1 else 1,
        "step": step,
        "sequence": sequence,
        "files": dict(records),
    }
    _write_file(folder / MANIFEST, [_manifest_text(manifest)])
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
    sync_directory(final.parent)


def _remove_leftovers(directory: Path) -> None:
    """Remove what an interrupted save, or this one, has left behind."""
    for path in sorted(directory.glob(".tmp_*")):
        if _LEFT_OVER.fullmatch(path.name):
            _delete(path)
    for path in sorted(directory.glob(".displaced_*")):
        if (
            _COMMITTED.fullmatch(path.name)
            and path.with_name(path.name.removeprefix(".displaced_")).exists()
        ):
            _remove(path)


def _remove(path: Path) -> None:
    """Takes a checkpoint away at one stroke, so that none is ever half there, and then deletes it."""
    doomed = path.with_name(f".tmp_old_{path.name}")
    os.rename(path, doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    """Delete a folder with all in it, or whatever else has that name; a link's target stays."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _prune(directory: Path, keep: int | None, written: Path) -> None:
    """Remove all but the newest ``keep`` checkpoints (None keeps all), and never the one just written."""
    if keep is None:
        return
    readable, _ = _scan(directory)
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


def committed_names(directory: Path) -> list[str]:
    """Return the names of checkpoints in a directory, in order, be they whole or damaged; of no directory, none.

    Raises:
        UnreadableError: the directory cannot be read, or is none.
    """
    try:
        return sorted(name for name in os.listdir(directory) if _COMMITTED.fullmatch(name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnreadableError(f"cannot read {directory}: {error.strerror}") from error


def committed(directory: Path) -> list[Path]:
    """Return the checkpoints of a directory that have a readable manifest, the newest first.

    Raises:
        UnreadableError: the directory or a manifest is there and cannot be read.
    """
    return _scan(directory)[0]


def _scan(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return the checkpoints of a directory: those with a readable manifest, the newest first, and the damaged ones."""
    manifests, damaged = _manifests(directory)

    def order(path: Path) -> tuple[int, int]:
        return manifests[path]["sequence"], manifests[path]["step"]

    return sorted(manifests, key=order, reverse=True), damaged


def _manifests(directory: Path) -> tuple[dict[Path, dict[str, Any]], list[Path]]:
    """Return the manifests in a directory by checkpoint, and the checkpoints that have none or a damaged one."""
    while True:
        manifests: dict[Path, dict[str, Any]] = {}
        damaged: list[Path] = []
        for path in (Path(directory) / name for name in committed_names(directory)):
            try:
                manifests[path] = _read_manifest(path)
            except UnreadableError:
                raise
            except CheckpointError:
                damaged.append(path)
        # A run that is writing may have removed one since the names were read, and put a newer one there.
        if all(os.path.lexists(path) for path in damaged):
            return manifests, damaged


def _next_sequence(directory: Path) -> int:
    manifests, _ = _manifests(directory)
    return 1 + max((fields["sequence"] for fields in manifests.values()), default=0)


def make_newest(path: Path) -> None:
    """Make a checkpoint the newest of its directory, as if it had been committed last.

    A run that goes back to it cuts its log there: were it killed before its next save, no later checkpoint would fit the
    log.
    """
    fields = _read_manifest(path)
    sequence = _next_sequence(path.parent)
    if fields["sequence"] + 1 < sequence:
        write_durably(path / MANIFEST, _manifest_text({**fields, "sequence": sequence}))


def _refusal(path: Path, error: OSError) -> CheckpointError:
    """Return what to raise where a file of a checkpoint cannot be opened or read."""
    if error.errno in _ABSENT:
        return CheckpointError(f"{path.parent} is damaged: {path.name}: {error.strerror}")
    return UnreadableError(
        f"cannot read {path}: {error.strerror}; it may be whole: try again, or move {path.parent.name} out of the folder to "
        "go on without it"
    )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file of a checkpoint; of anything else, such as a pipe, nothing is read.

    Raises:
        CheckpointError: it is no file; UnreadableError where the system refuses to open or read it.
    """
    try:
        with open_regular(path) as file:
            yield file
    except NotRegularError as error:
        raise CheckpointError(f"{path.parent} is damaged: {path.name} is no file") from error
    except OSError as error:
        raise _refusal(path, error) from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or of a newer clipcore; UnreadableError where it cannot be read.
    """
    try:
        with _opened(folder / MANIFEST) as file:
            content = file.read(_MAX_JSON_BYTES)
    except UnreadableError:
        raise
    except CheckpointError as error:
        what = "holds no checkpoint" if os.path.lexists(folder) else "does not exist"
        raise CheckpointError(f"{folder} {what}: {error}") from error
    try:
        fields = json.loads(content)
        fields.pop("sha256")
        is_intact = _manifest_text(fields) == content and fields["format"] == FORMAT
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        is_intact = False
    if is_intact and type(fields.get("version")) is int and fields["version"] > FORMAT_VERSION:
        raise UnreadableError(f"{folder} was written by a newer clipcore; update to read it")
    named = _COMMITTED.fullmatch(folder.name)
    is_intact = is_intact and _is_complete(fields)
    if not is_intact or (named is not None and named[1] != step_name(fields["step"])):
        raise CheckpointError(
            f"{folder / MANIFEST} is damaged; use another checkpoint of this run, and remove this one"
        )
    return dict(fields)


def _is_complete(fields: Mapping[str, Any]) -> bool:
    """Return whether a manifest has all that is read of it, each of its type."""
    files = fields.get("files")
    if not isinstance(files, dict) or STATE not in files:
        return False
    counts = [fields.get(key) for key in ("version", "step", "sequence")]
    for name, record in files.items():
        if Path(name).name != name or not isinstance(record, dict):
            return False
        counts.append(record.get("bytes"))
        if not isinstance(record.get("sha256"), str):
            return False
    return all(type(count) is int and count >= 0 for count in counts)


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
    manifest = _read_manifest(path)
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


def _read_state(path: Path) -> dict[str, Any]:
    """Return the JSON values of a checkpoint."""
    with _opened(path) as file:
        content = file.read(_MAX_JSON_BYTES)
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
                    raise _refusal(path, error) from error
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


def _verify(path: Path, record: Mapping[str, Any]) -> None:
    remedy = "use another checkpoint of this run, and remove this one"
    with _opened(path) as file:
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


def step_name(step: int) -> str:
    """Return the name of the folder of a checkpoint."""
    return f"step_{step:08d}"


def latest_checkpoint(directory: Path) -> Path | None:
    """The folder of the checkpoint committed last, by its manifest alone; None where there is none."""
    return next(iter(committed(Path(directory))), None)


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
        readable, damaged = _scan(Path(directory))
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
        descriptor = open_own(path, os.O_RDWR)
    except OSError as error:
        raise CheckpointError(f"cannot write to {path}: {error.strerror}") from error
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
