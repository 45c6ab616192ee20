"""Finds the best names of images.

Legend: N images, K best names of each, B of a batch.
"""

from __future__ import annotations

import argparse
import itertools
from array import array
from pathlib import Path

import torch
from torch import Tensor

from clipcore.classify.arguments import PROGRAM
from clipcore.classify.images import find_images, read_all
from clipcore.classify.labels import as_compared, read_labels
from clipcore.classify.output import Classified, check_files
from clipcore.data import LeftOut
from clipcore.data.folders import images_below
from clipcore.data.tar import IMAGE_SUFFIXES
from clipcore.evaluate.loading import load_model
from clipcore.evaluate.zero_shot import build_zero_shot_classifier, classify
from clipcore.files import is_folder, mode_of
from clipcore.progress import Progress
from clipcore.ranks.distributed import pick_device
from clipcore.terminal import check_whole_numbers, complain

# Decoded images in memory at once.
IMAGES_AT_ONCE = 64


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError for arguments that cannot work, before a model is loaded."""
    check_whole_numbers(arguments, ("top", "max_pixels"))
    if arguments.top < 1:
        raise ValueError(f"--top is at least 1, got {arguments.top}")
    if arguments.max_pixels < 1:
        raise ValueError(f"--max-pixels is at least 1, got {arguments.max_pixels}")
    check_files(arguments.out)
    for path in arguments.images:
        if mode_of(Path(path)) is None:
            raise ValueError(f"cannot read {path}: there is no such file")
        left_out = LeftOut()
        if is_folder(Path(path)) and next(images_below(path, left_out), None) is None:
            kinds = ", .".join(IMAGE_SUFFIXES)
            raise ValueError(f"the folder {path} holds no image (.{kinds}){left_out.found()}")


def run_classification(arguments: argparse.Namespace) -> Classified:
    """Return the images of the arguments with their best names.

    An image that was named must be readable; unreadable ones in a folder are counted and left out.

    Raises:
        ValueError, OSError: a mistake in the arguments, or a file that cannot be read.
    """
    labels = read_labels(arguments.labels)
    _check_arguments(arguments)
    arguments.device = pick_device(arguments.device, local_rank=0)
    loaded = load_model(
        arguments.checkpoint,
        arguments.pretrained,
        arguments.model,
        arguments.bpe_path,
        arguments.device,
    )
    model, transform = loaded.model, loaded.transform
    templates = arguments.templates or loaded.templates
    classifier_EC = build_zero_shot_classifier(
        model, loaded.tokenizer, labels, templates, device=arguments.device
    )

    left_out, num_transparent = LeftOut(), 0
    paths: list[str] = []
    own, classes, probabilities = array("q"), list[Tensor](), list[Tensor]()
    index_of = {as_compared(label): index for index, label in enumerate(labels)}
    images = list(find_images(arguments.images, index_of, left_out))
    with Progress(len(images), "images", PROGRAM) as shown:
        readable = read_all(images, transform, arguments.max_pixels, left_out, shown.update)
        while batch := list(itertools.islice(readable, IMAGES_AT_ONCE)):
            pictures = torch.stack([image.picture for image in batch]).to(arguments.device)
            probabilities_BK, classes_BK = classify(model, pictures, classifier_EC, arguments.top)
            if not probabilities_BK.isfinite().all():
                raise ValueError("the model's features are not finite; its weights are not usable")
            paths += [image.path for image in batch]
            own.extend(image.own for image in batch)
            classes.append(classes_BK.cpu())
            probabilities.append(probabilities_BK.cpu())
            num_transparent += sum(image.is_transparent for image in batch)

    if not paths:
        raise ValueError(f"no image of {arguments.images[0]} can be read{left_out.found()}")
    if left_out:
        complain(PROGRAM, f"note: left out of the folders: {left_out}")
    if num_transparent:
        counts = f"{num_transparent} of {len(paths)} images are transparent"
        complain(PROGRAM, f"note: {counts}: laid over white")
    return Classified(
        paths, labels, torch.cat(classes), torch.cat(probabilities), torch.tensor(own)
    )
