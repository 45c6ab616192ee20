"""The embedded data sets by the names that ``--train-data`` takes: how each is opened, trained on and evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipcore.data import glyphs, icons
from clipcore.data.choices import GLYPHS, ICONS
from clipcore.data.drawing import DrawnSource


@dataclass(frozen=True)
class EmbeddedData:
    """A data set whose pictures are drawn, not read from files.

    Attributes:
        open: returns the pictures of a split, which is one of ``clipcore.data.drawing.SPLITS``.
        templates: the zero-shot prompts, {} where the name goes.
        style_templates: the prompts that describe a picture's style.
        training_captions: returns the captions that the vocabulary is trained on.
        zero_shot: the splits that a run is evaluated on, and the name of each in its log.
        retrieval: the log's name of the retrieval among the unseen pictures.
        recipe: settings of a training run that its user does not give.
    """

    open: Callable[[str], DrawnSource]
    templates: tuple[str, ...]
    style_templates: tuple[str, ...]
    training_captions: Callable[[], Sequence[str]]
    zero_shot: Mapping[str, str]
    retrieval: str
    recipe: Mapping[str, Any]


# Chosen for two processor cores and five minutes; docs/log.md has the experiments.
_GLYPHS_RECIPE = {
    "model": "ViT-glyphs",
    "epochs": 14,
    "batch_size": 256,
    "lr": 4e-3,
    "aug_scale": 0.9,
    "aug_ratio": 1.0,
    "val_frequency": 7,
    "zeroshot_frequency": 2,
    "wd": 0.6,
    "warmup": 60,
    "grad_clip_norm": 1.0,
    "tokenizer": "train",
    "vocab_size": 3072,
    "workers": 0,
}
# An epoch is 12,655 pictures, each with one of its three captions. 18 epochs have as many steps as 6 over all captions.
_ICONS_RECIPE = {
    **_GLYPHS_RECIPE,
    "epochs": 18,
    "val_frequency": 9,
    "zeroshot_frequency": 6,
    "vocab_size": 2000,
}

EMBEDDED = {
    GLYPHS: EmbeddedData(
        open=glyphs.GlyphSource,
        templates=glyphs.ZERO_SHOT_TEMPLATES,
        style_templates=("a {} glyph", "a character in {} type"),
        training_captions=glyphs.training_captions,
        zero_shot={
            "unseen": "unseen characters",
            "shift": "unseen characters in an unseen typeface",
        },
        retrieval="unseen characters, retrieval",
        recipe=_GLYPHS_RECIPE,
    ),
    ICONS: EmbeddedData(
        open=icons.IconSource,
        templates=icons.ZERO_SHOT_TEMPLATES,
        style_templates=("a {} icon", "an icon, {}"),
        training_captions=icons.training_captions,
        zero_shot={
            "unseen": "unseen icons",
            "shift": "unseen icons in unseen families",
            "seen-shift": "trained icons in unseen families",
        },
        retrieval="unseen icons, retrieval",
        recipe=_ICONS_RECIPE,
    ),
}
