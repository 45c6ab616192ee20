"""Packed attention and attention of one query: the public functions, on every device."""

from __future__ import annotations

import pytest
import torch
from numerics import (
    DEVICES,
    KERNEL_DEVICE,
    check,
    with_gradients,
)
from torch import Tensor

from clipcore.kernels.attention import attention, attention_ref, pooled_attention

pytestmark = pytest.mark.fast

# (rows, tokens, heads, head size, kind); "packed" is causal with segments.
REAL = [
    (1, 50, 2, 64, "dense"),
    (1, 77, 2, 64, "causal"),
    (1, 128, 2, 64, "packed"),
    (1, 197, 2, 64, "dense"),
    (1, 257, 1, 80, "dense"),
]
ODD = [
    (2, 1, 1, 16, "dense"),
    (2, 5, 3, 8, "causal"),
    (1, 33, 2, 24, "packed"),
    (1, 129, 1, 72, "packed"),
    (1, 65, 1, 96, "causal"),
]
# The library's on a GPU.
LONG = [(1, 577, 2, 64, "dense")] if KERNEL_DEVICE == "cuda" else []


def problem(case: tuple, dtype: torch.dtype, device: str) -> tuple[Tensor, bool, Tensor | None]:
    """(projection, is_causal, segments); packed rows hold captions of 1 to 17 tokens and end in padding."""
    rows, length, heads, size, kind = case
    qkv = torch.randn(rows, length, 3, heads, size).to(device, dtype)
    segments = None
    if kind == "packed":
        captions = torch.repeat_interleave(torch.arange(99), torch.randint(1, 18, (99,)))
        segments = captions[:length].int().repeat(rows, 1).to(device)
        segments[:, length - length // 9 :] = -1
    return qkv, kind != "dense", segments


@pytest.mark.parametrize("case", [*REAL, *ODD, (2, 5, 2, 88, "dense"), *LONG], ids=str)
def test_attention(case: tuple) -> None:
    qkv, is_causal, segments = problem(case, torch.float32, "cpu")

    def on(device: torch.device) -> Tensor | None:
        return None if segments is None else segments.to(device)

    check(
        lambda x: attention(x, is_causal, on(x.device)),
        lambda x: attention_ref(x, is_causal, on(x.device)),
        [qkv],
    )


@pytest.mark.parametrize(
    ("length", "heads", "size"), [(1, 1, 4), (9, 2, 8), (64, 2, 64), (257, 2, 80)]
)
def test_pooled_attention_is_one_row_of_attention(length, heads, size):
    qkv = torch.randn(3, length, 3, heads, size)
    token = torch.tensor([0, length // 2, length - 1])
    rows = torch.arange(3)
    check(
        lambda x: pooled_attention(x[rows, token, 0], x[:, :, 1:], token.to(x.device)),
        lambda x: attention_ref(x, is_causal=True)[rows, token],
        [qkv],
    )
    check(
        lambda x: pooled_attention(x[:, 0, 0], x[:, :, 1:]), lambda x: attention_ref(x)[:, 0], [qkv]
    )


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for kind in ("dense", "packed"):
        qkv, is_causal, segments = problem((2, 30, 2, 16, kind), dtype, device)
        arguments = (qkv.requires_grad_(), is_causal, segments)
        torch.library.opcheck(torch.ops.clipcore.attention_forward, arguments)


def test_compiled_it_has_the_same_bits() -> None:
    qkv, _, segments = problem((2, 30, 2, 16, "packed"), torch.float32, "cpu")
    upstream = torch.randn(2, 30, 32)

    def twice(x: Tensor) -> Tensor:
        return attention(x * 2, True, segments)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        *(with_gradients(fn, [qkv], upstream) for fn in (twice, compiled)), strict=True
    ):
        assert torch.equal(a, b)


def test_wrong_arguments_are_refused() -> None:
    qkv = torch.zeros(2, 3, 3, 1, 8)
    with pytest.raises(ValueError, match=r"\[R, L, 3, H, K\], got \(2, 3, 4\)"):
        attention(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"int32 \[2, 3\], got torch.int64 \[2, 3\]"):
        attention(qkv, True, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"last must be \[2\]"):
        pooled_attention(torch.zeros(2, 1, 8), torch.zeros(2, 3, 2, 1, 8), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("length", "is_causal"), [(5, False), (40, False), (40, True)])
def test_any_strides_give_the_same(dtype: torch.dtype, length: int, is_causal: bool) -> None:
    """A projection whose heads lie side by side column by column, and one that is a view of another order of rows."""
    torch.manual_seed(0)
    for axes in ((3, 4), (0, 1)):
        shape = [2, length, 3, 4, 16]
        shape[axes[0]], shape[axes[1]] = shape[axes[1]], shape[axes[0]]
        strided = torch.randn(shape, dtype=dtype).transpose(*axes).requires_grad_()
        plain = strided.detach().contiguous().requires_grad_()
        outs = [attention(qkv, is_causal) for qkv in (strided, plain)]
        upstream = torch.randn_like(outs[1])
        for out in outs:
            out.backward(upstream)
        assert torch.equal(*outs)
        assert torch.equal(strided.grad, plain.grad)  # type: ignore[arg-type]
