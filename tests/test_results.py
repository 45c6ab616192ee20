"""Files of results: read back as they were, under CLIP_benchmark's and datacomp's keys, and folders of strangers."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path

import pytest

from clipcore.data import DataError
from clipcore.evaluate.results import (
    LINES_FILE,
    Result,
    models_of,
    read_result,
    read_results,
    set_key,
    write_lines,
    write_result,
)

pytestmark = pytest.mark.fast


def result(
    dataset: str = "glyphs", task: str = "zeroshot_classification", **more: object
) -> Result:
    values: dict[str, object] = {
        "model": "ViT-B-32",
        "pretrained": "openai",
        "metrics": {"acc1": 0.632, "acc5": None, "mean_per_class_recall": 0.6},
        "details": {"main_metric": "acc1", "num_images": 1000, "seconds": {"encode": 1.5}},
    }
    return Result(dataset, task=task, **{**values, **more})  # type: ignore[arg-type]


def test_results_are_read_back_as_they_were_and_replace_older_ones(tmp_path):
    folder = tmp_path / "a" / "results"
    first = result(language="de")
    other = result("icons", "linear_probe", metrics={"lp_acc1": 0.5, "epochs": 12, "fewshot_k": -1})
    for one in (result(language="de", metrics={"acc1": 0.1}), other, first):
        path = write_result(folder, one)
        assert read_result(path) == one
    assert read_results(folder) == [first, other]
    assert path.name == "glyphs_openai_ViT-B-32_de_zeroshot_classification.json"
    assert models_of([first, other]) == [("ViT-B-32", "openai")]
    # JSON has no NaN, so that readers in other languages read it too.
    assert '"acc5": null' in path.read_text()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"pretrained": "runs/a"}, {"pretrained": "runs-a"}),
        ({"pretrained": "runs/a"}, {"pretrained": "runs_a"}),
        ({"model": "ViT-B/32"}, {"model": "ViT-B-32"}),
        ({"dataset": "a_b", "pretrained": "c"}, {"dataset": "a", "pretrained": "b_c"}),
        ({"pretrained": "x" * 300}, {"pretrained": "x" * 301}),
        ({"dataset": "écrit"}, {"dataset": "ècrit"}),
    ],
)
def test_no_two_results_share_a_file(tmp_path, a, b):
    for more in (a, b):
        write_result(tmp_path, result(**more))
    assert len(read_results(tmp_path)) == 2
    assert all(len(name) < 200 and name.isascii() for name in os.listdir(tmp_path))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_before_anything_is_written(tmp_path, number):
    folder = tmp_path / "results"
    with pytest.raises(
        ValueError, match=r"^acc1 of ViT-B-32 on glyphs is -?(nan|inf), not a finite"
    ):
        write_result(folder, result(metrics={"acc1": number}))
    with pytest.raises(ValueError, match=r"^the details of ViT-B-32 on glyphs are not JSON"):
        write_result(folder, result(details={"trace": [[1.0, number]]}))
    assert not folder.exists()


def test_a_name_in_another_encoding_is_written_and_read_back(tmp_path):
    name = os.fsdecode(b"caf\xe9/model.pt")
    path = write_result(tmp_path, result(pretrained=name))
    assert read_result(path).pretrained == name
    write_lines(tmp_path, read_results(tmp_path))
    assert json.loads((tmp_path / LINES_FILE).read_bytes())["pretrained"] == name


def test_a_result_that_would_not_be_read_again_is_not_written(tmp_path):
    path = write_result(tmp_path, result())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="more than 4: ask for fewer groups or labels"):
        write_result(tmp_path, result(details={"tables": ["x" * (1 << 20)] * 5}))
    assert path.read_bytes() == before and len(read_results(tmp_path)) == 1


def clip_benchmark_file(folder: Path, **more: object) -> Path:
    """Write what CLIP_benchmark 1.6.2 writes: its accuracies of few classes are NaN."""
    record = {
        "dataset": "wds/vtab/pcam",
        "model": "ViT-B-32",
        "pretrained": "laion2b_s34b_b79k",
        "task": "zeroshot_classification",
        "metrics": {"acc1": 0.6, "acc5": math.nan, "mean_per_class_recall": 0.59},
        "language": "en",
    }
    path = folder / "theirs.json"
    path.write_text(json.dumps({**record, **more}))
    return path


def test_clip_benchmarks_own_files_are_results(tmp_path):
    found = read_result(clip_benchmark_file(tmp_path))
    assert found.metrics == {"acc1": 0.6, "acc5": None, "mean_per_class_recall": 0.59}
    assert found.details == {} and found.main_metric == "acc1" and found.value == 0.6

    probe = clip_benchmark_file(
        tmp_path, task="linear_probe", metrics={"lp_mean_average_precision": 0.7, "seed": 0}
    )
    assert read_result(probe).value == 0.7
    recalls = {"image_retrieval_recall@5": 0.4, "text_retrieval_recall@5": 0.5}
    retrieval = clip_benchmark_file(tmp_path, task="zeroshot_retrieval", metrics=recalls)
    assert read_result(retrieval).main_metric == "image_retrieval_recall@5"
    assert read_result(clip_benchmark_file(tmp_path, task="captioning")).value is None


def test_clip_benchmark_build_makes_a_table_of_ours(tmp_path):
    """Its ``main_build`` takes every JSON file of a folder, of which it asks for metrics, model and pretrained."""
    write_result(tmp_path, result())
    write_result(tmp_path, result(task="linear_probe", metrics={"lp_acc1": 0.7}))
    rows = []
    for path in sorted(tmp_path.glob("*.json")):
        data = json.loads(path.read_text())
        row = {
            **data["metrics"],
            **data,
            "model_fullname": data["model"] + " " + data["pretrained"],
        }
        del row["metrics"]
        rows.append(row)
    # As csv it has one column for each metric.
    with open(tmp_path / "benchmark.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    with open(tmp_path / "benchmark.csv", newline="") as file:
        by_task = {row["task"]: row for row in csv.DictReader(file)}
    zero_shot, probe = by_task["zeroshot_classification"], by_task["linear_probe"]
    assert (zero_shot["acc1"], zero_shot["acc5"], zero_shot["lp_acc1"]) == ("0.632", "", "")
    assert (probe["lp_acc1"], probe["acc1"]) == ("0.7", "")
    for row in by_task.values():
        assert (row["dataset"], row["model"], row["pretrained"]) == ("glyphs", "ViT-B-32", "openai")
        assert row["language"] == "en" and row["model_fullname"] == "ViT-B-32 openai"


def test_lines_in_datacomps_form(tmp_path):
    recalls = {"mean_recall@1": 0.25, "image_retrieval_recall@1": 0.2}
    write_result(tmp_path, result("wds_imagenet1k"))
    write_result(
        tmp_path,
        result(
            "flickr30k",
            "zeroshot_retrieval",
            metrics=recalls,
            details={"main_metric": "mean_recall@1"},
        ),
    )
    write_result(tmp_path, result(task="linear_probe", metrics={"lp_acc1": 0.7}))
    write_lines(tmp_path, read_results(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / LINES_FILE).read_text().splitlines()]
    assert [(line["key"], line["dataset"]) for line in lines] == [
        ("flickr30k", "flickr30k"),
        ("imagenet1k", "wds_imagenet1k"),
    ]
    assert lines[0]["metrics"] == {**recalls, "main_metric": 0.25}
    assert lines[1]["metrics"]["main_metric"] == lines[1]["metrics"]["acc1"] == 0.632


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (("imagenet1k", "wds_imagenet1k", "wds/imagenet1k", "wds_imagenet1k_test"), "imagenet1k"),
        (("vtab/cifar10", "wds_vtab-cifar10", "wds/vtab/cifar10_test"), "vtab-cifar10"),
        (("imagenet_sketch", "ImageNet-Sketch"), "imagenet-sketch"),
        (("glyphs/shift",), "glyphs-shift"),
    ],
)
def test_names_of_one_set(names, key):
    assert {set_key(name) for name in names} == {key}


def test_studies_and_other_json_files_are_no_results(tmp_path):
    path = write_result(tmp_path, result())
    (tmp_path / "scaling.json").write_text('{"study": "scaling", "models": []}')
    (tmp_path / "list.json").write_text("[1, 2]")
    assert [one.file_name for one in read_results(tmp_path)] == [path.name]
    with pytest.raises(DataError, match=r"list\.json is not a result of an evaluation"):
        read_result(tmp_path / "list.json")


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_link_to_self(path: Path) -> None:
    path.symlink_to(path.name)


def make_sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 30)


HOSTILE = {
    "a pipe": (make_fifo, "Not a regular file"),
    "a folder": (make_folder, "Is a directory"),
    "a link to itself": (make_link_to_self, "Too many levels of symbolic links"),
    "a gigabyte of nothing": (make_sparse, "more than 4 MB, which no result has; remove it"),
    "lists in lists": (
        lambda path: path.write_text("[" * 100_000),
        "is not JSON: maximum recursion",
    ),
    "a cut file": (lambda path: path.write_text('{"dataset": "gly'), "is not JSON: Unterminated"),
    "another encoding": (lambda path: path.write_bytes(b'{"a": "\xe9"}'), "is not JSON: 'utf-8'"),
    "a number of 5,000 digits": (lambda path: path.write_text("1" * 5000), "is not JSON: Exceeds"),
    "no metrics": (
        lambda path: path.write_text('{"dataset":"a","model":"b","pretrained":"c","task":"d"}'),
        "has no metrics; evaluate it again",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_files_of_strangers_get_one_line(tmp_path, kind):
    make, message = HOSTILE[kind]
    write_result(tmp_path, result())
    make(tmp_path / "x.json")
    with pytest.raises(DataError, match=message) as raised:
        read_results(tmp_path)
    assert "x.json" in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_values_of_strangers_are_no_numbers(tmp_path):
    path = clip_benchmark_file(
        tmp_path,
        metrics={"acc1": 10**400, "acc5": "0.5", "a": True, "b": [1], "c": math.inf, "d": 0.5},
        clipcore={"main_metric": ["acc1"]},
        language=5,
    )
    found = read_result(path)
    assert found.metrics == {**dict.fromkeys(("acc1", "acc5", "a", "b", "c")), "d": 0.5}
    assert found.value is None and found.language == "en"


def test_folders_that_hold_no_results(tmp_path):
    for path, message in (
        (tmp_path / "none", "there is no folder of results"),
        (tmp_path, "holds no results; python -m clipcore.evaluate zero-shot"),
    ):
        with pytest.raises(DataError, match=message):
            read_results(path)
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(DataError, match=r"cannot read the folder of results .*symbolic links"):
        read_results(loop)
