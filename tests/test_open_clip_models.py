"""All models of an installed open_clip: ours by name, or refused for the reason that the document gives."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from openclip import import_open_clip
from runs import ROOT
from torch import Tensor

import clipcore
from clipcore.towers.architectures import (
    ModelConfig,
    TextConfig,
    UnknownModelError,
    VisionConfig,
    find_model,
)
from clipcore.towers.convert import to_custom_text
from clipcore.towers.model import CLIP
from clipcore.towers.open_clip_models import OPEN_CLIP_MODELS, TIMM_TOWERS

pytestmark = pytest.mark.fast

OPEN_CLIP = import_open_clip()
FILES = sorted((Path(OPEN_CLIP.__file__).parent / "model_configs").glob("*.json"))
DESCRIPTIONS: dict[str, dict[str, Any]] = {f.stem: json.loads(f.read_text()) for f in FILES}


def is_ours(name: str) -> bool:
    try:
        ModelConfig.from_dict(DESCRIPTIONS[name])
    except ValueError:
        return False
    return True


def test_every_model_of_open_clip_is_listed_or_refused_for_the_documents_reason() -> None:
    document = (ROOT / "docs" / "from-open-clip.md").read_text()
    section = document.partition("## Models")[2].partition("\n## ")[0]
    reasons = {
        pattern: reason
        for names, reason in re.findall(r"^\| (`.*`) \| `(\w+)` \|", section, re.MULTILINE)
        for pattern in re.findall(r"`([^`]+)`", names)
    }
    left_out = set()
    for name, content in DESCRIPTIONS.items():
        if is_ours(name):
            config = ModelConfig.from_dict(content)
            assert find_model(name).to_dict() == config.to_dict(), name
            assert find_model(name) == config and name in clipcore.list_models()
            continue
        left_out.add(name)
        with pytest.raises(UnknownModelError):
            find_model(name)
        rows = {pattern for pattern in reasons if fnmatch.fnmatchcase(name, pattern)}
        assert len(rows) == 1, (name, rows)
        with pytest.raises(ValueError, match=f"has {reasons[rows.pop()]}") as caught:
            ModelConfig.from_dict(content)
        assert "\n" not in str(caught.value)
    # Every row is about a model, and the numbers in the text are these.
    assert all(fnmatch.filter(left_out, pattern) for pattern in reasons)
    numbers = f"{len(DESCRIPTIONS) - len(left_out)} of open_clip's {len(DESCRIPTIONS)}"
    assert numbers in section
    assert OPEN_CLIP_MODELS.keys() <= DESCRIPTIONS.keys()


def test_values_that_no_tower_has_are_refused_by_name() -> None:
    described = DESCRIPTIONS["ViT-B-16-SigLIP2"]
    nano = clipcore.get_model_config("ViT-nano-8-32")
    for start, tower, change, message in (
        (described, "vision_cfg", {"timm_pool": "avg"}, "timm_pool is 'avg', and the tower of"),
        (described, "vision_cfg", {"timm_proj": "linear"}, "timm_proj is 'linear'"),
        (described, "vision_cfg", {"timm_model_pretrained": True}, "timm_model_pretrained is True"),
        (described, "vision_cfg", {"image_size": 256}, "image_size is 256, .* has 224"),
        (described, "vision_cfg", {"layers": 11}, "layers is 11, .* has 12"),
        (described, "vision_cfg", {"timm_drop_path": 0.1}, "timm_drop_path is 0.1"),
        (described, "text_cfg", {"act_kwargs": {"approximate": "sin"}}, "gelu_tanh is 'sin'"),
        (described, "text_cfg", {"norm_kwargs": {"bias": False}}, "norm_kwargs has bias, which"),
        (described, "text_cfg", {"norm_kwargs": {"eps": 0}}, "eps is 0, not a number between"),
        (described, "text_cfg", {"tokenizer_kwargs": {"x": 1}}, "tokenizer_kwargs has x, which"),
        (described, "text_cfg", {"tokenizer_kwargs": {"clean": "x"}}, "clean is 'x'; .* canonical"),
        (described, "text_cfg", {"tokenizer_mode": "clips"}, "tokenizer_mode 'clips', which"),
        (described, "text_cfg", {"pool_type": "first"}, "pool_type is 'first'; .* argmax or eos"),
        (described, "text_cfg", {"proj_type": "none", "width": 96}, "no projection, is 96 wide"),
        (nano, "vision_cfg", {"pool_type": "none"}, "pool_type is 'none'; .* tok or avg or map"),
        (nano, "vision_cfg", {"pool_type": "map", "no_ln_pre": True}, "no_ln_pre=True goes with"),
        (nano, "vision_cfg", {"pool_type": "map", "width": 48}, "no projection, is 48 wide"),
        (nano, "text_cfg", {"pool_type": "eos", "eos_id": 514}, "eos_id is 514, not one of 514"),
        (
            clipcore.get_model_config("RN-nano-32"),
            "vision_cfg",
            {"pool_type": "avg"},
            "a ResNet has",
        ),
    ):
        changed = {**start, tower: {**start[tower], **change}}
        with pytest.raises(ValueError, match=message) as caught:
            ModelConfig.from_dict(changed)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="QuickGELU goes with neither"):
        ModelConfig.from_dict({**described, "quick_gelu": True})
    with pytest.raises(UnknownModelError):
        find_model("ViT-B-16-SigLIP-quickgelu")


@pytest.fixture
def one_block_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have open_clip make towers of timm with one block: all blocks are alike."""
    import timm

    whole = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: whole(name, depth=1, **kwargs))


@pytest.mark.usefixtures("one_block_of_timm")
def test_names_and_shapes_of_weights_are_open_clips() -> None:
    """On the device meta, which needs no memory, with one block a tower."""
    for name in filter(is_ours, DESCRIPTIONS):
        config, content = find_model(name), DESCRIPTIONS[name]
        vision, text = dict(content["vision_cfg"]), {**content["text_cfg"], "layers": 1}
        one = (1, 1, 1, 1) if config.vision.is_resnet else 1
        if config.vision.is_resnet or not config.vision.has_map:
            vision["layers"] = one
        config = dataclasses.replace(
            config,
            vision=dataclasses.replace(config.vision, layers=one),
            text=dataclasses.replace(config.text, layers=1),
        )
        is_custom = content.get("custom_text", False)
        make = OPEN_CLIP.CustomTextCLIP if is_custom else OPEN_CLIP.CLIP
        others = {k: v for k, v in content.items() if k in ("quick_gelu", "init_logit_bias")}
        with torch.device("meta"):
            ours = CLIP(config).state_dict()
            theirs = make(content["embed_dim"], vision, text, **others).state_dict()
        ours = to_custom_text(ours) if is_custom else ours
        assert shapes(ours) == shapes(theirs), name


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def test_the_towers_of_timm_are_what_their_names_stand_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm
    from timm.models import vision_transformer

    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        vision_transformer,
        "_create_vision_transformer",
        lambda name, **kwargs: asked.update(kwargs),
    )
    for name, fields in TIMM_TOWERS.items():
        tower = VisionConfig(**fields)
        asked.clear()
        getattr(vision_transformer, name)()
        assert (asked["patch_size"], asked["embed_dim"]) == (tower.patch_size, tower.width)
        assert (asked["depth"], asked["num_heads"]) == (tower.layers, tower.heads)
        assert asked.get("mlp_ratio", 4.0) == tower.mlp_ratio
        assert (asked.get("act_layer") == "gelu_tanh") is tower.gelu_tanh
        assert (asked["class_token"], asked["global_pool"]) == (False, "map")
        size = timm.get_pretrained_cfg(name).input_size
        assert size == (3, tower.image_size, tower.image_size)


SMALL = {"image_size": 40, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
WORDS = {"context_length": 9, "vocab_size": 60, "width": 48, "heads": 3, "layers": 2}
FAMILIES = {
    "layer scale": ModelConfig(
        24,
        VisionConfig(**SMALL, ls_init_value=0.3),
        TextConfig(**WORDS, ls_init_value=0.2),
    ),
    "layer scale, QuickGELU": ModelConfig(
        24, VisionConfig(**SMALL, ls_init_value=0.3), TextConfig(**WORDS), True
    ),
    "CLIPA": ModelConfig(
        24,
        VisionConfig(**SMALL, no_ln_pre=True, pool_type="avg", final_ln_after_pool=True),
        TextConfig(**WORDS, no_causal_mask=True, pool_type="last"),
    ),
    "mean of the normalised": ModelConfig(
        24,
        VisionConfig(**SMALL, pool_type="avg", norm_eps=1e-3),
        TextConfig(**WORDS, pool_type="last", proj_bias=True, gelu_tanh=True),
    ),
    "worldwide": ModelConfig(
        24,
        VisionConfig(**SMALL, gelu_tanh=True, mlp_ratio=4.3637),
        TextConfig(**WORDS, pool_type="eos", eos_id=2, norm_eps=1e-4),
    ),
    "text without projection": ModelConfig(
        48, VisionConfig(**SMALL, no_ln_pre=True), TextConfig(**WORDS, proj_type="none")
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_features_and_gradients_are_open_clips_in_float64(family: str) -> None:
    config = FAMILIES[family]
    theirs = OPEN_CLIP.CLIP(**config.to_dict())
    with torch.no_grad():
        for parameter in theirs.parameters():
            # What starts at zero or one would hide a mistake.
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs = theirs.double().eval()
    ours = CLIP(config).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(3, 3, 40, 40, dtype=torch.float64)
    tokens = torch.randint(3, 60, (3, 9))
    tokens[0, 4], tokens[1, 8] = 2, 2
    tokens[0, 5:] = 1

    found = []
    for model in (ours, theirs):
        image, text = model.encode_image(images), model.encode_text(tokens)
        (image.square().sum() + (text * image.detach()).sum()).backward()
        found.append(
            (image.detach(), text.detach(), {n: p.grad for n, p in model.named_parameters()})
        )
    (image, text, grads), (their_image, their_text, their_grads) = found
    assert_close(image, their_image)
    assert_close(text, their_text)
    assert grads.keys() == their_grads.keys()
    for name, grad in grads.items():
        if their_grads[name] is None:
            assert name == "logit_scale" and grad is None
        else:
            assert grad is not None, name
            assert_close(grad, their_grads[name])

    for key in ("image", "text"):
        given = {key: images if key == "image" else tokens}
        own, other = ours.forward_intermediates(**given), theirs.forward_intermediates(**given)
        assert_close(own[f"{key}_features"], other[f"{key}_features"])
        for got, expected in zip(
            own[f"{key}_intermediates"], other[f"{key}_intermediates"], strict=True
        ):
            assert_close(got, expected)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Check agreement to 1e-12 of the largest number, or of 1."""
    largest = max(1.0, float(theirs.detach().abs().max()))
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-12 * largest
