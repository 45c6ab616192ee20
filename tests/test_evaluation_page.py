"""The page of results: every plot where its input is there, safe names, the same bytes again, nothing lost silently."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from test_report import parse

from clipcore.data import DataError
from clipcore.evaluate.page import write_page
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
from clipcore.evaluate.few_shot import labels_per_class

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
HOSTILE = '"><script>alert(1)</script>$x^2$ \x1b[31m\ufffe ]]>&amp;'


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
    details = {"main_metric": "accuracy", "tables": tables, "differences": differences}
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
