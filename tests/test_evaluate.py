"""Zero-shot classification and retrieval on data with known answers."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from PIL import Image
from shards import picture, write_csv, write_images
from torch.nn import functional as F

from clipcore.data import DataError
from clipcore.data.sources import open_source
from clipcore.data.transforms import ImageTransform
from clipcore.evaluate.retrieval import retrieval_recall
from clipcore.evaluate.tasks import (
    Encoder,
    EvaluationPlan,
    RetrievalTask,
    class_folders,
    retrieval_tasks,
    run_retrieval,
    run_zero_shot,
    zero_shot_tasks,
)
from clipcore.evaluate.zero_shot import build_zero_shot_classifier, classify, zero_shot_accuracy
from clipcore.loss import ClipLoss
from clipcore.ranks.distributed import World
from clipcore.run.command_line import parse_command_line
from clipcore.run.config import TrainConfig
from clipcore.run.metrics import MetricsLogger
from clipcore.run.recipe import RunConfig, resolve
from clipcore.tokenizer import byte_tokenizer
from clipcore.towers.factory import create_model

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


# Tasks on data as people have it.

ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def nano_encoder(batch_size: int = 4, max_bad_fraction: float = 0.01) -> Encoder:
    torch.manual_seed(0)
    model = create_model("ViT-nano-8-32").eval()
    transform = ImageTransform(32, is_train=False)
    tokenizer = byte_tokenizer()
    tokenizer.context_length = model.context_length
    return Encoder(model, tokenizer, transform, ALONE, batch_size, max_bad_fraction)


def settings_of(val_data: object) -> RunConfig:
    given = TrainConfig(train_data=str(val_data), val_data=str(val_data), model="ViT-nano-8-32")
    return resolve(dataclasses.replace(given, tokenizer="bytes", device="cpu"))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_several_captions_of_a_picture_are_evaluated_as_such(tmp_path, batch_size):
    """Rows of one path are one picture of the gallery; each caption is a query, and any of them a hit."""
    images = [image for image, _ in write_images(tmp_path, 6)]
    captions = {image: [f"{word} of {i}" for word in "abc"] for i, image in enumerate(images)}
    rows = [(image, captions[image][k]) for k in range(3) for image in images]
    (tmp_path / "t.csv").write_text("filepath\ttitle\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    (task,) = retrieval_tasks(settings_of(tmp_path / "t.csv"))
    encoder = nano_encoder(batch_size)
    found = run_retrieval(task, encoder)
    assert (found["num_pairs"], found["num_texts"], found["num_unreadable"]) == (6, 18, 0)

    # By the definition, from all features at once.
    pictures = [encoder.transform(Image.open(tmp_path / image)) for image in images]
    texts = [caption for image in images for caption in captions[image]]
    image_NE = encoder.model.encode_image(torch.stack(pictures), normalize=True)
    text_ME = encoder.model.encode_text(encoder.tokenizer(texts), normalize=True)
    best_N = (image_NE @ text_ME.T).argmax(1) // 3
    best_M = (text_ME @ image_NE.T).argmax(1)
    assert found["image_to_text_R@1"] == (best_N == torch.arange(6)).double().mean()
    assert found["text_to_image_R@1"] == (best_M == torch.arange(18) // 3).double().mean()
    loss = ClipLoss()(image_NE, text_ME[::3], encoder.model.logit_scale.exp())
    assert found["val_loss"] == pytest.approx(loss.item(), rel=1e-5)

    # The same data as lists of captions gives the same.
    lines = [json.dumps({"image": image, "caption": captions[image]}) for image in images]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    (task,) = retrieval_tasks(settings_of(tmp_path / "t.jsonl"))
    assert run_retrieval(task, encoder) == pytest.approx(found, rel=1e-6)


def test_a_task_of_first_captions_searches_by_those(tmp_path):
    images = [image for image, _ in write_images(tmp_path, 5)]
    lines = [
        json.dumps({"image": a, "caption": [f"{i} a", "of all"]}) for i, a in enumerate(images)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source = open_source(str(tmp_path / "t.jsonl"))
    first = run_retrieval(RetrievalTask("pairs", source, all_captions=False), nano_encoder())
    (tmp_path / "s.jsonl").write_text("\n".join(lines).replace(', "of all"', ""))
    alone = run_retrieval(
        RetrievalTask("pairs", open_source(str(tmp_path / "s.jsonl"))), nano_encoder()
    )
    assert first == alone and first["num_texts"] == 5


def test_what_cannot_be_read_is_counted_and_owners_stay_with_their_pictures(tmp_path):
    images = [image for image, _ in write_images(tmp_path, 8)]
    lines = [
        json.dumps({"image": a, "caption": [f"{i} a", f"{i} b"]}) for i, a in enumerate(images)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source = open_source(str(tmp_path / "t.jsonl"))
    for broken in (0, 3):
        (tmp_path / images[broken]).write_bytes(b"\xff\xd8 broken")
    task = RetrievalTask("pairs", source)
    found = run_retrieval(task, nano_encoder())
    assert (found["num_pairs"], found["num_texts"], found["num_unreadable"]) == (6, 12, 2)

    good = [line for i, line in enumerate(lines) if i not in (0, 3)]
    (tmp_path / "good.jsonl").write_text("\n".join(good))
    whole = run_retrieval(
        RetrievalTask("pairs", open_source(str(tmp_path / "good.jsonl"))), nano_encoder()
    )
    assert whole == pytest.approx({**found, "num_unreadable": 0}, rel=1e-6)

    # Of fewer than 512 samples as many may be bad as of 512.
    assert run_retrieval(task, nano_encoder(max_bad_fraction=2 / 512)) == found
    with pytest.raises(DataError, match=r"2 of 8 samples of t.jsonl .*: images/0000.jpg: .*; "):
        run_retrieval(task, nano_encoder(max_bad_fraction=1.9 / 512))
    for image in images:
        (tmp_path / image).write_bytes(b"")
    with pytest.raises(DataError, match="holds no picture that can be read"):
        run_retrieval(task, nano_encoder(max_bad_fraction=1.0))


def test_class_folders_count_what_they_could_not_read(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 5)
    (tmp_path / "cat" / "images" / "0001.jpg").write_bytes(b"")
    task = class_folders(tmp_path)
    found = run_zero_shot(task, nano_encoder())
    assert (found["num_images"], found["num_unreadable"]) == (9, 1)
    with pytest.raises(DataError, match=r"1 of 10 samples .* the image file is empty"):
        run_zero_shot(task, nano_encoder(max_bad_fraction=0.0))


def test_several_folders_of_classes_are_evaluated_under_any_name(tmp_path):
    for folder in ("a/val", "b/val", "x=y", "v2"):
        for name in ("cat", "dog"):
            write_images(tmp_path / folder / name, 1)
    words = [f"{tmp_path}/a/val", f"sketch={tmp_path}/b/val/", f"{tmp_path}/x=y"]
    line = ["--train-data", "a.csv", "--imagenet-val", *words, "--imagenet-v2", f"{tmp_path}/v2"]
    tasks = zero_shot_tasks(resolve(parse_command_line(line)[0]))
    assert [task.name for task in tasks] == [
        "classes of val",
        "classes of sketch",
        "classes of x=y",
        "classes of v2",
    ]
    assert [task.source[0].key for task in tasks] == ["cat/images/0000.jpg"] * 4
    line = ["--train-data", "a.csv", "--imagenet-val", words[0], f"{tmp_path}/b/val"]
    with pytest.raises(DataError, match=r"a/val and .*/b/val are both called 'val'.* val-2=/"):
        zero_shot_tasks(resolve(parse_command_line(line)[0]))


def test_data_that_cannot_be_read_is_refused_before_the_training(tmp_path):
    table = write_csv(tmp_path, 20)
    for path in sorted((tmp_path / "images").iterdir()):
        path.write_bytes(b"broken")
    transform = ImageTransform(32, is_train=False)
    with pytest.raises(DataError, match=r"none of 20 samples of pairs.csv can be read, such as"):
        EvaluationPlan(settings_of(table), ALONE, byte_tokenizer(), transform)
    (tmp_path / "images" / "0018.jpg").write_bytes(picture(0)[0])
    EvaluationPlan(settings_of(table), ALONE, byte_tokenizer(), transform)


def test_rows_that_cannot_be_read_every_few_rows_are_not_all_of_them(tmp_path):
    """Every fifth row, in a table of which 64 are tried."""
    table = write_csv(tmp_path, 320)
    rows = table.read_text().splitlines()
    rows[1::5] = [row.partition("\t")[0] + "\t" for row in rows[1::5]]
    table.write_text("\n".join(rows) + "\n")
    config = dataclasses.replace(settings_of(table), max_bad_fraction=0.5)
    EvaluationPlan(config, ALONE, byte_tokenizer(), ImageTransform(32, is_train=False))


@pytest.mark.parametrize("arguments", [("cat", TEMPLATES), (["cat", "dog"], "a {}")])
def test_a_text_in_place_of_a_list_is_refused(arguments):
    with pytest.raises(ValueError, match="are a list of texts, got the text"):
        build_zero_shot_classifier(KnownModel(), tokenize, *arguments)


def test_classes_of_one_name_are_said(tmp_path):
    """OpenAI's names of ImageNet hold two pairs of them."""
    for name in ("cat", "dog", "cow"):
        write_images(tmp_path / "v" / name, 1)
    (tmp_path / "v" / "classes.json").write_text('{"cat": "missile", "cow": "missile"}')
    config = dataclasses.replace(settings_of(tmp_path / "v"), imagenet_val=str(tmp_path / "v"))
    plan = EvaluationPlan(config, ALONE, byte_tokenizer(), ImageTransform(32, is_train=False))
    lines = plan.describe_sources(plan.zero_shot[0].source)
    assert lines[-1] == (
        "classes of v: 2 classes are named 'missile', which no prompt can distinguish"
    )


def test_the_log_says_what_a_figure_leaves_out_and_what_sources_hold(tmp_path, capsys):
    folder = tmp_path / "d"
    table = write_csv(folder, 4)
    table.write_text(table.read_text() + "images/0000.jpg\tagain\n" + "images/0001.jpg\ta\tb\n")
    config = dataclasses.replace(settings_of(table), max_bad_fraction=0.5)
    tokenizer = byte_tokenizer()
    plan = EvaluationPlan(config, ALONE, tokenizer, ImageTransform(32, is_train=False))
    lines = plan.describe_sources(open_source(str(table)))
    row = "1 x row of more fields than the header's 2, such as line 7"
    assert lines[0] == f"not used of pairs.csv: {row}"
    assert lines[1] == "pairs.csv: 4 pictures in 6 rows, with all their captions"
    assert lines[2].startswith(f"not used of pairs.csv: {row}; 1 x caption of a picture (3 fields")

    (folder / "images" / "0003.jpg").write_bytes(b"")
    log = MetricsLogger(tmp_path, num_steps=1)
    plan.run(create_model("ViT-nano-8-32"), log, step=1, epoch=1, is_last=True)
    assert "(without 1 that could not be read)" in capsys.readouterr().out
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (row["num_pairs"], row["num_texts"], row["num_unreadable"]) == (3, 4, 1)


@pytest.mark.parametrize("classnames", [[], [["cat"], []]])
def test_a_class_without_any_name_is_refused_and_an_empty_name_is_not(classnames):
    with pytest.raises(ValueError, match="at least one class name"):
        build_zero_shot_classifier(KnownModel(), tokenize, classnames, ["a {}"])
    model, tokenizer = nano_encoder().model, nano_encoder().tokenizer
    assert build_zero_shot_classifier(model, tokenizer, ["cat", ""], ["a {}"]).shape == (32, 2)
