"""The ResNet as CLIP changed it: a stem of three convolutions, blurred strides, attention in place of average pooling.

Legend: B images, S side of the image, L tokens of the last map and their mean, C channels of the last map, E embedding
size. Source: Radford et al. 2021, section 2.4; He et al. 2018 (ResNet-D); Zhang 2019 (blur pooling).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from clipcore.architectures import VisionConfig
from clipcore.kernels.attention import pooled_attention
from clipcore.modules import freeze
from clipcore.vision import check_image_size


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose statistics can be frozen for good, also in training."""

    frozen = False

    def train(self, mode: bool = True) -> BatchNorm2d:
        super().train(mode and not self.frozen)
        return self


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
            # The names are those of the published weights.
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
        kv_BL2C = torch.stack([self.k_proj(x_BLC), self.v_proj(x_BLC)], 2)
        return self.c_proj(pooled_attention(q_BHK, kv_BL2C.unflatten(-1, (self.heads, -1))))


class ModifiedResNet(nn.Module):
    """Images [B, 3, S, S] to features [B, E]; S is a multiple of 32."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        assert not isinstance(config.layers, int)
        if config.image_size % 32:
            raise ValueError(f"a ResNet's image size is a multiple of 32, got {config.image_size}")
        self.image_size = config.image_size
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
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool2d(config.image_size // 32, channels, config.heads, embed_dim)
        self._initialize(channels)

    def _initialize(self, channels: int) -> None:
        """Attention pool by its width; each block starts as the identity."""
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

    def forward(self, images: Tensor) -> Tensor:
        check_image_size(images, self.image_size)
        x = self.relu(self.bn1(self.conv1(images.to(self.conv1.weight.dtype))))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.avgpool(self.relu(self.bn3(self.conv3(x))))
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return self.attnpool(x)

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freezes the whole tower, its BatchNorm statistics too if asked."""
        if unlocked_groups:
            raise ValueError("a ResNet is locked whole: leave out --lock-image-unlocked-groups")
        freeze(self)
        for part in self.modules():
            if isinstance(part, BatchNorm2d) and freeze_bn_stats:
                part.frozen = True
                part.eval()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Nothing: recomputing a block would count its batch in the BatchNorm statistics twice."""
