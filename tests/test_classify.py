"""``python -m clipcore.classify`` on runs and on weights of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import NANO, RunServer
from safetensors.torch import save_file
from shards import picture, write_csv

from clipcore.classify import main, read_labels
from clipcore.model import create_model
from clipcore.tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def run_dir(server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    table = write_csv(folder / "data", num_pairs=40)
    line = ["--logs", str(folder), "--name", "r", "--train-data", str(table), *NANO]
    line += ["--batch-size", "20", "--epochs", "1", "--ema-decay", "0.5"]
    status, text = server.run(line, folder / "out")
    assert status == 0, text
    return folder / "r"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "picture.jpg"
    path.write_bytes(picture(3)[0])
    return path


def test_a_table_of_probabilities(run_dir, image, capsys):
    assert (
        main(
            [
                str(image),
                str(image),
                "--labels",
                "a red square, a circle ,a line",
                "--checkpoint",
                str(run_dir),
            ]
        )
        == 0
    )
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 8 and rows[0] == str(image)
    shares = [float(row.split("%")[0].split()[-1]) for row in rows[1:4]]
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares == sorted(shares, reverse=True)


def test_json_of_one_checkpoint_with_prompts(run_dir, image, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("cat\n\ndog\n")
    checkpoint = max((run_dir / "checkpoints").glob("step_*"))
    line = [
        str(image),
        "--labels",
        str(names),
        "--checkpoint",
        str(checkpoint),
        "--json",
        "--top",
        "1",
    ]
    assert main([*line, "--templates", "a {}", "--templates", "one {}"]) == 0
    (row,) = json.loads(capsys.readouterr().out).values()
    assert len(row) == 1 and set(row) <= {"cat", "dog"}


def test_weights_of_others(image, tmp_path, capsys):
    model = create_model("ViT-nano-8-32", force_quick_gelu=True)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    byte_tokenizer().save(tmp_path / "bytes.txt.gz")
    line = [
        str(image),
        "--labels",
        "a,b",
        "--pretrained",
        str(tmp_path / "weights.safetensors"),
        "--json",
    ]
    assert main([*line, "--bpe-path", str(tmp_path / "bytes.txt.gz")]) == 0
    (row,) = json.loads(capsys.readouterr().out).values()
    assert sum(row.values()) == pytest.approx(1)

    assert main(line) == 2
    assert "the model has 514 tokens, but the vocabulary 49408" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "none.png"}, "cannot read none.png"),
        ({"image": __file__}, "no readable image"),
        ({"labels": " , "}, "--labels holds no name"),
        ({"checkpoint": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_one_line(run_dir, image, capsys, change, message):
    given = {"image": str(image), "labels": "a, b", "checkpoint": str(run_dir), **change}
    assert (
        main([given["image"], "--labels", given["labels"], "--checkpoint", given["checkpoint"]])
        == 2
    )
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_labels():
    assert read_labels("a cat, a dog") == ["a cat", "a dog"]
