"""Makes models with their weights and preprocessing: open_clip's functions, arguments and return values."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from clipcore.data.transforms import (
    ImageTransform,
    channels,
    crop_settings,
    plain_interpolation,
    square_side,
)
from clipcore.towers import architectures
from clipcore.towers.architectures import OPENAI_MODELS, ModelConfig, find_model
from clipcore.towers.convert import infer_config, to_open_clip_names
from clipcore.towers.loading import (
    activation_name,
    check_described_bias,
    described_model,
    load_checkpoint,
    load_tower,
    model_of,
)
from clipcore.towers.model import CLIP
from clipcore.towers.modules import Attention
from clipcore.towers.open_clip_arguments import (
    check_load_weights,
    check_others,
    check_values,
    note_custom_text,
)
from clipcore.towers.published import LOCAL_PREFIX, how_to_get, place_of, refuse_hub
from clipcore.towers.vision import VisionTransformer
from clipcore.towers.weights import Weights, read_weights

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
Model = TypeVar("Model", bound=CLIP)
# open_clip's keys of a preprocessing.
_IMAGE_KEYS = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")


def create_model(
    model_name: str,
    pretrained: str | Path | None = None,
    load_weights: bool = True,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    jit: bool = False,
    force_quick_gelu: bool = False,
    force_custom_text: bool = False,
    force_patch_dropout: float | None = None,
    force_image_size: int | Sequence[int] | None = None,
    force_preprocess_cfg: Mapping[str, Any] | None = None,
    force_context_length: int | None = None,
    pretrained_image: bool = False,
    pretrained_text: bool = True,
    pretrained_image_path: str | Path | None = None,
    pretrained_text_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    output_dict: bool | None = None,
    require_pretrained: bool = False,
    weights_only: bool = True,
    *,
    force_vocab_size: int | None = None,
    init_logit_scale: float | None = None,
    init_logit_bias: float | None = None,
    **model_kwargs: Any,
) -> CLIP:
    """Return a model of a known architecture, newly initialised or with weights from a file.

    Arguments and their order are those of open_clip 3, and after them clipcore's own, by keyword.

    Args:
        model_name: one of ``list_models()``, OpenAI's spelling (``ViT-B/32``), the path of a JSON file as open_clip's
            model_configs has, or ``local-dir:FOLDER`` for the model that open_clip's, transformers' or a run's folder
            describes, with its weights.
        pretrained: a file or folder of weights: OpenAI's, open_clip's, transformers', or a run of clipcore. For open_clip's
            name of published weights, the error says how to get the file: nothing is downloaded.
        load_weights: False ignores ``pretrained``, or a folder's weights.
        precision: one of ``PRECISIONS``: ``bf16`` and ``fp16`` store matrices in that dtype, and gains, biases of the
            norms, embeddings and the logit scale in float32; ``pure_bf16`` and ``pure_fp16`` store everything in it.
        jit: False; a model is recorded with ``torch.jit.trace``.
        force_quick_gelu: use QuickGELU whatever the name says.
        force_custom_text: accepted, with a warning: weights of both of open_clip's layouts load into one model.
        force_patch_dropout, force_context_length, force_vocab_size: replace the architecture's values.
        force_image_size: another image side, pixels, or (side, side); position embeddings of the weights are resized.
        force_preprocess_cfg: open_clip's dict of the preprocessing (mean, std, interpolation, resize_mode, fill_color),
            which overrides the weights' description.
        pretrained_image, pretrained_text: accepted with the values that load nothing, which are open_clip's defaults.
        pretrained_image_path, pretrained_text_path: weights of one tower, its own or in a whole CLIP, loaded after
            ``pretrained``; unlike in open_clip, weights that do not fit are an error.
        cache_dir: accepted; nothing is downloaded.
        output_dict: whether ``forward`` returns a dict.
        require_pretrained: refuse a model without weights of a whole CLIP.
        weights_only: True; no code in a file of weights is run.
        init_logit_scale, init_logit_bias: initial values, which override the weights'; SigLIP's are ln(10) and -10. None
            for a model without a bias.
        model_kwargs: arguments of open_clip's ``CLIP``, which replace the architecture's: embed_dim, quick_gelu, vision_cfg
            and text_cfg (dicts as in its JSON), nonscalar_logit_scale=False.

    Raises:
        UnknownModelError: the name is unknown; the message lists the nearest ones.
        ValueError: the weights do not fit or are described as another model's, or an argument is out of range, or requests
            what only open_clip has; the message names the remedy.
        TypeError: neither clipcore nor open_clip has such an argument.

    >>> create_model("ViT-nano-8-32").visual.image_size
    (32, 32)
    """
    check_load_weights(load_weights)
    check_values(
        {
            "jit": jit,
            "pretrained_image": pretrained_image,
            "pretrained_text": pretrained_text,
            "weights_only": weights_only,
        }
    )
    changes = {name: model_kwargs.pop(name) for name in _CONFIG_KEYS if name in model_kwargs}
    check_others("create_model", model_kwargs, [*_ARGUMENTS, *_CONFIG_KEYS])
    _check_precision(precision)
    if force_custom_text:
        note_custom_text()
    folder = _local_folder(model_name, pretrained)
    # An empty text is open_clip's other spelling of None.
    source = (pretrained or None) if folder is None else folder
    if require_pretrained and (source is None or not load_weights):
        raise ValueError(
            "require_pretrained asks for weights: give their file or folder as pretrained"
        )
    init_logit_scale, init_logit_bias = _plain(init_logit_scale), _plain(init_logit_bias)

    def changed(config: ModelConfig) -> ModelConfig:
        """Return the architecture with the forced values, and with open_clip's keys of a model over them."""
        config = _forced(
            config,
            vision={"image_size": force_image_size, "patch_dropout": force_patch_dropout},
            text={"context_length": force_context_length, "vocab_size": force_vocab_size},
            whole={"init_logit_scale": init_logit_scale, "init_logit_bias": init_logit_bias},
        )
        if force_quick_gelu:
            config = dataclasses.replace(config, quick_gelu=True)
        return _with_open_clip_keys(config, changes)

    if folder is None:
        model = _new(changed(find_model(model_name)), device)
    elif load_weights:
        model = made_of_weights(folder, changed, quick_gelu=force_quick_gelu or None)
    else:
        model = _of_description(folder, changed, device)

    if source is not None and load_weights:
        if folder is None:
            _check_tag(model_name, source)
            load_checkpoint(model, source)
        with torch.no_grad():
            if init_logit_scale is not None:
                model.logit_scale.fill_(init_logit_scale)
            if model.logit_bias is not None and init_logit_bias is not None:
                model.logit_bias.fill_(init_logit_bias)
    for tower, path in (("image", pretrained_image_path), ("text", pretrained_text_path)):
        if path:
            load_tower(model, tower, path)
    model.output_dict = bool(output_dict)
    model.set_images(
        model.images | _images(force_preprocess_cfg or {}, model.config.vision.image_size)
    )
    return cast(model, precision).to(device)


# open_clip's keys of a model that replace the architecture's; the others of its ``CLIP`` are arguments of create_model.
_CONFIG_KEYS = ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg")
_ARGUMENTS = tuple(
    name for name in inspect.signature(create_model).parameters if name != "model_kwargs"
)


def _new(config: ModelConfig, device: str | torch.device) -> CLIP:
    """Return a newly initialised model; on the meta device, which holds only shapes, no memory is used for it."""
    is_meta = torch.device(device).type == "meta"
    with torch.device("meta") if is_meta else contextlib.nullcontext():
        return CLIP(config)


def _local_folder(model_name: object, pretrained: str | Path | None) -> Path | None:
    """Return the folder of a ``local-dir:`` name, None for other names; raise ValueError if it cannot be used."""
    place = place_of(model_name) if isinstance(model_name, str) else None
    if place is None:
        return None
    prefix, name = place
    if prefix != LOCAL_PREFIX:
        refuse_hub(str(model_name), name)
    if pretrained:
        raise ValueError(f"{model_name} has weights of its own: leave pretrained={pretrained} out")
    if not Path(name).is_dir():
        raise ValueError(f"{model_name}: there is no folder {name}")
    return Path(name)


def _check_tag(model_name: str, pretrained: str | Path) -> None:
    """Raise ValueError if it is open_clip's name of published weights and not a path; the message says how to get them."""
    if not isinstance(pretrained, str) or Path(pretrained).suffix or os.path.lexists(pretrained):
        return
    if remedy := how_to_get(model_name, pretrained):
        raise ValueError(f"{pretrained} is the name of published weights; {remedy}")


def _forced(
    config: ModelConfig, vision: dict[str, Any], text: dict[str, Any], whole: dict[str, Any]
) -> ModelConfig:
    """Return an architecture with those values replaced that are given."""

    def given(values: dict[str, Any]) -> dict[str, Any]:
        return {name: _plain(value) for name, value in values.items() if value is not None}

    if vision["image_size"] is not None:
        vision = vision | {"image_size": square_side(vision["image_size"])}
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, **given(vision)),
        text=dataclasses.replace(config.text, **given(text)),
        **given(whole),
    )
    if config.vision.is_resnet and config.vision.patch_dropout:
        raise ValueError("patch dropout is for Vision Transformers; leave it out for a ResNet")
    return config


def _with_open_clip_keys(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """Return an architecture with whole parts of open_clip's description replaced."""
    if not changes:
        return config
    content = config.to_dict() | {"quick_gelu": config.quick_gelu}
    for name, value in changes.items():
        is_object = dataclasses.is_dataclass(value) and not isinstance(value, type)
        content[name] = dataclasses.asdict(value) if is_object else _plain(value)
    return ModelConfig.from_dict(content)


def _images(given: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return open_clip's keys of a preprocessing as arguments of ``ImageTransform``; None leaves a value as it is.

    Raises:
        ValueError: a value that clipcore's preprocessing does not have.
        TypeError: an unknown key.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"force_preprocess_cfg is a dict such as {{'mean': ...}}, got {given!r}")
    for name in given:
        if name not in _IMAGE_KEYS:
            near = difflib.get_close_matches(str(name), _IMAGE_KEYS, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"force_preprocess_cfg has no key {name!r}{hint}")
    found = _given(dict(given))
    if found.pop("mode", "RGB") != "RGB":
        raise ValueError(f"the models' images are RGB, got mode={given['mode']!r}")
    if (own := square_side(found.pop("size", size))) != size:
        raise ValueError(
            f"the preprocessing's size is the model's, {size}, got {own}: give force_image_size={own} for another one"
        )
    for name in ("mean", "std"):
        if name in found:
            found[name] = channels(found[name])
    if "interpolation" in found:
        found["interpolation"] = plain_interpolation(found["interpolation"])
    # It refuses values that it does not have, and holds the others as plain numbers.
    transform = ImageTransform(size, is_train=False, **found)
    return {name: getattr(transform, name) for name in found}


def _check_precision(precision: object) -> None:
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")


def cast(model: Model, precision: str) -> Model:
    """Return a model with its weights in the dtypes of one of ``PRECISIONS``."""
    dtype = PRECISIONS[precision]
    if precision not in ("bf16", "fp16"):
        return model.to(dtype)
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | Attention):
            part.to(dtype)
    projections = [model.text_projection]
    if isinstance(model.visual, VisionTransformer):
        projections.append(model.visual.proj)
    for projection in projections:
        if isinstance(projection, Tensor):
            projection.data = projection.to(dtype)
    return model


def _plain(value: Any) -> Any:
    """Return a NumPy number or scalar tensor as a Python number, and other values unchanged."""
    return value.item() if isinstance(value, np.generic | Tensor) else value


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def create_model_and_transforms(
    model_name: str,
    pretrained: str | Path | None = None,
    load_weights: bool = True,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    jit: bool = False,
    force_quick_gelu: bool = False,
    force_custom_text: bool = False,
    force_patch_dropout: float | None = None,
    force_image_size: int | Sequence[int] | None = None,
    force_context_length: int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_interpolation: str | None = None,
    image_resize_mode: str | None = None,
    aug_cfg: Any = None,
    pretrained_image: bool = False,
    pretrained_text: bool = True,
    pretrained_image_path: str | Path | None = None,
    pretrained_text_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    output_dict: bool | None = None,
    weights_only: bool = True,
    **model_kwargs: Any,
) -> tuple[CLIP, ImageTransform, ImageTransform]:
    """Return a model as ``create_model`` does, with its preprocessing: (model, preprocess_train, preprocess_val).

    Args:
        image_mean, image_std, image_interpolation, image_resize_mode: override the weights' description, see
            ``ImageTransform``; random crops in training stay bicubic, as in open_clip.
        aug_cfg: settings of the random crop in training, such as ``{"scale": (0.9, 1.0)}``, see ``crop_settings``.
        model_kwargs: the other arguments of ``create_model``.
    """
    crop = crop_settings(aug_cfg)
    model = create_model(
        model_name,
        pretrained,
        load_weights=load_weights,
        precision=precision,
        device=device,
        jit=jit,
        force_quick_gelu=force_quick_gelu,
        force_custom_text=force_custom_text,
        force_patch_dropout=force_patch_dropout,
        force_image_size=force_image_size,
        force_preprocess_cfg=_image_arguments(
            model_kwargs, image_mean, image_std, image_interpolation, image_resize_mode
        ),
        force_context_length=force_context_length,
        pretrained_image=pretrained_image,
        pretrained_text=pretrained_text,
        pretrained_image_path=pretrained_image_path,
        pretrained_text_path=pretrained_text_path,
        cache_dir=cache_dir,
        output_dict=output_dict,
        weights_only=weights_only,
        **model_kwargs,
    )
    size = model.config.vision.image_size
    train = ImageTransform(size, is_train=True, **model.images, **crop)
    return model, train, ImageTransform(size, is_train=False, **model.images)


def create_model_from_pretrained(
    model_name: str | None,
    pretrained: str | Path | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    jit: bool = False,
    force_quick_gelu: bool = False,
    force_custom_text: bool = False,
    force_image_size: int | Sequence[int] | None = None,
    force_context_length: int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_interpolation: str | None = None,
    image_resize_mode: str | None = None,
    return_transform: bool = True,
    cache_dir: str | Path | None = None,
    weights_only: bool = True,
    **model_kwargs: Any,
) -> Any:
    """Return a model with weights from a file, in evaluation mode, and its preprocessing.

    Args:
        model_name: None uses the description by open_clip or transformers beside the weights, or a run's own record. If
            there is none, the architecture is inferred from the shapes. They do not show the activation, which is then
            assumed to be QuickGELU for models that OpenAI published and GELU for others, with a warning.
        image_mean, image_std, image_interpolation, image_resize_mode: see ``create_model_and_transforms``.
        return_transform: False returns the model alone.
        model_kwargs: the other arguments of ``create_model``; those that change the model's shape need ``model_name``.

    Returns:
        (model, preprocess), or the model.
    """
    images = _image_arguments(
        model_kwargs, image_mean, image_std, image_interpolation, image_resize_mode
    )
    if model_name is None:
        check_values({"jit": jit, "weights_only": weights_only})
        if force_custom_text:
            note_custom_text()
        shaping = {
            "force_quick_gelu": force_quick_gelu or None,
            "force_image_size": force_image_size,
            "force_context_length": force_context_length,
        }
        model = _made_without_name(
            pretrained, precision, device, {**_given(shaping), **model_kwargs}
        )
        model.set_images(model.images | _images(images, model.config.vision.image_size))
    else:
        model = create_model(
            model_name,
            pretrained,
            precision=precision,
            device=device,
            jit=jit,
            force_quick_gelu=force_quick_gelu,
            force_custom_text=force_custom_text,
            force_image_size=force_image_size,
            force_preprocess_cfg=images,
            force_context_length=force_context_length,
            cache_dir=cache_dir,
            weights_only=weights_only,
            **{"require_pretrained": True, **model_kwargs},
        )
    model.eval()
    if not return_transform:
        return model
    size = model.config.vision.image_size
    return model, ImageTransform(size, is_train=False, **model.images)


def _image_arguments(
    others: dict[str, Any],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    interpolation: str | None,
    resize_mode: str | None,
) -> dict[str, Any]:
    """Return the ``force_preprocess_cfg`` of these arguments, over the one in ``others``, which is taken out of it."""
    given = {
        "mean": mean,
        "std": std,
        "interpolation": interpolation,
        "resize_mode": resize_mode,
    }
    return {**(others.pop("force_preprocess_cfg", None) or {}), **_given(given)}


def _made_without_name(
    pretrained: str | Path | None,
    precision: str,
    device: str | torch.device,
    others: dict[str, Any],
) -> CLIP:
    """Return the model that weights belong to, given ``create_model``'s other arguments."""
    _check_precision(precision)
    if not pretrained:
        raise ValueError("give the name of a model, or the file or folder of weights as pretrained")
    # These change no shape, so they do not need a model's name.
    output_dict = bool(others.pop("output_dict", None))
    others.pop("require_pretrained", None)
    defaults = inspect.signature(create_model).parameters
    others = {
        name: value
        for name, value in others.items()
        if name not in defaults or value is not defaults[name].default
    }
    if shaping := [name for name in others if name in (*_ARGUMENTS, *_CONFIG_KEYS)]:
        verb = "needs" if len(shaping) == 1 else "need"
        raise ValueError(f"{', '.join(shaping)} {verb} the name of the model")
    check_others("create_model_from_pretrained", others, [*_ARGUMENTS, *_CONFIG_KEYS])
    model = cast(made_of_weights(Path(pretrained)), precision).to(device)
    model.output_dict = output_dict
    return model


def _unchanged(config: ModelConfig) -> ModelConfig:
    return config


def made_of_weights(
    pretrained: Path,
    changed: Callable[[ModelConfig], ModelConfig] = _unchanged,
    quick_gelu: bool | None = None,
) -> CLIP:
    """Return the model that weights belong to, with them.

    Args:
        changed: returns the architecture to make of the one that is described.
        quick_gelu: the activation where nothing states it [see ``create_model_from_pretrained``].
    """
    weights = read_weights(pretrained)
    check_described_bias(weights)
    state = to_open_clip_names(weights.tensors)
    config = weights.config
    if config is None:
        config = _inferred(pretrained, weights, state, quick_gelu)
    described, config = config, changed(config)
    if config.quick_gelu != described.quick_gelu:
        raise ValueError(
            f"the model of {pretrained} has {activation_name(described.quick_gelu)}; leave out force_quick_gelu and "
            "quick_gelu"
        )
    if config.init_logit_bias is not None and "logit_bias" not in state:
        state["logit_bias"] = torch.tensor(float(config.init_logit_bias))
    model = model_of(config, state, str(pretrained), may_resize=True)
    model.set_images(model.images | weights.images)
    return model


def _inferred(
    pretrained: Path, weights: Weights, state: dict[str, Tensor], quick_gelu: bool | None
) -> ModelConfig:
    """Return the architecture of weights without a description."""
    config = infer_config(state)
    name = config.describe()
    if weights.quick_gelu is not None:
        quick_gelu = weights.quick_gelu
    if quick_gelu is None:
        quick_gelu = name in OPENAI_MODELS
        warnings.warn(
            f"{pretrained} does not state its model's activation: assumed to be {name} with "
            f"{activation_name(quick_gelu)}; give the name of the model if that is wrong",
            stacklevel=5,
        )
    return dataclasses.replace(config, quick_gelu=quick_gelu)


def _of_description(
    folder: Path, changed: Callable[[ModelConfig], ModelConfig], device: str | torch.device
) -> CLIP:
    """Return the model that a folder describes, newly initialised, with the preprocessing that it states."""
    if (described := described_model(folder)) is None:
        raise ValueError(f"{folder} does not describe its model: give the model's name")
    model = _new(changed(described.config), device)
    model.set_images(model.images | described.images)
    return model


def get_model_config(model_name: str) -> dict[str, Any]:
    """Return the shape of a model, or of the one in ``local-dir:FOLDER``, as a dict in open_clip's JSON layout.

    Raises:
        UnknownModelError: there is no such model; open_clip returns None.
        ValueError: the folder does not describe a model.
    """
    folder = _local_folder(model_name, None)
    if folder is None:
        return architectures.get_model_config(model_name)
    if (described := described_model(folder)) is None:
        raise ValueError(f"{folder} does not describe its model")
    return described.config.to_dict()


def get_model_preprocess_cfg(model: nn.Module) -> dict[str, Any]:
    """Return open_clip's dict of a model's preprocessing: size, mode, mean, std, interpolation, resize_mode, fill_color."""
    return copy.deepcopy(getattr(model, "visual", model).preprocess_cfg)  # type: ignore[arg-type]


def get_model_tokenize_cfg(model: nn.Module) -> dict[str, Any]:
    """Return what a model takes as tokens: ``context_length`` and ``vocab_size``."""
    return {"context_length": model.context_length, "vocab_size": model.vocab_size}


def get_cast_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype of the matrices with ``bf16`` and ``fp16``, None for another precision."""
    return PRECISIONS[precision] if precision in ("bf16", "fp16") else None


def get_input_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype of the images with ``bf16``, ``fp16`` and their ``pure_`` forms, None for another precision."""
    is_16_bit = precision in ("bf16", "fp16", "pure_bf16", "pure_fp16")
    return PRECISIONS[precision] if is_16_bit else None
