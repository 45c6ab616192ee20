"""The models: open_clip's keys, shapes and outputs; the exact savings; locking, loading, and clear errors."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from openclip import import_open_clip
from runs import PROGRAMS, ROOT
from safetensors.torch import save_file
from torch.nn import functional as F

import clipcore
from clipcore.towers.architectures import (
    MODELS,
    ModelConfig,
    TextConfig,
    UnknownModelError,
    VisionConfig,
    find_model,
    get_model_config,
    list_models,
)
from clipcore.towers.convert import to_hf
from clipcore.towers.descriptions import hf_config
from clipcore.towers.factory import (
    create_model,
    create_model_and_transforms,
    create_model_from_pretrained,
)
from clipcore.towers.model import CLIP
from clipcore.towers.resnet import replayed

PUBLISHED = {  # millions of parameters: (all, image tower)
    "RN50": (102.0, 38.3),
    "RN101": (119.7, 56.3),
    "RN50x4": (178.3, 87.1),
    "RN50x16": (291.0, 167.3),
    "RN50x64": (623.3, 420.4),
    "ViT-B-32": (151.3, 87.8),
    "ViT-B-16": (149.6, 86.2),
    "ViT-L-14": (427.6, 304.0),
    "ViT-L-14-336": (427.9, 304.3),
}
OURS_ALONE = {"ViT-glyphs", "ViT-nano-8-32", "RN-nano-32"}
NARROW_TEXT = TextConfig(width=64, heads=1, layers=3, vocab_size=600)
FAMILIES = {
    "vit": ModelConfig(32, VisionConfig(64, 3, 128, 16), NARROW_TEXT),
    "vit-quickgelu-80": ModelConfig(
        48, VisionConfig(56, 2, 160, 14, head_width=80), NARROW_TEXT, True
    ),
    "resnet": ModelConfig(40, VisionConfig(64, (2, 1, 2, 1), 8, None, head_width=32), NARROW_TEXT),
    "resnet-quickgelu": ModelConfig(40, VisionConfig(96, (1, 1, 1, 1), 8, None), NARROW_TEXT, True),
}


def open_clip_model(config: ModelConfig) -> torch.nn.Module:
    return import_open_clip().CLIP(**config.to_dict())


def tokens(config: ModelConfig, num_rows: int = 3, length: int = 77) -> torch.Tensor:
    """Rows that end at different places; the end has the largest id."""
    rows = torch.randint(1, config.text.vocab_size - 2, (num_rows, length))
    for row, end in enumerate([length // 2, length - 1, 2][:num_rows]):
        rows[row, end] = config.text.vocab_size - 1
        rows[row, end + 1 :] = 0
    return rows


def images(config: ModelConfig, num: int = 3) -> torch.Tensor:
    return torch.randn(num, 3, config.vision.image_size, config.vision.image_size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_the_paper(name):
    with torch.device("meta"):
        model = CLIP(find_model(name))
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, model.visual)]
    assert tuple(round(count, 1) for count in counts) == PUBLISHED[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_agree_with_open_clip(family):
    config = FAMILIES[family]
    theirs = open_clip_model(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # What starts at zero or one would hide a mistake.
            if name != "logit_scale":
                parameter.add_(0.02 * torch.randn_like(parameter))
    ours = CLIP(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    image, text = images(config), tokens(config)
    with torch.no_grad():
        for got, expected in zip(ours(image, text), theirs(image, text), strict=True):
            assert (got - expected).abs().max() <= 1e-4
        assert (ours.encode_image(image) - theirs.encode_image(image)).abs().max() <= 1e-4
        assert (ours.encode_text(text) - theirs.encode_text(text)).abs().max() <= 1e-4
        for got, expected in zip(
            ours.get_logits(image, text), theirs.get_logits(image, text), strict=True
        ):
            assert (got - expected).abs().max() <= 1e-3  # cosines times 14
    theirs.load_state_dict(ours.state_dict(), strict=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every published model where --all-models asks for it: the largest has a billion parameters."""
    if "real_model" in metafunc.fixturenames:
        is_all = metafunc.config.getoption("--all-models")
        # SigLIP's towers, which open_clip has of timm, have tests of their own.
        all_names = sorted(
            n for n, m in MODELS.items() if not (n in OURS_ALONE or m.vision.has_map)
        )
        names = all_names if is_all else ["RN50", "ViT-B-32"]
        metafunc.parametrize("real_model", names)


def test_real_models_agree_with_open_clip(real_model):
    name = real_model
    theirs = import_open_clip().CLIP(**import_open_clip().get_model_config(name)).eval()
    ours = create_model(name).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    image, text = images(ours.config, 2), tokens(ours.config, 2)
    with torch.no_grad():
        assert (ours.encode_image(image) - theirs.encode_image(image)).abs().max() <= 1e-4
        assert (ours.encode_text(text) - theirs.encode_text(text)).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_gradients_agree_with_open_clip_in_fp64(family):
    config = FAMILIES[family]
    theirs = open_clip_model(config).double().train()
    ours = CLIP(config).double().train()
    ours.load_state_dict(theirs.state_dict())
    image, text = images(config).double(), tokens(config)
    for model in (ours, theirs):
        image_features, text_features, scale = model(image, text)
        (
            scale * (image_features @ text_features.T).square().sum() + image_features[0, 0]
        ).backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    # open_clip scales its input by a float32 constant nowhere, so that only the order of sums differs.
    for name, parameter in ours.named_parameters():
        largest = max(1.0, gradients[name].abs().max().item())
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-10 * largest, name


def test_the_pruned_last_block_and_trimmed_text_are_exact():
    """Against every token through every block at full length, with every gradient, in fp64 to 1e-12."""
    config = FAMILIES["vit"]
    model = CLIP(config).double()
    text = tokens(config, length=40)
    full = F.pad(text, (0, 37))

    def unpruned() -> torch.Tensor:
        visual = model.visual
        x = visual._embed(image)
        image_features = visual.ln_post(visual.transformer(x)[:, 0]) @ visual.proj
        y = model.token_embedding(full) + model.positional_embedding
        y = model.ln_final(model.transformer(y))
        text_features = y[torch.arange(3), full.argmax(-1)] @ model.text_projection
        return torch.cat([image_features, text_features])

    image = images(config).double()
    upstream = torch.randn(6, config.embed_dim, dtype=torch.float64)
    results = []
    for compute in (
        unpruned,
        lambda: torch.cat([model.encode_image(image), model.encode_text(text)]),
    ):
        model.zero_grad()
        out = compute()
        out.backward(upstream)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((out.detach(), grads))
    (plain, plain_grads), (pruned, pruned_grads) = results
    assert (plain - pruned).abs().max() <= 1e-12
    assert plain_grads.keys() == pruned_grads.keys()
    for name, gradient in plain_grads.items():
        assert (gradient - pruned_grads[name]).abs().max() <= 1e-12 * max(
            1.0, gradient.abs().max().item()
        ), name


def saved_bytes(model: CLIP, image: torch.Tensor) -> int:
    """Return the bytes that the image tower's forward pass saves for its backward pass, its weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        features = model.encode_image(image)
    total = sum(kept.values())
    del features
    return total


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_grad_checkpointing_gives_the_same_bits_in_less_memory(family):
    """Gradients, running statistics and batch counts; with patch dropout in the ViT."""
    config = FAMILIES[family]
    if not config.vision.is_resnet:
        config = dataclasses.replace(
            config, vision=dataclasses.replace(config.vision, patch_dropout=0.5, layers=4)
        )
    image, text = images(config), tokens(config)
    model = CLIP(config).train()
    for parameter in (p for n, p in model.named_parameters() if n.endswith("bn3.weight")):
        torch.nn.init.ones_(parameter)  # a block that starts as the identity has few gradients
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    results, kept = [], []
    for enable in (False, True):
        model.load_state_dict(initial)
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(7)
        image_features, text_features, _ = model(image, text)
        (image_features * text_features).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append(gradients + [b.clone() for b in model.buffers()])
        kept.append(saved_bytes(model, image))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < kept[0] / 2


def test_a_replayed_resnet_leaves_its_statistics():
    model = create_model("RN-nano-32").train().visual
    image = torch.randn(4, 3, 32, 32)
    with replayed(model):
        before = [b.clone() for b in model.buffers()]
        features = model(image)
        assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert torch.equal(model(image), features)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_patch_dropout_drops_in_training_only_and_follows_the_seed():
    model = create_model("ViT-nano-8-32", force_patch_dropout=0.5)
    image = images(model.config)
    kept = model.visual._drop_patches(model.visual._embed(image), None)
    assert kept.shape[1] == 1 + 8

    def features(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.encode_image(image)

    assert torch.equal(features(1), features(1)) and not torch.equal(features(1), features(2))
    model.eval()
    assert torch.equal(features(1), features(2))


@pytest.mark.parametrize(
    ("name", "tower", "dtype"),
    [
        ("ViT-nano-8-32", "visual", torch.float32),
        ("ViT-nano-8-32", "visual", torch.bfloat16),
        ("ViT-nano-8-32", "text", torch.bfloat16),
        ("RN-nano-32", "visual", torch.float32),
    ],
)
def test_towers_compile_into_one_graph(name, tower, dtype):
    """Forward and backward, in training, under autocast too."""
    torch._dynamo.reset()
    model = create_model(name, force_quick_gelu=True).train()
    if tower == "visual":
        encode, x = model.encode_image, images(model.config)
    else:
        encode, x = model.encode_text, tokens(model.config)
    results = []
    for function in (encode, torch.compile(encode, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            features = function(x)
        features.float().square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([features.detach(), *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_checkpointed_resnet_runs_beside_compiled_code():
    torch._dynamo.reset()
    model = create_model("RN-nano-32").train()
    model.set_grad_checkpointing()
    image = images(model.config)
    model.encode_image(image).sum().backward()
    expected = [p.grad.clone() for p in model.visual.parameters()]
    model.zero_grad()
    torch.compile(model.encode_image, backend="aot_eager")(image).sum().backward()
    for got, want in zip(model.visual.parameters(), expected, strict=True):
        assert torch.equal(got.grad, want)
    assert model.visual.bn1.num_batches_tracked == 2
    assert model.visual.layer4[0].bn1.num_batches_tracked == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_float32(dtype):
    model = create_model("ViT-nano-8-32").eval()
    image, text = images(model.config), tokens(model.config)
    with torch.no_grad():
        exact = model(image, text)[:2]
        with torch.autocast("cpu", dtype):
            low = model(image, text)[:2]
    for a, b in zip(exact, low, strict=True):
        assert F.cosine_similarity(a, b.float()).min() > 0.999


@pytest.mark.parametrize("unlocked", [0, 1, 2, 3, 99])
def test_locked_towers_leave_free_what_open_clip_leaves_free(unlocked):
    config = FAMILIES["vit"]
    ours, theirs = CLIP(config), open_clip_model(config)
    for model in (ours, theirs):
        model.lock_image_tower(unlocked_groups=unlocked)
        model.lock_text_tower(unlocked_layers=unlocked)
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.named_parameters()
    }


def test_a_locked_resnet_can_freeze_its_statistics():
    model = create_model("RN-nano-32")
    model.lock_image_tower(freeze_bn_stats=True)
    before = {n: b.clone() for n, b in model.visual.named_buffers()}
    model.train()(images(model.config), tokens(model.config))
    assert all(torch.equal(before[n], b) for n, b in model.visual.named_buffers())
    assert not any(p.requires_grad for p in model.visual.parameters())
    with pytest.raises(ValueError, match="locked whole"):
        model.lock_image_tower(unlocked_groups=1)


def test_initialisation():
    """Standard deviations of clip's code, within the scatter of a sample of that size."""
    model = CLIP(
        ModelConfig(
            64,
            VisionConfig(64, 3, 256, 16),
            TextConfig(width=256, heads=4, layers=6, vocab_size=4000),
        )
    )
    expected = {
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection": 256**-0.5,
        "transformer.resblocks.2.attn.in_proj_weight": 256**-0.5,
        "transformer.resblocks.2.attn.out_proj.weight": 256**-0.5 * 12**-0.5,
        "transformer.resblocks.2.mlp.c_fc.weight": 512**-0.5,
        "transformer.resblocks.2.mlp.c_proj.weight": 256**-0.5 * 12**-0.5,
        "visual.proj": 256**-0.5,
        "visual.positional_embedding": 256**-0.5,
    }
    state = model.state_dict()
    for name, std in expected.items():
        scatter = 5 / math.sqrt(2 * state[name].numel())
        assert state[name].std().item() == pytest.approx(std, rel=scatter), name
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    resnet = create_model("RN-nano-32").visual
    assert all(
        not block.bn3.weight.any() for stage in (resnet.layer1, resnet.layer4) for block in stage
    )


def test_the_logit_scale_is_clamped_at_100():
    model = create_model("ViT-nano-8-32")
    for value, expected in ((9.0, 100.0), (-3.0, 1.0), (3.0, math.exp(3))):
        torch.nn.init.constant_(model.logit_scale, value)
        model.clamp_logit_scale_()
        assert model.logit_scale.exp().item() == pytest.approx(expected)


def test_names():
    assert "ViT-B-32" in list_models() and "ViT-B-32-quickgelu" in list_models()
    assert not find_model("ViT-B-32").quick_gelu and find_model("ViT-B/32").quick_gelu
    assert find_model("ViT-L/14@336px").vision.image_size == 336
    # A ResNet has one name in both packages, and OpenAI's have QuickGELU.
    assert find_model("openai/RN50") == find_model("RN50-quickgelu") != find_model("RN50")
    for name in ("ViT-B/32", "openai/ViT-B-32", "openai/ViT-B/32", "openai/clip-vit-base-patch32"):
        assert find_model(name) == find_model("ViT-B-32-quickgelu")
    assert find_model("openai/clip-vit-large-patch14-336") == find_model("ViT-L/14@336px")
    for wrong, near in (("ViT-B-23", "ViT-B-32"), ("vit-l-14", "ViT-L-14"), ("RN-50", "RN50")):
        with pytest.raises(UnknownModelError, match=near):
            find_model(wrong)


def test_public_names_cost_nothing_until_used():
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / "count_public_names.py")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert int(done.stdout) == len(clipcore.__all__)
    for name in clipcore.__all__:
        assert getattr(clipcore, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        clipcore.nothing  # noqa: B018


def test_features_before_the_projection():
    """What probes are fitted to; a call of the tower as any other, for whoever watches it."""
    images = torch.randn(2, 3, 32, 32)
    model = create_model("ViT-nano-8-32").eval()
    shapes = []
    model.visual.register_forward_hook(lambda _, __, found: shapes.append(found.shape))
    with torch.no_grad():
        pooled, projected = model.encode_image(images, projected=False), model.encode_image(images)
    assert torch.equal(pooled @ model.visual.proj, projected)
    assert shapes == [pooled.shape, projected.shape]
    assert pooled.shape == (2, model.config.vision.width)


def test_a_resnets_features_are_its_attention_pools():
    model = create_model("RN50", force_image_size=64).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.encode_image(images, projected=False), model.encode_image(images))


def test_inputs_that_do_not_fit_are_refused_with_the_remedy():
    model = create_model("ViT-nano-8-32")
    with pytest.raises(ValueError, match=r"\[B, 3, 32, 32\].*create_model_and_transforms"):
        model.encode_image(torch.zeros(1, 3, 64, 64))
    for length in (0, 78):
        with pytest.raises(ValueError, match=r"from 1 to 77.*context_length=77"):
            model.encode_text(torch.zeros(1, length, dtype=torch.long))


@pytest.mark.parametrize("images", [None, "x.png", [torch.zeros(3, 32, 32)], 3])
@pytest.mark.parametrize("name", ["ViT-nano-8-32", "RN-nano-32"])
def test_images_that_are_no_tensor_are_named(name, images):
    with pytest.raises(
        TypeError, match=f"images as a tensor, got {type(images).__name__}.*torch.stack"
    ):
        create_model(name).encode_image(images)


@pytest.mark.parametrize(
    "text", [None, "a cat", ["a cat"], [[1, 2]], torch.zeros(1, 77), torch.ones(1, 77).bool()]
)
def test_captions_that_are_no_ids_are_named(text):
    for take in (create_model("ViT-nano-8-32").encode_text, clipcore.pack_captions):
        with pytest.raises(TypeError, match=r"the model takes .*token ids"):
            take(text)


def test_ids_of_other_vocabularies_and_widths_are_named():
    model = create_model("ViT-nano-8-32")
    tokens = torch.tensor([[1, 40_000, 2]])
    for text in (tokens, clipcore.pack_captions(tokens)):
        with pytest.raises(ValueError, match="the token 40000 is not among the model's 514"):
            model.encode_text(text)
    with pytest.raises(TypeError, match=r"got torch.uint8; use .long\(\)"):
        model.encode_text(torch.tensor([[1, 2]], dtype=torch.uint8))


OPEN_CLIPS_OTHERS = {
    "jit": (False, True),
    "pretrained_image": (False, True),
    "weights_only": (True, False),
    "nonscalar_logit_scale": (False, True),
}


@pytest.mark.parametrize("argument", OPEN_CLIPS_OTHERS)
def test_open_clips_other_arguments_are_taken_or_refused_by_name(argument):
    harmless, other = OPEN_CLIPS_OTHERS[argument]
    more = {argument: harmless, "cache_dir": "cache", "pretrained_hf": True}
    create_model("ViT-nano-8-32", **more)
    create_model_and_transforms("ViT-nano-8-32", **more)
    with pytest.raises(ValueError, match=f"{argument}=.* exists only in open_clip; [a-z]"):
        create_model("ViT-nano-8-32", **{argument: other})


def test_arguments_that_nobody_has_are_named():
    with pytest.raises(
        TypeError, match="no argument 'force_imagesize'; did you mean force_image_size"
    ):
        create_model("ViT-nano-8-32", force_imagesize=32)
    with pytest.raises(TypeError, match=r"no argument 'x'$"):
        create_model("ViT-nano-8-32", x=3)


def test_arguments_of_open_clips_own_types_are_taken():
    assert create_model("ViT-nano-8-32", force_image_size=(48, 48)).visual.image_size == (48, 48)
    assert not create_model("ViT-nano-8-32", output_dict=None).output_dict
    with pytest.raises(ValueError, match=r"square, got \(48, 32\)"):
        create_model("ViT-nano-8-32", force_image_size=(48, 32))
    with pytest.raises(ValueError, match="require_pretrained asks for weights"):
        create_model("ViT-nano-8-32", require_pretrained=True)
    with pytest.raises(ValueError, match="precision True is none of"):
        create_model("ViT-nano-8-32", None, True, True)
    with pytest.raises(ValueError, match=r"load_weights is 'bf16', not .* by keyword"):
        create_model("ViT-nano-8-32", None, "bf16")


WRONG_VALUES: list[tuple[str, str, object]] = [
    ("", "embed_dim", "8"),
    ("", "embed_dim", 0),
    ("", "quick_gelu", "yes"),
    ("", "init_logit_scale", float("nan")),
    ("", "init_logit_bias", []),
    ("", "vision_cfg", 3),
    ("", "text_cfg", None),
    ("vision_cfg", "layers", 10**9),
    ("vision_cfg", "layers", [1, 2]),
    ("vision_cfg", "layers", True),
    ("vision_cfg", "width", 10**12),
    ("vision_cfg", "head_width", 0),
    ("vision_cfg", "patch_size", None),
    ("vision_cfg", "patch_size", -8),
    ("vision_cfg", "image_size", [32, 64]),
    ("vision_cfg", "mlp_ratio", 0),
    ("vision_cfg", "mlp_ratio", "4"),
    ("vision_cfg", "patch_dropout", float("inf")),
    ("text_cfg", "heads", 0),
    ("text_cfg", "context_length", 1.5),
    ("text_cfg", "vocab_size", {}),
    ("text_cfg", "layers", -1),
    ("", "embed_dim", 10**400),
    ("", "init_logit_scale", 10**400),
    ("vision_cfg", "mlp_ratio", 10**400),
    ("vision_cfg", "mlp_ratio", 1e308),
    ("text_cfg", "mlp_ratio", 1e30),
    ("vision_cfg", "image_size", 1 << 24),
    ("vision_cfg", "layers", [12]),
]


@pytest.mark.parametrize(("part", "key", "value"), WRONG_VALUES)
def test_descriptions_with_values_that_cannot_be_are_refused(part, key, value):
    described = get_model_config("ViT-nano-8-32")
    (described[part] if part else described)[key] = value
    with pytest.raises(ValueError, match=key):
        ModelConfig.from_dict(described)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("visual.positional_embedding", (0, 32)),
        ("visual.positional_embedding", (1, 32)),
        ("visual.positional_embedding", (4, 32)),
        ("positional_embedding", (0, 32)),
    ],
)
def test_position_embeddings_of_no_image_and_no_text_are_named(tmp_path, name, shape):
    state = create_model("ViT-nano-8-32").state_dict()
    torch.save({**state, name: torch.zeros(shape)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"image positions|positional_embedding has no row"):
        create_model("ViT-nano-8-32", tmp_path / "w.pt")


def test_a_description_of_another_image_stretches_the_positions(tmp_path):
    """As open_clip does, and as with a name and force_image_size."""
    model = create_model("ViT-nano-8-32")
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    described = get_model_config("ViT-nano-8-32")
    described["vision_cfg"]["image_size"] = 48
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}))
    found, transform = create_model_from_pretrained(None, tmp_path)
    weights = tmp_path / "open_clip_model.safetensors"
    shutil.copy(weights, tmp_path / "w.safetensors")
    expected = create_model("ViT-nano-8-32", tmp_path / "w.safetensors", force_image_size=48)
    assert transform.image_size == 48
    assert torch.equal(found.visual.positional_embedding, expected.visual.positional_embedding)


def test_numbers_of_numpy_are_numbers():
    model = create_model(
        "ViT-nano-8-32", force_image_size=np.int64(48), init_logit_scale=np.float32(2.5)
    )
    assert model.visual.image_size == (48, 48) and model.logit_scale.item() == 2.5


def test_heads_that_do_not_divide_a_resnets_channels_are_refused():
    described = get_model_config("RN-nano-32")
    described["vision_cfg"]["head_width"] = 100
    with pytest.raises(ValueError, match="heads do not divide"):
        CLIP(
            ModelConfig.from_dict(
                described | {"vision_cfg": described["vision_cfg"] | {"width": 24}}
            )
        )


@pytest.mark.parametrize("described", [None, [], "ViT-B-32", 3, {}])
def test_what_is_no_description_is_refused(described):
    with pytest.raises(ValueError, match="the model's description"):
        ModelConfig.from_dict(described)


@pytest.mark.parametrize(
    ("part", "changed", "named"),
    [
        ("vision_cfg", {"width": 1 << 20}, "visual.class_embedding"),
        ("vision_cfg", {"image_size": 1 << 15}, "visual.positional_embedding"),
        ("text_cfg", {"context_length": 1 << 24}, "positional_embedding"),
        ("text_cfg", {"vocab_size": 1 << 24}, "token_embedding.weight"),
    ],
)
def test_a_description_of_a_huge_model_takes_no_memory(tmp_path, monkeypatch, part, changed, named):
    """The weights beside it are compared with its shapes before anything of its size is made."""
    model = create_model("ViT-nano-8-32")
    devices = []

    class Recorded(CLIP):
        def __init__(self, config: ModelConfig) -> None:
            super().__init__(config)
            devices.append(self.logit_scale.device.type)

    monkeypatch.setattr("clipcore.towers.loading.CLIP", Recorded)
    monkeypatch.setattr(
        "clipcore.towers.loading.F.interpolate", lambda *_, **__: pytest.fail("resized")
    )
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    described = model.config.to_dict()
    described[part] |= changed
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}))
    with pytest.raises(ValueError, match=rf"do not fit .*{named} is \[.*\] instead of \["):
        create_model_from_pretrained(None, tmp_path)
    assert devices == ["meta"]


OTHER_SHAPES = [(0,), (3,), (2, 2), (0, 0), (1, 2, 3, 4, 5)]
WITH_OTHER_SHAPES = [("logit_scale", shape) for shape in OTHER_SHAPES]
for _name in ("text_projection", "visual.conv1.weight", "positional_embedding", "ln_final.weight"):
    WITH_OTHER_SHAPES += [(_name, shape) for shape in ((), *OTHER_SHAPES)]


@pytest.mark.parametrize(("name", "shape"), WITH_OTHER_SHAPES)
def test_weights_of_shapes_that_no_clip_has_are_refused(tmp_path, name, shape):
    state = create_model("ViT-nano-8-32").state_dict()
    torch.save({**state, name: torch.zeros(shape)}, tmp_path / "w.pt")
    for model_name in (None, "ViT-nano-8-32"):
        with pytest.raises(ValueError, match="weights"):
            create_model_from_pretrained(model_name, tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"force_image_size": 4}, "holds no patch of 8"),
        ({"force_patch_dropout": 1.0}, "from 0 to below 1"),
        ({"precision": "int8"}, "is none of fp32, amp"),
        ({"model_name": "RN-nano-32", "force_patch_dropout": 0.5}, "leave it out for a ResNet"),
        ({"model_name": "RN-nano-32", "force_image_size": 50}, "multiple of 32"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(**{"model_name": "ViT-nano-8-32", **arguments})


def test_a_model_without_a_name_is_named():
    with pytest.raises(ValueError, match=r"got None; create_model_from_pretrained\(None, path\)"):
        create_model_and_transforms(None, pretrained="w.pt")


def test_create_model_and_transforms():
    model, train, val = create_model_and_transforms(
        "ViT-nano-8-32", force_image_size=48, force_quick_gelu=True
    )
    assert model.visual.image_size == (48, 48) and train.image_size == val.image_size == 48
    assert train.is_train and not val.is_train and model.config.quick_gelu


@pytest.mark.parametrize("name", ["ViT-nano-8-32", "RN-nano-32"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "pure_bf16"])
def test_low_precision_weights(name, precision):
    """The dtypes are open_clip's, and the features stay near those of float32."""
    torch.manual_seed(1)
    exact = create_model(name).eval()
    torch.manual_seed(1)
    model = create_model(name, precision=precision).eval()
    import_open_clip()
    from open_clip.model import convert_weights_to_lp

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "pure_bf16": torch.bfloat16}[precision]
    theirs = open_clip_model(exact.config)
    if precision.startswith("pure"):
        theirs.to(dtype)
    else:
        convert_weights_to_lp(theirs, dtype)
        assert model.logit_scale.item() == exact.logit_scale.item()
    assert {n: p.dtype for n, p in model.named_parameters()} == {
        n: p.dtype for n, p in theirs.named_parameters()
    }
    image, text = images(model.config), tokens(model.config)
    with torch.no_grad():
        for low, high in zip(model(image, text)[:2], exact(image, text)[:2], strict=True):
            assert low.dtype == dtype and F.cosine_similarity(low.float(), high).min() > 0.999


def test_output_dict():
    config = find_model("ViT-nano-8-32")
    model = create_model("ViT-nano-8-32", output_dict=True).eval()
    image, text = images(config), tokens(config)
    found = model(image, text)
    assert list(found) == ["image_features", "text_features", "logit_scale"]
    assert torch.equal(found["image_features"], model.encode_image(image, normalize=True))
    model.output_dict = False
    image_features, none, scale = model(image)
    assert torch.equal(image_features, found["image_features"]) and none is None
    assert torch.equal(scale, found["logit_scale"])
    assert model(text=text)[0] is None


@pytest.mark.parametrize("image_size", [16, 56])
@pytest.mark.parametrize("context_length", [20, 90])
def test_position_embeddings_are_resized_as_open_clip_does(tmp_path, image_size, context_length):
    small = create_model("ViT-nano-8-32")
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    ours = create_model(
        "ViT-nano-8-32",
        pretrained=tmp_path / "small.safetensors",
        force_image_size=image_size,
        force_context_length=context_length,
    )
    import_open_clip()
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    state = dict(small.state_dict())
    large = open_clip_model(ours.config)
    resize_pos_embed(state, large)
    resize_text_pos_embed(state, large)
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())


def test_position_embeddings_of_a_resnet_are_resized(tmp_path):
    small = create_model("RN-nano-32")
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    large = create_model(
        "RN-nano-32", pretrained=tmp_path / "small.safetensors", force_image_size=96
    )
    mean, grid = large.visual.attnpool.positional_embedding.split([1, 9])
    # A grid of one place becomes that place everywhere.
    assert torch.equal(mean, small.visual.attnpool.positional_embedding[:1])
    assert torch.allclose(grid, small.visual.attnpool.positional_embedding[1:].expand(9, -1))


@pytest.mark.parametrize("layout", ["open_clip", "ddp", "state_dict", "custom_text"])
def test_layouts_of_weights_are_read(tmp_path, layout):
    source = create_model("ViT-nano-8-32")
    state = dict(source.state_dict())
    if layout == "ddp":
        state = {f"module.{k}": v for k, v in state.items()}
    if layout == "custom_text":
        text = {k for k in state if not k.startswith("visual.") and k != "logit_scale"}
        state = {f"text.{k}" if k in text else k: v for k, v in state.items()}
        state["logit_scale"] = state["logit_scale"].reshape(1)
    path = tmp_path / "weights.pt"
    torch.save({"epoch": 3, "state_dict": state} if layout == "state_dict" else state, path)
    torch.manual_seed(99)
    loaded = create_model("ViT-nano-8-32", pretrained=path)
    assert all(
        torch.equal(a, b) for a, b in zip(source.parameters(), loaded.parameters(), strict=True)
    )


def test_weights_of_another_architecture_are_named(tmp_path):
    save_file(create_model("RN-nano-32").state_dict(), tmp_path / "rn.safetensors")
    with pytest.raises(ValueError) as error:
        create_model("ViT-nano-8-32", pretrained=tmp_path / "rn.safetensors")
    message = str(error.value)
    assert (
        "rn.safetensors do not fit ViT-nano-8-32: visual.conv1.weight is [4, 3, 3, 3] " in message
    )
    assert "visual.class_embedding is missing" in message
    assert message.endswith("and 151 more; they look like RN-nano-32")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("visual.proj", torch.full((32, 32), math.nan), "visual.proj in .* is not finite"),
        ("logit_scale", torch.tensor(math.inf), "logit_scale in .* is not finite"),
        ("visual.proj", torch.ones(32, 32, dtype=torch.int8), "quantised weights are not read"),
        ("visual.conv1.lora_A", torch.ones(2), "hold more than ViT-nano-8-32: .* merge an adapter"),
    ],
)
def test_weights_that_compute_nothing_or_something_else_are_named(tmp_path, name, value, message):
    state = create_model("ViT-nano-8-32").state_dict()
    torch.save({**state, name: value}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        create_model("ViT-nano-8-32", pretrained=tmp_path / "w.pt")


def test_weights_of_another_vocabulary_or_layout_are_named(tmp_path):
    save_file(
        create_model("ViT-nano-8-32", force_vocab_size=600).state_dict(), tmp_path / "a.safetensors"
    )
    with pytest.raises(
        ValueError, match=r"embedding.weight is \[600, 32\] instead of \[514, 32\]; .* 600 tokens"
    ):
        create_model("ViT-nano-8-32", pretrained=tmp_path / "a.safetensors")
    extra = {**create_model("ViT-nano-8-32").state_dict(), "logit_bias": torch.zeros(())}
    save_file(extra, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="have a logit_bias, as SigLIP's do"):
        create_model("ViT-nano-8-32", pretrained=tmp_path / "b.safetensors")
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="not a CLIP of OpenAI"):
        create_model("ViT-nano-8-32", pretrained=tmp_path / "c.safetensors")


def test_the_architecture_is_read_off_the_shapes(tmp_path):
    nano = create_model("ViT-nano-8-32", force_image_size=48, force_vocab_size=700)
    save_file(nano.state_dict(), tmp_path / "nano.safetensors")
    with pytest.warns(UserWarning, match="activation.*with GELU"):
        model, transform = create_model_from_pretrained(None, tmp_path / "nano.safetensors")
    assert model.config == nano.config and transform.image_size == 48 and not model.training
    with pytest.raises(ValueError, match="force_quick_gelu needs the name"):
        create_model_from_pretrained(None, tmp_path / "nano.safetensors", force_quick_gelu=True)


def test_weights_of_openai_have_quick_gelu(tmp_path, monkeypatch):
    """A published shape without a description is taken for OpenAI's; here a small one is called published."""
    monkeypatch.setattr("clipcore.towers.factory.OPENAI_MODELS", ("ViT-nano-8-32",))
    torch.save(create_model("ViT-nano-8-32").state_dict(), tmp_path / "weights.pt")
    with pytest.warns(UserWarning, match="ViT-nano-8-32 with QuickGELU"):
        model, _ = create_model_from_pretrained(None, tmp_path / "weights.pt")
    assert model.config.quick_gelu
    model, _ = create_model_from_pretrained("ViT-nano-8-32", tmp_path / "weights.pt")
    assert not model.config.quick_gelu


@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_a_folder_that_describes_its_model_needs_no_name(tmp_path, layout):
    source = create_model("ViT-nano-8-32", force_quick_gelu=True, force_image_size=40).eval()
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.2, 0.1]
    if layout == "open_clip":
        described = {
            "model_cfg": source.config.to_dict(),
            "preprocess_cfg": {"mean": mean, "std": std, "interpolation": "bicubic"},
        }
        (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
        save_file(source.state_dict(), tmp_path / "open_clip_model.safetensors")
    else:
        (tmp_path / "config.json").write_text(json.dumps(hf_config(source.config)))
        (tmp_path / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": mean, "image_std": std})
        )
        save_file(to_hf(source.state_dict()), tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, transform = create_model_from_pretrained(None, tmp_path)
    assert model.config == source.config
    assert (transform.mean, transform.std) == (tuple(mean), tuple(std))
    image = images(source.config)
    assert torch.equal(model.encode_image(image), source.encode_image(image))


def with_vocabulary(config: ModelConfig, size: int) -> ModelConfig:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=size))


def test_short_names_are_the_published_ones_whatever_the_vocabulary():
    for name in list_models():
        config = find_model(name)
        assert find_model(config.short_name).shapes == config.shapes
        small = with_vocabulary(config, 2000)
        assert with_vocabulary(find_model(small.short_name), 2000).shapes == small.shapes
    for name in ("RN50", "ViT-B-32", "ViT-glyphs", "ViT-B-16-SigLIP-i18n-256"):
        assert find_model(name).short_name == name
    shapes = {"ViT-glyphs": "ViT-128x4-16-32", "RN50": "RN-64x3.4.6.3-224"}
    for name, expected in shapes.items():
        other = dataclasses.replace(find_model(name), embed_dim=33)
        assert other.short_name == expected
        assert dataclasses.replace(other, quick_gelu=True).short_name == f"{expected}-quickgelu"
