"""SigLIP's towers against open_clip's with timm's image tower, and against transformers', from random weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_vocabularies import json_file
from openclip import import_open_clip
from runs import NANO as NANO_FLAGS
from runs import RunServer
from safetensors.torch import load_file, save_file
from shards import write_csv
from torch import Tensor, nn
from weight_files import picture

import clipcore
from clipcore import inspection
from clipcore.classify import __main__ as classify
from clipcore.data.sources import open_source
from clipcore.evaluate.loading import load_model
from clipcore.export import check
from clipcore.export.interpolations import keep_start
from clipcore.export.write import export_model
from clipcore.features.encode import encode_captions
from clipcore.kernels.attention_pool import attention_pool
from clipcore.ranks.distributed import World
from clipcore.run.state import load_run
from clipcore.tokenizer import HubTokenizer, open_vocabulary
from clipcore.towers import open_clip_models
from clipcore.towers.architectures import MODELS, ModelConfig, TextConfig, VisionConfig
from clipcore.towers.convert import to_custom_text, to_hf, to_open_clip_names
from clipcore.towers.layouts import openai_differences
from clipcore.towers.loading import load_checkpoint, load_weights
from clipcore.towers.lora import add_lora
from clipcore.towers.model import CLIP
from clipcore.towers.pooling_head import PoolingHead

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
OF_GEMMA = dataclasses.replace(
    NANO, text=dataclasses.replace(TEXT, vocab_size=120, clean="canonicalize")
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


def nano_file(folder: Path, config: ModelConfig = NANO) -> str:
    path = folder / "nano-siglip.json"
    path.write_text(json.dumps(config.to_dict()))
    return str(path)


def saved_as_open_clip(path: Path) -> CLIP:
    """Save random weights under open_clip's names; return the model."""
    model = randomised(CLIP(NANO)).eval()
    assert isinstance(model, CLIP)
    save_file(to_custom_text(model.state_dict()), path)
    return model


def test_weights_under_open_clips_names_load_with_their_preprocessing(tmp_path: Path) -> None:
    source = saved_as_open_clip(tmp_path / "siglip.safetensors")
    name = nano_file(tmp_path)
    for model in (
        clipcore.create_model(name, tmp_path / "siglip.safetensors"),
        clipcore.create_model_from_pretrained(None, tmp_path / "siglip.safetensors")[0],
    ):
        # By shapes alone no heads are known but those of 64.
        for key, value in source.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key
        assert model.images["resize_mode"] == "squash"
        assert model.visual.image_mean == model.visual.image_std == (0.5, 0.5, 0.5)
    # One tower, in its own names as open_clip's module has them.
    trunk = {
        key.removeprefix("visual."): value
        for key, value in to_custom_text(source.state_dict()).items()
        if key.startswith("visual.")
    }
    save_file(trunk, tmp_path / "trunk.safetensors")
    one = clipcore.create_model(name, pretrained_image_path=tmp_path / "trunk.safetensors")
    assert torch.equal(one.visual.attn_pool.latent, source.visual.attn_pool.latent)
    assert not torch.equal(one.token_embedding.weight, source.token_embedding.weight)

    # Another tower of timm, and a description with another GELU.
    save_file(
        {**to_custom_text(source.state_dict()), "visual.trunk.stages.0.weight": torch.zeros(1)},
        tmp_path / "other.safetensors",
    )
    with pytest.raises(ValueError, match=r"visual\.trunk\.stages\.0\.weight, of an image tower"):
        clipcore.create_model(name, tmp_path / "other.safetensors")
    CLIP(TANH).save_pretrained(tmp_path / "tanh")
    with pytest.raises(ValueError, match=r"has GELU by its tanh approximation, and .* without"):
        load_checkpoint(CLIP(NANO), tmp_path / "tanh")


def test_position_embeddings_without_a_class_token_are_resized_as_timms(tmp_path: Path) -> None:
    import_open_clip()
    from timm.layers import resample_abs_pos_embed

    source = saved_as_open_clip(tmp_path / "siglip.safetensors")
    name = nano_file(tmp_path)
    model = clipcore.create_model(name, tmp_path / "siglip.safetensors", force_image_size=56)
    expected = resample_abs_pos_embed(
        source.visual.positional_embedding[None], [7, 7], num_prefix_tokens=0
    )
    assert torch.equal(model.visual.positional_embedding, expected[0])
    assert model.encode_image(torch.zeros(1, 3, 56, 56)).shape == (1, 32)


def test_named_models_are_whole_descriptions_of_open_clip() -> None:
    open_clip = import_open_clip()
    config = MODELS["ViT-B-16-SigLIP"]
    with torch.device("meta"):
        model = CLIP(config)
    assert model.config.to_dict()["vision_cfg"] == {
        "image_size": 224,
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    preprocessing = open_clip.pretrained.get_pretrained_cfg("ViT-B-16-SigLIP", "webli")
    for key in ("mean", "std", "interpolation", "resize_mode"):
        assert model.visual.preprocess_cfg[key] == preprocessing[key]
    clipa = open_clip.pretrained.get_pretrained_cfg("ViT-L-14-CLIPA", "datacomp1b")
    for key in ("mean", "std", "interpolation", "resize_mode"):
        assert MODELS["ViT-L-14-CLIPA"].usual_images[key] == clipa[key]


def test_modules_traces_and_single_blocks_give_the_same_features(tmp_path: Path) -> None:
    model = randomised(CLIP(TANH)).double().eval()
    assert isinstance(model, CLIP)
    images, tokens = inputs()
    expected = model.encode_image(images), model.encode_text(tokens)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            return self.model.encode_image(images), self.model.encode_text(tokens)

    traced = torch.jit.trace(Whole(), (images, tokens))
    for got, features in zip(traced(images[:2], tokens[:2]), expected, strict=True):
        assert_close(got, features[:2])
    found = model.forward_intermediates(images, tokens, image_output_extra_tokens=True)
    assert "image_intermediates_prefix" not in found  # there is no class token
    assert found["image_intermediates"][0].shape == (3, 32, 4, 4)
    for key, features in zip(("image_features", "text_features"), expected, strict=True):
        assert_close(found[key], nn.functional.normalize(features, dim=-1))

    seen: list[Tensor] = []
    handle = model.visual.attn_pool.norm.register_forward_hook(lambda _, i, out: seen.append(out))
    assert_close(model.encode_image(images), expected[0])
    handle.remove()
    assert seen[0].shape == (3, 32)


def test_dropped_patches_leave_the_rest_in_their_places() -> None:
    config = dataclasses.replace(NANO, vision=dataclasses.replace(VISION, patch_dropout=0.5))
    model = CLIP(config).train()
    lengths: list[int] = []
    model.visual.ln_post.register_forward_hook(lambda _, i, out: lengths.append(out.shape[1]))
    seeds = torch.arange(3)
    images, _ = inputs(torch.float32)
    features = model.encode_image(images, dropout_seeds=seeds)
    assert lengths == [8]
    assert torch.equal(model.encode_image(images[1:], dropout_seeds=seeds[1:]), features[1:])


def test_groups_of_the_towers_unlock_from_the_head() -> None:
    model = CLIP(NANO)
    model.lock_image_tower(unlocked_groups=1)
    free = {n.split(".")[0] for n, p in model.visual.named_parameters() if p.requires_grad}
    assert free == {"attn_pool"}
    model.lock_text_tower(unlocked_layers=1)
    free = {n for n, p in model.named_parameters() if p.requires_grad and "visual." not in n}
    assert free == {
        *("text_projection.weight", "text_projection.bias", "logit_scale", "logit_bias"),
    }
    with pytest.raises(ValueError, match="attends to the padding; give it padded rows"):
        model.encode_text(clipcore.pack_captions(torch.ones(2, 9, dtype=torch.long)))


def test_a_vocabulary_trains_classifies_evaluates_and_is_inspected(
    server: RunServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """--siglip with SigLIP's towers and kind of vocabulary: nothing is packed or trimmed, and all commands take the run."""
    table = write_csv(tmp_path, num_pairs=16)
    vocabulary = json_file(tmp_path, "Gemma")
    line = ["--logs", str(tmp_path), "--name", "run", "--train-data", str(table)]
    line += ["--model", nano_file(tmp_path, OF_GEMMA), "--tokenizer", str(vocabulary)]
    line += [*NANO_FLAGS[4:], "--siglip", "--batch-size", "4", "--accum-freq", "2", "--lr", "1e-3"]
    line += ["--duplicate-captions", "positive", "--verify-gradients", "--val-data", str(table)]
    status, said = server.run([*line, "--epochs", "1"], tmp_path / "out")
    assert status == 0 and "gradients of 8 pairs verified" in said, said
    vocabulary.unlink()

    model, transform, tokenizer = load_run(tmp_path / "run")
    assert isinstance(tokenizer, HubTokenizer) and tokenizer.pad_token_id == 0
    assert transform.resize_mode == "squash" and transform.mean == (0.5, 0.5, 0.5)
    rows = tokenizer(["A, cat!", "a cat"])
    assert rows.shape == (2, 9) and torch.equal(rows[0], rows[1])
    assert torch.equal(clipcore.get_tokenizer(tmp_path / "run")(["A, cat!"]), rows[:1])
    # As a user computes it, and as the commands do.
    column = clipcore.build_zero_shot_classifier(model, tokenizer, ["a cat"], ["{}"])[:, 0]
    assert (column - model.encode_text(rows[:1], normalize=True)[0]).abs().max() <= 1e-6

    source = open_source(str(table), dataset_type="csv")
    (found,) = encode_captions(model, tokenizer, source, 0, 16, normalize=True)
    with torch.no_grad():
        expected = model.encode_text(tokenizer([source.captions(i) for i in range(16)]), True)
    assert (torch.from_numpy(found.features_BE) - expected).abs().max() <= 1e-6

    picture().save(tmp_path / "photo.png")
    photo, run = str(tmp_path / "photo.png"), str(tmp_path / "run")
    assert classify.main([photo, "--labels", "a cat, a dog", "--checkpoint", run]) == 0
    assert inspection.main([run]) == 0
    said = capfd.readouterr().out
    assert "attention pooling" in said and "every token sees all" in said
    assert "plus" in said and "(SigLIP)" in said and "120 tokens" in said


def test_a_start_that_open_clip_does_not_have_is_kept_for_clipcore(tmp_path: Path) -> None:
    """In a size that timm lacks; a run that begins anew replaces it."""
    tokenizer, alone = vocabulary_of(tmp_path, OF_GEMMA), World(0, 1, 0, torch.device("cpu"))
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = CLIP(OF_GEMMA)
        keep_start(model, tokenizer, tmp_path / "run", alone, is_beginning=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["start"]
    found = load_model(None, str(tmp_path / "run" / "start"))
    assert found.tokenizer.sha256 == tokenizer.sha256
    weights = found.model.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_lora_leaves_the_pooling_head_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CLIP(NANO)
    add_lora(model, 2, 2.0)
    head = next(part for part in model.modules() if isinstance(part, PoolingHead))
    calls: list[Any] = []
    monkeypatch.setattr(
        "clipcore.towers.pooling_head.attention_pool",
        lambda *given: calls.append(given) or attention_pool(*given),
    )
    tokens_BLD = torch.randn(2, 3, VISION.width)
    found, expected = head(tokens_BLD), head._by_modules(tokens_BLD)
    assert len(calls) == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def vocabulary_of(folder: Path, config: ModelConfig) -> HubTokenizer:
    found = open_vocabulary(json_file(folder, "Gemma"), config.text)
    assert isinstance(found, HubTokenizer)
    return found


@pytest.mark.usefixtures("nano_of_timm")
def test_an_export_is_loaded_by_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(CLIP(OF_GEMMA))
    assert isinstance(model, CLIP)
    tokenizer = vocabulary_of(tmp_path, OF_GEMMA)
    with pytest.raises(ValueError, match="in timm's sizes only"):
        export_model(model, tokenizer, "open_clip", tmp_path / "other")
    assert not (tmp_path / "other").exists()

    # As if timm had a published tower of this size.
    fields = dataclasses.asdict(VISION)
    monkeypatch.setitem(open_clip_models.TIMM_TOWERS, TIMM_NAME, fields)
    said: list[str] = []
    export_model(model, tokenizer, "open_clip", tmp_path / "out", said.append)
    assert any(line.startswith("open_clip") and "features agree" in line for line in said), said
    again = clipcore.create_model(f"local-dir:{tmp_path / 'out'}")
    assert again.config == model.config
    rows = clipcore.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(["A, cat!"])
    assert torch.equal(rows, tokenizer(["A, cat!"]))
    # The padding counts too, which this text tower reads.
    others = tokenizer(list(check.CAPTIONS), 30)
    others[0, -1] += 1
    with pytest.raises(check.CheckError, match="tokenizes 'a photo of a cat' in another way"):
        check._compare_tokens(tokenizer, others, "open_clip")


def test_an_export_is_loaded_by_transformers(tmp_path: Path) -> None:
    import_open_clip()
    model = randomised(CLIP(OF_GEMMA))
    assert isinstance(model, CLIP)
    said: list[str] = []
    tokenizer = vocabulary_of(tmp_path, OF_GEMMA)
    export_model(model, tokenizer, "transformers", tmp_path / "out", said.append)
    assert any(line.startswith("transformers") and "features agree" in line for line in said), said

    # What transformers or OpenAI's package would make another model of.
    for config, target, message in (
        (dataclasses.replace(OF_GEMMA, init_logit_bias=None), "transformers", "has a logit bias"),
        (
            scaled_blocks(),
            "transformers",
            r"CLIPModel has no ls_init_value=0\.1, no_causal_mask=True",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            export_model(CLIP(config), tokenizer, target, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
    differences = "; ".join(openai_differences(model))
    assert "its towers have pool_type=map, norm_eps=1e-06, no_causal_mask=True" in differences


def scaled_blocks() -> ModelConfig:
    vision = VisionConfig(image_size=32, layers=1, width=32, patch_size=16, ls_init_value=0.1)
    return ModelConfig(32, vision, dataclasses.replace(OF_GEMMA.text, proj_bias=False))
