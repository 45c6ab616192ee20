"""The teacher of ``--distill-model``: a trained CLIP whose probabilities a run learns beside its pairs."""

from __future__ import annotations

from pathlib import Path

import torch

from clipcore.run.config import ConfigError
from clipcore.run.folders import is_run
from clipcore.run.recipe import RunConfig
from clipcore.run.state import load_run
from clipcore.tokenizer import VOCABULARY_FILE, Tokenizer
from clipcore.towers.architectures import find_model
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
            raise ConfigError(
                f"the teacher {path} was trained with another vocabulary than this run's: give its own as --tokenizer, "
                f"the file {VOCABULARY_FILE} in its folder"
            )
        if name is not None and find_model(name).vision != teacher.config.vision:
            raise ConfigError(
                f"--distill-model {name} is not the model of the run {path}; leave it out, since the run says which it is"
            )
    elif name is not None:
        teacher = create_model(name, path, force_vocab_size=tokenizer.vocab_size)
    else:
        teacher = create_model_from_pretrained(None, path, return_transform=False)
    _check_inputs(teacher, model, path)
    precision = "bf16" if config.precision == "bf16" else "fp32"
    return cast(teacher, precision).to(device).eval().requires_grad_(False)


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
    if teacher.context_length < model.context_length:
        raise ConfigError(
            f"the teacher {path} reads captions of {teacher.context_length} tokens, and this model of "
            f"{model.context_length}: choose another teacher"
        )
