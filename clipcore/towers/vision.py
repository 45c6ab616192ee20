"""The Vision Transformer with CLIP's changes: class token, LayerNorm before the blocks, linear projection; and SigLIP's.

Legend: B images, S side of the image, P side of a patch, L tokens (patches and the class token), D width, E embedding
size. Source: Radford et al. 2021, section 2.4; Dosovitskiy et al. 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipcore.data.transforms import OPENAI_MEAN, OPENAI_STD, normalize_images
from clipcore.kernels.embed_layer_norm import embed_layer_norm
from clipcore.kernels.launch import is_portable
from clipcore.kernels.patchify import patchify
from clipcore.towers.architectures import VisionConfig
from clipcore.towers.intermediates import Indices, check_format, run_blocks
from clipcore.towers.modules import (
    Attention,
    LayerNorm,
    Transformer,
    activation_kind,
    check_images,
    compute_dtype,
    freeze_all_but_last,
    is_hooked,
    read_pooled,
)
from clipcore.towers.pooling_head import PoolingHead


class VisionTransformer(nn.Module):
    """Images [B, 3, S, S] to features [B, E].

    Attributes:
        patch_dropout: share of patches dropped in training, 0 to below 1.
        image_size: (S, S), as in open_clip.
        image_mean, image_std: per channel of pixels in [0, 1]; uint8 images are normalised with them.
        preprocess_cfg: open_clip's dict of the whole preprocessing, which ``CLIP.set_images`` sets.
    """

    def __init__(self, config: VisionConfig, embed_dim: int, quick_gelu: bool = False) -> None:
        super().__init__()
        assert isinstance(config.layers, int) and config.patch_size is not None
        self.image_size = (config.image_size, config.image_size)
        self.patch_size = config.patch_size
        self.patch_dropout = config.patch_dropout
        self.image_mean: Sequence[float] = OPENAI_MEAN
        self.image_std: Sequence[float] = OPENAI_STD
        self.preprocess_cfg: dict[str, Any] = {}
        self.grid = config.image_size // config.patch_size
        if self.grid < 1:
            raise ValueError(
                f"an image of {config.image_size} pixels holds no patch of {config.patch_size}"
            )
        if not 0 <= config.patch_dropout < 1:
            raise ValueError(
                f"patch dropout is a share from 0 to below 1, got {config.patch_dropout}"
            )
        width, scale, has_class = config.width, config.width**-0.5, not config.has_map
        self.conv1 = nn.Conv2d(
            3, width, config.patch_size, stride=config.patch_size, bias=config.has_map
        )
        self.class_embedding: nn.Parameter | None = None
        if has_class:
            self.class_embedding = nn.Parameter(scale * torch.randn(width))
        num_tokens = self.grid**2 + has_class
        self.positional_embedding = nn.Parameter(scale * torch.randn(num_tokens, width))
        self._has_ln_pre = not (config.no_ln_pre or config.has_map)
        self.ln_pre = LayerNorm(width, config.norm_eps) if self._has_ln_pre else nn.Identity()
        self.transformer = Transformer(
            *(width, config.layers, config.heads, config.mlp_ratio, quick_gelu),
            gelu_tanh=config.gelu_tanh,
            norm_eps=config.norm_eps,
            ls_init_value=config.ls_init_value,
        )
        self.ln_post = LayerNorm(width, config.norm_eps)
        self._pool_type, self._norm_after_mean = config.pool_type, config.final_ln_after_pool
        self.proj: nn.Parameter | None = None
        self.attn_pool: PoolingHead | None = None
        if config.has_map:
            kind = activation_kind(quick_gelu, config.gelu_tanh)
            self.attn_pool = PoolingHead(
                width, config.heads, config.mlp_ratio, kind, config.norm_eps
            )
            self._initialize_as_timm()
        else:
            self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def _initialize_as_timm(self) -> None:
        """Initialise as timm does, whose towers open_clip's SigLIP models begin with."""
        nn.init.trunc_normal_(self.positional_embedding, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Attention):
                nn.init.trunc_normal_(module.in_proj_weight, std=0.02)

    def forward(
        self, images: Tensor, dropout_seeds: Tensor | None = None, projected: bool = True
    ) -> Tensor:
        """Return features of images.

        Args:
            images: preprocessed floats, or uint8 pixels, which are normalised here with ``image_mean`` and ``image_std``.
            dropout_seeds: int64 [B]; an image's seed alone determines its dropped patches, in any batch and on any rank.
                None draws from torch's generator.
            projected: False returns the features before the projection, [B, D].
        """
        check_images(images, self.image_size[0])
        x_BLD = self._drop_patches(self._embed(images), dropout_seeds)
        if self._pool_type == "tok":
            pooled_BD = self.ln_post(read_pooled(self.transformer, x_BLD))
        else:
            pooled_BD = self._pooled(self.transformer(x_BLD))
        return self.project(pooled_BD) if projected else pooled_BD

    def project(self, pooled_BD: Tensor) -> Tensor:
        """Return the features [B, E] that can be compared with texts, given those before the projection [B, D].

        A tower of SigLIP has no projection: both are the same.
        """
        return pooled_BD if self.proj is None else pooled_BD @ self.proj

    def _pooled(self, x_BLD: Tensor) -> Tensor:
        """Return the features before the projection, given every token after the last block."""
        if self.attn_pool is not None:
            return self.attn_pool(self.ln_post(x_BLD))
        if self._pool_type == "tok":
            return self.ln_post(x_BLD[:, 0])
        if self._norm_after_mean:
            return self.ln_post(x_BLD[:, 1:].mean(1))
        return self.ln_post(x_BLD)[:, 1:].mean(1)

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
        """Return the outputs of single blocks; see ``CLIP.forward_intermediates``, whose arguments these are.

        Args:
            x: images, as for ``forward``.
        """
        check_format(output_fmt, ("NCHW", "NLC"))
        if self.training and self.patch_dropout:
            raise ValueError(
                "patch dropout leaves no map of patches: use the model in evaluation mode, model.eval()"
            )
        check_images(x, self.image_size[0])
        x_BLD, found = run_blocks(self.transformer, self._embed(x), indices, stop_early)
        if normalize_intermediates:
            found = [self.ln_post(y_BLD) for y_BLD in found]
        num_prefixes = int(self.class_embedding is not None)
        maps = [y_BLD[:, num_prefixes:] for y_BLD in found]
        if output_fmt == "NCHW":
            maps = [y_BPD.mT.unflatten(-1, (self.grid, self.grid)).contiguous() for y_BPD in maps]
        output: dict[str, Any] = {"image_intermediates": maps}
        if output_extra_tokens and num_prefixes:
            output["image_intermediates_prefix"] = [y_BLD[:, :1] for y_BLD in found]
        if not intermediates_only:
            output["image_features"] = self.project(self._pooled(x_BLD))
        return output

    def _embed(self, images: Tensor) -> Tensor:
        """Return tokens [B, L, D]: the class token, then the patches row by row, with their positions, normalised."""
        if not self._is_as_made():
            return self._embed_by_modules(images)
        dtype = compute_dtype(self.conv1.weight)
        raw = images.dtype == torch.uint8
        mean, std = (self.image_mean, self.image_std) if raw else (None, None)
        patches_BPK = patchify(images, self.patch_size, mean, std, dtype=dtype)
        weight_DK = self.conv1.weight.flatten(1).to(dtype)
        weight_DK = F.pad(weight_DK, (0, patches_BPK.shape[-1] - weight_DK.shape[-1]))
        bias_D = None if self.conv1.bias is None else self.conv1.bias.to(dtype)
        x_BPD = F.linear(patches_BPK, weight_DK, bias_D)
        norm = self.ln_pre
        if not isinstance(norm, LayerNorm) or self.class_embedding is None:
            return self._with_positions(x_BPD)
        return embed_layer_norm(
            *(x_BPD, self.class_embedding, self.positional_embedding),
            *(norm.weight, norm.bias, norm.eps),
        )

    def _with_positions(self, x_BPD: Tensor) -> Tensor:
        """Return the class token, if there is one, and the patches, with their positions."""
        if self.class_embedding is not None:
            class_B1D = self.class_embedding.to(x_BPD.dtype).expand(x_BPD.shape[0], 1, -1)
            x_BPD = torch.cat([class_B1D, x_BPD], 1)
        return x_BPD + self.positional_embedding.to(x_BPD.dtype)

    def _is_as_made(self) -> bool:
        if is_portable():
            return False
        parts = (self.conv1, self.ln_pre)
        made = (nn.Conv2d, LayerNorm if self._has_ln_pre else nn.Identity)
        return tuple(map(type, parts)) == made and not any(map(is_hooked, parts))

    def _embed_by_modules(self, images: Tensor) -> Tensor:
        """Return the same result by calling ``conv1`` and ``ln_pre``, for replaced modules, hooks and traces."""
        if images.dtype == torch.uint8:
            images = normalize_images(images, self.image_mean, self.image_std)
        # A replacement layer may have no ``weight``.
        dtype = next(self.conv1.parameters(), self.positional_embedding).dtype
        x_BPD = self.conv1(images.to(dtype)).flatten(2).mT
        return self.ln_pre(self._with_positions(x_BPD))

    def _drop_patches(self, x_BLD: Tensor, seeds_B: Tensor | None) -> Tensor:
        """Return in training the class token and a random subset of each image's patches (Li et al. 2022)."""
        if not self.training or self.patch_dropout == 0:
            return x_BLD
        num_prefixes = int(self.class_embedding is not None)
        num_patches = x_BLD.shape[1] - num_prefixes
        num_kept = max(1, int(num_patches * (1 - self.patch_dropout)))
        if seeds_B is None:
            drawn = torch.rand(x_BLD.shape[0], num_patches, device=x_BLD.device)
        else:
            drawn = _hashes(seeds_B, num_patches)
        kept = drawn.topk(num_kept).indices + num_prefixes
        rows = torch.arange(x_BLD.shape[0], device=x_BLD.device)[:, None]
        return torch.cat([x_BLD[:, :num_prefixes], x_BLD[rows, kept]], 1)

    def layer_groups(self) -> list[list[nn.Module | nn.Parameter]]:
        """Return the tower's parts from input to output: stem, blocks, last block with ln_post, projection or head."""
        *blocks, last = self.transformer.blocks
        stem = [self.conv1, self.class_embedding, self.positional_embedding, self.ln_pre]
        return [
            [part for part in stem if part is not None],
            *([block] for block in blocks),  # type: ignore[list-item]
            [last, self.ln_post],
            [part for part in (self.proj, self.attn_pool) if part is not None],
        ]

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze all but the last groups of ``layer_groups``."""
        freeze_all_but_last(self.layer_groups(), unlocked_groups)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass."""
        self.transformer.grad_checkpointing = enable


def _hashes(seeds_B: Tensor, num_hashes: int) -> Tensor:
    """Return int64 [B, num_hashes]: the outputs of a splitmix64 generator started with each seed."""

    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & (
            (1 << (64 - bits)) - 1
        )  # a shift of the bits, not of the signed number

    steps = torch.arange(1, num_hashes + 1, device=seeds_B.device)
    x = seeds_B[:, None] + steps * _signed(0x9E3779B97F4A7C15)
    x = (x ^ shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ shifted(x, 31)


def _signed(word: int) -> int:
    """Return 64 bits as a signed integer, as torch stores them."""
    return word - (1 << 64)
