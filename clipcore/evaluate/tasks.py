"""The evaluations inside a training run: their data and classes, and their execution on all ranks.

Legend: B images of a batch, N images, E embedding size.
"""

from __future__ import annotations

import os
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

# At least one of this many samples must be readable when a run begins.
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
    """Pairs for retrieval in both directions.

    Attributes:
        all_captions: whether all of a picture's captions are used, or only its first. In the embedded data, the others
            describe several pictures equally well, so a search by them has no unique answer.
    """

    name: str
    source: PairSource
    all_captions: bool = True


@dataclass(frozen=True)
class Encoder:
    """Turns a source into features, with the model, its preprocessing, and this rank's share.

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
            tally: receives at the end the number of unreadable samples on all ranks.

        Raises:
            DataError: on every rank, if more samples are unreadable than ``max_bad_fraction``.
        """
        rows = eval_batches(
            source,
            self.transform,
            self.tokenizer,
            self.batch_size,
            self.world.rank,
            self.world.world_size,
            all_captions=all_captions,
            trim_text=self.model.ignores_padding,
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
        # As in training: a share of few samples means little.
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

        # A rank may have no pairs of a small source, but it must still take part in the gather.
        none = torch.zeros(0, self.model.config.embed_dim, device=self.world.device)
        numbers = torch.zeros(0, dtype=torch.long)
        row_N, owner_M = (
            gather_rows(torch.cat([numbers, *those]).to(self.world.device))
            for those in (rows, owners)
        )
        return Features(
            gather_rows(torch.cat([none, *image_features])),
            gather_rows(torch.cat([none, *text_features])),
            # Unreadable samples leave gaps in the indices, which ascend from rank to rank.
            torch.searchsorted(row_N, owner_M),
        )


@dataclass
class Tally:
    """Counts of an evaluation's samples, over all ranks."""

    num_unreadable: int = 0
    num_transparent: int = 0

    def counts(self) -> dict[str, float]:
        """Return the counts for an evaluation's log line."""
        return {name: float(number) for name, number in vars(self).items()}


class Features(NamedTuple):
    """Unit features of pictures and captions, and the picture that each caption describes."""

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
    """Raise DataError if none of a few samples can be read, before a long training depends on them."""
    reasons = []
    number = min(len(source), _PROBED_SAMPLES)
    # Not evenly spaced, because a table may be periodic.
    for index in random.Random(0).sample(range(len(source)), number):
        try:
            _ = source[index]
            return
        except BadSample as error:
            reasons.append(str(error))
    raise DataError(
        f"none of {number} samples of {source.name} can be read, such as {printable(reasons[0])}"
    )


def class_folders(
    folder: Path, decoder: Decoder | str = "pillow", name: str | None = None
) -> ZeroShotTask:
    """Return the zero-shot task of a folder with one folder per class, the layout of ImageNet's validation set.

    ``classes.json`` in it may map folder names to class names, and ``templates.json`` hold the list of prompts.

    Args:
        decoder: see ``decode_image``.
        name: of the data in the log [the folder's].

    Raises:
        DataError: there are no such folders, names identify no class, or files cannot be read.
    """
    source = ClassFolderSource(str(folder), decoder)
    templates = read_templates(folder) or SIMPLE_IMAGENET_TEMPLATES
    task = f"classes of {name or folder.name}"
    return ZeroShotTask(task, source, source.labels_N, source.classnames, templates)


def named_folders(text: str) -> list[tuple[str, Path]]:
    """Return the name and the path of each folder in ``--imagenet-val``, which are ``DIR`` or ``NAME=DIR`` joined by ``::``.

    A folder without a name is called as its last component. A folder may have an equals sign in its own path.
    """
    found = []
    for word in text.split("::"):
        name, equals, path = word.partition("=")
        if not equals or os.path.isdir(word):
            name, path = "", word
        found.append((name or os.path.basename(os.path.abspath(path)), Path(path)))
    return found


def zero_shot_tasks(config: RunConfig) -> list[ZeroShotTask]:
    """Return the zero-shot evaluations that the settings request."""
    tasks = []
    if config.train_data in EMBEDDED:
        embedded = EMBEDDED[config.train_data]
        for split, name in embedded.zero_shot.items():
            source = embedded.open(split)
            tasks.append(
                ZeroShotTask(name, source, source.labels_N, source.classnames, embedded.templates)
            )
    decoder = Decoder(max_pixels=config.max_pixels)
    given = [text for text in (config.imagenet_val, config.imagenet_v2) if text is not None]
    folders = [named for text in given for named in named_folders(text)]
    for name, number in Counter(name for name, _ in folders).items():
        if number > 1:
            first, second = [path for named, path in folders if named == name][:2]
            raise DataError(
                f"{first} and {second} are both called {printable(name)!r} in the log; give one of them a name, such as "
                f"--imagenet-val {printable(name)}-2={second}"
            )
    tasks += [class_folders(path, decoder, name) for name, path in folders]
    return tasks


def retrieval_tasks(config: RunConfig) -> list[RetrievalTask]:
    """Return the retrieval evaluations that the settings request."""
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
            cache_gb=config.data_cache_gb,
        )
        return [RetrievalTask("validation pairs", by_picture(source))]
    if config.train_data in EMBEDDED:
        embedded = EMBEDDED[config.train_data]
        # A name's short captions describe its other pictures equally well.
        return [RetrievalTask(embedded.retrieval, embedded.open("unseen"), all_captions=False)]
    return []


class EvaluationPlan:
    """The evaluations of each epoch, run on all ranks and logged; raises DataError for unreadable data.

    Args:
        config: defines the tasks, their frequency, and the share of samples that may be unreadable.
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
        # All ranks begin or none does: a rank that can read would wait for the others in the next collective.
        for source in self._sources() if is_main() else ():
            check_readable(source)
        self.max_bad_fraction = config.max_bad_fraction
        self.world, self.tokenizer, self.transform = world, tokenizer, transform
        self.zeroshot_frequency = config.zeroshot_frequency
        self.val_frequency = config.val_frequency

    def describe_sources(self, training_source: PairSource) -> list[str]:
        """Return lines about training and evaluation data that is skipped or interpreted unexpectedly."""
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
                    f"{task.name}: {number} classes are named {printable(name)!r}, which no prompt can distinguish"
                )
        return lines

    def _sources(self) -> list[PairSource]:
        return [task.source for task in self.zero_shot] + [task.source for task in self.retrieval]

    def encoder(self, model: CLIP, world: World | None = None) -> Encoder:
        """Return an encoder with the plan's preprocessing and a model, on all ranks or on those of ``world``."""
        return Encoder(
            model,
            self.tokenizer,
            self.transform,
            world or self.world,
            batch_size=256,
            max_bad_fraction=self.max_bad_fraction,
        )

    def run(
        self,
        model: CLIP,
        log: MetricsLogger,
        step: int,
        epoch: int,
        is_last: bool,
        alpha: float | None = None,
    ) -> None:
        """Run and log the evaluations that are due after ``epoch`` epochs; a frequency of 0 disables them.

        Args:
            alpha: of a model between the run's first weights and its last, which the log names.
        """
        was_training = model.training
        model.eval()
        encoder = self.encoder(model)
        where: dict[str, float] = {"step": step}
        suffix = ""
        if alpha is not None:
            where, suffix = {"step": step, "alpha": alpha}, f", alpha {alpha:g}"
        if _is_due(epoch, self.zeroshot_frequency, is_last):
            for task in self.zero_shot:
                row = {**where, "task": task.name + suffix, **run_zero_shot(task, encoder)}
                log.evaluation(row, HEADLINE)
        if _is_due(epoch, self.val_frequency, is_last):
            for pairs in self.retrieval:
                row = {**where, "task": pairs.name + suffix, **run_retrieval(pairs, encoder)}
                log.evaluation(row, HEADLINE)
        model.train(was_training)


HEADLINE = ("acc1", "acc5", "chance", "image_to_text_R@1", "text_to_image_R@1")


def _is_due(epoch: int, frequency: int, is_last: bool) -> bool:
    return frequency > 0 and (is_last or epoch % frequency == 0)
