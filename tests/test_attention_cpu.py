"""The passes of packed attention on the CPU: the extension's, at every width of vectors, and torch's without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import assert_accurate
from torch import Tensor

from clipcore import native
from clipcore.kernels import attention_cpu, attention_torch
from clipcore.kernels.attention import attention, attention_ref

LANES = native.load().attention_lanes() if native.load() is not None else []  # type: ignore[union-attr]
needs_extension = pytest.mark.skipif(not LANES, reason="needs clipcore._C and vectors of 8 floats")

# (rows, tokens, heads, head size, is_causal, has segments)
CASES = [
    (2, 50, 2, 64, False, False),
    (1, 77, 3, 64, True, False),
    (2, 128, 2, 64, True, True),
    (1, 197, 2, 64, False, False),
    (1, 257, 1, 80, False, False),
    (1, 1, 1, 1, False, False),
    (3, 5, 2, 8, True, False),
    (1, 33, 2, 24, True, True),
    (2, 31, 1, 40, False, True),
    (1, 32, 1, 33, True, False),
    (1, 95, 1, 100, False, True),
    (1, 577, 1, 64, False, False),
]


def problem(case: tuple) -> tuple[Tensor, Tensor, bool, Tensor | None]:
    """(projection, upstream gradient, is_causal, segments), segments of 1 to 17 tokens, some in pieces, and padding."""
    rows, length, heads, size, is_causal, has_segments = case
    qkv, upstream = (
        torch.randn(rows, length, 3, heads, size),
        torch.randn(rows, length, heads * size),
    )
    segments = None
    if has_segments:
        starts = torch.rand(rows, length) < 0.15
        segments = starts.cumsum(1).to(torch.int32) % 9
        segments[:, length - length // 9 :] = -1
    return qkv, upstream, is_causal, segments


def exactly(
    qkv: Tensor, upstream: Tensor, is_causal: bool, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, gradient) of the reference in float64, and in float32."""
    found = []
    for dtype in (torch.float64, torch.float32):
        leaf = qkv.to(dtype, copy=True).requires_grad_()
        out = attention_ref(leaf, is_causal, segments)
        out.backward(upstream.to(dtype))
        found += [out.detach(), leaf.grad]
    return tuple(found)  # type: ignore[return-value]


@needs_extension
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_passes_are_accurate(case: tuple, lanes: int) -> None:
    torch.manual_seed(0)
    qkv, upstream, is_causal, segments = given = problem(case)
    exact_out, exact_grad, expected_out, expected_grad = exactly(*given)
    out, lse = attention_cpu.forward(qkv, is_causal, segments, lanes)
    grad = attention_cpu.backward(upstream, qkv, out, lse, is_causal, segments, lanes)
    assert_accurate("output", out, expected_out, exact_out)
    for i, part in enumerate("qkv"):
        assert_accurate(
            *(f"gradient of {part}", grad[:, :, i], expected_grad[:, :, i], exact_grad[:, :, i])
        )
    _, expected_lse = attention_torch.forward(qkv.double(), is_causal, segments)
    assert (lse - expected_lse).abs().max() < 1e-5 * expected_lse.abs().max().clamp(min=1)


@needs_extension
def test_the_bits_are_those_of_one_thread_and_of_each_row_alone() -> None:
    torch.manual_seed(0)
    qkv, upstream, is_causal, segments = problem((3, 70, 3, 24, True, True))
    assert segments is not None

    def passes(rows: slice) -> tuple[Tensor, Tensor]:
        given = qkv[rows], is_causal, segments[rows]
        out, lse = attention_cpu.forward(*given)
        return out, attention_cpu.backward(upstream[rows], given[0], out, lse, *given[1:])

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        out, grad = passes(slice(None))
    finally:
        torch.set_num_threads(1)
    try:
        for again, first in zip(passes(slice(None)), (out, grad), strict=True):
            assert torch.equal(again, first)
        for row in range(3):
            for alone, all_of_them in zip(passes(slice(row, row + 1)), (out, grad), strict=True):
                assert torch.equal(alone[0], all_of_them[row])
    finally:
        torch.set_num_threads(threads)


@needs_extension
@pytest.mark.parametrize("lanes", LANES)
def test_far_apart_scores_neither_overflow_nor_leave_the_rule(lanes: int) -> None:
    """Scores of thousands: the softmax is then of one key, and what is far below it is 0 to the bit."""
    torch.manual_seed(0)
    qkv = torch.randn(1, 40, 3, 1, 16)
    qkv[:, :, 0] *= 1000
    out, lse = attention_cpu.forward(qkv, False, None, lanes)
    assert_accurate("output", out, attention_ref(qkv), attention_ref(qkv.double()))
    grad = attention_cpu.backward(torch.ones_like(out), qkv, out, lse, False, None, lanes)
    assert grad.isfinite().all()


@needs_extension
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_passed_on(value: float) -> None:
    """A run has to see that it diverged: as in the reference, the queries that see such a key have no number."""
    qkv = torch.randn(1, 40, 3, 1, 16)
    qkv[0, 20, 1, 0, 3] = value
    out, lse = attention_cpu.forward(qkv, True, None)
    expected = attention_ref(qkv, True)
    assert torch.equal(out.isnan(), expected.isnan()) and expected.isnan().any()
    grad = attention_cpu.backward(torch.ones_like(out), qkv, out, lse, True, None)
    assert grad[0, 20:, 0].isnan().any()


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype) -> None:
    qkv, upstream, is_causal, segments = problem((2, 50, 2, 16, True, True))
    qkv, upstream = qkv.to(dtype), upstream.to(dtype)
    out, lse = attention_cpu.forward(qkv, is_causal, segments)
    wide, wide_lse = attention_cpu.forward(qkv.float(), is_causal, segments)
    assert out.dtype == dtype and torch.equal(out, wide.to(dtype)) and torch.equal(lse, wide_lse)
    grad = attention_cpu.backward(upstream, qkv, out, lse, is_causal, segments)
    expected = attention_cpu.backward(upstream.float(), qkv.float(), wide, lse, is_causal, segments)
    assert torch.equal(grad, expected.to(dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_the_extension_torchs_passes_serve(case: tuple, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    qkv, upstream, is_causal, segments = given = problem(case)
    exact_out, exact_grad, _, _ = exactly(*given)
    monkeypatch.setattr(attention_cpu, "widest", lambda: 0)
    refuse: Callable[..., Any] = lambda *_: pytest.fail("the extension was asked")  # noqa: E731
    monkeypatch.setattr(attention_cpu, "forward", refuse)
    leaf = qkv.requires_grad_()
    out = attention(leaf, is_causal, segments)
    out.backward(upstream)
    assert (out - exact_out).abs().max() < 1e-5
    assert (leaf.grad - exact_grad).abs().max() < 1e-5 * exact_grad.abs().max()


@needs_extension
def test_what_does_not_fit_is_refused() -> None:
    extension = native.load()
    assert extension is not None
    qkv, upstream, _, segments = problem((2, 8, 2, 8, True, True))
    assert segments is not None
    for wrong in (qkv.double(), qkv[:, :, :2], qkv.transpose(3, 4)):
        with pytest.raises(ValueError, match="takes float32"):
            extension.attention_forward(wrong, True, None, LANES[0])
    for wrong in (segments.long(), segments[:1], segments.T.contiguous().T):
        with pytest.raises(ValueError, match="contiguous int32"):
            extension.attention_forward(qkv, True, wrong, LANES[0])
    lse = torch.zeros(2, 2, 8)
    for wrong in (upstream[:1], upstream.double(), upstream.transpose(0, 1)):
        with pytest.raises(ValueError, match="must be contiguous float32"):
            extension.attention_backward(wrong, qkv, lse, True, None, LANES[0])
    with pytest.raises(RuntimeError, match="no vectors of 5 floats"):
        extension.attention_forward(qkv, True, None, 5)
