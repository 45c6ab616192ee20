"""What open_clip's and OpenAI's own test files check, written anew, with clipcore in the place of their packages.

docs/from-open-clip.md lists their files, which test is of which, and what is left out. Imports of ``open_clip``,
``open_clip_train`` and ``clip`` within a test find clipcore (in_their_place.py); the real open_clip is ``OPEN_CLIP``.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_their_place import clipcore_in_their_place
from openclip import import_open_clip, theirs_of
from PIL import Image
from runs import NANO, ROOT, leave_process_alone
from shards import write_tar
from torch.nn.functional import logsigmoid
from weight_files import picture, saved

from clipcore.run.metrics import read_metrics
from clipcore.towers import open_clip_arguments

VIT, RESNET = "ViT-nano-8-32", "RN-nano-32"
# Before clipcore is in its place.
OPEN_CLIP = import_open_clip()


@pytest.fixture(autouse=True)
def in_their_place() -> Iterator[None]:
    with clipcore_in_their_place():
        yield


def test_nothing_of_theirs_is_imported() -> None:
    import clip
    import open_clip
    from open_clip.factory import get_tokenizer

    import clipcore

    assert open_clip.create_model is clipcore.create_model and clip.load is clipcore.load
    assert get_tokenizer is clipcore.get_tokenizer
    with pytest.raises(ImportError):
        from open_clip import CustomTextCLIP  # noqa: F401
    with pytest.raises(ImportError):
        from open_clip.hf_model import HFTextEncoder  # noqa: F401
    assert OPEN_CLIP.create_model is not clipcore.create_model


# --- test_inference.py, test_inference_simple.py, util_test.py ---


def captions_of_random_symbols() -> list[str]:
    """Return captions as open_clip's tests make them: symbols of the vocabulary, drawn at random."""
    import open_clip

    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    words = [
        symbol.replace("</w>", " ")
        for number, symbol in tokenizer.decoder.items()
        if number not in tokenizer.all_special_ids
    ]
    assert len(words) == 49406
    generator = np.random.default_rng(0)
    return ["".join(generator.choice(words, length)) for length in (3, 40, 75, 200)]


def test_random_symbols_have_open_clips_ids() -> None:
    import open_clip

    captions = captions_of_random_symbols()
    rows = open_clip.get_tokenizer("ViT-B-32")(captions)
    assert torch.equal(rows, OPEN_CLIP.tokenizer.SimpleTokenizer()(captions))
    assert torch.equal(rows, open_clip.tokenize(captions))


@pytest.mark.parametrize("name", [VIT, RESNET])
def test_a_model_of_saved_weights_has_open_clips_outputs(name: str, tmp_path: Path) -> None:
    """From files to probabilities: preprocessing, ids, features and the three outputs, in float64."""
    import open_clip

    config = open_clip.get_model_config(name)
    theirs = theirs_of(open_clip.create_model(name, force_vocab_size=49408)).double().eval()
    weights = saved(tmp_path / "weights.pt", theirs)
    model, _, preprocess = open_clip.create_model_and_transforms(
        name, pretrained=str(weights), precision="fp64", force_vocab_size=49408
    )
    model.eval()

    side = model.visual.image_size
    their_preprocess = OPEN_CLIP.image_transform(side, is_train=False)
    pictures = [picture(), picture(32, 32), picture(30, 90)]
    images = torch.stack([preprocess(one) for one in pictures])
    assert torch.equal(images, torch.stack([their_preprocess(one) for one in pictures]))
    tokens = open_clip.get_tokenizer("ViT-B-32")(captions_of_random_symbols()[:3])
    images = images.double()

    with torch.no_grad():
        expected = theirs(images, tokens)
        found = model(images, tokens)
        assert len(found) == len(expected) == 3
        for ours, of_theirs in zip(found, expected, strict=True):
            assert ours.shape == of_theirs.shape
            assert torch.allclose(ours, of_theirs, rtol=1e-12, atol=1e-12)
        assert found[0].shape == (3, config["embed_dim"])
        # The same outputs by name, where the attribute is set, and a tuple again where it is not.
        model.output_dict = True
        named = model(images, tokens)
        model.output_dict = None
        names = ("image_features", "text_features", "logit_scale")
        assert all(torch.equal(named[n], x) for n, x in zip(names, found, strict=True))
        assert isinstance(model(images, tokens), tuple)

        # What test_inference_simple.py computes.
        features = model.encode_image(images), model.encode_text(tokens)
        probabilities = (100.0 * features[0] @ features[1].T).softmax(dim=-1)
        of_theirs = 100.0 * theirs.encode_image(images) @ theirs.encode_text(tokens).T
        assert torch.allclose(probabilities, of_theirs.softmax(dim=-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("force_custom_text", [False, True])
def test_weights_of_both_text_layouts_load(force_custom_text: bool, tmp_path: Path) -> None:
    import open_clip

    source = open_clip.create_model(VIT)
    weights = saved(tmp_path / "weights.pt", source)
    given = {"pretrained": str(weights), "force_custom_text": force_custom_text}
    if force_custom_text:
        open_clip_arguments.note_custom_text.cache_clear()
        with pytest.warns(UserWarning, match="force_custom_text"):
            model = open_clip.create_model(VIT, **given)
    else:
        model = open_clip.create_model(VIT, **given)
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])
    with pytest.raises(ValueError, match=r"jit=True exists only in open_clip; .*torch\.jit\.trace"):
        open_clip.create_model(VIT, jit=True)


class Head(torch.nn.Module):
    """A model within a larger module, which takes its outputs by name or by place."""

    def __init__(self, model: Any, width: int, output_dict: bool) -> None:
        super().__init__()
        self.model, self.output_dict = model, output_dict
        self.model.output_dict = output_dict
        self.head = torch.nn.Linear(width, 2)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        output = self.model(image, text)
        return self.head(output["image_features"] if self.output_dict else output[0])


@pytest.mark.parametrize("output_dict", [False, True])
def test_a_model_within_a_module_is_traced(output_dict: bool) -> None:
    """open_clip's test scripts it; clipcore's towers are traced."""
    import open_clip

    model = open_clip.create_model(VIT).eval()
    module = Head(model, open_clip.get_model_config(VIT)["embed_dim"], output_dict)
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 500, (2, 77))
    traced = torch.jit.trace(module, (images, tokens))
    found, expected = traced(images[:1], tokens[:1]), module(images[:1], tokens[:1])
    assert found.shape == (1, 2) and torch.allclose(found, expected, rtol=0, atol=1e-6)


# --- test_training_simple.py ---

TRAINING = (
    "--save-frequency 1 --zeroshot-frequency 1 --dataset-type synthetic --train-num-samples 16 --warmup 1 --batch-size 4 "
    "--lr 1e-3 --wd 0.1 --epochs 1"
).split()


@pytest.mark.parametrize(
    ("more", "num_steps"),
    [
        ([], 4),
        (["--model", RESNET, "--lock-text", "--lock-text-unlocked-layers", "1"], 4),
        (["--lock-image", "--lock-image-unlocked-groups", "2", "--accum-freq", "2"], 2),
    ],
    ids=["ViT", "ResNet, unfrozen layers", "unfrozen groups"],
)
def test_a_short_run_on_synthetic_data(
    more: list[str],
    num_steps: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from open_clip_train.main import main

    leave_process_alone(monkeypatch)
    main([*NANO, *TRAINING, *more, "--logs", str(tmp_path), "--name", "r"])
    assert "synthetic: 1,000,000 pairs; 1 epochs of batch" in capsys.readouterr().out
    steps, _ = read_metrics(tmp_path / "r")
    assert len(steps) == num_steps and all(np.isfinite(row["loss"]) for row in steps)
    assert [path.name for path in (tmp_path / "r/checkpoints").glob("step_*")] == [
        f"step_{num_steps:08d}"
    ]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model", "coca_ViT-B-32"], "coca_ViT-B-32"),
        (["--model", "mt5-base-ViT-B-32"], "mt5-base-ViT-B-32"),
        (["--trace"], "--trace exists only in open_clip"),
    ],
)
def test_what_is_left_out_of_training_is_one_line(
    more: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from open_clip_train.main import main

    with pytest.raises((SystemExit, RuntimeError)) as raised:
        main([*NANO, *TRAINING, *more, "--logs", str(tmp_path)])
    assert str(raised.value) in ("2", "clipcore.train ended with status 2")
    last = capfd.readouterr().err.splitlines()[-1]
    assert "error: " in last and said in last


# --- test_num_shards.py, test_wds.py ---


@pytest.mark.parametrize(
    ("shards", "number"),
    [
        ("data/shard.tar", 1),
        ("data/shard_{000..000}.tar", 1),
        ("data/shard_{000..009}.tar", 10),
        ("data/shard_{000..009}_{000..009}.tar", 100),
        ("data/shard.tar::data/other_{000..009}.tar", 11),
        ("data/shard_{000..009}.tar::data/other_{000..009}.tar", 20),
        (["data/shard.tar"], 1),
        (["data/shard.tar", "data/other.tar"], 2),
    ],
)
def test_patterns_of_shards_are_counted(shards: str | list[str], number: int) -> None:
    from open_clip_train.data import get_dataset_size

    assert get_dataset_size(shards) == (None, number)


@pytest.fixture
def two_shards(tmp_path: Path) -> tuple[Path, Path]:
    """Return a shard of ten samples and one of five, whose captions name the shard and the sample."""
    png = BytesIO()
    Image.new("RGB", (32, 32)).save(png, "PNG")
    paths = []
    for shard, size in (("000", 10), ("001", 5)):
        members = []
        for number in range(size):
            members.append((f"{number}.png", png.getvalue()))
            members.append((f"{number}.txt", f"{shard}_{number}".encode()))
        paths.append(write_tar(tmp_path / f"{shard}.tar", members))
    return paths[0], paths[1]


@pytest.mark.parametrize(
    ("pattern", "factors", "counts"),
    [
        ("{0}", None, {"000": 6}),
        ("{2}", None, {"000": 4, "001": 4}),
        ("{0}::{1}", "1::1", {"000": 4, "001": 4}),
        ("{0}::{1}", "1::2", {"000": 3, "001": 6}),
    ],
    ids=["one source", "braces", "same weights", "upsampling"],
)
def test_samples_are_seen_as_often_as_their_sources_weigh(
    pattern: str, factors: str | None, counts: dict[str, int], two_shards: tuple[Path, Path]
) -> None:
    """open_clip's draws come near to these numbers; clipcore's epochs have each of them exactly."""
    from open_clip_train.data import get_wds_dataset
    from open_clip_train.main import random_seed
    from open_clip_train.params import parse_args

    args = parse_args([])
    args.train_data = pattern.format(*two_shards, two_shards[0].with_name("{000..001}.tar"))
    args.train_num_samples, args.dataset_resampled, args.seed = 60, True, 0
    args.workers, args.world_size, args.batch_size = 0, 1, 1
    args.train_data_upsampling_factors = factors
    random_seed(0)
    dataset = get_wds_dataset(args, None, is_train=True, tokenizer=lambda text: [text.strip()])
    seen = Counter(text for _, texts in dataset.dataloader for text in texts)
    assert seen == {
        f"{shard}_{number}": counts[shard]
        for shard, size in (("000", 10), ("001", 5))
        if shard in counts
        for number in range(size)
    }


# --- OpenAI's test_consistency.py ---


def test_the_traced_model_of_openais_load_is_the_model(tmp_path: Path) -> None:
    import clip

    assert {"ViT-B/32", "RN50"} <= {*clip.available_models()}
    source = importlib.import_module("clipcore").create_model(
        VIT, force_vocab_size=49408, force_quick_gelu=True
    )
    path = saved(tmp_path / "weights.pt", source)
    model, transform = clip.load(str(path), device="cpu", jit=False)
    image = transform(picture()).unsqueeze(0)
    text = clip.tokenize(["a diagram", "a dog", "a cat"])
    with torch.no_grad():
        traced = torch.jit.trace(model, (image, text))
        expected, found = model(image, text), traced(image, text)
        assert [logits.shape for logits in expected] == [(1, 3), (3, 1)]
        for ours, of_trace in zip(expected, found, strict=True):
            assert torch.allclose(ours.softmax(-1), of_trace.softmax(-1), rtol=0, atol=1e-6)

        # And the probabilities are those of the features.
        image_features = model.encode_image(image, normalize=True)
        text_features = model.encode_text(text, normalize=True)
        logits = model.logit_scale.exp() * image_features @ text_features.T
        assert torch.allclose(expected[0], logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"jit=True exists only in OpenAI's package"):
        clip.load(str(path), device="cpu", jit=True)


# --- Files that are newer than open_clip 3.3 ---


def sigmoid_inputs(size: int, num_texts: int) -> list[torch.Tensor]:
    """Return unit features of ``size`` images and ``num_texts`` texts, a scale and a bias, in float64."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(n, 16, generator=generator).double() for n in (size, num_texts)]
    scalars = [torch.tensor(10.0).double(), torch.tensor(-10.0).double()]
    inputs = [torch.nn.functional.normalize(x, dim=-1) for x in features] + scalars
    return [x.requires_grad_() for x in inputs]


@pytest.mark.parametrize("chunk_size", [0, 1, 8, 64])
def test_the_sigmoid_loss_is_the_same_in_chunks(chunk_size: int) -> None:
    """70 is no multiple of 8: the last chunk is smaller."""
    from open_clip.loss import SigLipLoss

    inputs = sigmoid_inputs(70, 70)
    image, text, scale, bias = inputs
    signs = 2 * torch.eye(70).double() - 1
    expected = -logsigmoid(signs * (scale * image @ text.T + bias)).sum() / 70
    expected_gradients = torch.autograd.grad(expected, inputs)
    found = SigLipLoss(chunk_size=chunk_size)(*inputs, output_dict=True)["contrastive_loss"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, reference in zip(torch.autograd.grad(found, inputs), expected_gradients, strict=True):
        assert torch.allclose(ours, reference, rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        assert not SigLipLoss(chunk_size=chunk_size)(*inputs).requires_grad


def test_a_sum_of_float16_pairs_does_not_overflow() -> None:
    """256 x 256 pairs of loss 10 are more than float16 holds."""
    from open_clip.loss import SigLipLoss

    zeros = torch.zeros(256, 4)
    scale, bias = torch.ones(()), torch.full((), 10.0)
    expected = SigLipLoss()(zeros, zeros, scale, bias)
    found = SigLipLoss()(zeros.half(), zeros.half(), scale.half(), bias.half())
    assert found.dtype == torch.float32 and expected.item() > 2000
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_shorter_side_is_resized_as_was_asked_for(interpolation: str) -> None:
    from open_clip.transform import image_transform

    checkerboard = (np.indices((10, 20)).sum(axis=0) % 2 * 255).astype(np.uint8)
    image = Image.fromarray(np.repeat(checkerboard[..., None], 3, axis=2))
    transform = image_transform(
        8,
        is_train=False,
        resize_mode="shortest",
        interpolation=interpolation,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    resized = image.resize((16, 8), Image.Resampling[interpolation.upper()]).crop((4, 0, 12, 8))
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
    assert torch.equal(transform(image), expected)


def test_early_intermediates_of_a_resnet_leave_its_features_alone() -> None:
    import open_clip

    tower = open_clip.create_model(RESNET).visual.eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        output = tower.forward_intermediates(x, indices=[0, 1])
        early = tower.forward_intermediates(
            x, indices=[0, 1], stop_early=True, intermediates_only=True
        )
        assert torch.equal(output["image_features"], tower(x))
    assert len(output["image_intermediates"]) == 2 and "image_features" not in early
    for whole, stopped in zip(
        output["image_intermediates"], early["image_intermediates"], strict=True
    ):
        assert torch.equal(whole, stopped)


# --- The document ---


def test_the_document_names_tests_that_there_are() -> None:
    document = (ROOT / "docs" / "from-open-clip.md").read_text()
    section = document.partition("## Their own tests")[2].partition("\n## ")[0]
    named = re.findall(r"`(test_\w+)`", section)
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    mine = re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.MULTILINE)
    assert named and all(f"def {name}(" in sources for name in named)
    # And every test of this file is of one of their files.
    others = {"test_nothing_of_theirs_is_imported", "test_the_document_names_tests_that_there_are"}
    assert {*mine} - others <= {*named}
