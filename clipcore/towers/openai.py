"""The ``load`` of OpenAI's package ``clip``, and a model whose call is the one that its users know.

Source: Radford et al. 2021; github.com/openai/CLIP, whose functions these are by name and argument.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from clipcore.data.transforms import ImageTransform
from clipcore.towers.architectures import OPENAI_NAMES, available_models
from clipcore.towers.factory import cast, made_of_weights
from clipcore.towers.model import CLIP
from clipcore.towers.published import openai_address, openai_file

# Where OpenAI's package keeps the files that it has downloaded.
_CACHE = "~/.cache/clip"


class OpenAICLIP(CLIP):
    """A CLIP whose call returns logits: ``logits_per_image, logits_per_text = model(image, text)``."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the image tower's matrices."""
        return self.visual.conv1.weight.dtype

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return scaled cosines of every image with every text, [B, T], with the model's bias, and their transpose.

        Args:
            image: preprocessed, [B, 3, S, S].
            text: ids [T, L].
        """
        image_features = self.encode_image(image, normalize=True)
        text_features = self.encode_text(text, normalize=True)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.t()
        if self.logit_bias is not None:
            logits_per_image = logits_per_image + self.logit_bias
        return logits_per_image, logits_per_image.t()


def load(
    name: str | os.PathLike[str],
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | os.PathLike[str] | None = None,
) -> tuple[OpenAICLIP, ImageTransform]:
    """Return (model, preprocess) as OpenAI's ``clip.load`` does: in evaluation mode, float16 on a GPU, else float32.

    Args:
        name: one of ``available_models()``, if OpenAI's package has downloaded it before; or the path of any weights that
            ``create_model_from_pretrained(None, path)`` takes. Where nothing states the activation, it is QuickGELU.
        device: the GPU if there is one, else the CPU.
        jit: False; a model is recorded with ``torch.jit.trace``.
        download_root: folder of the files that OpenAI's package has downloaded [~/.cache/clip].

    Raises:
        ValueError: the file of a published name is not there, which the message says how to get; or the weights are no CLIP.
    """
    if jit:
        raise ValueError("jit=True exists only in OpenAI's package; use torch.jit.trace")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    is_known = isinstance(name, str) and name in available_models()
    path = _downloaded(str(name), download_root) if is_known else Path(name)
    if not path.exists():
        raise ValueError(
            f"there is no file {path}; the published models are {', '.join(available_models())}"
        )
    made = made_of_weights(path, quick_gelu=True)
    with torch.device("meta"):
        model = OpenAICLIP(made.config)
    model.load_state_dict(made.state_dict(), assign=True)
    model.set_images(made.images)
    size = model.config.vision.image_size
    # OpenAI's name of the side of the images. setattr, because a module's attributes are typed as tensors and modules.
    setattr(model.visual, "input_resolution", size)  # noqa: B010
    model = cast(model, usual_precision(device)).to(device).eval()
    return model, ImageTransform(size, is_train=False, **model.images)


def usual_precision(device: str | torch.device) -> str:
    """Return the precision of OpenAI's package on a device: float16 matrices on a GPU, else float32."""
    return "fp16" if torch.device(device).type == "cuda" else "fp32"


def _downloaded(name: str, download_root: str | os.PathLike[str] | None) -> Path:
    """Return the file of a published name; raise ValueError with its address if it is not there."""
    ours = OPENAI_NAMES.get(name, name)
    root = Path(download_root or _CACHE).expanduser()
    path = root / openai_file(ours)
    if not path.is_file():
        address = openai_address(ours)
        get = f"run curl -LO {address}" if "/" in address else f"get OpenAI's file {address}"
        raise ValueError(
            f"{name}: clipcore downloads nothing, and {path} is not there; {get}, and give its path"
        )
    return path
