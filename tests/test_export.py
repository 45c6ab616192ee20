"""Both towers under torch.jit.trace and torch.export: any batch size, and archives that need no clipcore."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipcore import create_model
from clipcore.kernels.launch import portable_operators
from clipcore.towers.model import CLIP

PROGRAM = Path(__file__).parent / "programs/run_archive.py"
# Model and tower: each kind of tower, and QuickGELU in one. A ResNet's text tower is the other models'.
TOWERS_OF_MODELS = [
    ("ViT-nano-8-32", "image"),
    ("ViT-nano-8-32", "text"),
    ("ViT-nano-8-32-quickgelu", "text"),
    ("RN-nano-32", "image"),
]
OTHER_BATCHES = (5, 1)


class Tower(nn.Module):
    """One side of a model, by the name of its method."""

    def __init__(self, model: CLIP, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = getattr(self.model, self.method)(inputs, normalize=True)
        return features


def draw_images(model: CLIP, num_images: int) -> Tensor:
    size = model.config.vision.image_size
    return torch.randn(num_images, 3, size, size, dtype=model.logit_scale.dtype)


def draw_captions(model: CLIP, num_captions: int) -> Tensor:
    """Token rows whose ends are in different places."""
    text = torch.randint(1, model.vocab_size - 2, (num_captions, model.context_length))
    ends = torch.randint(1, model.context_length, (num_captions,))
    text[torch.arange(num_captions), ends] = model.vocab_size - 1
    return text


TOWERS: dict[str, tuple[str, Callable[[CLIP, int], Tensor]]] = {
    "image": ("encode_image", draw_images),
    "text": ("encode_text", draw_captions),
}
over_towers = pytest.mark.parametrize("tower", TOWERS)
over_models = pytest.mark.parametrize(("name", "tower"), TOWERS_OF_MODELS)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without the warnings of deprecated tracing and of checks of a shape, which a trace makes once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield


def build(name: str, tower: str, precision: str = "fp64") -> tuple[nn.Module, list[Tensor]]:
    """Return a tower, two inputs of a batch to record it with, and batches of other sizes."""
    model = create_model(name, precision=precision).eval()
    method, draw = TOWERS[tower]
    return Tower(model, method), [draw(model, number) for number in (2, *OTHER_BATCHES)]


@over_models
def test_trace_computes_any_batch_size_in_float64(name: str, tower: str) -> None:
    module, (recorded, *others) = build(name, tower)
    traced = torch.jit.trace(module, recorded, check_trace=False)
    with torch.no_grad():
        for inputs in (recorded, *others):
            torch.testing.assert_close(traced(inputs), module(inputs), rtol=1e-12, atol=1e-12)


def test_saved_traces_run_without_clipcore(tmp_path: Path) -> None:
    expected = []
    for number, (name, tower) in enumerate(TOWERS_OF_MODELS):
        folder = tmp_path / str(number)
        folder.mkdir()
        module, (recorded, others, _) = build(name, tower, "fp32")
        traced = torch.jit.trace(module, recorded, check_trace=False)
        torch.jit.save(traced, folder / "model.pt")
        torch.save(others, folder / "inputs.pt")
        with torch.no_grad():
            expected.append(module(others))

    folders = [str(tmp_path / str(number)) for number in range(len(expected))]
    command = [sys.executable, str(PROGRAM), *folders]
    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"clipcore": False}
    for folder, features in zip(folders, expected, strict=True):
        found = torch.load(Path(folder, "outputs.pt"))
        torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-5)


@over_models
@pytest.mark.parametrize("strict", [False, True])
def test_export_computes_any_batch_size_in_float64(name: str, tower: str, strict: bool) -> None:
    module, (recorded, *others) = build(name, tower)
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(
        module, (recorded,), dynamic_shapes=sizes, strict=strict
    ).module()
    with torch.no_grad():
        for inputs in (recorded, *others):
            torch.testing.assert_close(exported(inputs), module(inputs), rtol=1e-12, atol=1e-12)


@over_models
def test_portable_export_holds_operators_of_torch_alone(name: str, tower: str) -> None:
    module, (recorded, *others) = build(name, tower)
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with portable_operators(), torch.no_grad():
        exported = torch.export.export(module, (recorded,), dynamic_shapes=sizes)
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not [target for target in called if "clipcore" in target]
    with torch.no_grad():
        for inputs in (recorded, *others):
            found = exported.module()(inputs)
            torch.testing.assert_close(found, module(inputs), rtol=1e-12, atol=1e-12)


def test_trace_takes_bytes() -> None:
    model = create_model("ViT-nano-8-32").eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    traced = torch.jit.trace(Tower(model, "encode_image"), pixels, check_trace=False)
    with torch.no_grad():
        torch.testing.assert_close(
            traced(pixels[:1]), model.encode_image(pixels[:1], True), rtol=1e-4, atol=1e-5
        )


@over_towers
@pytest.mark.parametrize("name", ["ViT-nano-8-32", "RN-nano-32"])
@pytest.mark.parametrize("precision", ["bf16", "pure_bf16", "fp16"])
def test_traces_of_16_bits_stay_near_the_model(name: str, tower: str, precision: str) -> None:
    """With torch's own check of the trace, which runs it once more."""
    module, (recorded, others, _) = build(name, tower, precision)
    with torch.no_grad():
        traced = torch.jit.trace(module, recorded)
        found, expected = traced(others), module(others)
    assert found.dtype == expected.dtype
    assert F.cosine_similarity(found.float(), expected.float()).min() > 0.999
