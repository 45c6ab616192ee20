"""Batches: a function of (seed, step) alone, whatever reads them; bad samples are replaced by a fixed rule."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from runs import PROGRAMS, ROOT, children, open_descriptors, wait_until
from shards import write_csv, write_shards

from clipcore.data import BadSample, DataError, Pair, WorkerLostError, loader
from clipcore.data.loader import Batch, PairLoader, eval_batches, trim_tokens
from clipcore.data.order import SampleRandom, hash64, permutation
from clipcore.data.sources import PairSource, open_source
from clipcore.data.transforms import ImageTransform

TRAIN, EVAL = ImageTransform(16, is_train=True), ImageTransform(16, is_train=False)
END = 999


class Pictures:
    """Small pictures of noise; those in ``bad`` cannot be read."""

    name = "pictures"

    def __init__(self, size: int, bad: frozenset[int] = frozenset()) -> None:
        self.size, self.bad = size, bad

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Pair:
        if index in self.bad:
            raise BadSample("broken", f"key {index}")
        pixels = np.random.default_rng(index).integers(0, 256, (24, 30, 3), np.uint8)
        captions = tuple(f"{index} {'x ' * (index % 11)}{word}" for word in ("a", "b", "c"))
        return Pair(pixels, captions, f"key {index}")


def tokenize(texts: list[str]) -> torch.Tensor:
    """One id a character, END, then zeros, to 40."""
    rows = torch.zeros(len(texts), 40, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = torch.tensor([ord(c) for c in text])
        row[len(text)] = END
    return rows


def make(source: PairSource, batch_size: int = 8, **settings: object) -> PairLoader:
    """``batch_size`` pairs a rank."""
    total = batch_size * settings.get("world_size", 1)  # type: ignore[operator]
    return PairLoader(source, TRAIN, tokenize, total, **{"seed": 1, **settings})  # type: ignore[arg-type]


def take(batches: object, count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))  # type: ignore[call-overload]


def assert_same(ones: list[Batch], others: list[Batch]) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.indices, other.indices)
        assert one.bad == other.bad


@pytest.mark.parametrize("size", [*range(1, 201), 1000, 4097, 99_991])
def test_the_order_is_a_permutation(size):
    order = permutation(np.arange(size), size, seed=5, epoch=2)
    assert np.array_equal(np.sort(order), np.arange(size))
    part = np.arange(size)[::-1][: size // 2]
    assert np.array_equal(permutation(part, size, 5, 2), order[part])
    if size >= 20:
        assert not np.array_equal(order, permutation(np.arange(size), size, 5, 3))
        assert not np.array_equal(order, permutation(np.arange(size), size, 6, 2))


def test_the_order_of_very_large_data_is_one_to_one_where_looked_at():
    for size in (10**9 + 7, 2**40 + 1, 2**62):
        for start in (0, size - 100_000):
            order = permutation(np.arange(start, start + 100_000), size, seed=0, epoch=0)
            assert len(np.unique(order)) == 100_000 and order.min() >= 0 and order.max() < size


@pytest.mark.parametrize("size", [2, 3, 5, 13])
def test_every_sample_is_as_likely_everywhere(size):
    epochs = 400 * size
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), permutation(np.arange(size), size, 0, epoch)] += 1
    # Chi-square of size^2 cells around 400, (size - 1)^2 degrees of freedom; five standard deviations of fixed draws.
    degrees = (size - 1) ** 2
    chi_square = ((counts - 400) ** 2 / 400).sum()
    assert abs(chi_square - degrees) < 5 * math.sqrt(2 * degrees)


def test_neighbours_do_not_stay_neighbours():
    order = permutation(np.arange(10_000), 10_000, 0, 0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert (np.abs(np.diff(order)) == 1).mean() < 0.002


def test_hashes_depend_on_every_word_of_the_key():
    values = np.arange(100)
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (-1,), (2**64 - 1, 5)]
    hashes = [tuple(hash64(values, *key).tolist()) for key in keys]
    assert len(set(hashes)) == len(keys) and all(len(set(h)) == 100 for h in hashes)


def test_numbers_of_a_sample_do_not_depend_on_what_was_drawn_before():
    random = SampleRandom()
    states = random.states(np.array([3, 4]), seed=0, epoch=1)
    first = random.at(states[0]).random(5)
    random.at(states[1]).integers(10, size=3, dtype=np.uint32)
    assert np.array_equal(random.at(states[0]).random(5), first)
    assert states[0] != random.states(np.array([3]), seed=0, epoch=2)[0]
    many = np.array([random.at(s).random() for s in random.states(np.arange(10_000), 0, 0)])
    counts, _ = np.histogram(many, 20, (0, 1))
    assert abs(counts - 500).max() < 5 * math.sqrt(500)


def test_an_epoch_sees_each_sample_once_and_the_next_one_in_another_order():
    pairs = make(Pictures(50), batch_size=8)
    assert pairs.steps_per_epoch == 6
    batches = take(pairs.batches(), 12)
    first, second = (
        torch.cat([batch.indices for batch in batches[i : i + 6]]).tolist() for i in (0, 6)
    )
    assert len(set(first)) == len(set(second)) == 48 and first != second
    assert all(batch.images.shape == (8, 3, 16, 16) for batch in batches)
    assert all(batch.images.dtype == torch.uint8 for batch in batches)
    assert (
        {batch.indices.dtype for batch in batches}
        == {torch.int64}
        == {b.tokens.dtype for b in batches}
    )


def test_crops_and_captions_change_with_the_epoch_and_the_seed():
    looks, texts = set(), set()
    for seed, epoch in itertools.product((0, 1), range(6)):
        for batch in take(make(Pictures(8), seed=seed).batches(epoch), 1):
            row = batch.indices.tolist().index(5)
            looks.add(batch.images[row].numpy().tobytes())
            texts.add("".join(map(chr, batch.tokens[row].tolist())).partition(chr(END))[0][-1])
    assert len(looks) >= 8 and texts == {"a", "b", "c"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PairSource]:
    folder = tmp_path_factory.mktemp("data")
    table = write_csv(folder / "table", 30)
    broken = folder / "table" / "images" / "0004.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    return {
        "pictures": Pictures(30, frozenset({2, 17})),
        "table": open_source(str(table)),
        "shards": open_source(write_shards(folder / "shards", 3, 10)),
    }


@pytest.mark.parametrize("name", ["pictures", "table", "shards"])
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_batches(sources, name, workers):
    settings = {"max_bad_fraction": 1.0, "batch_size": 6}
    alone = take(make(sources[name], **settings).batches(), 8)
    assert_same(alone, take(make(sources[name], workers=workers, **settings).batches(), 8))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_global_batch_of_one(sources, world_size):
    whole = take(make(sources["pictures"], batch_size=8, trim_text=False).batches(), 7)
    ranks = [
        take(
            make(
                sources["pictures"],
                batch_size=8 // world_size,
                rank=rank,
                world_size=world_size,
                trim_text=False,
            ).batches(),
            7,
        )
        for rank in range(world_size)
    ]
    joined = [
        Batch(
            *(
                torch.cat([getattr(b, name) for b in parts])
                for name in ("images", "tokens", "indices")
            ),
            [entry for b in parts for entry in b.bad],
        )
        for parts in zip(*ranks, strict=True)
    ]
    assert_same(whole, joined)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_step_can_be_read_on_its_own(sources, workers):
    pairs = make(sources["pictures"], batch_size=6, workers=workers)
    straight = take(pairs.batches(), 12)
    for step in range(12) if not workers else (3, 7):
        assert_same(straight[step:], take(pairs.batches(step), 12 - step))


def test_large_batches_are_read_in_parts_without_a_difference(monkeypatch):
    whole = take(make(Pictures(100), batch_size=23).batches(), 5)
    monkeypatch.setattr(loader, "PART_ROWS", 5)
    for workers in (0, 2):
        pairs = make(Pictures(100), batch_size=23, workers=workers)
        assert len(pairs._cuts) == 5
        assert_same(whole, take(pairs.batches(), 5))


def test_the_callers_random_numbers_are_left_alone(sources):
    for workers in (0, 2):
        torch.manual_seed(0)
        take(make(sources["shards"], workers=workers).batches(), 2)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))


def test_bad_samples_are_replaced_by_a_fixed_rule_named_and_counted_exactly():
    bad = frozenset({3, 11, 12, 40})
    pairs = make(Pictures(48, bad), batch_size=8, max_bad_fraction=1.0)
    batches, replacements = take(pairs.batches(), 12), []
    for epoch in (0, 1):
        part = batches[6 * epoch : 6 * epoch + 6]
        named = sorted(entry for batch in part for entry in batch.bad)
        assert named == sorted((f"key {index}", "broken") for index in bad)
        indices = torch.cat([batch.indices for batch in part]).tolist()
        assert not bad & set(indices) and set(range(48)) - bad <= set(indices)
        replacements.append(sorted(indices.count(i) > 1 and i for i in set(indices)))
    # Each bad sample has its own replacement, and another one in another epoch.
    assert len(set(replacements[0])) > 2 and replacements[0] != replacements[1]
    good = take(make(Pictures(48), batch_size=8).batches(), 12)
    for step, batch in enumerate(batches):
        same = batch.indices == good[step].indices
        assert int((~same).sum()) == len(batch.bad)
        # The others are untouched: the crop of a sample is its own.
        assert torch.equal(batch.images[same], good[step].images[same])


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_in_one_line_with_reasons(workers):
    source = Pictures(400, frozenset(range(0, 400, 20)))
    pairs = make(source, batch_size=40, workers=workers, max_bad_fraction=0.04)
    seen, before = 0, set(multiprocessing.active_children())
    with pytest.raises(
        DataError, match=r"of 520 samples .*--max-bad-fraction 0\.04: key"
    ) as caught:
        for batch in pairs.batches():
            seen += len(batch.indices)
    assert seen == 480 and "\n" not in str(caught.value) and "broken" in str(caught.value)
    # At once, though the traceback is still there.
    assert set(multiprocessing.active_children()) <= before
    take(make(source, batch_size=40, max_bad_fraction=0.06).batches(), 30)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_stops_at_once(workers):
    source = Pictures(20, frozenset(range(20)))
    with pytest.raises(DataError, match=r"no sample of pictures .* key \d+: broken") as caught:
        take(make(source, workers=workers).batches(), 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        (
            {"batch_size": 64},
            r"batch of 64 pairs does not fit the 40 samples of pictures; lower --global-batch-size",
        ),
        ({"batch_size": 16, "world_size": 4}, r"64 pairs .* 40 samples"),
        ({"batch_size": 0}, r"batch of 0 .* 1 ranks without any"),
    ],
)
def test_batches_that_do_not_fit(settings, pattern):
    with pytest.raises(DataError, match=pattern):
        make(Pictures(40), **settings)


def test_token_rows_end_behind_the_longest_caption():
    rows = tokenize(["ab", "x" * 12, ""])
    trimmed = trim_tokens(rows)
    assert trimmed.shape == (3, 16) and torch.equal(trimmed, rows[:, :16])
    assert trim_tokens(tokenize(["x" * 7])).shape == (1, 8)
    assert trim_tokens(tokenize(["x" * 39])).shape == (1, 40)
    assert trim_tokens(tokenize(["x" * 36])[:, :37]).shape == (1, 37)
    for trim_text in (True, False):
        for batch in take(make(Pictures(30), trim_text=trim_text).batches(), 4):
            assert (batch.tokens == END).sum() == 8
            assert batch.tokens.shape[1] == 40 or trim_text


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_reads_each_sample_once_and_in_order(world_size, workers):
    bad = frozenset({0, 4, 5, 6, 7, 22})
    source = Pictures(23, bad)
    batches = [
        batch
        for rank in range(world_size)
        for batch in eval_batches(source, EVAL, tokenize, 4, rank, world_size, workers)
    ]
    indices = torch.cat([batch.indices for batch in batches]).tolist()
    assert indices == [i for i in range(23) if i not in bad]
    named = sorted(key for batch in batches for key, _ in batch.bad)
    assert named == sorted(f"key {index}" for index in bad)
    for batch in batches:
        assert len(batch.images) == len(batch.tokens) == len(batch.indices) <= 4
        assert batch.owners is None
        for row, index in enumerate(batch.indices.tolist()):
            image = Image.fromarray(source[index].image)
            assert np.array_equal(batch.images[row].numpy(), EVAL.crop(image))
            text = "".join(map(chr, batch.tokens[row].tolist())).partition(chr(END))[0]
            assert text == source[index].caption[0]


def test_evaluation_of_nothing_readable_names_it_all():
    batches = list(eval_batches(Pictures(5, frozenset(range(5))), EVAL, tokenize, 2))
    assert [len(batch.indices) for batch in batches] == [0, 0, 0]
    assert [len(batch.bad) for batch in batches] == [2, 2, 1]
    assert not list(eval_batches(Pictures(1), EVAL, tokenize, 2, rank=0, world_size=2))


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_with_all_captions_says_whose_each_is(workers):
    source = Pictures(9, frozenset({3}))
    found = []
    for batch in eval_batches(source, EVAL, tokenize, 4, workers=workers, all_captions=True):
        assert len(batch.tokens) == len(batch.owners) == 3 * len(batch.indices)
        texts = ["".join(map(chr, row.tolist())).partition(chr(END))[0] for row in batch.tokens]
        found += list(zip(batch.owners.tolist(), texts, strict=True))
    assert found == [(i, text) for i in range(9) if i != 3 for text in source[i].caption]


def test_transparent_pictures_are_counted(tmp_path):
    for index in range(6):
        colour = (255, 0, 0, 0 if index % 3 == 0 else 255)
        Image.new("RGBA", (20, 20), colour).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("words")
    source = open_source(str(tmp_path))
    batches = list(eval_batches(source, EVAL, tokenize, 4))
    assert [batch.num_transparent for batch in batches] == [2, 0]
    # The red under them is gone.
    whites = torch.cat([batch.images for batch in batches]).eq(255).flatten(1).all(1)
    assert whites.tolist() == [True, False, False] * 2
    (batch,) = take(make(source, 6).batches(), 1)
    assert batch.num_transparent == 2


def test_workers_outlive_signals_to_the_whole_run_but_not_the_run():
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / "signal_loader_workers.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"},
    )
    assert "went on" in done.stdout and done.returncode == 7, done.stderr


def test_loaders_leave_no_process_and_no_file_behind(sources):
    def state() -> tuple[int, int]:
        return len(children(os.getpid())), open_descriptors()

    def use() -> None:
        batches = make(sources["table"], workers=2, max_bad_fraction=1.0).batches()
        take(batches, 1)
        batches.close()  # type: ignore[attr-defined]

    use()
    before = state()
    for _ in range(3):
        use()
    # A queue's thread closes its end of the pipe when it comes to it.
    wait_until(lambda: state() <= before, f"end of what three loaders opened, back to {before}")


def test_a_killed_worker_is_noticed_where_its_batch_is_due():
    """Not by an error in the middle of whatever this process computes meanwhile."""
    loader = make(Pictures(64), workers=2)
    batches = loader.batches()
    first = take(batches, 1)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    for pid in children(os.getpid())[-2:]:
        os.kill(pid, signal.SIGKILL)
    torch.ones(100, 100) @ torch.ones(100, 100)
    with pytest.raises(WorkerLostError, match=r"was killed, .*fewer --workers"):
        for batch in batches:
            first.append(batch)
    # The one that is missing, and all before it, are what they would have been.
    first.append(loader.batch(len(first)))
    assert_same(first, take(make(Pictures(64)).batches(), len(first)))


class Failing(Pictures):
    """A source with a fault of its own, which is not a worker's end."""

    def __getitem__(self, index: int) -> Pair:
        raise RuntimeError("a fault of the source")


def test_an_error_in_a_worker_is_that_error_and_leaves_no_process():
    before = children(os.getpid())
    with pytest.raises(RuntimeError, match="a fault of the source") as caught:
        take(make(Failing(64), workers=2).batches(), 1)
    # The traceback, which holds the loader's frames, is still there.
    assert caught.tb is not None and children(os.getpid()) == before


class BrokenConnection:
    """What torch's iterator does when a worker is killed while it hands over: the error comes before the exit status."""

    def __init__(self) -> None:
        self.process = multiprocessing.get_context("fork").Process(target=signal.pause)
        self.process.start()
        self._workers = (self.process,)

    def __iter__(self) -> BrokenConnection:
        return self

    def __next__(self) -> Batch:
        os.kill(self.process.pid, signal.SIGKILL)
        raise EOFError

    def _shutdown_workers(self) -> None:
        self.process.join()


def test_a_worker_is_lost_where_only_its_connection_shows_it():
    with pytest.raises(WorkerLostError, match="was killed, usually because memory ran out"):
        next(loader._from_workers(BrokenConnection()))  # type: ignore[arg-type]
