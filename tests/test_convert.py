"""Weights between open_clip's and transformers' layouts: bit for bit, both ways."""

from __future__ import annotations

import pytest
import torch

from clipcore.towers.architectures import find_model
from clipcore.towers.convert import (
    ConversionError,
    from_hf,
    infer_config,
    to_hf,
    to_open_clip_names,
)
from clipcore.towers.descriptions import config_from_hf, hf_config, read_description
from clipcore.towers.factory import create_model
from clipcore.towers.model import CLIP

pytestmark = pytest.mark.fast


def test_there_and_back_is_the_same_bits():
    state = create_model("ViT-nano-8-32").state_dict()
    back = from_hf(to_hf(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert to_open_clip_names(to_hf(state)).keys() == state.keys()


def test_names_and_shapes_of_transformers():
    """Spot checks, written out by hand from transformers' CLIPModel; 6 + 7 weights of the frame, 16 a block."""
    model = create_model("ViT-nano-8-32")
    found = to_hf(model.state_dict())
    assert len(found) == 14 + 16 * 4
    assert found["vision_model.pre_layrnorm.weight"].shape == (32,)
    assert found["text_projection.weight"].shape == (32, 32)
    assert torch.equal(found["visual_projection.weight"], model.visual.proj.T)
    packed = model.visual.transformer.blocks[1].attn.in_proj_weight
    assert torch.equal(
        found["vision_model.encoder.layers.1.self_attn.k_proj.weight"], packed[32:64]
    )
    assert found["text_model.encoder.layers.0.mlp.fc1.weight"].shape == (128, 32)
    assert found["vision_model.embeddings.position_embedding.weight"].shape == (17, 32)


def test_the_configuration_of_transformers():
    config = hf_config(create_model("ViT-nano-8-32", force_quick_gelu=True).config)
    assert config["text_config"]["hidden_act"] == "quick_gelu"
    assert config["vision_config"]["num_attention_heads"] == 2
    assert config["text_config"]["eos_token_id"] == 513


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-L-14-336", "ViT-H-14", "ViT-glyphs"])
def test_configurations_there_and_back(name):
    assert config_from_hf(hf_config(find_model(name))) == find_model(name)


def test_a_configuration_that_says_nothing_has_the_defaults_of_transformers():
    """Which are OpenAI's ViT-B/32."""
    assert config_from_hf({"model_type": "clip"}) == find_model("ViT-B/32")
    old = {"model_type": "clip", "vision_config_dict": {"patch_size": 16}, "text_config_dict": None}
    assert config_from_hf(old) == find_model("ViT-B/16")


# Of every family; a smaller model has all that a larger one's shapes show.
SHAPES = [
    *("RN50", "RN101", "RN50x4", "RN50x16", "ViT-S-32", "ViT-S-16-alt", "ViT-M-16-alt", "ViT-B-32"),
    *("ViT-B-16-plus-240", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-g-14", "ViT-L-14-CLIPA"),
    *("ViT-L-14-worldwide", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "ViT-B-16-SigLIP-i18n-256"),
    *("ViT-SO400M-14-SigLIP", "ViT-SO400M-16-SigLIP-i18n-256", "ViT-glyphs", "ViT-nano-8-32"),
]


@pytest.mark.parametrize("name", SHAPES)
def test_the_architecture_of_a_model_is_read_off_its_shapes(name):
    with torch.device("meta"):
        state = CLIP(find_model(name)).state_dict()
    if "logit_bias" in state:
        state["logit_bias"] = torch.tensor(-10.0)
    assert infer_config(state) == find_model(name)
    assert infer_config(state).describe() == name


def test_descriptions_of_other_models_are_refused(tmp_path):
    with pytest.raises(ConversionError, match="of a 'siglip2', whose images have no fixed size"):
        config_from_hf({"model_type": "siglip2"})
    with pytest.raises(ConversionError, match="of a 'blip', not of a clip or siglip"):
        config_from_hf({"model_type": "blip"})
    with pytest.raises(ConversionError, match="relu"):
        config_from_hf({"model_type": "clip", "text_config": {"hidden_act": "relu"}})
    assert read_description(tmp_path) is None
    (tmp_path / "config.json").write_text('{"batch_size": 64}')
    assert read_description(tmp_path) is None
    described = tmp_path / "open_clip_config.json"
    for content, message in (
        ("{", "is not JSON"),
        ("[1]", "no description"),
        ('{"model_cfg": {"embed_dim": 8}}', "no text_cfg, vision_cfg"),
        (
            '{"model_cfg": {"embed_dim": 8, "text_cfg": {}, "vision_cfg": {"timm_model_name": "x"}}}',
            "has timm_model_name 'x'",
        ),
    ):
        described.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_description(tmp_path)


def test_old_position_id_buffers_are_left_out():
    state = to_hf(create_model("ViT-nano-8-32").state_dict())
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    assert from_hf(state).keys() == create_model("ViT-nano-8-32").state_dict().keys()


@pytest.mark.parametrize(
    "name",
    [
        "visual_projection.bias",
        "vision_model.embeddings.patch_embedding.bias",
        "vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "text_model.encoder.layers.0.ls1.gamma",
        "logit_bias",
        "classifier.weight",
    ],
)
def test_a_tensor_that_no_clip_of_transformers_has_is_not_dropped(name):
    state = to_hf(create_model("ViT-nano-8-32").state_dict())
    state[name] = torch.ones(32)
    with pytest.raises(ConversionError, match=f"which has no {name}; merge an adapter"):
        to_open_clip_names(state)


def test_what_cannot_be_converted_says_why():
    with pytest.raises(ConversionError, match="ResNets"):
        to_hf(create_model("RN-nano-32").state_dict())
    with pytest.raises(ConversionError, match="not a CLIP"):
        to_open_clip_names({"fc.weight": torch.ones(2)})
    broken = to_hf(create_model("ViT-nano-8-32").state_dict())
    del broken["vision_model.pre_layrnorm.weight"]
    with pytest.raises(ConversionError, match="pre_layrnorm"):
        from_hf(broken)
    with pytest.raises(ConversionError, match="text_projection"):
        infer_config({})
