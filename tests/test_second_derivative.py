"""Second derivatives: an operation supports them, or says in one line that it does not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import clipcore
from clipcore.data.packing import _Unpacked
from clipcore.kernels.attention import attention
from clipcore.kernels.attention_pool import attention_pool
from clipcore.kernels.contrastive import contrastive_loss
from clipcore.kernels.embed_layer_norm import embed_layer_norm
from clipcore.kernels.gelu import gelu
from clipcore.kernels.layer_norm import layer_norm
from clipcore.kernels.patchify import patchify
from clipcore.kernels.residual_attention import AttentionWeights, Stream, residual_attention
from clipcore.kernels.residual_mlp import MLPWeights, residual_mlp
from clipcore.kernels.sigmoid import sigmoid_loss
from clipcore.kernels.similarity import normalized_similarity
from clipcore.towers.factory import create_model

pytestmark = pytest.mark.fast


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _attention_half(x: Tensor) -> Tensor:
    shapes = ((8,), (8,), (24, 8), (24,), (8, 8), (8,))
    return residual_attention(Stream(x), AttentionWeights(*map(torch.ones, shapes)), 2).joined()


def _mlp_half(x: Tensor) -> Tensor:
    shapes = ((8,), (8,), (32, 8), (32,), (8, 32), (8,))
    return residual_mlp(Stream(x), MLPWeights(*map(torch.ones, shapes))).joined()


# By name: the operation as a function of one tensor, and the shape of that.
ONCE: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "attention": (attention, (2, 5, 3, 2, 4)),
    "contrastive_loss": (lambda x: contrastive_loss(x, double(4, 8), 3.0), (4, 8)),
    "embed_layer_norm": (
        lambda x: embed_layer_norm(x, double(8), double(5, 8), double(8), double(8)),
        (2, 4, 8),
    ),
    "gelu": (gelu, (3, 8)),
    "layer_norm": (lambda x: layer_norm(x, double(8), double(8)), (3, 8)),
    "normalized_similarity": (lambda x: normalized_similarity(x, double(5, 8), 3.0), (4, 8)),
    "residual_attention": (_attention_half, (2, 5, 8)),
    "residual_mlp": (_mlp_half, (2, 5, 8)),
    "sigmoid_loss": (lambda x: sigmoid_loss(x, double(4, 8), 3.0, -10.0), (4, 8)),
}


@pytest.mark.parametrize("name", ONCE)
def test_it_is_refused_in_one_line_that_names_the_function(name: str) -> None:
    operation, shape = ONCE[name]
    x = double(*shape).requires_grad_()
    output = operation(x).square().sum()
    (expected,) = torch.autograd.grad(output, x, retain_graph=True)

    with pytest.raises(
        RuntimeError, match=f"^{name} can be differentiated once, not twice: [^\n]+$"
    ):
        torch.autograd.grad(output, x, create_graph=True)

    # The refusal costs nothing: the first derivative is still to be had.
    (again,) = torch.autograd.grad(output, x)
    assert torch.equal(again, expected)


def test_no_operator_with_a_backward_pass_is_forgotten() -> None:
    folder = Path(clipcore.__file__).parent / "kernels"
    registering = re.compile(r"register_autograd\(|\(torch\.autograd\.Function\)")
    found = {path.stem for path in folder.glob("*.py") if registering.search(path.read_text())}
    tested = {"contrastive", "sigmoid", "similarity"} | ONCE.keys()
    assert found <= tested | {"patchify"}


def test_a_tower_is_refused_where_torch_would_call_a_weight_unused() -> None:
    model = create_model("ViT-nano-8-32", precision="fp64")
    tokens = torch.zeros(2, model.context_length, dtype=torch.int64)
    tokens[:, 3] = model.vocab_size - 1
    features = model.encode_text(tokens).square().sum()
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.autograd.grad(features, model.token_embedding.weight, create_graph=True)


def _pooled(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    layer = double(8, 8), double(8)
    return attention_pool(double(2, 2, 4), x, layer, layer)


def _patched(x: Tensor) -> Tensor:
    return patchify(x, 4, (0.5,) * 3, (0.25,) * 3, dtype=torch.float64)


def _joined(x: Tensor) -> Tensor:
    bias = x[0, 0]
    # Whoever adds a bias leaves its gradient to whoever joins the stream.
    return Stream(x, 2 * x + bias.detach(), bias).joined()


def _unpacked(x: Tensor) -> Tensor:
    # One row of two captions, of two tokens and of one, and a place of padding.
    segments, positions = torch.tensor([[0, 0, 1, -1]]), torch.tensor([[0, 1, 0, 0]])
    return _Unpacked.apply(x, torch.tensor([[0, 1], [2, -1]]), segments, positions)


@pytest.mark.parametrize(
    ("operation", "shape"),
    [(_pooled, (2, 3, 8)), (_patched, (1, 3, 9, 8)), (_joined, (2, 3, 4)), (_unpacked, (1, 4, 3))],
)
def test_it_is_right_where_it_is_not_refused(
    operation: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    x = double(*shape).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: operation(x).pow(3), (x,))
