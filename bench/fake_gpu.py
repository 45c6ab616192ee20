"""A GPU without values: code runs as on a GPU, on tensors that have shapes only, and what it does is counted.

Inside ``with FakeGpu()`` the tensors of the meta device say that they are on a GPU, and tensors of the host are real. So
Python code takes the path that it takes on a GPU. Operators of PyTorch compute shapes, and launches of Triton kernels are
recorded and not made.

What counts, alike for every package:

- *A launch* is a launch of a Triton kernel, or an operator of PyTorch that writes a tensor on the GPU. Views and memory
  that is not written launch nothing (``VIEWS``, ``ALLOCATIONS``). An operator of clipcore counts as what its path on a GPU
  launches. A convolution's backward pass counts once for each gradient, and ``NUM_KERNELS`` names what is known to launch
  two kernels. Any other call of a library counts once, although some launch several, which only a GPU shows: split matrix
  products, BatchNorm's statistics, the backward pass of FlashAttention, the sort in an embedding's gradient, updates of
  long lists of tensors (``_foreach``, ``_fused``). A copy from the host is no launch.
- *A copy* brings a tensor from the host to the GPU. A single number, which is a kernel's argument, is none.
- *A wait* is a number of the GPU that the host asks for, or a copy that is not asked for as ``non_blocking``.
- *FLOPs* are those of matrix products and convolutions (``clipcore.run.flops``).
- *Saved bytes* are the storages that autograd keeps for the backward pass, each once. Parameters do not count, nor what is
  computed of parameters alone, such as autocast's casts.

Autocast serves no meta tensors, so its rules for a GPU are repeated for the functions that the models call (``LOWERED``,
``WIDENED``, ``SUMMED``); tests/test_counts.py compares the operators with those under torch's own. Attention without a mask
is FlashAttention and with a mask the memory-efficient one, as torch chooses for 16 bits on a GPU. BatchNorm is torch's own
and not cuDNN's, which is a single call too.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.cuda.amp.common
import torch.utils._foreach_utils
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from clipcore.kernels import launch
from clipcore.run.flops import flops_of

# What launches nothing: memory, and other views of the same memory. Whatever is not named here counts.
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
VIEWS = {
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "expand",
    "permute",
    "select",
    "set_",
    "slice",
    "split",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}
# What launches more than one kernel: zeros, and a copy into a part of them.
NUM_KERNELS = {"slice_backward": 2, "select_backward": 2}
# What makes the host wait for the GPU.
SYNCHRONISATIONS = {"_local_scalar_dense", "equal", "is_nonzero", "item", "nonzero"}

# With its number: torch would ask a missing GPU for it.
GPU = torch.device("cuda", 0)
# Without the patches of `FakeGpu`.
_BASE = torch._C.TensorBase


def has_no_values(x: Tensor) -> bool:
    """Return whether a tensor is one of the fake GPU's."""
    return bool(_BASE.is_meta.__get__(x))


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in an argument or a result."""
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def num_launches(func: Any, args: Any, out: Any) -> int:
    """Return the launches of one call of an operator of PyTorch; see the rule above."""
    name = func._opname
    # A list that is changed in place is not returned.
    written = tensors_in(out) or tensors_in(args)
    if name in ALLOCATIONS | VIEWS or not any(has_no_values(x) and x.numel() for x in written):
        return 0
    return len(written) if name == "convolution_backward" else NUM_KERNELS.get(name, 1)


class FakeGpu(TorchDispatchMode):
    """Counts what is called inside a ``with``, in this process and all its threads.

    Attributes:
        part: under which name launches and FLOPs are counted; those of a backward pass are under "backward".
        launches: by part and name.
        flops: by part.
        copies, copied_bytes, waits: of the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self._patches = contextlib.ExitStack()
        self._weights: dict[int, Any] = {}
        self._num_open = 0  # operators of clipcore that are running
        self._is_shaping = False
        self.reset()

    def reset(self) -> None:
        """Set all counts to zero, and begin with the part "forward"."""
        self.part = "forward"
        self.launches: dict[str, Counter[str]] = {}
        self.flops: Counter[str] = Counter()
        self.copies = self.copied_bytes = self.waits = 0
        # By number; the objects are kept, so that no number is given twice.
        self._saved: dict[int, Any] = {}
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}

    def num_launches(self, part: str) -> int:
        """Return the launches of a part."""
        return self.launches.get(part, Counter()).total()

    @property
    def saved_bytes(self) -> int:
        """Return the bytes that were saved for backward passes."""
        return sum(storage.nbytes() for storage in self._saved.values())

    def place(self, model: nn.Module) -> None:
        """Note the parameters and buffers of a model that was made on the meta device."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._note_weight(tensor)

    # Looking like a GPU

    def __enter__(self) -> FakeGpu:
        for patch in self._all_patches():
            self._patches.enter_context(patch)
        # What the host makes for the GPU out of numbers is then seen as a copy.
        self._patches.callback(torch._C._set_only_lift_cpu_tensors, False)
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _all_patches(self) -> Iterator[Any]:
        replace = mock.patch.object

        def is_seen(x: Tensor) -> bool:
            # torch's own code for shapes has to see the meta device.
            return has_no_values(x) and not self._is_shaping

        def device(x: Tensor) -> torch.device:
            return GPU if is_seen(x) else _BASE.device.__get__(x)

        yield replace(Tensor, "device", property(device), create=True)
        yield replace(Tensor, "is_cuda", property(is_seen), create=True)

        yield replace(torch.cuda, "_lazy_init", lambda: None)
        yield replace(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        yield replace(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        # Called where the outermost autocast ends.
        yield replace(torch, "clear_autocast_cache", lambda: self._casts.clear())
        devices = torch.utils._foreach_utils._get_foreach_kernels_supported_devices()
        yield replace(
            torch.utils._foreach_utils,
            "_get_foreach_kernels_supported_devices",
            lambda: [*devices, "meta"],
        )
        yield replace(torch.cuda, "Stream", _Stream)
        yield replace(torch.cuda, "current_stream", _Stream)
        yield replace(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        yield replace(Tensor, "record_stream", lambda *_: None)
        yield replace(launch, "on_device", lambda _: contextlib.nullcontext())
        yield replace(launch, "architecture", lambda _: 90)

        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        def run(kernel: Any, *_: Any, **__: Any) -> None:
            self._count(kernel.__name__.removeprefix("_"), 1)

        for kind in (JITFunction, InterpretedFunction):
            yield replace(kind, "run", run)

        yield torch.backends.cudnn.flags(enabled=False)
        yield replace(F, "scaled_dot_product_attention", self._attention)
        for places, is_lowered in ((LOWERED, True), (WIDENED, False)):
            for owner, name in places:
                yield replace(owner, name, self._as_autocast(getattr(owner, name), is_lowered))
        loss = torch._C._nn.cross_entropy_loss
        yield replace(torch._C._nn, "cross_entropy_loss", self._as_autocasts_loss(loss))
        for owner, name in SUMMED:
            yield replace(owner, name, _as_summed(getattr(owner, name)))
        yield torch.autograd.graph.saved_tensors_hooks(self._save, lambda x: x)

    def _as_autocast(self, function: Callable[..., Any], is_lowered: bool) -> Callable[..., Any]:
        """Return the function as autocast calls it on a GPU: with tensors of 16 bits, or of float32."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_autocast_enabled("cuda"):
                return function(*args, **kwargs)
            dtype = torch.get_autocast_dtype("cuda") if is_lowered else torch.float32
            args, kwargs = tree_map_only(Tensor, lambda x: self._cast(x, dtype), (args, kwargs))
            with torch.autocast("cuda", enabled=False):
                return function(*args, **kwargs)

        return call

    def _as_autocasts_loss(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the cross entropy as under autocast: log-softmax in the dtype of the logits, the rest in float32."""

        def call(logits: Tensor, target: Tensor, *settings: Any) -> Any:
            if not torch.is_autocast_enabled("cuda"):
                return function(logits, target, *settings)
            weight, reduction, ignore_index, label_smoothing = settings
            assert weight is None and label_smoothing == 0.0
            with torch.autocast("cuda", enabled=False):
                logs = self._cast(logits.log_softmax(1), torch.float32)
                return torch._C._nn.nll_loss_nd(logs, target, weight, reduction, ignore_index)

        return call

    def _cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor of the GPU in another dtype; a parameter is cast once in an autocast."""
        if not has_no_values(x) or not x.is_floating_point() or x.dtype in (dtype, torch.float64):
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(dtype)
        if id(x) not in self._casts:
            self._casts[id(x)] = x, x.to(dtype)
        return self._casts[id(x)][1]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> Tensor:
        """Call what torch's attention chooses for 16 bits on a GPU, for whose mask it may launch one more kernel."""
        aten = torch.ops.aten
        parts = [query, key, value]
        if attn_mask is not None:
            parts.append(attn_mask.expand(*query.shape[:-1], key.shape[-2]))
        if torch.is_autocast_enabled("cuda"):
            parts = [self._cast(part, torch.get_autocast_dtype("cuda")) for part in parts]
        if attn_mask is None:
            return aten._scaled_dot_product_flash_attention(*parts, dropout_p, is_causal)[0]
        needs_grad = True
        return aten._scaled_dot_product_efficient_attention(
            *parts, needs_grad, dropout_p, is_causal
        )[0]

    # Counting

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "clipcore":
            return self._behind(func, args, kwargs)

        # What is made of other operators counts as these.
        with self._on():
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out

        given = tensors_in((args, kwargs))
        on_gpu = [x for x in given if has_no_values(x)]
        if func._opname in SYNCHRONISATIONS and on_gpu:
            self.waits += 1
            return 1.0 if on_gpu[0].is_floating_point() else 1

        target = kwargs.get("device")
        if target is not None and target.type in ("cuda", "meta"):
            kwargs |= {"device": torch.device("meta")}
            kwargs.pop("pin_memory", None)
        elif not on_gpu:
            return func(*args, **kwargs)
        elif target is not None and target.type == "cpu":
            if func._opname != "_to_copy" or kwargs.get("non_blocking", False):
                raise NotImplementedError(f"{func} brings a tensor without values to the host")
            # As for a single number: the host waits, and gets some values.
            self.waits += 1
            return torch.ones(on_gpu[0].shape, dtype=kwargs.get("dtype") or on_gpu[0].dtype)

        copied = [x for x in given if not has_no_values(x) and x.dim() > 0]
        self.copies += len(copied)
        self.waits += bool(copied) and not kwargs.get("non_blocking", False)
        self.copied_bytes += sum(x.nbytes for x in copied)

        # torch 2.11 has no shapes for it.
        is_known = func is torch.ops.aten.addmm.dtype_out
        out = kwargs["out"] if is_known else self._shapes(func, args, kwargs)
        # To a GPU where it is already, in the same dtype: there it is the tensor itself.
        is_there = func._opname == "_to_copy" and target is not None and _is_alike(out, args[0])
        if not copied and not is_there:
            self._count(func._opname, num_launches(func, args, out))
        self._count_flops(func, args, kwargs, out)

        is_of_weights = all(x.untyped_storage()._cdata in self._weights for x in on_gpu)
        if on_gpu and is_of_weights and func._opname not in ALLOCATIONS:
            for x in tensors_in(out):
                self._note_weight(x)
        return out

    def _behind(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call what is behind an operator of clipcore, since a mode does not see into it."""
        self._num_open += 1
        try:
            with self._on(), torch.autocast("cuda", enabled=False):
                out = OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        finally:
            self._num_open -= 1
        self._count_flops(func, args, kwargs, out)
        return out

    @contextlib.contextmanager
    def _on(self) -> Iterator[None]:
        """Turn the mode on, which is off while it handles a call."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def _shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return an operator's results without values."""
        self._is_shaping = True
        try:
            with torch.autocast("cuda", enabled=False):
                return func(*args, **kwargs)
        finally:
            self._is_shaping = False

    def _part(self) -> str:
        is_backward = torch._C._current_graph_task_id() != -1
        return "backward" if is_backward else self.part

    def _count(self, name: str, number: int) -> None:
        if number:
            self.launches.setdefault(self._part(), Counter())[name] += number

    def _count_flops(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        # The formula of an operator of clipcore includes what is behind it.
        if not self._num_open:
            self.flops[self._part()] += flops_of(func._overloadpacket, args, kwargs, out)

    def _note_weight(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        self._weights[storage._cdata] = storage

    def _save(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if has_no_values(x) and storage._cdata not in self._weights:
            self._saved[storage._cdata] = storage
        return x


def _as_summed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as autocast calls it on a GPU: numbers of 16 bits are added up in float32."""

    @functools.wraps(function)
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_narrow = has_no_values(x) and x.dtype in (torch.bfloat16, torch.float16)
        if is_narrow and torch.is_autocast_enabled("cuda"):
            kwargs.setdefault("dtype", torch.float32)
        return function(x, *args, **kwargs)

    return call


def _is_alike(x: Tensor, y: Tensor) -> bool:
    return (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride())


class _Stream:
    """A stream, which is nothing without a GPU."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device

    def wait_stream(self, other: _Stream) -> None:
        """Wait for nothing."""


# What autocast computes in 16 bits on a GPU, what in float32, and what it gives a result of float32, as far as the models
# call it.
Place = tuple[Any, str]
LOWERED: tuple[Place, ...] = ((F, "linear"), (F, "conv2d"), (Tensor, "__matmul__"))
WIDENED: tuple[Place, ...] = ((torch, "layer_norm"),)
SUMMED: tuple[Place, ...] = ((Tensor, "sum"), (Tensor, "norm"))
