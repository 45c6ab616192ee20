"""SigLIP's pooling head: one learnt query attends to the patches, and an MLP follows.

Legend: B images, L patches, D width, H heads, K head size. Parameters have timm's names, those of ``AttentionPoolLatent``.
Source: Zhai et al. 2022 (Scaling Vision Transformers), section 3.2; Lee et al. 2019 (Set Transformer).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import type_before_parametrizations

from clipcore.kernels.attention_pool import attention_pool
from clipcore.kernels.launch import is_portable
from clipcore.kernels.residual_attention import Stream
from clipcore.kernels.residual_mlp import MLPWeights, residual_mlp
from clipcore.towers.modules import Activation, LayerNorm, compute_dtype, is_hooked


class PoolingHead(nn.Module):
    """Tokens [B, L, D] to one feature an image, [B, D]."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, activation: str, norm_eps: float
    ) -> None:
        super().__init__()
        self.heads = heads
        hidden = int(width * mlp_ratio)
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = LayerNorm(width, norm_eps)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(width, hidden),
                act=Activation(activation),
                fc2=nn.Linear(hidden, width),
            )
        )
        nn.init.trunc_normal_(self.latent, std=width**-0.5)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the query's attention to the tokens, projected, plus the MLP of its LayerNorm."""
        if not self._is_as_made():
            return self._by_modules(x_BLD)
        latent_BD = self.latent[0].to(compute_dtype(self.q.weight)).expand(x_BLD.shape[0], -1)
        q_BHK = self.q(latent_BD).unflatten(-1, (self.heads, -1))
        (key, value), (key_bias, value_bias) = self.kv.weight.chunk(2), self.kv.bias.chunk(2)
        pooled_BD = attention_pool(q_BHK, x_BLD, (key, key_bias), (value, value_bias))
        fc1, act, fc2 = cast(tuple[nn.Linear, Activation, nn.Linear], tuple(self.mlp))
        weights = MLPWeights(
            *(self.norm.weight, self.norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        )
        stream = Stream(self.proj(pooled_BD))
        return residual_mlp(stream, weights, act.kind, eps=self.norm.eps).joined()

    def _is_as_made(self) -> bool:
        """Return whether its modules are those of ``__init__``, without hooks, and no trace runs."""
        parts = (self.q, self.kv, self.proj, self.norm, self.mlp, *self.mlp)
        made = (
            *(nn.Linear, nn.Linear, nn.Linear, LayerNorm, nn.Sequential),
            *(nn.Linear, Activation, nn.Linear),
        )
        is_own = tuple(map(type_before_parametrizations, parts)) == made
        return is_own and not any(map(is_hooked, parts)) and not is_portable()

    def _by_modules(self, x_BLD: Tensor) -> Tensor:
        """Return the same result by calling its modules, for replaced modules, hooks and traces."""
        latent_B1D = self.latent.to(x_BLD.dtype).expand(x_BLD.shape[0], -1, -1)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q(latent_B1D), *self.kv(x_BLD).chunk(2, dim=-1))
        )
        out_BHK = F.scaled_dot_product_attention(q, k, v).squeeze(2)
        pooled_BD = self.proj(out_BHK.flatten(1))
        return pooled_BD + self.mlp(self.norm(pooled_BD))
