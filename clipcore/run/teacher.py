"""The teacher of ``--distill-model``: a trained CLIP whose probabilities a run learns beside its pairs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from clipcore.run.config import ConfigError
from clipcore.run.folders import is_run
from clipcore.run.recipe import RunConfig
from clipcore.run.state import load_run
from clipcore.tokenizer import Tokenizer, other_vocabulary_beside, vocabulary_of_run
from clipcore.towers.architectures import ModelConfig, TextConfig, find_model
from clipcore.towers.factory import cast, create_model, create_model_from_pretrained
from clipcore.towers.model import CLIP


def build_teacher(
    config: RunConfig, model: CLIP, tokenizer: Tokenizer, device: torch.device
) -> CLIP | None:
    """Return the teacher that the settings name, in evaluation mode and without gradients; None where there is none.

    It sees the student's images and captions, so both have one image size and one vocabulary. It normalises pixels by its
    own mean and deviation. Its features may have another width.

    Args:
        model: the student.
        tokenizer: of the run.

    Raises:
        ConfigError: it takes other images or captions than the student.
        ValueError: its weights do not fit the architecture that is named.
    """
    if config.distill_pretrained is None:
        return None
    path, name = config.distill_pretrained, config.distill_model
    if is_run(Path(path)):
        teacher, _, words = load_run(Path(path))
        if words.sha256 != tokenizer.sha256:
            raise _other_vocabulary(path, vocabulary_of_run(Path(path)))
        if name is not None and _architecture(find_model(name)) != _architecture(teacher.config):
            raise ConfigError(
                f"--distill-model {name} is not the model of the run {path}; leave it out, since the run says which it is"
            )
    elif name is not None:
        teacher = create_model(name, path, force_vocab_size=tokenizer.vocab_size)
    else:
        teacher = create_model_from_pretrained(None, path, return_transform=False)
    beside = other_vocabulary_beside(path, teacher.config.text, tokenizer)
    if beside is not None:
        raise _other_vocabulary(path, beside)
    _check_inputs(teacher, model, path)
    precision = "bf16" if config.precision == "bf16" else "fp32"
    return cast(teacher, precision).to(device).eval().requires_grad_(False)


def _other_vocabulary(path: str, vocabulary: Path) -> ConfigError:
    return ConfigError(
        f"the teacher {path} was trained with another vocabulary than this run's: give its own, --tokenizer {vocabulary}"
    )


def _architecture(config: ModelConfig) -> tuple[object, ...]:
    """Return what a run cannot change of the model that it names: no size of images or rows, vocabulary or dropout."""
    vision = dataclasses.replace(config.vision, patch_dropout=0.0, image_size=224)
    return config.embed_dim, vision, config.text.shape | {"context_length": None}


def _reading(config: TextConfig) -> dict[str, object]:
    """Return how a tower that reads padding wants its rows, by the names of the fields."""
    return {
        "context_length": config.context_length,
        "clean": config.clean or "whitespace",
        "strip_sep_token": config.strip_sep_token,
        "pool_type": config.pool_type,
    }


def _check_inputs(teacher: CLIP, model: CLIP, path: str) -> None:
    """Raise ConfigError unless a teacher takes the student's images and captions."""
    theirs, own = teacher.visual.image_size[0], model.visual.image_size[0]
    if theirs != own:
        raise ConfigError(
            f"the teacher {path} takes images of {theirs} pixels, and this model of {own}: choose "
            f"--force-image-size {theirs}, or another teacher"
        )
    if teacher.vocab_size != model.vocab_size:
        raise ConfigError(
            f"the teacher {path} has {teacher.vocab_size} tokens, and this run's vocabulary {model.vocab_size}: give the "
            "teacher's vocabulary with --tokenizer"
        )
    if teacher.ignores_padding != model.ignores_padding:
        reader = "the teacher" if model.ignores_padding else "this model"
        raise ConfigError(
            f"{reader} reads the padding of captions too, as SigLIP does, and the other one does not: choose a teacher of "
            f"this model's kind, not {path}"
        )
    theirs_read, own_read = _reading(teacher.config.text), _reading(model.config.text)
    if not model.ignores_padding and theirs_read != own_read:
        name = next(key for key in own_read if own_read[key] != theirs_read[key])
        raise ConfigError(
            f"both models read the padding of captions, so they take the same rows, but the teacher {path} has {name} "
            f"{theirs_read[name]} and this model {own_read[name]}: choose a teacher of this model's kind"
        )
    if teacher.context_length < model.context_length:
        raise ConfigError(
            f"the teacher {path} reads captions of {teacher.context_length} tokens, and this model of "
            f"{model.context_length}: choose another teacher"
        )
