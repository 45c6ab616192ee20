"""Equal captions in a global batch: their ids, and the loss that knows them, in every way that a step goes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import RankPool
from runs import NANO, RunServer
from shards import write_csv
from torch import Tensor
from torch.nn import functional as F

from clipcore.data.caption_ids import caption_ids
from clipcore.data.loader import Batch, share_of_rank, trim_tokens
from clipcore.kernels.contrastive import contrastive_ref
from clipcore.kernels.sigmoid import sigmoid_ref
from clipcore.loss import ClipLoss, SigLipLoss
from clipcore.ranks.distributed import World
from clipcore.run import train_step as step_module
from clipcore.run import verify
from clipcore.run.config import TrainConfig
from clipcore.run.grad_cache import differentiate
from clipcore.run.metrics import read_metrics
from clipcore.run.parts import build_loss
from clipcore.run.sharding import replicate
from clipcore.run.train_step import TrainingStep
from clipcore.tokenizer import byte_tokenizer
from clipcore.towers.factory import create_model
from clipcore.towers.model import CLIP

ONE_RANK = World(0, 1, 0, torch.device("cpu"))
CONTEXT_LENGTH = 32
LONG = "a caption that is longer than what the model can read of it: "
# On two ranks the first six and the last five. One caption stands on both, twice on the first; so does one that equals
# another after it is cut, and one is alone on the second rank with its like.
CAPTIONS = (
    "a dog",
    LONG + "here it says this",
    "a cat",
    "a dog",
    "",
    "the dog",
    "a dog",
    LONG + "and here it says that",
    "a bird",
    "dog a",
    "a bird",
)
IDS = (0, 1, 2, 0, 4, 5, 0, 1, 8, 9, 8)  # where each caption, as the model reads it, stands first


def tokenized(captions: tuple[str, ...] = CAPTIONS) -> Tensor:
    tokenizer = byte_tokenizer()
    tokenizer.context_length = CONTEXT_LENGTH
    return tokenizer(list(captions))


def batch_of(tokens: Tensor) -> Batch:
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (len(tokens), 3, 32, 32), np.uint8))
    images[6] = images[0]  # one pair twice, on two ranks
    return Batch(images, tokens, torch.arange(len(tokens)))


def model_of(config: TrainConfig) -> CLIP:
    torch.manual_seed(3)
    first = {"init_logit_scale": 2.3, "init_logit_bias": -2.0} if config.siglip else {}
    model = create_model(
        "ViT-nano-8-32", precision="fp64", force_context_length=CONTEXT_LENGTH, **first
    )
    # As they begin, all texts have nearly one feature, and it hardly matters then which of them are left out.
    for block in model.transformer.resblocks:
        for parameter in block.parameters():
            parameter.data *= 4
    return model.train()


def training(config: TrainConfig, world: World = ONE_RANK, **settings: Any) -> TrainingStep:
    model = model_of(config)
    return TrainingStep(
        *(model, build_loss(config, world, config.global_batch_size or 1), world, "fp32", 5),
        *(len(CAPTIONS), lambda loss: loss),
        with_ids=config.duplicate_captions != "negative",
        **settings,
    )


def gradients(step: TrainingStep, batch: Batch) -> dict[str, Tensor]:
    """Return the loss, and the gradients of all parameters."""
    loss = step.gradients(batch, 7).loss
    return {"loss": loss} | {name: p.grad for name, p in step.model.named_parameters()}


def plain(config: TrainConfig) -> dict[str, Tensor]:
    """Return the same by the whole matrix, with ids from a dictionary of the captions."""
    step, tokens = training(config), tokenized()
    image, text, *scalars = step.embedder(batch_of(tokens), 7, step.model)(slice(0, 11), None)
    places: dict[tuple[int, ...], int] = {}
    ids = torch.tensor([places.setdefault(tuple(row.tolist()), len(places)) for row in tokens])
    settings: dict[str, Any] = {}
    if config.duplicate_captions != "negative":
        settings = {"image_ids": ids, "text_ids": ids, "same_id": config.duplicate_captions}
    if config.siglip:
        loss = sigmoid_ref(image, text, *scalars, **settings)
    else:
        settings["label_smoothing"] = config.label_smoothing
        loss = contrastive_ref(image, text, *scalars, **settings)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in step.model.named_parameters()}


def assert_equal_to_1e12(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, exact in theirs.items():
        limit = 1e-12 * max(1.0, exact.abs().max().item())
        assert (ours[name] - exact).abs().max().item() <= limit, name


# Ids.


@pytest.mark.fast
def test_ids_are_equal_where_the_model_reads_the_same():
    ids = caption_ids(tokenized())
    assert ids.dtype == torch.int64 and ids.shape == (len(CAPTIONS),)
    assert [ids.tolist().index(value) for value in ids.tolist()] == list(IDS)


@pytest.mark.fast
def test_captions_that_are_cut_to_the_same_tokens_are_one():
    """And two with all of their text."""
    pair = (CAPTIONS[1], CAPTIONS[7])
    assert pair[0] != pair[1] and len(set(caption_ids(tokenized(pair)).tolist())) == 1
    assert len(set(caption_ids(byte_tokenizer()(list(pair))).tolist())) == 2


@pytest.mark.fast
def test_padding_changes_no_id():
    """Rows of any length, and whatever follows the end-of-text token."""
    tokens = tokenized(("a", "a dog", "a"))
    ids = caption_ids(tokens)
    trimmed = trim_tokens(tokens)
    assert trimmed.shape[1] < tokens.shape[1] and torch.equal(caption_ids(trimmed), ids)
    ends = tokens.argmax(1, keepdim=True)
    dirty = torch.where(torch.arange(CONTEXT_LENGTH) > ends, 77, tokens)
    assert torch.equal(caption_ids(dirty), ids)
    assert torch.equal(caption_ids(tokens[1:]), ids[1:])

    # A tower that reads the padding too, such as SigLIP's, tells such rows apart.
    whole = caption_ids(dirty, ignores_padding=False)
    assert torch.equal(caption_ids(dirty.clone(), ignores_padding=False), whole)
    assert not torch.equal(caption_ids(tokens, ignores_padding=False), whole)


@pytest.mark.fast
def test_an_id_is_a_number_of_the_caption_alone():
    """Pinned: ranks of other machines and versions have to agree."""
    tokens = torch.tensor([[512, 97, 513, 0], [512, 98, 513, 0]])
    assert caption_ids(tokens).tolist() == [-8035141390774879728, 8745374958252511126]


@pytest.mark.fast
def test_two_hundred_thousand_captions_have_as_many_ids():
    """Every caption of two tokens of 448, which differ in one token or in the order of two."""
    first, second = torch.meshgrid(torch.arange(1, 449), torch.arange(1, 449), indexing="ij")
    columns = [torch.full((448 * 448,), 512), first.flatten(), second.flatten()]
    ids = caption_ids(torch.stack([*columns, torch.full((448 * 448,), 513)], 1))
    assert len(ids.unique()) == 448 * 448


# The loss.

KINDS = {
    "ignore": {"duplicate_captions": "ignore"},
    "positive": {"duplicate_captions": "positive"},
    "smoothed": {"label_smoothing": 0.1},
    "ignore, smoothed": {"duplicate_captions": "ignore", "label_smoothing": 0.1},
    "positive, smoothed": {"duplicate_captions": "positive", "label_smoothing": 0.1},
    "sigmoid, ignore": {"duplicate_captions": "ignore", "siglip": True},
    "sigmoid, positive": {"duplicate_captions": "positive", "siglip": True},
}
kinds = pytest.mark.parametrize("config", [TrainConfig(**k) for k in KINDS.values()], ids=KINDS)
WAYS = {
    "direct": {},
    "padded": {"pack_text": False},
    "cached": {"micro_batch_size": 3, "num_kept_graphs": 2},
    "one by one": {"micro_batch_size": 1},
}


@kinds
def test_a_step_has_the_gradients_of_the_whole_matrix(config):
    exact = plain(config)
    for settings in WAYS.values():
        assert_equal_to_1e12(gradients(training(config, **settings), batch_of(tokenized())), exact)


@kinds
def test_the_settings_matter_here(config):
    """All but the positives of the softmax loss: equal captions have one feature, so that they share a target anyway."""
    exact = plain(config)
    if config.duplicate_captions == "positive" and not config.siglip:
        assert_equal_to_1e12(
            plain(dataclasses.replace(config, duplicate_captions="negative")), exact
        )
        return
    change = exact["loss"] - plain(TrainConfig(siglip=config.siglip))["loss"]
    assert abs(change) > 1e-3


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("kind", ["ignore", "positive"])
def test_the_loss_is_told_which_captions_are_equal(kind, siglip):
    """Once a step, whatever the micro-batches; an image and its text have one id."""
    for settings in WAYS.values():
        step = training(TrainConfig(duplicate_captions=kind, siglip=siglip), **settings)
        loss_fn, told = step.loss_fn, []

        def noted(*features: Tensor, loss_fn=loss_fn, told=told, **ids: Tensor) -> Tensor:
            told.append(ids)
            return loss_fn(*features, **ids)

        step.loss_fn = noted
        step.gradients(batch_of(tokenized()), 7)
        (ids,) = told
        assert ids.keys() == {"image_ids", "text_ids"} and loss_fn.same_id == kind
        for side in ids.values():
            assert [side.tolist().index(value) for value in side.tolist()] == list(IDS)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as ranks:
        yield ranks


def gradients_of_rank(world: World, config: TrainConfig) -> list[dict[str, Tensor]]:
    """Return the gradients of this rank's pairs, cut behind its own longest caption, in each way."""
    tokens = tokenized()
    share = share_of_rank(len(tokens), world.rank, 2)
    whole = batch_of(tokens)
    own = Batch(whole.images[share], trim_tokens(tokens[share]), whole.indices[share])
    found = []
    for settings in WAYS.values():
        step = training(config, world, **settings)
        step.reduced = replicate(step.model)
        found.append(gradients(step, own))
    return found


@kinds
def test_two_ranks_have_them_too(pool, config):
    exact = plain(config)
    for one, other in zip(*pool.run(gradients_of_rank, config), strict=True):
        mean_loss = (one["loss"] + other["loss"]) / 2
        for found in (one, other):  # the gradients are averaged already
            assert_equal_to_1e12({**found, "loss": mean_loss}, exact)


@pytest.mark.fast
def test_label_smoothing_is_that_of_torch():
    config = TrainConfig(label_smoothing=0.3)
    step, batch = training(config), batch_of(tokenized())
    image, text, scale = step.embedder(batch, 7, step.model)(slice(0, 11), None)
    logits, labels = scale * image @ text.T, torch.arange(11)
    sides = (logits, logits.T)
    loss = sum(F.cross_entropy(side, labels, label_smoothing=0.3) for side in sides) / 2
    loss.backward()
    exact = {name: p.grad.clone() for name, p in step.model.named_parameters()}
    step.model.zero_grad()
    assert_equal_to_1e12(gradients(step, batch), {"loss": loss.detach()} | exact)


@pytest.mark.parametrize("siglip", [False, True])
def test_a_default_step_makes_no_ids_and_keeps_its_bits(monkeypatch, siglip):
    def refuse(tokens: Tensor) -> Tensor:
        raise AssertionError("ids without a need")

    monkeypatch.setattr(step_module, "caption_ids", refuse)
    step, batch = training(TrainConfig(siglip=siglip)), batch_of(tokenized())
    ours = gradients(step, batch)
    before = training(TrainConfig(siglip=siglip))
    # As the loss was before there were settings of it.
    loss_fn = SigLipLoss() if siglip else ClipLoss()
    embed = before.embedder(batch, 7, before.model)
    loss = differentiate(embed, loss_fn, before.model, 11, 1).loss
    assert torch.equal(ours["loss"], loss)
    for name, parameter in before.model.named_parameters():
        assert torch.equal(ours[name], parameter.grad), name
    assert ";" not in step.describe_loss().replace("engine; a stash", "")


# --verify-gradients.


@kinds
def test_gradients_with_ids_are_verified(config):
    step = training(config)
    assert "of 11 pairs verified against float64" in verify.verify_gradients(
        step, batch_of(tokenized()), 0
    )


def all_equal(tokens: Tensor, _: bool) -> Tensor:
    return torch.zeros(len(tokens), dtype=torch.int64)


def all_different(tokens: Tensor, _: bool) -> Tensor:
    return torch.arange(len(tokens))


@pytest.mark.parametrize(
    ("wrong", "kind", "siglip"),
    [
        (all_equal, "ignore", False),
        (all_equal, "positive", False),
        (all_equal, "ignore", True),
        (all_equal, "positive", True),
        (all_different, "ignore", False),
        (all_different, "ignore", True),
        (all_different, "positive", True),
    ],
)
def test_wrong_ids_are_found_by_the_verification(monkeypatch, wrong, kind, siglip):
    monkeypatch.setattr(step_module, "caption_ids", wrong)
    step = training(TrainConfig(duplicate_captions=kind, siglip=siglip))
    with pytest.raises(verify.VerificationError, match="not those of the plain computation"):
        verify.verify_gradients(step, batch_of(tokenized()), 0)


def verified_on_rank(world: World, config: TrainConfig) -> str:
    tokens = tokenized()
    share = share_of_rank(len(tokens), world.rank, 2)
    whole, step = batch_of(tokens), training(config, world)
    step.reduced = replicate(step.model)
    own = Batch(whole.images[share], trim_tokens(tokens[share]), whole.indices[share])
    return verify.verify_gradients(step, own, 0)


@pytest.mark.parametrize("siglip", [False, True])
def test_gradients_with_ids_are_verified_over_ranks(pool, siglip):
    config = TrainConfig(duplicate_captions="positive", siglip=siglip)
    assert all("of 10 pairs verified" in said for said in pool.run(verified_on_rank, config))


# Runs.


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures, each caption three times."""
    path = write_csv(tmp_path_factory.mktemp("table"), num_pairs=24)
    header, *rows = path.read_text().splitlines()
    pairs = [(row.split("\t")[0], rows[i // 3].split("\t")[1]) for i, row in enumerate(rows)]
    path.write_text("\n".join([header, *("\t".join(pair) for pair in pairs)]) + "\n")
    return path


def run(
    server: RunServer, tmp_path: Path, name: str, *flags: str, num_ranks: int = 0
) -> tuple[int, str]:
    line = ["--logs", str(tmp_path), "--name", name, *flags]
    return server.run(line, tmp_path / "out", num_ranks)


def test_a_run_has_the_settings_says_them_and_resumes_with_them(server, table, tmp_path):
    begun = ["--train-data", str(table), *NANO, "--global-batch-size", "12", "--epochs", "1"]
    asked = ["--label-smoothing", "0.1", "--duplicate-captions", "positive"]
    status, said = run(server, tmp_path, "r", *begun, *asked)
    assert status == 0, said
    line = next(line for line in said.splitlines() if line.startswith("contrastive loss of 12"))
    assert "; label smoothing 0.1; pairs of equal captions are positives" in line
    assert line.endswith(
        "(for the softmax loss this equals negative, since equal captions have equal features)"
    )
    saved = json.loads((tmp_path / "r" / "config.json").read_text())
    assert (saved["label_smoothing"], saved["duplicate_captions"]) == (0.1, "positive")

    status, resumed = run(server, tmp_path, "r", "--resume", "latest", "--epochs", "2", "--quiet")
    assert status == 0 and line in resumed.splitlines(), resumed
    assert "--duplicate-captions was" not in resumed

    changed = ["--duplicate-captions", "ignore", "--label-smoothing", "0"]
    more = ["--resume", "latest", "--epochs", "3", "--quiet", *changed]
    status, resumed = run(server, tmp_path, "r", *more)
    assert status == 0, resumed
    assert "--duplicate-captions was positive in this run, now ignore" in resumed
    assert "--label-smoothing was 0.1 in this run, now 0" in resumed
    assert "; pairs of equal captions are left out as negatives" in resumed

    status, refused = run(server, tmp_path, "r", *more[:-1], "0.2", "--siglip")
    assert status == 2 and "Traceback" not in refused
    assert "--label-smoothing is of the softmax loss, and --siglip has none" in refused


def test_two_ranks_train_as_one_with_equal_captions(server, table, tmp_path):
    flags = ["--train-data", str(table), *NANO, "--global-batch-size", "12", "--epochs", "1"]
    flags += ["--duplicate-captions", "ignore", "--verify-gradients", "--lr", "1e-3"]
    status, said = run(server, tmp_path, "one", *flags)
    assert status == 0, said
    several = [*flags, "--micro-batch-size", "2"]
    status, said = run(server, tmp_path, "two", *several, num_ranks=2)
    assert status == 0 and "verified against float64" in said, said
    status, said = run(server, tmp_path, "plain", *flags, "--duplicate-captions", "negative")
    assert status == 0, said
    one, two, plain_run = (read_metrics(tmp_path / name)[0] for name in ("one", "two", "plain"))
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-4)
    assert one[0]["loss"] < plain_run[0]["loss"] - 1e-3  # fewer negatives
