"""Loads the models that a command line names: runs or files of weights, with preprocessing and vocabularies."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from clipcore.data.transforms import ImageTransform
from clipcore.run.folders import is_run
from clipcore.run.state import load_run
from clipcore.tokenizer import (
    Tokenizer,
    get_tokenizer,
    how_to_get_vocabulary,
    note_other_merges,
    open_vocabulary,
    vocabulary_beside,
)
from clipcore.towers.factory import create_model_from_pretrained
from clipcore.towers.model import CLIP


class LoadedModel(NamedTuple):
    """A model in evaluation mode, with its preprocessing and vocabulary.

    Attributes:
        name: the architecture, such as "ViT-B-32".
        pretrained: the weights, as the user named them.
        templates: prompts for data sets that have none.
    """

    name: str
    pretrained: str
    model: CLIP
    transform: ImageTransform
    tokenizer: Tokenizer
    templates: tuple[str, ...]


def load_model(
    checkpoint: str | None = None,
    pretrained: str | None = None,
    name: str | None = None,
    bpe_path: str | None = None,
    device: str | torch.device = "cpu",
) -> LoadedModel:
    """Load a model from a run, or from weights.

    Args:
        checkpoint: a run's folder, or one of its checkpoints.
        pretrained: weights of OpenAI, open_clip or transformers, or a run.
        name: the architecture of ``pretrained`` [read off its shapes].
        bpe_path: the vocabulary of ``pretrained`` [the one beside it, else OpenAI's].

    Raises:
        ValueError, OSError: the arguments contradict each other, or a file cannot be read.
    """
    run = checkpoint
    if pretrained and is_run(Path(pretrained)):
        # The run's record describes the model, and its vocabulary lies beside it.
        is_asked = name is None and bpe_path is None
        run = pretrained if is_asked else None
    if run is not None and (name is not None or bpe_path is not None):
        raise ValueError(
            "--checkpoint takes model and vocabulary from the run: leave --model and --bpe-path out, or use --pretrained"
        )
    if run is not None:
        model, transform, tokenizer = load_run(Path(run), device)
        return LoadedModel(model.config.short_name, run, model, transform, tokenizer, ("{}",))

    assert pretrained is not None
    if bpe_path is None and (beside := vocabulary_beside(pretrained)) is not None:
        bpe_path = str(beside)
    model, transform = create_model_from_pretrained(name, pretrained=pretrained, device=device)
    text = model.config.text
    if bpe_path is None and text.hf_tokenizer_name is not None:
        raise ValueError(
            f"{pretrained}: {how_to_get_vocabulary(text.hf_tokenizer_name)} as --bpe-path"
        )
    if bpe_path is None:
        tokenizer = get_tokenizer()
    else:
        tokenizer = open_vocabulary(bpe_path, text)
        note_other_merges(tokenizer, bpe_path)
    tokenizer.context_length = model.context_length
    if tokenizer.vocab_size != model.vocab_size:
        raise ValueError(
            f"the model has {model.vocab_size} tokens, but the vocabulary {tokenizer.vocab_size}: give the one it was "
            "trained with as --bpe-path"
        )
    described = name or model.config.short_name
    return LoadedModel(described, pretrained, model, transform, tokenizer, ("a photo of a {}.",))
