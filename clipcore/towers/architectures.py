"""The shapes of the models: published ones under open_clip's names, and small ones for small machines.

Sources: Radford et al. 2021, tables 19 and 20; open_clip's model_configs for ViT-H-14 and the ViT-S models.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcore.files import is_file, read_regular

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
# No tower larger than this was ever trained: a description with larger numbers is damaged or hostile.
_SHOWN_CHARS = 200  # of a value shown in a message
MAX_LAYERS, MAX_SIZE, MAX_GRID = 1024, 1 << 24, 1 << 12


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

    def __post_init__(self) -> None:
        _check_size("layers", self.layers, MAX_LAYERS)
        for name in ("context_length", "vocab_size", "width", "heads"):
            _check_size(name, getattr(self, name))
        _check_mlp(self.width, self.mlp_ratio)
        _check_heads(self.width, self.heads)


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
    "ls_init_value": None,
    "final_ln_after_pool": False,
    "output_tokens": False,
    "act_kwargs": None,
    "norm_kwargs": None,
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
        "no_ln_pre": False,
        "pos_embed_type": "learnable",
        "pool_type": "tok",
        "timm_model_name": None,
    },
    "text_cfg": {
        **_ABSENT_IN_BOTH,
        "embed_cls": False,
        "no_causal_mask": False,
        "pool_type": "argmax",
        "proj_bias": False,
        "proj_type": "linear",
        "hf_tokenizer_name": None,
        "tokenizer_mode": None,
        "tokenizer_kwargs": None,
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
    "text_cfg": {"pad_id", "eos_id", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"},
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
        if type(self.quick_gelu) is not bool:
            raise ValueError(f"quick_gelu is {shortened(self.quick_gelu)}, neither true nor false")
        _check_number("init_logit_scale", self.init_logit_scale)
        if self.init_logit_bias is not None:
            _check_number("init_logit_bias", self.init_logit_bias)

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
        vision = _without_absent("vision_cfg", config["vision_cfg"])
        text = _without_absent("text_cfg", config["text_cfg"])
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
                raise ValueError(
                    f"the model has {', '.join(sorted(unknown))}, which clipcore's towers do not have"
                )
        return cls(
            config["embed_dim"],
            VisionConfig(**vision),
            TextConfig(**text),
            config.get("quick_gelu", False),
            config.get("init_logit_scale", INITIAL_LOGIT_SCALE),
            config.get("init_logit_bias"),
        )

    @property
    def short_name(self) -> str:
        """The published name, whatever the vocabulary, or one of the same form: ViT-384x6-16-224 is 384 wide, 6 deep."""
        suffix = QUICK_GELU_SUFFIX if self.quick_gelu else ""
        for name, config in MODELS.items():
            text = dataclasses.replace(self.text, vocab_size=config.text.vocab_size)
            if ModelConfig(self.embed_dim, self.vision, text) == config:
                return name + suffix
        vision = self.vision
        if isinstance(vision.layers, int):
            shape = f"ViT-{vision.width}x{vision.layers}-{vision.patch_size}"
        else:
            shape = f"RN-{vision.width}x{'.'.join(map(str, vision.layers))}"
        return f"{shape}-{vision.image_size}{suffix}"

    def describe(self) -> str:
        """Return the model in words: its published name, or its towers."""
        plain = ModelConfig(self.embed_dim, self.vision, self.text)
        for name, config in MODELS.items():
            if config == plain:
                return name
        vision, text = self.vision, self.text
        kind = "ResNet" if vision.is_resnet else f"ViT with patches of {vision.patch_size}"
        return (
            f"a {kind}, {vision.image_size} pixels, width {vision.width}, layers {vision.layers}; text of "
            f"{text.layers} layers, width {text.width}, {text.vocab_size} tokens; {self.embed_dim} features"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration in open_clip's JSON layout."""
        vision = dataclasses.asdict(self.vision)
        if self.vision.is_resnet:
            vision["layers"] = list(vision["layers"])
        config = {
            "embed_dim": self.embed_dim,
            "vision_cfg": vision,
            "text_cfg": dataclasses.asdict(self.text),
        }
        for name in ("quick_gelu", "init_logit_scale", "init_logit_bias"):
            if getattr(self, name) != _DEFAULTS[name]:
                config[name] = getattr(self, name)
        return config


def _without_absent(tower: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tower's keys without those that say that it lacks what clipcore's towers lack too."""
    absent = ABSENT[tower]
    left = {
        key: value
        for key, value in given.items()
        if key not in absent or type(value) is not type(absent[key]) or value != absent[key]
    }
    # What qualifies an absent part says nothing. Where the part is there, it is refused itself.
    return {key: value for key, value in left.items() if key not in QUALIFYING[tower]}


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}


def _vit(
    embed_dim: int, layers: int, width: int, patch: int, text: TextConfig, **vision: Any
) -> ModelConfig:
    tower = VisionConfig(layers=layers, width=width, patch_size=patch, **vision)
    return ModelConfig(embed_dim, tower, text)


def _resnet(
    embed_dim: int, layers: tuple[int, int, int, int], width: int, image_size: int, text: TextConfig
) -> ModelConfig:
    tower = VisionConfig(image_size=image_size, layers=layers, width=width, patch_size=None)
    return ModelConfig(embed_dim, tower, text)


def _text(width: int, layers: int = 12) -> TextConfig:
    return TextConfig(width=width, heads=width // 64, layers=layers)


# The text tower of the small models: short sentences, small vocabularies.
_SMALL_TEXT = TextConfig(context_length=48, vocab_size=3072, width=96, heads=3, layers=1)

MODELS: dict[str, ModelConfig] = {
    "RN50": _resnet(1024, (3, 4, 6, 3), 64, 224, _text(512)),
    "RN101": _resnet(512, (3, 4, 23, 3), 64, 224, _text(512)),
    "RN50x4": _resnet(640, (4, 6, 10, 6), 80, 288, _text(640)),
    "RN50x16": _resnet(768, (6, 8, 18, 8), 96, 384, _text(768)),
    "RN50x64": _resnet(1024, (3, 15, 36, 10), 128, 448, _text(1024)),
    "ViT-S-32": _vit(384, 12, 384, 32, _text(384)),
    "ViT-S-16": _vit(384, 12, 384, 16, _text(384)),
    "ViT-B-32": _vit(512, 12, 768, 32, _text(512)),
    "ViT-B-16": _vit(512, 12, 768, 16, _text(512)),
    "ViT-L-14": _vit(768, 24, 1024, 14, _text(768)),
    "ViT-L-14-336": _vit(768, 24, 1024, 14, _text(768), image_size=336),
    "ViT-H-14": _vit(1024, 32, 1280, 14, _text(1024, layers=24), head_width=80),
    # For small machines: the embedded data train in minutes, tests run in seconds.
    "ViT-glyphs": _vit(128, 4, 128, 16, _SMALL_TEXT, image_size=32, head_width=32),
    "ViT-nano-8-32": _vit(
        32,
        2,
        32,
        8,
        TextConfig(vocab_size=514, width=32, heads=2, layers=2),
        image_size=32,
        head_width=16,
    ),
    "RN-nano-32": ModelConfig(
        32,
        VisionConfig(image_size=32, layers=(1, 1, 1, 1), width=8, patch_size=None, head_width=32),
        TextConfig(vocab_size=514, width=32, heads=2, layers=2),
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
    if base not in MODELS:
        return None
    return dataclasses.replace(MODELS[base], quick_gelu=name != base)


def list_models() -> list[str]:
    """Return every model name that ``create_model`` knows, in open_clip's spelling, including ``-quickgelu`` names."""
    return sorted({*MODELS, *(name + QUICK_GELU_SUFFIX for name in MODELS), *_ADDED})


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
