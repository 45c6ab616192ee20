"""Zero-shot classification and retrieval on data with known answers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from clipcore.evaluate.retrieval import retrieval_recall
from clipcore.evaluate.zero_shot import build_zero_shot_classifier, classify, zero_shot_accuracy

WORDS = ["cat", "dog", "car", "tree", "house", "boat", "star"]


class KnownModel:
    """A model whose features are known: an image's are its first pixels, a text's the mean of its words' rows."""

    def __init__(self) -> None:
        self.words = torch.randn(
            100, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        self.logit_scale = torch.tensor(3.0, dtype=torch.float64)

    def encode_text(self, tokens_BL: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        features = self.words[tokens_BL].mean(1)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_image(self, images: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return F.normalize(images.flatten(1)[:, :16], dim=-1) if normalize else images


def tokenize(texts: list[str]) -> torch.Tensor:
    """Two ids a prompt: its class and its template."""
    rows = []
    for text in texts:
        words = text.split()
        name = next(word for word in words if word in WORDS)
        rows.append([WORDS.index(name), 50 + len(words)])
    return torch.tensor(rows)


TEMPLATES = ["{}", "a photo of a {c}", lambda name: f"one {name}"]


@pytest.mark.parametrize("batch", [1, 3, 10, None])
def test_the_classifier_averages_normalised_prompts_and_normalises_again(batch):
    model = KnownModel()
    classifier = build_zero_shot_classifier(model, tokenize, WORDS, TEMPLATES, batch)
    for column, word in enumerate(WORDS):
        prompts = tokenize([word, f"a photo of a {word}", f"one {word}"])
        mean = model.encode_text(prompts, normalize=True).mean(0)
        assert (classifier[:, column] - mean / mean.norm()).abs().max() < 1e-12
    assert classifier.shape == (16, len(WORDS))


def test_a_template_without_a_place_for_the_name_is_refused():
    with pytest.raises(ValueError, match=r"has no \{\}"):
        build_zero_shot_classifier(KnownModel(), tokenize, WORDS, ["a photo"])
    with pytest.raises(ValueError, match="at least one"):
        build_zero_shot_classifier(KnownModel(), tokenize, [], ["{}"])


def test_accuracy_counts_what_is_right():
    model = KnownModel()
    classifier = build_zero_shot_classifier(model, tokenize, WORDS, ["{}"])
    images = classifier.T[[0, 1, 2, 3, 4]]  # each is exactly a class
    labels = torch.tensor([0, 1, 2, 6, 6])  # and the last two labels are wrong
    batches = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    report = zero_shot_accuracy(model, classifier, batches)
    assert report["acc1"] == 3 / 5 and report["num_images"] == 5
    assert report["mean_per_class_recall"] == 3 / 4
    exact = (images @ classifier).topk(5).indices
    assert report["acc5"] == (exact == labels[:, None]).any(1).double().mean()
    with pytest.raises(ValueError, match="no images"):
        zero_shot_accuracy(model, classifier, [])


def test_classify_gives_the_softmax_over_all_classes():
    model = KnownModel()
    classifier = build_zero_shot_classifier(model, tokenize, WORDS, ["{}"])
    values, classes = classify(model, classifier.T[:3], classifier, num_best=2)
    exact = (model.logit_scale.exp() * classifier.T[:3] @ classifier).softmax(1)
    assert classes[:, 0].tolist() == [0, 1, 2]
    assert (
        torch.equal(values, exact.float().topk(2).values)
        or (values - exact.topk(2).values).abs().max() < 1e-6
    )


def test_retrieval_of_pairs_in_order():
    features = F.normalize(torch.randn(50, 8, dtype=torch.float64), dim=1)
    perfect = retrieval_recall(features, features)
    assert set(perfect.values()) == {1.0} and len(perfect) == 6
    shifted = retrieval_recall(features, features.roll(1, 0))
    assert shifted["image_to_text_R@1"] == 0.0


def test_retrieval_agrees_with_the_full_matrix():
    image = F.normalize(torch.randn(30, 8, dtype=torch.float64), dim=1)
    text = F.normalize(torch.randn(70, 8, dtype=torch.float64), dim=1)
    owner = torch.arange(70) % 30
    report = retrieval_recall(image, text, owner, ranks=(1, 5))
    cosine = image @ text.T
    for k in (1, 5):
        texts = cosine.topk(k, dim=1).indices
        images = cosine.T.topk(k, dim=1).indices
        found = (owner[texts] == torch.arange(30)[:, None]).any(1).double().mean()
        back = (images == owner[:, None]).any(1).double().mean()
        assert report[f"image_to_text_R@{k}"] == found and report[f"text_to_image_R@{k}"] == back


def test_a_gallery_smaller_than_k_leaves_that_recall_out():
    features = torch.eye(3)
    assert set(retrieval_recall(features, features)) == {"image_to_text_R@1", "text_to_image_R@1"}


def test_owners_that_do_not_fit():
    with pytest.raises(ValueError, match="do not describe"):
        retrieval_recall(torch.eye(2), torch.eye(2), torch.tensor([0, 5]))
