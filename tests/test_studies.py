"""Studies as commands, files and tables for the terminal."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest
from result_folders import (
    PROBE,
    RESNETS,
    put,
    put_papers_model,
    put_resnets,
    write_baseline,
)

from clipcore.evaluate.arguments import (
    add_compare_arguments,
    add_robustness_arguments,
    add_scaling_arguments,
)
from clipcore.evaluate.comparison import compare
from clipcore.evaluate.compute import image_macs
from clipcore.evaluate.results import read_results
from clipcore.evaluate.robustness_study import robustness_study
from clipcore.evaluate.scaling_study import scaling_study
from clipcore.evaluate.studies import (
    print_study,
    run_compare,
    run_robustness,
    run_scaling,
    write_study,
)
from clipcore.terminal import Parser
from clipcore.towers.architectures import find_model

pytestmark = pytest.mark.fast


def parsed(add: Any, *arguments: object) -> argparse.Namespace:
    parser = Parser(prog="study")
    add(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_command_lines_write_what_they_print(tmp_path):
    results = tmp_path / "results"
    put_papers_model(results)
    put_resnets(results)
    table = write_baseline(tmp_path / "standard.csv")
    text = run_robustness(parsed(add_robustness_arguments, results, "--baseline", table))
    first = text.splitlines()[0]
    assert first.startswith(
        "wds_imagenet1k -> wds_imagenetv2, baseline of 85 models of standard.csv"
    )
    assert "logit(out) = 0.923 logit(in) −0.498, r2 0.996" in first
    row = next(line for line in text.splitlines() if "zero-shot" in line)
    columns = "ViT-L-14-336 openai zero-shot 76.2% 70.1% +6.1 49.9% −5.8"
    assert row.split() == columns.split()
    # The models of the baseline are in the file, not in the terminal's tables.
    assert len(text.splitlines()) < 15
    assert text.splitlines()[-1] == f"written to {results / 'robustness.json'}"

    compute = tmp_path / "compute.json"
    compute.write_text(json.dumps({name: image_macs(find_model(name)) for name in RESNETS}))
    line = parsed(add_scaling_arguments, results, "--gmacs", compute, "--bins", 3)
    assert "of 3 points" in run_scaling(line)
    with pytest.raises(ValueError, match="--bins is at least 1, got 0"):
        run_scaling(parsed(add_scaling_arguments, results, "--bins", 0))

    line = parsed(add_compare_arguments, results, "--model-a", "ViT-L-14-336")
    text = run_compare(line)
    assert "a wins 1 of 3 sets, loses 2, ties 0" in text and "95% bootstrap" in text
    kinds = {path.stem: json.loads(path.read_text()) for path in results.glob("[rsc]*.json")}
    assert {name: study["study"] for name, study in kinds.items()} == {
        name: name for name in ("robustness", "scaling", "compare")
    }
    assert kinds["compare"]["wins"] == 1 and len(kinds["compare"]["interval"]) == 2

    # Studies are no results, and `clip_benchmark build` asks each file of a folder for these.
    assert len(read_results(results)) == 16
    for study in kinds.values():
        assert (study["metrics"], study["model"] + study["pretrained"]) == ({}, "")


def test_a_study_goes_where_it_is_told_or_beside_a_file(tmp_path):
    put(tmp_path / "a", "pets", 0.5)
    put(tmp_path / "a", "pets", 0.6, task=PROBE)
    (zero_shot,) = (tmp_path / "a").glob("*zero*.json")
    run_compare(parsed(add_compare_arguments, tmp_path / "a", "--output", tmp_path / "out" / "b"))
    assert (tmp_path / "out" / "b" / "compare.json").exists()
    assert not (tmp_path / "a" / "compare.json").exists()
    run_compare(parsed(add_compare_arguments, zero_shot, zero_shot))
    assert json.loads((tmp_path / "a" / "compare.json").read_text())["ties"] == 1


def test_a_study_replaces_an_older_one_and_a_link_of_its_name(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "scaling.json").symlink_to("mine.txt")
    put_resnets(tmp_path / "results")
    path = write_study(tmp_path, scaling_study(tmp_path / "results"))
    assert not path.is_symlink() and (tmp_path / "mine.txt").read_text() == "mine"
    assert json.loads(path.read_text())["law"]["num_models"] == 5


def test_columns_are_aligned_and_names_cannot_steer_the_terminal(tmp_path):
    put(tmp_path, "pets\x1b[2J\n", 0.5, pretrained="x" * 100)
    put(tmp_path, "pets\x1b[2J\n", 0.75, pretrained="x" * 100, task=PROBE)
    put(tmp_path, "a", 0.5, pretrained="x" * 100)
    put(tmp_path, "a", 1.0, pretrained="x" * 100, task=PROBE)
    text = print_study(compare(tmp_path))
    assert "\x1b" not in text and "\ufffd[2J" in text
    lines = [line for line in text.splitlines() if line.endswith(("a - b", "−25.0", "−50.0"))]
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1

    folder = tmp_path / "two"
    put(folder, "glyphs", 0.5, pretrained="long/" * 30 + "end")
    put(folder, "glyphs/shift", 0.25, pretrained="long/" * 30 + "end")
    text = print_study(robustness_study(folder))
    assert "without a baseline" in text and "...g/long/" in text and "end  zero-shot" in text
    assert max(map(len, text.splitlines())) < 140


def test_a_law_of_models_of_two_sizes_predicts_nothing(tmp_path):
    for number, model in enumerate(("RN50", "RN50", "RN101")):
        put(tmp_path, "glyphs", 0.5 + number / 10, model, f"run-{number}")
    study = scaling_study(tmp_path)
    assert study["prediction"] is None and study["law"]["num_models"] == 3
    assert "no prediction" in print_study(study)
