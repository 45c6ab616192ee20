"""LoRA: matrices of low rank are trained beside frozen weights, which our kernels read as their sum.

    weight = W + alpha / rank * B A          A [rank, in], B [out, rank]

Our blocks hand weights to kernels and do not call their layers, so a layer of peft, which adds B A x to a layer's output,
would turn the kernels off. A parametrization of torch computes the sum where a weight is read instead: blocks compute as
before, and a gradient of the whole matrix lives only until it is multiplied with A and B.

Source: Hu et al. 2021 (arXiv 2106.09685). Names in files are peft's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clipcore.towers.model import CLIP
from clipcore.towers.modules import Attention
from clipcore.towers.resnet import freeze_statistics

ADAPTER_FOLDER = "adapter"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PACKED_WEIGHT = "in_proj_weight"


class LowRank(nn.Module):
    """The parametrization of one weight: what is added to it.

    Args:
        weight: the frozen one, [out, in].
        alpha: over the rank it is the factor of the product.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.factor = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, columns, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        # As peft: the product begins at zero, and its gradient does not.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        # Autocast would round the product to 16 bits, and merged weights would be others than those that were trained.
        with torch.autocast(weight.device.type, enabled=False):
            product = self.lora_B @ self.lora_A
        return weight + (self.factor * product).to(weight.dtype)


def add_lora(model: CLIP, rank: int, alpha: float) -> None:
    """Give every trainable matrix of a linear layer, in place, a product of low rank, and freeze all else.

    A ResNet's BatchNorm statistics are frozen too: an adapter holds matrices alone, and goes with those of its start.

    Args:
        model: whose towers are locked already, if they are to be; a locked layer gets none.

    Raises:
        ValueError: every layer is locked.
    """
    found = [
        (module, name)
        for module in model.modules()
        for name in _matrix_of(module)
        if getattr(module, name).requires_grad
    ]
    if not found:
        raise ValueError("LoRA finds no layer to train: every linear layer is locked; unlock one")
    model.requires_grad_(False)
    freeze_statistics(model)
    for module, name in found:
        low_rank = LowRank(getattr(module, name), rank, alpha)
        # Not by torch's check, which would compute every weight once.
        parametrize.register_parametrization(module, name, low_rank, unsafe=True)


def _matrix_of(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, Attention):
        return (PACKED_WEIGHT,)
    return ("weight",) if isinstance(module, nn.Linear) else ()


def _adapted(model: nn.Module) -> Iterator[tuple[str, str, LowRank]]:
    """Yield the path of each module with a product, the name of its weight, and the product."""
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for name, parts in module.parametrizations.items():
                if isinstance(parts[0], LowRank):
                    yield path, name, parts[0]


def adapter_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained matrices by names of the weights that they are added to, ``<weight>.lora_A`` and ``.lora_B``."""
    return {
        f"{path}.{name}.{side}": getattr(low_rank, side)
        for path, name, low_rank in _adapted(model)
        for side in ("lora_A", "lora_B")
    }


def adapter_settings(model: nn.Module) -> dict[str, float]:
    """Return rank and alpha of a model's products; nothing for a model without."""
    for _, _, low_rank in _adapted(model):
        rank = len(low_rank.lora_A)
        return {"rank": rank, "alpha": low_rank.factor * rank}
    return {}


@torch.no_grad()
def load_adapter(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what ``adapter_of`` returned.

    Raises:
        ValueError: it is of another rank, or of other layers.
    """
    own = adapter_of(model)
    if {n: v.shape for n, v in tensors.items()} != {n: v.shape for n, v in own.items()}:
        raise ValueError(
            "the adapter is of another rank or of other layers; resume with the --lora-rank, --lock-image and --lock-text "
            "of the run that wrote it"
        )
    for name, value in own.items():
        value.copy_(tensors[name])


@torch.no_grad()
def merged(model: CLIP) -> CLIP:
    """Return a plain copy of a model with its products added to its weights, on its device."""
    weights = model.state_dict()
    for path, name, low_rank in _adapted(model):
        prefix = f"{path}.parametrizations.{name}"
        original = weights.pop(f"{prefix}.original")
        weights[f"{path}.{name}"] = low_rank(original)
        del weights[f"{prefix}.0.lora_A"], weights[f"{prefix}.0.lora_B"]
    with torch.device("meta"):
        copy = CLIP(model.config, model.output_dict)
    # Copies, because training goes on in the others.
    copy.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
    copy.set_images(model.images)
    return copy.train(model.training)


def write_adapter(model: CLIP, folder: Path, base: str) -> None:
    """Write an adapter as peft does, into a folder that is there: ``PeftModel.from_pretrained(model, FOLDER)`` reads it.

    peft wraps the layers of clipcore's CLIP, and the packed projection as one of its ``target_parameters``.

    Args:
        base: the weights that it was trained on, for the reader.
    """
    tensors: dict[str, Tensor] = {}
    layers, packed = [], []
    for path, name, low_rank in _adapted(model):
        # peft wraps the module of a packed projection, so that the output's layer lies one name deeper in its files.
        parent, _, last = path.rpartition(".")
        inner = f"{parent}.base_layer.{last}" if last == "out_proj" else path
        for side in ("lora_A", "lora_B"):
            value = getattr(low_rank, side).detach().cpu().contiguous().clone()
            tensors[f"base_model.model.{inner}.{side}.weight"] = value
        if name == PACKED_WEIGHT:
            packed.append(f"{path}.{name}")
        else:
            layers.append(path)
    settings = adapter_settings(model)
    described = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        # A regular expression of whole paths: of a list, peft would take "transformer..." for "visual.transformer..." too.
        "target_modules": "|".join(map(re.escape, layers)),
        "target_parameters": packed,
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(described, indent=2) + "\n")
