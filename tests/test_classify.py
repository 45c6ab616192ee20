"""``python -m clipcore.classify`` on runs and on weights of others."""

from __future__ import annotations

import csv
import gc
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import NANO, RunServer
from safetensors.torch import save_file
from shards import picture, write_csv

from clipcore.classify import classification
from clipcore.classify.__main__ import main
from clipcore.classify.labels import read_labels
from clipcore.tokenizer import byte_tokenizer
from clipcore.towers.factory import create_model

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import bombs


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
    assert rows[0] == rows[4] == str(image)
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
        ({"labels": "dog"}, "--labels holds only 'dog'"),
        ({"labels": "dog, cat, dog"}, "--labels holds 'dog' and 'dog', one prompt"),
        ({"labels": "Hot  dog, cat, hot dog"}, "--labels holds 'Hot  dog' and 'hot dog', one"),
        ({"model": "RN50"}, "leave --model and --bpe-path out, or use --pretrained"),
        ({"bpe-path": "nowhere"}, "leave --model and --bpe-path out, or use --pretrained"),
        ({"labels": "lables.txt"}, "there is no file of labels lables.txt"),
        ({"labels": "some/labels"}, "there is no file of labels some/labels"),
        ({"labels": "x" * 300}, "--labels holds only 'xxx"),
        ({"labels": "."}, "cannot read the labels .: Is a directory"),
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"checkpoint": "."}, "neither the folder of a run nor a checkpoint"),
        ({"checkpoint": ""}, "neither the folder of a run nor a checkpoint"),
        ({"top": "0"}, "--top is at least 1, got 0"),
        ({"max-pixels": "0"}, "--max-pixels is at least 1, got 0"),
        ({"device": "gpu"}, "--device is cpu or cuda, not 'gpu'"),
        ({"device": "meta"}, "--device is cpu or cuda, not 'meta'"),
        ({"templates": "a photo"}, "has no {}"),
    ],
)
def test_mistakes_are_one_line(run_dir, image, capsys, change, message):
    given = {"image": str(image), "labels": "a, b", "checkpoint": str(run_dir), **change}
    line = [given.pop("image"), *(w for flag, value in given.items() for w in (f"--{flag}", value))]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "content",
    ["\ufeffa cat\r\nthé\r\n".encode(), "a cat\nthé\n\n".encode()],
    ids=["byte-order mark", "plain"],
)
def test_files_of_labels(tmp_path, content):
    (tmp_path / "labels.txt").write_bytes(content)
    assert read_labels(str(tmp_path / "labels.txt")) == ["a cat", "thé"]
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "labels.txt").write_bytes("café\nthé\n".encode(encoding))
        with pytest.raises(ValueError, match=r"is not UTF-8 .*iconv"):
            read_labels(str(tmp_path / "labels.txt"))


def test_pretrained_takes_a_run_for_what_it_is(run_dir, image, capsys):
    printed = []
    for flag in ("--checkpoint", "--pretrained"):
        assert main([str(image), "--labels", "a,b", flag, str(run_dir), "--json"]) == 0
        printed.append(capsys.readouterr())
    assert printed[0] == printed[1] and not printed[1].err
    wrong = ["--pretrained", str(run_dir), "--model", "ViT-nano-8-32-quickgelu"]
    assert main([str(image), "--labels", "a,b", *wrong]) == 2
    error = capsys.readouterr().err
    assert "says that its model has GELU" in error and error.count("\n") == 1


def test_pictures_are_classified_in_parts_and_transparent_ones_counted(
    run_dir, image, tmp_path, capsys, monkeypatch
):
    clear = tmp_path / "clear.png"
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(clear)
    white = tmp_path / "white.png"
    Image.new("RGB", (40, 40), "white").save(white)
    paths = [str(image), str(clear), str(white)]
    line = [*paths, "--labels", "a,b,c", "--checkpoint", str(run_dir), "--json"]
    assert main(line) == 0
    whole = capsys.readouterr()
    assert whole.err == "clipcore.classify: note: 1 of 3 images are transparent: laid over white\n"
    rows = json.loads(whole.out)
    assert rows[str(clear)] == rows[str(white)] != rows[str(image)]
    monkeypatch.setattr(classification, "IMAGES_AT_ONCE", 2)
    assert main(line) == 0
    parts = json.loads(capsys.readouterr().out)
    for path in paths:
        assert parts[path] == pytest.approx(rows[path], rel=1e-5)


def class_folders(folder: Path, names: dict[str, int]) -> Path:
    """Write so many pictures into a folder of each name."""
    for number, (name, count) in enumerate(names.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"{index}.jpg").write_bytes(picture(8 * number + index)[0])
    return folder


def fixed_names(monkeypatch, classes: list[int]) -> None:
    """Let the images, in order, have these best classes."""
    waiting = iter(classes)

    def classify_in_order(model, images, classifier_EC, num_best):
        first_B = torch.tensor([next(waiting) for _ in images])
        num_classes = classifier_EC.shape[1]
        shares_BC = torch.nn.functional.one_hot(first_B, num_classes).double().softmax(-1)
        best = shares_BC.topk(min(num_best, num_classes))
        return best.values, best.indices

    monkeypatch.setattr("clipcore.classify.classification.classify", classify_in_order)


def test_a_summary_counts_best_names_and_compares_them_with_the_folders(
    run_dir, image, tmp_path, capsys, monkeypatch
):
    folder = class_folders(tmp_path / "data", {"Red_Apple": 3, "cat/near": 2, "neither": 2})
    # In the order of a walk: three of red apples, two of cats, two of nothing, then the image by itself.
    fixed_names(monkeypatch, [1, 1, 2, 0, 2, 2, 2, 0])
    line = [str(folder), str(image), "--labels", "cat,red apple,dog", "--checkpoint", str(run_dir)]
    assert main([*line, "--top", "1"]) == 0
    *blocks, empty, title, first, second, third, accuracy = capsys.readouterr().out.splitlines()
    assert len(blocks) == 2 * 8 and blocks[0] == f"{folder}/Red_Apple/0.jpg" and not empty
    assert title == "8 images by their best name:"
    assert [row.split()[:-1] for row in (first, second, third)] == [
        ["dog", "4"],
        ["cat", "2"],
        ["red", "apple", "2"],
    ]
    assert first.split()[-1] == "50.0%"
    assert accuracy == "top-1 accuracy 60.0%: 3 of the 5 images whose folder is named as a label"


def test_a_summary_is_short_and_of_several_images_alone(
    run_dir, image, tmp_path, capsys, monkeypatch
):
    folder = class_folders(tmp_path / "data", {"pictures": 14})
    labels = ",".join(f"label {n}" for n in range(13))
    fixed_names(monkeypatch, [*range(13), 12])
    line = ["--labels", labels, "--checkpoint", str(run_dir), "--top", "1"]
    assert main([str(folder), *line]) == 0
    summary = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert len(summary) == 12 and summary[1].split()[:3] == ["label", "12", "2"]
    assert summary[-1].split() == ["and", "3", "other", "names:", "3", "21.4%"]

    fixed_names(monkeypatch, [0])
    assert main([str(image), *line]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_picture_by_itself_has_the_class_of_its_own_folder_alone(
    run_dir, tmp_path, capsys, monkeypatch
):
    class_folders(tmp_path, {"cat/inner": 1, "dog": 1})
    fixed_names(monkeypatch, [0, 1])
    paths = [str(tmp_path / "cat/inner/0.jpg"), str(tmp_path / "dog/0.jpg")]
    assert main([*paths, "--labels", "cat,dog", "--checkpoint", str(run_dir)]) == 0
    assert "100.0%: 1 of the 1 images whose folder" in capsys.readouterr().out


def test_json_of_a_folder_is_one_object(run_dir, image, tmp_path, capsys):
    folder = class_folders(tmp_path / "data", {"cat": 2})
    line = [str(image), str(folder), str(image), "--labels", "cat,dog"]
    assert main([*line, "--checkpoint", str(run_dir), "--json"]) == 0
    printed = capsys.readouterr().out
    content = json.loads(printed)
    assert list(content) == [str(image), f"{folder}/cat/0.jpg", f"{folder}/cat/1.jpg"]
    assert printed == json.dumps(content, indent=2) + "\n"


def test_what_is_found_is_written_to_files(run_dir, image, tmp_path, capsys):
    folder = class_folders(tmp_path / "data", {"cat": 2})
    tables = [tmp_path / "found.csv", tmp_path / "found.JSON"]
    line = [str(image), str(folder), "--labels", "cat,dog", "--checkpoint", str(run_dir)]
    assert main([*line, "--out", str(tables[0]), "--out", str(tables[1])]) == 0
    said = capsys.readouterr().out
    assert "3 images by their best name" in said and f"written to {tables[0]}" in said
    assert "#" not in said  # no table of all images

    assert main([*line, "--json"]) == 0
    printed = capsys.readouterr().out
    assert tables[1].read_text() == printed
    expected = [
        {"image": path, "rank": str(rank), "label": label, "probability": str(probability)}
        for path, names in json.loads(printed).items()
        for rank, (label, probability) in enumerate(names.items(), 1)
    ]
    with open(tables[0], newline="") as file:
        assert list(csv.DictReader(file)) == expected
    assert {path.name for path in tmp_path.iterdir()} >= {"found.csv", "found.JSON"}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("found.txt", "--out writes .csv or .json, not "),
        ("no/found.csv", "create it first"),
        ("folder.csv", "is a folder; name a file"),
    ],
)
def test_a_file_that_cannot_be_written_is_said_before_the_work(
    image, tmp_path, capsys, out, message
):
    (tmp_path / "folder.csv").mkdir()
    line = [str(image), "--labels", "a,b", "--checkpoint", "none", "--out", str(tmp_path / out)]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_no_more_images_are_in_memory_for_a_larger_folder(run_dir, tmp_path, capsys, monkeypatch):
    """Counted in bytes of the tensors of pixels that are alive when a batch is classified."""
    monkeypatch.setattr(classification, "IMAGES_AT_ONCE", 4)
    classify, alive = classification.classify, []
    # Of other tests; held here, so that no other object gets its number.
    earlier = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    known = {id(x) for x in earlier}

    def counted(model, images, classifier_EC, num_best):
        made = [x for x in gc.get_objects() if type(x) is torch.Tensor and id(x) not in known]
        tensors = [x for x in made if x.shape[-3:-2] == (3,)]
        alive[-1].append(sum(x.untyped_storage().nbytes() for x in tensors))
        return classify(model, images, classifier_EC, num_best)

    monkeypatch.setattr(classification, "classify", counted)
    for count in (4, 12):
        folder = class_folders(tmp_path / str(count), {"cat": count})
        alive.append([])
        assert main([str(folder), "--labels", "cat,dog", "--checkpoint", str(run_dir)]) == 0
    one_image = 3 * 32 * 32 * 4
    # A batch, and its images before they are stacked.
    assert alive[0] == [2 * 4 * one_image] and alive[1] == 3 * alive[0]


def test_progress_is_a_line_now_and_then_without_a_terminal(run_dir, tmp_path, capsys, monkeypatch):
    folder = class_folders(tmp_path / "data", {"cat": 3})
    line = [str(folder), "--labels", "cat,dog", "--checkpoint", str(run_dir), "--json"]
    assert main(line) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("clipcore.progress.LINE_EVERY_S", 0.0)
    assert main(line) == 0
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert [row.partition(" images, ")[0] for row in lines] == [
        f"clipcore.classify: {number} of 3" for number in (1, 2, 3)
    ]
    assert len(json.loads(said.out)) == 3


def test_what_folders_hold_beside_readable_images_is_counted(run_dir, tmp_path, capsys):
    folder = class_folders(tmp_path / "data", {"cat": 2})
    (folder / "cat" / "broken.png").write_bytes(b"nothing")
    (folder / "moving.gif").write_bytes(b"GIF89a")
    (folder / "notes.txt").write_text("no picture")
    line = [str(folder), "--labels", "cat,dog", "--checkpoint", str(run_dir)]
    assert main(line) == 0
    printed = capsys.readouterr()
    assert "2 images by their best name" in printed.out
    error = printed.err
    assert error.startswith("clipcore.classify: note: left out of the folders: ")
    assert "1 x image that cannot be read, such as " in error and "broken.png is no" in error
    assert "1 x picture of another kind, such as moving.gif" in error and error.count("\n") == 1

    # By its name it has to be readable; and a folder has to hold one.
    assert main([f"{folder}/cat/broken.png", *line]) == 2
    assert "broken.png is no readable image" in capsys.readouterr().err
    for name in ("0.jpg", "1.jpg"):
        (folder / "cat" / name).write_bytes(b"nothing")
    assert main(line) == 2
    error = capsys.readouterr().err
    assert "can be read; found" in error and "3 x image that cannot be read" in error
    for path in (folder / "cat").iterdir():
        path.unlink()
    assert main(line) == 2
    error = capsys.readouterr().err
    assert f"the folder {folder} holds no image (.jpg, " in error and "moving.gif" in error


def test_a_picture_that_is_too_large_is_one_line(run_dir, tmp_path, capsys):
    """400 million pixels, more than Pillow opens at all."""
    (tmp_path / "b.png").write_bytes(bombs.HEADERS["PNG"](20_000, 20_000))
    line = [str(tmp_path / "b.png"), "--labels", "a,b", "--checkpoint", str(run_dir)]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert "b.png is no readable image" in error and error.count("\n") == 1


def test_the_largest_picture_is_a_setting(run_dir, tmp_path, capsys):
    Image.new("RGB", (60, 50)).save(tmp_path / "b.png")
    line = [str(tmp_path / "b.png"), "--labels", "a,b", "--checkpoint", str(run_dir)]
    assert main([*line, "--max-pixels", "2999"]) == 2
    assert "more than 2999; --max-pixels 3000 reads it" in capsys.readouterr().err
    assert main([*line, "--max-pixels", "3000"]) == 0
    (tmp_path / "b.png").unlink()
    os.mkfifo(tmp_path / "b.png")
    assert main(line) == 2
    assert "b.png: Not a regular file" in capsys.readouterr().err


def test_labels():
    assert read_labels("a cat, a dog") == ["a cat", "a dog"]


def test_labels_may_come_from_a_pipe_of_the_shell(tmp_path):
    """As of ``--labels <(cut -f1 names.tsv)``."""
    reader, writer = os.pipe()
    os.write(writer, b"a cat\na dog\n")
    os.close(writer)
    assert read_labels(f"/dev/fd/{reader}") == ["a cat", "a dog"]
    os.close(reader)


def test_labels_are_read_from_files_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"cannot read the labels .*pipe: Not a regular file"):
        read_labels(str(tmp_path / "pipe"))
    (tmp_path / "long").write_bytes(b"a" * (1 << 21))
    with pytest.raises(ValueError, match=r"long has more than 1,048,576 bytes"):
        read_labels(str(tmp_path / "long"))
    (tmp_path / "one").write_bytes(b"a" * (1 << 19))
    with pytest.raises(ValueError, match="--labels holds only 'aaa") as caught:
        read_labels(str(tmp_path / "one"))
    assert len(str(caught.value)) < 300


def test_arguments_do_not_steer_the_terminal(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["a.jpg", "--labels", "a,b", "--checkpoint", "r", "--tip\x1b[2J\nline"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "\x1b" not in error
    assert error.startswith("clipcore.classify: error: unrecognized arguments: --tip")


def test_features_that_are_not_finite_are_named(run_dir, image, capsys, monkeypatch):
    monkeypatch.setattr(
        "clipcore.classify.classification.classify",
        lambda *_: (torch.full((1, 2), math.nan), torch.zeros(1, 2, dtype=torch.long)),
    )
    assert main([str(image), "--labels", "a, b", "--checkpoint", str(run_dir)]) == 2
    assert "the model's features are not finite" in capsys.readouterr().err
