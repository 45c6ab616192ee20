"""Weights of other people: every kind of file, damage, and code in them that is never run."""

from __future__ import annotations

import collections
import json
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
from clipcore.towers.weights import load_state_dict_file

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


@pytest.mark.parametrize(
    ("nested", "others"),
    [
        (
            "model_state_dict",
            {"optimizer_state_dict": {"state": {}, "step": torch.tensor(3)}, "epoch": 3},
        ),
        ("net", {}),
        ("state.model", {"rng": [3]}),
        ("state_dict", {"ema": {n: v + 1 for n, v in WEIGHTS.items()}}),
        ("state_dict", {"model": {n: v + 1 for n, v in WEIGHTS.items()}}),
    ],
)
@pytest.mark.parametrize(
    "prefix", ["", "clip.", "model.clip_model.", "module.", "module.model._orig_mod."]
)
def test_weights_in_the_files_of_training_programs_are_found(tmp_path, nested, others, prefix):
    content: dict[str, object] = {f"{prefix}{n}": v for n, v in WEIGHTS.items()}
    for key in reversed(nested.split(".")):
        content = {key: content}
    content = {**others, **content}
    torch.save(content, tmp_path / "w.pt")
    assert_weights(tmp_path / "w.pt")


@pytest.mark.parametrize(
    "wrapper", ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
)
def test_names_of_wrappers_inside_are_taken_off(tmp_path, wrapper):
    wrapped = {
        "visual." + wrapper + ".proj": WEIGHTS["visual.proj"],
        "logit_scale": WEIGHTS["logit_scale"],
    }
    torch.save(wrapped, tmp_path / "w.pt")
    assert_weights(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"student": WEIGHTS, "teacher": dict(WEIGHTS)}, "under 'student' and 'teacher'"),
        (
            {**{f"clip.{n}": v for n, v in WEIGHTS.items()}, "head.weight": torch.ones(2)},
            "under 'clip.' and others beside it, such as 'head.weight'",
        ),
        (
            {"state_dict": {f"{p}.{n}": v for n, v in WEIGHTS.items() for p in ("model", "ema")}},
            "more than once, under 'model.' and 'ema.'",
        ),
        ({**WEIGHTS, "step": 3}, "'step' is a int"),
        ({**WEIGHTS, "visual.proj": torch.ones(2, 3).to_sparse()}, "sparse"),
        ({**WEIGHTS, "visual.proj": torch.ones(2, 3, dtype=torch.complex64)}, "complex64"),
    ],
)
def test_weights_beside_others_are_named(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=message):
        load_state_dict_file(tmp_path / "w.pt")


def test_a_dictionary_that_holds_itself_ends(tmp_path):
    content: dict[str, object] = {"epoch": 3}
    content["model"] = content
    content |= {f"key {i}": content for i in range(1000)}
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="'epoch' is a int"):
        load_state_dict_file(tmp_path / "w.pt")


@pytest.mark.parametrize("other", [{"name": "ViT-B-32"}, {}, {"head.weight": torch.ones(2)}])
def test_a_usual_name_of_something_else_hides_no_weights(tmp_path, other):
    torch.save({"model": other, "net": WEIGHTS}, tmp_path / "w.pt")
    assert_weights(tmp_path / "w.pt")


def test_shapes_without_numbers_are_refused(tmp_path):
    torch.save({name: value.to("meta") for name, value in WEIGHTS.items()}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="shapes without numbers"):
        load_state_dict_file(tmp_path / "w.pt")


def test_parts_of_an_index_are_looked_at_as_files_are(tmp_path):
    index = write_index(
        tmp_path, "model.safetensors", {"weight_map": {"logit_scale": "a.safetensors"}}
    )
    part = tmp_path / "a.safetensors"
    part.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(CheckpointError, match=r"a.safetensors is a Git LFS pointer"):
        load_state_dict_file(index)
    part.unlink()
    os.mkfifo(part)
    with pytest.raises(CheckpointError, match="Not a regular file"):
        load_state_dict_file(index)


def write_index(folder: Path, kind: str, places: object) -> Path:
    path = folder / f"{kind}.index.json"
    path.write_text(json.dumps(places))
    return path


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_several_files_are_read_by_their_index(tmp_path, kind):
    stem, suffix = kind.split(".")
    names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    for file, name in zip(names, WEIGHTS, strict=True):
        save({name: WEIGHTS[name]}, tmp_path / file)
    places = {"metadata": {}, "weight_map": dict(zip(WEIGHTS, names, strict=True))}
    index = write_index(tmp_path, kind, places)

    assert_weights(index)
    assert_weights(tmp_path)

    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{names[1]}: No such file.*index.json names it"):
        load_state_dict_file(index)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "not an index of weights"),
        ({"weight_map": 3}, "not an index of weights"),
        ({"weight_map": {"logit_scale": "../w.safetensors"}}, "not a file beside it"),
        ({"weight_map": {"logit_scale": 3}}, "not a file beside it"),
        ({"weight_map": {"logit_scale": "model.safetensors.index.json"}}, "not a file beside it"),
        ({"weight_map": {"logit_bias": "w.safetensors"}}, "holds no logit_bias"),
    ],
)
def test_a_damaged_index_is_one_line(tmp_path, content, message):
    safetensors.torch.save_file(WEIGHTS, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_state_dict_file(write_index(tmp_path, "model.safetensors", content))


@pytest.mark.parametrize(
    "name",
    ["openai", "laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "hf-hub:laion/x"],
)
def test_names_of_published_weights_are_told_from_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"{name}: No such file.*downloads nothing"):
        load_state_dict_file(name)
    with pytest.raises(CheckpointError, match=r"No such file or directory$"):
        load_state_dict_file(f"{name}.pt")


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


def test_a_file_without_checksums_is_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"logit_scale": torch.ones(())}, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert load_state_dict_file(tmp_path / "w.pt").keys() == {"logit_scale"}


class Nothing:
    """Bytes that a pickle makes of a number."""

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return bytearray, (1 << 31,)


def costly(kind: str, path: Path) -> None:
    """Write a small file that takes gigabytes to load."""
    if kind == "compressed":
        torch.save({"logit_scale": torch.zeros(1 << 20)}, path)
        records = {}
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in records.items():
                archive.writestr(name, content)
    elif kind == "bytes of nothing":
        path.write_bytes(pickle.dumps({"logit_scale": Nothing()}, protocol=2))
    elif kind == "bytes of nothing in a zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("w/data.pkl", pickle.dumps({"logit_scale": Nothing()}, protocol=2))
    else:
        path.write_bytes(pickle.dumps([[] for _ in range(300_000)], protocol=2))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("compressed", "it holds compressed records"),
        ("bytes of nothing", "it makes bytes of nothing"),
        ("bytes of nothing in a zip", "it makes bytes of nothing"),
        ("many objects", "its objects are too many"),
    ],
)
def test_files_that_take_gigabytes_are_refused_before_they_are_loaded(
    tmp_path, monkeypatch, kind, reason
):
    costly(kind, tmp_path / "w.pt")
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(CheckpointError, match=f"w.pt is refused: {reason}, as no torch.save"):
        load_state_dict_file(tmp_path / "w.pt")


def test_one_part_of_several_names_their_index(tmp_path):
    path = tmp_path / "model-00001-of-00002.safetensors"
    path.write_bytes(b"never looked into")
    with pytest.raises(
        CheckpointError, match=r"name their index, model\.safetensors\.index\.json, or"
    ):
        load_state_dict_file(path)


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
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
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
