"""``python -m clipcore.export``: folders that other packages load, with the same features and ids, or nothing at all."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openclip import import_open_clip
from PIL import Image
from torch import Tensor
from weight_files import hub_folder, saved

from clipcore.evaluate.loading import load_model
from clipcore.export import TARGETS, check, export_model, write
from clipcore.export.__main__ import main
from clipcore.export.check import CheckError, Examples
from clipcore.export.onnx_towers import write_onnx
from clipcore.export.vocabulary import write_tokenizer
from clipcore.inspection import inspect_weights
from clipcore.tokenizer import Tokenizer, byte_tokenizer, get_tokenizer, train_tokenizer
from clipcore.towers import layouts
from clipcore.towers.architectures import ModelConfig, TextConfig, VisionConfig
from clipcore.towers.factory import create_model, create_model_from_pretrained
from clipcore.towers.model import CLIP

# As OpenAI's package needs them: heads of 64, QuickGELU, its vocabulary.
OPENAI = ModelConfig(
    64,
    VisionConfig(image_size=32, layers=2, width=64, patch_size=8),
    TextConfig(width=64, heads=1, layers=2),
    quick_gelu=True,
)
OPENAI_RESNET = ModelConfig(
    64,
    VisionConfig(image_size=32, layers=(1, 1, 1, 1), width=16, patch_size=None),
    TextConfig(width=64, heads=1, layers=2),
    quick_gelu=True,
)


@pytest.fixture(autouse=True)
def peers() -> None:
    """Make torchvision importable beside a CPU build of torch, which open_clip and transformers import."""
    import_open_clip()


@pytest.fixture
def captions() -> Iterator[str]:
    words = "red dog small cat old house green tree big car photo of the a on under".split()
    return (f"{a} {b} {c}" for a in words for b in words for c in words[:5])


def drawn(config: ModelConfig) -> CLIP:
    torch.manual_seed(0)
    model = CLIP(config).eval()
    # Statistics that matter.
    for name, value in model.named_buffers():
        if "running" in name:
            value.uniform_(0.5, 1.5)
    return model


def features(model: CLIP) -> tuple[Tensor, Tensor]:
    examples = Examples(model)
    return examples.image_features, examples.text_features


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("target", ["open_clip", "transformers", "onnx"])
def test_a_model_with_its_own_vocabulary_goes_to_other_packages(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], captions: Iterator[str]
) -> None:
    tokenizer = train_tokenizer(captions, 560)
    model = create_model("ViT-nano-8-32", force_vocab_size=tokenizer.vocab_size).eval()
    model.set_images({"mean": (0.5, 0.4, 0.3), "std": (0.3, 0.3, 0.3), "resize_mode": "squash"})
    images = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.3, 0.3], "resize_mode": "squash"}
    source, out = hub_folder(tmp_path / "hub", model, images), tmp_path / "exported/out"
    vocabulary = tmp_path / "vocabulary.txt.gz"
    tokenizer.save(vocabulary)

    arguments = [str(source), str(out), "--to", target, "--bpe-path", str(vocabulary)]
    assert main(arguments) == 0
    said = capsys.readouterr().out.splitlines()
    package = "onnxruntime" if target == "onnx" else target
    assert any(
        line.startswith(package) and " loads it, and its features agree" in line for line in said
    )
    assert left_in(out.parent) == ["out"]

    if target != "onnx":
        loaded = load_model(pretrained=str(out))
        assert loaded.tokenizer.sha256 == tokenizer.sha256
        assert loaded.model.config == model.config
        assert {name: loaded.model.images[name] for name in model.images} == model.images
        for own, read in zip(features(model), features(loaded.model), strict=True):
            assert torch.equal(own, read)


# A Vision Transformer in ONNX is above.
PAIRS = [(target, OPENAI_RESNET) for target in TARGETS] + [
    (target, OPENAI) for target in ("open_clip", "transformers", "openai")
]


@pytest.mark.parametrize(("target", "config"), PAIRS)
def test_weights_with_openais_vocabulary_go_to_every_package_that_can_hold_them(
    target: str, config: ModelConfig, tmp_path: Path
) -> None:
    model, lines = drawn(config), list[str]()
    expected = features(model)
    if target == "transformers" and config is OPENAI_RESNET:
        with pytest.raises(ValueError, match="transformers has no form of CLIP's ResNets"):
            export_model(model, get_tokenizer(), target, tmp_path / "out")
        assert left_in(tmp_path) == []
        return

    export_model(model, get_tokenizer(), target, tmp_path / "out", lines.append)
    package = {"openai": "open_clip", "onnx": "onnxruntime"}.get(target, target)
    assert lines[-1].startswith(package) and "its features agree to" in lines[-1]
    if target != "onnx":
        assert lines[0] == "clipcore reads it back, with equal bits"
        path = tmp_path / "out" / (layouts.OPENAI_WEIGHTS if target == "openai" else "")
        loaded = load_model(pretrained=str(path))
        assert loaded.tokenizer.sha256 == get_tokenizer().sha256
        for own, read in zip(expected, features(loaded.model), strict=True):
            assert torch.equal(own, read)


@pytest.mark.parametrize("target", ["open_clip", "transformers"])
def test_a_vocabulary_of_openais_size_is_still_ones_own(target: str, tmp_path: Path) -> None:
    *merges, last, second = get_tokenizer().merge_lines()
    tokenizer = Tokenizer(tuple(line.split()) for line in (*merges, second, last))
    assert tokenizer.vocab_size == get_tokenizer().vocab_size
    assert tokenizer.sha256 != get_tokenizer().sha256
    export_model(drawn(OPENAI), tokenizer, target, tmp_path / "out")

    with pytest.warns(UserWarning, match="other merges"):
        assert get_tokenizer(f"local-dir:{tmp_path / 'out'}").sha256 == tokenizer.sha256
    weights = next((tmp_path / "out").glob("*.safetensors"))
    for path in (tmp_path / "out", weights):
        with pytest.warns(UserWarning, match="other merges"):
            assert load_model(pretrained=str(path)).tokenizer.sha256 == tokenizer.sha256
        assert str(tmp_path / "out/merges.txt") in inspect_weights(path).vocabulary


@pytest.mark.parametrize("target", ["open_clip", "transformers", "openai"])
def test_what_changes_no_feature_keeps_no_model_from_being_exported(
    target: str, tmp_path: Path
) -> None:
    vision = dataclasses.replace(OPENAI.vision, patch_dropout=0.5)
    config = dataclasses.replace(OPENAI, vision=vision, init_logit_scale=2.3)
    if target != "openai":
        text = dataclasses.replace(OPENAI.text, mlp_ratio=4.3637)
        config = dataclasses.replace(config, text=text)
    lines = list[str]()
    export_model(drawn(config), get_tokenizer(), target, tmp_path / "out", lines.append)
    assert len(lines) == 2 and "its features agree" in lines[1]


def test_folders_that_cannot_be_replaced_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_write", lambda *_: pytest.fail("it was written"))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    for path in (tmp_path / "link", Path("."), tmp_path / "real"):
        with pytest.raises(ValueError, match=r"name another one|name a new one"):
            export_model(drawn(OPENAI), get_tokenizer(), "open_clip", path)


def test_a_refusal_leaves_no_folder_above(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no form of CLIP's ResNets"):
        export_model(drawn(OPENAI_RESNET), get_tokenizer(), "transformers", tmp_path / "a/b/out")
    assert left_in(tmp_path) == []


def test_sigterm_leaves_no_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C does not either; the handler of before is there again."""
    source = saved(tmp_path / "weights.pt", drawn(OPENAI))
    before = signal.getsignal(signal.SIGTERM)

    def stopped(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(write, "write_open_clip", lambda *_, **__: stopped())
    with pytest.raises(SystemExit) as ended:
        main([str(source), str(tmp_path / "out"), "--to", "open_clip"])
    assert ended.value.code == 128 + signal.SIGTERM
    assert left_in(tmp_path) == ["weights.pt"] and signal.getsignal(signal.SIGTERM) is before


def test_a_model_saves_itself_as_open_clip_reads_it(tmp_path: Path) -> None:
    model = drawn(OPENAI)
    model.set_images({"mean": (0.5, 0.5, 0.5), "resize_mode": "squash"})
    model.save_pretrained(tmp_path / "new/folder")
    loaded, _ = create_model_from_pretrained(None, tmp_path / "new/folder")
    theirs = import_open_clip().create_model(f"local-dir:{tmp_path / 'new/folder'}").eval()
    assert loaded.config == model.config and loaded.images["resize_mode"] == "squash"
    assert theirs.visual.preprocess_cfg["mean"] == [0.5, 0.5, 0.5]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert torch.equal(theirs.state_dict()[name], value)


def test_towers_in_onnx_take_any_batch_and_describe_themselves(tmp_path: Path) -> None:
    import onnxruntime

    model = create_model("ViT-nano-8-32", init_logit_bias=-10.0).eval()
    write_onnx(model, tmp_path)
    for file, name in (("image.onnx", "images"), ("text.onnx", "tokens")):
        session = onnxruntime.InferenceSession(tmp_path / file, providers=["CPUExecutionProvider"])
        assert [given.name for given in session.get_inputs()] == [name]
        for size in (1, 5):
            inputs = torch.randn(size, 3, 32, 32)
            if name == "tokens":
                inputs = torch.randint(1, 512, (size, 77))
                inputs[torch.arange(size), torch.randint(1, 77, (size,))] = 513
            (found,) = session.run(
                [name.replace("tokens", "text").rstrip("s") + "_features"], {name: inputs.numpy()}
            )
            encode = model.encode_image if name == "images" else model.encode_text
            torch.testing.assert_close(
                torch.from_numpy(found),
                encode(inputs, normalize=True).detach(),
                rtol=1e-4,
                atol=1e-5,
            )
    described = json.loads((tmp_path / "clip.json").read_text())
    assert described["logit_bias"] == -10.0
    assert described["logit_scale"] == pytest.approx(1 / 0.07)
    assert described["preprocessing"]["size"] == 32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quick_gelu": False}, "GELU"),
        ({"init_logit_bias": -10.0}, "logit bias"),
        ({"vision": VisionConfig(32, 2, 64, 8, head_width=32)}, "image tower are 32 wide"),
        ({"text": TextConfig(width=64, heads=2, layers=2)}, "text tower are 32 wide"),
        ({"vision": VisionConfig(32, 2, 64, 8, mlp_ratio=2.0)}, "MLPs"),
    ],
)
def test_what_openais_package_would_make_another_model_of_is_refused(
    change: dict[str, object], reason: str, tmp_path: Path
) -> None:
    model = drawn(dataclasses.replace(OPENAI, **change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=reason):
        export_model(model, get_tokenizer(), "openai", tmp_path / "out")
    assert left_in(tmp_path) == []


def test_other_refusals_name_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(model: CLIP, target: str, tokenizer: object = None) -> str:
        path = saved(tmp_path / "weights.pt", model)
        vocabulary = tmp_path / "vocabulary.txt.gz"
        byte_tokenizer().save(vocabulary)
        arguments = [
            str(path),
            str(tmp_path / "out"),
            "--to",
            target,
            "--bpe-path",
            str(vocabulary),
        ]
        assert main(arguments) == 2
        assert not (tmp_path / "out").exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    nano = create_model("ViT-nano-8-32")
    assert "has its own vocabulary" in refused(nano, "openai")
    siglip = create_model("ViT-nano-8-32", init_logit_bias=-10.0)
    assert "no logit bias" in refused(siglip, "transformers")
    with monkeypatch.context() as patch:
        find = importlib.util.find_spec
        patch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
        )
        assert 'needs onnxscript: pip install "clipcore[export]"' in refused(nano, "onnx")

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    assert (
        main(
            [
                str(tmp_path / "weights.pt"),
                str(tmp_path / "taken"),
                "--to",
                "onnx",
                "--bpe-path",
                str(tmp_path / "vocabulary.txt.gz"),
            ]
        )
        == 2
    )
    assert "not an empty folder" in capsys.readouterr().err
    assert left_in(tmp_path / "taken") == ["file"]


@pytest.mark.parametrize(
    "images",
    [
        {"interpolation": "bilinear", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        {"resize_mode": "longest", "fill_color": 127},
    ],
    ids=["bilinear", "longest"],
)
def test_preprocessing_is_kept_or_refused(images: dict[str, Any], tmp_path: Path) -> None:
    model = drawn(OPENAI)
    model.set_images(images)
    export_model(model, get_tokenizer(), "open_clip", tmp_path / "open_clip")
    theirs = import_open_clip().create_model_and_transforms(f"local-dir:{tmp_path / 'open_clip'}")
    picture = Image.effect_noise((50, 40), 90).convert("RGB")
    ours = load_model(pretrained=str(tmp_path / "open_clip"))
    assert torch.equal(ours.transform(picture), theirs[2](picture))

    with pytest.raises(ValueError, match="its preprocessing has another"):
        export_model(model, get_tokenizer(), "openai", tmp_path / "openai")
    if "resize_mode" in images:
        with pytest.raises(ValueError, match="does not pad"):
            export_model(model, get_tokenizer(), "transformers", tmp_path / "transformers")
    else:
        export_model(model, get_tokenizer(), "transformers", tmp_path / "transformers")
        read = load_model(pretrained=str(tmp_path / "transformers")).model.images
        assert {name: read[name] for name in images} == images
    assert "openai" not in left_in(tmp_path)


@pytest.mark.parametrize("target", ["open_clip", "transformers", "openai"])
def test_a_wrong_export_is_found_and_leaves_nothing(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight is off by a little as it is written, which a comparison of shapes would not find."""
    plain = layouts._plain

    def wrong(state: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = plain(state)
        max(changed.values(), key=Tensor.numel).view(-1)[-1] += 1e-3
        return changed

    monkeypatch.setattr(layouts, "_plain", wrong)
    with pytest.raises(CheckError, match="clipcore reads back other weights"):
        export_model(drawn(OPENAI), get_tokenizer(), target, tmp_path / "out")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("target", ["open_clip", "transformers", "openai"])
def test_another_packages_features_and_ids_are_compared(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is another model, which clipcore's own reader is kept from seeing."""
    monkeypatch.setattr(check, "_compare_weights", lambda *_: None)
    model, other = drawn(OPENAI), drawn(OPENAI)
    torch.nn.init.normal_(other.text_projection)
    name = f"write_{target}"
    honest = getattr(write, name)
    monkeypatch.setattr(write, name, lambda _, *rest, **named: honest(other, *rest, **named))
    if target == "openai":
        monkeypatch.setattr(check, "_rounded", lambda _: model)
    with pytest.raises(CheckError, match="gives other features"):
        export_model(model, get_tokenizer(), target, tmp_path / "out")
    assert left_in(tmp_path) == []


def test_other_ids_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(tokenizer: object, folder: Path) -> None:
        write_tokenizer(get_tokenizer(), folder)
        path = folder / "vocab.json"
        ids = json.loads(path.read_text())
        ids["cat</w>"], ids["dogs</w>"] = ids["dogs</w>"], ids["cat</w>"]
        path.write_text(json.dumps(ids))

    monkeypatch.setattr(write, "write_tokenizer", wrong)
    with pytest.raises(CheckError, match="tokenizes 'a photo of a cat' in another way"):
        export_model(drawn(OPENAI), get_tokenizer(), "transformers", tmp_path / "out")


def test_a_package_that_does_not_import_is_named_and_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, _, load = check._PACKAGES["open_clip"]
    monkeypatch.setitem(check._PACKAGES, "open_clip", (package, ("no_such_name",), load))
    lines = list[str]()
    export_model(drawn(OPENAI), get_tokenizer(), "open_clip", tmp_path / "out", lines.append)
    assert lines[-1].startswith("open_clip is installed, cannot be imported, and was not asked")
    assert (tmp_path / "out/open_clip_config.json").is_file()
