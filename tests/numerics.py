"""The one rule of accuracy, and where and in which dtypes kernels are tested.

err(kernel) <= 2 * err(reference in the same dtype) + 1 ulp of the largest exact value, err = largest absolute
difference from the exact value = the reference in float64. It holds for the output and for every gradient under random
upstream gradients. No test has a tolerance of its own.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Layer 2 (the interpreter on the CPU) and layer 4 (a GPU) are the same tests: kernels run where they can run best.
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bfloat16 dot product is silently wrong.
KERNEL_DTYPES = (
    [torch.float32, torch.float16, torch.bfloat16]
    if KERNEL_DEVICE == "cuda"
    else [torch.float32, torch.float16]
)
# Public functions run on each.
DEVICES = ["cpu", "cuda"] if KERNEL_DEVICE == "cuda" else ["cpu"]


class LargestStorage(TorchDispatchMode):
    """Watches every operation inside a ``with``; ``bytes`` is the largest storage that one of them returned."""

    bytes = 0

    @classmethod
    @contextlib.contextmanager
    def inside(cls, module: ModuleType, *functions: str) -> Iterator[LargestStorage]:
        """One that watches inside these functions of a module: a mode does not see into an operator that calls them."""
        mode = cls()

        def watched(fn: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                with mode:
                    return fn(*args)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for name in functions:
                patch.setattr(module, name, watched(getattr(module, name)))
            yield mode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


class LiveStorages(LargestStorage):
    """Also counts the bytes that are alive of what operations inside a ``with`` returned; ``peak_bytes`` is their most.

    A tensor is counted with its whole storage, once, from the operation that returned it until it is freed.
    """

    peak_bytes = 0
    alive_bytes = 0

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, weakref.ref[UntypedStorage]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        # What was there before is not of these operations, also where they return a view of it.
        given = {
            tensor.untyped_storage()._cdata
            for tensor in tree_leaves((args, kwargs))
            if isinstance(tensor, Tensor)
        }
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._watch(tensor.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
        return out

    def _watch(self, storage: UntypedStorage) -> None:
        """Count a storage until it is freed; torch keeps its Python object as long as anything uses it."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def free(_: weakref.ref[UntypedStorage]) -> None:
            del self._alive[key]
            self.alive_bytes -= size

        self._alive[key] = weakref.ref(storage, free)
        self.alive_bytes += size


class Products:
    """Counts the matrix products of the library inside a ``with``."""

    count = 0

    def __enter__(self) -> Products:
        self._patch = pytest.MonkeyPatch()
        for holder, name in (
            (torch, "mm"),
            (torch, "addmm"),
            (torch.Tensor, "addmm_"),
        ):
            self._patch.setattr(holder, name, self._counted(getattr(holder, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _counted(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return fn(*args, **kwargs)

        return call


def ulp(largest: float, dtype: torch.dtype) -> float:
    """Distance between the numbers of dtype around a magnitude."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(largest, info.tiny)))


def _largest(error: Tensor) -> float:
    return error.abs().max().item()


def root_mean_square(error: Tensor) -> float:
    """Of problems of one number each, the largest of whose errors is luck: on each processor another one is far out."""
    return error.square().mean().sqrt().item()


def assert_accurate(
    name: str,
    actual: Tensor,
    reference: Tensor,
    exact: Tensor,
    size: Callable[[Tensor], float] = _largest,
) -> None:
    """Check the rule for one tensor. actual and reference have one dtype, exact is float64; size is that of errors."""
    assert actual.dtype == reference.dtype, f"{name}: {actual.dtype}, expected {reference.dtype}"
    assert actual.shape == exact.shape, f"{name}: {actual.shape}, expected {exact.shape}"
    assert exact.dtype == torch.float64 and exact.isfinite().all()
    assert actual.isfinite().all(), f"{name}: {(~actual.isfinite()).sum()} elements are not finite"
    if exact.numel() == 0:
        return
    error, reference_error = size(actual.double() - exact), size(reference.double() - exact)
    one_ulp = ulp(exact.abs().max().item(), actual.dtype)
    assert error <= 2 * reference_error + one_ulp, (
        f"{name}: error {error:.3e}, reference {reference_error:.3e}, one ulp {one_ulp:.3e}"
    )


def with_gradients(
    fn: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor
) -> list[Tensor]:
    """[output, gradient of each input] of fn for one upstream gradient, by autograd."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = fn(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]


def exactly(fn: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """`with_gradients` in float64, from the very values of the inputs and of the upstream gradient."""
    return with_gradients(fn, [tensor.double() for tensor in inputs], upstream.double())


# In float32 the order of torch's own sums decides (its LayerNorm on the CPU has up to four times the reference's
# error), so that float64 is where its mathematics is held to the reference.
LOW_DTYPES = [torch.bfloat16, torch.float16]


def check(
    op: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    """In float64 to 1e-12, in low precision by the rule, in each twice with the same bits."""
    upstream = torch.randn_like(reference(*inputs))
    for device in DEVICES:
        exact = exactly(reference, [x.to(device) for x in inputs], upstream.to(device))
        in_fp64 = with_gradients(op, [x.double().to(device) for x in inputs], upstream.to(device))
        for got, expected in zip(in_fp64, exact, strict=True):
            assert (got - expected).abs().max() <= 1e-12 * max(1.0, expected.abs().max().item())
        for dtype in LOW_DTYPES:
            low = [x.to(device, dtype) for x in inputs]
            exact = exactly(reference, low, upstream.to(device, dtype))
            expected, got, again = (
                with_gradients(f, low, upstream.to(device, dtype)) for f in (reference, op, op)
            )
            for i, values in enumerate(zip(got, expected, exact, strict=True)):
                assert_accurate(f"{dtype} {'output' if i == 0 else f'gradient {i}'}", *values)
            assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
