"""The ResNet with CLIP's changes: a stem of three convolutions, blurred strides, attention instead of average pooling.

Legend: B images, S side of the image, L tokens of the last map and their mean, C channels of the last map, E embedding
size. Source: Radford et al. 2021, section 2.4; He et al. 2018 (ResNet-D); Zhang 2019 (blur pooling).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils.checkpoint import checkpoint

from clipcore.data.transforms import OPENAI_MEAN, OPENAI_STD, normalize_images
from clipcore.kernels.attention_pool import attention_pool
from clipcore.towers.architectures import VisionConfig
from clipcore.towers.intermediates import Indices, check_format, taken_blocks
from clipcore.towers.modules import check_images, freeze, is_hooked


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that can be frozen, even in training, and can process a batch again without counting it.

    Attributes:
        frozen: use the running statistics and do not update them, even in training.
        replaying: normalise by the batch and do not update the running statistics.
    """

    frozen = False
    replaying = False

    def train(self, mode: bool = True) -> BatchNorm2d:
        super().train(mode and not self.frozen)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if not (self.replaying and self.training):
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None
        # Copies instead of None, because a replay must save the same tensors as the first pass.
        mean, var = self.running_mean.clone(), self.running_var.clone()
        return F.batch_norm(
            x, mean, var, self.weight, self.bias, training=True, momentum=0.0, eps=self.eps
        )


@contextlib.contextmanager
def replayed(module: nn.Module) -> Iterator[None]:
    """Keep the module's running statistics unchanged by passes in training mode in the enclosed code."""
    norms = [part for part in module.modules() if isinstance(part, BatchNorm2d)]
    before = [norm.replaying for norm in norms]
    for norm in norms:
        norm.replaying = True
    try:
        yield
    finally:
        for norm, replaying in zip(norms, before, strict=True):
            norm.replaying = replaying


def freeze_statistics(module: nn.Module) -> None:
    """Leave the module's running statistics as they are for good, and normalise with them in training too."""
    for part in module.modules():
        if isinstance(part, BatchNorm2d):
            part.frozen = True
            part.eval()


class Bottleneck(nn.Module):
    """A residual block of three convolutions; strides are an average pool after the second."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = planes * self.expansion
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False)
        self.bn3 = BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or in_channels != out_channels:
            # The names of the published weights.
            parts: list[tuple[str, nn.Module]] = [
                ("-1", nn.AvgPool2d(stride)),
                ("0", nn.Conv2d(in_channels, out_channels, 1, bias=False)),
                ("1", BatchNorm2d(out_channels)),
            ]
            self.downsample = nn.Sequential(OrderedDict(parts))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.avgpool(y)))
        return self.relu(y + identity)


class AttentionPool2d(nn.Module):
    """One attention layer whose only query is the mean of the map: [B, C, h, w] -> [B, E]."""

    def __init__(self, grid: int, channels: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{heads} heads do not divide {channels} channels")
        self.heads = heads
        self.positional_embedding = nn.Parameter(
            torch.randn(grid**2 + 1, channels) * channels**-0.5
        )
        self.k_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x_BLC = x.flatten(2).mT
        x_BLC = torch.cat([x_BLC.mean(1, keepdim=True), x_BLC], 1)
        x_BLC = x_BLC + self.positional_embedding.to(x_BLC.dtype)
        q_BHK = self.q_proj(x_BLC[:, 0]).unflatten(-1, (self.heads, -1))
        parts = (self.k_proj, self.v_proj)
        if any(type_before_parametrizations(p) is not nn.Linear or is_hooked(p) for p in parts):
            return self.c_proj(self._pool_by_modules(q_BHK, x_BLC))
        key, value = ((part.weight, part.bias) for part in parts)
        return self.c_proj(attention_pool(q_BHK, x_BLC, key, value))

    def _pool_by_modules(self, q_BHK: Tensor, x_BLC: Tensor) -> Tensor:
        """Return the same result by calling ``k_proj`` and ``v_proj``, for replaced modules and hooks."""
        k_BLHK, v_BLHK = (
            part(x_BLC).unflatten(-1, (self.heads, -1)) for part in (self.k_proj, self.v_proj)
        )
        scores_BHL = torch.einsum("bhk,blhk->bhl", q_BHK * q_BHK.shape[-1] ** -0.5, k_BLHK)
        wide = torch.promote_types(q_BHK.dtype, torch.float32)
        weights_BHL = scores_BHL.to(wide).softmax(-1).to(v_BLHK.dtype)
        return torch.einsum("bhl,blhk->bhk", weights_BHL, v_BLHK).flatten(1)


class Stage(nn.Sequential):
    """Blocks one after another.

    Attributes:
        grad_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            is_recomputed = self.grad_checkpointing and torch.is_grad_enabled()
            x = _run_checkpointed(block, x) if is_recomputed else block(x)
        return x


class ModifiedResNet(nn.Module):
    """Images [B, 3, S, S] to features [B, E]; S is a multiple of 32.

    Attributes:
        image_size: (S, S), as in open_clip.
        image_mean, image_std: per channel of pixels in [0, 1]; uint8 images are normalised with them.
        preprocess_cfg: open_clip's dict of the whole preprocessing, which ``CLIP.set_images`` sets.
    """

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        assert not isinstance(config.layers, int)
        if config.image_size % 32:
            raise ValueError(f"a ResNet's image size is a multiple of 32, got {config.image_size}")
        self.image_size = (config.image_size, config.image_size)
        self.image_mean: Sequence[float] = OPENAI_MEAN
        self.image_std: Sequence[float] = OPENAI_STD
        self.preprocess_cfg: dict[str, Any] = {}
        width = config.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(2)
        channels = width
        for i, num_blocks in enumerate(config.layers):
            planes = width * 2**i
            blocks = [Bottleneck(channels, planes, stride=1 if i == 0 else 2)]
            channels = planes * Bottleneck.expansion
            blocks += [Bottleneck(channels, planes) for _ in range(num_blocks - 1)]
            setattr(self, f"layer{i + 1}", Stage(*blocks))
        self.attnpool = AttentionPool2d(config.image_size // 32, channels, config.heads, embed_dim)
        self._initialize(channels)

    def _initialize(self, channels: int) -> None:
        """Initialise the attention pool by its width, and each block as the identity."""
        for part in (
            self.attnpool.q_proj,
            self.attnpool.k_proj,
            self.attnpool.v_proj,
            self.attnpool.c_proj,
        ):
            nn.init.normal_(part.weight, std=channels**-0.5)
        for block in self.modules():
            if isinstance(block, Bottleneck):
                nn.init.zeros_(block.bn3.weight)

    def forward(self, images: Tensor, projected: bool = True) -> Tensor:
        """Return features [B, E] of images: the attention pool's output; the paper's probes use it too (``projected``)."""
        x = self._stem(images)
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return self.attnpool(x)

    def _stem(self, images: Tensor) -> Tensor:
        check_images(images, self.image_size[0])
        if images.dtype == torch.uint8:
            images = normalize_images(images, self.image_mean, self.image_std)
        # Channels last, which every layer preserves: faster for convolutions, and the attention pool's own layout.
        x = images.to(self.conv1.weight.dtype, memory_format=torch.channels_last)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.avgpool(self.relu(self.bn3(self.conv3(x))))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,
    ) -> dict[str, Any]:
        """Return the outputs of the stem and the four stages; see ``CLIP.forward_intermediates``, whose arguments these are.

        There is nothing to normalise and no extra token.

        Raises:
            ValueError: ``stop_early`` leaves out the stage that the features need.
        """
        check_format(output_fmt, ("NCHW",))
        taken = taken_blocks(5, indices)
        if stop_early and not intermediates_only and taken[-1] < 4:
            raise ValueError(
                "stop_early leaves out stages that the features need: give intermediates_only=True too"
            )
        found = []
        for i in range(taken[-1] + 1 if stop_early else 5):
            x = self._stem(x) if i == 0 else getattr(self, f"layer{i}")(x)
            if i in taken:
                found.append(x)
        output: dict[str, Any] = {"image_intermediates": found}
        if not intermediates_only:
            output["image_features"] = self.attnpool(x)
        return output

    def project(self, pooled_BE: Tensor) -> Tensor:
        """Return features that can be compared with texts; a ResNet has no projection, so they are the same ones."""
        return pooled_BE

    def layer_groups(self) -> list[list[nn.Module | nn.Parameter]]:
        """Return the tower's parts from input to output: stem, stages, attention pool."""
        stem = [self.conv1, self.bn1, self.conv2, self.bn2, self.conv3, self.bn3]
        stages = ([getattr(self, f"layer{i}")] for i in range(1, 5))
        return [stem, *stages, [self.attnpool]]

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the whole tower, and its BatchNorm statistics too on request."""
        if unlocked_groups:
            raise ValueError("a ResNet is locked whole: leave out --lock-image-unlocked-groups")
        freeze(self)
        if freeze_bn_stats:
            freeze_statistics(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass; BatchNorm still counts each batch once."""
        for part in self.modules():
            if isinstance(part, Stage):
                part.grad_checkpointing = enable


# torch.compile does not support a checkpoint with custom contexts, so such blocks run uncompiled.
@torch.compiler.disable
def _run_checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    y = checkpoint(
        block,
        x,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), replayed(block)),
    )
    assert isinstance(y, Tensor)
    return y
