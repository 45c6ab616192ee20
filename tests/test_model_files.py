"""Models that a JSON file in open_clip's layout describes, as --model and as the name in create_model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import NANO, RunServer
from shards import write_csv

import clipcore
from clipcore.run.state import load_run
from clipcore.towers.architectures import UnknownModelError, find_model

DESCRIBED = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 40,
        "layers": 1,
        "width": 48,
        "head_width": 24,
        "patch_size": 20,
    },
    "text_cfg": {
        "context_length": 20,
        "vocab_size": 514,
        "width": 32,
        "heads": 4,
        "layers": 1,
    },
}


def described(path: Path, **changes: object) -> str:
    """Write a description in open_clip's layout; return its path as a name."""
    path.write_text(json.dumps(DESCRIBED | changes))
    return str(path)


def test_a_file_is_the_model_that_it_describes(tmp_path: Path) -> None:
    name = described(tmp_path / "mine.json")
    model, _, transform = clipcore.create_model_and_transforms(name)
    assert model.config == find_model(name) and model.config.quick_gelu
    assert (model.config.text.heads, model.config.vision.heads) == (4, 2)
    assert transform.image_size == 40
    assert clipcore.get_model_config(name) == model.config.to_dict()
    assert clipcore.get_tokenizer(name).context_length == 20
    assert clipcore.create_model(name, force_image_size=60).visual.image_size == (60, 60)
    # It names no model anywhere else.
    assert "mine" not in clipcore.list_models()


def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path) -> None:
    vision = DESCRIBED["vision_cfg"]
    weights = {"model_cfg": DESCRIBED, "preprocess_cfg": {}}
    for content, message in (
        ("{", "is not JSON"),
        ("[1]", "is a list, not an object"),
        (json.dumps(DESCRIBED | {"tower": 1}), "has tower, which clipcore's models do not have"),
        (
            json.dumps(DESCRIBED | {"vision_cfg": {**vision, "depth": 3}}),  # type: ignore[dict-item]
            "has depth, which clipcore's towers do not have",
        ),
        (json.dumps({"embed_dim": 8}), "has no text_cfg, vision_cfg"),
        (json.dumps(weights), "describes the weights beside it: name its folder, local-dir:"),
    ):
        path = tmp_path / "wrong.json"
        path.write_text(content)
        for call in (clipcore.create_model, clipcore.get_tokenizer):
            with pytest.raises(ValueError, match=message) as caught:
                call(str(path))
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UnknownModelError, match=r"none\.json: No such file"):
        clipcore.create_model(str(tmp_path / "none.json"))


def test_a_run_needs_the_file_only_to_begin(server: RunServer, tmp_path: Path) -> None:
    table = write_csv(tmp_path, num_pairs=16)
    name = described(tmp_path / "mine.json")
    line = ["--logs", str(tmp_path / "logs"), "--train-data", str(table), *NANO[2:]]
    line += ["--batch-size", "8", "--lr", "1e-3"]
    status, said = server.run([*line, "--model", name, "--epochs", "1"], tmp_path / "out")
    assert status == 0, said
    (run,) = (tmp_path / "logs").iterdir()
    assert run.name.endswith("-model_mine-b_8")

    # The folder of all runs is moved too.
    Path(name).unlink()
    moved = (tmp_path / "logs").rename(tmp_path / "moved") / run.name
    again = ["--logs", str(moved.parent), "--resume", "latest", "--quiet"]
    status, said = server.run([*again, "--epochs", "2"], tmp_path / "out")
    assert status == 0, said
    model, _, tokenizer = load_run(moved)
    assert model.config.to_dict() == json.loads((moved / "model.json").read_text())
    assert clipcore.get_tokenizer(moved).context_length == tokenizer.context_length == 20
    assert model.encode_text(tokenizer(["a"])).shape == torch.Size([1, 24])

    # A description that is not there, and one of another model, are one line.
    status, said = server.run([*line, "--model", name], tmp_path / "out")
    assert status == 2 and "cannot read the description of a model" in said
    assert "Traceback" not in said
    other = described(tmp_path / "other.json", embed_dim=32)
    status, said = server.run([*again, "--model", other, "--epochs", "3"], tmp_path / "out")
    assert status == 2 and "is of another model" in said
