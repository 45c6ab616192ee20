"""SigLIP's towers against open_clip's with timm's image tower, and against transformers', from random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openclip import import_open_clip
from safetensors.torch import load_file
from torch import Tensor, nn

import clipcore
from clipcore.towers.architectures import ModelConfig, TextConfig, VisionConfig
from clipcore.towers.convert import to_custom_text, to_hf, to_open_clip_names
from clipcore.towers.loading import load_weights
from clipcore.towers.model import CLIP

pytestmark = pytest.mark.fast

VISION = VisionConfig(
    image_size=36,
    layers=2,
    width=32,
    patch_size=8,
    head_width=16,
    mlp_ratio=2.5,
    pool_type="map",
    norm_eps=1e-6,
)
TEXT = TextConfig(
    context_length=9,
    vocab_size=60,
    width=48,
    heads=3,
    layers=2,
    no_causal_mask=True,
    pool_type="last",
    proj_bias=True,
    norm_eps=1e-6,
)
NANO = ModelConfig(32, VISION, TEXT, init_logit_bias=-10)
TANH = dataclasses.replace(
    NANO,
    vision=dataclasses.replace(VISION, gelu_tanh=True),
    text=dataclasses.replace(TEXT, gelu_tanh=True),
)
TIMM_NAME = "vit_nano_patch8_siglip_36"


@pytest.fixture(scope="module")
def nano_of_timm() -> Iterator[None]:
    """Have timm know a tower of NANO's size, as it knows those of the published models."""
    import_open_clip()
    from timm.models import register_model
    from timm.models.vision_transformer import _create_vision_transformer

    def vit_nano_patch8_siglip_36(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        sizes = {"img_size": 36, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        kinds = {"mlp_ratio": 2.5, "class_token": False, "global_pool": "map"}
        made = {**sizes, **kinds, **kwargs}
        return _create_vision_transformer("vit_base_patch16_siglip_224", pretrained, **made)

    register_model(vit_nano_patch8_siglip_36)
    yield


def theirs_of(config: ModelConfig) -> nn.Module:
    """Return open_clip's model of the same shape, with random numbers in all of its weights."""
    open_clip = import_open_clip()
    content = config.to_dict()
    content.pop("custom_text")
    timm = {"timm_model_name": TIMM_NAME, "timm_pool": "map", "timm_proj": "none"}
    content["vision_cfg"] = {"image_size": 36, **timm}
    model = open_clip.CustomTextCLIP(**content)
    if config.vision.gelu_tanh:
        for part in model.visual.modules():
            if isinstance(part, nn.GELU):
                part.approximate = "tanh"
    return randomised(model).eval()


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("logit_"):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 3, 36, 36, dtype=dtype), torch.randint(0, 60, (3, 9))


def assert_close(ours: Tensor, theirs: Tensor, bound: float = 1e-12) -> None:
    largest = max(1.0, float(theirs.detach().abs().max()))
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= bound * largest


@pytest.mark.usefixtures("nano_of_timm")
@pytest.mark.parametrize("config", [NANO, TANH], ids=["SigLIP", "SigLIP2"])
def test_features_and_gradients_are_open_clips_in_float64(config: ModelConfig) -> None:
    theirs = theirs_of(config).double()
    ours = CLIP(config).double().eval()
    state = {name: value.detach() for name, value in theirs.state_dict().items()}
    load_weights(ours, to_open_clip_names(state), "theirs")
    images, tokens = inputs()
    for got, expected in zip(ours(images, tokens), theirs(images, tokens), strict=True):
        assert_close(got, expected)

    weights = torch.randn(3, 32, dtype=torch.float64)
    for model in (ours, theirs):
        image, text, *_ = model(images, tokens)
        ((image * weights).sum() + (text * weights).square().sum()).backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    found = to_open_clip_names({**gradients, "logit_scale": torch.zeros(())})
    for name, parameter in ours.named_parameters():
        if not name.startswith("logit_"):
            assert parameter.grad is not None, name
            assert_close(parameter.grad, found[name])

    # And back, into open_clip's.
    theirs.load_state_dict(to_custom_text(ours.state_dict()), strict=True)


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu"])
def test_features_are_those_of_transformers_in_float64(tmp_path: Path, act: str) -> None:
    import_open_clip()
    from transformers import SiglipConfig, SiglipModel

    described = SiglipConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 36,
            "patch_size": 8,
            "hidden_act": act,
        },
        text_config={
            "hidden_size": 48,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "vocab_size": 60,
            "max_position_embeddings": 9,
            "projection_size": 32,
            "hidden_act": act,
        },
    )
    theirs = randomised(SiglipModel(described)).eval()
    theirs.save_pretrained(tmp_path)
    ours, _ = clipcore.create_model_from_pretrained(None, tmp_path, precision="fp64")
    assert ours.config.shapes == (TANH if act == "gelu_pytorch_tanh" else NANO).shapes
    images, tokens = inputs()
    theirs = theirs.double()
    with torch.no_grad():
        assert_close(ours.encode_image(images), theirs.get_image_features(images).pooler_output)
        assert_close(ours.encode_text(tokens), theirs.get_text_features(tokens).pooler_output)
        found = theirs(input_ids=tokens, pixel_values=images)
        assert_close(ours.get_logits(images, tokens)[0], found.logits_per_image, 1e-11)
    written = to_hf(ours.float().state_dict())
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(written[name], value), name
