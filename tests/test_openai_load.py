"""``clipcore.load``: OpenAI's function, and a model that is called as theirs is."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from openclip import import_open_clip, theirs_of
from weight_files import picture, saved

import clipcore
from clipcore.towers import openai

pytestmark = pytest.mark.fast

NAME = "ViT-nano-8-32"
OPEN_CLIP = import_open_clip()


def openai_forward(model: Any, image: torch.Tensor, text: torch.Tensor) -> Any:
    """Return OpenAI's logits of open_clip's model, whose towers are OpenAI's."""
    image_features, text_features = model.encode_image(image), model.encode_text(text)
    image_features = image_features / image_features.norm(dim=1, keepdim=True)
    text_features = text_features / text_features.norm(dim=1, keepdim=True)
    logits = model.logit_scale.exp() * image_features @ text_features.t()
    return logits, logits.t()


def test_load_returns_openais_model(tmp_path: Path) -> None:
    signature = inspect.signature(clipcore.load)
    assert list(signature.parameters) == ["name", "device", "jit", "download_root"]
    source = clipcore.create_model(f"{NAME}-quickgelu", init_logit_scale=3.0)
    path = saved(tmp_path / "weights.pt", source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing states the activation: OpenAI's has QuickGELU
        model, preprocess = clipcore.load(path, "cpu")
    assert not model.training and isinstance(model, clipcore.CLIP) and model.config.quick_gelu
    assert model.visual.input_resolution == 32 and model.context_length == 77
    assert model.dtype == torch.float32 and model.logit_scale.item() == 3.0
    text = clipcore.get_tokenizer(NAME)(["a cat", "two dogs", "x"])
    image = torch.stack([preprocess(picture()), preprocess(picture(40, 40))])
    theirs = theirs_of(source).eval()
    theirs.load_state_dict(source.state_dict())
    expected = openai_forward(theirs.double(), image.double(), text)
    logits = model.double()(image.double(), text.int())
    for ours, other in zip(logits, expected, strict=True):
        assert (ours - other).abs().max() <= 1e-12
    assert logits[0].shape == (2, 3) and torch.equal(logits[0].T, logits[1])
    assert torch.equal(preprocess(picture()), OPEN_CLIP.image_transform(32, False)(picture()))

    with pytest.raises(ValueError, match=r"openaipublic.*/ViT-B-32\.pt, and give its path"):
        clipcore.load("ViT-B/32", download_root=tmp_path)
    with pytest.raises(ValueError, match=r"no file ViT-B-32; .* are RN50, .*ViT-L/14@336px"):
        clipcore.load("ViT-B-32", download_root=tmp_path)
    with pytest.raises(ValueError, match="exists only in OpenAI's package"):
        clipcore.load(path, jit=True)
    places = ("cuda", "cuda:1", torch.device("cuda"), "cpu", "meta")
    assert [openai.usual_precision(p) for p in places] == ["fp16"] * 3 + ["fp32"] * 2
    # A file that OpenAI's package has downloaded before.
    torch.save(source.state_dict(), tmp_path / "ViT-L-14-336px.pt")
    found, _ = clipcore.load("ViT-L/14@336px", device="cpu", download_root=tmp_path)
    assert torch.equal(found.visual.proj, source.visual.proj)


def test_loaded_logits_have_the_bias_of_the_weights(tmp_path: Path) -> None:
    source = clipcore.create_model(f"{NAME}-quickgelu", init_logit_bias=-3.0).eval()
    model, _ = clipcore.load(saved(tmp_path / "weights.pt", source), "cpu")
    text, image = clipcore.get_tokenizer(NAME)(["a cat", "two dogs"]), torch.randn(2, 3, 32, 32)
    expected, _ = source.double().get_logits(image.double(), text)
    found, _ = model.double()(image.double(), text)
    assert (found - expected).abs().max() <= 1e-12
