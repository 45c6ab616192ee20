"""State dicts of the field's packages, read and written under one set of names: open_clip's, which are OpenAI's.

The layouts are those of OpenAI's ``CLIP``, open_clip's ``CLIP`` and ``CustomTextCLIP``, and transformers' ``CLIPModel``
with its ``CLIPConfig``. No number changes on the way: conversions rename, cut and transpose.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipcore.architectures import MODELS, ModelConfig, TextConfig, VisionConfig

TEXT_PARTS = (
    "text_projection",
    "positional_embedding",
    "token_embedding.",
    "transformer.",
    "ln_final.",
)

# (ours, transformers'), outside the blocks.
_HF_NAMES = (
    ("logit_scale", "logit_scale"),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.weight", "text_model.final_layer_norm.weight"),
    ("ln_final.bias", "text_model.final_layer_norm.bias"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.weight", "vision_model.pre_layrnorm.weight"),
    ("visual.ln_pre.bias", "vision_model.pre_layrnorm.bias"),
    ("visual.ln_post.weight", "vision_model.post_layernorm.weight"),
    ("visual.ln_post.bias", "vision_model.post_layernorm.bias"),
)
# Stored transposed there.
_HF_PROJECTIONS = (
    ("text_projection", "text_projection.weight"),
    ("visual.proj", "visual_projection.weight"),
)
_HF_TOWERS = (
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
)
_HF_BLOCK = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)


class ConversionError(ValueError):
    """A state dict that is no CLIP of a known layout."""


def to_open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under open_clip's ``CLIP`` names, whichever of the known layouts they come in.

    Raises:
        ConversionError: the keys belong to no known layout.
    """
    if any(key.startswith("text_model.") for key in state):
        return from_hf(state)
    found = {
        key.removeprefix("text.")
        if key.removeprefix("text.").startswith(TEXT_PARTS)
        else key: value
        for key, value in state.items()
    }
    if "logit_scale" not in found or "token_embedding.weight" not in found:
        first = ", ".join(list(state)[:3])
        raise ConversionError(
            f"the weights are no CLIP of OpenAI, open_clip or transformers (keys: {first}, ...)"
        )
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in found and found[scalar].ndim:
            found[scalar] = found[scalar].reshape(())
    return found


def from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' ``CLIPModel`` names to open_clip's; the position-id buffers of old files are left out.

    Raises:
        ConversionError: a key is missing.
    """
    try:
        found = {ours: state[theirs] for ours, theirs in _HF_NAMES}
        found |= {ours: state[theirs].T.contiguous() for ours, theirs in _HF_PROJECTIONS}
        for ours, theirs in _HF_TOWERS:
            for i in range(_num_blocks(state, theirs)):
                for kind in ("weight", "bias"):
                    for our_part, their_part in _HF_BLOCK:
                        found[f"{ours}{i}.{our_part}.{kind}"] = state[
                            f"{theirs}{i}.{their_part}.{kind}"
                        ]
                    packed = [state[f"{theirs}{i}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
                    found[f"{ours}{i}.attn.in_proj_{kind}"] = torch.cat(packed)
    except KeyError as error:
        raise ConversionError(
            f"the weights look like transformers' CLIPModel but lack {error}"
        ) from error
    return found


def to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names to transformers' ``CLIPModel``; Vision Transformers only.

    Raises:
        ConversionError: a ResNet, which transformers does not have.
    """
    if "visual.class_embedding" not in state:
        raise ConversionError("transformers has no form of CLIP's ResNets")
    found = {theirs: state[ours] for ours, theirs in _HF_NAMES}
    found |= {theirs: state[ours].T.contiguous() for ours, theirs in _HF_PROJECTIONS}
    for ours, theirs in _HF_TOWERS:
        for i in range(_num_blocks(state, ours)):
            for kind in ("weight", "bias"):
                for our_part, their_part in _HF_BLOCK:
                    found[f"{theirs}{i}.{their_part}.{kind}"] = state[
                        f"{ours}{i}.{our_part}.{kind}"
                    ]
                parts = state[f"{ours}{i}.attn.in_proj_{kind}"].chunk(3)
                for letter, part in zip("qkv", parts, strict=True):
                    found[f"{theirs}{i}.self_attn.{letter}_proj.{kind}"] = part.clone()
    return found


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of transformers' ``CLIPConfig`` for a model."""
    vision, text = config.vision, config.text
    activation = "quick_gelu" if config.quick_gelu else "gelu"
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "text_config": {
            "hidden_size": text.width,
            "intermediate_size": int(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "projection_dim": config.embed_dim,
            "hidden_act": activation,
            "bos_token_id": text.vocab_size - 2,
            "eos_token_id": text.vocab_size - 1,
            "pad_token_id": 1,
        },
        "vision_config": {
            "hidden_size": vision.width,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "projection_dim": config.embed_dim,
            "hidden_act": activation,
        },
    }


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json of transformers' ``CLIPConfig``; what a file leaves out has transformers' default.

    Raises:
        ConversionError: the file is not of a CLIP, or has an activation that CLIP does not.
    """
    if config.get("model_type") != "clip":
        raise ConversionError(
            f"the config.json is of a {config.get('model_type')!r}, not of a clip"
        )
    # Files of old versions repeat the towers in ..._config_dict, where those were given explicitly.
    vision = {**config.get("vision_config", {}), **(config.get("vision_config_dict") or {})}
    text = {**config.get("text_config", {}), **(config.get("text_config_dict") or {})}
    activations = {tower.get("hidden_act", "quick_gelu") for tower in (vision, text)}
    if activations not in ({"quick_gelu"}, {"gelu"}):
        raise ConversionError(f"the towers have {activations}; clipcore's have quick_gelu or gelu")
    width, text_width = vision.get("hidden_size", 768), text.get("hidden_size", 512)
    return ModelConfig(
        embed_dim=config.get("projection_dim", 512),
        vision=VisionConfig(
            image_size=vision.get("image_size", 224),
            layers=vision.get("num_hidden_layers", 12),
            width=width,
            patch_size=vision.get("patch_size", 32),
            head_width=width // vision.get("num_attention_heads", 12),
            mlp_ratio=vision.get("intermediate_size", 3072) / width,
        ),
        text=TextConfig(
            context_length=text.get("max_position_embeddings", 77),
            vocab_size=text.get("vocab_size", 49408),
            width=text_width,
            heads=text.get("num_attention_heads", 8),
            layers=text.get("num_hidden_layers", 12),
            mlp_ratio=text.get("intermediate_size", 2048) / text_width,
        ),
        quick_gelu=activations == {"quick_gelu"},
    )


def folder_config(path: Path) -> tuple[ModelConfig, dict[str, Any]] | None:
    """The model that a folder's own description names, with the mean and std of its images where it has them.

    Reads open_clip's open_clip_config.json, or the config.json of transformers with its preprocessor_config.json.

    Returns:
        None where the folder has no such file, or is none.

    Raises:
        ValueError: the description is of a model that clipcore does not have.
    """
    if content := _read_json(path / "open_clip_config.json"):
        images = content.get("preprocess_cfg", {})
        given = {key: images[key] for key in ("mean", "std") if key in images}
        return ModelConfig.from_dict(content.get("model_cfg", {})), given
    content = _read_json(path / "config.json")
    # The folder of a run has a config.json too, of its settings.
    if "model_type" not in content:
        return None
    images = _read_json(path / "preprocessor_config.json")
    given = {key: images[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in images}
    return config_from_hf(content), given


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds no description of a model")
    return content


def infer_config(state: Mapping[str, Tensor], quick_gelu: bool = False) -> ModelConfig:
    """The architecture that a state dict under open_clip's names has, read off its shapes.

    Heads leave no trace in the shapes: a tower of a known width and depth has the known heads, others have heads of 64.
    Nor does the activation: OpenAI's weights have ``quick_gelu``.

    Raises:
        ConversionError: the shapes are no CLIP's.
    """
    try:
        embed_dim = state["text_projection"].shape[1]
        vision, text = _infer_vision(state), _infer_text(state)
    except KeyError as error:
        raise ConversionError(
            f"the weights have no {error}: not a CLIP of OpenAI or open_clip"
        ) from error
    for known in MODELS.values():
        if (known.vision.width, known.vision.layers) == (vision.width, vision.layers):
            vision = dataclasses.replace(vision, head_width=known.vision.head_width)
        if (known.text.width, known.text.layers) == (text.width, text.layers):
            text = dataclasses.replace(text, heads=known.text.heads)
    bias = float(state["logit_bias"]) if "logit_bias" in state else None
    return ModelConfig(embed_dim, vision, text, quick_gelu, init_logit_bias=bias)


def _infer_text(state: Mapping[str, Tensor]) -> TextConfig:
    width = state["ln_final.weight"].shape[0]
    return TextConfig(
        context_length=state["positional_embedding"].shape[0],
        vocab_size=state["token_embedding.weight"].shape[0],
        width=width,
        heads=max(1, width // 64),
        layers=_num_blocks(state, "transformer.resblocks."),
        mlp_ratio=state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
    )


def _infer_vision(state: Mapping[str, Tensor]) -> VisionConfig:
    if "visual.proj" in state:
        width, _, _, patch = state["visual.conv1.weight"].shape
        grid = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
        fc = state["visual.transformer.resblocks.0.mlp.c_fc.weight"]
        layers = _num_blocks(state, "visual.transformer.resblocks.")
        return VisionConfig(grid * patch, layers, width, patch, mlp_ratio=fc.shape[0] / width)
    stages = tuple(_num_blocks(state, f"visual.layer{i}.") for i in range(1, 5))
    width = state["visual.layer1.0.conv1.weight"].shape[0]
    grid = math.isqrt(state["visual.attnpool.positional_embedding"].shape[0] - 1)
    assert len(stages) == 4
    return VisionConfig(32 * grid, stages, width, None)


def _num_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match.group(1) for key in state if (match := pattern.match(key))})
