"""The parts that the Vision Transformer and the text tower share, under open_clip's parameter names.

Legend: B sequences, R rows of L tokens (sequences, or rows of packed captions), D width, H heads, K head size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils.checkpoint import checkpoint

from clipcore.data.packing import PackedText
from clipcore.kernels.attention import attention
from clipcore.kernels.attention_pool import attention_pool
from clipcore.kernels.gelu import gelu
from clipcore.kernels.launch import is_portable
from clipcore.kernels.layer_norm import layer_norm
from clipcore.kernels.residual_attention import AttentionWeights, Stream, residual_attention
from clipcore.kernels.residual_mlp import MLPWeights, residual_mlp
from clipcore.towers.architectures import DEFAULT_EPS
from clipcore.towers.compiled import CompiledHalves


class LayerNorm(nn.LayerNorm):
    """LayerNorm with statistics in float32 and the result in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


def activation_kind(quick: bool, tanh: bool) -> str:
    """Return the kind of GELU, see ``gelu``."""
    if quick:
        return "quick"
    return "tanh" if tanh else "erf"


class Activation(nn.Module):
    """GELU of one of its kinds, such as the QuickGELU of OpenAI's weights."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x, self.kind)

    def extra_repr(self) -> str:
        return self.kind


class LayerScale(nn.Module):
    """A factor for each channel of a block's output (Touvron et al. 2021)."""

    def __init__(self, width: int, init_value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(init_value)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.to(x.dtype)


def scaled(linear: nn.Linear, scale: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a layer times the scale that follows it, which then needs no pass over the tokens."""
    if not isinstance(scale, LayerScale):
        return linear.weight, linear.bias
    gamma = scale.gamma.to(linear.weight.dtype)
    return linear.weight * gamma[:, None], linear.bias * gamma


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

    def forward(self, x_RLD: Tensor, is_causal: bool, segments_RL: Tensor | None) -> Tensor:
        qkv = F.linear(x_RLD, self.in_proj_weight, self.in_proj_bias)
        qkv_RL3HK = qkv.unflatten(-1, (3, self.heads, -1))
        return self.out_proj(attention(qkv_RL3HK, is_causal, segments_RL))

    def pooled(self, x_RLD: Tensor, query_BD: Tensor, read: ReadAt) -> Tensor:
        """Return the output for one query per sequence, [B, D]; it attends to the tokens ``x_RLD``."""
        return self.out_proj(self.pooled_values(x_RLD, query_BD, read))

    def pooled_values(self, x_RLD: Tensor, query_BD: Tensor, read: ReadAt) -> Tensor:
        """Return ``pooled``'s result before the output's projection."""
        query, key, value = zip(
            self.in_proj_weight.unflatten(0, (3, -1)).unbind(),
            self.in_proj_bias.unflatten(0, (3, -1)).unbind(),
            strict=True,
        )
        q_BHK = F.linear(query_BD, *query).unflatten(-1, (self.heads, -1))
        return attention_pool(q_BHK, read.sequences(x_RLD), key, value, read.last_B)


# Hooks from these packages do not use a module's output: FSDP's, DDP's, and those of torch's FLOP counter.
_BLIND = ("torch.distributed", "torch.utils.module_tracker")


def is_hooked(module: nn.Module) -> bool:
    """Return whether a user's hooks observe a module's output, or its ``forward`` was replaced."""
    hooks = (
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
        *_global_forward_hooks.values(),
        *_global_forward_pre_hooks.values(),
        *_global_backward_hooks.values(),
        *_global_backward_pre_hooks.values(),
    )
    theirs = (hook for hook in hooks if not _module_of(hook).startswith(_BLIND))
    return "forward" in vars(module) or any(True for _ in theirs)


def _module_of(hook: Callable[..., Any]) -> str:
    return getattr(hook, "__module__", None) or ""


class ResidualAttentionBlock(nn.Module):
    """A pre-LayerNorm transformer block: attention and MLP, each added to the stream of its inputs.

    Each half runs as one operation, which keeps little for its backward pass (kernels/residual_attention.py and
    kernels/residual_mlp.py) and reads the parameters of the modules below. If a module was replaced (for example by LoRA's
    layers) or has hooks, the block calls its modules one by one instead. A block that has hooks itself takes and returns
    the whole stream, as the hooks expect.

    Attributes:
        compiled: what computes the block in training in place of these two operations, see ``CompiledHalves``.
    """

    compiled: CompiledHalves | None = None

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        quick_gelu: bool,
        gelu_tanh: bool = False,
        norm_eps: float = DEFAULT_EPS,
        ls_init_value: float | None = None,
    ) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.ln_1 = LayerNorm(width, norm_eps)
        self.attn = Attention(width, heads)
        self.ln_2 = LayerNorm(width, norm_eps)
        self.ls_1, self.ls_2 = (
            nn.Identity() if ls_init_value is None else LayerScale(width, ls_init_value)
            for _ in range(2)
        )
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, hidden),
                gelu=Activation(activation_kind(quick_gelu, gelu_tanh)),
                c_proj=nn.Linear(hidden, width),
            )
        )

    def forward(
        self,
        x_RLD: Tensor,
        delta_RLD: Tensor | None = None,
        is_causal: bool = False,
        segments_RL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Return the stream in two parts, see ``Stream``, given it in two parts; in one part if the block has hooks."""
        if not self.is_as_made():
            x_RLD = Stream(x_RLD, delta_RLD).joined()
            x_RLD = x_RLD + self.ls_1(self.attn(self.ln_1(x_RLD), is_causal, segments_RL))
            delta_RLD = self.ls_2(self.mlp(self.ln_2(x_RLD)))
            return x_RLD + delta_RLD if is_hooked(self) else (x_RLD, delta_RLD)
        if (halves := self._halves()) is not None:
            x_RLD, qkv = halves.projected(x_RLD, delta_RLD, self._in_weights(), self.ln_1.eps)
            qkv_RL3HK = qkv.unflatten(-1, (3, self.attn.heads, -1))
            out_RLD = attention(qkv_RL3HK, is_causal, segments_RL)
            stream = self._added(halves, x_RLD, out_RLD)
            return stream.joined() if is_hooked(self) else (stream.x, cast(Tensor, stream.delta))
        stream = residual_attention(
            Stream(x_RLD, delta_RLD),
            AttentionWeights(
                *(self.ln_1.weight, self.ln_1.bias),
                *(self.attn.in_proj_weight, self.attn.in_proj_bias),
                *scaled(self.attn.out_proj, self.ls_1),
            ),
            self.attn.heads,
            is_causal=is_causal,
            segments_RL=segments_RL,
            eps=self.ln_1.eps,
        )
        stream = self._mlp_half(stream)
        assert stream.delta is not None
        return stream.joined() if is_hooked(self) else (stream.x, stream.delta)

    def pooled(self, x_RLD: Tensor, delta_RLD: Tensor | None, read: ReadAt) -> Tensor:
        """Return the block's output at one token of each sequence, [B, D]: all that a tower needs of its last block.

        For the other tokens only LayerNorm's output is computed. The result and every gradient are those of ``forward``.
        Modules that were replaced or have hooks get all tokens.
        """
        halves = self._halves()
        if halves is not None and self.is_as_made() and not is_hooked(self):
            norm = (self.ln_1.weight, self.ln_1.bias)
            x_RLD, normed_RLD = halves.normed(x_RLD, delta_RLD, norm, self.ln_1.eps)
            out_BD = self.attn.pooled_values(normed_RLD, read.tokens(normed_RLD), read)
            return self._added(halves, read.tokens(x_RLD), out_BD).joined()
        x_RLD = Stream(x_RLD, delta_RLD).joined()
        if is_hooked(self) or not self._has_own_parts():
            segments_RL = None if read.packed is None else read.packed.segments_RP
            found = self(x_RLD, None, read.is_causal, segments_RL)
            x_RLD = found if isinstance(found, Tensor) else Stream(*found).joined()
            return read.tokens(x_RLD)
        normed_RLD = self.ln_1(x_RLD)
        x_BD = read.tokens(x_RLD)
        added_BD = self.ls_1(self.attn.pooled(normed_RLD, read.tokens(normed_RLD), read))
        if self.is_as_made():
            return self._mlp_half(Stream(x_BD, added_BD)).joined()
        x_BD = x_BD + added_BD
        return x_BD + self.ls_2(self.mlp(self.ln_2(x_BD)))

    def _halves(self) -> CompiledHalves | None:
        """Return the compiled halves where they compute: in training, unless a compiler or a dispatch mode looks on.

        Such a mode, torch's FLOP counter for one, sees no operator within compiled code.
        """
        is_off = self.compiled is None or self.compiled.is_given_up
        if is_off or not self.training or torch.is_inference_mode_enabled():
            return None
        is_watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        return None if is_watched else self.compiled

    def _in_weights(self) -> tuple[Tensor, ...]:
        attn = self.attn
        return self.ln_1.weight, self.ln_1.bias, attn.in_proj_weight, attn.in_proj_bias

    def _added(self, halves: CompiledHalves, x: Tensor, out: Tensor) -> Stream:
        c_fc, gelu, c_proj = self._mlp_parts()
        weights = [
            *scaled(self.attn.out_proj, self.ls_1),
            *(self.ln_2.weight, self.ln_2.bias, c_fc.weight, c_fc.bias),
            *scaled(c_proj, self.ls_2),
        ]
        return Stream(*halves.added(x, out, weights, gelu.kind, self.ln_2.eps))

    def _mlp_parts(self) -> tuple[nn.Linear, Activation, nn.Linear]:
        return cast(tuple[nn.Linear, Activation, nn.Linear], tuple(self.mlp))

    def _mlp_half(self, stream: Stream) -> Stream:
        c_fc, gelu, c_proj = self._mlp_parts()
        weights = MLPWeights(
            *(self.ln_2.weight, self.ln_2.bias),
            *(c_fc.weight, c_fc.bias, *scaled(c_proj, self.ls_2)),
        )
        return residual_mlp(stream, weights, gelu.kind, eps=self.ln_2.eps)

    def is_as_made(self) -> bool:
        """Return whether its modules are those of ``__init__``, without hooks, and no trace runs (it sees only modules)."""
        return not is_portable() and self._has_own_parts()

    def _has_own_parts(self) -> bool:
        # A parametrization, such as LoRA's, changes what a weight is and not what the layer does with it.
        outer = (self.ln_1, self.attn, self.ln_2, self.mlp)
        kinds = tuple(map(type_before_parametrizations, outer))
        if kinds != (LayerNorm, Attention, LayerNorm, nn.Sequential):
            return False
        linear = (self.attn.out_proj, *self.mlp)
        kinds = tuple(map(type_before_parametrizations, linear))
        if kinds != (nn.Linear, nn.Linear, Activation, nn.Linear):
            return False
        scales = (self.ls_1, self.ls_2)
        if not all(type(part) in (nn.Identity, LayerScale) for part in scales):
            return False
        biases = (part.bias for part in linear if isinstance(part, nn.Linear))
        return not any(bias is None for bias in biases) and not any(
            map(is_hooked, (*outer, *linear, *scales))
        )


class ReadAt(NamedTuple):
    """The token of each sequence whose value is the tower's output.

    Attributes:
        token_B: position in its row; None for the first.
        is_causal: whether the token attends only to earlier ones.
        packed: the rows' captions, if rows hold several.
    """

    token_B: Tensor | None = None
    is_causal: bool = False
    packed: PackedText | None = None

    def tokens(self, x_RLD: Tensor) -> Tensor:
        """Return these tokens' values, [B, D]."""
        if self.packed is not None:
            return x_RLD.flatten(0, 1).index_select(0, self.packed.ends_B)
        if self.token_B is None:
            return x_RLD[:, 0]
        # From its shape, which traces and exports generalise to other batches; len() would be a constant to them.
        rows_B = torch.arange(x_RLD.shape[0], device=x_RLD.device)
        return x_RLD[rows_B, self.token_B]

    def sequences(self, x_RLD: Tensor) -> Tensor:
        """Return the values of the tokens' sequences, [B, L, D]."""
        return x_RLD if self.packed is None else self.packed.unpacked(x_RLD)

    @property
    def last_B(self) -> Tensor | None:
        """The last position that each token attends to; None for all."""
        if self.packed is not None:
            return self.packed.lengths_B - 1
        return self.token_B if self.is_causal else None


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
        gelu_tanh: bool = False,
        norm_eps: float = DEFAULT_EPS,
        ls_init_value: float | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.is_causal = is_causal
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(
                width, heads, mlp_ratio, quick_gelu, gelu_tanh, norm_eps, ls_init_value
            )
            for _ in range(layers)
        )

    @property
    def blocks(self) -> list[ResidualAttentionBlock]:
        """The blocks in order."""
        return cast(list[ResidualAttentionBlock], list(self.resblocks))

    def forward(self, x_RLD: Tensor, segments_RL: Tensor | None = None) -> Tensor:
        """Return every token after every block, [R, L, D]; ``segments_RL`` as in ``attention``."""
        return Stream(*self._run(self.blocks, x_RLD, segments_RL)).joined()

    def pooled(
        self, x_RLD: Tensor, token_B: Tensor | None = None, packed: PackedText | None = None
    ) -> Tensor:
        """Return ``forward``'s output at one token of each sequence, [B, D]; the last block computes only it, without hooks.

        Args:
            token_B: position of the token; None for the first, or for the last one of packed captions.
            packed: the captions in the rows.

        Raises:
            ValueError: the rows are packed, but the transformer is not causal.
        """
        if packed is not None and not self.is_causal:
            raise ValueError(
                "packed captions have no padding, which only a causal text tower can do without; give this one "
                "padded rows [B, L]"
            )
        segments_RP = None if packed is None else packed.segments_RP
        read = ReadAt(token_B, self.is_causal, packed)
        if is_hooked(self):
            return read.tokens(self(x_RLD, segments_RP))
        *blocks, last = self.blocks
        if not isinstance(last, ResidualAttentionBlock):
            return read.tokens(self(x_RLD, segments_RP))
        return last.pooled(*self._run(blocks, x_RLD, segments_RP), read)

    def _run(
        self, blocks: Sequence[nn.Module], x_RLD: Tensor, segments_RL: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the stream after some blocks, in two parts."""
        stream: tuple[Tensor, Tensor | None] = (x_RLD, None)
        for block in blocks:
            is_checkpointed = self.grad_checkpointing and torch.is_grad_enabled()
            if is_checkpointed or is_hooked(block):
                # Only a block's inputs are kept, so they are joined into one tensor. Hooks expect one tensor too.
                stream = (Stream(*stream).joined(), None)
            if is_checkpointed:
                found = checkpoint(block, *stream, self.is_causal, segments_RL, use_reentrant=False)
            else:
                found = block(*stream, self.is_causal, segments_RL)
            stream = (found, None) if isinstance(found, Tensor) else found
        return stream


def read_pooled(
    transformer: nn.Module,
    x_RLD: Tensor,
    token_B: Tensor | None = None,
    packed: PackedText | None = None,
) -> Tensor:
    """Return ``Transformer.pooled``'s result; a replaced transformer is called with all tokens."""
    if isinstance(transformer, Transformer):
        return transformer.pooled(x_RLD, token_B, packed)
    found = transformer(x_RLD) if packed is None else transformer(x_RLD, packed.segments_RP)
    return ReadAt(token_B, packed=packed).tokens(found)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the matrix products and of the stream between them: autocast's if it is on."""
    kind = weight.device.type
    # The meta device, used to compute shapes and count FLOPs, has no autocast.
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def check_images(images: Tensor, image_size: int) -> None:
    """Raise TypeError unless it is a float or uint8 tensor, ValueError unless it is [B, 3, S, S] of the model's size."""
    if not isinstance(images, Tensor):
        raise TypeError(
            f"the model takes images as a tensor, got {type(images).__name__}; use the preprocessing that "
            "create_model_and_transforms returns, and torch.stack"
        )
    if not images.is_floating_point() and images.dtype != torch.uint8:
        raise ValueError(
            f"the model takes normalised images, or pixels as uint8, got {images.dtype}; clipcore.data.transforms has "
            "normalize_images"
        )
    if images.ndim != 4 or images.shape[1:] != (3, image_size, image_size):
        raise ValueError(
            f"the model takes images of [B, 3, {image_size}, {image_size}], got {tuple(images.shape)}; use the "
            "preprocessing that create_model_and_transforms returns, or build the model with force_image_size"
        )


def parameters_of(part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    """Return the parameters of a module, or the parameter itself."""
    return [part] if isinstance(part, nn.Parameter) else list(part.parameters())


def freeze(module: nn.Module | nn.Parameter, frozen: bool = True) -> None:
    """Freeze or unfreeze a module or parameter."""
    for parameter in parameters_of(module):
        parameter.requires_grad_(not frozen)


def freeze_all_but_last(
    groups: Sequence[Sequence[nn.Module | nn.Parameter]], num_free: int
) -> None:
    """Freeze a tower, given as groups from input to output, except the last ``num_free`` groups."""
    for i, group in enumerate(groups):
        for part in group:
            freeze(part, frozen=i < len(groups) - num_free)
