"""A transformer block in torch's own operators, fused by a compiler, around our attention.

Legend: N tokens of any rows, D width, F width of the hidden layer.

    x' = x + delta,          qkv    = in_proj(LayerNorm(x'))            `projected`
    out = attention(qkv)                                                our operator, not compiled
    x'' = x' + out_proj(out), delta'' = c_proj(GELU(c_fc(LayerNorm(x''))))   `added`

The last block of a tower begins with `normed`, LayerNorm alone, and ends with `added` at one token a sequence. The operators
of kernels/ are opaque to a compiler, so nothing here uses them.

*One graph a kind.* The tokens of all rows are one axis N, and N is the only size that changes: micro-batches, lengths of
captions and packed rows differ in nothing else. The axis is marked as unbacked, so that the compiler knows nothing about
it: the code serves every N, one token included, and does not depend on which N came first. All else that differs between
two calls (widths, dtypes, which weights are trained, one part of the stream or two) is in the key of a `_Kind`, which has
compiled code of its own. The blocks of a tower share their kinds.

*Without gradients the same graph runs* as with them, and what it saves is dropped at once. So a replay of a micro-batch has
the bits of its first pass. (Not so for a block without trained weights above trained ones, which no flag of a run makes: its
inputs need gradients in one pass only.)

Kept for the backward pass: the inputs of GELU and LayerNorm, whose outputs are recomputed, and no cast of a weight; 10 D
numbers a token and block, as by kernels/residual_attention.py and kernels/residual_mlp.py.
"""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels.gelu import QUICK_GELU_SLOPE
from clipcore.kernels.launch import accumulate_dtype

Tensors = tuple[Tensor, ...]
Body = Callable[[Tensors, Tensors], Tensors]

# LayerNorm's backward pass sums over rows and over columns. Inductor computes both sums in one kernel, but by default only
# if it can show that there are many rows, which it cannot of an unknown number. It also times no variants of a kernel that
# would round differently. A torch that does not know a setting goes without it.
_INDUCTOR = {"triton.mix_order_reduction_non_strict_mode": True, "deterministic": True}


class CompiledHalves:
    """The functions above, each compiled once for each kind of argument.

    Attributes:
        num_graphs: how often the compiler was called.
        is_given_up: whether torch has refused to compile once more: blocks then compute without this.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        self.backend = backend
        self.num_graphs = 0
        self.is_given_up = False
        self._kinds: dict[tuple[Any, ...], _Kind] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledHalves:
        return self  # a copy of a model runs the same code

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledHalves, (self.backend,)  # code is compiled anew where a model is unpickled

    def projected(
        self, x: Tensor, delta: Tensor | None, weights: Sequence[Tensor], eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return (x', qkv [..., 3 D]) of a stream [..., D] in two parts.

        Args:
            weights: weight and bias of LayerNorm, weight and bias of the projection.
        """
        return self._of_stream("projected", x, delta, weights, eps)

    def normed(
        self, x: Tensor, delta: Tensor | None, weights: Sequence[Tensor], eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return (x', its LayerNorm) of a stream [..., D] in two parts; ``weights`` are LayerNorm's."""
        return self._of_stream("normed", x, delta, weights, eps)

    def added(
        self, x: Tensor, out: Tensor, weights: Sequence[Tensor], kind: str, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return the stream in two parts after attention's output [..., D] and the MLP were added.

        Args:
            weights: weight and bias each of the output's projection, of LayerNorm and of the MLP's two layers.
            kind: of the activation, see ``gelu``.
        """
        x_ND, delta_ND = self._call("added", (x, out), weights, (kind, eps))
        return _reshaped(x_ND, *x.shape), _reshaped(delta_ND, *x.shape)

    def _of_stream(
        self, name: str, x: Tensor, delta: Tensor | None, weights: Sequence[Tensor], eps: float
    ) -> tuple[Tensor, Tensor]:
        stream = (x,) if delta is None else (x, delta)
        *joined, y_NC = self._call(name, stream, weights, (eps,))
        y = _reshaped(y_NC, *x.shape[:-1], -1)
        return _reshaped(joined[0], *x.shape) if joined else x, y

    def _call(
        self, name: str, inputs: Tensors, weights: Sequence[Tensor], constants: tuple[Any, ...]
    ) -> Tensors:
        weights = tuple(weights)
        # Of a block that trains only in part, the inputs have gradients too, whether these are asked for or not.
        is_trained = any(part.requires_grad for part in (*inputs, *weights))
        first = inputs[0]
        key = (
            *(name, constants, len(inputs), is_trained, first.dtype, first.device),
            *((weight.shape, weight.dtype, weight.requires_grad) for weight in weights),
        )
        if (kind := self._kinds.get(key)) is None:
            kind = self._kinds[key] = _Kind(name, constants, len(self._kinds), self)
        return kind(inputs, weights, is_trained)

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        """Compile a graph: torch.compile's backend."""
        self.num_graphs += 1
        # Recompute what is cheap: by default the outputs of LayerNorm and GELU are kept, and every cast of a weight.
        with torch._functorch.config.patch(aggressive_recomputation=True):
            if self.backend != "inductor":
                return torch._dynamo.lookup_backend(self.backend)(graph, inputs)
            from torch._inductor.compile_fx import compile_fx  # takes seconds to import

            return compile_fx(graph, inputs, config_patches=_known_settings())


def _known_settings() -> dict[str, Any]:
    from torch._inductor import config

    def is_known(name: str) -> bool:
        *groups, last = name.split(".")
        return hasattr(functools.reduce(getattr, groups, config), last)

    return {name: value for name, value in _INDUCTOR.items() if is_known(name)}


class _Kind:
    """One function for arguments that differ in nothing but their number of rows."""

    def __init__(
        self, name: str, constants: tuple[Any, ...], number: int, halves: CompiledHalves
    ) -> None:
        self.name, self._halves = name, halves
        self._plain = _BODIES[name](*constants)
        # torch keeps compiled code by code object, counts recompilations by it, and remembers by its name which sizes have
        # changed.
        own = types.FunctionType(
            self._plain.__code__.replace(co_name=f"{name}_{number}"),
            self._plain.__globals__,
            f"{name}_{number}",
            None,
            self._plain.__closure__,
        )
        self._compiled: Body = torch.compile(
            own, backend=halves._compile, fullgraph=True, dynamic=False
        )
        self._is_new = True

    def __call__(self, inputs: Tensors, weights: Tensors, is_trained: bool) -> Tensors:
        is_recorded = torch.is_grad_enabled()
        inputs = tuple(_reshaped(part, -1, part.shape[-1]) for part in inputs)
        inputs = tuple(
            part if is_recorded and part.requires_grad else part.detach().requires_grad_(is_trained)
            for part in inputs
        )
        # The functions choose their dtypes; and code is compiled for one state of autocast, its cache's included.
        device = inputs[0].device
        uncast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if device.type != "meta":  # which has no autocast
            uncast = torch.autocast(device.type, enabled=False, cache_enabled=False)
        with torch.enable_grad(), uncast:
            found = self._run(inputs, weights)
        return found if is_recorded else tuple(part.detach() for part in found)

    def _run(self, inputs: Tensors, weights: Tensors) -> Tensors:
        for part in inputs:
            torch._dynamo.decorators.mark_unbacked(part, 0)
        try:
            if not self._is_new:
                return self._compiled(inputs, weights)
            # Within DistributedDataParallel torch would cut the graph at the borders of its buckets.
            with torch._dynamo.config.patch(optimize_ddp=False):
                found = self._compiled(inputs, weights)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            if not self._halves.is_given_up:
                self._halves.is_given_up = True
                warnings.warn(
                    f"torch.compile has compiled a part of the transformer blocks ({self.name}) too often "
                    f"(torch._dynamo.config.recompile_limit is {torch._dynamo.config.recompile_limit}): from here on they "
                    "run uncompiled, and results have other last bits; TORCH_LOGS=recompiles says why",
                    stacklevel=2,
                )
            return self._plain(inputs, weights)
        self._is_new = False
        return found


class _Reshaped(torch.autograd.Function):
    """A contiguous tensor in another shape, in the same memory and with the same version counter, but no view to autograd.

    Code for a view would be compiled for the shape of its base, and FSDP allows no view among a block's outputs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.shape = x.shape
        return x.view(shape).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.reshape(ctx.shape), None


def _reshaped(x: Tensor, *shape: int) -> Tensor:
    return _Reshaped.apply(x.contiguous(), shape)


# What is compiled: functions of inputs [N, D] and weights, made for some constants.


def _joined(inputs: Tensors) -> Tensor:
    if len(inputs) == 1:
        return inputs[0]
    x, delta = inputs
    torch._check(x.shape[0] == delta.shape[0])
    return x + delta


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = accumulate_dtype(x.dtype)
    y = F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return y.to(x.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _activated(hidden: Tensor, kind: str) -> Tensor:
    if kind == "quick":
        return hidden * torch.sigmoid(QUICK_GELU_SLOPE * hidden)
    return F.gelu(hidden, approximate="tanh" if kind == "tanh" else "none")


def _with_sum(inputs: Tensors, x: Tensor, y: Tensor) -> Tensors:
    """Return both, the stream only where it was summed here."""
    return (y,) if len(inputs) == 1 else (x, y)


def _projected(eps: float) -> Body:
    def projected(inputs: Tensors, weights: Tensors) -> Tensors:
        norm_weight, norm_bias, in_weight, in_bias = weights
        x = _joined(inputs)
        y = _layer_norm(x, norm_weight, norm_bias, eps)
        return _with_sum(inputs, x, _linear(y, in_weight, in_bias))

    return projected


def _normed(eps: float) -> Body:
    def normed(inputs: Tensors, weights: Tensors) -> Tensors:
        norm_weight, norm_bias = weights
        x = _joined(inputs)
        return _with_sum(inputs, x, _layer_norm(x, norm_weight, norm_bias, eps))

    return normed


def _added(kind: str, eps: float) -> Body:
    def added(inputs: Tensors, weights: Tensors) -> Tensors:
        out_weight, out_bias, norm_weight, norm_bias = weights[:4]
        fc_weight, fc_bias, proj_weight, proj_bias = weights[4:]
        x, out = inputs
        x = _joined((x, _linear(out, out_weight, out_bias)))
        hidden = _linear(_layer_norm(x, norm_weight, norm_bias, eps), fc_weight, fc_bias)
        return x, _linear(_activated(hidden, kind), proj_weight, proj_bias)

    return added


_BODIES: dict[str, Callable[..., Body]] = {
    "projected": _projected,
    "normed": _normed,
    "added": _added,
}
