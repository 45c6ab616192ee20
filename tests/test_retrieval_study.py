"""Retrieval on a data set: several captions an image, images without one, and which direction has which name."""

from __future__ import annotations

import argparse

import pytest
import torch
from given_features import GivenFeatures, GivenSource

from clipcore.data import DataError
from clipcore.evaluate import arguments, retrieval_study
from clipcore.evaluate.arguments import add_retrieval_arguments
from clipcore.evaluate.retrieval_study import measure_retrieval, text_encoder
from clipcore.kernels.similarity_topk import MAX_K
from clipcore.terminal import Parser
from clipcore.towers.factory import create_model

pytestmark = pytest.mark.fast

AXES = torch.eye(6)


def encode(texts: list[str]) -> torch.Tensor:
    """Return the axis that a text names, or what lies between two."""
    return torch.stack([sum(AXES[int(word)] for word in text.split()) for text in texts])


def features_of(captions: list[list[str]], rows: list[int] | None = None) -> GivenFeatures:
    rows = list(range(len(captions))) if rows is None else rows
    source = GivenSource([None] * len(captions), captions=captions)
    return GivenFeatures(AXES[rows], source, rows_N=rows)


def test_names_are_those_of_what_is_retrieved():
    """Of four captions three find their image; each of three images but one finds a caption of its own."""
    metrics, details = measure_retrieval(features_of([["0", "0"], ["1"], ["0"]]), encode)
    assert metrics["image_retrieval_recall@1"] == 0.75
    # The third image is nearest to no text: of equal ones the first, which is the first image's.
    assert metrics["text_retrieval_recall@1"] == pytest.approx(2 / 3)
    assert metrics["mean_recall@1"] == pytest.approx((0.75 + 2 / 3) / 2)
    assert metrics["image_retrieval_recall@5"] is None  # of three images
    assert details["num_images"] == 3 and details["num_texts"] == 4
    assert metrics[details["main_metric"]] == metrics["mean_recall@1"]


def test_as_clip_benchmark_counts(monkeypatch):
    """Its definition, with the whole matrix: any of an image's captions among the k nearest."""
    monkeypatch.setattr(retrieval_study, "_CAPTIONS_AT_ONCE", 3)
    generator = torch.Generator().manual_seed(0)
    image_NE, text_ME = (torch.randn(n, 8, generator=generator) for n in (12, 30))
    owners = sorted([*range(12), *[11] * 10, *range(4, 12)])
    captions = [[str(m) for m in range(30) if owners[m] == n] for n in range(12)]
    sizes = []

    def encode_rows(texts: list[str]) -> torch.Tensor:
        sizes.append(len(texts))
        return text_ME[[int(text) for text in texts]]

    source = GivenSource([None] * 12, captions=captions)
    seen = []
    found, _ = measure_retrieval(
        GivenFeatures(image_NE, source), encode_rows, ranks=[5], progress=seen.append
    )
    scores = (text_ME / text_ME.norm(dim=1)[:, None]) @ (image_NE / image_NE.norm(dim=1)[:, None]).T
    is_own = torch.tensor(owners)[:, None] == torch.arange(12)
    for k in (1, 5):
        images = is_own.gather(1, scores.topk(k, dim=1).indices).any(1)
        texts = is_own.T.gather(1, scores.T.topk(k, dim=1).indices).any(1)
        assert found[f"image_retrieval_recall@{k}"] == images.double().mean().item()
        assert found[f"text_retrieval_recall@{k}"] == texts.double().mean().item()
    assert max(sizes) == 3 and sum(sizes) == sum(seen) == 30


def test_an_image_without_a_caption_is_left_out_and_counted():
    metrics, details = measure_retrieval(features_of([["0"], [], ["2"], ["3"]], [0, 1, 3]), encode)
    assert metrics["image_retrieval_recall@1"] == metrics["text_retrieval_recall@1"] == 1.0
    assert details["num_images"] == details["num_texts"] == 2
    assert details["notes"] == [
        "1 images without a readable caption, such as given/1: empty caption"
    ]


def test_what_cannot_be_retrieved_is_named():
    with pytest.raises(DataError, match="no image of given has a readable caption"):
        measure_retrieval(features_of([[], []]), encode)
    with pytest.raises(DataError, match="a file of features has no captions"):
        measure_retrieval(GivenFeatures(AXES), encode)
    source = GivenSource([None], captions=[["0"]])
    with pytest.raises(ValueError, match="not finite"):
        measure_retrieval(GivenFeatures(torch.full((1, 6), torch.nan), source), encode)
    with pytest.raises(ValueError, match="not finite"):
        measure_retrieval(features_of([["0"]]), lambda texts: torch.full((1, 6), torch.nan))


def test_texts_are_encoded_to_unit_features_without_a_gradient():
    model = create_model("ViT-nano-8-32").eval()
    length, end = model.context_length, model.vocab_size - 1

    def tokenize(texts: list[str]) -> torch.Tensor:
        tokens = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = torch.tensor([ord(letter) for letter in text])
            row[len(text)] = end
        return tokens

    found = text_encoder(model, tokenize, "cpu")(["a cat", "a"])
    with torch.no_grad():
        expected = model.encode_text(tokenize(["a cat", "a"]), normalize=True)
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_arguments():
    parser = Parser()
    add_retrieval_arguments(parser)
    assert parser.parse_args([]).recall_k == [1, 5, 10]
    assert parser.parse_args(["--recall-k", "2", "128"]).recall_k == [2, 128]
    assert arguments.MAX_RANK == MAX_K
    for wrong in ("0", "129", "-1", "x", "9" * 5000, "000000001999"):
        with pytest.raises(argparse.ArgumentTypeError, match="from 1 to 128"):
            arguments._rank(wrong)
