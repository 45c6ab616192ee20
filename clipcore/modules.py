"""The parts that both Vision Transformer and text tower are made of, under open_clip's parameter names.

Legend: B sequences, L tokens, D width, H heads, K head size, F width of the MLP.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clipcore.kernels.attention import attention, pooled_attention
from clipcore.kernels.gelu import gelu
from clipcore.kernels.layer_norm import layer_norm


class LayerNorm(nn.LayerNorm):
    """Statistics in float32, result in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class Activation(nn.Module):
    """GELU, or the QuickGELU of OpenAI's weights."""

    def __init__(self, quick: bool) -> None:
        super().__init__()
        self.kind = "quick" if quick else "erf"

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x, self.kind)

    def extra_repr(self) -> str:
        return self.kind


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection; parameters as in ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x_BLD: Tensor, is_causal: bool) -> Tensor:
        qkv = F.linear(x_BLD, self.in_proj_weight, self.in_proj_bias)
        qkv_BL3HK = qkv.unflatten(-1, (3, self.heads, -1))
        return self.out_proj(attention(qkv_BL3HK, is_causal))

    def pooled(self, x_BLD: Tensor, query_BD: Tensor, last_B: Tensor | None) -> Tensor:
        """The output for one query a sequence: [B, D]; ``last_B`` is the last token it sees, None for all."""
        width = query_BD.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        q_BHK = F.linear(query_BD, weight[:width], bias[:width]).unflatten(-1, (self.heads, -1))
        kv = F.linear(x_BLD, weight[width:], bias[width:])
        kv_BL2HK = kv.unflatten(-1, (2, self.heads, -1))
        return self.out_proj(pooled_attention(q_BHK, kv_BL2HK, last_B))


class ResidualAttentionBlock(nn.Module):
    """A pre-LayerNorm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, quick_gelu: bool) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, hidden),
                gelu=Activation(quick_gelu),
                c_proj=nn.Linear(hidden, width),
            )
        )

    def forward(self, x_BLD: Tensor, is_causal: bool) -> Tensor:
        x_BLD = x_BLD + self.attn(self.ln_1(x_BLD), is_causal)
        return x_BLD + self.mlp(self.ln_2(x_BLD))

    def pooled(self, x_BLD: Tensor, token_B: Tensor | None, is_causal: bool) -> Tensor:
        """The block's output at one token of each sequence, [B, D]: all that a tower reads of its last block.

        Only keys and values are computed for the other tokens; the result and every gradient are those of ``forward``.

        Args:
            token_B: which token; None for the first.
        """
        rows = torch.arange(len(x_BLD), device=x_BLD.device)
        x_BD = x_BLD[:, 0] if token_B is None else x_BLD[rows, token_B]
        normed_BLD = self.ln_1(x_BLD)
        query_BD = normed_BLD[:, 0] if token_B is None else normed_BLD[rows, token_B]
        x_BD = x_BD + self.attn.pooled(normed_BLD, query_BD, token_B if is_causal else None)
        return x_BD + self.mlp(self.ln_2(x_BD))


class Transformer(nn.Module):
    """A stack of blocks.

    Attributes:
        grad_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.is_causal = is_causal
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, mlp_ratio, quick_gelu) for _ in range(layers)
        )

    @property
    def blocks(self) -> list[ResidualAttentionBlock]:
        """The blocks in order."""
        return cast(list[ResidualAttentionBlock], list(self.resblocks))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Every token through every block: [B, L, D]."""
        for block in self.blocks:
            x_BLD = self._run(block, x_BLD)
        return x_BLD

    def pooled(self, x_BLD: Tensor, token_B: Tensor | None = None) -> Tensor:
        """``forward`` at one token of each sequence, [B, D]; the last block computes no other."""
        *blocks, last = self.blocks
        for block in blocks:
            x_BLD = self._run(block, x_BLD)
        return last.pooled(x_BLD, token_B, self.is_causal)

    def _run(self, block: nn.Module, x_BLD: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            y_BLD = checkpoint(block, x_BLD, self.is_causal, use_reentrant=False)
            assert isinstance(y_BLD, Tensor)
            return y_BLD
        return block(x_BLD, self.is_causal)


def check_image_size(images: Tensor, image_size: int) -> None:
    """Raises ValueError when the images are not [B, 3, S, S] of the model's size."""
    if images.ndim != 4 or images.shape[1:] != (3, image_size, image_size):
        raise ValueError(
            f"the model takes images of [B, 3, {image_size}, {image_size}], got {tuple(images.shape)}; use the "
            "preprocessing that create_model_and_transforms returns, or build the model with force_image_size"
        )


def freeze(module: nn.Module | nn.Parameter, frozen: bool = True) -> None:
    """Stops, or restarts, the training of a module or parameter."""
    parameters = [module] if isinstance(module, nn.Parameter) else list(module.parameters())
    for parameter in parameters:
        parameter.requires_grad_(not frozen)


def freeze_all_but_last(
    groups: Sequence[Sequence[nn.Module | nn.Parameter]], num_free: int
) -> None:
    """Freezes a tower, given as groups from its input to its output, but for the last ``num_free`` groups."""
    for i, group in enumerate(groups):
        for part in group:
            freeze(part, frozen=i < len(groups) - num_free)
