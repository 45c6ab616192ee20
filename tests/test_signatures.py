"""The functions that users of open_clip and OpenAI's CLIP call: their arguments, in their order, and what they do."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openclip import import_open_clip, theirs_of
from runs import ROOT
from weight_files import hub_folder, picture, run_folder, saved

import clipcore
from clipcore.data.transforms import ImageTransform
from clipcore.towers import architectures, open_clip_arguments, published

pytestmark = pytest.mark.fast

NAME = "ViT-nano-8-32"
# A module-wide oracle: open_clip imports torchvision, which takes seconds.
OPEN_CLIP = import_open_clip()

FUNCTIONS = {
    "create_model": OPEN_CLIP.create_model,
    "create_model_and_transforms": OPEN_CLIP.create_model_and_transforms,
    "create_model_from_pretrained": OPEN_CLIP.create_model_from_pretrained,
    "load_checkpoint": OPEN_CLIP.load_checkpoint,
    "image_transform": OPEN_CLIP.image_transform,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_open_clip_is_taken_in_its_place(name: str) -> None:
    ours = list(inspect.signature(getattr(clipcore, name)).parameters.values())
    theirs = list(inspect.signature(FUNCTIONS[name]).parameters.values())
    for place, argument in enumerate(theirs):
        if argument.kind is argument.VAR_KEYWORD:
            assert ours[-1].kind is argument.kind
            continue
        assert (ours[place].name, ours[place].kind) == (argument.name, argument.kind)
        assert ours[place].default == argument.default, argument.name
    # Our own come after them, by keyword.
    more = [a for a in ours[len(theirs) :] if a.kind is not a.VAR_KEYWORD]
    assert all(argument.kind is argument.KEYWORD_ONLY for argument in more)


# --- create_model ---


def test_precision_in_the_place_of_open_clip_2_is_named() -> None:
    with pytest.raises(ValueError, match=r"load_weights is 'bf16'.*precision=\.\.\."):
        clipcore.create_model(NAME, None, "bf16")  # type: ignore[arg-type]
    for pretrained in ("", "no/such/file.pt"):
        clipcore.create_model(NAME, pretrained, load_weights=not pretrained)
    model = clipcore.create_model(NAME, None, True, "pure_bf16")
    assert model.logit_scale.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["hub", "run"])
def test_a_local_folder_is_a_model_with_weights(tmp_path: Path, kind: str) -> None:
    source = clipcore.create_model(NAME, force_quick_gelu=True, force_image_size=40).eval()
    images = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "resize_mode": "squash"}
    if kind == "run":
        source.set_images({**images, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)})
        folder = run_folder(tmp_path / "run", source)
    else:
        folder = hub_folder(tmp_path / "hub", source, images)
    name = f"local-dir:{folder}"
    for make in (
        lambda: clipcore.create_model(name),
        lambda: clipcore.create_model_and_transforms(name)[0],
        lambda: clipcore.create_model_from_pretrained(name, return_transform=False),
    ):
        model = make()
        assert model.config == source.config and model.images["resize_mode"] == "squash"
        for key, value in source.state_dict().items():
            assert torch.equal(model.state_dict()[key], value)
    assert clipcore.create_model_from_pretrained(name)[1].mean == (0.5, 0.4, 0.3)
    assert clipcore.get_model_config(name) == source.config.to_dict()

    # A new model of the same shape, and one with longer position embeddings.
    fresh = clipcore.create_model(name, load_weights=False)
    assert fresh.config == source.config and fresh.images["resize_mode"] == "squash"
    assert not torch.equal(fresh.visual.proj, source.visual.proj)
    larger = clipcore.create_model(name, force_image_size=64, init_logit_scale=1.5)
    assert larger.visual.image_size == (64, 64) and larger.logit_scale.item() == 1.5
    assert torch.equal(larger.visual.proj, source.visual.proj)


def test_what_a_local_folder_cannot_be_is_named(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", clipcore.create_model(NAME))
    with pytest.raises(ValueError, match="leave pretrained=openai out"):
        clipcore.create_model(f"local-dir:{folder}", "openai")
    with pytest.raises(ValueError, match="there is no folder"):
        clipcore.create_model(f"local-dir:{folder / 'none'}")
    with pytest.raises(ValueError, match="nothing follows 'local-dir:'"):
        clipcore.create_model("local-dir:")
    with pytest.raises(ValueError, match="has GELU; leave out force_quick_gelu"):
        clipcore.create_model(f"local-dir:{folder}", force_quick_gelu=True)


def test_hub_names_and_tags_say_how_to_get_the_file() -> None:
    with pytest.raises(
        ValueError, match=r"hf download org/name --local-dir name, .* local-dir:name"
    ):
        clipcore.create_model("hf-hub:org/name")
    repository = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    with pytest.raises(ValueError, match=f"hf download {repository} --local-dir"):
        clipcore.create_model("ViT-B-32", "laion2b_s34b_b79k")
    with pytest.raises(ValueError, match=r"hf download timm/vit_base_patch32_clip_224\.openai"):
        clipcore.create_model("ViT-B/32", "openai")
    with pytest.raises(ValueError, match="no weights 'openai' for ViT-S-32"):
        clipcore.create_model("ViT-S-32", "openai")
    with pytest.raises(ValueError, match="published weights, download them"):
        clipcore.create_model(NAME, "no_such_tag")


def test_every_published_place_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = OPEN_CLIP.pretrained._PRETRAINED
    pairs = clipcore.list_pretrained()
    assert ("ViT-B-32", "openai") in pairs and set(pairs) <= set(OPEN_CLIP.list_pretrained())
    assert clipcore.list_pretrained(as_str=True) == [":".join(pair) for pair in pairs]
    for model, tag in pairs:
        remedy = published.how_to_get(model, tag)
        entry = theirs[model][tag]
        source = entry["hf_hub"].rpartition("/")[0] or entry["url"]
        assert (
            remedy is not None and source in remedy and entry["hf_hub"].rpartition("/")[2] in remedy
        )
    with monkeypatch.context() as patch:
        entry = {"hf_hub": "org/repository/file.pt"}
        patch.setattr(published, "_table", lambda: {"ViT-B-32": {"a_tag": entry}})
        found = published.how_to_get("ViT-B-32", "a-tag")
        assert found is not None and "hf download org/repository file.pt --local-dir" in found
        assert "give repository/file.pt as pretrained" in found
    # Without open_clip only the names of OpenAI's files are known.
    monkeypatch.setattr(published, "open_clip_file", lambda _: None)
    assert clipcore.list_pretrained() == []
    assert "give OpenAI's file, ViT-L-14-336px.pt" in str(
        published.how_to_get("ViT-L-14-336", "openai")
    )
    assert published.how_to_get("ViT-B-32", "laion2b_s34b_b79k") is None
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        clipcore.IMAGENET_CLASSNAMES  # noqa: B018


def test_force_custom_text_is_noted_once() -> None:
    open_clip_arguments.note_custom_text.cache_clear()
    with pytest.warns(UserWarning, match="force_custom_text changes nothing"):
        clipcore.create_model(NAME, force_custom_text=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clipcore.create_model(NAME, force_custom_text=True)


def test_a_forced_preprocessing_is_open_clips_dict() -> None:
    forced = {
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.1),
        "interpolation": "bilinear",
        "resize_mode": "longest",
        "fill_color": 9,
        "size": 32,
        "mode": None,
    }
    ours = clipcore.create_model(NAME, force_preprocess_cfg=forced)
    described = clipcore.get_model_config(NAME)
    OPEN_CLIP.factory._MODEL_CONFIGS[NAME] = described
    try:
        theirs = OPEN_CLIP.create_model(NAME, force_preprocess_cfg={**forced, "size": (32, 32)})
        plain = OPEN_CLIP.create_model(NAME)
    finally:
        del OPEN_CLIP.factory._MODEL_CONFIGS[NAME]
    assert clipcore.get_model_preprocess_cfg(ours) == OPEN_CLIP.get_model_preprocess_cfg(theirs)
    assert clipcore.create_model(NAME).visual.preprocess_cfg == plain.visual.preprocess_cfg
    listed = clipcore.create_model(NAME, force_preprocess_cfg={"mean": [0, 1, 0.5], "std": 1})
    assert listed.images == {"mean": (0.0, 1.0, 0.5), "std": (1.0, 1.0, 1.0)}
    assert clipcore.get_model_tokenize_cfg(ours) == OPEN_CLIP.get_model_tokenize_cfg(theirs)
    for wrong, message in (
        ({"size": 48}, "give force_image_size=48"),
        ({"mode": "L"}, "images are RGB"),
        ({"interpolation": "nearest"}, "interpolation is bicubic or bilinear"),
        ({"resize_mode": "crop"}, "resize mode is shortest or squash or longest"),
        ({"fill_color": 256}, "fill_color is a whole number"),
        ({"mean": (0, 0)}, "three numbers each"),
    ):
        with pytest.raises(ValueError, match=message):
            clipcore.create_model(NAME, force_preprocess_cfg=wrong)
    with pytest.raises(TypeError, match="force_preprocess_cfg is a dict"):
        clipcore.create_model(NAME, force_preprocess_cfg=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no key 'resizemode'; did you mean resize_mode"):
        clipcore.create_model(NAME, force_preprocess_cfg={"resizemode": "squash"})


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_transforms_of_a_model_are_open_clips_to_the_bit(mode: str, interpolation: str) -> None:
    _, train, ours = clipcore.create_model_and_transforms(
        NAME, image_interpolation=interpolation, image_resize_mode=mode, image_mean=(0.5, 0.4, 0.3)
    )
    theirs = OPEN_CLIP.image_transform(
        32, False, mean=(0.5, 0.4, 0.3), resize_mode=mode, interpolation=interpolation
    )
    for width, height in ((60, 40), (31, 99), (32, 32), (5, 7), (300, 20)):
        assert torch.equal(ours(picture(width, height)), theirs(picture(width, height)))
    # Random crops stay bicubic.
    plain = clipcore.image_transform(32, True, mean=(0.5, 0.4, 0.3))
    crops = [t(picture(), np.random.default_rng(3)) for t in (train, plain)]
    assert torch.equal(*crops)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_description_of_each_mode_is_honoured(
    tmp_path: Path, mode: str, interpolation: str
) -> None:
    images = {"resize_mode": mode, "interpolation": interpolation, "fill_color": 7}
    folder = hub_folder(tmp_path / "hub", clipcore.create_model(NAME), images)
    theirs = OPEN_CLIP.image_transform(
        32, False, resize_mode=mode, interpolation=interpolation, fill_color=7
    )
    for name in (None, NAME):
        model, ours = clipcore.create_model_from_pretrained(name, folder)
        assert torch.equal(ours(picture()), theirs(picture()))
        pixels = torch.from_numpy(ours.crop(picture()))[None]
        assert torch.equal(model.encode_image(pixels), model.encode_image(theirs(picture())[None]))
    again = clipcore.create_model(f"local-dir:{run_folder(tmp_path / 'run', model)}")
    assert again.images == model.images


def test_defaults_leave_a_cache_of_features_valid() -> None:
    """Features are cached under the attributes of the transform: new ones appear with other values only."""
    assert not {"interpolation", "fill_color"} & vars(ImageTransform(32, False)).keys()
    other = ImageTransform(32, False, interpolation="bilinear", fill_color=1)
    assert {"interpolation", "fill_color"} <= vars(other).keys()


# --- One tower's weights ---


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("kind", ["own", "whole", "custom", "transformers"])
def test_one_towers_weights_load_from_its_own_or_a_whole_clip(
    tmp_path: Path, tower: str, kind: str
) -> None:
    from clipcore.towers.convert import to_hf

    source, model = clipcore.create_model(NAME), clipcore.create_model(NAME)
    state = source.state_dict()
    is_text = {name: not name.startswith(("visual.", "logit_")) for name in state}
    if kind == "custom":
        state = {f"text.{name}" if is_text[name] else name: v for name, v in state.items()}
    elif kind == "transformers":
        state = to_hf(state)
    elif kind == "own" and tower == "image":
        state = source.visual.state_dict()
    elif kind == "own":
        state = {name: value for name, value in state.items() if is_text[name]}
    torch.save(state, tmp_path / "tower.pt")
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    found = clipcore.create_model(
        NAME, tmp_path / "whole.pt", **{f"pretrained_{tower}_path": tmp_path / "tower.pt"}
    )
    for name, value in found.state_dict().items():
        is_mine = name.startswith("visual.") if tower == "image" else is_text[name]
        assert torch.equal(value, (source if is_mine else model).state_dict()[name]), name


def test_one_towers_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    visual = clipcore.create_model(NAME).visual.state_dict()
    torch.save(visual, tmp_path / "visual.pt")
    with pytest.raises(
        ValueError, match=r"do not fit the text tower of ViT-nano-8-32: .* is missing"
    ):
        clipcore.create_model(NAME, pretrained_text_path=tmp_path / "visual.pt")
    with pytest.raises(ValueError, match="do not fit the image tower of RN-nano-32"):
        clipcore.create_model("RN-nano-32", pretrained_image_path=tmp_path / "visual.pt")
    torch.save({**visual, "more": torch.zeros(1)}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=r"visual\.more is unknown"):
        clipcore.create_model(NAME, pretrained_image_path=tmp_path / "more.pt")
    quick = hub_folder(tmp_path / "quick", clipcore.create_model(f"{NAME}-quickgelu"))
    with pytest.raises(ValueError, match="its model has QuickGELU"):
        clipcore.create_model(NAME, pretrained_image_path=quick)
    with pytest.raises(ValueError, match="require_pretrained asks for weights"):
        clipcore.create_model(
            NAME, pretrained_image_path=tmp_path / "visual.pt", require_pretrained=True
        )


# --- The rest of create_model ---


def test_open_clips_keys_of_a_model_replace_the_architectures() -> None:
    vision = {"image_size": 48, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8}
    text = OPEN_CLIP.CLIPTextCfg(context_length=9, vocab_size=70, width=16, heads=2, layers=1)
    model = clipcore.create_model(
        NAME,
        force_image_size=64,
        embed_dim=8,
        quick_gelu=True,
        vision_cfg=vision,
        text_cfg=text,
        nonscalar_logit_scale=False,
        init_logit_scale=2.0,
    )
    theirs = OPEN_CLIP.CLIP(8, OPEN_CLIP.CLIPVisionCfg(**vision), text, quick_gelu=True)
    assert model.config.quick_gelu and model.visual.image_size == (48, 48)
    theirs.load_state_dict(model.state_dict())
    # open_clip's default where a description does not say it.
    no_patch = {key: value for key, value in vision.items() if key != "patch_size"}
    assert clipcore.create_model(NAME, vision_cfg=no_patch).config.vision.patch_size == 16
    with pytest.raises(ValueError, match="timm_model_name 'resnet18', which clipcore's towers"):
        clipcore.create_model(NAME, vision_cfg={"timm_model_name": "resnet18"})
    square = {**vision, "image_size": [48, 48]}
    assert clipcore.create_model(NAME, vision_cfg=square).config.vision.image_size == 48
    for size in ([48, 32], [48], [[48], [48]], [{}, {}], []):
        with pytest.raises(ValueError, match=r"image_size is .*, not a whole number"):
            clipcore.create_model(NAME, vision_cfg={**vision, "image_size": size})


@pytest.mark.parametrize("tower", ["vision_cfg", "text_cfg"])
def test_every_key_of_open_clips_towers_is_known(tower: str) -> None:
    theirs = OPEN_CLIP.CLIPVisionCfg if tower == "vision_cfg" else OPEN_CLIP.CLIPTextCfg
    ours = architectures.VisionConfig if tower == "vision_cfg" else architectures.TextConfig
    absent, qualifying = architectures.ABSENT[tower], architectures.QUALIFYING[tower]
    own = {field.name for field in dataclasses.fields(ours)}
    # What open_clip has as objects.
    inner = {"norm_eps", "gelu_tanh", "clean", "strip_sep_token"}
    objects = {"norm_kwargs", "act_kwargs"} | (
        {"tokenizer_kwargs"} if tower == "text_cfg" else set()
    )
    own = own - inner | objects
    defaults = dataclasses.asdict(theirs())
    assert defaults.keys() == own | absent.keys() | qualifying
    assert all(defaults[name] == value for name, value in absent.items())
    # Said with their defaults they change nothing; said otherwise they are refused.
    described = clipcore.get_model_config(NAME)
    full = {**described, tower: {**defaults, **described[tower]}}
    assert architectures.ModelConfig.from_dict(full) == architectures.find_model(NAME)
    for name in absent:
        other = {**described, tower: {**described[tower], name: "other"}}
        with pytest.raises(
            ValueError, match=f"{name} 'other', which clipcore's towers do not have"
        ):
            architectures.ModelConfig.from_dict(other)


# --- load_checkpoint ---


def test_load_checkpoint_returns_open_clips_keys(tmp_path: Path) -> None:
    source = clipcore.create_model(NAME)
    model = clipcore.create_model(NAME)
    assert clipcore.load_checkpoint(model, saved(tmp_path / "weights.pt", source)) == ([], [])
    assert torch.equal(model.visual.proj, source.visual.proj)

    state = source.state_dict()
    dropped = ["visual.proj", "token_embedding.weight", "logit_scale"]
    partial = {name: value for name, value in state.items() if name not in dropped}
    partial["extra.weight"] = torch.zeros(3)
    torch.save(partial, tmp_path / "partial.pt")
    ours, theirs = clipcore.create_model(NAME), theirs_of(source)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(ValueError):
        clipcore.load_checkpoint(ours, tmp_path / "partial.pt")
    found = clipcore.load_checkpoint(ours, tmp_path / "partial.pt", strict=False)
    expected = OPEN_CLIP.load_checkpoint(theirs, str(tmp_path / "partial.pt"), strict=False)
    assert sorted(found.missing_keys) == sorted(expected.missing_keys)
    assert found.unexpected_keys == expected.unexpected_keys == ["extra.weight"]
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name] if name in dropped else state[name]), name

    torch.save({**partial, "ln_final.weight": torch.zeros(5)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"ln_final.weight is \[5\] .* shapes are not left out"):
        clipcore.load_checkpoint(ours, tmp_path / "other.pt", strict=False)
    with pytest.raises(ValueError, match="weights_only=False exists only in open_clip"):
        clipcore.load_checkpoint(ours, tmp_path / "partial.pt", weights_only=False)


def test_defaults_of_open_clip_need_no_name(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", clipcore.create_model(NAME))
    plain = {"pretrained_image": False, "pretrained_text": True, "load_weights": True}
    model, _ = clipcore.create_model_from_pretrained(None, folder, **plain)
    assert model.config == clipcore.create_model(NAME).config
    with pytest.raises(ValueError, match="load_weights needs the name of the model"):
        clipcore.create_model_from_pretrained(None, folder, load_weights=False)


def test_create_model_from_pretrained_returns_the_model_alone(tmp_path: Path) -> None:
    path = saved(tmp_path / "weights.pt", clipcore.create_model(NAME))
    model = clipcore.create_model_from_pretrained(NAME, path, return_transform=False)
    assert isinstance(model, clipcore.CLIP) and not model.training
    folder = hub_folder(tmp_path / "hub", model)
    alone = clipcore.create_model_from_pretrained(None, folder, return_transform=False)
    assert isinstance(alone, clipcore.CLIP)
    with pytest.raises(ValueError, match="require_pretrained asks for weights"):
        clipcore.create_model_from_pretrained(NAME)


# --- image_transform ---


def test_image_transform_takes_open_clips_augmentation() -> None:
    ours = clipcore.image_transform(32, True, aug_cfg={"scale": [0.2, 0.5], "ratio": (1, 1)})
    assert (ours.scale, ours.ratio) == ((0.2, 0.5), (1, 1))
    # Their own object, and None for a default.
    theirs = OPEN_CLIP.AugmentationCfg(scale=(0.3, 0.6))
    default = ImageTransform(32, True)
    ours = clipcore.image_transform((32, 32), True, aug_cfg=theirs)
    assert (ours.scale, ours.ratio, ours.image_size) == ((0.3, 0.6), default.ratio, 32)
    _, train, _ = clipcore.create_model_and_transforms(NAME, aug_cfg=theirs)
    assert train.scale == (0.3, 0.6)
    fields = {field.name for field in dataclasses.fields(theirs)} - {"scale", "ratio"}
    for name in fields:
        clipcore.image_transform(32, True, aug_cfg={name: None})
        with pytest.raises(ValueError, match=f"aug_cfg's {name}=0.5 exists only in open_clip"):
            clipcore.image_transform(32, True, aug_cfg={name: 0.5})
    with pytest.raises(TypeError, match="no key 'color_jiter'; did you mean color_jitter"):
        clipcore.image_transform(32, True, aug_cfg={"color_jiter": 0.4})
    assert clipcore.image_transform(32, False, mean=0.5, std=0.25).mean == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"square, got \(32, 48\)"):
        clipcore.image_transform((32, 48), False)
    for size in ("224", 0, 1.5, None, ([32], [32])):
        with pytest.raises(ValueError, match="side of the images is a number of pixels"):
            clipcore.image_transform(size, False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scale is a pair such as \(0.9, 1.0\), got 0.5"):
        clipcore.image_transform(32, True, aug_cfg={"scale": 0.5})


# --- Tokenizers ---


def test_get_tokenizer_takes_open_clips_arguments(tmp_path: Path) -> None:
    ours = inspect.signature(clipcore.get_tokenizer).parameters
    theirs = [
        argument
        for argument in inspect.signature(OPEN_CLIP.get_tokenizer).parameters.values()
        if argument.kind is not argument.VAR_KEYWORD
    ]
    for (name, mine), argument in zip(ours.items(), theirs, strict=False):
        assert (name, mine.default) == (argument.name, argument.default)
    # What they hand on to their tokenizer are ours by keyword.
    settings = inspect.signature(OPEN_CLIP.SimpleTokenizer).parameters.keys() - {"context_length"}
    assert settings == {name for name, a in ours.items() if a.kind is a.KEYWORD_ONLY}

    model = clipcore.create_model(NAME, force_context_length=20)
    for folder in (hub_folder(tmp_path / "hub", model),):
        tokenizer = clipcore.get_tokenizer(f"local-dir:{folder}", cache_dir=tmp_path)
        assert (tokenizer.context_length, tokenizer.vocab_size) == (20, 514)
    run = run_folder(tmp_path / "run", model)
    tokenizer.save(run / "vocabulary.txt.gz")
    assert clipcore.get_tokenizer(f"local-dir:{run}").sha256 == tokenizer.sha256
    with pytest.raises(ValueError, match="hf download org/name"):
        clipcore.get_tokenizer("hf-hub:org/name")
    with pytest.raises(ValueError, match="there is no folder"):
        clipcore.get_tokenizer(f"local-dir:{tmp_path / 'none'}")


TEXTS = ["a  dog &amp; cat", "Été à 7h", "x" * 400, ""]


def test_simple_tokenizer_is_open_clips() -> None:
    ours = inspect.signature(clipcore.SimpleTokenizer).parameters
    theirs = inspect.signature(OPEN_CLIP.SimpleTokenizer).parameters
    assert list(ours) == list(theirs)
    for name, argument in theirs.items():
        # Theirs is the path of the same file in their package.
        assert ours[name].default == argument.default or name == "bpe_path"
    mine, other = (
        clipcore.SimpleTokenizer(context_length=30),
        OPEN_CLIP.SimpleTokenizer(context_length=30),
    )
    assert torch.equal(mine(TEXTS), other(TEXTS)) and mine.encoder == other.encoder
    assert mine.decoder == other.decoder
    for row in mine(TEXTS):
        assert mine.decode(row.tolist()) == other.decode(row.tolist())
        assert clipcore.decode(row) == OPEN_CLIP.decode(row)
    assert torch.equal(clipcore.tokenize(TEXTS, 20), OPEN_CLIP.tokenize(TEXTS, 20))
    again = pickle.loads(pickle.dumps(mine))
    assert type(again) is clipcore.SimpleTokenizer and torch.equal(again(TEXTS), mine(TEXTS))
    with pytest.raises(ValueError, match="id 49408000 is not in"):
        mine.decode([49408000])
    for name, value in (
        ("clean", "whitespace"),
        ("reduction_mask", "random"),
        ("additional_special_tokens", ["<x>"]),
    ):
        for make in (clipcore.SimpleTokenizer, lambda **more: clipcore.get_tokenizer(**more)):
            with pytest.raises(ValueError, match=f"{name}=.* exists only in open_clip"):
                make(**{name: value})
    clipcore.get_tokenizer(NAME, clean="lower", reduction_mask="", additional_special_tokens=[])


def test_the_losses_take_open_clips_arguments() -> None:
    for name in ("ClipLoss", "SigLipLoss"):
        theirs = inspect.signature(getattr(OPEN_CLIP.loss, name)).parameters
        ours = inspect.signature(getattr(clipcore, name)).parameters
        for (mine, argument), other in zip(ours.items(), theirs.values(), strict=False):
            assert (mine, argument.default) == (other.name, other.default), name
    features = [torch.nn.functional.normalize(torch.randn(6, 8), dim=-1) for _ in range(2)]
    loss = [
        clipcore.SigLipLoss(dist_impl="shift", chunk_size=size)(*features, 10.0, -10.0)
        for size in (None, 0, 4)
    ]
    assert loss[0] == loss[1] == loss[2]
    with pytest.raises(ValueError, match="chunk_size is a number of rows"):
        clipcore.SigLipLoss(chunk_size=1.5)  # type: ignore[arg-type]


# --- Constants and small functions ---


def test_constants_are_open_clips_and_nothing_else_is_imported() -> None:
    for name in (
        "OPENAI_DATASET_MEAN",
        "OPENAI_DATASET_STD",
        "SIMPLE_IMAGENET_TEMPLATES",
        "OPENAI_IMAGENET_TEMPLATES",
        "IMAGENET_CLASSNAMES",
    ):
        ours, theirs = getattr(clipcore, name), getattr(OPEN_CLIP, name)
        if callable(theirs[0]):
            ours, theirs = [t("a cat") for t in ours], [t("a cat") for t in theirs]
        assert ours == theirs
    program = (
        "import sys, clipcore; clipcore.IMAGENET_CLASSNAMES; clipcore.list_pretrained();"
        "print('torchvision' in sys.modules, 'open_clip' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    "precision", [*"fp32 amp amp_bf16 bf16 fp16 pure_bf16 pure_fp16".split(), "?"]
)
def test_dtypes_of_a_precision(precision: str) -> None:
    assert clipcore.get_cast_dtype(precision) == OPEN_CLIP.get_cast_dtype(precision)
    assert clipcore.get_input_dtype(precision) == OPEN_CLIP.get_input_dtype(precision)


def test_names_of_published_models() -> None:
    assert clipcore.list_openai_models() == OPEN_CLIP.list_openai_models()
    assert set(clipcore.list_openai_models()) <= set(clipcore.list_models())
    for name in clipcore.available_models():
        assert architectures.find_model(name) in architectures.MODELS.values() or name in (
            architectures.OPENAI_NAMES
        )
    assert len(clipcore.available_models()) == 9


@pytest.fixture
def no_added_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_ADDED", {})
    monkeypatch.setattr(architectures, "_REFUSED", {})


@pytest.mark.usefixtures("no_added_models")
def test_add_model_config_makes_a_file_a_model(tmp_path: Path) -> None:
    described = {**clipcore.get_model_config(NAME), "embed_dim": 24, "quick_gelu": True}
    (tmp_path / "my-model.json").write_text(json.dumps(described))
    clipcore.add_model_config(tmp_path / "my-model.json")
    assert "my-model" in clipcore.list_models()
    model = clipcore.create_model("my-model")
    assert model.config.embed_dim == 24 and model.config.quick_gelu
    assert clipcore.get_model_config("my-model") == model.config.to_dict()
    assert clipcore.get_tokenizer("my-model").vocab_size == 514
    # A file that has changed is read again.
    (tmp_path / "my-model.json").write_text(json.dumps({**described, "embed_dim": 16}))
    clipcore.add_model_config(str(tmp_path))
    assert clipcore.create_model("my-model").config.embed_dim == 16

    # In a folder, what is no model is left out, and what clipcore does not have is named.
    (tmp_path / "other.json").write_text("{}")
    timm = {**described, "vision_cfg": {"timm_model_name": "resnet18", "image_size": 64}}
    (tmp_path / "timm.json").write_text(json.dumps(timm))
    with pytest.warns(UserWarning, match="does not have 1 of the models in .*, such as timm"):
        clipcore.add_model_config(tmp_path)
    with pytest.raises(ValueError, match=r"timm\.json: the model has timm_model_name"):
        clipcore.create_model("timm")
    for name, content, message in (
        ("timm", timm, "timm_model_name 'resnet18', which clipcore's towers do not have"),
        ("ViT-B-32", described, "another model of this name: rename the file"),
        ("ViT-B-32-quickgelu", described, "another model of this name: rename the file"),
        ("empty", {}, "has no embed_dim, text_cfg, vision_cfg"),
    ):
        path = tmp_path / "alone" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            clipcore.add_model_config(path)
    (tmp_path / "alone" / "empty.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        clipcore.add_model_config(tmp_path / "alone" / "empty.json")
    with pytest.raises(FileNotFoundError):
        clipcore.add_model_config(tmp_path / "none.json")


@pytest.mark.usefixtures("no_added_models")
def test_all_models_of_open_clip_with_clipcores_towers_are_made_of_its_files() -> None:
    """Its own files of published models: those that become ours have its parameters."""
    folder = Path(OPEN_CLIP.__file__).parent / "model_configs"
    with pytest.warns(UserWarning, match="does not have"):
        clipcore.add_model_config(folder)
    added = [name for name in clipcore.list_models() if (folder / f"{name}.json").is_file()]
    assert {"ViT-B-32", "ViT-B-16-plus-240", "ViT-H-14-378-quickgelu", "RN50-quickgelu"} <= {*added}
    for name in ("ViT-B-16-plus-240", "ViT-M-32-alt"):
        ours = clipcore.create_model(name, device="meta").state_dict()
        theirs = OPEN_CLIP.create_model(name, device="meta").state_dict()
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


# --- The document ---

DOCUMENT = (ROOT / "docs" / "from-open-clip.md").read_text()


def rows_of(section: str) -> dict[str, str]:
    """Return the first two columns of a section's table, which begins with a name in backticks."""
    rows = re.findall(r"^\| `(\w+)` \| ([a-z ]+) \|.*\|$", section, re.MULTILINE)
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def test_the_document_names_every_argument_of_open_clip() -> None:
    sections = re.split(r"^## ", DOCUMENT, flags=re.MULTILINE)[1:]
    of_functions = [section for section in sections if section.startswith("`")]
    named: dict[str, dict[str, str]] = {}
    for section in of_functions:
        title, _, _ = section.partition("\n")
        functions = [
            getattr(OPEN_CLIP.loss, n, getattr(OPEN_CLIP, n, None))
            for n in re.findall(r"`(\w+)`", title)
        ]
        arguments = {
            name for function in functions for name in inspect.signature(function).parameters
        }
        assert rows_of(section).keys() == arguments, title
        assert set(rows_of(section).values()) <= {"same", "no effect", "different", "refused"}
        named |= {name: rows_of(section) for name in re.findall(r"`(\w+)`", title)}
    assert FUNCTIONS.keys() <= named.keys()

    names = next(rows_of(section) for section in sections if section.startswith("Names"))
    theirs = {
        n
        for n in dir(OPEN_CLIP)
        if not n.startswith("_") and not inspect.ismodule(getattr(OPEN_CLIP, n))
    }
    assert names.keys() == theirs
    for name, status in names.items():
        assert (name in clipcore.__all__) == (status != "missing"), name


REFUSED: dict[str, Any] = {"jit": True, "pretrained_image": True, "weights_only": False}


def test_what_the_document_calls_refused_is() -> None:
    first = rows_of(re.split(r"^## ", DOCUMENT, flags=re.MULTILINE)[1])
    assert {name for name, status in first.items() if status == "refused"} == REFUSED.keys()
    for name, value in REFUSED.items():
        default = inspect.signature(clipcore.create_model).parameters[name].default
        clipcore.create_model(NAME, **{name: default})
        with pytest.raises(ValueError, match=f"{name}={value} exists only in open_clip; "):
            clipcore.create_model(NAME, **{name: value})
    for name, value in {
        "cache_dir": "x",
        "pretrained_text": False,
        "pretrained_text_path": "",
    }.items():
        clipcore.create_model(NAME, **{name: value})
