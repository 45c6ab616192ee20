"""The halves of a transformer block: their backward passes against autograd through the references, and what they keep."""

from __future__ import annotations

import pytest
import torch
from numerics import DEVICES, check
from torch import Tensor, nn

from clipcore.kernels.attention import attention_ref
from clipcore.kernels.attention_pool import attention_pool, attention_pool_ref
from clipcore.kernels.residual_attention import (
    AttentionWeights,
    Stream,
    residual_attention,
    residual_attention_ref,
)
from clipcore.kernels.residual_mlp import MLPWeights, residual_mlp, residual_mlp_ref
from clipcore.towers.modules import ResidualAttentionBlock

pytestmark = pytest.mark.fast

R, L, D, H, F = 2, 40, 64, 2, 256
ATTENTION = [(D,), (D,), (3 * D, D), (3 * D,), (D, D), (D,)]
MLP = [(D,), (D,), (F, D), (F,), (D, F), (D,)]


def weights(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Of the size that keeps a stream of order one."""
    return [
        torch.randn(shape) * shape[-1] ** -0.5
        if len(shape) > 1
        else 0.2 * torch.randn(shape) + (i == 0)
        for i, shape in enumerate(shapes)
    ]


def stream() -> list[Tensor]:
    return [torch.randn(R, L, D), torch.randn(R, L, D)]


@pytest.mark.parametrize("kind", ["dense", "causal", "packed"])
def test_attention_half(kind: str) -> None:
    segments = (torch.arange(L) // 9).int().repeat(R, 1) if kind == "packed" else None

    def options(x: Tensor) -> dict:
        return {
            "is_causal": kind != "dense",
            "segments_RL": None if segments is None else segments.to(x.device),
        }

    check(
        lambda x, delta, *w: residual_attention(
            Stream(x, delta), AttentionWeights(*w), H, **options(x)
        ).joined(),
        lambda x, delta, *w: residual_attention_ref(
            Stream(x, delta), AttentionWeights(*w), H, **options(x)
        ),
        [*stream(), *weights(ATTENTION)],
    )


@pytest.mark.parametrize("kind", ["erf", "quick"])
def test_mlp_half(kind: str) -> None:
    check(
        lambda x, delta, *w: residual_mlp(Stream(x, delta), MLPWeights(*w), kind).joined(),
        lambda x, delta, *w: residual_mlp_ref(Stream(x, delta), MLPWeights(*w), kind),
        [*stream(), *weights(MLP)],
    )


def test_first_half_of_a_stream_in_one_part() -> None:
    check(
        lambda x, *w: residual_attention(Stream(x), AttentionWeights(*w), H).joined(),
        lambda x, *w: residual_attention_ref(Stream(x), AttentionWeights(*w), H),
        [stream()[0], *weights(ATTENTION)],
    )


def block_and_reference(device: str, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor]]:
    block = ResidualAttentionBlock(D, H, 4.0, quick_gelu=False).to(device, dtype)
    return block, [x.to(device, dtype).requires_grad_() for x in stream()]


def results(block: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """[output, gradients of the inputs and of every parameter]."""
    out = Stream(*block(*inputs, True, None)).joined()
    leaves = [*inputs, *block.parameters()]
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(0))]


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_it_is_one_graph_with_equal_results(device: str) -> None:
    block, inputs = block_and_reference(device, torch.float32)
    expected = results(block, inputs)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, inputs), expected, strict=True):
        assert torch.equal(a, b)


def test_a_block_keeps_ten_numbers_a_token_and_unit_of_width() -> None:
    block, inputs = block_and_reference("cpu", torch.float32)
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        block(*inputs, False, None)
    statistics = 4 + H  # two of each LayerNorm, a log-sum-exp of each head
    assert sum(kept.values()) == 4 * R * L * (10 * D + statistics)


def test_replaced_modules_and_hooks_are_called() -> None:
    """What users put into a block (LoRA's layers, hooks) has its effect, and without it nothing changes."""
    block, inputs = block_and_reference("cpu", torch.float64)
    fused = results(block, inputs)
    seen: list[tuple[int, ...]] = []
    handle = block.mlp.c_fc.register_forward_hook(lambda *a: seen.append(tuple(a[2].shape)))
    one_by_one = results(block, inputs)
    assert seen == [(R, L, 4 * D)]
    for a, b in zip(fused, one_by_one, strict=True):
        assert (a - b).abs().max() <= 1e-12 * max(1.0, b.abs().max().item())
    handle.remove()

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block.mlp.c_proj = Doubled(4 * D, D).double()
    assert not torch.equal(results(block, inputs)[0], fused[0])
    frozen = ResidualAttentionBlock(D, H, 4.0, quick_gelu=True).requires_grad_(False)
    assert not frozen(torch.ones(1, 3, D))[1].requires_grad


@pytest.mark.parametrize(
    ("length", "heads", "size"), [(1, 1, 8), (5, 2, 8), (50, 8, 16), (77, 2, 64)]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_pool(length: int, heads: int, size: int, is_causal: bool) -> None:
    width = heads * size
    layers = [torch.randn(width, width) * width**-0.5, torch.randn(width)] * 2
    last_B = torch.tensor([0, length // 2, length - 1]) if is_causal else None

    def with_pairs(fn):
        return lambda q, x, *w: fn(
            *(q, x, w[:2], w[2:]), None if last_B is None else last_B.to(x.device)
        )

    check(
        with_pairs(attention_pool),
        with_pairs(attention_pool_ref),
        [torch.randn(3, heads, size), torch.randn(3, length, width), *layers],
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_pool_is_one_row_of_attention(is_causal: bool) -> None:
    B, length, heads, size = 3, 9, 2, 8
    width = heads * size
    weight, bias = torch.randn(3 * width, width).double(), torch.randn(3 * width).double()
    x_BLC = torch.randn(B, length, width).double()
    token_B = torch.tensor([0, 4, 8])
    rows = torch.arange(B)

    qkv = torch.nn.functional.linear(x_BLC, weight, bias).unflatten(-1, (3, heads, size))
    expected = attention_ref(qkv, is_causal)[rows, token_B]

    (_, *layers) = zip(weight.chunk(3), bias.chunk(3), strict=True)
    found = attention_pool(*(qkv[rows, token_B, 0], x_BLC, *layers), token_B if is_causal else None)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_attention_pool_refuses_what_does_not_fit() -> None:
    q_BHK, x_BLC, layer = torch.zeros(3, 2, 8), torch.zeros(3, 5, 16), (torch.zeros(16, 16),) * 2
    with pytest.raises(ValueError, match="heads times their size are the channels"):
        attention_pool(torch.zeros(3, 2, 9), x_BLC, layer, layer)
    with pytest.raises(ValueError, match=r"last must be \[3\], one for each query, got \(2,\)"):
        attention_pool(q_BHK, x_BLC, layer, layer, torch.zeros(2))
