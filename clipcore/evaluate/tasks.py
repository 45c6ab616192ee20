"""The evaluations of a run: which data, which classes, and how to run each on all ranks.

Legend: B images of a batch, N images, E embedding size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipcore.config import TrainConfig
from clipcore.data import DataError, PairSource
from clipcore.data.glyphs import ZERO_SHOT_TEMPLATES, GlyphSource
from clipcore.data.loader import Batch, eval_batches
from clipcore.data.sources import open_source
from clipcore.data.tables import ClassFolderSource
from clipcore.data.transforms import ImageTransform, normalize_images
from clipcore.distributed import World, gather_rows
from clipcore.evaluate.retrieval import retrieval_recall
from clipcore.evaluate.zero_shot import build_zero_shot_classifier, zero_shot_accuracy
from clipcore.logbook import Logbook
from clipcore.loss import ClipLoss, SigLipLoss
from clipcore.model import CLIP

# The seven prompts that OpenAI's notebook found to be nearly as good as all eighty (openai/CLIP, notebooks).
SIMPLE_IMAGENET_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


@dataclass(frozen=True)
class ZeroShotTask:
    """Images with labels, and the names and prompts of their classes."""

    name: str
    source: PairSource
    labels_N: np.ndarray
    classnames: list[str]
    templates: tuple[str, ...]


@dataclass(frozen=True)
class RetrievalTask:
    """Pairs among which each side looks for the other."""

    name: str
    source: PairSource


@dataclass(frozen=True)
class Encoder:
    """What turns a source into features: the model, its preprocessing, and this rank's share."""

    model: CLIP
    tokenizer: Callable[[list[str]], Tensor]
    transform: ImageTransform
    world: World
    batch_size: int

    def batches(self, source: PairSource) -> Iterator[tuple[Batch, Tensor]]:
        """This rank's batches with their normalised images, in the order of the source."""
        rows = eval_batches(
            source,
            self.transform,
            self.tokenizer,
            self.batch_size,
            self.world.rank,
            self.world.world_size,
        )
        for batch in rows:
            images = batch.images.to(self.world.device)
            yield batch, normalize_images(images, self.transform.mean, self.transform.std)

    @torch.no_grad()
    def pairs(self, source: PairSource) -> tuple[Tensor, Tensor]:
        """Image and text features of all pairs, [N, E] each, the same rows on every rank."""
        image_features, text_features = [], []
        for batch, images in self.batches(source):
            image_features.append(self.model.encode_image(images, normalize=True))
            tokens = batch.tokens.to(self.world.device)
            text_features.append(self.model.encode_text(tokens, normalize=True))
        # A rank may have no pair of a small source; the others wait for it in the gathering all the same.
        none = torch.zeros(0, self.model.config.embed_dim, device=self.world.device)
        return (
            gather_rows(torch.cat([none, *image_features])),
            gather_rows(torch.cat([none, *text_features])),
        )


def run_zero_shot(task: ZeroShotTask, encoder: Encoder) -> dict[str, float]:
    """Accuracies of a zero-shot task, the same on every rank."""
    classifier_EC = build_zero_shot_classifier(
        encoder.model,
        encoder.tokenizer,
        task.classnames,
        task.templates,
        num_classes_per_batch=64,
        device=encoder.world.device,
    )
    labels_N = torch.from_numpy(task.labels_N)
    report = zero_shot_accuracy(
        encoder.model,
        classifier_EC,
        ((images, labels_N[batch.indices]) for batch, images in encoder.batches(task.source)),
    )
    return {
        **report,
        "chance": 1 / len(task.classnames),
        "num_classes": float(len(task.classnames)),
    }


def run_retrieval(task: RetrievalTask, encoder: Encoder) -> dict[str, float]:
    """Recalls of a retrieval task and the loss over all its pairs as one batch."""
    image_features_NE, text_features_NE = encoder.pairs(task.source)
    scale, bias = encoder.model.logit_scale, encoder.model.logit_bias
    loss_fn = ClipLoss() if bias is None else SigLipLoss()
    with torch.no_grad():
        loss = loss_fn(image_features_NE, text_features_NE, scale.exp(), bias)
    recalls = retrieval_recall(image_features_NE, text_features_NE)
    return {"num_pairs": float(len(image_features_NE)), "val_loss": loss.item(), **recalls}


def class_folders(folder: Path) -> ZeroShotTask:
    """The images of a folder of one folder a class, as ImageNet's validation set is laid out.

    ``classes.json`` in it may map folder names to class names, and ``templates.json`` hold the list of prompts.

    Raises:
        DataError: no such folders, or files that cannot be read.
    """
    source = ClassFolderSource(str(folder))
    names = _read_json(folder / "classes.json", {})
    templates = _read_json(folder / "templates.json", list(SIMPLE_IMAGENET_TEMPLATES))
    if not isinstance(names, dict) or not isinstance(templates, list) or not templates:
        raise DataError(
            f"{folder}: classes.json maps folder names to class names, templates.json is a list of prompts with {{}}"
        )
    by_caption = {str(key).replace("_", " "): str(name) for key, name in names.items()}
    classnames = [by_caption.get(name, name) for name in source.classnames]
    return ZeroShotTask(
        f"classes of {folder.name}", source, source.labels_N, classnames, tuple(map(str, templates))
    )


def _read_json(path: Path, default: object) -> object:
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def zero_shot_tasks(config: TrainConfig) -> list[ZeroShotTask]:
    """The zero-shot evaluations that the settings ask for."""
    tasks = []
    if config.train_data == "glyphs":
        for split, name in (
            ("unseen", "unseen characters"),
            ("shift", "unseen characters in an unseen typeface"),
        ):
            source = GlyphSource(split)
            tasks.append(
                ZeroShotTask(name, source, source.labels_N, source.classnames, ZERO_SHOT_TEMPLATES)
            )
    if config.imagenet_val is not None:
        tasks.append(class_folders(Path(config.imagenet_val)))
    return tasks


def retrieval_tasks(config: TrainConfig) -> list[RetrievalTask]:
    """The retrieval evaluations that the settings ask for."""
    if config.val_data is not None:
        source = open_source(
            config.val_data,
            dataset_type=config.dataset_type,
            decoder=config.image_decoder,
            img_key=config.csv_img_key,
            caption_key=config.csv_caption_key,
            separator=config.csv_separator,
        )
        return [RetrievalTask("validation pairs", source)]
    if config.train_data == "glyphs":
        return [RetrievalTask("unseen characters, retrieval", GlyphSource("unseen"))]
    return []


class EvaluationPlan:
    """Which evaluations are due at which epoch, run on all ranks and logged.

    Args:
        config: asks for the tasks and how often they run.
        tokenizer, transform: as in training, with the evaluation crop.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        tokenizer: Callable[[list[str]], Tensor],
        transform: ImageTransform,
    ) -> None:
        self.zero_shot = zero_shot_tasks(config)
        self.retrieval = retrieval_tasks(config)
        self.world, self.tokenizer, self.transform = world, tokenizer, transform
        self.zeroshot_frequency = config.zeroshot_frequency
        self.val_frequency = config.val_frequency

    def encoder(self, model: CLIP, world: World | None = None) -> Encoder:
        """The plan's preprocessing with a model, on all ranks or on those of ``world``."""
        return Encoder(model, self.tokenizer, self.transform, world or self.world, batch_size=256)

    def run(self, model: CLIP, log: Logbook, step: int, epoch: int, is_last: bool) -> None:
        """Runs and logs the evaluations due after ``epoch`` epochs; a frequency of 0 turns them off."""
        was_training = model.training
        model.eval()
        encoder = self.encoder(model)
        if _is_due(epoch, self.zeroshot_frequency, is_last):
            for task in self.zero_shot:
                log.evaluation(
                    {"step": step, "task": task.name, **run_zero_shot(task, encoder)}, HEADLINE
                )
        if _is_due(epoch, self.val_frequency, is_last):
            for pairs in self.retrieval:
                log.evaluation(
                    {"step": step, "task": pairs.name, **run_retrieval(pairs, encoder)}, HEADLINE
                )
        model.train(was_training)


HEADLINE = ("acc1", "acc5", "chance", "image_to_text_R@1", "text_to_image_R@1")


def _is_due(epoch: int, frequency: int | None, is_last: bool) -> bool:
    return bool(frequency) and (is_last or epoch % (frequency or 1) == 0)
