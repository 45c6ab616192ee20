"""Loads weights into a CLIP, or makes the CLIP that they belong to; refuses what does not fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clipcore.towers.architectures import MODELS, QUICK_GELU_SUFFIX, ModelConfig
from clipcore.towers.convert import (
    ConversionError,
    infer_config,
    to_open_clip_names,
    without_text_prefix,
    without_timm_names,
)
from clipcore.towers.descriptions import Description, read_description
from clipcore.towers.model import CLIP
from clipcore.towers.weights import Weights, read_weights

# Names of the position embeddings in all models, and the largest length to which a description beside weights resizes them.
POSITIONS = (
    "visual.positional_embedding",
    "visual.attnpool.positional_embedding",
    "positional_embedding",
)
MAX_POSITIONS = 1 << 15


def model_of(
    config: ModelConfig, state: dict[str, Tensor], origin: str, may_resize: bool = False
) -> CLIP:
    """Return the described model with its weights.

    The shapes are compared before memory is allocated, because a description is not trusted.

    Args:
        state: weights under open_clip's names, in the shapes of the description.
        origin: the weights' file, for messages.
        may_resize: resize position embeddings of another length, as open_clip does, to at most ``MAX_POSITIONS``.

    Raises:
        ValueError: see ``load_checkpoint``.
    """
    with torch.device("meta"):
        own = CLIP(config).state_dict()
    if may_resize and all(own[key].shape[0] <= MAX_POSITIONS for key in POSITIONS if key in own):
        state = resize_position_embeddings(state, own)
    _check_shapes(config, state, own, origin)
    _check_numbers(state, own, origin)
    model = CLIP(config)
    model.load_state_dict(state)
    return model


class IncompatibleKeys(NamedTuple):
    """What does not match between weights and a model, as ``torch.nn.Module.load_state_dict`` returns it.

    Attributes:
        missing_keys: names of the model's values that the weights lack; the model keeps its own.
        unexpected_keys: names in the weights that the model lacks.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_checkpoint(
    model: CLIP,
    checkpoint_path: str | Path,
    strict: bool = True,
    weights_only: bool = True,
    device: str | torch.device = "cpu",
) -> IncompatibleKeys:
    """Load weights from a file of any known layout; position embeddings are resized to the model's.

    If the description beside them states the preprocessing, the model records it.

    Args:
        strict: refuse weights that lack a value of the model or have others. A model with a bias, such as SigLIP's, may keep
            it (open_clip sets it to 0). False loads the values that both have; other shapes are still an error.
        weights_only: True; no code in a file of weights is run.
        device: accepted, as in open_clip; files are read on the CPU, and the values go to the model's device.

    Returns:
        names of the values that the model keeps because the weights lack them, and of those that the model lacks.

    Raises:
        ValueError: the weights are of another architecture; the message names the first differences and the architecture
            that they look like. Or their description, such as the activation, contradicts ``model``.
    """
    if not weights_only:
        raise ValueError("weights_only=False exists only in open_clip; no code in a file is run")
    torch.device(device)
    weights = read_weights(checkpoint_path)
    if strict:
        check_description(model.config, weights)
        state = to_open_clip_names(weights.tensors)
        found = IncompatibleKeys(list(load_weights(model, state, str(checkpoint_path))), [])
    else:
        _check_activation(model.config, weights)
        _check_hidden(model.config, weights, ("image", "text"))
        found = _load_common(model, _names_of_part(weights.tensors), str(checkpoint_path))
    if weights.images:
        model.set_images(model.images | weights.images)
    return found


def _names_of_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under open_clip's ``CLIP`` names, also those of a part of a CLIP."""
    try:
        return to_open_clip_names(tensors)
    except ConversionError:
        if any(name.startswith("text_model.") for name in tensors):
            raise
        return without_timm_names(without_text_prefix(tensors))


def _load_common(model: CLIP, state: Mapping[str, Tensor], origin: str) -> IncompatibleKeys:
    """Load the values that both have.

    Raises:
        ValueError: a value has another shape than the model's, or is not finite.
    """
    own = model.state_dict()
    fitted = resize_position_embeddings(state, own)
    common = {name: value for name, value in fitted.items() if name in own}
    if differing := shape_differences(_shapes(common), _shapes(own, common)):
        raise ValueError(
            f"the weights in {origin} do not fit {model.config.describe()}: {', '.join(differing[:3])}; values of other "
            "shapes are not left out"
        )
    _check_numbers(common, own, origin)
    missing, _ = model.load_state_dict(common, strict=False)
    return IncompatibleKeys(missing, [name for name in state if name not in own])


def _shapes(
    state: Mapping[str, Tensor], names: Iterable[str] | None = None
) -> dict[str, torch.Size]:
    return {name: state[name].shape for name in (state if names is None else names)}


def load_tower(model: CLIP, tower: str, path: str | Path) -> None:
    """Load one tower's weights from a file.

    Args:
        tower: "image" or "text".
        path: the tower's own state dict, such as that of open_clip's ``visual`` or ``TextTransformer``; or weights of a
            whole CLIP, of which this tower's are taken.

    Raises:
        ValueError: the weights are not all of this tower's, or of other shapes (open_clip loads what fits and goes on); or
            their description contradicts the model.
    """
    weights = read_weights(path)
    _check_activation(model.config, weights)
    _check_hidden(model.config, weights, (tower,))
    own = {name: value for name, value in model.state_dict().items() if _tower_of(name) == tower}
    state = _names_of_part(weights.tensors)
    if any(name.startswith(("visual.", "logit_")) for name in state):
        state = {name: value for name, value in state.items() if _tower_of(name) == tower}
    elif tower == "image":
        state = without_timm_names({f"visual.{name}": value for name, value in state.items()})
    fitted = resize_position_embeddings(state, own)
    if differing := shape_differences(_shapes(fitted), _shapes(own)):
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"the weights in {path} do not fit the {tower} tower of {model.config.describe()}: "
            f"{', '.join(differing[:3])}{more}; give this tower's state dict, or the weights of a whole CLIP"
        )
    _check_numbers(fitted, own, str(path))
    model.load_state_dict(fitted, strict=False)
    if tower == "image" and weights.images:
        model.set_images(model.images | weights.images)


def _tower_of(name: str) -> str | None:
    """Return the tower that a value of a CLIP belongs to, "image" or "text"; None for the scale and bias."""
    if name.startswith("visual."):
        return "image"
    return None if name.startswith("logit_") else "text"


def described_model(folder: Path) -> Description | None:
    """Return the description of the model in a folder: open_clip's, transformers' or that of a run; None without any."""
    if (found := read_description(folder)) is not None:
        return found
    weights = read_weights(folder)
    return None if weights.config is None else Description(weights.config, weights.images, folder)


def check_description(config: ModelConfig, weights: Weights) -> None:
    """Raise ValueError if the weights' description contradicts an architecture in a way that the shapes do not show."""
    _check_activation(config, weights)
    _check_hidden(config, weights, ("image", "text"))
    if weights.config is None or config.init_logit_bias is not None:
        return
    check_described_bias(weights)
    if (begins_at := weights.config.init_logit_bias) is not None:
        raise ValueError(
            f"{weights.witness} that its model has a logit_bias, which begins at {begins_at:g}, and {_name(config)[0]} has "
            f"none; make it with init_logit_bias={begins_at:g} (--siglip); create_model_from_pretrained(None, ...) makes "
            "the model that it describes"
        )


def _check_activation(config: ModelConfig, weights: Weights) -> None:
    name, is_known = _name(config)
    if weights.quick_gelu not in (None, config.quick_gelu):
        is_quick = bool(weights.quick_gelu)
        right, has_name = _name(weights.config or dataclasses.replace(config, quick_gelu=is_quick))
        verb = "set" if is_quick else "leave out"
        remedy = f"{verb} force_quick_gelu (--force-quick-gelu)"
        if is_known and has_name:
            remedy = f"name {right}" if is_quick else f"name {right}, without --force-quick-gelu"
        raise ValueError(
            f"{weights.witness} that its model has {activation_name(is_quick)}, and {name} has "
            f"{activation_name(config.quick_gelu)}; {remedy}"
        )


# Of a tower, in words: what no shape shows, and is another function.
_HIDDEN = {
    "heads": "{} heads",
    "norm_eps": "LayerNorms with an eps of {:g}",
    "gelu_tanh": "GELU {}",
    "pool_type": "the pool_type {}",
    "final_ln_after_pool": "final_ln_after_pool {}",
    "no_causal_mask": "no_causal_mask {}",
    "eos_id": "the eos_id {}",
}
_GELU = {True: "by its tanh approximation", False: "without approximation"}


def _check_hidden(config: ModelConfig, weights: Weights, towers: Sequence[str]) -> None:
    """Raise ValueError if the weights' description contradicts an architecture in what no shape shows."""
    if weights.config is None:
        return
    for tower, said, own in (
        ("image", weights.config.vision, config.vision),
        ("text", weights.config.text, config.text),
    ):
        for name, words in _HIDDEN.items():
            if tower not in towers or not hasattr(said, name):
                continue
            theirs, ours = getattr(said, name), getattr(own, name)
            if theirs != ours:
                texts = [
                    words.format(_GELU[v] if name == "gelu_tanh" else v) for v in (theirs, ours)
                ]
                raise ValueError(
                    f"{weights.witness} that its {tower} tower has {texts[0]}, and {_name(config)[0]} has "
                    f"{_short(texts[1])}; create_model_from_pretrained(None, ...) makes the model that it describes"
                )


def _short(text: str) -> str:
    return text.removesuffix(" heads")


def check_described_bias(weights: Weights) -> None:
    """Raise ValueError for weights with a bias beside a description of a model without one."""
    has_none = weights.config is not None and weights.config.init_logit_bias is None
    if has_none and "logit_bias" in weights.tensors:
        raise ValueError(
            f"{weights.witness} that its model has no logit_bias, and its weights have one, as SigLIP's do; add "
            '"init_logit_bias": 0.0 to the model_cfg of its open_clip_config.json (the weights have the value), or make a '
            "model with init_logit_bias=0.0 and load_checkpoint(...)"
        )


def _name(config: ModelConfig) -> tuple[str, bool]:
    """Return the name of a model, or its towers in words, and whether it is a name."""
    words = config.describe()
    is_known = words in MODELS
    return words + QUICK_GELU_SUFFIX * (is_known and config.quick_gelu), is_known


def activation_name(quick_gelu: bool) -> str:
    return "QuickGELU" if quick_gelu else "GELU"


def load_weights(model: CLIP, state: dict[str, Tensor], origin: str) -> tuple[str, ...]:
    """Load weights under open_clip's names; see ``load_checkpoint`` with ``strict``.

    A model with a bias, such as SigLIP's, keeps it if the weights have none.

    Returns:
        the names of the values that the model keeps.
    """
    own = model.state_dict()
    fitted = resize_position_embeddings(state, own)
    kept: tuple[str, ...] = ()
    if "logit_bias" in own and "logit_bias" not in fitted:
        kept = ("logit_bias",)
        fitted["logit_bias"] = own["logit_bias"]
    _check_shapes(model.config, fitted, own, origin)
    _check_numbers(fitted, own, origin)
    model.load_state_dict(fitted)
    return kept


def _check_numbers(state: Mapping[str, Tensor], own: Mapping[str, Tensor], origin: str) -> None:
    """Raise ValueError for quantised or non-finite weights."""
    for name, value in state.items():
        if value.is_floating_point() != own[name].is_floating_point():
            raise ValueError(
                f"{name} in {origin} is {value.dtype}, and the model's {own[name].dtype}; quantised weights are not read, "
                "save them as floats"
            )
        # 8-bit floats do not support isfinite.
        wide = value if value.element_size() > 1 else value.float()
        if value.is_floating_point() and not wide.isfinite().all():
            raise ValueError(
                f"{name} in {origin} is not finite: its training failed, or the file is damaged; take an earlier checkpoint"
            )


def _check_shapes(
    config: ModelConfig, state: dict[str, Tensor], own: Mapping[str, Tensor], origin: str
) -> None:
    """Raise ValueError unless weights have a model's names and shapes; the message tells what they look like."""
    found = {name: value.shape for name, value in state.items()}
    differing = shape_differences(found, {name: value.shape for name, value in own.items()})
    if differing == ["logit_bias is unknown"]:
        raise ValueError(
            f"the weights in {origin} have a logit_bias, as SigLIP's do, and the model has none: train with --siglip, use "
            "create_model_from_pretrained(None, ...), or make a model with init_logit_bias=0.0 and load_checkpoint(...)"
        )
    if differing and all(difference.endswith(" is unknown") for difference in differing):
        raise ValueError(
            f"the weights in {origin} hold more than {config.describe()}: {', '.join(differing[:3])}; merge an adapter into "
            "the weights, and take out of the file what belongs to something else"
        )
    if differing:
        try:
            looks = f"they look like {infer_config(state).describe()}"
        except ConversionError as error:
            looks = str(error)
        rest = len(differing) - 3
        more = f", and {rest} more" if rest > 0 else ""
        raise ValueError(
            f"the weights in {origin} do not fit {config.describe()}: {', '.join(differing[:3])}{more}; {looks}"
        )


def shape_differences(
    state: Mapping[str, Sequence[int]], own: Mapping[str, Sequence[int]]
) -> list[str]:
    """Return in words which shapes in ``state`` differ from those in ``own``, are missing, or are unknown."""
    shapes = [
        f"{name} is {list(state[name])} instead of {list(shape)}"
        for name, shape in own.items()
        if name in state and state[name] != shape
    ]
    missing = [f"{name} is missing" for name in own if name not in state]
    return shapes + missing + [f"{name} is unknown" for name in state if name not in own]


def resize_position_embeddings(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return ``state`` with position embeddings resized to the lengths in ``own``, as in open_clip and for ResNets too.

    Image embeddings are resized bicubically with antialiasing, text embeddings linearly. Embeddings of another width are
    left unchanged.
    """
    resized = dict(state)
    for key in POSITIONS:
        if key not in state or key not in own or state[key].shape[1:] != own[key].shape[1:]:
            continue
        old, length = state[key], own[key].shape[0]
        if old.shape[0] != length:
            if not old.shape[0]:
                raise ConversionError(f"the weights' {key} has no row")
            if key == "positional_embedding":
                fitted = _resize_line(old.float(), length)
            else:
                # SigLIP's towers have no class token.
                has_first = key != "visual.positional_embedding" or "visual.class_embedding" in own
                fitted = _resize_grid(old.float(), length, int(has_first))
            resized[key] = fitted.to(old.dtype)
    return resized


def _resize_grid(old_LD: Tensor, length: int, num_prefixes: int) -> Tensor:
    """Resize a square grid of embeddings, and keep those before it: one, of the class token or the mean, or none."""
    num_old = old_LD.shape[0] - num_prefixes
    old, new = math.isqrt(max(0, num_old)), math.isqrt(length - num_prefixes)
    if num_old != old**2 or not old:
        first = " and a class token" if num_prefixes else ""
        raise ConversionError(
            f"the weights have {old_LD.shape[0]} image positions, which are not a square grid{first}"
        )
    grid = old_LD[num_prefixes:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([old_LD[:num_prefixes], grid.permute(0, 2, 3, 1).reshape(new * new, -1)])


def _resize_line(old_LD: Tensor, length: int) -> Tensor:
    return F.interpolate(old_LD.T[None], length, mode="linear", align_corners=False)[0].T
