"""Converts the state dicts of other packages to and from one set of names: open_clip's, which are OpenAI's.

The layouts are those of OpenAI's ``CLIP``, open_clip's ``CLIP`` and ``CustomTextCLIP``, the latter also with SigLIP's image
towers of timm, and transformers' ``CLIPModel`` and ``SiglipModel``. Conversions rename, split and transpose tensors; no
number changes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipcore.terminal import first_line, printable
from clipcore.towers.architectures import (
    DEFAULT_EPS,
    MODELS,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from clipcore.towers.open_clip_models import SIGLIP_TEXT

TEXT_PARTS = (
    "text_projection",
    "positional_embedding",
    "token_embedding.",
    "transformer.",
    "ln_final.",
)

# (our name, transformers' name), outside the blocks, of both kinds of models.
_HF_NAMES = (
    ("logit_scale", "logit_scale"),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.weight", "text_model.final_layer_norm.weight"),
    ("ln_final.bias", "text_model.final_layer_norm.bias"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_post.weight", "vision_model.post_layernorm.weight"),
    ("visual.ln_post.bias", "vision_model.post_layernorm.bias"),
)
_HF_POOL, _POOL = "vision_model.head.", "visual.attn_pool."


class _HFModel(NamedTuple):
    """A model of transformers.

    Attributes:
        title: its class.
        names: (our name, transformers' name), outside the blocks.
        projections: the same, of matrices that transformers stores transposed.
    """

    title: str
    names: tuple[tuple[str, str], ...]
    projections: tuple[tuple[str, str], ...] = ()


_HF_CLIP = _HFModel(
    "CLIPModel",
    (
        *_HF_NAMES,
        ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
        ("visual.ln_pre.weight", "vision_model.pre_layrnorm.weight"),
        ("visual.ln_pre.bias", "vision_model.pre_layrnorm.bias"),
    ),
    (
        ("text_projection", "text_projection.weight"),
        ("visual.proj", "visual_projection.weight"),
    ),
)
_HF_SIGLIP = _HFModel(
    "SiglipModel",
    (
        *_HF_NAMES,
        ("logit_bias", "logit_bias"),
        ("text_projection.weight", "text_model.head.weight"),
        ("text_projection.bias", "text_model.head.bias"),
        ("visual.conv1.bias", "vision_model.embeddings.patch_embedding.bias"),
        (f"{_POOL}latent", f"{_HF_POOL}probe"),
        *(
            (f"{_POOL}{ours}.{kind}", f"{_HF_POOL}{theirs}.{kind}")
            for ours, theirs in (
                ("proj", "attention.out_proj"),
                ("norm", "layernorm"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            )
            for kind in ("weight", "bias")
        ),
    ),
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
# (our name, timm's name) of the parts of SigLIP's image tower, and of those of a block.
_TIMM = "visual.trunk."
_TIMM_PARTS = (
    ("conv1.", "patch_embed.proj."),
    ("positional_embedding", "pos_embed"),
    ("ln_post.", "norm."),
    ("attn_pool.", "attn_pool."),
    ("transformer.resblocks.", "blocks."),
)
_TIMM_BLOCK = (
    ("ln_1.", "norm1."),
    ("ln_2.", "norm2."),
    ("attn.in_proj_", "attn.qkv."),
    ("attn.out_proj.", "attn.proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
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
    found = without_timm_names(without_text_prefix(state))
    if "logit_scale" not in found or "token_embedding.weight" not in found:
        first = ", ".join(list(state)[:3])
        raise ConversionError(
            f"the weights are not a CLIP of OpenAI, open_clip or transformers (keys: {first}, ...)"
        )
    return _with_scalars(found)


def _with_scalars(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights whose scale and bias have no axis; raise ConversionError if they are more than one number."""
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in state and state[scalar].numel() != 1:
            raise ConversionError(
                f"the weights' {scalar} is {list(state[scalar].shape)}, where a CLIP has one number"
            )
        if scalar in state and state[scalar].ndim:
            state[scalar] = state[scalar].reshape(())
    return state


def without_text_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with the names of the text tower's parts as in ``CLIP``, without ``CustomTextCLIP``'s prefix."""
    return {
        key.removeprefix("text.")
        if key.removeprefix("text.").startswith(TEXT_PARTS)
        else key: value
        for key, value in state.items()
    }


def without_timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with the parts of SigLIP's image tower under the names of a Vision Transformer, not under timm's.

    Raises:
        ConversionError: they are of another tower of timm.
    """
    found = {}
    for key, value in state.items():
        if key.startswith(_TIMM):
            name = _renamed(
                key.removeprefix(_TIMM), *(_swapped(t) for t in (_TIMM_PARTS, _TIMM_BLOCK))
            )
            if name is None:
                raise ConversionError(
                    f"the weights have {printable(key)}, of an image tower of timm that clipcore does not have"
                )
            key = f"visual.{name}"
            if name == "positional_embedding" and value.ndim == 3 and len(value) == 1:
                value = value[0]
        found[key] = value
    return found


def to_custom_text(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a SigLIP's names to those of open_clip's ``CustomTextCLIP`` with an image tower of timm."""
    found = {}
    for key, value in state.items():
        if key.startswith("visual."):
            name = _renamed(key.removeprefix("visual."), _TIMM_PARTS, _TIMM_BLOCK)
            assert name is not None, key
            found[_TIMM + name] = value[None] if name == "pos_embed" else value
        else:
            found[f"text.{key}" if key.startswith(TEXT_PARTS) else key] = value
    return found


_Names = tuple[tuple[str, str], ...]


def _swapped(names: _Names) -> _Names:
    return tuple((theirs, ours) for ours, theirs in names)


def _renamed(name: str, parts: _Names, block: _Names) -> str | None:
    """Return a tensor's name in the other layout, None if no part of it is known.

    Args:
        parts: (beginning here, beginning there), of the tower.
        block: the same, behind the number of a block.
    """
    for here, there in parts:
        if not name.startswith(here):
            continue
        rest = name.removeprefix(here)
        number, _, inner = rest.partition(".")
        if not number.isdecimal():
            return there + rest
        for here_inner, there_inner in block:
            if inner.startswith(here_inner):
                return f"{there}{number}.{there_inner}{inner.removeprefix(here_inner)}"
    return None


def from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the names of transformers' ``CLIPModel`` or ``SiglipModel`` to open_clip's.

    Position-id buffers of old files are dropped.

    Raises:
        ConversionError: a key is missing, or there is one that no such model has and that cannot be ignored.
    """
    model = _HF_SIGLIP if f"{_HF_POOL}probe" in state else _HF_CLIP
    left = {name: value for name, value in state.items() if not name.endswith(".position_ids")}
    try:
        found = {ours: left.pop(theirs) for ours, theirs in model.names}
        found |= {ours: left.pop(theirs).T.contiguous() for ours, theirs in model.projections}
        if model is _HF_SIGLIP:
            for kind in ("weight", "bias"):
                packed = left.pop(f"{_HF_POOL}attention.in_proj_{kind}")
                width = len(packed) // 3
                found[f"{_POOL}q.{kind}"], found[f"{_POOL}kv.{kind}"] = packed.split(
                    [width, 2 * width]
                )
        for ours, theirs in _HF_TOWERS:
            for i in range(_num_blocks(state, theirs)):
                for kind in ("weight", "bias"):
                    for our_part, their_part in _HF_BLOCK:
                        theirs_name = f"{theirs}{i}.{their_part}.{kind}"
                        found[f"{ours}{i}.{our_part}.{kind}"] = left.pop(theirs_name)
                    parts = [left.pop(f"{theirs}{i}.self_attn.{p}_proj.{kind}") for p in "qkv"]
                    found[f"{ours}{i}.attn.in_proj_{kind}"] = torch.cat(parts)
    except KeyError as error:
        raise ConversionError(
            f"the weights look like transformers' {model.title} but lack {error}"
        ) from error
    except RuntimeError as error:
        raise ConversionError(
            f"the weights have names of transformers' {model.title}, but other shapes: {first_line(error)}"
        ) from error
    if left:
        raise ConversionError(
            f"the weights look like transformers' {model.title}, which has no {printable(min(left))}; merge an adapter into "
            "the weights, and take out what belongs to another head"
        )
    return _with_scalars(found) if model is _HF_SIGLIP else found


def to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert open_clip's names to transformers' ``CLIPModel`` or ``SiglipModel``; Vision Transformers only.

    Raises:
        ConversionError: a ResNet, which transformers does not have.
    """
    is_siglip = f"{_POOL}latent" in state
    if "visual.class_embedding" not in state and not is_siglip:
        raise ConversionError("transformers has no form of CLIP's ResNets")
    model = _HF_SIGLIP if is_siglip else _HF_CLIP
    found = {theirs: state[ours] for ours, theirs in model.names}
    found |= {theirs: state[ours].T.contiguous() for ours, theirs in model.projections}
    if is_siglip:
        for kind in ("weight", "bias"):
            packed = torch.cat([state[f"{_POOL}{part}.{kind}"] for part in ("q", "kv")])
            found[f"{_HF_POOL}attention.in_proj_{kind}"] = packed
        for scalar in ("logit_scale", "logit_bias"):
            found[scalar] = found[scalar].reshape(1)
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
    of 64. Nor do they show the activation: OpenAI's weights have ``quick_gelu``. What else they do not show is that of a
    known model with the same shapes.

    Raises:
        ConversionError: the shapes are not those of a CLIP.
    """
    bias = float(state["logit_bias"]) if "logit_bias" in state else None
    if bias is not None and not math.isfinite(bias):
        raise ConversionError(f"the weights' logit_bias is {bias}")
    try:
        embed_dim = _features(state)
        vision, text = _infer_vision(state), _infer_text(state)
        for known in MODELS.values():
            if (known.vision.width, known.vision.layers) == (vision.width, vision.layers):
                vision = dataclasses.replace(vision, head_width=known.vision.head_width)
            if (known.text.width, known.text.layers) == (text.width, text.layers):
                text = dataclasses.replace(text, heads=known.text.heads)
        for known in MODELS.values():
            if (known.embed_dim, _seen(known.vision), _seen(known.text)) == (
                *(embed_dim, _seen(vision), _seen(text)),
            ):
                vision, text = known.vision, known.text
                break
        return ModelConfig(embed_dim, vision, text, quick_gelu, init_logit_bias=bias)
    except KeyError as error:
        raise ConversionError(
            f"the weights have no {error}: not a CLIP of OpenAI or open_clip"
        ) from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ConversionError("the weights have names of a CLIP, but other shapes") from error


def _seen(tower: VisionConfig | TextConfig) -> VisionConfig | TextConfig:
    """Return a tower with the default in place of what no shape shows."""
    hidden = int(tower.width * tower.mlp_ratio)
    plain: dict[str, Any] = {"mlp_ratio": hidden / tower.width, "norm_eps": DEFAULT_EPS}
    plain["gelu_tanh"] = False
    if tower.ls_init_value is not None:
        plain["ls_init_value"] = 1.0
    if isinstance(tower, TextConfig):
        plain |= {"no_causal_mask": False, "pool_type": "argmax", "eos_id": 0}
    else:
        plain |= {"final_ln_after_pool": False, "patch_dropout": 0.0}
        if not tower.has_map:
            plain["pool_type"] = "tok"
        if not tower.is_resnet and tower.patch_size is not None:
            plain["image_size"] = tower.image_size // tower.patch_size * tower.patch_size
    return dataclasses.replace(tower, **plain)


def _features(state: Mapping[str, Tensor]) -> int:
    """Return the size of the embedding space; a tower without a projection is as wide."""
    if "text_projection.weight" in state:
        return state["text_projection.weight"].shape[0]
    if f"{_POOL}latent" in state:
        return state[f"{_POOL}latent"].shape[-1]
    if "text_projection" not in state and "visual.proj" in state:
        return state["visual.proj"].shape[1]
    return state["text_projection"].shape[1]


def _infer_text(state: Mapping[str, Tensor]) -> TextConfig:
    width = state["ln_final.weight"].shape[0]
    has_bias = "text_projection.bias" in state
    # All published towers with a bias there, or without a projection, are SigLIP's.
    is_siglip = "text_projection" not in state
    return TextConfig(
        context_length=state["positional_embedding"].shape[0],
        vocab_size=state["token_embedding.weight"].shape[0],
        width=width,
        heads=max(1, width // 64),
        layers=_num_blocks(state, "transformer.resblocks."),
        mlp_ratio=state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
        ls_init_value=_infer_scale(state, "transformer.resblocks."),
        proj_type="none" if is_siglip and not has_bias else "linear",
        proj_bias=has_bias,
        norm_eps=1e-6 if is_siglip else DEFAULT_EPS,
        **(SIGLIP_TEXT if is_siglip else {}),
    )


def _infer_vision(state: Mapping[str, Tensor]) -> VisionConfig:
    has_map = f"{_POOL}latent" in state
    if has_map or "visual.proj" in state:
        width, _, _, patch = state["visual.conv1.weight"].shape
        grid = math.isqrt(state["visual.positional_embedding"].shape[0] - (not has_map))
        fc = state["visual.transformer.resblocks.0.mlp.c_fc.weight"]
        layers = _num_blocks(state, "visual.transformer.resblocks.")
        return VisionConfig(
            *(grid * patch, layers, width, patch),
            mlp_ratio=fc.shape[0] / width,
            ls_init_value=_infer_scale(state, "visual.transformer.resblocks."),
            no_ln_pre=not has_map and "visual.ln_pre.weight" not in state,
            pool_type="map" if has_map else "tok",
            norm_eps=1e-6 if has_map else DEFAULT_EPS,
        )
    stages = tuple(_num_blocks(state, f"visual.layer{i}.") for i in range(1, 5))
    width = state["visual.layer1.0.conv1.weight"].shape[0]
    grid = math.isqrt(state["visual.attnpool.positional_embedding"].shape[0] - 1)
    assert len(stages) == 4
    return VisionConfig(32 * grid, stages, width, None)


def _infer_scale(state: Mapping[str, Tensor], blocks: str) -> float | None:
    """Return a first value for the scales of blocks that have them; the weights hold the trained ones."""
    return 1.0 if f"{blocks}0.ls_1.gamma" in state else None


def _num_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match.group(1) for key in state if (match := pattern.match(key))})
