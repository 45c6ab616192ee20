"""The encoders' operations against their references: outputs and every gradient by the one rule of accuracy."""

from __future__ import annotations

import pytest
import torch

from clipcore.kernels.attention import attention, attention_ref, pooled_attention
from clipcore.kernels.gelu import gelu, gelu_ref
from clipcore.kernels.layer_norm import layer_norm, layer_norm_ref

EXACT = torch.float64


def check(op, reference, inputs: list[torch.Tensor]) -> None:
    """In float64, where nothing hides a mistake: output and gradients to 1e-12."""
    results = []
    upstream = None
    for function in (op, reference):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        upstream = torch.randn_like(out) if upstream is None else upstream
        results.append((out, *torch.autograd.grad(out, leaves, upstream)))
    for got, expected in zip(*results, strict=True):
        assert (got - expected).abs().max() <= 1e-12 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("length", "heads", "size"), [(1, 1, 4), (17, 3, 8), (50, 2, 64), (77, 8, 64), (5, 2, 80)]
)
def test_attention(length, heads, size, is_causal):
    qkv = torch.randn(2, length, 3, heads, size, dtype=EXACT)
    check(lambda x: attention(x, is_causal), lambda x: attention_ref(x, is_causal), [qkv])


@pytest.mark.parametrize("length", [1, 9, 50])
def test_pooled_attention_is_one_row_of_attention(length):
    qkv = torch.randn(3, length, 3, 2, 8, dtype=EXACT)
    token = torch.tensor([0, length // 2, length - 1])
    rows = torch.arange(3)
    check(
        lambda x: pooled_attention(x[rows, token, 0], x[:, :, 1:], token),
        lambda x: attention_ref(x, is_causal=True)[rows, token],
        [qkv],
    )
    check(
        lambda x: pooled_attention(x[:, 0, 0], x[:, :, 1:]), lambda x: attention_ref(x)[:, 0], [qkv]
    )


@pytest.mark.parametrize("quick", [False, True])
def test_gelu(quick):
    check(
        lambda x: gelu(x, quick),
        lambda x: gelu_ref(x, quick),
        [4 * torch.randn(31, 7, dtype=EXACT)],
    )


@pytest.mark.parametrize("width", [1, 8, 96, 768])
def test_layer_norm(width):
    x, weight, bias = (
        torch.randn(5, 3, width, dtype=EXACT),
        torch.randn(width, dtype=EXACT),
        torch.randn(width, dtype=EXACT),
    )
    check(layer_norm, layer_norm_ref, [x, weight, bias])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_of_low_precision_has_float32_statistics(dtype):
    x = (100 + torch.randn(4, 256)).to(dtype)
    weight, bias = torch.ones(256), torch.zeros(256)
    got = layer_norm(x, weight, bias)
    exact = layer_norm_ref(x.double(), weight.double(), bias.double())
    assert got.dtype == dtype
    assert (
        torch.equal(got, exact.to(dtype))
        or (got.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention(torch.ones(2, 3, 4)), r"\[B, L, 3, H, K\]"),
        (lambda: layer_norm(torch.ones(2, 4), torch.ones(3), torch.ones(4)), r"must be \[4\]"),
    ],
)
def test_wrong_shapes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
