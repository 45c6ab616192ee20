"""The page of results: every plot where its input is there, safe names, the same bytes again, nothing lost silently."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image
from test_report import parse

from clipcore.data import DataError
from clipcore.evaluate import plots, svg
from clipcore.evaluate.few_shot import labels_per_class
from clipcore.evaluate.page import write_page
from clipcore.evaluate.page_data import Score
from clipcore.evaluate.results import (
    BIAS,
    FEW_SHOT,
    LINEAR_PROBE,
    OVERLAP,
    PROMPTS,
    RETRIEVAL,
    TASKS,
    ZERO_SHOT,
    Result,
    write_result,
)

pytestmark = pytest.mark.fast

SETS = (
    "food101",
    "cifar10",
    "cars",
    "fgvc_aircraft",
    "dtd",
    "pets",
    "caltech101",
    "flowers",
    "mnist",
    "eurosat",
    "hateful_memes",
    "imagenet1k",
)
MORE_SETS = (
    "vtab-clevr_closest_object_distance",
    "vtab-kitti_closest_vehicle_distance",
    "vtab-smallnorb_label_elevation",
    "vtab-diabetic_retinopathy",
    "vtab-dsprites_label_orientation",
    "sun397",
    "birdsnap",
    "stl10",
    "gtsrb",
    "country211",
    "renderedsst2",
    "voc2007_multilabel",
    "ucf101",
    "kinetics700",
    "resisc45",
    "fer2013",
    "pcam",
    "objectnet",
    "vtab-dmlab",
    "svhn",
)
MODELS = (("ViT-B-32", "logs/small/epoch_32"), ("ViT-B-16", "openai"), ("ViT-L-14", "openai"))
SHOTS = (1, 2, 4, 8, 16)
PNG = io.BytesIO()
Image.new("RGB", (8, 8), (200, 60, 60)).save(PNG, "PNG")
PICTURE = f"data:image/png;base64,{base64.b64encode(PNG.getvalue()).decode()}"
HOSTILE = '"><script>alert(1)</script>\x1b[31m\ufffe]]>&amp;$x^2$'


def make_results(
    folder: Path,
    sets: tuple[str, ...] = SETS,
    models: tuple[tuple[str, str], ...] = MODELS,
    tasks: tuple[str, ...] = TASKS,
) -> Path:
    """Write results such as real ones, of all models on all data sets, and the three studies; return the folder."""
    for m, (architecture, pretrained) in enumerate(models):
        for s, dataset in enumerate(sets):
            # Of each model and data set, the same whatever others there are.
            draw = np.random.default_rng([m, s, 7])
            made = results_of_set(draw, dataset, s, m)
            for task, (metrics, details) in made.items():
                if task in tasks:
                    record = Result(dataset, architecture, pretrained, task, metrics, details)
                    path = folder / record.file_name
                    path.parent.mkdir(exist_ok=True)
                    path.write_text(json.dumps(record.to_dict()))
    for study, content in studies(sets, models).items():
        (folder / f"{study}.json").write_text(json.dumps({"study": study, **content}))
    return folder


def results_of_set(draw: np.random.Generator, dataset: str, s: int, m: int) -> dict[str, Any]:
    """Return metrics and details by task, of model ``m`` on data set ``s``."""
    num_images, num_classes = 1000 * (s + 2), 2 if dataset == "hateful_memes" else 10 + 17 * s
    acc = float(np.clip(0.35 + 0.05 * s % 0.6 + 0.06 * m + draw.normal(0, 0.05), 0.02, 0.98))
    probe = float(np.clip(acc + draw.normal(0.05, 0.15), 0.02, 0.99))
    metric = "roc_auc" if num_classes == 2 else ("acc1", "mean_per_class_recall")[s % 4 == 3]
    half = 1.96 * math.sqrt(acc * (1 - acc) / num_images)
    shared = {
        "main_metric": metric,
        "num_images": num_images,
        "num_classes": num_classes,
        "split": "test",
        "num_unreadable": 3 if s == 1 else 0,
        "num_transparent": 5 if s == 2 else 0,
        "versions": {"torch": "2.13", "clipcore": "0.1"},
        "notes": ["split: datacomp"] if s == 9 else [],
        "chance": 1 / num_classes,
        "templates": ["a photo of a {}.", "a {}."],
        "first_class": "apple pie",
        "last_class": "waffle",
        "ci95": [acc - half, acc + half],
    }
    made: dict[str, Any] = {}
    five = None if num_classes < 5 else min(1.0, acc + 0.2)
    made[ZERO_SHOT] = ({metric: acc, "acc5": five}, shared)
    made[LINEAR_PROBE] = probe_of_set(draw, metric, probe, shared)
    variants = [
        {
            "name": name,
            "title": title,
            "num_templates": number,
            "value": acc - 0.05 + gain,
            "gain": gain,
        }
        for name, title, number, gain in (
            ("name", "bare name", 1, 0.0),
            ("photo", "a photo of a", 1, 0.013),
            ("own", "own templates", 18, 0.035 + 0.01 * m),
            ("imagenet80", "80 of ImageNet", 80, 0.03),
        )
        if s % 3 or name != "own"
    ]
    made[PROMPTS] = (
        {variant["name"]: variant["value"] for variant in variants},
        {**shared, "main_metric": "imagenet80", "metric": metric, "variants": variants},
    )
    made[FEW_SHOT] = few_shot_of_set(draw, metric, acc, probe, num_images / num_classes)
    recalls = {
        f"{kind}_retrieval_recall@{k}": min(1.0, acc * (0.7 + 0.1 * i))
        for kind in ("image", "text")
        for i, k in enumerate((1, 5, 10))
    }
    if s < 2:
        made[RETRIEVAL] = (
            {**recalls, "mean_recall@1": acc * 0.7},
            {**shared, "main_metric": "mean_recall@1", "num_texts": 5 * num_images},
        )
    made[OVERLAP] = overlap_of_set(draw, acc, num_images, shared)
    if s < 2:
        made[BIAS] = bias_of_set(draw)
    return made


def probe_of_set(
    draw: np.random.Generator, metric: str, value: float, shared: dict[str, Any]
) -> Any:
    Cs = [1e-6, 1e-4, 1e-2, 1.0, 100.0, 1e4, 1e6, 0.1, 10.0, 3.0, 0.3, 1.8, 0.56, 1.3, 0.8]
    trace = [[C, float(np.clip(value - 0.004 * math.log10(C) ** 2, 0, 1))] for C in Cs]
    details = {
        **shared,
        "main_metric": f"lp_{metric}",
        "C": 1.0,
        "lambda": 1e-3,
        "num_iterations": int(draw.integers(20, 90)),
        "gradient_norm": 8e-6,
        "trace": trace,
        "num_train": 5000,
        "ci95": [max(0.0, value - 0.01), min(1.0, value + 0.01)],
    }
    return {f"lp_{metric}": value, "lp_acc5": None}, details


def few_shot_of_set(
    draw: np.random.Generator, metric: str, zero_shot: float, full: float, most: float
) -> Any:
    means = [full * (0.35 + 0.12 * i) for i in range(5)]
    scores = [[float(np.clip(v + draw.normal(0, 0.02), 0, 1)) for _ in range(5)] for v in means]
    means = [float(np.mean(row)) for row in scores]
    labels = labels_per_class([*SHOTS, max(most, 20.0)], [*means, full], zero_shot)
    details = {
        "main_metric": "16shot",
        "metric": metric,
        "shots": list(SHOTS),
        "scores": scores,
        "Cs": [[0.3] * 5] * 5,
        "seeds": list(range(5)),
        "zero_shot": zero_shot,
        "full": full,
        "full_labels_per_class": most,
        "labels_per_class": {"number": labels.number, "text": labels.text},
    }
    return {f"{k}shot": value for k, value in zip(SHOTS, means, strict=True)}, details


def overlap_of_set(
    draw: np.random.Generator, acc: float, num_images: int, shared: dict[str, Any]
) -> Any:
    num_overlap = int(num_images * draw.uniform(0, 0.08) ** 1.3)
    part = num_overlap / num_images
    over = float(np.clip(acc + draw.normal(0.05, 0.08), 0.05, 0.95))
    clean = (acc - part * over) / (1 - part)
    half = 2.8 * math.sqrt(over * (1 - over) / max(1, num_overlap))
    metrics = {
        "contamination": part,
        "score": acc,
        "clean_score": clean,
        "overlap_score": over if num_overlap else None,
        "gain": acc - clean,
        "p_value": float(draw.uniform(0, 1) ** 6) if num_overlap else None,
    }
    nearest = [
        {
            "cosine": 0.99 - 0.01 * i,
            "image_key": f"test/{i:05}",
            "training_key": f"shard-{i:03}/000{i}",
            "image": PICTURE,
            "training_image": PICTURE,
        }
        for i in range(8)
    ]
    details = {
        **shared,
        "main_metric": "contamination",
        "threshold": 0.96,
        "threshold_from": "given",
        "num_overlap": num_overlap,
        "training": "shards/{0..9}.tar",
        "num_training": 12345,
        "descriptor": "pixels",
        "overlap_interval": [max(0.0, over - half), min(1.0, over + half)] if num_overlap else None,
        "nearest": nearest,
    }
    return metrics, details


def bias_of_set(draw: np.random.Generator) -> Any:
    tables = []
    for column, groups in {
        "gender": ("Female", "Male"),
        "race x gender": ("Black x Female", "Black x Male", "White x Female", "White x Male"),
    }.items():
        for category, rate in (("accuracy", 0.9), ("crime", 0.12), ("non-human", 0.05)):
            rows = []
            for i, group in enumerate(groups):
                num_images = 20 if i == 3 else 400 + 100 * i
                hits = int(num_images * np.clip(rate + draw.normal(0, 0.03), 0, 1))
                rows.append(
                    {
                        "group": group,
                        "hits": hits,
                        "num_images": num_images,
                        "rate": hits / num_images,
                        "interval": [max(0, hits / num_images - 0.02), hits / num_images],
                        "is_small": num_images < 30,
                    }
                )
            tables.append(
                {
                    "title": f"{category} by {column}",
                    "column": column,
                    "category": None if category == "accuracy" else category,
                    "rows": rows,
                }
            )
    differences = [
        {
            "column": "gender",
            "threshold": threshold,
            "label": label,
            "rates": {"Female": rate, "Male": rate * 2},
            "ratio": 2.0 if rate else None,
            "p_value": 0.001,
        }
        for threshold in (0.005, 0.04)
        for label, rate in (("newsreader", 0.02), ("executive", 0.06), ("doctor", 0.11))
    ]
    metrics = {"accuracy": 0.9, "worst_group_accuracy": 0.85, "gap": 0.07}
    details = {
        "main_metric": "accuracy",
        "tables": tables,
        "differences": differences,
        "labels": ["doctor", "thief"],
        "categories": {"crime": ["thief"]},
    }
    return metrics, details


def studies(
    sets: tuple[str, ...], models: tuple[tuple[str, str], ...]
) -> dict[str, dict[str, Any]]:
    """Return the three studies, in the form of their files."""
    draw = np.random.default_rng(3)
    pairs = []
    for out, slope, intercept in (("imagenetv2", 0.92, -0.5), ("imagenet_sketch", 1.07, -2.37)):
        rows = []
        for x in np.linspace(0.56, 0.86, 30):
            z = slope * math.log(x / (1 - x)) + intercept + draw.normal(0, 0.12)
            y = 1 / (1 + math.exp(-z))
            row = {"model": "resnet", "pretrained": "", "in_accuracy": float(x), "out_accuracy": y}
            rows.append({**row, "effective": None, "kind": "baseline"})
        for i, (architecture, pretrained) in enumerate(models):
            for kind, x in (("zero-shot", 0.63 + 0.06 * i), ("probe", 0.72 + 0.05 * i)):
                rows.append(
                    {
                        "model": architecture,
                        "pretrained": pretrained,
                        "in_accuracy": min(x, 0.98),
                        "out_accuracy": min(x, 0.98) - 0.08,
                        "effective": 0.06,
                        "gap_closed": 0.5,
                        "relative": None if kind == "probe" else 0.04,
                        "kind": kind,
                    }
                )
        line = {"slope": slope, "intercept": intercept, "r2": 0.95, "num_models": 30}
        pairs.append(
            {"in": "imagenet1k", "out": out, "baseline": {**line, "from": "fit"}, "models": rows}
        )
    sizes = [
        {"model": a, "pretrained": p, "compute": 4.4 * 4**i, "error": 0.6 * 0.9**i}
        for i, (a, p) in enumerate(models)
    ]
    law = {"factor": 0.62, "exponent": -0.072, "r2": 0.99, "num_models": len(models)}
    prediction = {"predicted": 0.5, "actual": 0.486, "law": law, "model": models[-1][0]}
    rows = [
        {
            "dataset": name,
            "metric": "acc1",
            "a": 0.5 + 0.03 * (i % 9),
            "b": 0.42 + 0.04 * (i % 7),
            "difference": 0,
        }
        for i, name in enumerate(sets)
    ]
    return {
        "robustness": {"pairs": pairs},
        "scaling": {
            "metric": f"mean error of {len(sets)} sets",
            "unit": "GMACs",
            "models": sizes,
            "law": law if len(models) > 1 else None,
            "prediction": prediction if len(models) > 2 else None,
        },
        "compare": {
            "a": "zero-shot",
            "b": "ResNet-50 probe",
            "sets": rows,
            "wins": 7,
            "losses": 4,
            "ties": 1,
            "pearson": 0.82,
            "slope": 1.28,
            "interval": [0.93, 1.79],
        },
    }


def page_of(folder: Path) -> str:
    """Write the page of a folder; return it once it is well formed."""
    page = write_page(folder).read_text()
    parse(page)
    return page


def drawings(page: str) -> list[ElementTree.Element]:
    """Return the plots of a page, without the marks of legends, each parsed as XML."""
    texts = re.findall(r"<svg viewBox[^>]*role=.*?</svg>", page, re.S)
    return [ElementTree.fromstring(text) for text in texts]


def rows_of(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table after a heading, as text; bold ones between stars."""
    table = page[page.index(f"<h2>{heading}") :]
    table = re.sub(r"</?b>", "*", table[: table.index("</table>")])
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in table.split("</tr>")]
    return [[html.unescape(re.sub("<.*?>", "", cell)) for cell in row] for row in rows if row]


def put(folder: Path, name: str, model: int, task: str, metrics: Any, **details: Any) -> None:
    write_result(folder, Result(name, *MODELS[model], task, metrics, details))


def put_score(folder: Path, name: str, model: int, value: float, metric: str = "acc1") -> None:
    put(folder, name, model, ZERO_SHOT, {metric: value}, main_metric=metric)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[Path, str]:
    """Return a folder of 3 models, 12 data sets and all tasks, and its page."""
    folder = make_results(tmp_path_factory.mktemp("results") / "results")
    return folder, page_of(folder)


HEADINGS = {
    ZERO_SHOT: "Zero-shot classification",
    RETRIEVAL: "Retrieval",
    PROMPTS: "What prompts gain",
    LINEAR_PROBE: "Linear probe",
    FEW_SHOT: "Few-shot",
    OVERLAP: "Overlap with the training data",
    BIAS: "Groups of people",
}


def test_every_plot_is_there(full):
    _, page = full
    for heading in (*HEADINGS.values(), "Comparison", "Natural shift", "Scaling"):
        assert f"<h2>{heading}</h2>" in page
    assert "Zero-shot against a probe" in page and "The search of C" in page
    labels = [drawing.get("aria-label") for drawing in drawings(page)]
    beginnings = (
        "Scores of 3 models on 12 data sets",
        "Scores of 3 models on 12 data sets",
        "Validation score in percent over C",
        "Zero-shot minus probe: ",
        "zero-shot over linear probe: ",
        "Mean score over 12 data sets of probes",
        "Labelled images a class",
        "zero-shot minus ResNet-50 probe: ",
        "zero-shot over ResNet-50 probe: ",
        "Accuracy on imagenetv2 over that on imagenet1k",
        "Accuracy on imagenet_sketch over that on imagenet1k",
        "mean error of 12 sets of 3 models over GMACs",
        "Share of overlapping pictures",
    )
    assert len(labels) == len(beginnings)
    assert all(label.startswith(begin) for label, begin in zip(labels, beginnings, strict=True))
    assert "Compared with shards/{0..9}.tar (12,345 pictures, by pixels)." in page
    assert "<td>a photo of a {}. | a {}.</td>" in page and "<p>crime: thief.</p>" in page
    assert "<td>0.96 given</td>" in page and "apple pie … waffle" in page
    assert "Not here" not in page and "Left out" not in page
    assert not re.search(r"\b(nan|inf|None)\b", page)


def test_nothing_is_fetched_and_colours_are_the_page_s(full):
    _, page = full
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    for drawing in drawings(page):
        assert drawing.get("role") == "img" and drawing.get("viewBox").startswith("0 0 400 ")
        text = ElementTree.tostring(drawing, encoding="unicode")
        assert "var(--ink)" in text and not re.search(r"#[0-9a-fA-F]{6}\b", text)
        assert "font-family" not in text and "<style" not in text


def test_names_in_drawings_are_unique_and_lead_somewhere(full):
    found = [drawing.iter() for drawing in drawings(full[1])]
    attributes = [item for elements in found for e in elements for item in e.attrib.items()]
    names = [value for key, value in attributes if key == "id"]
    used = [m[1] for _, value in attributes if (m := re.match(r"(?:url\()?#(\w+)", value))]
    assert len(names) == len(set(names)) and used and set(used) <= set(names)


def test_the_same_results_give_the_same_bytes(full, tmp_path):
    """Whatever the user set for plots of their own."""
    folder, page = full
    with matplotlib.rc_context({"font.size": 30, "xtick.direction": "in", "lines.linewidth": 9}):
        again = write_page(folder, tmp_path / "again.html").read_text()
        assert matplotlib.rcParams["font.size"] == 30
    assert again == page


@pytest.mark.parametrize("task", TASKS)
def test_only_what_there_are_results_of_has_a_section(tmp_path, task):
    folder = make_results(tmp_path / "results", SETS[:2], MODELS[:1], (task,))
    for study in ("robustness", "scaling", "compare"):
        (folder / f"{study}.json").unlink()
    page = page_of(folder)
    assert [t for t, heading in HEADINGS.items() if f"<h2>{heading}</h2>" in page] == [task]
    rest = page[page.index("<h2>Not here") :]
    assert rest.count("<li>") == 10
    command = {ZERO_SHOT: "zero-shot", PROMPTS: "prompts", RETRIEVAL: "retrieval"}.get(task, task)
    assert f"evaluate {command.replace('_', '-')} --data DIR<" not in rest


def test_hostile_names_stay_text(tmp_path):
    hostile = (HOSTILE, f"{HOSTILE} 2")
    folder = make_results(tmp_path / "results", hostile, ((HOSTILE, HOSTILE),))
    page = write_page(folder).read_text()
    assert "script" not in parse(page).seen and "\x1b" not in page and "\ufffe" not in page
    texts = ["".join(d.itertext()) for d in drawings(page)]
    assert len(texts) == 13
    # The dollars are no formula.
    assert '"><script>' in texts[0] and "$x^2$" in texts[0] and "$x^2$ 2" in texts[0]


def test_means_are_over_what_all_models_have(tmp_path):
    for name, model, value, metric in (
        ("a", 0, 0.1, "acc1"),
        ("b", 0, 0.3, "roc_auc"),
        ("c", 0, 0.9, "acc1"),
        ("a", 1, 0.5, "acc1"),
        ("b", 1, 0.7, "roc_auc"),
        ("d", 1, 0.9, "acc1"),
    ):
        put_score(tmp_path, name, model, value, metric)
    rows = rows_of(page_of(tmp_path), "Zero-shot")
    assert rows[-1] == [
        "mean of 2 data sets that all models have",
        "top-1 and ROC AUC mixed",
        "",
        "*60.0%*",
        "20.0%",
    ]
    assert rows[3][3:] == ["–", "90.0%"]


def test_equal_bests_are_both_bold_and_metrics_are_not_compared(tmp_path):
    for name, values in (("a", (0.5, 0.5, 0.4)), ("b", (0.2, 0.3, 0.1))):
        for model, value in enumerate(values):
            put_score(tmp_path, name, model, value)
    put_score(tmp_path, "b", 2, 0.9, "roc_auc")
    _, a, b, other, *_ = rows_of(page_of(tmp_path), "Zero-shot")
    # By their names: ViT-B-16, ViT-B-32, ViT-L-14.
    assert a[3:] == ["*50.0%*", "*50.0%*", "40.0%"]
    assert b[3:] == ["*30.0%*", "20.0%", "–"] and other[1:] == [
        "ROC AUC",
        "50.0%",
        "–",
        "–",
        "90.0%",
    ]


def test_results_of_others_are_judged_by_the_first_metric_there_is(tmp_path):
    record = {
        "dataset": "wds/cars",
        "model": "ViT-B-32",
        "pretrained": "openai",
        "task": ZERO_SHOT,
        "metrics": {"acc1": 0.25, "acc5": math.nan, "mean_per_class_recall": 0.2},
        "language": "de",
    }
    (tmp_path / "other.json").write_text(json.dumps(record))
    assert rows_of(page_of(tmp_path), "Zero-shot")[1] == ["wds/cars (de)", "top-1", "–", "25.0%"]


def test_what_is_left_out_is_counted_and_named(tmp_path):
    put_score(tmp_path, "a", 0, 0.5)
    put(tmp_path, "b", 0, ZERO_SHOT, {"acc1": 7.0}, main_metric="acc1")
    put(tmp_path, "c", 0, ZERO_SHOT, {"acc1": None}, main_metric="acc1")
    put(tmp_path, "d", 0, FEW_SHOT, {}, shots=[1, 2], scores=[[0.5]])
    put(tmp_path, "e", 0, ZERO_SHOT, {"acc1": 0.5}, main_metric=["acc1"])
    (tmp_path / "copy.json").write_bytes(next(tmp_path.glob("a_*.json")).read_bytes())
    left_out = page_of(tmp_path).partition("<h2>Left out</h2>")[2]
    assert "3 x result without a main metric from 0 to 1, such as b_" in left_out
    assert "1 x few-shot result whose scores do not fit its shots, such as d_" in left_out
    assert "1 x second result of one model, data set and task, such as a_" in left_out


BROKEN: tuple[Any, ...] = (
    None,
    True,
    -1,
    10**400,
    1e300,
    "<b>",
    [],
    [[]],
    [None, "x", {}],
    {},
    {"number": "x", "text": 3},
    [{}] * 2,
)


@pytest.mark.parametrize("task", TASKS)
def test_broken_details_break_no_page(tmp_path, task):
    """Each detail and each metric, and each of those within lists, is replaced by each broken value in turn."""
    draw = np.random.default_rng(1)
    metrics, details = results_of_set(draw, "x", 1, 0)[task]
    number = 0
    for place in ("metrics", "clipcore"):
        for key in {"metrics": metrics, "clipcore": details}[place]:
            for broken in BROKEN:
                whole = {"metrics": metrics, "clipcore": details}
                records = [{**whole, place: {**whole[place], key: broken}}]
                if (
                    (value := whole[place][key])
                    and isinstance(value, list)
                    and isinstance(value[0], dict)
                ):
                    records += [
                        {**whole, place: {**whole[place], key: [{**value[0], inner: broken}]}}
                        for inner in value[0]
                    ]
                for record in records:
                    names = {"dataset": f"{number}", "model": "m", "pretrained": "p", "task": task}
                    text = json.dumps({**names, **record})
                    (tmp_path / f"{number}.json").write_text(text)
                    number += 1
    page = page_of(tmp_path)
    drawings(page)
    assert not re.search(r"\b(nan|inf|None|Traceback)\b", page)


@pytest.mark.parametrize("study", ["robustness", "scaling", "compare"])
def test_broken_studies_break_no_page(tmp_path, study):
    """Every third key at every depth is replaced by a broken value, another one each time."""

    def broken(value: Any, turn: int) -> Any:
        if isinstance(value, list) and value:
            return [broken(one, turn + i) for i, one in enumerate(value[:3])]
        if not isinstance(value, dict):
            return value
        return {
            key: BROKEN[turn % len(BROKEN)] if (turn + i) % 3 == 0 else broken(one, turn + 5 * i)
            for i, (key, one) in enumerate(value.items())
        }

    put_score(tmp_path, "a", 0, 0.5)
    whole = studies(SETS[:3], MODELS)[study]
    for turn in range(len(BROKEN)):
        text = json.dumps({"study": study, **broken(whole, turn)})
        (tmp_path / f"{study}.json").write_text(text)
        page = page_of(tmp_path)
        drawings(page)
        assert not re.search(r"\b(nan|inf|None)\b", page)


def test_lists_beyond_all_reason_are_told_in_a_line(tmp_path):
    put_score(tmp_path, "a", 0, 0.5)
    rows = [{"dataset": "a", "metric": "acc1", "a": 0.5, "b": 0.4}] * 6000
    (tmp_path / "compare.json").write_text(json.dumps({"study": "compare", "sets": rows}))
    with pytest.raises(DataError, match="more than 5,000 entries"):
        write_page(tmp_path)


def test_what_cannot_be_read_or_written_is_told_in_a_line(tmp_path):
    with pytest.raises(DataError, match="no folder of results"):
        write_page(tmp_path / "no")
    put_score(tmp_path, "a", 0, 0.5)
    with pytest.raises(DataError, match=r"cannot write .*; give another path"):
        write_page(tmp_path, tmp_path / "no" / "page.html")
    (tmp_path / "scaling.json").mkdir()
    with pytest.raises(DataError, match=r"cannot read .*scaling\.json"):
        write_page(tmp_path)


def test_zero_shot_against_a_probe_compares_one_metric(tmp_path):
    for name, zero_shot, probe in (("a", 0.5, 0.4), ("b", 0.3, 0.6), ("c", 0.2, 0.2)):
        put_score(tmp_path, name, 0, zero_shot)
        put(tmp_path, name, 0, LINEAR_PROBE, {"lp_acc1": probe}, main_metric="lp_acc1")
    # Of another metric alone: not compared.
    put_score(tmp_path, "d", 0, 0.9, "roc_auc")
    put(tmp_path, "d", 0, LINEAR_PROBE, {"lp_acc1": 0.1}, main_metric="lp_acc1")
    page = page_of(tmp_path)
    totals = rows_of(page, "Zero-shot against a probe")[1]
    slope, r = 0.02 / 0.08, 0.02 / math.sqrt(0.08 * 0.14 / 3)
    assert totals[1:5] == ["1", "1", "1", "−6.7"]
    assert totals[5:7] == [f"{r:.2f}", f"{slope:.2f}"]
    assert "they go from −30.0 to +10.0 points" in page


def test_few_shot_curves_are_means_over_sets_with_the_spread_of_seeds(tmp_path, monkeypatch):
    drawn = []
    chart = plots.few_shot_chart
    monkeypatch.setattr(
        "clipcore.evaluate.page_few_shot.few_shot_chart",
        lambda curves, number: drawn.append((curves, number)) or chart(curves, number),
    )
    for model, shift in ((0, 0.0), (1, 0.1)):
        for name, base in (("a", 0.2), ("b", 0.4)):
            scores = [[base + shift, base + shift + 0.2], [0.6 + shift, 0.6 + shift]]
            put(tmp_path, name, model, FEW_SHOT, {}, shots=[1, 4], scores=scores, zero_shot=0.5)
    # Of one model alone.
    put(tmp_path, "c", 0, FEW_SHOT, {}, shots=[1, 4], scores=[[0.0], [0.0]], zero_shot=0.9)
    page_of(tmp_path)
    ((curves, number),) = drawn
    assert number == 2 and [curve.model for curve in curves] == [0, 1]
    # ViT-B-16, the second, is the first by its name.
    assert np.allclose(curves[0].means, [0.5, 0.7]) and np.allclose(curves[1].means, [0.4, 0.6])
    assert np.allclose(curves[0].deviations, [0.2 / math.sqrt(2), 0.0])
    assert curves[0].zero_shot == 0.5


def test_labels_beyond_what_was_tried_have_a_median_and_no_mean(tmp_path):
    for name, labels in (("a", "5.4"), ("b", ">16"), ("c", "<1"), ("d", "2.0")):
        known = None if labels == ">16" else float(labels.strip("<"))
        found = {"number": known, "text": labels}
        scores = {"shots": [1, 16], "scores": [[0.1], [0.4]], "labels_per_class": found}
        put(tmp_path, name, 0, FEW_SHOT, {}, **scores)
    page = page_of(tmp_path)
    row = rows_of(page, "Few-shot")[1]
    assert row[1:] == ["4", "3.7", "more than were tried", "more than were tried", "1"]
    assert "from 1.0 to 5.4" in page


def test_overlap_s_bars_and_significance(tmp_path, monkeypatch):
    drawn = []
    chart = plots.overlap_chart
    monkeypatch.setattr(
        "clipcore.evaluate.page_studies.overlap_chart",
        lambda *a: drawn.append(a) or chart(*a),
    )
    for name, p_value in (("a", 0.02), ("b", 0.5), ("c", None)):
        metrics = {"contamination": 0.25, "clean_score": 0.6, "gain": 0.05, "p_value": p_value}
        put(tmp_path, name, 0, OVERLAP, metrics, overlap_interval=[0.4, 1.0], num_overlap=5)
    page = page_of(tmp_path)
    rows, num_sets, num_tests = drawn[0]
    assert np.allclose(rows[0][2].gain_interval, (-0.05, 0.1)) and (num_sets, num_tests) == (3, 2)
    p_values = [row[-1] for row in rows_of(page, "Overlap")[1:]]
    assert p_values == ["0.04", "1", "–"]
    # A hollow mark is of the card's colour.
    assert ElementTree.tostring(drawings(page)[-1], "unicode").count("fill: var(--card)") == 2


def test_pictures_that_are_none_are_counted(tmp_path):
    nearest = [
        {
            "cosine": 0.9,
            "image_key": "k",
            "training_key": "t",
            "image": i,
            "training_image": PICTURE,
        }
        for i in (PICTURE, "http://x/y.png", f'{PICTURE}" onerror="x', None)
    ]
    put(tmp_path, "a", 0, OVERLAP, {"contamination": 0.5}, nearest=nearest, threshold=0.8)
    page = page_of(tmp_path)
    assert page.count("<img") == 2 and "3 more pairs have no picture here" in page
    assert "0.9000, overlaps" in page and "http:" not in page


def test_small_groups_are_never_the_worst(tmp_path):
    def table(category, rates):
        rows = [
            {"group": f"g{i}", "rate": rate, "num_images": n, "is_small": n < 30}
            for i, (rate, n) in enumerate(rates)
        ]
        title = f"{category or 'accuracy'} by age"
        return {"title": title, "column": "age", "category": category, "rows": rows}

    tables = [
        table(None, [(0.5, 40), (0.9, 40), (0.1, 10)]),
        table("crime", [(0.1, 40), (0.2, 40), (0.8, 10)]),
    ]
    put(tmp_path, "a", 0, BIAS, {}, tables=tables)
    page = page_of(tmp_path)
    body = page[page.index('<table class="matrix heat">') :].split("</table>")[0]
    rows = [re.findall(r'<td class="(own|)"[^>]*>([\d.]+%)', row) for row in body.split("</tr>")]
    assert rows[1:4] == [
        [("own", "50.0%"), ("", "10.0%")],
        [("", "90.0%"), ("own", "20.0%")],
        [("", "10.0%"), ("", "80.0%")],
    ]
    assert ">accuracy</th>" in body and 'class="few"' in body


def test_bars_are_as_long_as_their_scores():
    rows = [("long", {0: Score(0.8, "acc1")}), ("short", {0: Score(0.2, "acc1", None, 0.1)})]
    with svg.drawing():
        root = ElementTree.fromstring(svg.to_svg(plots.score_chart(rows, 1)))
    paths = [e.get("d") for e in root.iter("path") if "var(--a)" in e.get("style", "")]
    lengths = []
    for path in paths:
        xs = [float(x) for x in re.findall(r"[ML] ([\d.]+)", path)]
        lengths.append(max(xs) - min(xs))
    assert len(lengths) == 2 and lengths[0] == pytest.approx(4 * lengths[1], rel=1e-3)


@pytest.mark.parametrize(
    ("sets", "models"),
    [
        (SETS[:1], MODELS[:1]),
        (SETS + MORE_SETS, MODELS[:1]),
        (SETS[:3], tuple((f"ViT-{i}", "laion2b") for i in range(12))),
    ],
    ids=["one", "many-sets", "many-models"],
)
def test_texts_of_rows_lie_within_the_drawing(tmp_path, sets, models):
    folder = make_results(tmp_path / "results", sets, models, (ZERO_SHOT, FEW_SHOT))
    for drawing in drawings(page_of(folder)):
        height = float(drawing.get("viewBox").split()[3])
        for text in drawing.iter("text"):
            x, y = float(text.get("x", 0)), float(text.get("y", 0))
            style, width = text.get("style"), svg.width_of(text.text)
            if "rotate(-90" in text.get("transform", ""):
                continue
            left = {"end": x - width, "middle": x - width / 2}.get(
                style.partition("text-anchor: ")[2].partition(";")[0], x
            )
            assert left > -3 and left + 0.85 * width < svg.WIDTH + 3 and 0 < y < height


def test_more_rows_than_a_plot_holds_are_said(tmp_path):
    for i in range(plots.MOST_ROWS + 5):
        record = Result(f"s{i}", *MODELS[0], ZERO_SHOT, {"acc1": 0.5}, {"main_metric": "acc1"})
        (tmp_path / record.file_name).write_text(json.dumps(record.to_dict()))
    page = page_of(tmp_path)
    assert "Zero-shot by data set: the first 100 of 105" in page
    assert len(rows_of(page, "Zero-shot")) == 107
