"""Writes a model's weights and description in the layouts of open_clip, transformers and OpenAI's package.

``weights.py`` and ``descriptions.py`` read the same files. What a layout cannot say is refused, since it would be lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from clipcore.data.transforms import OPENAI_MEAN, OPENAI_STD
from clipcore.towers.architectures import ModelConfig
from clipcore.towers.convert import ConversionError, to_custom_text, to_hf
from clipcore.towers.descriptions import HF_FILE, HF_IMAGES_FILE, OPEN_CLIP_FILE, hf_config

OPEN_CLIP_WEIGHTS, HF_WEIGHTS, OPENAI_WEIGHTS = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "model.pt",
)
# OpenAI's package reads the sizes of heads off the towers' widths.
_OPENAI_HEAD_WIDTH = 64


class Described(Protocol):
    """A model with its weights and description, such as CLIP."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def images(self) -> dict[str, Any]: ...

    @property
    def logit_bias(self) -> Tensor | None: ...

    def state_dict(self) -> dict[str, Tensor]: ...


def write_open_clip(model: Described, folder: Path, has_own_vocabulary: bool = False) -> None:
    """Write the folder of ``open_clip.create_model("local-dir:FOLDER")``.

    Args:
        has_own_vocabulary: tokenizer files are in the folder too, for open_clip to read in place of OpenAI's vocabulary.
    """
    config = model.config.to_dict()
    if has_own_vocabulary:
        # For a local folder open_clip takes any name for the folder itself.
        config["text_cfg"]["hf_tokenizer_name"] = "."
    described = {"model_cfg": config, "preprocess_cfg": open_clip_preprocessing(model)}
    _write_json(folder / OPEN_CLIP_FILE, described)
    weights = model.state_dict()
    if model.config.vision.has_map:
        weights = to_custom_text(weights)
    save_file(_plain(weights), folder / OPEN_CLIP_WEIGHTS)


def open_clip_preprocessing(model: Described) -> dict[str, Any]:
    """Return a model's preprocessing as open_clip's ``preprocess_cfg``."""
    images = model.images
    return {
        "size": model.config.vision.image_size,
        "mode": "RGB",
        "mean": tuple(images.get("mean", OPENAI_MEAN)),
        "std": tuple(images.get("std", OPENAI_STD)),
        "interpolation": images.get("interpolation", "bicubic"),
        "resize_mode": images.get("resize_mode", "shortest"),
        "fill_color": images.get("fill_color", 0),
    }


def write_transformers(model: Described, folder: Path) -> None:
    """Write the folder of transformers' ``CLIPModel.from_pretrained(FOLDER)``, or ``SiglipModel``, and its image processor.

    Raises:
        ConversionError: a ResNet, a part of a tower, a logit bias or padded images, which transformers' model does not have.
    """
    _check_transformers(model)
    weights = to_hf(model.state_dict())
    _write_json(folder / HF_FILE, hf_config(model.config))
    _write_json(folder / HF_IMAGES_FILE, hf_preprocessing(model))
    save_file(_plain(weights), folder / HF_WEIGHTS, metadata={"format": "pt"})


def _check_transformers(model: Described) -> None:
    """Raise ConversionError for a model that transformers would load as another one."""
    config = model.config
    if config.vision.has_map:
        text = config.text
        is_siglips = (text.no_causal_mask, text.pool_type, text.proj_bias) == (True, "last", True)
        if (
            not is_siglips
            or text.ls_init_value is not None
            or config.vision.ls_init_value is not None
        ):
            raise ConversionError(
                "transformers' SiglipModel has no such text tower or no scaled blocks; export the model to open_clip"
            )
        if model.logit_bias is None:
            raise ConversionError(
                "transformers' SiglipModel has a logit bias, and this model has none; export it to open_clip"
            )
        return
    if model.logit_bias is not None:
        raise ConversionError(
            "transformers' CLIPModel has no logit bias, and this model has one, as SigLIP's do; export it to open_clip"
        )
    if others := [part for part in config.beyond_openai if not part.startswith("norm_eps")]:
        raise ConversionError(
            f"transformers' CLIPModel has no {', '.join(others)}; export the model to open_clip"
        )


def hf_preprocessing(model: Described) -> dict[str, Any]:
    """Return a model's preprocessing as transformers' preprocessor_config.json.

    Raises:
        ConversionError: it pads, which transformers' CLIP does not.
    """
    size, images = model.config.vision.image_size, model.images
    name = "Siglip" if model.config.vision.has_map else "CLIP"
    if images.get("resize_mode") == "longest":
        raise ConversionError(
            f"transformers' {name}ImageProcessor does not pad, which resize_mode longest does; export the model to open_clip"
        )
    square = {"height": size, "width": size}
    is_squashed = images.get("resize_mode") == "squash"
    return {
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if is_squashed else {"shortest_edge": size},
        "resample": 2 if images.get("interpolation") == "bilinear" else 3,
        "do_center_crop": not is_squashed,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(images.get("mean", OPENAI_MEAN)),
        "image_std": list(images.get("std", OPENAI_STD)),
    }


def write_openai(model: Described, folder: Path) -> None:
    """Write the file of OpenAI's ``clip.load(FOLDER/model.pt)``: its names, and the three sizes that it stores beside them.

    Raises:
        ConversionError: the package would make another model: it knows QuickGELU, heads of width 64 and its own
            preprocessing only, and no logit bias.
    """
    if reasons := openai_differences(model):
        raise ConversionError(
            f"OpenAI's package cannot hold this model: {'; '.join(reasons)}; export it to open_clip"
        )
    config = model.config
    sizes = (config.vision.image_size, config.text.context_length, config.text.vocab_size)
    named = dict(zip(("input_resolution", "context_length", "vocab_size"), sizes, strict=True))
    extras = {name: torch.tensor(size) for name, size in named.items()}
    torch.save({**_plain(model.state_dict()), **extras}, folder / OPENAI_WEIGHTS)


def openai_differences(model: Described) -> list[str]:
    """Return in words what OpenAI's package would do otherwise than a model."""
    vision, text = model.config.vision, model.config.text
    found = []
    if not model.config.quick_gelu:
        found.append("it has GELU, and OpenAI's models have QuickGELU")
    if model.logit_bias is not None:
        found.append("it has a logit bias")
    if others := model.config.beyond_openai:
        found.append(f"its towers have {', '.join(others)}")
    image_width = vision.width * (32 if vision.is_resnet else 1)
    for tower, width, heads in (
        ("image", image_width, vision.heads),
        ("text", text.width, text.heads),
    ):
        if width != _OPENAI_HEAD_WIDTH * heads:
            found.append(f"the heads of its {tower} tower are {width // heads} wide, not 64")
    # ResNets there have no other ratio, and Vision Transformers keep it in no shape that is read.
    ratios = [text.mlp_ratio] + ([] if vision.is_resnet else [vision.mlp_ratio])
    if any(ratio != 4 for ratio in ratios):
        found.append("its MLPs are not four times as wide as its towers")
    usual = {
        "mean": OPENAI_MEAN,
        "std": OPENAI_STD,
        "resize_mode": "shortest",
        "interpolation": "bicubic",
        "fill_color": 0,
    }
    if others := [name for name, value in model.images.items() if value != usual.get(name)]:
        found.append(f"its preprocessing has another {' and '.join(others)}")
    return found


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU that share no memory, as files of weights need them."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
