"""The evaluations of a run: which data, which classes, and how to run each on all ranks.

Legend: B images of a batch, N images, E embedding size.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipcore.data import BadSample, DataError, PairSource, printable
from clipcore.data.embedded import EMBEDDED
from clipcore.data.folders import ClassFolderSource
from clipcore.data.loader import (
    JUDGED_ROWS,
    SHOWN_REASONS,
    Batch,
    eval_batches,
    too_many_bad,
)
from clipcore.data.pictures import PictureSource, by_picture
from clipcore.data.sources import MixtureSource, left_out_of, noted_of, open_source
from clipcore.data.transforms import Decoder, ImageTransform, normalize_images
from clipcore.evaluate.class_folders import read_templates
from clipcore.evaluate.prompts import SIMPLE_IMAGENET_TEMPLATES
from clipcore.evaluate.retrieval import retrieval_recall
from clipcore.evaluate.zero_shot import build_zero_shot_classifier, zero_shot_accuracy
from clipcore.loss import ClipLoss, SigLipLoss
from clipcore.ranks.distributed import World, gather_objects, gather_rows, is_main
from clipcore.run.metrics import MetricsLogger
from clipcore.run.recipe import RunConfig
from clipcore.towers.model import CLIP

# Of which one at least has to be readable when a run begins.
_PROBED_SAMPLES = 64


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
    """Pairs among which each side looks for the other.

    Attributes:
        all_captions: whether a picture's captions all count, or its first alone: where others describe several pictures
            equally well, as in the embedded data, a search by them has no right answer.
    """

    name: str
    source: PairSource
    all_captions: bool = True


@dataclass(frozen=True)
class Encoder:
    """What turns a source into features: the model, its preprocessing, and this rank's share.

    Attributes:
        max_bad_fraction: share of a source's samples that may be unreadable.
    """

    model: CLIP
    tokenizer: Callable[[list[str]], Tensor]
    transform: ImageTransform
    world: World
    batch_size: int
    max_bad_fraction: float = 0.01

    def batches(
        self, source: PairSource, tally: Tally, all_captions: bool = False
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Yield this rank's batches with their normalised images, in the order of the source.

        Args:
            tally: is given, once all is read, how many samples of all ranks could not be.

        Raises:
            DataError: on all ranks alike, more of them than ``max_bad_fraction``.
        """
        rows = eval_batches(
            source,
            self.transform,
            self.tokenizer,
            self.batch_size,
            self.world.rank,
            self.world.world_size,
            all_captions=all_captions,
        )
        bad = list[tuple[str, str]]()
        for batch in rows:
            bad += batch.bad
            tally.num_transparent += batch.num_transparent
            if len(batch.indices):
                images = batch.images.to(self.world.device)
                yield batch, normalize_images(images, self.transform.mean, self.transform.std)

        found = gather_objects((len(bad), bad[:SHOWN_REASONS], tally.num_transparent))
        tally.num_unreadable = sum(number for number, _, _ in found)
        tally.num_transparent = sum(number for _, _, number in found)
        # As in training a share of few samples says little.
        if tally.num_unreadable > self.max_bad_fraction * max(len(source), JUDGED_ROWS):
            first = [case for _, cases, _ in found for case in cases]
            number = tally.num_unreadable
            raise too_many_bad(number, len(source), source.name, self.max_bad_fraction, first)

    @torch.no_grad()
    def features(self, source: PairSource, tally: Tally, all_captions: bool = True) -> Features:
        """Return the features of all pictures and their captions, the same on every rank."""
        image_features, text_features, rows, owners = [], [], [], []
        for batch, images in self.batches(source, tally, all_captions):
            image_features.append(self.model.encode_image(images, normalize=True))
            # A picture may have any number of captions.
            for tokens in batch.tokens.split(4 * self.batch_size):
                text_BE = self.model.encode_text(tokens.to(self.world.device), normalize=True)
                text_features.append(text_BE)
            rows.append(batch.indices)
            owners.append(batch.indices if batch.owners is None else batch.owners)

        # A rank may have no pair of a small source; the others wait for it in the gathering all the same.
        none = torch.zeros(0, self.model.config.embed_dim, device=self.world.device)
        numbers = torch.zeros(0, dtype=torch.long)
        row_N, owner_M = (
            gather_rows(torch.cat([numbers, *those]).to(self.world.device))
            for those in (rows, owners)
        )
        return Features(
            gather_rows(torch.cat([none, *image_features])),
            gather_rows(torch.cat([none, *text_features])),
            # Samples that could not be read leave gaps in the numbers, which rise from rank to rank.
            torch.searchsorted(row_N, owner_M),
        )


@dataclass
class Tally:
    """What became of the samples of an evaluation, on all ranks."""

    num_unreadable: int = 0
    num_transparent: int = 0

    def counts(self) -> dict[str, float]:
        """Return what an evaluation's line notes."""
        return {name: float(number) for name, number in vars(self).items()}


class Features(NamedTuple):
    """Unit features of pictures and captions, and which picture each caption describes."""

    image_NE: Tensor
    text_ME: Tensor
    owner_M: Tensor


def run_zero_shot(task: ZeroShotTask, encoder: Encoder) -> dict[str, float]:
    """Return accuracies of a zero-shot task, the same on every rank."""
    classifier_EC = build_zero_shot_classifier(
        encoder.model,
        encoder.tokenizer,
        task.classnames,
        task.templates,
        num_classes_per_batch=64,
        device=encoder.world.device,
    )
    labels_N = torch.from_numpy(task.labels_N)
    tally = Tally()
    batches = encoder.batches(task.source, tally)
    report = zero_shot_accuracy(
        encoder.model,
        classifier_EC,
        ((images, labels_N[batch.indices]) for batch, images in batches),
    )
    return {
        **report,
        **tally.counts(),
        "chance": 1 / len(task.classnames),
        "num_classes": float(len(task.classnames)),
    }


def run_retrieval(task: RetrievalTask, encoder: Encoder) -> dict[str, float]:
    """Return recalls of a retrieval task, and the loss of all its pictures with their first captions as one batch."""
    tally = Tally()
    image_NE, text_ME, owner_M = encoder.features(task.source, tally, task.all_captions)
    if not len(image_NE):
        raise DataError(f"{task.source.name} holds no picture that can be read")
    first_N = torch.searchsorted(owner_M, torch.arange(len(image_NE), device=owner_M.device))
    scale, bias = encoder.model.logit_scale, encoder.model.logit_bias
    loss_fn = ClipLoss() if bias is None else SigLipLoss()
    with torch.no_grad():
        loss = loss_fn(image_NE, text_ME[first_N], scale.exp(), bias)
    return {
        "num_pairs": float(len(image_NE)),
        "num_texts": float(len(text_ME)),
        **tally.counts(),
        "val_loss": loss.item(),
        **retrieval_recall(image_NE, text_ME, owner_M),
    }


def check_readable(source: PairSource) -> None:
    """Raise DataError where none of some samples can be read, before hours of training depend on it."""
    reasons = []
    number = min(len(source), _PROBED_SAMPLES)
    # Not evenly spread: a table may repeat itself every few rows.
    for index in random.Random(0).sample(range(len(source)), number):
        try:
            _ = source[index]
            return
        except BadSample as error:
            reasons.append(str(error))
    raise DataError(
        f"none of {number} samples of {source.name} can be read, such as {printable(reasons[0])}"
    )


def class_folders(folder: Path, decoder: Decoder | str = "pillow") -> ZeroShotTask:
    """The images of a folder of one folder a class, as ImageNet's validation set is laid out.

    ``classes.json`` in it may map folder names to class names, and ``templates.json`` hold the list of prompts.

    Args:
        decoder: see ``decode_image``.

    Raises:
        DataError: no such folders, names that tell no class, or files that cannot be read.
    """
    source = ClassFolderSource(str(folder), decoder)
    templates = read_templates(folder) or SIMPLE_IMAGENET_TEMPLATES
    name = f"classes of {folder.name}"
    return ZeroShotTask(name, source, source.labels_N, source.classnames, templates)


def zero_shot_tasks(config: RunConfig) -> list[ZeroShotTask]:
    """The zero-shot evaluations that the settings ask for."""
    tasks = []
    if config.train_data in EMBEDDED:
        embedded = EMBEDDED[config.train_data]
        for split, name in embedded.zero_shot.items():
            source = embedded.open(split)
            tasks.append(
                ZeroShotTask(name, source, source.labels_N, source.classnames, embedded.templates)
            )
    if config.imagenet_val is not None:
        decoder = Decoder(max_pixels=config.max_pixels)
        tasks.append(class_folders(Path(config.imagenet_val), decoder))
    return tasks


def retrieval_tasks(config: RunConfig) -> list[RetrievalTask]:
    """The retrieval evaluations that the settings ask for."""
    if config.val_data is not None:
        source = open_source(
            config.val_data,
            dataset_type=config.dataset_type,
            decoder=config.image_decoder,
            max_pixels=config.max_pixels,
            img_key=config.csv_img_key,
            caption_key=config.csv_caption_key,
            separator=config.csv_separator,
            quotes=not config.csv_no_quotes,
        )
        return [RetrievalTask("validation pairs", by_picture(source))]
    if config.train_data in EMBEDDED:
        embedded = EMBEDDED[config.train_data]
        # Other pictures of a name are described equally well by its short captions.
        return [RetrievalTask(embedded.retrieval, embedded.open("unseen"), all_captions=False)]
    return []


class EvaluationPlan:
    """Which evaluations are due at which epoch, run on all ranks and logged; raises DataError for data that cannot be read.

    Args:
        config: asks for the tasks and how often they run, and how much may be unreadable.
        tokenizer, transform: as in training, with the evaluation crop.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        tokenizer: Callable[[list[str]], Tensor],
        transform: ImageTransform,
    ) -> None:
        self.zero_shot = zero_shot_tasks(config)
        self.retrieval = retrieval_tasks(config)
        # The ranks begin together or not at all: those that can read wait in the next collective for the others.
        for source in self._sources() if is_main() else ():
            check_readable(source)
        self.max_bad_fraction = config.max_bad_fraction
        self.world, self.tokenizer, self.transform = world, tokenizer, transform
        self.zeroshot_frequency = config.zeroshot_frequency
        self.val_frequency = config.val_frequency

    def describe_sources(self, training_source: PairSource) -> list[str]:
        """Return lines about data, of training and evaluations, that is not all used or is not what one may expect."""
        lines = []
        for source in (training_source, *self._sources()):
            parts = source.parts if isinstance(source, MixtureSource) else [source]
            lines += [part.describe() for part in parts if isinstance(part, PictureSource)]
            if noted := noted_of(source):
                lines.append(f"{source.name}: {noted}")
            if left_out := left_out_of(source):
                lines.append(f"not used of {source.name}: {left_out}")
        for task in self.zero_shot:
            name, number = Counter(task.classnames).most_common(1)[0]
            if number > 1:
                lines.append(
                    f"{task.name}: {number} classes are named {printable(name)!r}, which no prompt tells apart"
                )
        return lines

    def _sources(self) -> list[PairSource]:
        return [task.source for task in self.zero_shot] + [task.source for task in self.retrieval]

    def encoder(self, model: CLIP, world: World | None = None) -> Encoder:
        """The plan's preprocessing with a model, on all ranks or on those of ``world``."""
        return Encoder(
            model,
            self.tokenizer,
            self.transform,
            world or self.world,
            batch_size=256,
            max_bad_fraction=self.max_bad_fraction,
        )

    def run(self, model: CLIP, log: MetricsLogger, step: int, epoch: int, is_last: bool) -> None:
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


def _is_due(epoch: int, frequency: int, is_last: bool) -> bool:
    return frequency > 0 and (is_last or epoch % frequency == 0)
