"""The shapes of the models: published ones under open_clip's names, and small ones for small machines."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcore.files import is_file, read_regular
from clipcore.towers.open_clip_models import OPEN_CLIP_MODELS, TIMM_KEYS, TIMM_TOWERS

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
# No tower larger than this was ever trained: a description with larger numbers is damaged or hostile.
_SHOWN_CHARS = 200  # of a value shown in a message
MAX_LAYERS, MAX_SIZE, MAX_GRID = 1024, 1 << 24, 1 << 12
DEFAULT_EPS = 1e-5
# How open_clip cleans captions, by its names.
CLEANINGS = ("lower", "canonicalize", "whitespace")


class UnknownModelError(ValueError):
    """There is no model of that name; the message lists the nearest names."""


@dataclass(frozen=True)
class VisionConfig:
    """The image tower: a Vision Transformer, or a modified ResNet if ``layers`` has four numbers."""

    image_size: int = 224
    """Side of the square image, pixels."""
    layers: int | tuple[int, int, int, int] = 12
    """Blocks of the transformer, or of each ResNet stage."""
    width: int = 768
    """Transformer width, or channels of the ResNet stem."""
    patch_size: int | None = 32
    """Side of a patch, pixels; None for a ResNet."""
    head_width: int = 64
    """Width of an attention head."""
    mlp_ratio: float = 4.0
    """Width of the MLP, as a multiple of the transformer's."""
    patch_dropout: float = 0.0
    """Share of patches dropped in training (Li et al. 2022, FLIP)."""
    ls_init_value: float | None = None
    """First value of the scales of the blocks' outputs (Touvron et al. 2021, LayerScale); None for blocks without."""
    no_ln_pre: bool = False
    """Whether there is no LayerNorm before the blocks."""
    pool_type: str = "tok"
    """What the features are read from: the class token ("tok"), the mean of the patches ("avg"), or, as in SigLIP, the
    attention of one query to the patches ("map"). With "map" there is no class token, no LayerNorm before the blocks and no
    projection, and the patches have a bias."""
    final_ln_after_pool: bool = False
    """Whether the last LayerNorm follows the mean of the patches."""
    norm_eps: float = DEFAULT_EPS
    """Constant in the LayerNorms, ``norm_kwargs`` in open_clip's layout."""
    gelu_tanh: bool = False
    """GELU by its tanh approximation, ``act_kwargs`` in open_clip's layout."""

    def __post_init__(self) -> None:
        stages = self.layers if isinstance(self.layers, tuple) else (self.layers,)
        if isinstance(self.layers, tuple) and len(stages) != 4:
            raise ValueError(f"layers is {self.layers}; a ResNet has four stages")
        for number in stages:
            _check_size("layers", number, MAX_LAYERS)
        for name in ("image_size", "width", "head_width"):
            _check_size(name, getattr(self, name))
        if self.patch_size is not None:
            _check_size("patch_size", self.patch_size)
        elif not self.is_resnet:
            raise ValueError(
                "patch_size is missing; a ResNet, which has none, has four numbers as layers"
            )
        if self.patch_size is not None and self.image_size // self.patch_size > MAX_GRID:
            raise ValueError(
                f"image_size {self.image_size} is more than {MAX_GRID:,} patches of {self.patch_size}"
            )
        _check_mlp(self.width, self.mlp_ratio)
        _check_heads(self.width * (32 if self.is_resnet else 1), self.heads)
        _check_number("patch_dropout", self.patch_dropout)
        _check_one_of("pool_type", self.pool_type, ("tok", "avg", "map"))
        _check_block(self)
        for name in ("no_ln_pre", "final_ln_after_pool"):
            _check_flag(name, getattr(self, name))
        if self.is_resnet and (named := _not_default(self, _OF_TRANSFORMERS)):
            raise ValueError(f"a ResNet has no {', '.join(named)}")
        if self.has_map and (named := _not_default(self, ("no_ln_pre", "final_ln_after_pool"))):
            raise ValueError(f"{', '.join(named)} goes with pool_type tok or avg, not map")

    @property
    def has_map(self) -> bool:
        """Whether one query's attention pools the patches, as in SigLIP."""
        return self.pool_type == "map"

    @property
    def is_resnet(self) -> bool:
        return not isinstance(self.layers, int)

    @property
    def heads(self) -> int:
        # A ResNet has heads only in its attention pool, whose width is 32 times the stem's.
        return max(1, self.width * (32 if self.is_resnet else 1) // self.head_width)


@dataclass(frozen=True)
class TextConfig:
    """The text tower."""

    context_length: int = 77
    """Longest row of tokens, start and end included."""
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    ls_init_value: float | None = None
    """See ``VisionConfig``."""
    no_causal_mask: bool = False
    """Whether a token attends to later ones too, padding included."""
    pool_type: str = "argmax"
    """The token that the features are read from: the one of the largest id ("argmax"), the first with the id ``eos_id``
    ("eos"), or the last of the row ("last")."""
    eos_id: int = 2
    """The id that "eos" looks for."""
    proj_type: str = "linear"
    """"linear", or "none" for features without a projection."""
    proj_bias: bool = False
    """Whether the projection has a bias."""
    norm_eps: float = DEFAULT_EPS
    """See ``VisionConfig``."""
    gelu_tanh: bool = False
    """See ``VisionConfig``."""
    hf_tokenizer_name: str | None = dataclasses.field(default=None, compare=False)
    """The repository of the vocabulary on the Hugging Face hub; None for CLIP's kind of vocabulary."""
    clean: str | None = dataclasses.field(default=None, compare=False)
    """How captions are cleaned before such a vocabulary, of ``tokenizer_kwargs`` in open_clip's layout."""
    strip_sep_token: bool = dataclasses.field(default=False, compare=False)
    """Whether the end of a caption is replaced by padding, of ``tokenizer_kwargs`` too."""

    def __post_init__(self) -> None:
        _check_size("layers", self.layers, MAX_LAYERS)
        for name in ("context_length", "vocab_size", "width", "heads"):
            _check_size(name, getattr(self, name))
        _check_mlp(self.width, self.mlp_ratio)
        _check_heads(self.width, self.heads)
        _check_one_of("pool_type", self.pool_type, ("argmax", "eos", "last"))
        _check_one_of("proj_type", self.proj_type, ("linear", "none"))
        _check_block(self)
        for name in ("no_causal_mask", "proj_bias", "strip_sep_token"):
            _check_flag(name, getattr(self, name))
        if type(self.eos_id) is not int or not 0 <= self.eos_id < self.vocab_size:
            raise ValueError(
                f"eos_id is {shortened(self.eos_id)}, not one of {self.vocab_size:,} ids"
            )
        if self.clean is not None:
            _check_one_of("clean", self.clean, CLEANINGS)
        if self.hf_tokenizer_name is not None and type(self.hf_tokenizer_name) is not str:
            raise ValueError(
                f"hf_tokenizer_name is {shortened(self.hf_tokenizer_name)}, not a text"
            )

    @property
    def shape(self) -> dict[str, Any]:
        """The fields that a published name stands for: all that are compared, but the size of the vocabulary."""
        names = [field.name for field in dataclasses.fields(self) if field.compare]
        return {name: getattr(self, name) for name in names if name != "vocab_size"}

    @property
    def ignores_padding(self) -> bool:
        """Whether nothing depends on what follows a caption's largest id, as in CLIP: padding can be left out."""
        return not self.no_causal_mask and self.pool_type == "argmax"


# Fields that a ResNet does not have.
_OF_TRANSFORMERS = (
    "ls_init_value",
    "no_ln_pre",
    "pool_type",
    "final_ln_after_pool",
    "norm_eps",
    "gelu_tanh",
)


# Fields of a text tower that OpenAI's does not have.
_OF_TEXT = (
    *("ls_init_value", "no_causal_mask", "pool_type", "proj_type", "proj_bias"),
    *("norm_eps", "gelu_tanh"),
)


def _not_default(tower: VisionConfig | TextConfig, names: Sequence[str]) -> list[str]:
    """Return which of some fields have another value than the default, with it."""
    defaults = {field.name: field.default for field in dataclasses.fields(tower)}
    values = {name: getattr(tower, name) for name in names}
    return [f"{name}={value}" for name, value in values.items() if value != defaults[name]]


def _check_block(tower: VisionConfig | TextConfig) -> None:
    """Raise ValueError for impossible values of the fields that say of what a tower's blocks are made."""
    if tower.ls_init_value is not None:
        _check_number("ls_init_value", tower.ls_init_value)
    _check_number("norm_eps", tower.norm_eps)
    if not 0 < tower.norm_eps < 1:
        raise ValueError(f"the LayerNorms' eps is {tower.norm_eps}, not a number between 0 and 1")
    _check_flag("gelu_tanh", tower.gelu_tanh)


def _check_flag(name: str, value: object) -> None:
    if type(value) is not bool:
        raise ValueError(f"{name} is {shortened(value)}, neither true nor false")


def _check_one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(
            f"{name} is {shortened(value)}; clipcore's towers have {' or '.join(allowed)}"
        )


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")


def _check_mlp(width: int, mlp_ratio: object) -> None:
    _check_number("mlp_ratio", mlp_ratio)
    if not 1 <= width * float(mlp_ratio) <= MAX_SIZE:  # type: ignore[arg-type]
        raise ValueError(
            f"mlp_ratio is {mlp_ratio}, which of width {width} is not 1 to {MAX_SIZE:,} units"
        )


def _check_size(name: str, value: object, most: int = MAX_SIZE) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{name} is {shortened(value)}, not a whole number from 1 to {most:,}")


def _check_number(name: str, value: object) -> None:
    if not is_finite_number(value):
        raise ValueError(f"{name} is {shortened(value)}, not a number")


def is_finite_number(value: object) -> bool:
    """Return whether a value, for example from a JSON file, is a number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shortened(value: object) -> str:
    """Return a value as text for a message; Python refuses to print integers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # it contains such a number, or is deeply nested
        return f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


# Keys of open_clip's JSON that have other names here, and one that defines the names of its parameters.
_KEYS = {"vision_cfg", "text_cfg", "custom_text"}
# What open_clip's towers can have and clipcore's do not, with the value that leaves it out. Keys that only qualify others of
# these, such as the number of heads of a pooler that there is not, have no value here and change nothing.
_ABSENT_IN_BOTH = {
    "output_tokens": False,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
ABSENT: dict[str, dict[str, Any]] = {
    "vision_cfg": {
        **_ABSENT_IN_BOTH,
        "attentional_pool": False,
        "pos_embed_type": "learnable",
        "timm_model_name": None,
    },
    "text_cfg": {
        **_ABSENT_IN_BOTH,
        "embed_cls": False,
        "final_ln_after_pool": False,
        "tokenizer_mode": None,
        "hf_model_name": None,
    },
}
QUALIFYING = {
    "vision_cfg": {
        "attn_pooler_queries",
        "attn_pooler_heads",
        "timm_model_pretrained",
        "timm_pool",
        "timm_proj",
        "timm_proj_bias",
        "timm_drop",
        "timm_drop_path",
    },
    "text_cfg": {"pad_id", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"},
}
_SIGLIP_IMAGES: dict[str, Any] = {
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "resize_mode": "squash",
}
_CLIPA_IMAGES: dict[str, Any] = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bilinear",
    "resize_mode": "squash",
}
# open_clip's, where a description does not say it. Published descriptions do.
_OPEN_CLIP_PATCH_SIZE = 16


@dataclass(frozen=True)
class ModelConfig:
    """Both towers and their shared embedding space."""

    embed_dim: int
    vision: VisionConfig
    text: TextConfig
    quick_gelu: bool = False
    """QuickGELU instead of GELU, as in OpenAI's weights."""
    init_logit_scale: float = INITIAL_LOGIT_SCALE
    """Logarithm of the cosine's factor before training."""
    init_logit_bias: float | None = None
    """Constant added to the logits before training; None for a model without one (SigLIP's is -10)."""

    def __post_init__(self) -> None:
        _check_size("embed_dim", self.embed_dim)
        _check_flag("quick_gelu", self.quick_gelu)
        if self.quick_gelu and not self.can_have_quick_gelu:
            raise ValueError(
                "the model has GELU by its tanh approximation or an image tower of SigLIP, and QuickGELU goes with neither"
            )
        for tower, width, has_projection in (
            ("image", self.vision.width, not self.vision.has_map),
            ("text", self.text.width, self.text.proj_type != "none"),
        ):
            if not has_projection and width != self.embed_dim:
                raise ValueError(
                    f"embed_dim is {self.embed_dim}, and the {tower} tower, which has no projection, is {width} wide"
                )
        _check_number("init_logit_scale", self.init_logit_scale)
        if self.init_logit_bias is not None:
            _check_number("init_logit_bias", self.init_logit_bias)

    @property
    def can_have_quick_gelu(self) -> bool:
        """Whether there is such a model with QuickGELU: not with another GELU, nor with an image tower of SigLIP."""
        return not (self.vision.has_map or self.vision.gelu_tanh or self.text.gelu_tanh)

    @classmethod
    def from_dict(cls, config: Any) -> ModelConfig:
        """Return the configuration in open_clip's JSON layout.

        Raises:
            ValueError: an unknown key, a missing one, or an impossible value.
        """
        if not isinstance(config, dict):
            raise ValueError(f"the model's description is a {type(config).__name__}, not an object")
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - config.keys()
        if missing:
            raise ValueError(f"the model's description has no {', '.join(sorted(missing))}")
        stated = {key for key, value in config.items() if value is not None}
        if unknown := stated - {field.name for field in dataclasses.fields(cls)} - _KEYS:
            raise ValueError(
                f"the model has {', '.join(sorted(unknown))}, which clipcore's models do not have"
            )
        for tower in ("vision_cfg", "text_cfg"):
            if not isinstance(config[tower], dict):
                raise ValueError(f"{tower} is {shortened(config[tower])}, not an object")
        vision = _of_timm(_without_absent("vision_cfg", config["vision_cfg"]))
        text = _without_absent("text_cfg", config["text_cfg"])
        _flatten(text, "tokenizer_kwargs", {"clean": "clean", "strip_sep_token": "strip_sep_token"})
        if text.get("pool_type") != "eos":
            text.pop("eos_id", None)
        for fields in (vision, text):
            _flatten(fields, "norm_kwargs", {"eps": "norm_eps"})
            _flatten(fields, "act_kwargs", {"approximate": "gelu_tanh"})
            if fields.get("gelu_tanh") in ("none", "tanh"):
                fields["gelu_tanh"] = fields["gelu_tanh"] == "tanh"
        if isinstance(vision.get("layers"), list):
            vision["layers"] = tuple(vision["layers"])
        size = vision.get("image_size")
        if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
            vision["image_size"] = size[0]
        is_resnet = isinstance(vision.get("layers"), tuple)
        vision.setdefault("patch_size", None if is_resnet else _OPEN_CLIP_PATCH_SIZE)
        for kind, given in ((VisionConfig, vision), (TextConfig, text)):
            unknown = given.keys() - {field.name for field in dataclasses.fields(kind)}
            if unknown:
                what = ", ".join(_shown(key, given[key]) for key in sorted(unknown))
                raise ValueError(f"the model has {what}, which clipcore's towers do not have")
        return cls(
            config["embed_dim"],
            VisionConfig(**vision),
            TextConfig(**text),
            config.get("quick_gelu", False),
            config.get("init_logit_scale", INITIAL_LOGIT_SCALE),
            config.get("init_logit_bias"),
        )

    @property
    def beyond_openai(self) -> list[str]:
        """What the towers have that OpenAI's CLIP does not, as field=value in open_clip's words."""
        return _not_default(self.vision, _OF_TRANSFORMERS) + _not_default(self.text, _OF_TEXT)

    @property
    def usual_images(self) -> dict[str, Any]:
        """The preprocessing of the published models of this kind, as arguments of ``ImageTransform``; empty for OpenAI's.

        Weights that state another one override it.
        """
        if self.vision.has_map:
            return _SIGLIP_IMAGES
        is_clipa = self.vision.pool_type == "avg" and self.vision.no_ln_pre
        return _CLIPA_IMAGES if is_clipa else {}

    @property
    def shapes(self) -> tuple[int, VisionConfig, TextConfig]:
        """What a name means, whatever the activation and the first scale and bias."""
        return self.embed_dim, self.vision, self.text

    @property
    def short_name(self) -> str:
        """The published name, whatever the vocabulary, or one of the same form: ViT-384x6-16-224 is 384 wide, 6 deep."""
        suffix = QUICK_GELU_SUFFIX if self.quick_gelu else ""
        for name, config in MODELS.items():
            if self.shapes == config.shapes:
                return name + suffix
        own = self.embed_dim, self.vision, self.text.shape
        for name, config in MODELS.items():
            if own == (config.embed_dim, config.vision, config.text.shape):
                return name + suffix
        vision = self.vision
        if isinstance(vision.layers, int):
            shape = f"ViT-{vision.width}x{vision.layers}-{vision.patch_size}"
        else:
            shape = f"RN-{vision.width}x{'.'.join(map(str, vision.layers))}"
        return f"{shape}-{vision.image_size}{suffix}"

    def describe(self) -> str:
        """Return the model in words: its published name, or its towers."""
        for name, config in MODELS.items():
            if config.shapes == self.shapes:
                return name
        vision, text = self.vision, self.text
        kind = "ResNet" if vision.is_resnet else f"ViT with patches of {vision.patch_size}"
        return (
            f"a {kind}, {vision.image_size} pixels, width {vision.width}, layers {vision.layers}; text of "
            f"{text.layers} layers, width {text.width}, {text.vocab_size} tokens; {self.embed_dim} features"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration in open_clip's JSON layout; fields that CLIP does not have, only if they say something.

        A tower with ``pool_type`` "map" has timm's name if timm has it. Others of its kind have this field, which only
        clipcore reads.
        """
        config: dict[str, Any] = {"embed_dim": self.embed_dim}
        if self.vision.has_map:
            config["custom_text"] = True
        config |= {"vision_cfg": _tower_dict(self.vision), "text_cfg": _tower_dict(self.text)}
        for name in ("quick_gelu", "init_logit_scale", "init_logit_bias"):
            if getattr(self, name) != _DEFAULTS[name]:
                config[name] = getattr(self, name)
        return config


# Fields that every description has, as those of older versions have them too: a run compares them when it is resumed.
_STATED = {
    *("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"),
    *("context_length", "vocab_size", "heads"),
}


def _tower_dict(tower: VisionConfig | TextConfig) -> dict[str, Any]:
    """Return a tower in open_clip's layout."""
    found = {
        field.name: getattr(tower, field.name)
        for field in dataclasses.fields(tower)
        if field.name in _STATED or getattr(tower, field.name) != field.default
    }
    if isinstance(tower, VisionConfig):
        if timm_name := _timm_name(tower):
            found = {"image_size": tower.image_size, "timm_model_name": timm_name, **TIMM_KEYS}
            return found | ({"patch_dropout": tower.patch_dropout} if tower.patch_dropout else {})
        if isinstance(tower.layers, tuple):
            found["layers"] = list(tower.layers)
    kwargs = {name: found.pop(name) for name in ("clean", "strip_sep_token") if name in found}
    if kwargs:
        found["tokenizer_kwargs"] = kwargs
    if "norm_eps" in found:
        found["norm_kwargs"] = {"eps": found.pop("norm_eps")}
    if found.pop("gelu_tanh", False):
        found["act_kwargs"] = {"approximate": "tanh"}
    return found


def _timm_name(vision: VisionConfig) -> str | None:
    """Return timm's name of an image tower of SigLIP; None if it has none."""
    plain = dataclasses.replace(vision, patch_dropout=0.0)
    return next(
        (name for name, tower in TIMM_TOWERS.items() if VisionConfig(**tower) == plain), None
    )


def _of_timm(given: dict[str, Any]) -> dict[str, Any]:
    """Return an image tower's keys with the fields that timm's name stands for; others without such a name as they are.

    Raises:
        ValueError: clipcore does not have the tower of that name, or another key contradicts the name.
    """
    name = given.get("timm_model_name")
    rest = {key: value for key, value in given.items() if not key.startswith("timm_")}
    if name is None:
        return rest
    if not isinstance(name, str) or name not in TIMM_TOWERS:
        raise ValueError(
            f"the model has {_shown('timm_model_name', name)}, which clipcore's towers do not have"
        )
    tower = TIMM_TOWERS[name]
    said = TIMM_KEYS | {"timm_proj_bias": False, "timm_drop": 0.0, "timm_drop_path": None} | tower
    size = given.get("image_size")
    given = given | {"image_size": size[0] if isinstance(size, list | tuple) and size else size}
    for key, value in given.items():
        if key in said and value is not None and value != said[key]:
            raise ValueError(
                f"{key} is {shortened(value)}, and the tower of timm_model_name {name} has {shortened(said[key])}"
            )
    return {**rest, **tower}


def _flatten(given: dict[str, Any], key: str, names: Mapping[str, str]) -> None:
    """Replace an object of open_clip's layout by the fields that hold its values.

    Args:
        names: the field of each key of the object.
    """
    inner = given.pop(key, None)
    if inner is None:
        return
    if not isinstance(inner, dict):
        raise ValueError(f"{key} is {shortened(inner)}, not an object")
    if unknown := inner.keys() - names.keys():
        raise ValueError(
            f"{key} has {', '.join(sorted(map(str, unknown)))}, which clipcore's towers do not have"
        )
    given |= {names[name]: value for name, value in inner.items()}


def _shown(key: str, value: object) -> str:
    """Return a key of a description for a message, with its value if that is a name."""
    return f"{key} {shortened(value)}" if isinstance(value, str) else key


def _without_absent(tower: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tower's keys without those that say that it lacks what clipcore's towers lack too."""
    absent = ABSENT[tower]
    left = {
        key: value
        for key, value in given.items()
        if key not in absent or type(value) is not type(absent[key]) or value != absent[key]
    }
    # What qualifies an absent part says nothing. Where the part is there, it is refused itself, or read with these keys.
    if "timm_model_name" in left:
        return left
    return {key: value for key, value in left.items() if key not in QUALIFYING[tower]}


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}


# The text tower of the small models: short sentences, small vocabularies.
_SMALL_TEXT = TextConfig(context_length=48, vocab_size=3072, width=96, heads=3, layers=1)
_NANO_TEXT = TextConfig(vocab_size=514, width=32, heads=2, layers=2)

MODELS: dict[str, ModelConfig] = {
    **{name: ModelConfig.from_dict(content) for name, content in OPEN_CLIP_MODELS.items()},
    # For small machines: the embedded data train in minutes, tests run in seconds.
    "ViT-glyphs": ModelConfig(
        128,
        VisionConfig(image_size=32, layers=4, width=128, patch_size=16, head_width=32),
        _SMALL_TEXT,
    ),
    "ViT-nano-8-32": ModelConfig(
        32,
        VisionConfig(image_size=32, layers=2, width=32, patch_size=8, head_width=16),
        _NANO_TEXT,
    ),
    "RN-nano-32": ModelConfig(
        32,
        VisionConfig(image_size=32, layers=(1, 1, 1, 1), width=8, patch_size=None, head_width=32),
        _NANO_TEXT,
    ),
}

# The names in OpenAI's own package that differ from open_clip's. Its weights were trained with QuickGELU.
_OPENAI_SPELLINGS = {
    "ViT-B/32": "ViT-B-32",
    "ViT-B/16": "ViT-B-16",
    "ViT-L/14": "ViT-L-14",
    "ViT-L/14@336px": "ViT-L-14-336",
}
# All models whose weights OpenAI published.
OPENAI_MODELS = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", *_OPENAI_SPELLINGS.values())
# Every name of OpenAI's models, with QuickGELU: its own spelling; any spelling behind "openai/", since a ResNet's name is
# the same in both packages; and transformers' name.
OPENAI_NAMES: dict[str, str] = {
    **_OPENAI_SPELLINGS,
    **{f"openai/{name}": name for name in OPENAI_MODELS},
    **{f"openai/{theirs}": ours for theirs, ours in _OPENAI_SPELLINGS.items()},
    "openai/clip-vit-base-patch32": "ViT-B-32",
    "openai/clip-vit-base-patch16": "ViT-B-16",
    "openai/clip-vit-large-patch14": "ViT-L-14",
    "openai/clip-vit-large-patch14-336": "ViT-L-14-336",
}
QUICK_GELU_SUFFIX, MODEL_SUFFIX = "-quickgelu", ".json"
# A run's own description of a model that a file described.
MODEL_FILE = "model.json"


# Models of ``add_model_config``, and why others of its files are none.
_ADDED: dict[str, ModelConfig] = {}
_REFUSED: dict[str, str] = {}
_MAX_CONFIG_BYTES = 1 << 20
_NEEDED = ("embed_dim", "vision_cfg", "text_cfg")


def add_model_config(path: str | os.PathLike[str]) -> None:
    """Make descriptions of models known by the names of their files, as open_clip's function does.

    Args:
        path: a JSON file in open_clip's layout, or a folder of such files. In a folder, files without a model's keys are
            left out, and a warning names the models that clipcore's towers cannot be.

    Raises:
        ValueError: it is not a model that clipcore has, or its name is that of another built-in model; or none of a folder.
        OSError: it cannot be read.
    """
    path = Path(path)
    is_single = not path.is_dir()
    files = [path] if is_single else sorted(path.glob("*.json"))
    num_added, refused = 0, {}
    for file in files:
        content = _read_config(file)
        if not is_single and not all(
            isinstance(content, dict) and key in content for key in _NEEDED
        ):
            continue
        try:
            config = ModelConfig.from_dict(content)
            built_in = _built_in(file.stem)
            if built_in not in (None, config):
                raise ValueError("clipcore has another model of this name: rename the file")
        except ValueError as error:
            refused[file.stem] = f"{file}: {error}"
            continue
        if built_in is None:
            _ADDED[file.stem] = config
        _REFUSED.pop(file.stem, None)
        num_added += 1

    if not num_added:
        reason = next(
            iter(refused.values()), f"{path} holds no description of a model, a JSON file"
        )
        raise ValueError(reason)
    _REFUSED.update(refused)
    if refused:
        warnings.warn(
            f"clipcore does not have {len(refused)} of the models in {path}, such as {next(iter(refused))}; create_model "
            "says why",
            stacklevel=2,
        )


def is_model_file(name: str) -> bool:
    """Return whether a model is named by a file that describes it, and not by a name."""
    return name.endswith(MODEL_SUFFIX)


def described_in(run_dir: Path, model: Any) -> Any:
    """Return the model of a run's settings: of one that a file described, the description in the run's folder."""
    own = run_dir / MODEL_FILE
    is_described = isinstance(model, str) and is_model_file(model) and is_file(own)
    return str(own) if is_described else model


def _model_in(file: Path) -> ModelConfig:
    """Return the model that a JSON file in open_clip's layout describes; raise ValueError as ``find_model`` does."""
    try:
        content = _read_config(file)
    except OSError as error:
        raise UnknownModelError(
            f"cannot read the description of a model {file}: {error.strerror or error}"
        ) from error
    if isinstance(content, dict) and "model_cfg" in content:
        raise ValueError(
            f"{file} describes the weights beside it: name its folder, local-dir:{file.parent}, or put its model_cfg into a "
            "file of its own"
        )
    try:
        return ModelConfig.from_dict(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _read_config(file: Path) -> Any:
    try:
        return json.loads(read_regular(file, _MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def _built_in(name: str) -> ModelConfig | None:
    """Return a model of the table above, with QuickGELU if its name says so; None for other names."""
    base = name.removesuffix(QUICK_GELU_SUFFIX)
    if base not in MODELS or (name != base and not MODELS[base].can_have_quick_gelu):
        return None
    return dataclasses.replace(MODELS[base], quick_gelu=name != base)


def list_models() -> list[str]:
    """Return every model name that ``create_model`` knows, in open_clip's spelling, including ``-quickgelu`` names."""
    quick = (n + QUICK_GELU_SUFFIX for n, config in MODELS.items() if config.can_have_quick_gelu)
    return sorted({*MODELS, *quick, *_ADDED})


def list_openai_models() -> list[str]:
    """Return the models whose weights OpenAI published, in open_clip's spelling, by both of their names."""
    return [*OPENAI_MODELS, *(name + QUICK_GELU_SUFFIX for name in OPENAI_MODELS)]


def available_models() -> list[str]:
    """Return the models whose weights OpenAI published, in the spelling of its package."""
    theirs = {ours: name for name, ours in _OPENAI_SPELLINGS.items()}
    return [theirs.get(name, name) for name in OPENAI_MODELS]


def find_model(name: str) -> ModelConfig:
    """Return the shape of a model.

    Args:
        name: as in open_clip (``ViT-B-32`` has GELU, ``ViT-B-32-quickgelu`` has QuickGELU), as in OpenAI's package
            (``ViT-B/32``, or ``openai/RN50`` where the name alone is open_clip's; QuickGELU), as in transformers
            (``openai/clip-vit-base-patch32``), or the path of a JSON file in open_clip's layout, which ends in ``.json``.

    Raises:
        UnknownModelError: the name is unknown; the message lists the nearest ones. Or there is no such file.
        ValueError: the file is not JSON, or describes a model that clipcore's towers cannot be.
    """
    if not isinstance(name, str):
        raise UnknownModelError(
            f"a model's name is a string, got {name!r}; create_model_from_pretrained(None, path) reads it off the weights"
        )
    if is_model_file(name):
        return _model_in(Path(name))
    if name in OPENAI_NAMES:
        return dataclasses.replace(MODELS[OPENAI_NAMES[name]], quick_gelu=True)
    if name in _ADDED:
        return _ADDED[name]
    if (config := _built_in(name)) is None:
        if name in _REFUSED:
            raise UnknownModelError(_REFUSED[name])
        known = [*list_models(), *OPENAI_NAMES]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "see clipcore.list_models()"
        raise UnknownModelError(f"unknown model {name!r}; {hint}")
    return config


def get_model_config(name: str) -> dict[str, Any]:
    """Return the shape of a model as a dict in open_clip's JSON layout; raise UnknownModelError for an unknown name."""
    return find_model(name).to_dict()
