"""Reads the model descriptions beside weights: open_clip's open_clip_config.json and transformers' config.json.

Every key of such a file is either applied or refused, because an ignored key could make the features slightly wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcore.data.transforms import INTERPOLATIONS, RESIZE_MODES
from clipcore.files import read_regular
from clipcore.towers.architectures import (
    DEFAULT_EPS,
    MAX_SIZE,
    ModelConfig,
    TextConfig,
    VisionConfig,
    is_finite_number,
    shortened,
)
from clipcore.towers.convert import ConversionError
from clipcore.towers.open_clip_models import SIGLIP_TEXT

_MAX_BYTES = 1 << 22
OPEN_CLIP_FILE, HF_FILE = "open_clip_config.json", "config.json"
# Transformers 4 writes the first one; version 5 keeps the same object under "image_processor" in the other.
HF_IMAGES_FILE, HF_PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
# A vocabulary of CLIP's kind, in transformers' files.
HF_MERGES_FILE = "merges.txt"


@dataclass(frozen=True)
class Description:
    """The description of a model in a file.

    Attributes:
        config: its architecture.
        images: its preprocessing, as arguments of ``ImageTransform``: ``mean``, ``std``, ``resize_mode``,
            ``interpolation`` and ``fill_color``, if the file states them.
        origin: the file.
    """

    config: ModelConfig
    images: dict[str, Any]
    origin: Path


def read_description(folder: Path) -> Description | None:
    """Return the description of the model whose weights are in a folder, None if there is none.

    Raises:
        ConversionError: the files are damaged, or describe a model or preprocessing that clipcore does not have.
    """
    path = folder / OPEN_CLIP_FILE
    if content := _read_json(path):
        described = _object(content.get("model_cfg", {}), path)
        _take_out_tokenizer(described, folder)
        try:
            config = ModelConfig.from_dict(described)
        except ValueError as error:
            raise ConversionError(f"{path}: {error}") from error
        images = _object(content.get("preprocess_cfg", {}), path)
        return Description(config, open_clip_images(images, config, path), path)

    path = folder / HF_FILE
    content = _read_json(path)
    # A run's folder has a config.json too, with its settings.
    if "model_type" not in content:
        return None
    try:
        config = config_from_hf(content)
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from error
    images_path = folder / HF_IMAGES_FILE
    images = _read_json(images_path)
    if not images:
        images_path = folder / HF_PROCESSOR_FILE
        images = _object(_read_json(images_path).get("image_processor") or {}, images_path)
    return Description(config, hf_images(images, config, images_path), path)


def _take_out_tokenizer(described: dict[str, Any], folder: Path) -> None:
    """Take a tokenizer's name out of a description whose vocabulary is in the folder; another is left, and refused."""
    text = described.get("text_cfg")
    if isinstance(text, dict) and (folder / HF_MERGES_FILE).is_file():
        text.pop("hf_tokenizer_name", None)


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file, or an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_regular(path, _MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error
    return _object(content, path)


def _object(content: object, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds no description of a model")
    return content


# --- Architectures ---


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of transformers' ``CLIPConfig`` for a model, or of ``SiglipConfig`` for a SigLIP."""
    vision, text = config.vision, config.text
    described = {
        "text_config": {
            **_hf_sizes(text, config.quick_gelu),
            "num_attention_heads": text.heads,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
        },
        "vision_config": {
            **_hf_sizes(vision, config.quick_gelu),
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
    }
    if vision.has_map:
        described["text_config"]["projection_size"] = config.embed_dim
        return {"architectures": ["SiglipModel"], "model_type": "siglip", **described}
    described["text_config"] |= {
        "projection_dim": config.embed_dim,
        "bos_token_id": text.vocab_size - 2,
        "eos_token_id": text.vocab_size - 1,
        "pad_token_id": 1,
    }
    described["vision_config"]["projection_dim"] = config.embed_dim
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        **described,
    }


_HF_ACTIVATIONS = {
    (True, False): "quick_gelu",
    (False, False): "gelu",
    (False, True): "gelu_pytorch_tanh",
}


def _hf_sizes(tower: VisionConfig | TextConfig, quick_gelu: bool) -> dict[str, Any]:
    """Return the keys that the towers of both kinds of models share."""
    sizes = {
        "hidden_size": tower.width,
        "intermediate_size": int(tower.width * tower.mlp_ratio),
        "num_hidden_layers": tower.layers,
        "hidden_act": _HF_ACTIVATIONS[quick_gelu, tower.gelu_tanh],
    }
    return sizes if tower.norm_eps == DEFAULT_EPS else {**sizes, "layer_norm_eps": tower.norm_eps}


# A caption's feature is at its largest id: published files name that id, or 2 as old versions did.
_OLD_HF_END_ID = 2


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Return the model described by transformers' ``CLIPConfig`` or ``SiglipConfig`` config.json.

    A missing key has transformers' default.

    Raises:
        ConversionError: the file does not describe a CLIP, or has a value that clipcore's towers do not support.
    """
    kind = config.get("model_type")
    if kind not in ("clip", "siglip"):
        why = ", whose images have no fixed size" if kind == "siglip2" else ""
        raise ConversionError(f"the config.json is of a {kind!r}{why}, not of a clip or siglip")
    vision, text = _hf_tower(config, "vision_config"), _hf_tower(config, "text_config")
    for tower in (vision, text):
        if tower.get("num_channels") not in (None, 3):
            raise ConversionError(
                f"num_channels is {tower['num_channels']!r}; clipcore's towers have 3"
            )
    return (
        _siglip_from_hf(vision, text) if kind == "siglip" else _clip_from_hf(config, vision, text)
    )


def _clip_from_hf(
    config: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]
) -> ModelConfig:
    activations = {str(tower.get("hidden_act", "quick_gelu")) for tower in (vision, text)}
    if activations not in ({"quick_gelu"}, {"gelu"}):
        found = " and ".join(sorted(activations))
        raise ConversionError(f"the towers have {found}; clipcore's have quick_gelu or gelu")
    vocab_size = _whole(text, "vocab_size", 49408)
    end_id = text.get("eos_token_id")
    if end_id not in (None, vocab_size - 1, _OLD_HF_END_ID):
        raise ConversionError(
            f"eos_token_id is {end_id!r}; clipcore reads a caption's feature at its largest id, {vocab_size - 1}"
        )
    return ModelConfig(
        embed_dim=_whole(config, "projection_dim", 512),
        vision=VisionConfig(
            **_hf_image_sizes(vision, patch_size=32),
            norm_eps=vision.get("layer_norm_eps", DEFAULT_EPS),
        ),
        text=TextConfig(
            **_hf_text_sizes(text, context_length=77, width=512, heads=8, hidden=2048),
            vocab_size=vocab_size,
            norm_eps=text.get("layer_norm_eps", DEFAULT_EPS),
        ),
        quick_gelu=activations == {"quick_gelu"},
    )


# Of SigLIP 2's models.
_GEMMA_VOCAB_SIZE = 256000


def _siglip_from_hf(vision: Mapping[str, Any], text: Mapping[str, Any]) -> ModelConfig:
    if vision.get("vision_use_head") not in (None, True):
        raise ConversionError("vision_use_head is false; clipcore's SigLIP has its head")
    kinds = [
        {
            "norm_eps": tower.get("layer_norm_eps", 1e-6),
            "gelu_tanh": _is_tanh(tower.get("hidden_act", "gelu_pytorch_tanh")),
        }
        for tower in (vision, text)
    ]
    image = VisionConfig(**_hf_image_sizes(vision, patch_size=16), pool_type="map", **kinds[0])
    width = _whole(text, "hidden_size", 768)
    if (size := _whole(text, "projection_size", width)) != image.width:
        raise ConversionError(
            f"the text tower has {size} features and the image tower {image.width}; a SigLIP's are as many"
        )
    vocab_size = _whole(text, "vocab_size", 32000)
    tower = TextConfig(
        **_hf_text_sizes(text, context_length=64, width=768, heads=12, hidden=3072),
        vocab_size=vocab_size,
        **SIGLIP_TEXT,
        proj_bias=True,
        # As transformers' tokenizers do: SigLIP's drops punctuation, SigLIP 2's only lowers the case.
        clean="lower" if vocab_size == _GEMMA_VOCAB_SIZE else "canonicalize",
        **kinds[1],
    )
    # transformers' model has no first values of its own.
    return ModelConfig(image.width, image, tower, init_logit_bias=-10)


def _is_tanh(activation: object) -> bool:
    if activation not in ("gelu_pytorch_tanh", "gelu"):
        raise ConversionError(
            f"the towers have {shortened(activation)}; clipcore's SigLIP has gelu_pytorch_tanh or gelu"
        )
    return activation == "gelu_pytorch_tanh"


def _hf_image_sizes(vision: Mapping[str, Any], patch_size: int) -> dict[str, Any]:
    """Return the sizes of an image tower as fields; a missing key has transformers' default."""
    width = _whole(vision, "hidden_size", 768)
    return {
        "image_size": _whole(vision, "image_size", 224),
        "layers": _whole(vision, "num_hidden_layers", 12),
        "width": width,
        "patch_size": _whole(vision, "patch_size", patch_size),
        "head_width": width // _whole(vision, "num_attention_heads", 12),
        "mlp_ratio": _whole(vision, "intermediate_size", 3072) / width,
    }


def _hf_text_sizes(
    text: Mapping[str, Any], context_length: int, width: int, heads: int, hidden: int
) -> dict[str, Any]:
    """Return the sizes of a text tower as fields; the arguments are transformers' defaults."""
    own_width = _whole(text, "hidden_size", width)
    return {
        "context_length": _whole(text, "max_position_embeddings", context_length),
        "width": own_width,
        "heads": _whole(text, "num_attention_heads", heads),
        "layers": _whole(text, "num_hidden_layers", 12),
        "mlp_ratio": _whole(text, "intermediate_size", hidden) / own_width,
    }


def _hf_tower(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    # Files of old versions repeat explicitly given towers in ..._config_dict.
    tower: dict[str, Any] = {}
    for key in (name, f"{name}_dict"):
        given = config.get(key) or {}
        if not isinstance(given, dict):
            raise ConversionError(f"{key} is not an object")
        tower |= given
    return tower


def _whole(values: Mapping[str, Any], key: str, default: int) -> int:
    """Return a size, or the default if it is missing."""
    value = values.get(key, default)
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        raise ConversionError(
            f"{key} is {shortened(value)}, not a whole number from 1 to {MAX_SIZE:,}"
        )
    return value


# --- Images ---

# Keys of open_clip and of runs that become arguments as they are, with their values.
_STATED: dict[str, tuple[Any, ...]] = {
    "interpolation": INTERPOLATIONS,
    "resize_mode": RESIZE_MODES,
}
# transformers' numbers, which are Pillow's.
_HF_BILINEAR, _HF_BICUBIC = 2, 3


def open_clip_images(
    images: Mapping[str, Any], config: ModelConfig, origin: Path
) -> dict[str, Any]:
    """Return open_clip's ``preprocess_cfg`` as arguments of ``ImageTransform``.

    Raises:
        ConversionError: clipcore's preprocessing does not support a key's value; the message names the key.
    """
    size = config.vision.image_size
    allowed: dict[str, tuple[Any, ...]] = {
        "size": (size, [size, size]),
        "mode": ("RGB",),
        **_STATED,
    }
    _refuse_others(images, allowed, {"mean", "std", "fill_color"}, origin)
    return _arguments(images, origin)


def hf_images(images: Mapping[str, Any], config: ModelConfig, origin: Path) -> dict[str, Any]:
    """Return transformers' ``CLIPImageProcessor`` as arguments of ``ImageTransform``.

    Raises:
        ConversionError: see ``open_clip_images``.
    """
    size = config.vision.image_size
    square = {"height": size, "width": size}
    is_squashed = images.get("size") == square
    allowed: dict[str, tuple[Any, ...]] = {
        "do_resize": (True,),
        "size": (size, {"shortest_edge": size}, square),
        "resample": (_HF_BICUBIC, _HF_BILINEAR),
        "do_center_crop": (True, False) if is_squashed else (True,),
        "crop_size": (size, square),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "do_convert_rgb": (True,),
    }
    factor = images.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ConversionError(
            f"{origin}: rescale_factor is {factor!r}; clipcore's images have 1/255"
        )
    _refuse_others(images, allowed, None, origin)
    given = _normalization(images, "image_mean", "image_std", origin)
    if images.get("resample") == _HF_BILINEAR:
        given["interpolation"] = "bilinear"
    return {**given, "resize_mode": "squash"} if is_squashed else given


def recorded_images(identity: Mapping[str, Any], origin: Path) -> dict[str, Any]:
    """Return the preprocessing that a run recorded, as arguments of ``ImageTransform``; empty if it recorded none.

    Args:
        identity: the identity in the run's record.
        origin: the checkpoint, for messages.

    Raises:
        ConversionError: see ``open_clip_images``.
    """
    images = _object(identity.get("images", {}), origin)
    _refuse_others(images, _STATED, {"mean", "std", "fill_color"}, origin)
    return _arguments(images, origin)


def _arguments(images: Mapping[str, Any], origin: Path) -> dict[str, Any]:
    """Return the arguments of ``ImageTransform`` that are stated, by their names."""
    given = _normalization(images, "mean", "std", origin)
    given |= {key: images[key] for key in _STATED if key in images}
    if "fill_color" in images:
        color = images["fill_color"]
        if type(color) is not int or not 0 <= color <= 255:
            raise ConversionError(
                f"{origin}: fill_color is {shortened(color)}; clipcore's preprocessing has a whole number from 0 to 255"
            )
        given["fill_color"] = color
    return given


def _refuse_others(
    images: Mapping[str, Any],
    allowed: Mapping[str, tuple[Any, ...]],
    more: set[str] | None,
    origin: Path,
) -> None:
    """Raise ConversionError for a value that is not allowed, and for a key that is neither allowed nor in ``more``.

    Args:
        more: other accepted keys; None accepts all, for files that hold every attribute of a class.
    """
    for key, value in images.items():
        if key in allowed:
            if not any(type(value) is type(a) and value == a for a in allowed[key]):
                *others, last = (json.dumps(a) for a in allowed[key])
                can = f"{', '.join(others)} or {last}" if others else last
                raise ConversionError(
                    f"{origin}: {key} is {json.dumps(value)}; clipcore's preprocessing has {can}"
                )
        elif more is not None and key not in more:
            raise ConversionError(
                f"{origin}: {key} is unknown to clipcore's preprocessing; remove the key if it changes nothing"
            )


def _normalization(
    images: Mapping[str, Any], mean_key: str, std_key: str, origin: Path
) -> dict[str, Any]:
    """Return ``mean`` and ``std`` of the three channels, if they are given."""
    given = {}
    for name, key in (("mean", mean_key), ("std", std_key)):
        if key not in images:
            continue
        values = images[key]
        is_three = isinstance(values, list) and len(values) == 3
        if not is_three or not all(
            is_finite_number(v) and (v > 0 or name == "mean") for v in values
        ):
            raise ConversionError(f"{origin}: {key} is {values!r}, not a number for each channel")
        given[name] = tuple(map(float, values))
    return given
