"""Writes both towers as ONNX, for any batch size."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from clipcore.kernels.launch import portable_operators
from clipcore.packages import package_folder
from clipcore.towers.layouts import open_clip_preprocessing
from clipcore.towers.model import CLIP

IMAGE_FILE, TEXT_FILE, DESCRIPTION_FILE = "image.onnx", "text.onnx", "clip.json"
# The packages that torch.onnx.export needs.
_NEEDED = ("onnx", "onnxscript")


class _Tower(nn.Module):
    """One side of a model, with features of length one."""

    def __init__(self, model: CLIP, is_image: bool) -> None:
        super().__init__()
        self.model, self.is_image = model, is_image

    def forward(self, inputs: Tensor) -> Tensor:
        if self.is_image:
            return self.model.encode_image(inputs, normalize=True)
        return self.model.encode_text(inputs, normalize=True)


def write_onnx(model: CLIP, folder: Path) -> None:
    """Write image.onnx, text.onnx and clip.json.

    ``image.onnx`` maps ``images``, preprocessed float32 [B, 3, S, S], to ``image_features``, float32 [B, E] of length one;
    ``text.onnx`` maps ``tokens``, int64 [B, L], to ``text_features``. ``clip.json`` has the factor of their cosine, the
    bias, and the preprocessing.

    Raises:
        ValueError: a package is missing, or the model's weights are not float32.
    """
    if missing := [name for name in _NEEDED if package_folder(name) is None]:
        raise ValueError(
            f'an export to ONNX needs {" and ".join(missing)}: pip install "clipcore[export]"'
        )
    model = model.float().cpu().eval()
    size, length = model.config.vision.image_size, model.context_length
    # Two examples, since a batch of one would become a constant. A caption needs its end.
    images = torch.zeros(2, 3, size, size)
    tokens = torch.zeros(2, length, dtype=torch.int64)
    tokens[:, 1] = model.vocab_size - 1
    for path, is_image, inputs, names in (
        (folder / IMAGE_FILE, True, images, ("images", "image_features")),
        (folder / TEXT_FILE, False, tokens, ("tokens", "text_features")),
    ):
        _write_tower(_Tower(model, is_image), inputs, names, path)

    bias = None if model.logit_bias is None else float(model.logit_bias.detach())
    described = {
        "logit_scale": float(model.logit_scale.detach().exp()),
        "logit_bias": bias,
        "context_length": length,
        "preprocessing": open_clip_preprocessing(model),
    }
    (folder / DESCRIPTION_FILE).write_text(json.dumps(described, indent=2) + "\n")


@torch.no_grad()
def _write_tower(tower: nn.Module, inputs: Tensor, names: tuple[str, str], path: Path) -> None:
    # clipcore's own operators have no form in ONNX.
    with portable_operators():
        recorded = torch.export.export(
            tower, (inputs,), dynamic_shapes={"inputs": {0: torch.export.Dim("batch")}}
        )
    torch.onnx.export(
        recorded,
        (inputs,),
        path,
        input_names=[names[0]],
        output_names=[names[1]],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
