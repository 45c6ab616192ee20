"""Converts the state dicts of other packages to and from one set of names: open_clip's, which are OpenAI's.

The layouts are those of OpenAI's ``CLIP``, open_clip's ``CLIP`` and ``CustomTextCLIP``, and transformers' ``CLIPModel``.
Conversions rename, split and transpose tensors; no number changes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from clipcore.terminal import first_line, printable
from clipcore.towers.architectures import MODELS, ModelConfig, TextConfig, VisionConfig

TEXT_PARTS = (
    "text_projection",
    "positional_embedding",
    "token_embedding.",
    "transformer.",
    "ln_final.",
)

# (our name, transformers' name), outside the blocks.
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
# Transformers stores these transposed.
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
    """The state dict is not a CLIP in a known layout."""


def to_open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same weights under open_clip's ``CLIP`` names, from any known layout.

    Raises:
        ConversionError: the keys belong to no known layout.
    """
    if any(key.startswith("text_model.") for key in state):
        return from_hf(state)
    found = without_text_prefix(state)
    if "logit_scale" not in found or "token_embedding.weight" not in found:
        first = ", ".join(list(state)[:3])
        raise ConversionError(
            f"the weights are not a CLIP of OpenAI, open_clip or transformers (keys: {first}, ...)"
        )
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in found and found[scalar].numel() != 1:
            raise ConversionError(
                f"the weights' {scalar} is {list(found[scalar].shape)}, where a CLIP has one number"
            )
        if scalar in found and found[scalar].ndim:
            found[scalar] = found[scalar].reshape(())
    return found


def without_text_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with the names of the text tower's parts as in ``CLIP``, without ``CustomTextCLIP``'s prefix."""
    return {
        key.removeprefix("text.")
        if key.removeprefix("text.").startswith(TEXT_PARTS)
        else key: value
        for key, value in state.items()
    }


def from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert transformers' ``CLIPModel`` names to open_clip's; position-id buffers of old files are dropped.

    Raises:
        ConversionError: a key is missing, or there is one that no CLIP has and that cannot be ignored.
    """
    left = {name: value for name, value in state.items() if not name.endswith(".position_ids")}
    try:
        found = {ours: left.pop(theirs) for ours, theirs in _HF_NAMES}
        found |= {ours: left.pop(theirs).T.contiguous() for ours, theirs in _HF_PROJECTIONS}
        for ours, theirs in _HF_TOWERS:
            for i in range(_num_blocks(state, theirs)):
                for kind in ("weight", "bias"):
                    for our_part, their_part in _HF_BLOCK:
                        theirs_name = f"{theirs}{i}.{their_part}.{kind}"
                        found[f"{ours}{i}.{our_part}.{kind}"] = left.pop(theirs_name)
                    packed = [left.pop(f"{theirs}{i}.self_attn.{p}_proj.{kind}") for p in "qkv"]
                    found[f"{ours}{i}.attn.in_proj_{kind}"] = torch.cat(packed)
    except KeyError as error:
        raise ConversionError(
            f"the weights look like transformers' CLIPModel but lack {error}"
        ) from error
    except RuntimeError as error:
        raise ConversionError(
            f"the weights have names of transformers' CLIPModel, but other shapes: {first_line(error)}"
        ) from error
    if left:
        raise ConversionError(
            f"the weights look like transformers' CLIPModel, which has no {printable(min(left))}; merge an adapter into the "
            "weights, and take out what belongs to another head"
        )
    return found


def to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert open_clip's names to transformers' ``CLIPModel``; Vision Transformers only.

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


def infer_config(state: Mapping[str, Tensor], quick_gelu: bool = False) -> ModelConfig:
    """Return the architecture of a state dict under open_clip's names, inferred from its shapes.

    The shapes do not show the number of heads: a tower of a known width and depth gets the known heads, others get heads
    of 64. Nor do they show the activation: OpenAI's weights have ``quick_gelu``.

    Raises:
        ConversionError: the shapes are not those of a CLIP.
    """
    bias = float(state["logit_bias"]) if "logit_bias" in state else None
    if bias is not None and not math.isfinite(bias):
        raise ConversionError(f"the weights' logit_bias is {bias}")
    try:
        embed_dim = state["text_projection"].shape[1]
        vision, text = _infer_vision(state), _infer_text(state)
        for known in MODELS.values():
            if (known.vision.width, known.vision.layers) == (vision.width, vision.layers):
                vision = dataclasses.replace(vision, head_width=known.vision.head_width)
            if (known.text.width, known.text.layers) == (text.width, text.layers):
                text = dataclasses.replace(text, heads=known.text.heads)
        return ModelConfig(embed_dim, vision, text, quick_gelu, init_logit_bias=bias)
    except KeyError as error:
        raise ConversionError(
            f"the weights have no {error}: not a CLIP of OpenAI or open_clip"
        ) from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ConversionError("the weights have names of a CLIP, but other shapes") from error


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
