"""Shared host code of the kernel files: Triton itself, the chip's table row, dtype rules, autocast, products.

Kernel files import `tl` and `triton` from here. On Linux they are the real ones. Where Triton does not exist (macOS,
Windows) the stand-ins let the modules import, because every operation there runs on the CPU path.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:

    class _NoTriton:
        """Let `@triton.jit` decorate; a launch fails with AttributeError."""

        @staticmethod
        def jit(fn: Any = None, **_: Any) -> Any:
            return fn or (lambda fn: fn)

    triton = tl = _NoTriton()

# Fragments of one operator library: autocast rules are added to operators that torch.library.custom_op defined.
_LIBRARY = torch.library.Library("clipcore", "FRAGMENT")

# Multiprocessors of the full chip (A100, H100/H200, B200). A constant and not a device query: the split of the work,
# and with it every rounding, is then the same on each card of a generation.
NUM_PROCESSORS = {80: 108, 90: 132, 100: 148}


# Rows of 16 bits that the CPU converts at once: they stay in its cache between the passes.
STRIP_ELEMENTS = 2**20


def architecture(device: torch.device) -> int:
    """Return the launch-table row for a device: 80, 90 or 100.

    Row 80 keeps to the 99 KB of shared memory that sm_86, sm_89 and sm_120 have too, so it serves every other chip.
    The interpreter on the CPU reads row 90.
    """
    if device.type != "cuda":
        return 90
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)


def most_registers(architecture: int, num_warps: int) -> int | None:
    """Return how many registers a thread may have, as the launch option ``maxnreg``; None leaves it to the assembler.

    Left to itself, the assembler of Triton 3.9 moves a value or two to memory so that more programs fit on a processor. Row
    90 has no spills without a limit, and most of it was measured so.
    """
    return None if architecture == 90 else min(255, 65536 // (32 * num_warps))


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one: Triton launches there, whatever device its tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def uncast(device: torch.device) -> AbstractContextManager[Any]:
    """Turn autocast off, for passes that choose their dtypes themselves.

    The meta device, on which shapes and FLOPs are counted, has no autocast.
    """
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def in_triton(x: Tensor) -> bool:
    """Return whether our kernels compute x: all of CUDA but float64, which torch computes there, for comparisons."""
    return x.is_cuda and x.dtype != torch.float64


# Counted for the process, not for a thread: on a GPU the backward pass runs in a thread of its own.
_watchers = 0


@contextmanager
def visible_operators() -> Iterator[None]:
    """Send `eager` calls through the dispatcher, where profilers and dispatch modes see them; the bits stay the same."""
    global _watchers
    _watchers += 1
    try:
        yield
    finally:
        _watchers -= 1


_portable = False


@contextmanager
def portable_operators() -> Iterator[None]:
    """Compute with torch's operators alone, for a model that will run where clipcore is not installed."""
    global _portable
    before, _portable = _portable, True
    try:
        yield
    finally:
        _portable = before


def is_portable() -> bool:
    """Return whether to compute with torch's operators alone: within `portable_operators`, and in a trace."""
    return _portable or torch.jit.is_tracing()


def eager(function: Any) -> Any:
    """Return the function itself, or the operator `clipcore::<its name>` where a compiler or a profiler has to see it.

    That is under torch.compile, under a dispatch mode such as torch's FLOP counter, and within `visible_operators`.
    Elsewhere a pass with its own backward pass does not need the dispatcher, and saves its time.
    """
    if _watchers or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return getattr(torch.ops.clipcore, function.__name__)
    return function


def as_fresh(x: Tensor) -> Tensor:
    """Return x in the same memory, but as no view of another tensor: FSDP requires that of a module's outputs.

    The result has a version counter of its own. A pass that keeps x for its backward pass has to keep this tensor, not
    the one that it was made of, so that changes in place are seen.
    """
    if torch.compiler.is_compiling():
        return x
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def check_first_order(name: str) -> None:
    """Refuse a graph of the gradients, in a backward pass that cannot be differentiated itself.

    The error comes at once. torch would name an operator that the user has not called, ``once_differentiable`` raises only
    if an incoming gradient has a graph itself, and ``torch.autograd.grad`` with ``allow_unused`` would return None.

    Args:
        name: of the function that was called, for the message.

    Raises:
        RuntimeError: a derivative of the gradients is asked for, as with ``create_graph=True``.
    """
    # The mode is on in a backward pass where a graph of the gradients is asked for, and while a compiler traces one.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name} can be differentiated once, not twice: leave create_graph=True out"
        )


def first_order(name: str) -> Any:
    """Decorate the backward pass of an ``autograd.Function`` that cannot be differentiated; see ``check_first_order``."""

    def decorate(backward: Any) -> Any:
        once = torch.autograd.function.once_differentiable(backward)

        @functools.wraps(backward)
        def checked(ctx: Any, *grads: Tensor | None) -> Any:
            check_first_order(name)
            return once(ctx, *grads)

        return checked

    return decorate


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float64 for float64, which torch computes, and float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def column_sum(x_ND: Tensor) -> Tensor:
    """Sum over rows in float32 (float64 for float64); torch's own sum of 16-bit rows would round to 16 bits.

    On the CPU it goes by strips: torch's sum with a dtype converts all of x first.
    """
    wide = accumulate_dtype(x_ND.dtype)
    if x_ND.is_cuda or x_ND.dtype == wide:
        return x_ND.sum(0, dtype=wide)
    sum_D = torch.zeros(x_ND.shape[1], dtype=wide)
    for strip in x_ND.split(max(1, STRIP_ELEMENTS // max(1, x_ND.shape[1]))):
        sum_D += strip.to(wide).sum(0)
    return sum_D


def as_scalar(name: str, value: Tensor | float, x: Tensor, y: Tensor) -> Tensor:
    """Return a number, or a tensor of one floating-point element on the device of x and y, as a tensor there."""
    if not isinstance(value, Tensor):
        dtype = accumulate_dtype(torch.promote_types(x.dtype, y.dtype))
        return torch.full((), float(value), dtype=dtype, device=x.device)
    if value.numel() != 1 or not value.is_floating_point() or value.device != x.device:
        raise ValueError(
            f"{name} has to be a number or one floating-point element on {x.device}, "
            f"got {value.dtype} {list(value.shape)} on {value.device}"
        )
    return value


def unit_inner_stride(x_ND: Tensor) -> Tensor:
    """Return x_ND itself when its rows are contiguous, else a contiguous copy: kernels take only the row stride."""
    return x_ND if x_ND.stride(1) == 1 or x_ND.shape[1] == 1 else x_ND.contiguous()


def aligned_rows(x_ND: Tensor, multiple: int) -> Tensor:
    """Return x_ND itself when a tile kernel can stream it, else a copy padded by zeros to a multiple of elements.

    Asynchronous copies to shared memory take 16 aligned bytes at a time. Without them a tile kernel has no pipeline
    (and spills). Every width of a CLIP embedding is a multiple of 64 and is not copied.
    """
    width = x_ND.shape[1]
    aligned = x_ND.data_ptr() % 16 == 0 and x_ND.stride(0) * x_ND.element_size() % 16 == 0
    if width % multiple == 0 and x_ND.stride(1) == 1 and aligned:
        return x_ND
    return torch.nn.functional.pad(x_ND, (0, -width % multiple)).contiguous()


def matmul_fp32(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return a @ b by the vendor's library in float32, never rounded to a 16-bit input dtype.

    float32 operands follow torch.set_float32_matmul_precision, as every torch product does. Each row of `out` is
    contiguous; the row stride may be larger, which the library supports.
    """
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":  # the CPU has no product with a wider result
        return torch.mm(a.float(), b.float(), out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def addmm_fp32_(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to acc in place, as `matmul_fp32` computes it; acc is float32 and contiguous."""
    if a.device.type == "meta":
        return  # Meta tensors have no values, and torch 2.11 has no such product of them.
    if a.dtype == torch.float32:
        acc.addmm_(a, b)
    elif a.device.type == "cpu":
        acc.addmm_(a.float(), b.float())
    else:
        torch.addmm(acc, a, b, out_dtype=torch.float32, out=acc)


def register_autocast(op: str, *, num_operands: int) -> None:
    """Register the autocast rule of `clipcore::<op>`: the first `num_operands` arguments are cast, the rest stay.

    torch.library.register_autocast casts every floating-point argument to one fixed dtype. A logit scale of 14.29
    would become 14.31 in bfloat16, and a float16 region would compute in bfloat16, so the rule is our own. Inside the
    operator autocast is off in any case; num_operands=0 does only that.
    """
    overload = getattr(torch.ops.clipcore, op).default

    def add(device_type: str) -> None:
        def cast_and_call(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device_type)
            operands = [
                a.to(dtype) if a.device.type == device_type and a.dtype != torch.float64 else a
                for a in args[:num_operands]
            ]
            with torch.autocast(device_type, enabled=False):
                return overload(*operands, *args[num_operands:])

        _LIBRARY.impl(op, cast_and_call, "Autocast" + device_type.upper())

    add("cuda")
    add("cpu")
