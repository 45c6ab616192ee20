"""Makes models with their weights and preprocessing: open_clip's functions, arguments and return values."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipcore.data.transforms import ImageTransform
from clipcore.towers.architectures import OPENAI_MODELS, find_model
from clipcore.towers.convert import infer_config, to_open_clip_names
from clipcore.towers.loading import activation_name, check_described_bias, load_checkpoint, model_of
from clipcore.towers.model import CLIP
from clipcore.towers.modules import Attention
from clipcore.towers.open_clip_arguments import check_others
from clipcore.towers.vision import VisionTransformer
from clipcore.towers.weights import read_weights

# open_clip's names, and fp64 for tests. The amp ones keep float32 weights, and autocast chooses the dtype of each
# operation.
PRECISIONS = {
    "fp32": torch.float32,
    "amp": torch.float32,
    "amp_bf16": torch.float32,
    "amp_bfloat16": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "pure_bf16": torch.bfloat16,
    "pure_fp16": torch.float16,
    "fp64": torch.float64,
}


def create_model(
    model_name: str,
    pretrained: str | Path | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    force_image_size: int | Sequence[int] | None = None,
    force_quick_gelu: bool = False,
    force_patch_dropout: float | None = None,
    force_vocab_size: int | None = None,
    force_context_length: int | None = None,
    init_logit_scale: float | None = None,
    init_logit_bias: float | None = None,
    output_dict: bool | None = False,
    require_pretrained: bool = False,
    load_weights: bool = True,
    **others: Any,
) -> CLIP:
    """Return a model of a known architecture, newly initialised or with weights from a file.

    Args:
        model_name: one of ``list_models()``, or OpenAI's spelling (``ViT-B/32``).
        pretrained: a file or folder of weights: OpenAI's, open_clip's, transformers', or a run of clipcore.
        precision: one of ``PRECISIONS``: ``bf16`` and ``fp16`` store matrices in that dtype, and gains, biases of the
            norms, embeddings and the logit scale in float32; ``pure_bf16`` and ``pure_fp16`` store everything in it.
        force_image_size: another image side, pixels, or (side, side); position embeddings of the weights are resized.
        force_quick_gelu: use QuickGELU whatever the name says.
        force_patch_dropout, force_vocab_size, force_context_length: replace the architecture's values.
        init_logit_scale, init_logit_bias: initial values, which override the weights'; SigLIP's are ln(10) and -10. None
            for a model without a bias.
        output_dict: whether ``forward`` returns a dict.
        require_pretrained: refuse a model without weights.
        load_weights: False ignores ``pretrained``.
        others: open_clip's other arguments, with values that change nothing.

    Raises:
        UnknownModelError: the name is unknown; the message lists the nearest ones.
        ValueError: the weights do not fit or are described as another model's, or an argument is out of range.
        TypeError: neither clipcore nor open_clip has such an argument.

    >>> create_model("ViT-nano-8-32").visual.image_size
    32
    """
    check_others("create_model", others, _ARGUMENTS)
    _check_precision(precision)
    # open_clip's other spelling of None.
    pretrained = pretrained if pretrained and load_weights else None
    if require_pretrained and pretrained is None:
        raise ValueError(
            "require_pretrained asks for weights: give their file or folder as pretrained"
        )
    init_logit_scale, init_logit_bias = _plain(init_logit_scale), _plain(init_logit_bias)
    config = find_model(model_name)
    if isinstance(force_image_size, list | tuple):
        if len(set(force_image_size)) != 1:
            raise ValueError(f"the models' images are square, got {tuple(force_image_size)}")
        force_image_size = force_image_size[0]
    vision = {"image_size": _plain(force_image_size), "patch_dropout": _plain(force_patch_dropout)}
    text = {
        "vocab_size": _plain(force_vocab_size),
        "context_length": _plain(force_context_length),
    }
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, **_given(vision)),
        text=dataclasses.replace(config.text, **_given(text)),
        quick_gelu=config.quick_gelu or force_quick_gelu,
        **_given({"init_logit_scale": init_logit_scale, "init_logit_bias": init_logit_bias}),
    )
    if config.vision.is_resnet and config.vision.patch_dropout:
        raise ValueError("patch dropout is for Vision Transformers; leave it out for a ResNet")
    # On the meta device, which holds only shapes, weights are not created elsewhere first.
    is_meta = torch.device(device).type == "meta"
    with torch.device("meta") if is_meta else contextlib.nullcontext():
        model = CLIP(config, bool(output_dict))

    if pretrained is not None:
        load_checkpoint(model, pretrained)
        with torch.no_grad():
            if init_logit_scale is not None:
                model.logit_scale.fill_(init_logit_scale)
            if model.logit_bias is not None and init_logit_bias is not None:
                model.logit_bias.fill_(init_logit_bias)
    return _cast(model, precision).to(device)


_ARGUMENTS = tuple(name for name in inspect.signature(create_model).parameters if name != "others")
# These change no shape, so they do not need a model's name.
_FREE_ARGUMENTS = {"output_dict", "require_pretrained"}


def _check_precision(precision: object) -> None:
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")


def _cast(model: CLIP, precision: str) -> CLIP:
    dtype = PRECISIONS[precision]
    if precision not in ("bf16", "fp16"):
        return model.to(dtype)
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | Attention):
            part.to(dtype)
    model.text_projection.data = model.text_projection.to(dtype)
    if isinstance(model.visual, VisionTransformer):
        model.visual.proj.data = model.visual.proj.to(dtype)
    return model


def _plain(value: Any) -> Any:
    """Return a NumPy number or scalar tensor as a Python number, and other values unchanged."""
    return value.item() if isinstance(value, np.generic | Tensor) else value


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def create_model_and_transforms(
    model_name: str,
    pretrained: str | Path | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_resize_mode: str | None = None,
    aug_cfg: Mapping[str, Any] | None = None,
    **forced: Any,
) -> tuple[CLIP, ImageTransform, ImageTransform]:
    """Return a model as ``create_model`` does, with its preprocessing: (model, preprocess_train, preprocess_val).

    Args:
        image_mean, image_std, image_resize_mode: see ``ImageTransform``; they override the weights' description.
        aug_cfg: settings of the random crop in training, such as ``{"scale": (0.9, 1.0)}``.
        forced: the other arguments of ``create_model``.
    """
    model = create_model(model_name, pretrained, precision, device, **forced)
    model.set_images(model.images | _images(image_mean, image_std, image_resize_mode))
    size = model.visual.image_size
    train = ImageTransform(size, is_train=True, **model.images, **(aug_cfg or {}))
    return model, train, ImageTransform(size, is_train=False, **model.images)


def create_model_from_pretrained(
    model_name: str | None,
    pretrained: str | Path,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_resize_mode: str | None = None,
    **forced: Any,
) -> tuple[CLIP, ImageTransform]:
    """Return a model with weights from a file, in evaluation mode, and its preprocessing.

    Args:
        model_name: None uses the description by open_clip or transformers beside the weights, or a run's own record. If
            there is none, the architecture is inferred from the shapes. They do not show the activation, which is then
            assumed to be QuickGELU for models that OpenAI published and GELU for others, with a warning.
        image_mean, image_std, image_resize_mode: see ``create_model_and_transforms``.
        forced: the other arguments of ``create_model``; those that change the model's shape need ``model_name``.
    """
    _check_precision(precision)
    if model_name is None:
        free = {name: forced.pop(name) for name in _FREE_ARGUMENTS & forced.keys()}
        if shaping := [name for name in forced if name in _ARGUMENTS]:
            raise ValueError(f"{', '.join(shaping)} need the name of the model")
        check_others("create_model_from_pretrained", forced, _ARGUMENTS)
        model = _cast(_from_weights_alone(Path(pretrained)), precision).to(device)
        model.output_dict = bool(free.get("output_dict"))
    else:
        model = create_model(model_name, pretrained, precision, device, **forced)
    model.set_images(model.images | _images(image_mean, image_std, image_resize_mode))
    return model.eval(), ImageTransform(model.visual.image_size, is_train=False, **model.images)


def _images(
    mean: Sequence[float] | None, std: Sequence[float] | None, resize_mode: str | None
) -> dict[str, Any]:
    return _given({"mean": mean, "std": std, "resize_mode": resize_mode})


def _from_weights_alone(pretrained: Path) -> CLIP:
    """Return the model that the weights belong to."""
    weights = read_weights(pretrained)
    check_described_bias(weights)
    state = to_open_clip_names(weights.tensors)
    config = weights.config
    if config is None:
        config = infer_config(state)
        name = config.describe()
        quick_gelu = weights.quick_gelu
        if quick_gelu is None:
            quick_gelu = name in OPENAI_MODELS
            warnings.warn(
                f"{pretrained} does not state its model's activation: assumed to be {name} with "
                f"{activation_name(quick_gelu)}; give the name of the model if that is wrong",
                stacklevel=3,
            )
        config = dataclasses.replace(config, quick_gelu=quick_gelu)
    if config.init_logit_bias is not None and "logit_bias" not in state:
        state["logit_bias"] = torch.tensor(float(config.init_logit_bias))
    model = model_of(config, state, str(pretrained), may_resize=True)
    model.set_images(weights.images)
    return model
