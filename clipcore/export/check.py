"""Loads what an export has written, by clipcore and by the package that it is for, and compares features."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipcore.export import onnx_towers
from clipcore.packages import package_folder
from clipcore.ranks.failures import is_out_of_memory
from clipcore.terminal import first_line
from clipcore.tokenizer import HubTokenizer, Tokenizer
from clipcore.towers.architectures import ModelConfig
from clipcore.towers.descriptions import HF_FILE
from clipcore.towers.factory import cast, create_model_from_pretrained
from clipcore.towers.layouts import OPENAI_WEIGHTS
from clipcore.towers.model import CLIP

# Without what transformers' tokenizer does not repair.
CAPTIONS = ("a photo of a cat", "Two dogs, 35 years old; it's RED!", "naïve café – 東京")
# The largest difference of a feature of length one that another order of float32 sums makes.
TOLERANCE = 1e-4
NUM_EXAMPLES = 3


class CheckError(ValueError):
    """What was written does not load, or gives other features."""


class Loaded(NamedTuple):
    """What a package makes of an export and ``Examples``."""

    image_features: Tensor  # [N, E], of any length
    text_features: Tensor
    tokens: Tensor | None = None  # ids of ``CAPTIONS``, if the package reads the vocabulary too


class Examples:
    """Random images and captions of a model, and its features of them, float32 [N, E] of length one."""

    @torch.no_grad()
    def __init__(self, model: CLIP) -> None:
        generator = torch.Generator().manual_seed(0)
        size, length = model.config.vision.image_size, model.context_length
        self.images = torch.randn(NUM_EXAMPLES, 3, size, size, generator=generator)
        self.tokens = torch.zeros(NUM_EXAMPLES, length, dtype=torch.int64)
        # Captions of three lengths, which end as a tokenizer ends them.
        for row, end in zip(self.tokens, (1, length // 2, length - 1), strict=True):
            row[0], row[end] = model.vocab_size - 2, model.vocab_size - 1
            row[1:end] = torch.randint(1, model.vocab_size - 2, (end - 1,), generator=generator)
        self.image_features = model.encode_image(self.images, normalize=True)
        self.text_features = model.encode_text(self.tokens, normalize=True)

    def difference(self, image_features: Tensor, text_features: Tensor) -> float:
        """Return the largest difference of other features, as given, from these."""
        both = ((image_features, self.image_features), (text_features, self.text_features))
        return max(
            float((torch.nn.functional.normalize(found.float(), dim=-1) - own).abs().max())
            for found, own in both
        )


def check_export(model: CLIP, tokenizer: Tokenizer, folder: Path, target: str) -> Iterator[str]:
    """Yield in words what was compared: by clipcore's own reader where it reads the layout, and by the package it is for.

    Args:
        model: float32, on the CPU, in evaluation mode.

    Raises:
        CheckError: a package refuses what was written, or gives other features.
    """
    if target != "onnx":
        _compare_weights(model, folder, target)
        yield "clipcore reads it back, with equal bits"
    package, names, load = _PACKAGES[target]
    if package_folder(package) is None:
        yield f"{package} is not installed, and was not asked"
        return
    try:
        module = importlib.import_module(package)
        for name in names:
            getattr(module, name)
    except (
        Exception
    ) as error:  # whatever a broken installation raises, such as torchvision's beside a CPU torch
        yield f"{package} is installed, cannot be imported, and was not asked: {first_line(error)}"
        return

    version = getattr(module, "__version__", "")
    # OpenAI's package rounds matrices to float16 as it reads them.
    examples = Examples(_rounded(model) if target == "openai" else model)
    try:
        found = load(folder, examples)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CheckError(
            f"{package} {version} cannot load what was written: {first_line(error)}"
        ) from error
    if found.tokens is not None:
        _compare_tokens(tokenizer, found.tokens, package)
    difference = examples.difference(found.image_features, found.text_features)
    if not difference <= TOLERANCE:
        raise CheckError(
            f"{package} {version} loads what was written and gives other features, off by up to {difference:.2g}"
        )
    yield f"{package} {version} loads it, and its features agree to {difference:.1g}"


def _rounded(model: CLIP) -> CLIP:
    return cast(copy.deepcopy(model), "fp16").float()


def _compare_tokens(tokenizer: Tokenizer, tokens: Tensor, package: str) -> None:
    """Compare the ids of ``CAPTIONS``; of CLIP's kind of vocabulary up to the end of text, behind which is padding."""
    expected = tokenizer(list(CAPTIONS), tokens.shape[1])
    has_padding = not isinstance(tokenizer, HubTokenizer)
    for caption, own, theirs in zip(CAPTIONS, expected, tokens, strict=True):
        length = int(own.argmax()) + 1 if has_padding else len(own)
        if not torch.equal(own[:length], theirs[:length]):
            raise CheckError(f"{package} tokenizes {caption!r} in another way")


def _inference(config: ModelConfig) -> dict[str, Any]:
    """Return what of an architecture changes features; not every layout says how a training begins, or drops patches."""
    described = dataclasses.asdict(config)
    del described["init_logit_scale"], described["vision"]["patch_dropout"]
    # Not every layout says where a published vocabulary is, or how captions are cleaned for it.
    for name in ("hf_tokenizer_name", "clean", "strip_sep_token"):
        del described["text"][name]
    for tower in (described["vision"], described["text"]):
        tower["mlp_ratio"] = int(tower["width"] * tower["mlp_ratio"])
    return described


def _compare_weights(model: CLIP, folder: Path, target: str) -> None:
    # OpenAI's is a file, and says nothing but shapes and its three sizes.
    path = folder / OPENAI_WEIGHTS
    loaded, _ = create_model_from_pretrained(None, path if path.is_file() else folder)
    own, found = model.state_dict(), loaded.state_dict()
    differing = [name for name in own if not torch.equal(own[name], found[name])]
    # Nothing in OpenAI's file says how many heads there are: its package reads them off the widths.
    is_other = target != "openai" and _inference(loaded.config) != _inference(model.config)
    if is_other or differing:
        what = f"other weights: {', '.join(differing[:3])}" if differing else "another architecture"
        raise CheckError(f"clipcore reads back {what}")


@torch.no_grad()
def _by_open_clip(folder: Path, examples: Examples) -> Loaded:
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokens = None
    # Tokenizers other than OpenAI's are transformers' there.
    if package_folder("transformers") is not None:
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(list(CAPTIONS))
    return Loaded(model.encode_image(examples.images), model.encode_text(examples.tokens), tokens)


@torch.no_grad()
def _by_open_clip_as_openai(folder: Path, examples: Examples) -> Loaded:
    """Return features of open_clip's reader of OpenAI's files, which is OpenAI's code."""
    from open_clip.model import build_model_from_openai_state_dict

    state = torch.load(folder / OPENAI_WEIGHTS, weights_only=True)
    model = build_model_from_openai_state_dict(state, cast_dtype=torch.float32).float().eval()
    return Loaded(model.encode_image(examples.images), model.encode_text(examples.tokens))


@torch.no_grad()
def _by_transformers(folder: Path, examples: Examples) -> Loaded:
    from transformers import CLIPModel, CLIPProcessor

    if json.loads((folder / HF_FILE).read_text())["model_type"] == "siglip":
        return _siglip_by_transformers(folder, examples)
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    length = examples.tokens.shape[1]
    read = processor.tokenizer(
        list(CAPTIONS),
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    image = model.vision_model(pixel_values=examples.images).pooler_output
    text = model.text_model(input_ids=examples.tokens).pooler_output
    return Loaded(model.visual_projection(image), model.text_projection(text), read["input_ids"])


def _siglip_by_transformers(folder: Path, examples: Examples) -> Loaded:
    """Return the features of a SigLIP; transformers does not clean captions as its description says, so no ids."""
    from transformers import SiglipModel

    model = SiglipModel.from_pretrained(folder).eval()
    image = model.get_image_features(examples.images).pooler_output
    return Loaded(image, model.get_text_features(examples.tokens).pooler_output)


def _by_onnxruntime(folder: Path, examples: Examples) -> Loaded:
    import onnxruntime

    def run(file: str, inputs: dict[str, Any]) -> Tensor:
        session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, inputs)[0])

    return Loaded(
        run(onnx_towers.IMAGE_FILE, {"images": examples.images.numpy()}),
        run(onnx_towers.TEXT_FILE, {"tokens": examples.tokens.numpy()}),
    )


_Load = Callable[[Path, Examples], Loaded]
# Of each target: the package that is asked, what of it is imported when it is first used, and how it loads an export.
_PACKAGES: dict[str, tuple[str, tuple[str, ...], _Load]] = {
    "open_clip": ("open_clip", ("create_model",), _by_open_clip),
    "openai": ("open_clip", ("create_model",), _by_open_clip_as_openai),
    "transformers": ("transformers", ("CLIPModel", "CLIPProcessor"), _by_transformers),
    "onnx": ("onnxruntime", ("InferenceSession",), _by_onnxruntime),
}
