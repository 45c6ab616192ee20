"""The Triton kernels of packed attention: accuracy at every kind of shape, exact zeros, independence, bits, and code."""

from __future__ import annotations

import pytest
import torch
from aot import assert_compiled_well, compiled
from numerics import KERNEL_DEVICE, KERNEL_DTYPES, assert_accurate, exactly, with_gradients
from torch import Tensor

from clipcore.kernels import attention_triton
from clipcore.kernels.attention import attention_ref
from clipcore.kernels.attention_triton import backward, forward, supports

ON_GPU = KERNEL_DEVICE == "cuda"
# Length, head size, causal, segments.
CLIP_SHAPES = [
    (50, 64, False, False),
    (77, 64, True, False),
    (128, 64, True, True),
    (197, 64, False, False),
    (257, 80, False, False),
]
# One token, sides of tiles and their neighbours, head sizes in one part and in two; each row of the launch table.
OTHER_SHAPES = [
    (1, 64, False, False),
    (1, 8, True, True),
    (5, 24, False, False),
    (16, 64, True, False),
    (17, 16, False, True),
    (33, 24, True, True),
    (65, 64, False, False),
    (66, 88, True, False),
    (129, 128, True, True),
    (160, 72, False, True),
    (200, 64, True, False),
]
# For a GPU only: the interpreter takes seconds for each.
LONG_SHAPES = [
    (257, 64, False, False),
    (512, 64, True, True),
    (511, 128, False, False),
    (320, 104, True, False),
]


def problem(
    length: int, size: int, has_segments: bool, dtype: torch.dtype = torch.float32, scale: float = 1
) -> tuple[Tensor, Tensor, Tensor | None]:
    """qkv, an upstream gradient, and segments of unequal lengths, the last one padding."""
    # The rule compares the largest errors of kernel and reference, which takes many numbers: short rows are several.
    rows, heads = (5, 3) if ON_GPU else (max(1, 80 // length), 1 if length > 200 else 2)
    qkv = (scale * torch.randn(rows, length, 3, heads, size)).to(KERNEL_DEVICE, dtype)
    upstream = torch.randn(rows, length, heads * size).to(KERNEL_DEVICE, dtype)
    if not has_segments:
        return qkv, upstream, None
    starts = (torch.rand(rows, length) < 0.1).to(KERNEL_DEVICE)
    segments = starts.cumsum(1).to(torch.int32)
    segments[:, length - length // 10 :] = -1
    return qkv, upstream, segments


def passes(
    qkv: Tensor, upstream: Tensor, is_causal: bool, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the kernels' output and gradient."""
    out, lse = forward(qkv, is_causal, segments)
    return out, backward(upstream, qkv, out, lse, is_causal, segments)


def check(qkv: Tensor, upstream: Tensor, is_causal: bool, segments: Tensor | None) -> None:
    """Check the rule of accuracy for the output and for the gradients of queries, keys and values each."""
    found = passes(qkv, upstream, is_causal, segments)

    def reference(x: Tensor) -> Tensor:
        return attention_ref(x, is_causal, segments)

    same_dtype = with_gradients(reference, [qkv], upstream)
    exact = exactly(reference, [qkv], upstream)
    assert_accurate("output", found[0], same_dtype[0], exact[0])
    for i, name in enumerate(("query", "key", "value")):
        gradients = (gradient[:, :, i] for gradient in (found[1], same_dtype[1], exact[1]))
        assert_accurate(f"gradient of the {name}", *gradients)


# 2 and 4. In the interpreter, or on the GPU where there is one.


CASES = [
    (*shape, dtype)
    # The kernels serve 16-bit rows; the interpreter's float32 shows the mathematics.
    for dtype in (KERNEL_DTYPES[1:] if ON_GPU else KERNEL_DTYPES)
    for shape in [*CLIP_SHAPES, *OTHER_SHAPES, *(LONG_SHAPES if ON_GPU else [])]
    if ON_GPU or shape in CLIP_SHAPES or dtype == torch.float32
]


@pytest.mark.parametrize(("length", "size", "is_causal", "has_segments", "dtype"), CASES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_kernels_are_accurate(
    length: int, size: int, is_causal: bool, has_segments: bool, dtype: torch.dtype
) -> None:
    qkv, upstream, segments = problem(length, size, has_segments, dtype)
    check(qkv, upstream, is_causal, segments)


@pytest.mark.usefixtures("poisoned_memory")
def test_queries_and_keys_may_have_a_launch_each(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        name: rows for name, rows in attention_triton._LAUNCH_TABLE.items() if "both" not in name
    }
    for architecture in (80, 90, 100):
        for name in ("query", "key"):
            table[architecture, name] = {(512, 128): (64, 32, 16, 4, 2)}
    monkeypatch.setattr(attention_triton, "_LAUNCH_TABLE", table)
    qkv, upstream, segments = problem(150, 64, True)
    check(qkv, upstream, True, segments)


@pytest.mark.parametrize("scale", [0.0, 12.0])
def test_scores_of_any_size(scale: float) -> None:
    """All equal, and so far apart that each query has one key."""
    qkv, upstream, _ = problem(150, 16, False, torch.float16, scale)
    check(qkv, upstream, False, None)


@pytest.mark.parametrize("size", [64, 128])
def test_one_token_has_no_gradient_of_query_and_key(size: int) -> None:
    qkv, upstream, _ = problem(1, size, False, torch.float16)
    out, gradient = passes(qkv, upstream, False, None)
    assert torch.equal(out, qkv[:, :, 2].flatten(2))
    assert not gradient[:, :, :2].any()
    assert torch.equal(gradient[:, :, 2].flatten(2), upstream)


@pytest.mark.parametrize("length", [40, 150])
@pytest.mark.usefixtures("poisoned_memory")
def test_segments_know_nothing_of_each_other(length: int) -> None:
    """Not a bit changes with the other tokens of a row; padding has outputs and gradients of exactly 0."""
    qkv, upstream, segments = problem(length, 16, True)
    assert segments is not None
    chosen = segments == segments[:, length // 2 : length // 2 + 1]
    found = passes(qkv, upstream, True, segments)
    noise, other_upstream, _ = problem(length, 16, False)
    mine = chosen[:, :, None]
    qkv = torch.where(mine[..., None, None], qkv, noise)
    again = passes(qkv, torch.where(mine, upstream, other_upstream), True, segments)
    for first, second in zip(found, again, strict=True):
        assert torch.equal(first[chosen], second[chosen])
        assert not first[segments < 0].any() and not second[segments < 0].any()


def test_segments_are_what_rows_of_their_own_would_be() -> None:
    qkv, upstream, _ = problem(60, 16, False)
    segments = torch.full((len(qkv), 60), 7, dtype=torch.int32, device=qkv.device)
    segments[:, 20:] = 3
    found = passes(qkv, upstream, True, segments)
    for part in (slice(0, 20), slice(20, 60)):
        alone = passes(qkv[:, part], upstream[:, part], True, None)
        for packed, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(packed[:, part], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [50, 150])
@pytest.mark.usefixtures("poisoned_memory")
def test_same_bits_again_and_from_any_strides(length: int) -> None:
    qkv, upstream, _ = problem(length, 16, False)
    first = passes(qkv, upstream, False, None)
    strided = torch.stack([qkv, -qkv], -1)[..., 0], torch.stack([upstream, upstream], 0).mT.mT[1]
    for again in (passes(qkv, upstream, False, None), passes(*strided, False, None)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("length", [50, 150])
def test_nan_stays_where_it_belongs(length: int) -> None:
    qkv, upstream, _ = problem(length, 16, False)
    qkv[0, 3, 0, 0, 5] = torch.nan
    out, gradient = passes(qkv, upstream, False, None)
    out, gradient = out[0].unflatten(-1, (-1, 16)), gradient[0]
    assert out[3, 0].isnan().all() and gradient[3, 0, 0].isnan().all()
    out[3, 0] = 0
    assert out.isfinite().all()
    # Keys and values of that head had a part in it; other queries and other heads had none.
    assert gradient[:, 1:, 0].isnan().all()
    gradient[3, 0, 0] = 0
    assert gradient[:, 0].isfinite().all() and gradient[:, :, 1:].isfinite().all()


def test_no_rows() -> None:
    qkv = torch.empty(0, 50, 3, 2, 64, device=KERNEL_DEVICE)
    out, lse = forward(qkv, False, None)
    assert out.shape == (0, 50, 128) and lse.shape == (0, 2, 50)
    assert backward(out, qkv, out, lse, False, None).shape == qkv.shape


def test_what_is_supported() -> None:
    for length, size, is_causal, has_segments in [*CLIP_SHAPES, *OTHER_SHAPES, *LONG_SHAPES]:
        for dtype in (torch.float16, torch.bfloat16):
            assert supports(length, size, dtype, is_causal, has_segments)
        assert not supports(length, size, torch.float32, is_causal, has_segments)
    assert not supports(513, 64, torch.float16, False, False)
    assert not supports(50, 136, torch.float16, False, False)
    assert not supports(50, 60, torch.float16, False, False)


# 3. Ahead of time.


def aot_launches() -> None:
    """Every row of the launch table, at its widest, and what CLIP launches."""
    for length, heads, size, is_causal, has_segments in [
        (16, 8, 64, True, True),
        (32, 8, 64, True, True),
        (50, 12, 64, False, False),
        (50, 8, 128, True, False),
        (128, 8, 64, True, True),
        (197, 12, 64, False, False),
        (257, 16, 80, False, False),
        (257, 16, 128, False, False),
    ]:
        qkv = torch.empty(64, length, 3, heads, size, dtype=torch.bfloat16, device="meta")
        segments = torch.empty(64, length, dtype=torch.int32, device="meta")
        out, lse = forward(qkv, is_causal, segments if has_segments else None)
        backward(out, qkv, out, lse, is_causal, segments if has_segments else None)


def test_ahead_of_time_without_spills_in_the_memory_there_is() -> None:
    assert_compiled_well(compiled("test_attention_kernels"))


def test_ahead_of_time_there_are_matrix_instructions() -> None:
    """Where a tile is large enough for the chip's own."""
    for kernel in compiled("test_attention_kernels"):
        if kernel.constants["BLOCK"] >= 64 and kernel.architecture < 100:
            assert kernel.matrix_instructions > 0, str(kernel)
