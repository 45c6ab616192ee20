"""``forward_intermediates``: the outputs of single blocks, with open_clip's arguments, keys and values."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from openclip import import_open_clip, theirs_of

import clipcore

pytestmark = pytest.mark.fast

NAME = "ViT-nano-8-32"
OPEN_CLIP = import_open_clip()


INTERMEDIATES: list[dict[str, Any]] = [
    {},
    {"image_indices": 1, "text_indices": 2, "normalize": False},
    {"image_indices": [-1, 0], "text_indices": [0], "image_output_extra_tokens": True},
    {"image_output_fmt": "NLC", "normalize_intermediates": True, "image_output_extra_tokens": True},
    {"intermediates_only": True, "output_logits": True, "text_output_extra_tokens": True},
    {"image_indices": [0], "stop_early": True},
    {"output_logits": True, "output_logit_scale_bias": True},
]


@pytest.mark.parametrize("bias", [None, -3.0])
@pytest.mark.parametrize("more", INTERMEDIATES, ids=lambda more: ",".join(more) or "none")
@pytest.mark.parametrize("name", [f"{NAME}-quickgelu", "RN-nano-32"])
def test_intermediates_are_open_clips_to_1e_12(
    name: str, more: dict[str, Any], bias: float | None
) -> None:
    torch.manual_seed(0)
    if name == "RN-nano-32":
        if more.get("image_output_fmt") == "NLC":
            more = {**more, "image_output_fmt": "NCHW"}
        # Open_clip's stops where it should not, and fails unless the last stage is chosen.
        if more.get("stop_early"):
            more = {"image_indices": [0, 4], "stop_early": True}
    model = clipcore.create_model(name, precision="fp64", init_logit_bias=bias).eval()
    theirs = theirs_of(model).double().eval()
    theirs.load_state_dict(model.state_dict())
    if name == "RN-nano-32":
        for block in model.visual.modules():
            if hasattr(block, "bn3"):
                torch.nn.init.normal_(block.bn3.weight)
        theirs.load_state_dict(model.state_dict())
    image = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    text = clipcore.get_tokenizer(NAME)(["a cat", "two dogs", "x"])
    found = model.forward_intermediates(image, text, **more)
    expected = theirs.forward_intermediates(image, text, **more)
    assert list(found) == list(expected)
    for key, value in expected.items():
        ours = found[key] if isinstance(value, list) else [found[key]]
        for mine, other in zip(ours, value if isinstance(value, list) else [value], strict=True):
            assert mine.shape == other.shape, key
            # Logits are up to 14 times a cosine, and a stage's outputs larger than 1.
            assert (mine - other).abs().max() <= 1e-12 * max(1, other.abs().max().item()), key


def test_intermediates_of_one_side_and_what_there_is_not() -> None:
    ours = inspect.signature(clipcore.CLIP.forward_intermediates).parameters.values()
    theirs = inspect.signature(OPEN_CLIP.CLIP.forward_intermediates).parameters.values()
    assert [(a.name, a.default) for a in ours] == [(a.name, a.default) for a in theirs]
    model, image = clipcore.create_model(NAME), torch.randn(2, 3, 32, 32)
    text = clipcore.get_tokenizer(NAME)(["a cat", "two dogs"])
    assert model.forward_intermediates(image).keys() == {"image_intermediates", "image_features"}
    assert model.forward_intermediates(None, text).keys() == {"text_intermediates", "text_features"}
    for more, message in (
        ({"output_logits": True}, "needs both image and text"),
        ({"image_indices": 3}, "has 2 blocks, so not the last 3"),
        ({"image_indices": [2]}, "blocks are 0 to 1"),
        ({"image_indices": []}, "blocks are 0 to 1"),
        ({"image_output_fmt": "NHWC"}, "is NCHW or NLC"),
        ({"text_output_fmt": "NCHW"}, "is NLC"),
    ):
        with pytest.raises(ValueError, match=message):
            model.forward_intermediates(image, **more)
    with pytest.raises(ValueError, match="not packed captions"):
        model.forward_intermediates(None, clipcore.pack_captions(text))
    dropping = clipcore.create_model(NAME, force_patch_dropout=0.5)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        dropping.forward_intermediates(image)
    resnet = clipcore.create_model("RN-nano-32").eval()
    with pytest.raises(ValueError, match="give intermediates_only=True too"):
        resnet.forward_intermediates(image, image_indices=[0], stop_early=True)
    early = resnet.forward_intermediates(
        image, image_indices=[0], stop_early=True, intermediates_only=True
    )
    assert early["image_intermediates"][0].shape == (2, 8, 8, 8)


@pytest.mark.parametrize("stop_early", [False, True])
def test_stopping_early_runs_no_more_blocks(stop_early: bool) -> None:
    model, called = clipcore.create_model(NAME), []
    for i, block in enumerate(model.visual.transformer.blocks):
        block.register_forward_hook(lambda *_, i=i: called.append(i))
    image = torch.randn(2, 3, 32, 32)
    model.forward_intermediates(image, image_indices=[0], stop_early=stop_early)
    assert called == ([0] if stop_early else [0, 1])


def test_checkpointed_intermediates_have_the_same_gradients() -> None:
    model, image = clipcore.create_model(NAME, precision="fp64"), torch.randn(2, 3, 32, 32).double()
    gradients = []
    for is_checkpointed in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(is_checkpointed)
        found = model.forward_intermediates(image, intermediates_only=True)["image_intermediates"]
        sum(y.sin().sum() for y in found).backward()
        gradients.append(model.visual.conv1.weight.grad.clone())
    assert torch.equal(*gradients)
