"""Collects the content of a run's page: curves, figures and worked examples; ``clipcore.report.page`` renders it.

Legend: N pictures, K best, E embedding size.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import clipcore
from clipcore.data import BadSample, PairSource
from clipcore.data.transforms import ImageTransform, normalize_images
from clipcore.evaluate.tasks import Encoder, EvaluationPlan, ZeroShotTask
from clipcore.evaluate.zero_shot import build_zero_shot_classifier, classify
from clipcore.files import read_regular
from clipcore.kernels.similarity import normalized_similarity
from clipcore.kernels.similarity_topk import similarity_topk
from clipcore.ranks.distributed import World
from clipcore.report.page import (
    PairMatrix,
    ReportData,
    RetrievalExample,
    ZeroShotExample,
    write_report,
)
from clipcore.run.collapse import CollapseWatch
from clipcore.run.metrics import MetricsLogger, read_metrics
from clipcore.run.profile import PROFILE_FOLDER, TABLE
from clipcore.run.recipe import RunConfig
from clipcore.run.state import RunState

NUM_ZERO_SHOT_EXAMPLES = 24
NUM_RETRIEVAL_EXAMPLES = 6
NUM_PAIRS = 16
GALLERY_SIZE = 1000
_MAX_PROFILE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Samples:
    """Readable pairs of a source: their indices, pictures (uint8 [S, S, 3]), captions and features [N, E]."""

    indices: list[int]
    pictures: list[np.ndarray]
    captions: list[str]
    image_features_NE: Tensor
    text_features_NE: Tensor


def report_run(
    run_dir: Path,
    config: RunConfig,
    state: RunState,
    plan: EvaluationPlan,
    training_source: PairSource,
    log: MetricsLogger,
    watch: CollapseWatch,
) -> None:
    """Write report.html into the run's folder, on the main rank; all ranks call this.

    Args:
        watch: has observed the steps of the run.
        training_source: shown if the run has no validation pairs.
    """
    model = state.evaluated_model()
    if not plan.world.is_main:
        return
    collapsed = watch.end()
    steps, evaluations = read_metrics(run_dir)
    was_training = model.training
    model.eval()
    # The other ranks have no work here: only this rank encodes.
    alone = World(rank=0, world_size=1, local_rank=plan.world.local_rank, device=plan.world.device)
    encoder = plan.encoder(model, alone)
    source = plan.retrieval[0].source if plan.retrieval else training_source
    gallery = collect(source, GALLERY_SIZE, encoder)
    own = [row for row in evaluations if "alpha" not in row]
    zero_shot = [row for row in own if "acc1" in row]
    retrieval = [row for row in own if "num_pairs" in row]
    # The models of --wise-alpha are no points of the run's curves.
    between = [row for row in evaluations if "alpha" in row and "acc1" in row]
    profile = _read_profile(run_dir / PROFILE_FOLDER / TABLE)
    data = ReportData(
        title=f"{config.model} on {training_source.name.partition('/')[0]}",
        summary=summary(steps, zero_shot + between, retrieval, state),
        warnings=tuple(map(watch.describe, watch.collapses)),
        steps=steps,
        evaluations=zero_shot,
        retrieval=retrieval,
        examples=zero_shot_examples(plan.zero_shot[0], encoder) if plan.zero_shot else (),
        retrieval_examples=retrieval_examples(gallery),
        pairs=pair_matrix(gallery),
        config=dataclasses.asdict(config),
        versions=versions(plan.world.device),
        timings={part: round(seconds, 2) for part, seconds in state.timings.items()},
        profile=profile,
    )
    model.train(was_training)
    write_report(run_dir / "report.html", data)
    if collapsed is not None:
        log.print(collapsed)
    log.print(f"report: {run_dir / 'report.html'}")


def _read_profile(path: Path) -> str:
    """Return the table of a profile; empty if there is no readable one."""
    try:
        return read_regular(path, _MAX_PROFILE_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def summary(
    steps: list[dict[str, Any]],
    zero_shot: list[dict[str, Any]],
    retrieval: list[dict[str, Any]],
    state: RunState,
) -> dict[str, str]:
    """Return the headline facts, in order."""
    facts = {}
    last_step = max((row["step"] for row in zero_shot), default=0)
    for row in (row for row in zero_shot if row["step"] == last_step):
        facts[f"{row['task']}: top-1"] = f"{row['acc1']:.1%} (chance {row['chance']:.2%})"
        facts[f"{row['task']}: top-5"] = f"{row['acc5']:.1%}"
    if retrieval and "image_to_text_R@1" in retrieval[-1]:
        row = retrieval[-1]
        facts["image to text, R@1"] = (
            f"{row['image_to_text_R@1']:.1%} of {int(row['num_pairs']):,} pictures"
        )
    if steps:
        speeds = sorted(row["pairs_per_s"] for row in steps)
        facts["final loss"] = f"{steps[-1]['loss']:.3f}"
        facts["speed"] = f"{speeds[len(speeds) // 2]:,.0f} pairs/s (median step)"
        facts["training time"] = f"{steps[-1]['time_s']:,.0f} s, {state.step:,} steps"
    if state.bad_samples:
        facts["unreadable samples replaced"] = f"{state.bad_samples:,}"
    if state.transparent:
        facts["transparent pictures laid over white"] = f"{state.transparent:,}"
    return facts


def zero_shot_examples(task: ZeroShotTask, encoder: Encoder) -> tuple[ZeroShotExample, ...]:
    """Return images spread evenly over the task, with the five most probable class names."""
    classifier_EC = build_zero_shot_classifier(
        encoder.model, encoder.tokenizer, task.classnames, task.templates, 64, encoder.world.device
    )
    pictures = read_pictures(task.source, NUM_ZERO_SHOT_EXAMPLES, encoder.transform)
    if not pictures:
        return ()
    images = to_images([picture for _, picture, _ in pictures], encoder)
    values_NK, best_NK = classify(encoder.model, images, classifier_EC)
    return tuple(
        ZeroShotExample(
            picture,
            task.classnames[task.labels_N[index]],
            tuple((task.classnames[c], p) for c, p in zip(best, values, strict=True)),
        )
        for (index, picture, _), values, best in zip(
            pictures, values_NK.tolist(), best_NK.tolist(), strict=True
        )
    )


def retrieval_examples(gallery: Samples) -> tuple[RetrievalExample, ...]:
    """Return pairs spread over the gallery, each with the three nearest items of the other side."""
    num_best = min(3, len(gallery.pictures))
    rows = spread(len(gallery.pictures), NUM_RETRIEVAL_EXAMPLES)
    if not rows:
        return ()
    _, texts_NK = similarity_topk(
        gallery.image_features_NE[rows], gallery.text_features_NE, num_best
    )
    _, images_NK = similarity_topk(
        gallery.text_features_NE[rows], gallery.image_features_NE, num_best
    )
    return tuple(
        RetrievalExample(
            gallery.pictures[row],
            gallery.captions[row],
            tuple(gallery.captions[i] for i in texts),
            tuple(gallery.pictures[i] for i in images),
        )
        for row, texts, images in zip(rows, texts_NK.tolist(), images_NK.tolist(), strict=True)
    )


def pair_matrix(gallery: Samples) -> PairMatrix | None:
    """Return the cosine of every image with every text of sixteen pairs."""
    rows = spread(len(gallery.pictures), NUM_PAIRS)
    if not rows:
        return None
    similarity = normalized_similarity(
        gallery.image_features_NE[rows], gallery.text_features_NE[rows], 1.0
    )
    return PairMatrix(
        tuple(gallery.pictures[row] for row in rows),
        tuple(gallery.captions[row] for row in rows),
        similarity.float().cpu().numpy(),
    )


@torch.no_grad()
def collect(source: PairSource, count: int, encoder: Encoder) -> Samples:
    """Return up to ``count`` readable pairs spread over a source, with their features."""
    found = read_pictures(source, count, encoder.transform)
    pictures = [picture for _, picture, _ in found]
    captions = [caption for _, _, caption in found]
    image_features, text_features = [], []
    for start in range(0, len(found), encoder.batch_size):
        rows = slice(start, start + encoder.batch_size)
        images = to_images(pictures[rows], encoder)
        tokens = encoder.tokenizer(captions[rows]).to(encoder.world.device)
        image_features.append(encoder.model.encode_image(images, normalize=True))
        text_features.append(encoder.model.encode_text(tokens, normalize=True))
    empty = torch.zeros(0, 1)
    return Samples(
        [index for index, _, _ in found],
        pictures,
        captions,
        torch.cat(image_features) if image_features else empty,
        torch.cat(text_features) if text_features else empty,
    )


def read_pictures(
    source: PairSource, count: int, transform: ImageTransform
) -> list[tuple[int, np.ndarray, str]]:
    """Yield (index, evaluation crop as uint8 [S, S, 3], first caption) of readable samples spread over a source."""
    found = []
    for index in spread(len(source), count):
        try:
            pair = source[index]
            picture = transform.crop(pair.image).transpose(1, 2, 0)
        except BadSample:
            continue
        caption = pair.caption if isinstance(pair.caption, str) else pair.caption[0]
        found.append((index, np.ascontiguousarray(picture), caption))
    return found


def to_images(pictures: Iterable[np.ndarray], encoder: Encoder) -> Tensor:
    """Return the normalised batch of evaluation crops."""
    stacked = np.stack([picture.transpose(2, 0, 1) for picture in pictures])
    images = torch.from_numpy(stacked).to(encoder.world.device)
    return normalize_images(images, encoder.transform.mean, encoder.transform.std)


def spread(size: int, count: int) -> list[int]:
    """Return ``count`` indices spread evenly over ``range(size)``, or all of them."""
    return [i * size // count for i in range(count)] if size > count else list(range(size))


def versions(device: torch.device) -> dict[str, str]:
    """Return the versions and the device that the figures depend on besides the settings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "clipcore": clipcore.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{name or platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} processors",
    }
