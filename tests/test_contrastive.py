"""The contrastive arithmetic against the N x N reference, and its bounded memory."""

from __future__ import annotations

import pytest
import torch
from numerics import LargestStorage
from torch.nn import functional as F

from clipcore.kernels import contrastive
from clipcore.kernels.contrastive import contrastive_ref
from clipcore.loss import ClipLoss


def pairs(num_pairs: int, width: int, kind: str = "random") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_pairs * 1000 + width)
    image = torch.randn(num_pairs, width, dtype=torch.float64, generator=generator)
    text = torch.randn(num_pairs, width, dtype=torch.float64, generator=generator)
    if kind == "identical":
        image, text = image[:1].expand_as(image), text[:1].expand_as(text)
    if kind == "matched":
        text = image + 1e-3 * text
    return F.normalize(image, dim=1).requires_grad_(), F.normalize(text, dim=1).requires_grad_()


def loss_and_gradients(loss_fn, image, text, scale, upstream=1.0):
    loss = loss_fn(image, text, scale)
    return loss.detach(), *torch.autograd.grad(loss * upstream, (image, text, scale))


@pytest.mark.parametrize("kind", ["random", "identical", "matched"])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize(("num_pairs", "width"), [(1, 8), (2, 3), (63, 16), (200, 32)])
def test_loss_and_every_gradient_agree_with_the_dense_loss(
    num_pairs, width, scale, kind, monkeypatch
):
    # A workspace of a few rows makes every case cross chunks.
    monkeypatch.setattr(contrastive, "WORKSPACE_BYTES", 7 * 2 * 8 * num_pairs)
    image, text = pairs(num_pairs, width, kind)
    logit_scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    got = loss_and_gradients(ClipLoss(), image, text, logit_scale, upstream=0.37)
    expected = loss_and_gradients(contrastive_ref, image, text, logit_scale, upstream=0.37)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * max(1.0, theirs.abs().max().item())


def test_finite_differences():
    image, text = pairs(5, 4)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ClipLoss(), (image, text, scale))


def test_same_bits_every_time():
    image, text = (x.detach().float().requires_grad_() for x in pairs(500, 64))
    scale = torch.tensor(30.0, requires_grad=True)
    first = loss_and_gradients(ClipLoss(), image, text, scale)
    for _ in range(3):
        again = loss_and_gradients(ClipLoss(), image, text, scale)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_low_precision_features_are_summed_in_float32():
    image, text = (x.detach().bfloat16().requires_grad_() for x in pairs(64, 32))
    scale = torch.tensor(100.0, requires_grad=True)
    loss, d_image, *_ = loss_and_gradients(ClipLoss(), image, text, scale)
    exact = contrastive_ref(image.float(), text.float(), scale)
    assert loss.dtype == torch.float32 and d_image.dtype == torch.bfloat16
    assert torch.allclose(loss, exact)


def test_nothing_of_n_by_n_is_held(monkeypatch):
    """The largest tensor that the loss makes is a chunk of the workspace or an embedding."""
    num_pairs, width = 4096, 32
    monkeypatch.setattr(contrastive, "WORKSPACE_BYTES", 2**20)
    image, text = (x.detach().float().requires_grad_() for x in pairs(num_pairs, width))
    with LargestStorage() as largest:
        ClipLoss()(image, text, torch.tensor(20.0)).backward()
    assert largest.bytes <= max(2**20, num_pairs * width * 4)


def test_open_clip_call_and_return():
    image, text = pairs(4, 8)
    loss = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True)
    value = loss(image, text, 10.0, output_dict=True)["contrastive_loss"]
    assert torch.equal(value, loss(image, text, logit_scale=10.0, logit_bias=torch.tensor(3.0)))


@pytest.mark.parametrize(("image", "text"), [((3, 4), (2, 4)), ((3, 4), (3, 5)), ((4,), (4,))])
def test_what_is_no_pairs_is_refused(image, text):
    with pytest.raises(ValueError, match="pairs of one shape"):
        ClipLoss()(torch.ones(image), torch.ones(text), 1.0)
