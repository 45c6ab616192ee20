"""``python -m clipcore.evaluate`` from end to end: a small run and a data set of each layout, all commands, one page."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_sets import write_faces
from PIL import Image
from runs import NANO, PROGRAMS, RunServer
from safetensors.torch import save_file
from shards import SHAPES, picture, write_csv

from clipcore.evaluate import features as feature_store
from clipcore.evaluate import runner
from clipcore.evaluate.__main__ import main
from clipcore.evaluate.arguments import build_parser
from clipcore.evaluate.results import Result, read_result, read_results, write_result
from clipcore.evaluate.same_weights import identity_of
from clipcore.towers.factory import create_model


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.fixture(scope="module")
def runs(server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two checkpoints of a run of a few steps, and its last state."""
    folder = tmp_path_factory.mktemp("runs")
    table = write_csv(folder / "data", num_pairs=40)
    line = ["--logs", str(folder), "--name", "r", "--train-data", str(table), *NANO]
    line += ["--batch-size", "20", "--epochs", "3", "--save-frequency", "1"]
    status, text = server.run(line, folder / "out")
    assert status == 0, text
    steps = sorted((folder / "r" / "checkpoints").glob("step*"))
    return [str(steps[0]), str(steps[1]), str(folder / "r")]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of five shapes, with a train and a test split; one class folder is a symbolic link."""
    folder = tmp_path_factory.mktemp("sets") / "shapes"
    for index in range(160):
        split = "test" if index >= 120 else "train"
        shape = SHAPES[index // 8 % 5]
        path = folder / split / shape / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(index)[0])
    elsewhere = folder.parent / "elsewhere"
    shutil.move(folder / "test" / "line", elsewhere)
    (folder / "test" / "line").symlink_to(elsewhere)
    (folder / "templates.json").write_text(json.dumps(["a {}.", "{}"]))
    return folder


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a table of pictures with labels and two columns of groups."""
    folder = tmp_path_factory.mktemp("people")
    lines = ["filepath,label,group:gender,group:age"]
    for index in range(80):
        (folder / f"{index}.jpg").write_bytes(picture(index)[0])
        gender, age = ("female", "male")[index % 2], ("young", "old")[index // 40]
        lines.append(f"{index}.jpg,{SHAPES[index // 8 % 5]},{gender},{age}")
    (folder / "people.csv").write_text("\n".join(lines) + "\n")
    return folder / "people.csv"


def figures(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    return {(one.dataset, one.task): one.metrics for one in read_results(folder)}


def test_all_commands_from_a_run_to_a_page(runs, shapes, people, tmp_path, capsys):
    output = str(tmp_path / "results")
    pairs = write_csv(tmp_path / "pairs", num_pairs=12)
    line = ["--checkpoint", *runs, "--output", output, "--device", "cpu"]
    data = ["--data", str(shapes), str(people), str(pairs)]
    more = ["--train-data", str(pairs), "--threshold", "0.999", "--descriptor", "pixels"]
    more += [
        "--labels",
        "paper",
        "--seeds",
        "2",
        "--shots",
        "1,4",
        "--C",
        "1",
        "--csv-separator",
        "\t",
    ]
    status = main(["all", *line, *data, *more])
    printed = capsys.readouterr()
    assert status == 0, printed.err

    found = figures(Path(output))
    tasks = {name: {task for dataset, task in found if dataset == name} for name, _ in found}
    classes = {"zeroshot_classification", "prompt_gains", "overlap"}
    assert tasks == {
        "shapes": {*classes, "linear_probe", "few_shot"},
        "people": {*classes, "bias"},
        "pairs": {"zeroshot_retrieval"},
    }
    assert len(read_results(Path(output))) == 3 * (5 + 4 + 1)
    assert printed.out.splitlines()[: 3 * (1 + 5 + 4 + 1)] == [
        one for one in printed.out.splitlines() if one.startswith(("  ", "ViT-nano-8-32, "))
    ]
    assert f"the page is {output}/report.html\nresults are in {output}\n" in printed.out

    # The same by single commands, without a further look at an image.
    before = {path: path.stat().st_mtime_ns for path in Path(output, "features").rglob("*.npy")}
    for command in ("robustness", "scaling", "compare"):
        assert main([command, *STUDIES[command](output, runs)]) == 0, capsys.readouterr().err
    assert main(["linear-probe", *line, "--data", str(shapes), "--C", "1"]) == 0
    assert before == {
        path: path.stat().st_mtime_ns for path in Path(output, "features").rglob("*.npy")
    }
    assert main(["report", output]) == 0
    page = Path(output, "report.html").read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "Zero-shot classification",
        "Retrieval",
        "What prompts gain",
        "Linear probe",
        "Zero-shot against a probe",
        "Few-shot",
        "Comparison",
        "Natural shift",
        "Scaling",
        "Overlap with the training data",
        "Groups of people",
        "What was evaluated",
    ]
    assert page.count("<svg") >= 11


STUDIES = {
    "robustness": lambda output, _: [output, "--in", "shapes", "--out", "people"],
    "scaling": lambda output, runs: [output, "--gmacs", str(write_gmacs(output, runs))],
    "compare": lambda output, runs: [output, "--model-a", runs[0]],
}


def write_gmacs(output: str, runs: list[str]) -> Path:
    model = read_results(Path(output))[0].model
    rows = [f"{model},{run},{10**place}" for place, run in enumerate(runs)]
    path = Path(output).parent / "gmacs.csv"
    path.write_text("\n".join(["model,pretrained,gmacs", *rows]) + "\n")
    return path


def test_a_second_command_makes_no_encoder_call(runs, shapes, tmp_path, monkeypatch, capsys):
    encoded = []

    class Counted(feature_store.FeatureStore):
        def _write(self, *arguments):
            seconds = super()._write(*arguments)
            encoded.append(self.num_encoded)
            return seconds

    monkeypatch.setattr(runner, "FeatureStore", Counted)
    line = ["--data", str(shapes), "--output", str(tmp_path), "--device", "cpu"]
    assert main(["zero-shot", "--checkpoint", runs[2], *line]) == 0
    assert encoded == [40]
    assert main(["prompts", "--checkpoint", runs[2], *line]) == 0
    assert encoded == [40]
    assert main(["linear-probe", "--checkpoint", runs[2], *line, "--C", "1"]) == 0
    assert encoded == [40, 120]
    assert main(["few-shot", "--checkpoint", runs[2], *line, "--C", "1", "--seeds", "1"]) == 0
    assert encoded == [40, 120]
    # Other weights are another matter, whatever their path.
    moved = tmp_path / "run"
    shutil.copytree(runs[2], moved)
    assert main(["zero-shot", "--checkpoint", str(moved), *line]) == 0
    assert encoded == [40, 120]
    assert main(["zero-shot", "--checkpoint", runs[0], *line]) == 0
    assert encoded == [40, 120, 40]


def test_json_and_saved_classifier(runs, shapes, tmp_path, capsys):
    line = ["--checkpoint", runs[2], "--data", str(shapes), "--output", str(tmp_path)]
    line += ["--device", "cpu", "--json"]
    assert main(["linear-probe", *line, "--C", "1", "--save-classifier"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["task"] == "linear_probe" and record["dataset"] == "shapes"
    saved = np.load(tmp_path / record["clipcore"]["classifier"])
    assert saved["classnames"].tolist() == sorted(SHAPES)
    for path in tmp_path.glob("*.json"):
        assert "NaN" not in path.read_text() and math.isfinite(record["metrics"]["lp_acc1"])
    assert not (tmp_path / "eval_results.jsonl").exists()
    assert main(["zero-shot", *line]) == 0
    lines = (tmp_path / "eval_results.jsonl").read_text().splitlines()
    assert [json.loads(one)["key"] for one in lines] == ["shapes"]


def test_transparent_pictures_lie_over_white_and_are_counted(runs, tmp_path, capsys):
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        folder = tmp_path / "set" / name
        folder.mkdir(parents=True)
        for index in range(2):
            Image.new("RGBA", (40, 40), (*colour, 0)).save(folder / f"{index}.png")
    line = ["--checkpoint", runs[2], "--data", str(tmp_path / "set")]
    line += ["--output", str(tmp_path / "results"), "--device", "cpu"]
    assert main(["zero-shot", *line]) == 0
    assert "4 transparent" in capsys.readouterr().out
    (pooled,) = (tmp_path / "results" / "features").glob("*/pooled.npy")
    assert len(np.unique(np.load(pooled), axis=0)) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["zero-shot", "--data", "SHAPES"], "name a model with --checkpoint or --pretrained"),
        (["zero-shot", "--checkpoint", "RUN"], "name a data set with --data, or a suite"),
        (
            ["zero-shot", "--checkpoint", "RUN", "--data", "no/such"],
            "there is no data set 'no/such'",
        ),
        (["zero-shot", "--checkpoint", "no/such", "--data", "SHAPES"], "no/such"),
        (["zero-shot", "--checkpoint", "RUN", "--suite", "vtab+"], "--suite and --root belong"),
        (
            ["zero-shot", "--checkpoint", "RUN", "--suite", "best", "--root", "."],
            "paper27, vtab+, shift",
        ),
        (
            ["zero-shot", "--checkpoint", "RUN", "--suite", "shift", "--root", "TMP"],
            "none of the data sets of shift is in",
        ),
        (["zero-shot", "--checkpoint", "RUN", "--data", "SHAPES", "SHAPES"], "two data sets are"),
        (
            ["zero-shot", "--checkpoint", "RUN", "--data", "SHAPES", "--templates", "a photo"],
            "--templates 'a photo' has no {}",
        ),
        (
            ["zero-shot", "--checkpoint", "RUN", "--data", "SHAPES", "--batch-size", "0"],
            "at least 1",
        ),
        (["zero-shot", "--checkpoint", "RUN", "--data", "SHAPES", "--model", "x"], "--model names"),
        (["zero-shot", "--checkpoint", "RUN", "--data", "SHAPES", "--bpe-path", "x"], "--bpe-path"),
        (
            ["zero-shot", "--checkpoint", "RUN", "--data", "SHAPES", "--threads", "0"],
            "--threads is",
        ),
        (["linear-probe", "--checkpoint", "RUN", "--data", "PEOPLE"], "no split 'train'"),
        (
            ["linear-probe", "--checkpoint", "RUN", "--data", "SHAPES", "--C", "0"],
            "--C is a positive",
        ),
        (
            ["linear-probe", "--checkpoint", "RUN", "--data", "SHAPES", "--val-fraction", "1"],
            "--val",
        ),
        (["few-shot", "--checkpoint", "RUN", "--data", "SHAPES", "--shots", "1,x"], "--shots are"),
        (["few-shot", "--checkpoint", "RUN", "--data", "SHAPES", "--shots", "64"], "no class of"),
        (["few-shot", "--checkpoint", "RUN", "--data", "SHAPES", "--seeds", "0"], "--seeds is at"),
        (["retrieval", "--checkpoint", "RUN", "--data", "SHAPES"], "classes, and no captions"),
        (["bias", "--checkpoint", "RUN", "--data", "PEOPLE", "--groups", "x"], "x"),
        (["bias", "--checkpoint", "RUN", "--data", "SHAPES"], "--groups names no column"),
        (
            ["overlap", "--checkpoint", "RUN", "--data", "SHAPES", "--train-data", "no/such"],
            "no/such",
        ),
        (
            ["zero-shot", "--checkpoint", "RUN", "--data", "SHAPES", "--features", "PEOPLE"],
            "--features names a folder",
        ),
        (
            ["zero-shot", "--checkpoint", "RUN", "--data", "SHAPES", "--template", "{}"],
            "--template",
        ),
        (["report", "no/such"], "there is no folder of results no/such"),
        (["robustness", "no/such"], "there is no folder of results no/such"),
        (["best"], "invalid choice: 'best'"),
    ],
)
def test_mistakes_are_one_line(runs, shapes, people, tmp_path, capsys, arguments, said):
    places = {"RUN": runs[2], "SHAPES": str(shapes), "PEOPLE": str(people), "TMP": str(tmp_path)}
    line = [places.get(word, word) for word in arguments]
    if line[0] not in ("report", "robustness", "best"):
        line += ["--output", str(tmp_path / "results"), "--device", "cpu"]
    try:
        status = main(line)
    except SystemExit as error:
        status = error.code
    printed = capsys.readouterr()
    assert status == 2
    errors = [one for one in printed.err.splitlines() if ": error: " in one]
    assert len(errors) == 1 and said in errors[0]
    assert "Traceback" not in printed.err
    assert not list(tmp_path.glob("results/*.json"))


def test_what_can_be_evaluated_is_where_other_sets_and_models_fail(runs, shapes, tmp_path, capsys):
    line = ["--data", "no/such", str(shapes), "--output", str(tmp_path), "--device", "cpu"]
    assert main(["zero-shot", "--checkpoint", "no/model", runs[2], *line]) == 2
    printed = capsys.readouterr()
    assert printed.err.count(": error: ") == 2
    assert [one.dataset for one in read_results(tmp_path)] == ["shapes"]


def test_a_split_that_is_a_link_to_another_is_no_test(runs, shapes, tmp_path, capsys):
    (tmp_path / "set").mkdir()
    for name in ("train", "test"):
        (tmp_path / "set" / name).symlink_to(shapes / "test")
    line = ["--checkpoint", runs[2], "--data", str(tmp_path / "set"), "--device", "cpu"]
    assert main(["linear-probe", *line, "--output", str(tmp_path / "results"), "--C", "1"]) == 2
    assert "train and test of set hold the same images" in capsys.readouterr().err


def test_what_replaces_another_result_is_said(runs, shapes, tmp_path, capsys):
    line = ["zero-shot", "--checkpoint", runs[2], "--data", str(shapes), "--output", str(tmp_path)]
    line += ["--device", "cpu"]
    for more, said in (
        ([], ""),
        ([], ""),
        (["--templates", "my {}"], "of other prompts;"),
        (["--templates", "my {}", "--half-cache"], "of other images or precision;"),
    ):
        assert main([*line, *more]) == 0
        printed = capsys.readouterr().err
        assert (said in printed) if said else not printed
    assert len(read_results(tmp_path)) == 1


def test_a_model_keeps_the_name_that_its_results_have(runs, shapes, tmp_path, monkeypatch, capsys):
    """By a relative path, an absolute one or as a copy; other weights under a known name are another model."""
    monkeypatch.chdir(Path(runs[0]).parent)
    relative = Path(runs[0]).name
    copy = shutil.copytree(runs[2], tmp_path / "copy") / "checkpoints" / relative
    line = ["--data", str(shapes), "--output", str(tmp_path / "results"), "--device", "cpu"]
    assert main(["zero-shot", *line, "--checkpoint", relative, runs[0]]) == 0
    said = f"note: {runs[0]} has the weights of {relative}: its results are under that name"
    assert said in capsys.readouterr().err
    assert main(["prompts", *line, "--checkpoint", str(copy), runs[1]]) == 0
    printed = capsys.readouterr().err
    assert f"note: {copy} has the weights of {relative}" in printed and runs[1] not in printed
    found = {(one.task, one.pretrained) for one in read_results(tmp_path / "results")}
    assert found == {
        ("zeroshot_classification", relative),
        ("prompt_gains", relative),
        ("prompt_gains", runs[1]),
    }

    # Results that hold no hash, as of older versions, are nobody's but their name's.
    for path in (tmp_path / "results").glob("*.json"):
        record = json.loads(path.read_text())
        del record["clipcore"]["weights_sha256"]
        path.write_text(json.dumps(record))
    assert main(["zero-shot", *line, "--checkpoint", runs[0]]) == 0
    assert "has the weights of" not in capsys.readouterr().err
    assert len(read_results(tmp_path / "results")) == 4


def test_a_result_that_no_study_can_take_is_said(tmp_path, capsys):
    """Once, although several studies meet it; too few results are no mistake."""
    for dataset in ("cars", "wds_cars"):
        result = Result(dataset, "ViT-B-32", "a", "zeroshot_classification", {"acc1": 0.5})
        write_result(tmp_path, result)
    assert runner._draw(tmp_path, is_quiet=True) == 1
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    assert "error: there are two results of ViT-B-32 a on cars (zero-shot)" in printed.err
    assert list(tmp_path.glob("*.html"))

    (tmp_path / result.file_name).unlink()
    assert runner._draw(tmp_path, is_quiet=True) == 0
    assert not capsys.readouterr().err


def test_a_run_that_was_trained_on_replaces_what_it_had(runs, shapes, tmp_path, capsys):
    """Although its new weights have results under the name of their step."""
    run = shutil.copytree(runs[2], tmp_path / "run")
    first, *_, last = sorted((run / "checkpoints").glob("step*"))
    line = ["--data", str(shapes), "--output", str(tmp_path / "results"), "--device", "cpu"]
    assert main(["zero-shot", *line, "--checkpoint", str(first)]) == 0
    assert main(["prompts", *line, "--checkpoint", str(first)]) == 0
    for path in (tmp_path / "results").glob("*.json"):
        # As if the run had been evaluated when this was its newest step.
        before = read_result(path)
        write_result(path.parent, dataclasses.replace(before, pretrained=str(run)))
        path.unlink()
    assert main(["zero-shot", *line, "--checkpoint", str(last)]) == 0
    assert "leave out" not in capsys.readouterr().err

    assert main(["zero-shot", *line, "--checkpoint", str(run)]) == 0
    printed = capsys.readouterr().err
    assert "has the weights of" not in printed
    assert "leave out 1 x result of a model's earlier weights, such as shapes_" in printed
    found = {
        (one.task, one.pretrained): identity_of(one).weights
        for one in read_results(tmp_path / "results")
    }
    assert found.keys() == {
        ("zeroshot_classification", str(run)),
        ("zeroshot_classification", str(last)),
        ("prompt_gains", str(run)),
    }
    new, same, old = (
        found[key] for key in sorted(found, key=lambda key: (key[0] == "prompt_gains", key))
    )
    assert new == same != old
    # One model is one line.
    (text,) = (tmp_path / "results" / "eval_results.jsonl").read_text().splitlines()
    assert json.loads(text)["pretrained"] == str(run)


def test_lines_of_bias_and_overlap_say_what_was_found(runs, people, tmp_path, capsys):
    line = ["--checkpoint", runs[2], "--data", str(people), "--output", str(tmp_path)]
    line += ["--device", "cpu"]
    assert main(["bias", *line, "--groups", "gender,age", "--labels", "paper"]) == 0
    (record,) = [one for one in read_results(tmp_path) if one.task == "bias"]
    printed = capsys.readouterr().out
    worst = record.details["worst_group"]["group"]
    assert f"worst {worst} {100 * record.metrics['worst_group_accuracy']:.1f}%" in printed
    assert f"gap {100 * record.metrics['gap']:.1f}" in printed
    assert ("label '" in printed) == bool(record.details["differences"])

    more = ["--train-data", str(people), "--csv-caption-key", "label", "--threshold", "0.9"]
    assert main(["overlap", *line, *more, "--descriptor", "pixels"]) == 0
    assert "contamination 100.0%; from cosine 0.9000 on (given)" in capsys.readouterr().out


def test_notes_on_training_images_are_said_once(runs, shapes, people, tmp_path, capsys):
    """They are in the result of each data set all the same."""
    training = tmp_path / "training"
    training.mkdir()
    (training / "a.jpg").write_bytes(picture(0)[0])
    (training / "b.gif").write_bytes(b"GIF89a")
    line = ["--checkpoint", runs[2], "--data", str(shapes), str(people), "--device", "cpu"]
    line += ["--output", str(tmp_path / "out"), "--train-data", str(training)]
    line += ["--threshold", "0.9", "--descriptor", "pixels"]
    assert main(["overlap", *line]) == 0
    printed = capsys.readouterr().err
    assert printed.count("picture of another kind, such as b.gif") == 1
    assert printed.count("all of whose images are taken") == 1
    notes = [one.details["notes"] for one in read_results(tmp_path / "out")]
    assert len(notes) == 2 and all("b.gif" in " ".join(those) for those in notes)


def test_faces_of_datacomp_are_measured_beside_a_table(runs, people, tmp_path, capsys):
    rows = [(row % 4, row % 2, row // 20, int(row // 20 != 1)) for row in range(60)]
    faces = write_faces(tmp_path / "wds_utkface_test", *rows)
    output = tmp_path / "results"
    line = ["--checkpoint", runs[2], "--data", str(people), str(faces), "--output", str(output)]
    assert main(["bias", *line, "--groups", "gender,age", "--device", "cpu"]) == 0
    found = {one.dataset: one for one in read_results(output)}
    assert found.keys() == {"people", "wds_utkface_test"}
    metrics = found["wds_utkface_test"].metrics
    assert {
        "acc_race_avg",
        "acc_gender_x_race:2_gender:1",
        "toxicity_crime_race:0",
    } <= metrics.keys()
    printed = capsys.readouterr().out
    assert f"acc_gender_avg {metrics['acc_gender_avg']:.1%}; worst " in printed
    assert main(["report", str(output)]) == 0
    page = (output / "report.html").read_text()
    assert "accuracy of gender" in page and "suspicious person" in page

    # They have no classes, so that another command says what to do.
    line = ["zero-shot", "--checkpoint", runs[2], "--data", str(faces), "--output", str(output)]
    assert main([*line, "--device", "cpu"]) == 2
    assert "needs classes, and wds_utkface_test has none" in capsys.readouterr().err


def test_warnings_of_weights_are_notes(shapes, tmp_path, capsys):
    torch.manual_seed(0)
    state = create_model("ViT-nano-8-32").state_dict()
    save_file(dict(state), tmp_path / "weights.safetensors")
    line = ["zero-shot", "--pretrained", str(tmp_path / "weights.safetensors"), "--data"]
    line += [str(shapes), "--output", str(tmp_path / "results"), "--device", "cpu"]
    assert main(line) == 2
    printed = capsys.readouterr().err
    assert "note: " in printed and "assumed to be ViT-nano-8-32 with GELU" in printed
    assert "UserWarning" not in printed and "vocabulary" in printed.splitlines()[-1]


def test_one_set_that_cannot_be_evaluated_does_not_end_the_others(runs, shapes, tmp_path, capsys):
    (tmp_path / "lonely").mkdir()
    (tmp_path / "lonely" / "train").symlink_to(shapes / "train")
    line = ["all", "--checkpoint", *runs[:2], "--data", str(tmp_path / "lonely"), str(shapes)]
    line += ["--output", str(tmp_path / "results"), "--device", "cpu", "--C", "1", "--seeds", "1"]
    assert main(line) == 2
    assert capsys.readouterr().err.count("has no split 'test'") == 2
    assert {one.dataset for one in read_results(tmp_path / "results")} == {"shapes"}
    assert len(read_results(tmp_path / "results")) == 2 * 4


def test_a_result_that_cannot_be_written_is_named_and_the_rest_goes_on(
    runs, shapes, tmp_path, capsys, monkeypatch
):
    write = runner.write_result

    def full_disk(folder, result):
        if result.task == "prompt_gains":
            raise OSError(28, "No space left on device", str(folder))
        return write(folder, result)

    monkeypatch.setattr(runner, "write_result", full_disk)
    line = ["all", "--checkpoint", runs[2], "--data", str(shapes), "--output", str(tmp_path)]
    assert main([*line, "--device", "cpu", "--C", "1", "--seeds", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("No space left on device") == 1 and "Traceback" not in printed.err
    assert {one.task for one in read_results(tmp_path)} == {
        "zeroshot_classification",
        "linear_probe",
        "few_shot",
    }


def test_tests_of_overlap_count_all_data_sets_of_a_folder(runs, shapes, people, tmp_path):
    line = ["--checkpoint", runs[2], "--output", str(tmp_path), "--device", "cpu"]
    line += ["--train-data", str(people), "--csv-caption-key", "label", "--threshold", "0.9"]
    line += ["--csv-separator", ","]
    for number, dataset in enumerate((shapes, people), start=1):
        assert main(["overlap", *line, "--data", str(dataset), "--descriptor", "pixels"]) == 0
        found = [one.details for one in read_results(tmp_path)]
        tested = [one for one in found if one.get("num_tests")]
        assert {one["num_tests"] for one in tested} <= {len(tested)} and len(found) == number


def test_missing_sets_of_a_suite_are_named_and_skipped(runs, shapes, tmp_path, capsys):
    (tmp_path / "wds_imagenet-r").symlink_to(shapes)
    line = ["zero-shot", "--checkpoint", runs[2], "--suite", "shift", "--root", str(tmp_path)]
    line += ["--output", str(tmp_path / "results"), "--device", "cpu"]
    assert main(line) == 0
    printed = capsys.readouterr().err
    assert "note: " in printed and "imagenetv2" in printed and "objectnet" in printed
    assert "imagenet-r" not in printed.split("sets are not in")[1]
    assert main([*line, "--strict"]) == 2


def test_a_damaged_result_is_named_before_the_work(runs, shapes, tmp_path, capsys):
    (tmp_path / "old.json").write_text("{")
    line = ["--checkpoint", runs[2], "--data", str(shapes), "--output", str(tmp_path)]
    assert main(["zero-shot", *line, "--device", "cpu"]) == 2
    assert "old.json" in capsys.readouterr().err
    assert not (tmp_path / "features").exists()


def test_features_of_files_need_no_model(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, number in (("train", 60), ("test", 20)):
        labels = np.arange(number) % 4
        X = rng.normal(size=(number, 8)) + 4 * np.eye(8)[labels]
        (tmp_path / "set").mkdir(exist_ok=True)
        np.savez(tmp_path / "set" / f"{name}.npz", features=X.astype(np.float32), labels=labels)
    line = ["--data", str(tmp_path / "set"), "--output", str(tmp_path / "results")]
    line += ["--device", "cpu", "--seeds", "2", "--shots", "1,2"]
    assert main(["all", *line]) == 0
    found = figures(tmp_path / "results")
    assert set(found) == {("set", "linear_probe"), ("set", "few_shot")}
    assert found["set", "linear_probe"]["lp_acc1"] > 0.9


def test_ctrl_c_keeps_what_is_finished(runs, shapes, tmp_path):
    line = ["all", "--checkpoint", runs[2], "--data", str(shapes), "--output", str(tmp_path)]
    command = [sys.executable, str(PROGRAMS / "stopped_evaluation.py"), *line, "--device", "cpu"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 128 + signal.SIGINT
    assert ended.stderr.splitlines()[-1].startswith("clipcore.evaluate: stopped")
    assert [one.task for one in read_results(tmp_path)] == ["zeroshot_classification"]


def test_dead_readers_and_full_disks_of_output_end_nothing(runs, shapes, tmp_path):
    command = [sys.executable, "-m", "clipcore.evaluate", "zero-shot", "--checkpoint", runs[2]]
    command += ["--data", str(shapes), "--output", str(tmp_path), "--device", "cpu"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0, ended.stderr
    assert len(read_results(tmp_path)) == 1


def test_threads_are_those_asked_for_or_given_or_faster(runs, shapes, tmp_path, monkeypatch):
    line = ["zero-shot", "--checkpoint", runs[2], "--data", str(shapes), "--output", str(tmp_path)]
    line += ["--device", "cpu"]
    timed = []
    monkeypatch.setattr(runner, "most_threads", lambda *_: 4)
    monkeypatch.setattr(runner, "set_faster_for_products", timed.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert main([*line, "--threads", "1"]) == 0
    assert torch.get_num_threads() == 1 and timed == []
    assert main(line) == 0 and timed == [4]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert main(line) == 0 and timed == [4]


def test_help_of_every_command_reads_well(capsys):
    parser = build_parser()
    (commands,) = [a for a in parser._actions if hasattr(a, "choices") and a.choices]
    assert list(commands.choices) == [
        "zero-shot",
        "prompts",
        "linear-probe",
        "few-shot",
        "retrieval",
        "overlap",
        "bias",
        "all",
        "robustness",
        "scaling",
        "compare",
        "report",
    ]
    for name, command in commands.choices.items():
        text = command.format_help()
        assert len(text.splitlines()) <= 130, name
        for action in command._actions:
            assert action.help, (name, action.dest)
