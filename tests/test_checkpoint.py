"""Checkpoints: bits, crashes at every I/O call, damage, the lock of a run."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoints import mark_of, save
from runs import PROGRAMS, open_descriptors
from torch import Tensor, nn

from clipcore.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    load_latest,
    lock,
    make_newest,
    manifest,
    read,
    run_lock,
    save_checkpoint,
    write,
)


def assert_whole(checkpoint: Checkpoint | None, step: int, mark: int | None = None) -> None:
    assert mark_of(checkpoint) == (step if mark is None else mark)
    assert checkpoint.step == step and checkpoint.state.keys() == {"mark"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path, dtype):
    base = torch.randint(-(2**62), 2**62, (6, 8)).view(dtype)  # any bits, NaN payloads too
    tensors = {
        "matrix": base,
        "transposed": base.t(),
        "strided": base[1::2, ::3],
        "row": base[2],
        "column": base[:, 1],
        "expanded": base[:1].expand(4, -1),
        "scalar": base[0, 0],
        "empty": base[:0],
        "none of nothing": torch.empty(0, 3, 0, dtype=dtype),
        "parameter": nn.Parameter(base.clone()),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "bool": torch.tensor([True, False, True]),
        "uint8": torch.arange(255, dtype=torch.uint8),
        "int32.é/\u4e2d": torch.tensor(-5, dtype=torch.int32),
        "float8": torch.randn(9).to(torch.float8_e4m3fn),
    }
    state = {
        "float": 0.1 + 0.2,
        "large": 2**70,
        "text": "é\u2028",
        "nested": {"a": [1, None, True]},
    }
    path = save_checkpoint(tmp_path / "new" / "folder", 7, {"model": tensors, "none": {}}, state)
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.state, loaded.path) == (7, state, path)
    assert loaded.tensors["none"] == {} and loaded.tensors["model"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        back = loaded.tensors["model"][name]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape), name
        assert bits(back) == bits(tensor), name
    # The file is plain safetensors for everybody else.
    theirs = safetensors.torch.load(Path(path, "model.safetensors").read_bytes())
    assert {n: bits(t) for n, t in theirs.items()} == {n: bits(t) for n, t in tensors.items()}


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_type_that_cannot_be_held_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"odd is torch\.complex64"):
        save_checkpoint(tmp_path, 1, {"model": {"odd": torch.zeros(2, dtype=torch.complex64)}}, {})
    assert list(tmp_path.iterdir()) == []


def test_the_last_k_are_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=3)
        assert_whole(load_latest(tmp_path), step)
    assert sorted(os.listdir(tmp_path)) == [f"step_{s:08d}" for s in (3, 4, 5)]
    save(tmp_path, 6, keep=1)
    assert os.listdir(tmp_path) == ["step_00000006"]
    save(tmp_path, 123_456_789, keep=None)
    assert_whole(load_latest(tmp_path), 123_456_789)


def test_a_run_that_went_back_goes_on_from_there(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=None)
    save(tmp_path, 15, keep=2)  # keeps itself, though its step is not among the highest
    assert_whole(load_latest(tmp_path), 15)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000015"
    assert sorted(os.listdir(tmp_path)) == ["step_00000015", "step_00000030"]
    save(tmp_path, 30, mark=99, keep=2)
    assert_whole(load_latest(tmp_path), 30, mark=99)
    assert sorted(os.listdir(tmp_path)) == ["step_00000015", "step_00000030"]


def test_nothing_there_is_none(tmp_path):
    assert load_latest(tmp_path / "none") is None and latest_checkpoint(tmp_path / "none") is None
    (tmp_path / "step_12").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert load_latest(tmp_path) is None


# Crashes; attack/saves.py has a fault at every call.


def test_the_new_name_is_on_the_disk_before_the_old_checkpoint_goes(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)
    calls: list[tuple[str, str]] = []

    def noted(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(target: Any, *arguments: Any, **keywords: Any) -> Any:
            is_open = isinstance(target, int)
            calls.append((name, os.readlink(f"/proc/self/fd/{target}") if is_open else str(target)))
            return real(target, *arguments, **keywords)

        return call

    for name in ("rename", "fsync", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, noted(name))
    save(tmp_path, 3)
    committed = calls.index(("rename", str(tmp_path / ".tmp_step_00000003")))
    synced = calls.index(("fsync", str(tmp_path)), committed)
    removed = calls.index(("rename", str(tmp_path / "step_00000001")))
    assert committed < synced < removed
    assert {name for name, _ in calls[removed:]} & {"unlink", "rmdir"}
    synced_files = [path for name, path in calls[:committed] if name == "fsync"]
    assert len(synced_files) == 5 and synced_files[-1].endswith(".tmp_step_00000003")


def test_a_full_disk_and_a_wrong_place_are_told(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left") as e:
        patch.setattr(os, "write", full)
        save(tmp_path, 2)
    assert (
        "free some space" in str(e.value)
        and "step 2" in str(e.value)
        and str(tmp_path) in str(e.value)
    )
    assert os.listdir(tmp_path) == ["step_00000001"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"choose another|writable"):
        save(tmp_path / "file" / "checkpoints", 1)

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="Read-only"):
        patch.setattr(os, "mkdir", read_only)
        save(tmp_path, 2)
    assert_whole(load_latest(tmp_path), 1)


# Damage.


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    draw = random.Random(0)
    num_mutations = 0
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        mutants = [content[: draw.randrange(len(content))] for _ in range(15)]
        mutants += [b"", content + b"\0", content[:-1], bytes(len(content))]
        for _ in range(60):
            place = draw.randrange(len(content))
            flipped = content[place] ^ (1 << draw.randrange(8))
            mutants.append(content[:place] + bytes([flipped]) + content[place + 1 :])
        for mutant in mutants:
            path.write_bytes(mutant)
            with pytest.raises(CheckpointError) as caught:
                load_checkpoint(newest)
            assert path.name in str(caught.value)
            num_mutations += 1
        with pytest.warns(UserWarning, match=rf"skipped step_00000002: .*{path.name}"):
            assert_whole(load_latest(tmp_path), 1)
        path.unlink()
        with pytest.warns(UserWarning, match=rf"skipped step_00000002: .*{path.name}"):
            assert_whole(load_latest(tmp_path), 1)
        path.write_bytes(content)
    assert num_mutations >= 300
    assert_whole(load_latest(tmp_path), 2)


def test_files_of_two_checkpoints_do_not_mix(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    shutil.copy(first / "model.safetensors", second / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_checkpoint(second)
    shutil.copy(first / "manifest.json", second / "manifest.json")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(second)


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*step_00000002.*step_00000001"):
        load_latest(tmp_path)
    shutil.rmtree(tmp_path / "step_00000002")
    save(tmp_path, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_whole(load_latest(tmp_path), 2)


def test_a_checkpoint_that_goes_while_it_is_read_is_no_damage(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real = read.load_checkpoint

    def slow(path: Path, *arguments: Any) -> Checkpoint:
        if path.name == "step_00000001":
            save(tmp_path, 2, keep=1)
        return real(path, *arguments)

    monkeypatch.setattr(read, "load_checkpoint", slow)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_whole(load_latest(tmp_path), 2)


def test_what_cannot_be_read_is_not_taken_for_damage(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    unreadable = {"step_00000002/manifest.json"}
    real = os.open

    def refuse(path: Any, *arguments: Any, **keywords: Any) -> int:
        if any(str(path).endswith(name) for name in unreadable):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    for act in (load_latest, latest_checkpoint, lambda folder: save(folder, 3, keep=1)):
        with pytest.raises(
            CheckpointError, match="Input/output error; it may be intact: try again"
        ):
            act(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000002"]

    # The tensors of the newest: no older one is taken for it, and a save needs none of them.
    unreadable |= {"step_00000002/model.safetensors"}
    unreadable -= {"step_00000002/manifest.json"}
    with pytest.raises(CheckpointError, match=r"cannot read .*step_00000002/model\.safetensors"):
        load_latest(tmp_path)
    assert_whole(load_checkpoint(save(tmp_path, 3)), 3)

    # An old one that cannot be looked at when the new one is there: the new one stays, and the save has succeeded.
    unreadable.clear()
    committed = write._commit

    def commit(temporary: Path, final: Path) -> None:
        committed(temporary, final)
        unreadable.add("step_00000003/manifest.json")

    monkeypatch.setattr(write, "_commit", commit)
    with pytest.warns(UserWarning, match="cannot remove an old checkpoint"):
        path = save(tmp_path, 4, keep=1)
    unreadable.clear()
    assert latest_checkpoint(tmp_path) == path and len(os.listdir(tmp_path)) == 3


def test_equal_sequence_numbers_go_to_the_later_step(tmp_path):
    for step in (2, 10, 9):
        path = save(tmp_path, step, keep=None)
        fields = manifest.read_manifest(path)
        del fields["sequence"]
        (path / "manifest.json").write_bytes(manifest.manifest_text({**fields, "sequence": 1}))
    assert_whole(load_latest(tmp_path), 10)
    assert save(tmp_path, 3, keep=1).exists()
    assert os.listdir(tmp_path) == ["step_00000003"]


def test_names_of_others_do_not_stop_a_save(tmp_path):
    save(tmp_path, 1)
    target = tmp_path / "target"
    target.mkdir()
    (target / "kept").write_text("")
    (tmp_path / ".tmp_notes").write_text("of somebody else")
    (tmp_path / ".tmp_step_00000002").symlink_to(target)
    (tmp_path / ".tmp_old_step_00000007").write_text("a file in place of a folder")
    (tmp_path / ".displaced_step_00000001").write_text("")
    (tmp_path / ".displaced_target").write_text("of somebody else")
    (tmp_path / "step_00000008").write_text("a file")
    os.mkfifo(tmp_path / "step_00000009")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path, 2)
    assert (target / "kept").exists() and (tmp_path / ".tmp_notes").exists()
    names = {"step_00000001", "step_00000002", "step_00000008", "step_00000009"}
    assert set(os.listdir(tmp_path)) == {*names, "target", ".tmp_notes", ".displaced_target"}
    with pytest.warns(UserWarning, match="skipped step_0000000[89]"):
        assert_whole(load_latest(tmp_path), 2)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors"])
def test_a_pipe_or_a_link_in_a_checkpoint_is_damage(tmp_path, name):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    content = (path / name).read_bytes()
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.warns(UserWarning, match="skipped step_00000002"):
        assert_whole(load_latest(tmp_path), 1)
    (path / name).unlink()
    (path / name).symlink_to(path / name)
    with pytest.warns(UserWarning, match="skipped step_00000002"):
        assert_whole(load_latest(tmp_path), 1)
    (path / name).unlink()
    (path / name).write_bytes(content)
    assert_whole(load_latest(tmp_path), 2)


def resigned(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a manifest without each of its keys, and with values of other types in their places."""
    record = {"bytes": 1, "sha256": "0"}
    for key in manifest:
        yield {k: v for k, v in manifest.items() if k != key}
        for value in (None, [], {}, "2", -1, 1.5, True, {"a": 1}, {"../state.json": record}):
            yield {**manifest, key: value}
    for name, own in manifest["files"].items():
        for changed in ({}, None, {**own, "bytes": "1"}, {**own, "sha256": 1}, record):
            yield {**manifest, "files": {**manifest["files"], name: changed}}


def test_a_manifest_that_was_signed_anew_is_damage_and_nothing_else(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / "manifest.json"
    cases = list(resigned(manifest.read_manifest(path.parent)))
    assert len(cases) > 60
    for changed in cases:
        changed.pop("sha256", None)
        path.write_bytes(manifest.manifest_text(changed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            latest = load_latest(tmp_path)
        assert latest is not None and latest.step == 1, changed


def test_the_manifest_of_another_step_is_damage(tmp_path):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    shutil.copy(older / "manifest.json", newer / "manifest.json")
    with pytest.warns(UserWarning, match="skipped step_00000002"):
        assert_whole(load_latest(tmp_path), 1)
    moved = shutil.copytree(
        older, tmp_path / "best"
    )  # under a name without a step it is what it says
    assert_whole(load_checkpoint(moved), 1)


def test_not_a_checkpoint_and_a_newer_one(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_checkpoint(tmp_path)
    path = save(tmp_path, 1)
    monkeypatch.setattr("clipcore.checkpoint.manifest.FORMAT_VERSION", 0)
    with pytest.raises(CheckpointError, match="newer clipcore"):
        load_checkpoint(path)
    # It is whole: neither passed over for an older one, nor taken for gone by a save.
    for act in (load_latest, lambda folder: save(folder, 2)):
        with pytest.raises(CheckpointError, match="newer clipcore"):
            act(tmp_path)


def test_a_checkpoint_that_a_run_goes_back_to_is_the_newest_from_then_on(tmp_path):
    paths = [save(tmp_path, step, keep=None) for step in (1, 2, 3)]
    before = (paths[2] / "manifest.json").read_bytes()
    make_newest(paths[2])
    assert (paths[2] / "manifest.json").read_bytes() == before
    make_newest(paths[0])
    assert_whole(load_latest(tmp_path), 1)
    save(tmp_path, 2, mark=22, keep=2)
    assert_whole(load_latest(tmp_path), 2, mark=22)
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000002"]


def test_what_is_looked_at_leaves_no_descriptor(tmp_path):
    path = save(tmp_path, 1)
    (path / "manifest.json").unlink()
    (path / "manifest.json").mkdir()
    before = open_descriptors()
    for _ in range(5):
        assert latest_checkpoint(tmp_path) is None
    assert open_descriptors() <= before


def test_loaded_tensors_do_not_hold_the_files(tmp_path):
    checkpoint = load_checkpoint(save(tmp_path, 1))
    for path in sorted(checkpoint.path.iterdir()):
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))
    assert_whole(checkpoint, 1)


# The lock.


@contextlib.contextmanager
def holder(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, str(PROGRAMS / "hold_lock.py"), str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_two_runs_in_one_folder(tmp_path):
    with holder(tmp_path) as other:
        with (
            pytest.raises(CheckpointError, match=f"another run .*process {other.pid} on"),
            run_lock(tmp_path),
        ):
            pass
        other.kill()
        other.wait()
        with run_lock(tmp_path):
            pass


def test_the_lock_in_one_process_and_after_an_error(tmp_path):
    with run_lock(tmp_path):
        with pytest.raises(CheckpointError, match="this process"), run_lock(tmp_path / "." / ""):
            pass
        # The refused one has not taken the lock away.
        child = os.fork()
        if not child:
            status = 0
            try:
                lock._locked.clear()
                with run_lock(tmp_path):
                    status = 1
            except CheckpointError:
                pass
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(RuntimeError), run_lock(tmp_path):
        raise RuntimeError
    with run_lock(tmp_path):
        pass
    with pytest.raises(CheckpointError, match="No such file"), run_lock(tmp_path / "none"):
        pass


def test_workers_that_outlive_a_killed_run_do_not_hold_its_lock(tmp_path):
    reader, writer = os.pipe()
    run = os.fork()
    if not run:
        with run_lock(tmp_path):
            worker = os.fork()
            if worker:
                os.write(writer, f"{worker}\n".encode())
            signal.pause()
    worker = int(os.read(reader, 20))
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    try:
        with run_lock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reader)
        os.close(writer)
