"""Weights of other people: every kind of file, damage, and code in them that is never run."""

from __future__ import annotations

import collections
import os
import pickle
import shutil
import subprocess
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from clipcore.checkpoint import CheckpointError, save_checkpoint
from clipcore.weights import load_state_dict_file

WEIGHTS = {"visual.proj": torch.arange(6.0).reshape(2, 3), "logit_scale": torch.tensor(4.6)}


def assert_weights(path: Path) -> None:
    loaded = load_state_dict_file(path)
    assert loaded.keys() == WEIGHTS.keys()
    assert all(torch.equal(loaded[name], value) for name, value in WEIGHTS.items())


@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.pth", "w"])
def test_pytorch_files_are_unwrapped(tmp_path, name):
    path = tmp_path / name
    wrapped = {f"module._orig_mod.{n}": v for n, v in WEIGHTS.items()}
    contents = [
        WEIGHTS,
        wrapped,
        {"state_dict": wrapped, "epoch": 3, "name": "run"},
        {"model": WEIGHTS},
    ]
    extras = {n: torch.tensor(224) for n in ("input_resolution", "context_length", "vocab_size")}
    contents += [{**WEIGHTS, **extras}, collections.OrderedDict(WEIGHTS)]
    for content in contents:
        torch.save(content, path)
        assert_weights(path)
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    assert_weights(path)


class Archived(nn.Module):
    """As OpenAI's archives are: half a model, with its sizes as buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.proj = nn.Parameter(WEIGHTS["visual.proj"].clone())
        self.logit_scale = nn.Parameter(WEIGHTS["logit_scale"].clone())
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.visual.proj * self.logit_scale


def test_openai_archives(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.trace(Archived(), torch.ones(1, 2)), tmp_path / "ViT-B-32.pt")
    assert_weights(tmp_path / "ViT-B-32.pt")
    content = (tmp_path / "ViT-B-32.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"cut\.pt"):
        load_state_dict_file(tmp_path / "cut.pt")


def test_folders(tmp_path):
    safetensors.torch.save_file(WEIGHTS, tmp_path / "w.safetensors")
    assert_weights(tmp_path / "w.safetensors")
    for name in ("open_clip_model.safetensors", "model.safetensors"):
        (tmp_path / "hub").mkdir()
        shutil.copy(tmp_path / "w.safetensors", tmp_path / "hub" / name)
        assert_weights(tmp_path / "hub")
        shutil.rmtree(tmp_path / "hub")
    (tmp_path / "hub").mkdir()
    torch.save(WEIGHTS, tmp_path / "hub" / "open_clip_pytorch_model.bin")
    assert_weights(tmp_path / "hub")
    run = tmp_path / "run"
    path = save_checkpoint(run / "checkpoints", 1, {"model": WEIGHTS}, {})
    for place in (path, run, run / "checkpoints"):
        assert_weights(place)
    other = {n: v + 1 for n, v in WEIGHTS.items()}
    save_checkpoint(run / "checkpoints", 2, {"model": other, "ema": WEIGHTS}, {})
    assert_weights(run)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_state_dict_file(tmp_path / "nothing")


def test_what_is_no_weights_is_named(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(WEIGHTS, path)
    content = path.read_bytes()
    cases: dict[str, tuple[bytes, str]] = {
        "page": (b"<!DOCTYPE html><html>404</html>", "not a file of weights"),
        "empty": (b"", "not a file of weights"),
        "text": (b"hello world\n" * 100, "not a file of weights"),
        "cut": (content[: len(content) // 2], "not a file of weights"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        "zip": (content[:4] + bytes(200), "not a file of weights"),
    }
    for damaged, message in cases.values():
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_state_dict_file(path)
        assert str(path) in str(caught.value)
    for holds in ([1, 2], {}, {"a": 1}, {3: torch.zeros(1)}, torch.zeros(2)):
        torch.save(holds, path)
        with pytest.raises(CheckpointError, match="holds"):
            load_state_dict_file(path)
    with pytest.raises(CheckpointError, match="No such file"):
        load_state_dict_file(tmp_path / "none.pt")
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="no readable safetensors"):
        load_state_dict_file(tmp_path / "w.safetensors")


class Malice:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def test_malicious_pickles_are_refused_and_not_run(tmp_path):
    mark = tmp_path / "it ran"
    touch = f"open({str(mark)!r}, 'w').close()"
    payloads = [
        Malice(os.system, f"touch '{mark}'"),
        Malice(exec, touch),
        Malice(eval, touch),
        Malice(subprocess.check_call, ["touch", str(mark)]),
        Malice(Path.touch, mark),
        Malice(open, str(mark), "w"),
        {"state_dict": {**WEIGHTS, "x": Malice(os.mkdir, str(mark))}},
        Malice(torch.load, str(mark)),
    ]
    path = tmp_path / "w.pt"
    for payload in payloads:
        for is_zip in (True, False):
            torch.save(payload, path, _use_new_zipfile_serialization=is_zip)
            with pytest.raises(CheckpointError, match="refused: loading it would call"):
                load_state_dict_file(path)
        path.write_bytes(pickle.dumps(payload, protocol=2))
        with pytest.raises(CheckpointError):
            load_state_dict_file(path)
        assert not mark.exists()
    # A pickle under a name of ours is not even opened as one.
    folder = save_checkpoint(tmp_path / "c", 1, {"model": WEIGHTS}, {})
    (folder / "model.safetensors").write_bytes(pickle.dumps(payloads[0]))
    with pytest.raises(CheckpointError):
        load_state_dict_file(folder)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/constants.pkl", pickle.dumps(payloads[0]))
        archive.writestr("a/data.pkl", pickle.dumps(payloads[0]))
    with pytest.raises(CheckpointError):
        load_state_dict_file(path)
    assert not mark.exists()
