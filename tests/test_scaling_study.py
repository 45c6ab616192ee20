"""Laws of the models in a folder of results: published digits through files, and input that makes no law."""

from __future__ import annotations

import csv
import io
import json

import pytest
from result_folders import (
    FIGURES,
    MEAN_ERRORS,
    RESNETS,
    ZERO_SHOT,
    note_of,
    put,
    put_resnets,
)

from clipcore.data import DataError
from clipcore.evaluate.compute import image_macs
from clipcore.evaluate.results import Result, write_result
from clipcore.evaluate.scaling_study import scaling_study
from clipcore.towers.architectures import find_model

pytestmark = pytest.mark.fast


# open_clip's measurements of OpenAI's models: GFLOPs of an image.
PUBLISHED_GFLOPS = {
    "RN50": 12.22,
    "RN101": 19.54,
    "RN50x4": 42.56,
    "RN50x16": 149.39,
    "RN50x64": 529.11,
    "ViT-B-32": 8.82,
    "ViT-B/16": 35.13,
    "ViT-L-14": 162.03,
    "ViT-L-14-336": 381.92,
}


@pytest.mark.parametrize("name", PUBLISHED_GFLOPS)
def test_compute_of_published_models(name):
    assert round(2e-9 * image_macs(find_model(name)), 2) == PUBLISHED_GFLOPS[name]


def test_the_papers_law_of_five_resnets(tmp_path):
    put_resnets(tmp_path)
    # A set that one model lacks has no part in it.
    put(tmp_path, "pets", 0.99, "RN50")
    study = scaling_study(tmp_path)
    assert study["metric"] == "mean error of 2 sets" and study["unit"] == "GMACs"
    assert [model["model"] for model in study["models"]] == list(RESNETS)
    assert [model["error"] for model in study["models"]] == pytest.approx(MEAN_ERRORS)
    law = study["law"]
    assert abs(law["exponent"] + 0.07244) < 5e-6 and abs(law["r2"] - 0.9935) < 5e-5
    # The published factor is of GFLOPs, two to a MAC.
    assert law["factor"] * 2**0.07244 == pytest.approx(0.62245, abs=2e-5)
    prediction = study["prediction"]
    # Of GFLOPs that are rounded to two digits it is .39820.
    assert prediction["predicted"] == pytest.approx(0.39820, abs=2e-5)
    assert prediction["actual"] == pytest.approx(0.3939) and prediction["model"] == "RN50x64 openai"
    assert prediction["law"]["num_models"] == 4
    assert "1 of 3 sets are left out" in note_of(study, "sets")
    assert "one image through the image tower" in note_of(study, "compute")


@pytest.mark.parametrize(("bins", "law"), [(None, (4.9565, -0.10125)), (5, (5.8581, -0.11139))])
def test_laws_of_published_runs_with_their_compute_as_a_table(tmp_path, bins, law):
    """29 models of open_clip on ImageNet, all and the best of each of five bins (Cherti et al. 2023)."""
    with open(FIGURES / "scaling_runs.csv", newline="") as table:
        runs = [row for row in csv.DictReader(table) if row["data"] != "CLIP-WIT"]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["pretrained", "model", "samples", "gmacs"])
    for number, run in enumerate(runs):
        put(
            tmp_path / "results",
            "imagenet1k",
            float(run["imagenet1k"]),
            run["model"],
            f"run-{number}",
        )
        # Half of the samples with twice the GMACs is the same compute.
        writer.writerow([f"run-{number}", run["model"], 0.5, 2 * float(run["gmacs"])])
    path = tmp_path / "compute.csv"
    path.write_text(text.getvalue())
    found = scaling_study(tmp_path / "results", path, bins)["law"]
    assert abs(found["factor"] - law[0]) < 5.1e-5 and abs(found["exponent"] - law[1]) < 5.1e-6
    assert found["num_models"] == (bins or 29)


def test_compute_as_an_object_and_models_without_any_are_counted(tmp_path):
    put_resnets(tmp_path / "results")
    path = tmp_path / "compute.json"
    path.write_text(json.dumps({name: 1.0 + 3**k for k, name in enumerate(RESNETS[:4])}))
    study = scaling_study(tmp_path / "results", path)
    assert [model["compute"] for model in study["models"]] == [2.0, 4.0, 10.0, 28.0]
    assert "1 x model that compute.json does not have, such as RN50x64 openai" in study["notes"][-1]
    # A model that makes no error has no logarithm of it.
    put(tmp_path / "results", "wds_imagenet1k", 1.0, "RN101")
    put(tmp_path / "results", "food101", 1.0, "RN101")
    study = scaling_study(tmp_path / "results")
    assert study["law"]["num_models"] == 4
    assert "1 x model without an error" in note_of(study, "left out")


def test_weights_of_one_shape_have_the_compute_of_their_own_row(tmp_path):
    for number in range(3):
        put(tmp_path / "results", "glyphs", 0.5 + number / 10, "ViT-B/32", f"run-{number}")
    with pytest.raises(
        DataError, match="two different amounts of compute; there are 1; --gmacs FILE"
    ):
        scaling_study(tmp_path / "results")
    path = tmp_path / "compute.csv"
    path.write_text(
        "model,pretrained,gmacs,samples\nViT-B-32,,4,1\nViT-B-32,run-1,4,8\nViT-B-32,run-2,4,64\n"
    )
    study = scaling_study(tmp_path / "results", path)
    assert [model["compute"] for model in study["models"]] == [4.0, 32.0, 256.0]
    assert study["prediction"]["law"]["r2"] == 1.0


def test_the_metric_of_a_set_is_one_that_all_models_have(tmp_path):
    for model, value in (("RN50", 0.3), ("RN101", 0.4), ("RN50x4", 0.5)):
        metrics = {"acc1": 0.9, "mean_per_class_recall": value}
        # One of CLIP_benchmark's own says no main metric.
        details = {} if model == "RN101" else {"main_metric": "mean_per_class_recall"}
        write_result(tmp_path, Result("pets", model, "openai", ZERO_SHOT, metrics, details))
        put(tmp_path, "food101", 0.5, model)
    study = scaling_study(tmp_path)
    errors = [model["error"] for model in study["models"]]
    assert errors == pytest.approx([0.6, 0.55, 0.5])
    assert "acc1 of 1, mean_per_class_recall of 1" in note_of(study, "different metrics")


def test_folders_that_make_no_law_get_one_line(tmp_path):
    put(tmp_path, "glyphs", 0.5, "RN50")
    put(tmp_path, "glyphs", 0.6, "RN101")
    put(tmp_path, "glyphs", 0.7, "a ViT with patches of 4")
    message = (
        "at least 3 models .* has 2; left out: 1 x model of an unknown shape, which needs --gmacs"
    )
    with pytest.raises(DataError, match=message):
        scaling_study(tmp_path)
    put(tmp_path, "glyphs", 1.0, "RN50x4")
    with pytest.raises(
        DataError, match=r"at least 3 models .* has 2; .* 1 x model without an error"
    ):
        scaling_study(tmp_path)
    put(tmp_path, "icons", 0.7, "RN50x16")
    message = "no data set that all 4 models have; the fewest has RN101 openai: glyphs"
    with pytest.raises(DataError, match=message):
        scaling_study(tmp_path)


def test_sizes_that_hardly_differ_make_no_law(tmp_path):
    put_resnets(tmp_path / "results")
    path = tmp_path / "compute.json"
    path.write_text(json.dumps({name: 1 + k * 1e-9 for k, name in enumerate(RESNETS)}))
    law = scaling_study(tmp_path / "results", path)["law"]
    assert law["exponent"] < -1e6
    path.write_text(json.dumps({name: 1e9 * (1 + k * 1e-9) for k, name in enumerate(RESNETS)}))
    with pytest.raises(DataError, match="the models' compute is too similar for a law"):
        scaling_study(tmp_path / "results", path)


COMPUTE = {
    "a.csv": (
        "model,flops\nRN50,4\n",
        "has no column gmacs or compute; its columns are model, flops",
    ),
    "b.csv": ("model,gmacs\nRN50,0\n", "line 2: the compute of RN50 is not a positive number"),
    "c.csv": ("model,gmacs\nRN50,\n", "line 2: the compute of RN50 is not a positive number"),
    "d.csv": ("model,gmacs,samples\nRN50,4,\n", "the compute of RN50 is not a positive number"),
    "e.csv": ("model,gmacs\nRN50,4\nRN50,5\n", "line 3: RN50 is there twice"),
    "f.csv": ("model,gmacs,samples\nRN50,1e300,1e300\n", "is not a positive number"),
    "a.json": ("[4]", "not an object of numbers by model, such as"),
    "b.json": ('{"RN50": "4"}', "the compute of RN50 is not a positive number"),
    "c.json": ('{"RN50": NaN}', "the compute of RN50 is not a positive number"),
    "d.json": ("{", "is not JSON"),
    "e.json": ('{"a":' * 50_000, "is not JSON: maximum recursion"),
    "f.json": ('{"RN50": 1' + 400 * "0" + "}", "the compute of RN50 is not a positive number"),
    "g.json": (" " * (1 << 20) + "{}", "more than 1 MB"),
}


@pytest.mark.parametrize("name", COMPUTE)
def test_files_that_hold_no_compute_get_one_line(tmp_path, name):
    content, message = COMPUTE[name]
    put_resnets(tmp_path / "results")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        scaling_study(tmp_path / "results", tmp_path / name)
    assert name in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_results_state_the_compute_of_shapes_without_a_name(tmp_path):
    for number, gmacs in enumerate((1.0, 10.0, 100.0)):
        put(tmp_path, "pets", 0.5 + 0.1 * number, f"ViT-own-{number}", gmacs=gmacs)
    study = scaling_study(tmp_path)
    assert [model["compute"] for model in study["models"]] == [1.0, 10.0, 100.0]
    for number, stated in enumerate((float("1e400"), -1.0, "many")):
        put(tmp_path / "odd", "pets", 0.5, f"ViT-own-{number}", gmacs=0)
        path = next((tmp_path / "odd").glob(f"*ViT-own-{number}*"))
        text = json.dumps(stated) if stated == stated and stated != float("inf") else "1e400"
        path.write_text(path.read_text().replace('"gmacs": 0', f'"gmacs": {text}'))
    with pytest.raises(DataError, match="has 0; left out: 3 x model of an unknown shape"):
        scaling_study(tmp_path / "odd")
