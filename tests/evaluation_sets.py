"""Labelled data sets in memory for tests: pictures of noise whose colour tells their class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from clipcore.data import BadSample, Pair
from clipcore.data.transforms import ImageTransform
from clipcore.evaluate.datasets import EvaluationSet, Split
from clipcore.evaluate.features import FeatureStore
from clipcore.evaluate.loading import LoadedModel
from clipcore.evaluate.measure import Subject
from clipcore.tokenizer import byte_tokenizer
from clipcore.towers.factory import create_model
from clipcore.towers.model import CLIP


@dataclass
class NoiseSource:
    """Pictures of noise around a colour for each label.

    Attributes:
        labels: classes of the pictures.
        bad: numbers of the pictures that cannot be read.
        seed: of the noise.
    """

    labels: Sequence[int]
    bad: Sequence[int] = ()
    seed: int = 0
    name: str = "noise"
    side: int = field(default=32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Pair:
        if index in self.bad:
            raise BadSample("made to fail", f"picture {index}")
        rng = np.random.default_rng([self.seed, index])
        colour = np.random.default_rng(self.labels[index]).integers(0, 200, 3)
        # A tint of its own makes a picture hard to tell from those of other classes.
        tint = rng.integers(0, 56, 3)
        pixels = colour * 3 // 4 + tint + rng.integers(0, 50, (self.side, self.side, 3))
        return Pair(pixels.astype(np.uint8), self.captions(index), f"{self.name}/{index}")

    def captions(self, index: int) -> str:
        return f"colour {self.labels[index]}"


def split_of(
    name: str,
    labels: Sequence[int],
    bad: Sequence[int] = (),
    fingerprint: str = "one",
    labels_N: np.ndarray | None = None,
    groups: dict[str, list[str]] | None = None,
) -> Split:
    """Return a split of such pictures; ``labels_N`` replaces the classes by several of each picture."""
    seed = ("train", "val", "test").index(name)
    source = NoiseSource(labels, bad, seed)
    return Split(
        name,
        source,
        np.array(labels, np.int64) if labels_N is None else labels_N,
        lambda: f"{name} {fingerprint}",
        lambda: [f"{name}/{index}" for index in range(len(labels))],
        groups or {},
    )


def noise_set(
    num_classes: int,
    splits: Sequence[Split],
    task: str = "classification",
    main_metric: str = "acc1",
    templates: tuple[str, ...] = ("a {}.", "{}"),
    name: str = "noise",
) -> EvaluationSet:
    by_name = {split.name: split for split in splits}
    return EvaluationSet(
        name,
        task,
        tuple((f"colour {number}",) for number in range(num_classes)),
        templates,
        tuple(by_name),
        main_metric,
        by_name.__getitem__,
    )


def nano(seed: int = 0, name: str = "ViT-nano-8-32") -> CLIP:
    torch.manual_seed(seed)
    return create_model(name).eval()


def nano_subject(model: CLIP | None = None, cache: object = None) -> Subject:
    """Return a small untrained model under evaluation."""
    model = nano() if model is None else model
    tokenizer = byte_tokenizer()
    tokenizer.context_length = model.context_length
    transform = ImageTransform(32, is_train=False)
    loaded = LoadedModel("ViT-nano-8-32", "nano", model, transform, tokenizer, ("{}",))
    return Subject(loaded, FeatureStore(model, transform, cache, batch_size=7, progress=False))
