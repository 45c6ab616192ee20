"""The order in which a run sees its data, and the processes that prepare it.

Legend: B pairs on this rank, G pairs of the global batch, L tokens, S side of the image.

Batch ``step`` of a run is a function of (seed, step): epoch and position follow from the step, a keyed permutation maps
positions to samples, and the crop of a sample is a function of (seed, epoch, sample). There is no state to save, and
neither workers nor, at one global batch size, ranks change what is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipcore.data.pairs import BadSample, DataError, Pair, PairSource
from clipcore.data.transforms import ImageTransform

Tokenize = Callable[[list[str]], Tensor]

# Replacements tried for a bad sample before the data is given up as broken.
MAX_REPLACEMENTS = 64
# The share of bad samples is judged over at least so many.
MIN_SAMPLES_JUDGED = 256
# Caption lengths of a batch are rounded up to a multiple of this, so that few shapes occur.
LENGTH_MULTIPLE = 8


@dataclass
class Batch:
    """The pairs of one step on one rank.

    Attributes:
        images: uint8 [B, 3, S, S].
        tokens: int64 [B, L], cut to the longest caption.
        indices: int64 [B], of the samples in their source.
        bad: (key, reason) of each sample that was replaced, or left out in an evaluation.
    """

    images: Tensor
    tokens: Tensor
    indices: Tensor
    bad: list[tuple[str, str]] = field(default_factory=list)

    def pin_memory(self) -> Batch:
        """For DataLoader: page-locked copies."""
        self.images, self.tokens = self.images.pin_memory(), self.tokens.pin_memory()
        return self


def mix(*words: int) -> int:
    """A 64-bit hash of integers (the finaliser of SplitMix64, chained)."""
    state = 0
    for word in words:
        state = (state ^ (word & (2**64 - 1))) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ state >> 27) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """A keyed permutation of ``range(size)``, at the given positions only.

    A Feistel network over the next even number of bits, walked along its cycle until it falls below ``size`` (Black and
    Rogaway 2002): constant memory, any position on its own.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64(2**half - 1)
    keys = [np.uint64(mix(key, r)) for r in range(6)]
    shift = np.uint64(half)

    def walk(values: np.ndarray) -> np.ndarray:
        left, right = values >> shift, values & mask
        for round_key in keys:
            mixed = (right ^ round_key) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
        return left << shift | right

    with np.errstate(over="ignore"):
        values = walk(positions.astype(np.uint64))
        while (outside := values >= size).any():
            values[outside] = walk(values[outside])
    return values.astype(np.int64)


class PairLoader:
    """Batches of a run on one rank.

    Args:
        batch_size: B.
        seed: of the order and the crops.
        workers: processes that prepare batches; 0 prepares them in this one.
        max_bad_fraction: share of unreadable samples above which the run stops.
        trim_text: cut token rows to the longest caption of the batch. Nothing after the end-of-text token reaches it,
            so that the features stay the same.

    Raises:
        DataError: a batch larger than the data; later, too many unreadable samples.
    """

    def __init__(
        self,
        source: PairSource,
        transform: ImageTransform,
        tokenizer: Tokenize,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        max_bad_fraction: float = 0.01,
        trim_text: bool = True,
    ) -> None:
        self.global_batch_size = batch_size * world_size
        self.steps_per_epoch = len(source) // self.global_batch_size
        if not self.steps_per_epoch:
            raise DataError(
                f"a batch of {self.global_batch_size} pairs is larger than the data, {len(source)} pairs of {source.name}; "
                "lower --batch-size"
            )
        self._workers, self._max_bad_fraction = workers, max_bad_fraction
        self._batches = _Batches(
            source, transform, tokenizer, seed, batch_size, rank, self.global_batch_size, trim_text
        )

    def batches(self, step: int = 0) -> Iterator[Batch]:
        """The batches of the run from global step ``step`` on, without end."""
        loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=range(step, 2**62),
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
        )
        num_bad = num_seen = 0
        reasons: list[str] = []
        for batch in loader:
            if isinstance(batch, _Failure):
                raise DataError(batch.message)
            num_seen += len(batch.indices)
            num_bad += len(batch.bad)
            reasons += [reason for _, reason in batch.bad][: 3 - len(reasons)]
            if num_bad > self._max_bad_fraction * max(num_seen, MIN_SAMPLES_JUDGED):
                raise DataError(
                    f"{num_bad} of the first {max(num_seen, num_bad)} samples cannot be read, more than "
                    f"--max-bad-fraction {self._max_bad_fraction}; such as: {'; '.join(reasons)}"
                )
            yield batch


@dataclass(frozen=True)
class _Failure:
    """A mistake in the data, found in a worker: travels as a value, so that its message stays one line."""

    message: str


@dataclass
class _Batches(Dataset):  # type: ignore[type-arg]
    """Batch ``step`` of a run, map-style: what a worker computes."""

    source: PairSource
    transform: ImageTransform
    tokenizer: Tokenize
    seed: int
    batch_size: int
    rank: int
    global_batch_size: int
    trim_text: bool

    def __getitem__(self, step: int) -> Batch | _Failure:
        epoch, in_epoch = divmod(step, len(self.source) // self.global_batch_size)
        start = in_epoch * self.global_batch_size + self.rank * self.batch_size
        positions = np.arange(start, start + self.batch_size)
        indices = permute(positions, len(self.source), mix(self.seed, epoch))
        bad: list[tuple[str, str]] = []
        try:
            rows = [self._readable(int(index), epoch, bad) for index in indices]
            images = torch.from_numpy(np.stack([image for image, _, _ in rows]))
            tokens = self.tokenizer([caption for _, caption, _ in rows])
        except DataError as error:
            return _Failure(str(error))
        chosen = torch.tensor([index for _, _, index in rows])
        return Batch(images, trim(tokens) if self.trim_text else tokens, chosen, bad)

    def _readable(
        self, index: int, epoch: int, bad: list[tuple[str, str]]
    ) -> tuple[np.ndarray, str, int]:
        """The crop, the caption and the index of a sample, or of the next readable one of a fixed sequence."""
        size = len(self.source)
        for attempt in range(MAX_REPLACEMENTS):
            candidate = index if not attempt else mix(self.seed, epoch, index, attempt) % size
            rng = np.random.Generator(np.random.Philox(mix(self.seed, epoch, candidate, -1)))
            try:
                pair = self.source[candidate]
                return self.transform.crop(pair.image, rng), choose_caption(pair, rng), candidate
            except BadSample as error:
                bad.append((f"sample {candidate}", str(error)))
        raise DataError(
            f"{MAX_REPLACEMENTS} samples of {self.source.name} in a row cannot be read, the last: {bad[-1][1]}"
        )


def choose_caption(pair: Pair, rng: np.random.Generator) -> str:
    """The caption of a pair, or one of its captions."""
    if isinstance(pair.caption, str):
        return pair.caption
    return pair.caption[int(rng.integers(len(pair.caption)))]


def trim(tokens_BL: Tensor) -> Tensor:
    """Token rows cut after the last end-of-text token, rounded up to a multiple of eight; the end has the largest id."""
    longest = int(tokens_BL.argmax(1).max()) + 1
    rounded = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return tokens_BL[:, : min(rounded, tokens_BL.shape[1])].contiguous()


def eval_batches(
    source: PairSource,
    transform: ImageTransform,
    tokenizer: Tokenize,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    indices: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """This rank's part of a source, in order, each sample once; unreadable samples are left out and named in ``bad``.

    A pair with several captions gives its first.
    """
    mine = np.array_split(np.arange(len(source)) if indices is None else np.asarray(indices), world_size)[rank]
    for start in range(0, len(mine), batch_size):
        images, captions, chosen, bad = [], [], [], list[tuple[str, str]]()
        for index in mine[start : start + batch_size].tolist():
            try:
                pair = source[index]
                images.append(transform.crop(pair.image))
            except BadSample as error:
                bad.append((f"sample {index}", str(error)))
                continue
            captions.append(pair.caption if isinstance(pair.caption, str) else pair.caption[0])
            chosen.append(index)
        if images:
            tokens = trim(tokenizer(captions))
            yield Batch(torch.from_numpy(np.stack(images)), tokens, torch.tensor(chosen), bad)
