"""What weights say about their model wins: activation, heads, images, and the first scale and bias of a sigmoid loss."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from openclip import import_open_clip
from PIL import Image
from torch import Tensor, nn
from weight_files import WRITERS, QuickGELU, archive, extras_file, hf_folder, hub_folder, run_folder

from clipcore.towers.architectures import find_model
from clipcore.towers.convert import ConversionError
from clipcore.towers.descriptions import config_from_hf, hf_config, read_description
from clipcore.towers.factory import (
    create_model,
    create_model_and_transforms,
    create_model_from_pretrained,
)
from clipcore.towers.loading import load_checkpoint
from clipcore.towers.model import CLIP
from clipcore.towers.weights import read_weights

pytestmark = pytest.mark.fast

NAME = "ViT-nano-8-32"
QUICK = f"{NAME}-quickgelu"


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("said", [True, False], ids=["QuickGELU", "GELU"])
def test_the_stated_activation_wins_and_a_contradiction_names_the_right_one(
    tmp_path, writer, said, recwarn
):
    model = create_model(QUICK if said else NAME)
    path = WRITERS[writer](tmp_path / "weights", model)
    recwarn.clear()  # of torch's, about its traces
    right, wrong = (QUICK, NAME) if said else (NAME, QUICK)
    remedy = right if said else f"{right}, without --force-quick-gelu"
    for make in (create_model, create_model_and_transforms, create_model_from_pretrained):
        with pytest.raises(ValueError, match=rf"has {'Quick' * said}GELU, and .*; name {remedy}$"):
            make(wrong, path)
    with pytest.raises(ValueError, match="says that its model has"):
        load_checkpoint(create_model(wrong), path)

    images = torch.randn(2, 3, 32, 32)
    expected = model.encode_image(images)
    assert torch.equal(create_model(right, path).encode_image(images), expected)
    alone, _ = create_model_from_pretrained(None, path)
    assert alone.config.quick_gelu is said
    assert torch.equal(alone.encode_image(images), expected)
    assert not recwarn.list


def test_a_tower_that_looks_for_an_id_beyond_other_vocabularies_has_a_name():
    """The nano models have 514 tokens; its own name is that of the same shape with another ``eos_id``."""
    config = find_model("ViT-B-32")
    eos = dataclasses.replace(config.text, pool_type="eos", eos_id=49407)
    assert dataclasses.replace(config, text=eos).short_name == "ViT-768x12-32-224"


@pytest.mark.parametrize("write", [archive, extras_file])
def test_what_openai_released_has_quick_gelu(tmp_path, write):
    path = write(tmp_path / "ViT-B-32.pt", create_model(QUICK))
    with pytest.raises(ValueError, match=f"as OpenAI's files do: that its model .* name {QUICK}$"):
        create_model(NAME, path)
    assert create_model(QUICK, path).config.quick_gelu
    assert create_model_from_pretrained(None, path)[0].config.quick_gelu


def test_an_archive_with_both_activations_or_none_says_nothing(tmp_path):
    both = nn.Sequential(QuickGELU(), nn.GELU())
    for activation in (both, None):
        path = archive(tmp_path / "w.pt", create_model(NAME), activation, extras=False)
        assert read_weights(path).quick_gelu is None
        assert create_model(NAME, path) and create_model(QUICK, path)


def test_forced_sizes_do_not_hide_the_activation(tmp_path):
    path = hf_folder(tmp_path / "w", create_model(QUICK))
    with pytest.raises(ValueError, match=r"set force_quick_gelu \(--force-quick-gelu\)"):
        create_model(NAME, path, force_image_size=64)
    model = create_model(NAME, path, force_image_size=64, force_quick_gelu=True)
    assert model.visual.image_size == (64, 64)


def test_a_file_without_a_description_leaves_what_was_asked_for(tmp_path):
    model, _, transform = create_model_and_transforms(NAME, image_mean=(0.5, 0.5, 0.5))
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    load_checkpoint(model, tmp_path / "plain.pt")
    assert model.visual.image_mean == transform.mean == (0.5, 0.5, 0.5)


def test_the_right_name_is_that_of_the_described_model(tmp_path):
    path = run_folder(tmp_path / "r", create_model(QUICK))
    with pytest.raises(ValueError, match=f"and ViT-S-32 has GELU; name {QUICK}$"):
        create_model("ViT-S-32", path)


def test_heads_leave_no_trace_in_shapes_but_in_descriptions(tmp_path):
    config = create_model(NAME).config
    other = dataclasses.replace(config, text=dataclasses.replace(config.text, heads=4))
    path = hub_folder(tmp_path / "w", CLIP(other))
    with pytest.raises(ValueError, match="its text tower has 4 heads, and ViT-nano-8-32 has 2"):
        create_model(NAME, path)
    assert create_model_from_pretrained(None, path)[0].config.text.heads == 4


def test_keys_of_transformers_that_clipcore_does_not_have_are_refused():
    content = hf_config(create_model(NAME).config)
    assert config_from_hf({**content, "transformers_version": "5.0", "logit_scale_init_value": 2.6})
    for tower, key, value, message in (
        ("text_config", "hidden_act", "gelu_pytorch_tanh", "have gelu and gelu_pytorch_tanh"),
        ("vision_config", "num_channels", 1, "num_channels is 1; .* have 3"),
        ("text_config", "eos_token_id", 7, "eos_token_id is 7; .* largest id, 513"),
        ("text_config", "hidden_size", "32", "hidden_size is '32', not a whole number from 1"),
        ("text_config", "num_attention_heads", 0, "num_attention_heads is 0"),
    ):
        changed = {**content, tower: {**content[tower], key: value}}
        with pytest.raises(ConversionError, match=message):
            config_from_hf(changed)
    for tower in ("text", "vision"):
        changed = {
            **content,
            f"{tower}_config": {**content[f"{tower}_config"], "layer_norm_eps": 1e-6},
        }
        assert getattr(config_from_hf(changed), tower).norm_eps == 1e-6
        assert hf_config(config_from_hf(changed)) == changed
    # 2 is what old versions wrote; a null says nothing, and dropout changes nothing of what weights compute.
    for end in (2, None):
        text = {**content["text_config"], "eos_token_id": end, "attention_dropout": 0.1}
        assert config_from_hf({**content, "text_config": text}) == config_from_hf(content)


def test_unknown_parts_of_open_clips_model_are_refused(tmp_path):
    path = hub_folder(tmp_path / "w", create_model(NAME)) / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["model_cfg"]["multimodal_cfg"] = {"width": 8}
    path.write_text(json.dumps(content))
    with pytest.raises(ConversionError, match="multimodal_cfg"):
        read_description(path.parent)


# Images.

OTHER = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


def picture() -> Image.Image:
    """Twice as wide as high: a square one would hide how it becomes square."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 120, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["squash", "shortest", None])
def test_preprocessing_of_a_hub_folder_is_open_clips_to_the_bit(tmp_path, mode):
    import_open_clip()
    from open_clip.transform import PreprocessCfg, image_transform_v2

    images = {**OTHER, "size": 32, "interpolation": "bicubic", "fill_color": 0, "mode": "RGB"}
    if mode is not None:
        images["resize_mode"] = mode
    expected = image_transform_v2(PreprocessCfg(**images), is_train=False)(picture())
    path = hub_folder(tmp_path / "w", create_model(NAME), images)
    for name in (None, NAME):
        model, transform = create_model_from_pretrained(name, path)
        assert torch.equal(transform(picture()), expected)
        pixels = torch.from_numpy(transform.crop(picture()))[None]
        assert torch.equal(model.encode_image(pixels), model.encode_image(expected[None]))
    _, train, evaluation = create_model_and_transforms(NAME, path)
    assert torch.equal(evaluation(picture()), expected)
    assert (train.mean, train.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    forced = create_model_and_transforms(
        NAME, path, image_mean=(0, 0, 0), image_resize_mode="shortest"
    )
    assert forced[2].mean == (0, 0, 0) and forced[2].resize_mode == "shortest"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("interpolation", "nearest"),
        ("interpolation", "random"),
        ("resize_mode", "crop"),
        ("fill_color", 256),
        ("fill_color", [0, 0, 0]),
        ("size", 64),
        ("size", [32, 64]),
        ("mode", "L"),
        ("mean", [0.5]),
        ("std", [0.5, 0.5, 0.0]),
        ("std", 0.5),
        ("mean", [0.5, float("nan"), 0.5]),
        ("crop_pct", 0.9),
    ],
)
def test_preprocessing_that_clipcore_does_not_have_is_refused_by_its_key(tmp_path, key, value):
    path = hub_folder(tmp_path / "w", create_model(NAME), {key: value})
    for name in (None, NAME):
        with pytest.raises(ValueError, match=rf"open_clip_config.json: {key} is"):
            create_model_from_pretrained(name, path)


HF_IMAGES = {
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.2, 0.3, 0.4],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 32},
}


def test_preprocessing_of_transformers_is_honoured_or_refused(tmp_path):
    model = create_model(NAME)
    _, transform = create_model_from_pretrained(None, hf_folder(tmp_path / "w", model, HF_IMAGES))
    assert transform.resize_mode == "shortest" and transform.std == (0.2, 0.3, 0.4)
    old = {"crop_size": 32, "size": 32, "image_mean": [0.1, 0.2, 0.3]}
    _, transform = create_model_from_pretrained(NAME, hf_folder(tmp_path / "w", model, old))
    assert transform.mean == (0.1, 0.2, 0.3)
    # transformers 5 keeps it in another file.
    path = hf_folder(tmp_path / "five", model)
    (path / "processor_config.json").write_text(
        json.dumps({"image_processor": HF_IMAGES, "processor_class": "CLIPProcessor"})
    )
    _, transform = create_model_from_pretrained(None, path)
    assert transform.std == (0.2, 0.3, 0.4)
    squashed = {**HF_IMAGES, "size": {"height": 32, "width": 32}, "do_center_crop": False}
    _, transform = create_model_from_pretrained(None, hf_folder(tmp_path / "w", model, squashed))
    assert transform.resize_mode == "squash" and transform.interpolation == "bicubic"
    # Pillow's number of bilinear.
    path = hf_folder(tmp_path / "w", model, {**HF_IMAGES, "resample": 2})
    _, transform = create_model_from_pretrained(None, path)
    assert transform.interpolation == "bilinear"
    for key, value in (
        ("resample", 0),
        ("do_center_crop", False),
        ("do_normalize", False),
        ("do_resize", False),
        ("rescale_factor", 1.0),
        ("size", {"shortest_edge": 36}),
        ("crop_size", 28),
        ("image_std", None),
    ):
        path = hf_folder(tmp_path / "w", model, {**HF_IMAGES, key: value})
        with pytest.raises(ValueError, match=rf"preprocessor_config.json: {key} is"):
            create_model_from_pretrained(None, path)


# The first scale and bias.


def describe_bias(folder: Path, bias: float | None) -> None:
    """Let a hub's folder say that its model begins with a bias, or that it has none."""
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["model_cfg"]["init_logit_bias"] = bias
    path.write_text(json.dumps(content))


def test_a_bias_that_weights_lack_stays_as_it_was_asked_for(tmp_path):
    torch.save(create_model(NAME).state_dict(), tmp_path / "clip.pt")
    scale = create_model(NAME).logit_scale.item()
    model = create_model(NAME, init_logit_bias=-10.0)
    assert load_checkpoint(model, tmp_path / "clip.pt") == (["logit_bias"], [])
    assert (model.logit_scale.item(), model.logit_bias.item()) == (scale, -10.0)
    # An argument wins over the file, a whole number is one too; what is not given is the file's.
    model = create_model(NAME, tmp_path / "clip.pt", init_logit_scale=2, init_logit_bias=-10)
    assert (model.logit_scale.item(), model.logit_bias.item()) == (2.0, -10.0)
    model = create_model(NAME, tmp_path / "clip.pt", init_logit_bias=0.0)
    assert (model.logit_scale.item(), model.logit_bias.item()) == (scale, 0.0)


def test_a_bias_that_weights_have_is_kept_and_an_unwanted_one_named(tmp_path):
    trained = create_model(NAME, init_logit_scale=1.0, init_logit_bias=-3.0)
    torch.save(trained.state_dict(), tmp_path / "siglip.pt")
    with pytest.raises(ValueError, match=r"as SigLIP's do.*--siglip.*create_model_from_pretrained"):
        create_model(NAME, tmp_path / "siglip.pt")
    # By the message's own advice.
    model = create_model(NAME, init_logit_bias=0.0)
    assert load_checkpoint(model, tmp_path / "siglip.pt") == ([], [])
    alone, _ = create_model_from_pretrained(None, tmp_path / "siglip.pt")
    for found in (model, alone):
        assert (found.logit_scale.item(), found.logit_bias.item()) == (1.0, -3.0)


def test_a_bias_that_is_described_and_not_in_the_weights_is_no_model_without_one(tmp_path):
    folder = hub_folder(tmp_path, create_model(NAME))
    describe_bias(folder, -10)
    message = (
        f"open_clip_config.json says that its model has a logit_bias, which begins at -10, and {NAME} has none; make it "
        r"with init_logit_bias=-10 \(--siglip\)"
    )
    with pytest.raises(ValueError, match=message):
        create_model(NAME, folder)

    # Both remedies.
    for model in (
        create_model(NAME, folder, init_logit_bias=-10),
        create_model_from_pretrained(None, folder)[0],
    ):
        assert model.logit_bias.item() == -10


def test_a_bias_that_weights_have_and_their_description_does_not_is_named(tmp_path):
    folder = hub_folder(tmp_path, create_model(NAME, init_logit_bias=-3.0))
    describe_bias(folder, None)
    message = "says that its model has no logit_bias, and its weights have one"
    for name in (None, NAME):
        with pytest.raises(ValueError, match=message):
            create_model_from_pretrained(name, folder)

    # Both remedies.
    model = create_model(NAME, init_logit_bias=0.0)
    assert load_checkpoint(model, folder) == ([], []) and model.logit_bias.item() == -3
    describe_bias(folder, 0.0)
    assert create_model_from_pretrained(None, folder)[0].logit_bias.item() == -3


def test_whole_numbers_make_parameters_that_train():
    model = create_model(NAME, init_logit_scale=2, init_logit_bias=-10)
    assert model.logit_scale.dtype == model.logit_bias.dtype == torch.float32


def test_pixels_are_normalised_and_other_whole_numbers_refused():
    for name in (NAME, "RN-nano-32"):
        model = create_model(name).eval()
        with pytest.raises(ValueError, match=r"got torch.int64; .* normalize_images"):
            model.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.long))
        assert model.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 32)


def test_ids_of_another_vocabulary_are_named():
    model = create_model(NAME)
    for wrong in (514, -1, 49407):
        with pytest.raises(ValueError, match=f"the token {wrong} is not among the model's 514"):
            model.encode_text(torch.tensor([[512, 5, wrong]]))


def test_a_trace_of_the_text_tower_holds_for_longer_captions():
    model = create_model(NAME, precision="fp64").eval()

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, text: Tensor) -> Tensor:
            return self.model.encode_text(text)

    def captions(*lengths: int) -> Tensor:
        rows = torch.zeros(len(lengths), 77, dtype=torch.long)
        for row, length in zip(rows, lengths, strict=True):
            row[:length] = torch.arange(length) % 500
            row[length] = 513
        return rows

    traced = torch.jit.trace(Text(), captions(3, 5), check_trace=False)
    for lengths in ((40, 70), (2, 76), (9, 10)):
        expected = model.encode_text(captions(*lengths))
        torch.testing.assert_close(traced(captions(*lengths)), expected, rtol=1e-12, atol=1e-12)
