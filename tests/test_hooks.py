"""What users put into a tower: hooks, other modules, changes in place, derivatives of derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipcore.data.packing import pack_captions
from clipcore.kernels.residual_attention import AttentionWeights, Stream, residual_attention
from clipcore.towers.factory import create_model


def tower() -> nn.Module:
    torch.manual_seed(2)
    return create_model("ViT-nano-8-32", precision="fp64").visual.train()


PLACES = [
    *("transformer", "conv1", "ln_pre", "transformer.resblocks.0", "transformer.resblocks.0.attn"),
    *(
        "transformer.resblocks.0.mlp.c_proj",
        "transformer.resblocks.1",
        "transformer.resblocks.1.attn",
        "transformer.resblocks.1.attn.out_proj",
        "transformer.resblocks.1.ln_1",
        "transformer.resblocks.1.ln_2",
        "transformer.resblocks.1.mlp",
        "transformer.resblocks.1.mlp.c_fc",
        "transformer.resblocks.1.mlp.gelu",
        "transformer.resblocks.1.mlp.c_proj",
    ),
]


@pytest.mark.parametrize(
    ("place", "packed"), [(p, t) for p in PLACES for t in (False, True) if not t or "trans" in p]
)
def test_hooks_see_what_open_clips_would_and_change_nothing(place: str, packed: bool) -> None:
    """One tensor, with all tokens, of every module that is watched, the last block and its attention included."""
    torch.manual_seed(2)
    model = create_model("ViT-nano-8-32", precision="fp64").train()
    whole: nn.Module = model if packed else model.visual
    tokens = torch.zeros(3, 12, dtype=torch.int64)
    tokens[torch.arange(3), torch.tensor([3, 11, 6])] = model.vocab_size - 1
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)

    def features() -> Tensor:
        return model.encode_text(pack_captions(tokens)) if packed else model.encode_image(images)

    def gradients() -> list[Tensor]:
        parameters = [p for n, p in whole.named_parameters() if not packed or "visual" not in n]
        found = torch.autograd.grad(features().square().sum(), parameters, allow_unused=True)
        return [g for g in found if g is not None]

    expected, expected_gradients = features(), gradients()
    part = whole.get_submodule(place)
    seen: list[Any] = []
    part.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    part.register_forward_hook(lambda module, inputs, output: seen.append(output))
    part.register_full_backward_hook(lambda module, before, after: seen.append(after[0]))
    assert (features() - expected).abs().max() <= 1e-12
    assert len(seen) == 2 and all(isinstance(x, Tensor) for x in seen)
    for ours, theirs in zip(gradients(), expected_gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * max(1, theirs.abs().max())
    assert len(seen) == 5 and seen[4].shape == seen[1].shape
    part.register_forward_hook(lambda module, inputs, output: 0 * output)
    assert (features() - expected).abs().max() > 1e-6


def test_what_replaces_a_part_is_what_runs() -> None:
    model, images = tower(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        block, last = model.transformer.resblocks
        c_fc = block.mlp.c_fc
        c_fc.bias.zero_()
        expected = model(images)
        block.mlp.c_fc = nn.Linear(c_fc.in_features, c_fc.out_features, bias=False).double()
        block.mlp.c_fc.weight.copy_(c_fc.weight)
        assert (model(images) - expected).abs().max() <= 1e-12

        class Doubled(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, *inputs: Any) -> Tensor:
                return 2 * self.inner(*inputs)

        for holder, name in ((block, "attn"), (last, "attn"), (model, "conv1"), (model, "ln_pre")):
            original = getattr(holder, name)
            setattr(holder, name, Doubled(original))
            assert (model(images) - expected).abs().max() > 1e-6
            setattr(holder, name, original)
        last.mlp.c_proj.forward = lambda x: x[..., : last.mlp.c_proj.out_features]
        assert (model(images) - expected).abs().max() > 1e-6


def test_a_change_in_place_is_right_or_refused() -> None:
    """What a block returns shares memory with what it keeps; autograd has to see when that is overwritten."""
    torch.manual_seed(0)
    block = create_model("ViT-nano-8-32", precision="fp64").visual.transformer.resblocks[0]
    x = torch.randn(2, 5, block.ln_1.normalized_shape[0], dtype=torch.float64, requires_grad=True)
    output, delta = block(x)
    output += delta
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.square().sum().backward()
    weights = [
        block.ln_1.weight,
        block.ln_1.bias,
        block.attn.in_proj_weight,
        block.attn.in_proj_bias,
    ]
    weights += [block.attn.out_proj.weight, block.attn.out_proj.bias]
    stream = residual_attention(Stream(x), AttentionWeights(*weights), block.attn.heads)
    assert stream.x is x


def test_a_second_derivative_is_refused() -> None:
    block = create_model("ViT-nano-8-32", precision="fp64").visual.transformer.resblocks[0]
    x = torch.randn(2, 5, block.ln_1.normalized_shape[0], dtype=torch.float64, requires_grad=True)
    output = Stream(*block(x)).joined()
    with pytest.raises(RuntimeError, match="residual_mlp can be differentiated once, not twice"):
        torch.autograd.grad(output.sum(), x, create_graph=True)


class Wrapper(nn.Module):
    """As people put around a block: LoRA, a timer, a cache."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *rest: Any) -> Any:
        return self.inner(x, *rest)


@pytest.mark.parametrize(
    "place",
    [
        "transformer",
        "transformer.resblocks.0",
        "transformer.resblocks.1",
        "transformer.resblocks.1.mlp",
    ],
)
@pytest.mark.parametrize("tower", ["image", "text", "packed"])
def test_modules_in_a_wrapper_compute_the_same(place: str, tower: str) -> None:
    torch.manual_seed(2)
    model = create_model("ViT-nano-8-32", precision="fp64").eval()
    tokens = torch.zeros(3, 12, dtype=torch.int64)
    tokens[torch.arange(3), torch.tensor([3, 11, 6])] = model.vocab_size - 1
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    whole: nn.Module = model.visual if tower == "image" else model

    def features() -> Tensor:
        if tower == "image":
            return model.encode_image(images)
        return model.encode_text(pack_captions(tokens) if tower == "packed" else tokens)

    with torch.no_grad():
        expected = features()
        parent, _, name = place.rpartition(".")
        holder = whole.get_submodule(parent)
        setattr(holder, name, Wrapper(holder.get_submodule(name)))
        assert (features() - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("change", ["hook", "replace"])
@pytest.mark.parametrize("stage", ["layer1", "layer4"])
def test_every_stage_of_a_resnet_is_called(stage: str, change: str, checkpointing: bool) -> None:
    """Where Grad-CAM looks: the last one, forwards and backwards."""
    torch.manual_seed(3)
    model = create_model("RN-nano-32", precision="fp64").eval()
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model.encode_image(images)
    if change == "replace":
        setattr(model.visual, stage, Wrapper(getattr(model.visual, stage)))
    part = getattr(model.visual, stage)
    calls: list[str] = []
    part.register_forward_hook(lambda *_: calls.append("forward"))
    part.register_full_backward_hook(lambda *_: calls.append("backward"))
    features = model.encode_image(images)
    assert torch.equal(features, expected)
    features.sum().backward()
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "c_proj"])
@pytest.mark.parametrize("change", ["hook", "replace"])
def test_every_projection_of_the_attention_pool_is_called(part: str, change: str) -> None:
    torch.manual_seed(3)
    model = create_model("RN-nano-32", precision="fp64").eval()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    pool = model.visual.attnpool
    with torch.no_grad():
        expected = model.encode_image(images)
        calls: list[Any] = []
        if change == "replace":
            setattr(pool, part, Wrapper(getattr(pool, part)))
            getattr(pool, part).inner.register_forward_hook(lambda *seen: calls.append(seen))
        else:
            getattr(pool, part).register_forward_hook(lambda *seen: calls.append(seen))
        assert (model.encode_image(images) - expected).abs().max() <= 1e-12
    assert len(calls) == 1
