"""The parts of a run, made from its settings: vocabulary, data, model."""

from __future__ import annotations

import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from clipcore.architectures import find_model
from clipcore.checkpoint import Checkpoint
from clipcore.config import ConfigError, TrainConfig
from clipcore.data import BadSample, PairSource
from clipcore.data.embedded import EMBEDDED
from clipcore.data.sources import open_source
from clipcore.data.transforms import ImageTransform
from clipcore.descriptions import recorded_images
from clipcore.distributed import broadcast_object, is_main
from clipcore.model import CLIP, create_model, load_checkpoint
from clipcore.run_state import VOCABULARY_FILE, run_record
from clipcore.tokenizer import (
    Tokenizer,
    VocabularyError,
    byte_tokenizer,
    get_tokenizer,
    train_tokenizer,
)

# Of many thousands of pairs in a batch all but a few are none (Zhai et al. 2023, section 3.2).
SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0
# Samples whose captions make a vocabulary: more take minutes and change few merges.
_MAX_LEARNT_SAMPLES = 200_000


def build_tokenizer(
    config: TrainConfig, run_dir: Path, resuming: bool, source: PairSource
) -> Tokenizer:
    """Return the tokenizer that ``--tokenizer`` names, which may be learnt from the captions of the training data."""
    if config.tokenizer == "bytes":
        return byte_tokenizer()
    if config.tokenizer != "train":
        return get_tokenizer(bpe_path=None if config.tokenizer == "openai" else config.tokenizer)
    if resuming:
        return Tokenizer.from_file(run_dir / VOCABULARY_FILE)
    assert config.vocab_size is not None
    if config.train_data in EMBEDDED:
        captions = EMBEDDED[config.train_data].training_captions()
        return train_tokenizer(captions, config.vocab_size)
    # By one rank: a caption that another cannot read would give it other merges.
    learnt: Tokenizer | VocabularyError | None = None
    if is_main():
        try:
            learnt = train_tokenizer(_some_captions(source), config.vocab_size)
        except VocabularyError as error:
            learnt = error
    learnt = broadcast_object(learnt)
    if not isinstance(learnt, Tokenizer):
        raise learnt or VocabularyError("rank 0 learnt no vocabulary")
    return learnt


def _some_captions(source: PairSource) -> Iterator[str]:
    """Yield the captions of evenly spread samples, of all where they are few; those that cannot be read are left out."""
    number = min(len(source), _MAX_LEARNT_SAMPLES)
    for place in range(number):
        try:
            found = source.captions(place * len(source) // number)
        except BadSample:
            continue
        yield from [found] if isinstance(found, str) else found


def augmentation(config: TrainConfig) -> dict[str, Any]:
    """Return the random crop as arguments of ``ImageTransform``."""
    return {
        "scale": (config.aug_scale or 1.0, 1.0),
        "ratio": (1 / (config.aug_ratio or 1.0), config.aug_ratio or 1.0),
        "resize": config.aug_resize,
    }


def open_training_source(config: TrainConfig) -> PairSource:
    """Open the pairs that ``--train-data`` names, in images no larger than the crop needs."""
    if config.train_data in EMBEDDED:
        return EMBEDDED[config.train_data].open("train")
    size = config.force_image_size or find_model(str(config.model)).vision.image_size
    crop = ImageTransform(size, is_train=True, **augmentation(config))
    return open_source(
        config.train_data,
        dataset_type=config.dataset_type,
        img_key=config.csv_img_key,
        caption_key=config.csv_caption_key,
        separator=config.csv_separator,
        quotes=not config.csv_no_quotes,
        upsampling_factors=config.train_data_upsampling_factors,
        decoder=config.image_decoder,
        min_side=crop.min_side,
        max_pixels=config.max_pixels,
    )


def build_model(
    config: TrainConfig,
    vocab_size: int,
    checkpoint: Checkpoint | None,
    device: torch.device,
    say: Callable[[str], None],
) -> CLIP:
    """Return the model of a run, newly initialised or with the weights that ``--pretrained`` names.

    Args:
        checkpoint: of a run that goes on, whose weights are loaded later.
        say: is told of a scale and a bias that the weights lack.
    """
    model = create_model(
        str(config.model),
        precision="bf16" if config.precision == "bf16" else "fp32",
        device=device,
        force_image_size=config.force_image_size,
        force_quick_gelu=config.force_quick_gelu,
        force_patch_dropout=config.force_patch_dropout,
        force_vocab_size=vocab_size,
        init_logit_scale=math.log(SIGLIP_SCALE) if config.siglip else None,
        init_logit_bias=SIGLIP_BIAS if config.siglip else None,
    )
    if checkpoint is not None:
        model.set_images(recorded_images(run_record(checkpoint)["identity"], checkpoint.path))
    elif config.pretrained is not None:
        kept = load_checkpoint(model, config.pretrained)
        if kept:
            # A softmax loss ends at a scale of up to 100, from which a sigmoid loss would begin in the hundreds.
            torch.nn.init.constant_(model.logit_scale, math.log(SIGLIP_SCALE))
            say(
                f"{config.pretrained} has no logit_bias: --siglip begins with a scale of {SIGLIP_SCALE:g} and a bias of "
                f"{SIGLIP_BIAS:g}"
            )
    return model


def lock_towers(model: CLIP, config: TrainConfig) -> None:
    """Freeze what ``--lock-image`` and ``--lock-text`` name."""
    if config.lock_image:
        model.lock_image_tower(
            unlocked_groups=config.lock_image_unlocked_groups,
            freeze_bn_stats=config.lock_image_freeze_bn_stats,
        )
    if config.lock_text:
        model.lock_text_tower(unlocked_layers=config.lock_text_unlocked_layers)


def check_compiler() -> None:
    """Raise ConfigError where torch.compile would find no C++ compiler, in the middle of the first step on a CPU."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    if not command or shutil.which(command[0]) is None:
        raise ConfigError(
            f"--torchcompile needs a C++ compiler, and {' '.join(command) or 'CXX'} is not there: install g++, name one in "
            "CXX, or leave the flag out"
        )


def tower_widths(model: CLIP) -> tuple[int, int]:
    """Return the inner sizes of the towers' matrix products; of a ResNet those of its attention pool's output."""
    image = model.config.embed_dim if model.is_resnet else model.config.vision.width
    return image, model.config.text.width
