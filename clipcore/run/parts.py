"""The parts of a run, made from its settings: vocabulary, data, model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shlex
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from clipcore.checkpoint import Checkpoint
from clipcore.data import BadSample, PairSource
from clipcore.data.embedded import EMBEDDED
from clipcore.data.loader import PairLoader
from clipcore.data.sources import open_source, spread_captions
from clipcore.data.transforms import ImageTransform, crop_settings
from clipcore.loss import ClipLoss, DistillClipLoss, SigLipLoss
from clipcore.packages import package_folder
from clipcore.ranks.distributed import World, broadcast_object, is_main
from clipcore.run.config import ConfigError, TrainConfig, parse_aug_cfg
from clipcore.run.memory_plan import bytes_of
from clipcore.run.recipe import RunConfig, check_has_weights
from clipcore.run.state import run_record
from clipcore.tokenizer import (
    VOCABULARY_FILE,
    Tokenizer,
    VocabularyError,
    byte_tokenizer,
    get_tokenizer,
    open_vocabulary,
    train_tokenizer,
)
from clipcore.towers.architectures import find_model
from clipcore.towers.descriptions import recorded_images
from clipcore.towers.factory import create_model
from clipcore.towers.loading import load_checkpoint, load_tower
from clipcore.towers.lora import adapter_settings, add_lora
from clipcore.towers.model import CLIP

# Of many thousands of pairs in a batch all but a few are none (Zhai et al. 2023, section 3.2).
SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0
# Samples whose captions are compared: each may be a file of its own on a network disk.
_MAX_COMPARED_SAMPLES = 256


def build_tokenizer(
    config: RunConfig, run_dir: Path, resuming: bool, source: PairSource
) -> Tokenizer:
    """Return the tokenizer that ``--tokenizer`` names, which may be learnt from the captions of the training data."""
    if config.tokenizer == "bytes":
        return byte_tokenizer()
    if config.tokenizer == "openai":
        return get_tokenizer()
    if config.tokenizer != "train":
        return open_vocabulary(config.tokenizer, find_model(config.model).text)
    if resuming:
        return Tokenizer.from_file(run_dir / VOCABULARY_FILE)
    if config.train_data in EMBEDDED:
        return _learnt_tokenizer(EMBEDDED[config.train_data].training_captions(), config.vocab_size)
    # By one rank: a caption that another cannot read would give it other merges.
    learnt: Tokenizer | VocabularyError | None = None
    if is_main():
        try:
            learnt = _learnt_tokenizer(spread_captions(source), config.vocab_size)
        except VocabularyError as error:
            learnt = error
    learnt = broadcast_object(learnt)
    if not isinstance(learnt, Tokenizer):
        raise learnt or VocabularyError("rank 0 learnt no vocabulary")
    return learnt


def _learnt_tokenizer(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    with warnings.catch_warnings():
        # ``with_size_of`` prints it in the run's own words.
        warnings.filterwarnings("ignore", "the captions give")
        return train_tokenizer(captions, vocab_size)


def with_size_of(
    tokenizer: Tokenizer, config: RunConfig, print_line: Callable[[str], None]
) -> RunConfig:
    """Return the settings with the size of a learnt vocabulary, which may be smaller than asked.

    Args:
        print_line: called with a note if the size is another than that of the settings.
    """
    if config.tokenizer != "train" or config.vocab_size == tokenizer.vocab_size:
        return config
    print_line(
        f"the vocabulary has {tokenizer.vocab_size:,} entries, where --vocab-size asks for {config.vocab_size:,}: the "
        "captions that it was learnt from give no more"
    )
    return dataclasses.replace(config, vocab_size=tokenizer.vocab_size)


def captions_sha256(source: PairSource) -> str:
    """Return a hash of how many samples there are and of the captions of some, the same on all ranks.

    By it the data of a run is known after it was renamed or moved into another kind of file.
    """
    if not is_main():
        return broadcast_object("")
    digest = hashlib.sha256(f"{len(source)}\0".encode())
    number = min(len(source), _MAX_COMPARED_SAMPLES)
    for place in range(number):
        try:
            captions = source.captions(place * len(source) // number)
        except BadSample:
            captions = ""
        # JSON marks where a caption ends, and is ASCII whatever is in it.
        digest.update(json.dumps(captions).encode())
    return broadcast_object(digest.hexdigest())


def name_of_data(
    source: PairSource,
    sha256: str,
    checkpoint: Checkpoint | None,
    print_line: Callable[[str], None],
) -> str:
    """Return by which words a run knows its data: those of its checkpoint where the captions are those of then.

    Args:
        sha256: as of ``captions_sha256``.
        print_line: called with a note if the name is another than the checkpoint's.
    """
    name = f"{source.name} of {len(source)} samples"
    record = {} if checkpoint is None else run_record(checkpoint)
    before = record["identity"].get("data") if record else name
    if before == name or record.get("captions_sha256") != sha256:
        return name
    print_line(
        f"the data was called {before}, and now {name}; it has the captions of then, so that the run goes on with it"
    )
    return str(before)


def identity_of(model: CLIP, tokenizer: Tokenizer, data: str, image_decoder: str) -> dict[str, Any]:
    """Return what a checkpoint has to share with the run that goes on from it, by name.

    Args:
        data: as of ``name_of_data``.
        image_decoder: what JPEG files are decoded with.
    """
    identity = {
        "model": model.config.to_dict(),
        "vocabulary": tokenizer.sha256,
        "data": data,
        "image decoder": image_decoder,
    }
    # Mean, deviation and resizing, if the weights name them: whoever uses the run's weights needs the same.
    if model.images:
        identity["images"] = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in model.images.items()
        }
    if adapter := adapter_settings(model):
        identity["adapter"] = adapter
    return identity


def augmentation(config: RunConfig) -> dict[str, Any]:
    """Return the random crop as arguments of ``ImageTransform``; raise ConfigError for settings that it does not have."""
    if config.aug_cfg is not None:
        try:
            return crop_settings(parse_aug_cfg(config.aug_cfg))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"--aug-cfg: {error}") from None
    if config.aug_resize is not None:
        return {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "resize": config.aug_resize}
    assert config.aug_scale is not None and config.aug_ratio is not None  # the recipe has both
    return {"scale": (config.aug_scale, 1.0), "ratio": (1 / config.aug_ratio, config.aug_ratio)}


def open_training_source(config: RunConfig) -> PairSource:
    """Open the pairs that ``--train-data`` names, in images no larger than the crop needs."""
    if config.train_data in EMBEDDED:
        return EMBEDDED[config.train_data].open("train")
    size = config.force_image_size
    if size is None:
        size = find_model(config.model).vision.image_size
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
        cache_gb=config.data_cache_gb,
    )


def build_model(
    config: RunConfig,
    vocab_size: int,
    checkpoint: Checkpoint | None,
    device: torch.device,
    print_line: Callable[[str], None],
) -> CLIP:
    """Return the model of a run, newly initialised or with the weights of ``--pretrained`` and ``--pretrained-image``.

    Args:
        checkpoint: of a run that goes on, whose weights are loaded later.
        print_line: called with a note if the weights lack a scale and a bias.

    Raises:
        ConfigError: the run is to fine-tune, and names no weights.
        ValueError: the weights do not fit the model.
    """
    if checkpoint is None:
        check_has_weights(config)
    model = create_model(
        config.model,
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
        return model
    if config.pretrained is not None:
        missing = load_checkpoint(model, config.pretrained).missing_keys
        if missing:
            # A softmax loss ends at a scale of up to 100, from which a sigmoid loss would begin in the hundreds.
            torch.nn.init.constant_(model.logit_scale, math.log(SIGLIP_SCALE))
            print_line(
                f"{config.pretrained} has no logit_bias: --siglip begins with a scale of {SIGLIP_SCALE:g} and a bias of "
                f"{SIGLIP_BIAS:g}"
            )
    if config.pretrained_image is not None:
        load_tower(model, "image", config.pretrained_image)
    return model


def build_loader(
    config: RunConfig,
    source: PairSource,
    transform: ImageTransform,
    tokenizer: Tokenizer,
    world: World,
    trim_text: bool,
) -> PairLoader:
    """Return the loader of this rank's part of every global batch; ``trim_text`` as of ``PairLoader``."""
    return PairLoader(
        source,
        transform,
        tokenizer,
        config.global_batch_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.world_size,
        workers=config.workers,
        max_bad_fraction=config.max_bad_fraction,
        trim_text=trim_text,
    )


def build_loss(config: TrainConfig, world: World, global_batch_size: int) -> ClipLoss | SigLipLoss:
    """Return the loss over all ranks that the settings name; that of a teacher too is a ``DistillClipLoss``."""
    # What a run on GPUs decided is of no use on a CPU.
    decided = config.gpu_stash_bytes if world.device.type == "cuda" else None
    rank, world_size = world.rank, world.world_size
    is_uneven = global_batch_size % world_size > 0
    # Without effect under "negative", which passes no ids.
    same_id = "positive" if config.duplicate_captions == "positive" else "ignore"
    if config.siglip:
        return SigLipLoss(
            rank=rank,
            world_size=world_size,
            same_id=same_id,
            workspace_bytes=bytes_of(config.loss_workspace),
            uneven=is_uneven,
        )
    loss_class = ClipLoss if config.distill_pretrained is None else DistillClipLoss
    return loss_class(
        rank=rank,
        world_size=world_size,
        label_smoothing=config.label_smoothing,
        same_id=same_id,
        stash_bytes=decided if config.loss_stash is None else bytes_of(config.loss_stash),
        workspace_bytes=bytes_of(config.loss_workspace),
        uneven=is_uneven,
    )


def lock_towers(model: CLIP, config: TrainConfig) -> None:
    """Freeze what ``--lock-image`` and ``--lock-text`` name."""
    if config.lock_image:
        model.lock_image_tower(
            unlocked_groups=config.lock_image_unlocked_groups,
            freeze_bn_stats=config.lock_image_freeze_bn_stats,
        )
    if config.lock_text:
        model.lock_text_tower(unlocked_layers=config.lock_text_unlocked_layers)


def adapt(model: CLIP, config: RunConfig, start: Path | None) -> None:
    """Freeze a model, and give it the matrices of ``--lora-rank`` to train, if that is set.

    Args:
        model: whose towers are locked already, if they are to be.
        start: the weights that the run began with, for a run that goes on.
    """
    if config.lora_rank is None:
        return
    if start is not None:
        images = model.images
        load_checkpoint(model, start)
        model.set_images(images)
    add_lora(model, config.lora_rank, config.lora_alpha or config.lora_rank)


def check_compiler(device: torch.device) -> None:
    """Raise ConfigError where torch.compile would fail in the middle of a run, for want of Triton or of a C++ compiler."""
    if torch._dynamo.config.disable:
        raise ConfigError(
            "--torchcompile: torch's compiler is turned off by TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE; unset it, or "
            "leave the flag out"
        )
    if device.type == "cuda":
        if package_folder("triton") is None:
            raise ConfigError(
                "--torchcompile needs Triton on a GPU: pip install triton, or leave the flag out"
            )
        return
    try:
        command = shlex.split(os.environ.get("CXX") or "g++")
    except ValueError as error:
        raise ConfigError(
            f"--torchcompile: CXX is {os.environ['CXX']!r}, which is no command ({error}); correct it, or leave the flag out"
        ) from None
    if not command or shutil.which(command[0]) is None:
        raise ConfigError(
            f"--torchcompile needs a C++ compiler, and {' '.join(command) or 'CXX'} is not there: install g++, name one in "
            "CXX, or leave the flag out"
        )
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        raise ConfigError(
            f"--torchcompile needs Python's headers, and {headers} has no Python.h: install python3-dev, or leave the flag "
            "out"
        )


def tower_widths(model: CLIP) -> tuple[int, int]:
    """Return the inner sizes of the towers' matrix products; of a ResNet those of its attention pool's output."""
    image = model.config.embed_dim if model.is_resnet else model.config.vision.width
    return image, model.config.text.width
