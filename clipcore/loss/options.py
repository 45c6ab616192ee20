"""The options that both losses share, and the checks of their inputs."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from clipcore.kernels.contrastive.targets import check_label_smoothing
from clipcore.kernels.logits.pairs import SAME_ID, WORKSPACE_BYTES, choose_operand
from clipcore.kernels.logits.walk_gpu import keeps_text_operands


@dataclass(frozen=True)
class LossOptions:
    """How a loss counts pairs and limits its memory; checked on construction.

    Attributes:
        same_id: the meaning of equal ids: "ignore" removes such pairs from the negatives, "positive" makes them positives.
        label_smoothing: in [0, 1), as in torch's cross-entropy.
        stash_bytes: largest size of the logits that are kept for the backward
            [``clipcore.kernels.contrastive.default_stash_bytes``].
        workspace_bytes: largest size of a block of logits [512 MB on a GPU, 64 MiB on the CPU].
        operand_dtype: dtype of a GPU's products [float16 for 16-bit features, and under autocast].
    """

    same_id: str = "ignore"
    label_smoothing: float = 0.0
    stash_bytes: int | None = None
    workspace_bytes: int | None = None
    operand_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_label_smoothing(self.label_smoothing)
        if self.same_id not in SAME_ID:
            raise ValueError(f"same_id must be one of {SAME_ID}, got {self.same_id!r}")

    def workspace(self, image_BE: Tensor, text_BE: Tensor, world_size: int) -> int:
        """Return the peak workspace bytes of a loss without a stash.

        They are a block of logits, sums per row, the texts of all ranks, and on a GPU the walk's own copies of texts.
        """
        B, G, E = len(image_BE), world_size * len(text_BE), image_BE.shape[1]
        block_bytes = self.workspace_bytes
        if block_bytes is None:
            block_bytes = WORKSPACE_BYTES[image_BE.device.type]
        gathered = 0 if world_size == 1 else 2 * 4 * G * E
        held, whole_bytes = 0, 4 * B * G  # the logits as one block
        if image_BE.is_cuda:
            operand = choose_operand(image_BE, text_BE, self.operand_dtype)
            # Texts from other ranks are float32.
            dtype = torch.float32 if world_size > 1 else text_BE.dtype
            if keeps_text_operands(block_bytes) and dtype != operand:
                held += operand.itemsize * G * E
            if dtype != torch.float32:
                held += 4 * G * E  # the float32 sum of a 16-bit gradient
            # Beside the product a 16-bit gradient, both operands and the sum of the rows' gradients.
            if operand != torch.float32:
                whole_bytes += 2 * B * G
            whole_bytes += operand.itemsize * (B + G) * E + 4 * B * E
        return min(block_bytes, whole_bytes) + 12 * 8 * (B + G) + gathered + held


def check_pairs(
    image_BE: Tensor, text_BE: Tensor, image_ids: Tensor | None, text_ids: Tensor | None
) -> None:
    """Raise ValueError unless the rows can be pairs, with ids on both sides or on neither."""
    if not image_BE.ndim == text_BE.ndim == 2 or image_BE.shape[1] != text_BE.shape[1]:
        raise ValueError(
            "image_features and text_features must be pairs of one shape [B, E] (or [G, E] with extra rows of one), "
            f"got {tuple(image_BE.shape)} and {tuple(text_BE.shape)}"
        )
    if (image_ids is None) != (text_ids is None):
        raise ValueError("image_ids and text_ids: pass both or none")


def as_factor(factor: Tensor | float, features: Tensor) -> Tensor | float:
    """Return a scale or bias as the operations accept it; host numbers and integers are converted."""
    if not isinstance(factor, Tensor):
        return factor
    return factor.to(features.device) if factor.is_floating_point() else factor.to(features)


@functools.cache
def warn_once(message: str) -> None:
    """Warn, but only once per message."""
    warnings.warn(message, stacklevel=3)
