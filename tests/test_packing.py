"""Packed captions: every token in its place, and the features and gradients of padded rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clipcore import create_model
from clipcore.data.packing import (
    PACKED_LENGTH,
    PackedText,
    fitted_length,
    is_worth_packing,
    pack_captions,
)
from clipcore.towers.architectures import find_model
from clipcore.towers.model import CLIP
from clipcore.towers.modules import Attention, Transformer

pytestmark = pytest.mark.fast


def padded(lengths: list[int], context_length: int = 77, vocab_size: int = 600) -> Tensor:
    """Rows that end as a tokenizer's do."""
    text = torch.zeros(len(lengths), context_length, dtype=torch.long)
    for row, length in zip(text, lengths, strict=True):
        row[:length] = torch.randint(1, vocab_size - 2, (length,))
        row[length - 1] = vocab_size - 1
    return text


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 77), min_size=1, max_size=90))
def test_every_token_is_in_its_place(lengths: list[int]) -> None:
    text = padded(lengths)
    packed = pack_captions(text)
    assert packed.lengths_B.tolist() == lengths
    found = packed.unpacked(packed.ids_RP[..., None].double())[..., 0]
    assert torch.equal(found.long(), text[:, : max(lengths)])
    assert (packed.ids_RP.flatten()[packed.ends_B] == 599).all()
    held = packed.segments_RP >= 0
    assert int(held.sum()) == sum(lengths) and (packed.ids_RP[~held] == 0).all()
    positions = packed.unpacked(packed.positions_RP[..., None].double())[..., 0]
    for row, length in zip(positions, lengths, strict=True):
        assert row[:length].tolist() == list(range(length))
    # No caption is cut: its tokens lie in one row.
    rows = packed.slots_BM // packed.ids_RP.shape[1]
    assert all(len(set(row[:n].tolist())) == 1 for row, n in zip(rows, lengths, strict=True))


def test_little_is_wasted_and_few_shapes_come_of_many_batches() -> None:
    shapes = set()
    for _ in range(20):
        lengths = (torch.randn(1024) * 0.5 + 2.6).exp().round().clamp(2, 77).int().tolist()
        packed = pack_captions(padded(lengths))
        shapes.add(packed.ids_RP.shape)
        assert sum(lengths) > 0.9 * packed.ids_RP.numel()
    assert len(shapes) <= 3


def test_captions_of_like_lengths_stay_in_rows() -> None:
    assert is_worth_packing(padded([5, 6, 20, 7]))
    assert not is_worth_packing(padded([5, 6, 7, 7]))


def test_unpacking_is_differentiable() -> None:
    packed = pack_captions(padded([3, 1, 7]), length=8)
    x = torch.randn(*packed.ids_RP.shape, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(packed.unpacked, x)


def model() -> CLIP:
    return create_model("ViT-nano-8-32", precision="fp64", force_context_length=77)


# A caption of one token, empty ones of two, full rows; ids equal to the special ones inside captions.
def hard_captions(vocab_size: int) -> Tensor:
    text = padded([1, 2, 2, 77, 77, 40, 13, 5, 16, 64], vocab_size=vocab_size)
    text[5, 7] = vocab_size - 2  # the start's
    text[6, 4:] = vocab_size - 1  # the end's, more than once
    text[8, 3] = 0  # the padding's
    return text


@pytest.mark.parametrize("layers", [1, 3])
def test_features_and_gradients_are_those_of_padded_rows(layers: int) -> None:
    ours = model()
    ours.transformer.resblocks = (
        ours.transformer.resblocks[:1] if layers == 1 else ours.transformer.resblocks
    )
    text = hard_captions(ours.vocab_size)
    upstream = torch.randn(len(text), ours.config.embed_dim, dtype=torch.float64)
    found = []
    for captions in (text, pack_captions(text)):
        ours.zero_grad()
        features = ours.encode_text(captions)
        features.backward(upstream)
        gradients = {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None}
        found.append((features.detach(), gradients))
    (plain, plain_gradients), (packed, packed_gradients) = found
    assert (plain - packed).abs().max() <= 1e-12
    assert plain_gradients.keys() == packed_gradients.keys()
    for name, gradient in plain_gradients.items():
        largest = max(1.0, gradient.abs().max().item())
        assert (gradient - packed_gradients[name]).abs().max() <= 1e-12 * largest, name


def test_columns_behind_the_longest_caption_are_cut_on_the_cpu_and_change_nothing() -> None:
    """Hooks see all columns; so the same model with a hook is what to compare with."""
    ours = model()
    text = hard_captions(ours.vocab_size)
    text = text[text.argmax(1) < 20]
    longest = int(text.argmax(1).max()) + 1
    assert longest < text.shape[1] == ours.context_length
    upstream = torch.randn(len(text), ours.config.embed_dim, dtype=torch.float64)

    def results() -> tuple[dict[str, Tensor], int]:
        ours.zero_grad()
        with FlopCounterMode(display=False) as counter:
            features = ours.encode_text(text)
            features.backward(upstream)
        found = {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None}
        return {"features": features.detach(), **found}, counter.get_total_flops()

    cut, cut_flops = results()
    seen: list[int] = []
    handle = ours.transformer.resblocks[0].register_forward_hook(
        lambda _, inputs, output: seen.append(output.shape[1])
    )
    whole, whole_flops = results()
    handle.remove()
    assert seen == [text.shape[1]]
    # A little is of the last block and the projection, which have one token a caption.
    assert cut_flops / whole_flops < 1.1 * longest / text.shape[1]
    assert cut.keys() == whole.keys()
    for name, exact in whole.items():
        limit = 1e-12 * max(1.0, exact.abs().max().item())
        assert (cut[name] - exact).abs().max() <= limit, name

    none = torch.zeros(0, 8, dtype=torch.int64)
    assert ours.encode_text(none).shape == (0, ours.config.embed_dim)


def test_columns_are_not_cut_for_what_may_see_them() -> None:
    """A tower that is not causal, a hook on the embedding, and attention of another kind."""
    text = padded([5, 6], vocab_size=model().vocab_size)
    assert text.shape[1] == 77
    seen: list[int] = []

    def look(_: object, __: object, output: Tensor) -> None:
        seen.append(output.shape[1])

    hooked = model()
    hooked.token_embedding.register_forward_hook(look)
    hooked.encode_text(text)

    class Looking(Attention):
        def forward(self, x_RLD: Tensor, *rest: Any) -> Tensor:
            look(None, None, x_RLD)
            return super().forward(x_RLD, *rest)

    replaced = model()
    block = replaced.transformer.blocks[0]
    block.attn = Looking(replaced.transformer.width, block.attn.heads).double()
    replaced.encode_text(text)
    assert seen == [77, 77]

    bidirectional = model()
    bidirectional.transformer.is_causal = False
    whole = bidirectional.encode_text(text)
    longer = text.clone()
    longer[:, 76] = 3
    assert not torch.equal(whole, bidirectional.encode_text(longer))


def test_a_row_does_not_see_its_neighbours() -> None:
    ours = model().eval()
    text = hard_captions(ours.vocab_size)
    with torch.no_grad():
        together = ours.encode_text(pack_captions(text))
        alone = torch.cat([ours.encode_text(pack_captions(row[None])) for row in text])
    assert (together - alone).abs().max() <= 1e-12


def test_a_model_takes_packed_captions_and_pins_and_moves_them() -> None:
    ours = model().eval()
    text = hard_captions(ours.vocab_size)
    packed = pack_captions(text).to("cpu")
    assert isinstance(packed, PackedText)
    with torch.no_grad():
        _, features, _ = ours(None, packed)
        assert (features - ours(None, text)[1]).abs().max() <= 1e-12


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[B, L\], got \[3\]"):
        pack_captions(torch.zeros(3, dtype=torch.long))
    width = find_model("ViT-nano-8-32").text.width
    sees_all = Transformer(width, 2, 2)
    packed = pack_captions(padded([3, 4]))
    with pytest.raises(ValueError, match="only a causal text tower can do without"):
        sees_all.pooled(torch.zeros(*packed.ids_RP.shape, width), packed=packed)
    ours = create_model("ViT-nano-8-32", force_context_length=8)
    with pytest.raises(ValueError, match="captions of 9 tokens"):
        ours.encode_text(pack_captions(padded([9], vocab_size=ours.vocab_size)))


def test_fitted_rows_have_no_more_padding_and_hold_every_caption() -> None:
    generator = torch.Generator().manual_seed(0)
    for number in (1, 2, 8, 9, 33, 300, 2000):
        for longest in (1, 3, 30, 77, 200):
            lengths = torch.randint(1, longest + 1, (number,), generator=generator)
            text = torch.ones(number, longest, dtype=torch.int64)
            text[torch.arange(number), lengths - 1] = 99
            length = fitted_length(text)
            assert int(lengths.max()) <= length <= max(PACKED_LENGTH, longest)
            fitted, plain = pack_captions(text, length), pack_captions(text)
            assert fitted.ids_RP.numel() <= plain.ids_RP.numel()
            assert int((fitted.segments_RP >= 0).sum()) == int(lengths.sum())
            assert (fitted.ids_RP.flatten()[fitted.ends_B] == 99).all()
    text = torch.ones(9, 20, dtype=torch.int64)
    text[:, 14] = 99  # 135 tokens: two rows of 128 would be half padding
    assert pack_captions(text, fitted_length(text)).ids_RP.shape == (2, 76)
