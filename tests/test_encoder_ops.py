"""The encoders' operations against their references: outputs and every gradient by the one rule of accuracy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from numerics import DEVICES, assert_accurate, exactly, with_gradients
from torch import Tensor

from clipcore.kernels.attention import attention, attention_ref, pooled_attention
from clipcore.kernels.gelu import gelu, gelu_ref
from clipcore.kernels.layer_norm import layer_norm, layer_norm_ref

# In float32 the order of torch's own sums decides (its LayerNorm on the CPU has up to four times the reference's
# error), so that float64 is where its mathematics is held to the reference.
DTYPES = [torch.bfloat16, torch.float16]


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
        for dtype in DTYPES:
            low = [x.to(device, dtype) for x in inputs]
            exact = exactly(reference, low, upstream.to(device, dtype))
            expected, got, again = (
                with_gradients(f, low, upstream.to(device, dtype)) for f in (reference, op, op)
            )
            for i, values in enumerate(zip(got, expected, exact, strict=True)):
                assert_accurate(f"{dtype} {'output' if i == 0 else f'gradient {i}'}", *values)
            assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("length", "heads", "size"),
    [
        (1, 1, 4),
        (17, 3, 8),
        (32, 2, 16),
        (33, 2, 16),
        (50, 12, 64),
        (77, 8, 64),
        (197, 2, 64),
        (257, 2, 80),
        (5, 2, 88),
    ],
)
def test_attention(length, heads, size, is_causal):
    qkv = torch.randn(2, length, 3, heads, size)
    check(lambda x: attention(x, is_causal), lambda x: attention_ref(x, is_causal), [qkv])


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


@pytest.mark.parametrize("kind", ["erf", "quick"])
@pytest.mark.parametrize("shape", [(1,), (31, 7), (4, 50, 64)])
def test_gelu(shape, kind):
    check(lambda x: gelu(x, kind), lambda x: gelu_ref(x, kind), [3 * torch.randn(shape)])


@pytest.mark.parametrize("kind", ["erf", "quick"])
def test_gelu_at_the_ends(kind):
    """Far out the functions are 0 and the identity, and their slopes 0 and 1."""
    x = torch.tensor([-100.0, 0.0, 100.0], requires_grad=True)
    y = gelu(x, kind)
    y.sum().backward()
    assert torch.allclose(y, torch.tensor([0.0, 0.0, 100.0]))
    assert torch.allclose(x.grad, torch.tensor([0.0, 0.5, 1.0]))


@pytest.mark.parametrize("width", [8, 96, 768, 1280])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_layer_norm(width, offset):
    x = offset + torch.randn(5, 3, width)
    check(layer_norm, layer_norm_ref, [x, torch.randn(width), torch.randn(width)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_of_low_precision_has_float32_statistics_and_gains(dtype):
    """Low-precision rows with float32 gain and bias, as under autocast: one rounding, that of the result."""
    x = (100 + torch.randn(4, 256)).to(dtype)
    weight, bias = 1 + torch.randn(256), torch.randn(256)
    got = layer_norm(x, weight, bias)
    exact = layer_norm_ref(x.double(), weight.double(), bias.double())
    assert_accurate("output", got, exact.to(dtype), exact)
    with torch.autocast("cpu", dtype):
        assert torch.equal(layer_norm(x, weight, bias), got)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention(torch.ones(2, 3, 4)), r"\[B, L, 3, H, K\], got \(2, 3, 4\)"),
        (lambda: pooled_attention(torch.ones(2, 3), torch.ones(2, 5, 2, 3, 4)), r"\[B, H, K\]"),
        (
            lambda: pooled_attention(torch.ones(2, 3, 4), torch.ones(2, 5, 2, 3, 8)),
            r"\(2, 5, 2, 3, 8\)",
        ),
        (
            lambda: pooled_attention(
                torch.ones(2, 3, 4), torch.ones(2, 5, 2, 3, 4), torch.ones(3, dtype=torch.long)
            ),
            r"last must be \[2\]",
        ),
        (lambda: gelu(torch.ones(2), "tanh"), "erf and quick, got 'tanh'"),
        (lambda: layer_norm(torch.ones(2, 4), torch.ones(3), torch.ones(4)), r"must be \[4\]"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
