"""GELU, its tanh form and QuickGELU: the definitions, both devices' passes against them, sums of columns, operators."""

from __future__ import annotations

import pytest
import torch
from aot import assert_compiled_well, compiled
from numerics import (
    DEVICES,
    KERNEL_DEVICE,
    KERNEL_DTYPES,
    assert_accurate,
    exactly,
    ulp,
    with_gradients,
)
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels import launch
from clipcore.kernels.gelu import (
    KINDS,
    gelu,
    gelu_backward,
    gelu_backward_triton,
    gelu_forward,
    gelu_forward_triton,
    gelu_ref,
)

ALL_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# One element, ragged rows and columns, several programs of several blocks.
SHAPES = [(1, 1), (31, 7), (70, 600), (5, 3072)]


def problem(N: int, F: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """x of all sizes, and dy."""
    x = 3 * torch.randn(N, F)
    return x.to(device, dtype), torch.randn(N, F).to(device, dtype)


def assert_passes_accurate(found: list[Tensor], x: Tensor, dy: Tensor, kind: str) -> None:
    """Check the rule for y, dx, the sum of dx's rows, and y again."""
    reference = with_gradients(lambda x: gelu_ref(x, kind), [x], dy)
    exact = exactly(lambda x: gelu_ref(x, kind), [x], dy)
    for values in (reference, exact):
        values += [values[1].sum(0), values[0]]
    for name, got, same_dtype, value in zip(
        ("y", "dx", "dx_sum", "y again"), found, reference, exact, strict=True
    ):
        assert_accurate(name, got, same_dtype.to(got.dtype), value)


def assert_same_function(alone: Tensor, found: Tensor) -> None:
    """Two forms of one kernel: the same bits, but for what a GPU's compiler contracts in one and not in the other."""
    assert torch.equal(alone, found) or alone.is_cuda
    largest = found.abs().max().item()
    assert (alone - found).abs().max() <= 2 * ulp(largest, found.dtype)


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_torchs_own(kind: str) -> None:
    x = torch.linspace(-9, 9, 999, dtype=torch.float64)
    expected = {
        "erf": lambda: F.gelu(x),
        "tanh": lambda: F.gelu(x, approximate="tanh"),
        "quick": lambda: F.silu(1.702 * x) / 1.702,
    }[kind]()
    torch.testing.assert_close(gelu_ref(x, kind), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences(kind: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gelu(x, kind), [x])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(("N", "F"), SHAPES)
def test_kernels_are_accurate(
    N: int,
    F: int,
    dtype: torch.dtype,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    poisoned_memory: None,
) -> None:
    """Both passes with all that they return, twice with the same bits."""
    monkeypatch.setattr(launch, "NUM_PROCESSORS", dict.fromkeys(launch.NUM_PROCESSORS, 1))
    x, dy = problem(N, F, dtype, KERNEL_DEVICE)

    def passes() -> list[Tensor]:
        return [gelu_forward_triton(x, kind), *gelu_backward_triton(dy, x, kind, True, True)]

    found = passes()
    assert all(torch.equal(a, b) for a, b in zip(found, passes(), strict=True))
    assert_passes_accurate(found, x, dy, kind)
    alone, no_sum, no_output = gelu_backward_triton(dy, x, kind, False, False)
    assert_same_function(alone, found[1])
    assert no_sum.numel() == no_output.numel() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_kernel_is_accurate_at_every_size_of_x(kind: str) -> None:
    """Value and slope over what float32 tells apart from 0 and from x."""
    x = torch.linspace(-14, 14, 2**14, device=KERNEL_DEVICE)[None]
    one = torch.ones_like(x)
    found = gelu_forward_triton(x, kind), gelu_backward_triton(one, x, kind, False, False)[0]
    reference = with_gradients(lambda x: gelu_ref(x, kind), [x], one)
    exact = exactly(lambda x: gelu_ref(x, kind), [x], one)
    # Near 0 the relative error counts, and near 1 the absolute one.
    for low, high in ((-14, -1), (-1, 1), (1, 14)):
        part = (x >= low) & (x <= high)
        assert_accurate("y", found[0][part], reference[0][part], exact[0][part])
        assert_accurate("slope", found[1][part], reference[1][part], exact[1][part])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", DEVICES)
def test_at_the_ends(kind: str, device: str) -> None:
    """Far out the functions are 0 and the identity, and their slopes 0 and 1; NaN stays."""
    x = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, torch.nan]], device=KERNEL_DEVICE)
    passes = [(gelu_forward_triton, gelu_backward_triton), (gelu_forward, gelu_backward)]
    for forward, backward in passes:
        y = forward(x, kind)
        dx, _, _ = backward(torch.ones_like(x), x, kind, False, False)
        assert y[0, -1].isnan() and dx[0, -1].isnan()
        assert torch.allclose(y[:, :-1].cpu(), torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]]))
        assert torch.allclose(dx[:, :-1].cpu(), torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]]))


def aot_launches() -> None:
    """Both passes of every kind; float32 and a ragged width once."""
    for kind in KINDS:
        x = torch.empty(5000, 3072, dtype=torch.bfloat16, device="meta")
        gelu_forward_triton(x, kind)
        gelu_backward_triton(x, x, kind, True, True)
    x = torch.empty(5000, 3001, device="meta")
    gelu_backward_triton(x, x, "erf", True, True)


def test_ahead_of_time_without_spills_in_the_memory_there_is() -> None:
    assert_compiled_well(compiled("test_gelu"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(("N", "F"), [(1, 1), (31, 7), (300, 200)])
def test_passes_are_accurate(
    N: int, F: int, dtype: torch.dtype, device: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "STRIP_ELEMENTS", 100 * F)
    x, dy = problem(N, F, dtype, device)
    found = [gelu_forward(x, kind), *gelu_backward(dy, x, kind, True, True)]
    alone, no_sum, no_output = gelu_backward(dy, x, kind, False, False)
    assert_same_function(alone, found[1])
    assert no_sum.numel() == no_output.numel() == 0
    if dtype == torch.float64:
        exact = exactly(lambda x: gelu_ref(x, kind), [x], dy)
        exact += [exact[1].sum(0), exact[0]]
        for got, value in zip(found, exact, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12)
    else:
        assert_passes_accurate(found, x, dy, kind)


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", DEVICES)
def test_public_function_takes_any_shape_and_strides(kind: str, device: str) -> None:
    for shape in ((), (5,), (0,), (3, 0), (0, 3), (2, 3, 4)):
        x = torch.randn(shape, device=device)
        upstream = torch.randn(shape, device=device)
        found, expected = (
            with_gradients(lambda x, f=f: f(x, kind), [x], upstream) for f in (gelu, gelu_ref)
        )
        for got, value in zip(found, expected, strict=True):
            torch.testing.assert_close(got, value)
    x = torch.randn(4, 6, 8, device=device).to(torch.bfloat16)
    with torch.autocast(device, torch.float16):
        assert torch.equal(gelu(x.mT, kind), gelu(x, kind).mT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str, kind: str) -> None:
    x, dy = problem(5, 16, torch.float32, device)
    strided = x.T.contiguous().T
    for leaf in (x.clone().requires_grad_(), strided):
        torch.library.opcheck(torch.ops.clipcore.gelu_forward, (leaf, kind))
    for wants in ((True, True), (False, False)):
        torch.library.opcheck(torch.ops.clipcore.gelu_backward, (dy, strided, kind, *wants))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph_with_equal_results(device: str) -> None:
    x, dy = problem(5, 16, torch.float32, device)
    whole = torch.compile(lambda x: gelu(x).sin(), fullgraph=True, backend="aot_eager")
    found, expected = (with_gradients(f, [x], dy) for f in (whole, lambda x: gelu(x).sin()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.fast
def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="erf, tanh, quick, got 'relu'"):
        gelu(torch.ones(2), "relu")
