"""Batches: which samples a rank reads at a step, and reading them with worker processes.

Legend: B pairs on this rank, G = B * world_size pairs of the global batch, L tokens, S pixels of a side.

The state of the data is (seed, step). Step k takes positions k * G to (k + 1) * G of the order of its epoch, and rank r
the rows r * B to (r + 1) * B of them; what a sample looks like depends on (seed, epoch, sample) alone. So any step can
be read on its own, and at a fixed global batch neither workers nor ranks change what is trained on.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from clipcore.data import BadSample, DataError, Pair, PairSource, WorkerLostError
from clipcore.data.order import SampleRandom, hash64, permutation
from clipcore.data.resample import Picture
from clipcore.data.transforms import ImageTransform, stack_images, was_transparent
from clipcore.ranks.signals import DataWaitError, data_came, waiting_for_data

# Rows that a worker reads at once: with large batches a whole one a worker would fill the memory and come late.
PART_ROWS = 256
MAX_REPLACEMENTS = 64
# Rows to read before the share of bad ones is judged.
JUDGED_ROWS = 512
# Of samples that cannot be read, in the message that stops a run.
SHOWN_REASONS = 5
# Seconds within which a worker whose connection is broken has ended, also on a busy machine.
_ENDING_S = 10.0

Tokenizer = Callable[[list[str]], Tensor]


@dataclass
class Batch:
    """What a step trains on.

    Attributes:
        images: uint8 [B, 3, S, S]; ``normalize_images`` makes them the model's input, on the device.
        tokens: int64 [B, L].
        indices: int64 [B], which samples of the source these are (of a replaced one, its replacement).
        bad: (key, reason) of each sample that could not be read.
        num_transparent: pictures that were laid over white.
        owners: int64 [L'], the sample of each row of tokens, where samples have all their captions.
    """

    images: Tensor
    tokens: Tensor
    indices: Tensor
    bad: list[tuple[str, str]] = field(default_factory=list)
    num_transparent: int = 0
    owners: Tensor | None = None


class Sample(NamedTuple):
    """What is read of a sample: the crop, its caption or captions, whether the picture was laid over white."""

    image: Picture
    captions: tuple[str, ...]
    was_transparent: bool


class PairLoader:
    """The batches of one rank.

    Args:
        source: the pairs.
        transform: crops; its ``image_size`` is S.
        tokenizer: captions to token rows of one length, int64 [B, L].
        global_batch_size: pairs of a step on all ranks; a rank's share B is its even part of them, to one pair.
        seed: of the order, the crops, the choice among captions and the replacements.
        rank, world_size: this process among those that share the global batch.
        workers: processes that read; 0 reads in this one.
        max_bad_fraction: share of unreadable samples, among those that this rank has met since the last ``batches``,
            above which it stops; judged once ``JUDGED_ROWS`` were read.
        trim_text: cut token rows behind the longest caption of this rank's batch, to a multiple of 8: a causal text
            tower that reads the feature off at the end-of-text token, the largest id of a row, gives the same result.
        pin_memory: page-locked batches, which copy to a GPU while it computes; where CUDA is there by default.

    Attributes:
        share: of the rows of a global batch, this rank's.
        steps_per_epoch: whole global batches in the data; what is left over falls to other epochs' orders.

    Raises:
        DataError: the global batch is larger than the data, or smaller than the number of ranks.

    Example:
        >>> loader = PairLoader(source, transform, tokenizer, 256, seed=0)  # doctest: +SKIP
        >>> for batch in loader.batches(step=1000): ...  # doctest: +SKIP
    """

    def __init__(
        self,
        source: PairSource,
        transform: ImageTransform,
        tokenizer: Tokenizer,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        max_bad_fraction: float = 0.01,
        trim_text: bool = True,
        pin_memory: bool | None = None,
    ) -> None:
        if global_batch_size > len(source):
            raise DataError(
                f"a global batch of {global_batch_size} pairs does not fit the {len(source)} samples of "
                f"{source.name}; lower --global-batch-size or --batch-size"
            )
        if global_batch_size < world_size:
            raise DataError(
                f"a global batch of {global_batch_size} pairs leaves some of {world_size} ranks without any; raise "
                "--global-batch-size or start fewer ranks"
            )
        assert 0 <= rank < world_size
        self.share = share_of_rank(global_batch_size, rank, world_size)
        self.steps_per_epoch = len(source) // global_batch_size
        self.max_bad_fraction = max_bad_fraction
        self.trim_text = trim_text
        self.workers = workers
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._name = source.name
        self._cuts = _cuts(self.share.stop - self.share.start)
        self._parts = _TrainingParts(
            _Reader(source, transform, tokenizer),
            seed=seed,
            steps_per_epoch=self.steps_per_epoch,
            global_batch_size=global_batch_size,
            first_row=self.share.start,
        )

    def batches(self, step: int = 0) -> Iterator[Batch]:
        """The batches from ``step`` on, counted from 0 over all epochs, without end.

        Raises:
            DataError: too many samples cannot be read; the message says why the first ones could not.
            WorkerLostError: a worker was killed. No other is started; ``batch`` reads the one that is missing.
        """
        keys = ((k, *cut) for k in itertools.count(step) for cut in self._cuts)
        # A batch and the beginning of the next ahead, and never an idle worker.
        ahead = max(2 * self.workers, len(self._cuts) + min(len(self._cuts), 4))
        num_rows, bad = 0, list[tuple[str, str]]()
        # An error's traceback keeps this frame; its workers must not wait for the garbage collector.
        with contextlib.closing(_read(self._parts, keys, self.workers, ahead)) as parts:
            while True:
                batch = self._join(parts)
                num_rows += len(batch.indices)
                bad += batch.bad
                if num_rows >= JUDGED_ROWS and len(bad) > self.max_bad_fraction * num_rows:
                    raise too_many_bad(len(bad), num_rows, self._name, self.max_bad_fraction, bad)
                yield batch
                del batch  # before the next one is put together

    def batch(self, step: int) -> Batch:
        """Return the batch of one step, read in this process."""
        keys = ((step, *cut) for cut in self._cuts)
        return self._join(_read(self._parts, keys, workers=0, ahead=0))

    def _join(self, parts: Iterator[Batch]) -> Batch:
        """The next parts as one batch; each part's images are gone before the next is taken."""
        tokens, indices, bad = [], [], list[tuple[str, str]]()
        num_transparent = 0
        images: Tensor | None = None
        for start, stop in self._cuts:
            part = next(parts)
            if len(self._cuts) == 1 and not self.pin_memory:
                images = part.images
            else:
                if images is None:
                    shape = (self._cuts[-1][1], *part.images.shape[1:])
                    images = torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin_memory)
                images[start:stop] = part.images
            tokens.append(part.tokens)
            indices.append(part.indices)
            bad += part.bad
            num_transparent += part.num_transparent
            del part
        assert images is not None
        joined = torch.cat(tokens)
        joined = trim_tokens(joined) if self.trim_text else joined
        return Batch(
            images,
            joined.pin_memory() if self.pin_memory else joined,
            torch.cat(indices),
            bad,
            num_transparent,
        )


def too_many_bad(
    num_bad: int, num_samples: int, name: str, max_fraction: float, bad: Sequence[tuple[str, str]]
) -> DataError:
    """Return the error about a source of which too much cannot be read.

    Args:
        bad: (key, reason) of at least the first of them.
    """
    reasons = "; ".join(f"{key}: {reason}" for key, reason in bad[:SHOWN_REASONS])
    return DataError(
        f"{num_bad} of {num_samples} samples of {name} cannot be read, more than --max-bad-fraction "
        f"{max_fraction:g}: {reasons}"
    )


def share_of_rank(num_rows: int, rank: int, world_size: int) -> slice:
    """The even part of a number of rows that falls to a rank, to one row."""
    return slice(num_rows * rank // world_size, num_rows * (rank + 1) // world_size)


def eval_batches(
    source: PairSource,
    transform: ImageTransform,
    tokenizer: Tokenizer,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    all_captions: bool = False,
) -> Generator[Batch, None, None]:
    """A rank's share of a source, each sample once and in order: the shares of all ranks in turn are the source.

    Shares differ by one sample at most, and the last batch is as short as it comes out. A sample that cannot be read is
    left out and named in ``bad``, so that a batch may hold none. Arguments as of ``PairLoader``, and:

    Args:
        all_captions: a sample has a row of tokens for each caption, and ``owners`` says which; else for its first.
    """
    share = share_of_rank(len(source), rank, world_size)
    starts = range(share.start, share.stop, batch_size)
    keys = ((at, min(at + batch_size, share.stop)) for at in starts)
    parts = _OrderedParts(_Reader(source, transform, tokenizer), all_captions)
    for part in _read(parts, keys, workers, 2 * workers):
        if len(part.indices):
            part.tokens = trim_tokens(part.tokens)
        yield part


def no_tokens(captions: Sequence[str]) -> Tensor:
    """Return a token of each caption, [B, 1], in a tokenizer's place where captions are not looked at."""
    return torch.zeros(len(captions), 1, dtype=torch.long)


def trim_tokens(tokens_BL: Tensor) -> Tensor:
    """Token rows cut behind the last end-of-text token, the largest id of each row, to a multiple of 8."""
    longest = int(tokens_BL.argmax(-1).max()) + 1
    return tokens_BL[:, : min(-(-longest // 8) * 8, tokens_BL.shape[1])].contiguous()


class _Reader:
    """Reads samples: from numbers to arrays."""

    def __init__(self, source: PairSource, transform: ImageTransform, tokenizer: Tokenizer) -> None:
        self.source = source
        self.transform = transform
        self.tokenizer = tokenizer

    def sample(self, index: int, rng: np.random.Generator | None) -> Sample:
        """Return a sample with a caption that ``rng`` draws, with all captions without one; raise BadSample with its key."""
        data_came()  # of the sample before
        key = f"{self.source.name}, sample {index}"
        try:
            pair: Pair = self.source[index]
            key = pair.key
            captions = (pair.caption,) if isinstance(pair.caption, str) else tuple(pair.caption)
            if not captions:
                raise BadSample("no caption")
            if rng is not None and not isinstance(pair.caption, str):
                captions = (captions[int(rng.random() * len(captions))],)
            crop = self.transform.crop_image(pair.image, rng)
            return Sample(crop, captions, was_transparent(pair.image))
        except BadSample as error:
            raise BadSample(error.reason, error.key or key) from None

    def batch(
        self, samples: Sequence[Sample], indices: np.ndarray, all_captions: bool = False
    ) -> Batch:
        """Return samples as arrays; of none, arrays without rows."""
        if not samples:
            size = self.transform.image_size
            images = torch.empty(0, 3, size, size, dtype=torch.uint8)
            return Batch(images, torch.empty(0, 1, dtype=torch.long), torch.from_numpy(indices))

        captions = [sample.captions if all_captions else sample.captions[:1] for sample in samples]
        owners = None
        if all_captions:
            owners = torch.from_numpy(np.repeat(indices, [len(those) for those in captions]))
        return Batch(
            torch.from_numpy(stack_images([sample.image for sample in samples])),
            self.tokenizer([caption for those in captions for caption in those]),
            torch.from_numpy(indices),
            num_transparent=sum(sample.was_transparent for sample in samples),
            owners=owners,
        )


class _Parts(Protocol):
    """A part of a batch for each key; what DataLoader calls a map-style data set."""

    def __getitem__(self, key: Any) -> Batch | DataError: ...


class _TrainingParts:
    """(step, first row, end row) of this rank's batch to the part of it."""

    def __init__(
        self,
        reader: _Reader,
        seed: int,
        steps_per_epoch: int,
        global_batch_size: int,
        first_row: int,
    ) -> None:
        self.reader = reader
        self.seed = seed
        self.steps_per_epoch = steps_per_epoch
        self.global_batch_size = global_batch_size
        self.first_row = first_row
        self.random = SampleRandom()

    def __getitem__(self, key: tuple[int, int, int]) -> Batch | DataError:
        step, start, stop = key
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.global_batch_size + self.first_row
        positions = np.arange(first + start, first + stop)
        indices = permutation(positions, len(self.reader.source), self.seed, epoch)
        states = self.random.states(indices, self.seed, epoch)
        samples, bad = [], []
        for row, (index, state) in enumerate(zip(indices.tolist(), states, strict=True)):
            try:
                samples.append(self.reader.sample(index, self.random.at(state)))
            except BadSample as error:
                bad.append((error.key, error.reason))
                if (replacement := self._replacement(index, epoch)) is None:
                    return DataError(
                        f"no sample of {self.reader.source.name} could be read in {MAX_REPLACEMENTS} tries; {error}"
                    )
                indices[row], sample = replacement
                samples.append(sample)
        batch = self.reader.batch(samples, indices)
        batch.bad = bad
        return batch

    def _replacement(self, index: int, epoch: int) -> tuple[int, Sample] | None:
        """The first readable one of the samples that stand in for a bad one: a function of it and the epoch."""
        drawn = hash64(np.arange(MAX_REPLACEMENTS), self.seed, epoch, index, 103)
        candidates = (drawn % np.uint64(len(self.reader.source))).astype(np.int64)
        states = self.random.states(candidates, self.seed, epoch)
        for candidate, state in zip(candidates.tolist(), states, strict=True):
            try:
                return candidate, self.reader.sample(candidate, self.random.at(state))
            except BadSample:
                continue
        return None


class _OrderedParts:
    """(first index, end index) to those of the samples that can be read."""

    def __init__(self, reader: _Reader, all_captions: bool) -> None:
        self.reader, self.all_captions = reader, all_captions

    def __getitem__(self, key: tuple[int, int]) -> Batch | DataError:
        samples, indices, bad = [], [], []
        for index in range(*key):
            try:
                samples.append(self.reader.sample(index, None))
                indices.append(index)
            except BadSample as error:
                bad.append((error.key, error.reason))
        batch = self.reader.batch(samples, np.array(indices, np.int64), self.all_captions)
        batch.bad = bad
        return batch


def _cuts(batch_size: int) -> list[tuple[int, int]]:
    """Rows of a batch in parts of at most PART_ROWS, alike in size."""
    num_parts = -(-batch_size // PART_ROWS)
    ends = [batch_size * i // num_parts for i in range(num_parts + 1)]
    return list(itertools.pairwise(ends))


def _read(
    parts: _Parts, keys: Iterable[Any], workers: int, ahead: int
) -> Generator[Batch, None, None]:
    """The parts of the keys in order, read by worker processes that keep ``ahead`` parts ready."""
    read: Iterable[Batch | DataError]
    if workers:
        loader: DataLoader[Any] = DataLoader(
            _Guarded(parts),  # type: ignore[arg-type]
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            prefetch_factor=-(-ahead // workers),
            collate_fn=_same,
            worker_init_fn=_ignore_signals,
            # Of its own, so that the numbers that the caller draws do not depend on the workers.
            generator=torch.Generator(),
        )
        read = _from_workers(_begin(loader))
    else:
        read = (_Guarded(parts)[key] for key in keys)
    parts_read = iter(read)
    while True:
        with waiting_for_data():
            part = next(parts_read, None)
        if part is None:
            return
        if isinstance(part, DataError):
            raise part
        yield part


def _begin(loader: DataLoader[Any]) -> Any:
    """Start the workers of a loader; return torch's iterator over what they read."""
    # torch's handler of SIGCHLD raises in the middle of whatever this process computes; without it a worker's end is noticed
    # within seconds where its part is waited for, between two steps.
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if is_main_thread else None
    # Private names of torch below: it has no others for its processes and their end.
    parts: Any = iter(loader)
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
    return parts


def _from_workers(parts: Any) -> Iterator[Batch | DataError]:
    """Yield what workers read, which end with this generator.

    Raises:
        WorkerLostError: one of them was killed.
    """
    try:
        yield from parts
    except DataWaitError:
        # They sleep in the read that does not end, and would be waited for, for seconds each, before the run is saved.
        for process in parts._workers:
            process.kill()
        raise
    except (RuntimeError, OSError, EOFError) as error:
        # What a worker had announced and can no longer hand over is an error of the connection to it.
        is_named = "DataLoader worker (pid" in str(error)
        if not is_named and isinstance(error, RuntimeError):
            raise
        ends = _ends(parts._workers)
        if not is_named and all(end is None for end in ends):
            raise
        raise WorkerLostError(_how_lost(ends)) from None
    finally:
        # An error's traceback keeps the iterator, whose workers must not wait for the garbage collector.
        parts._shutdown_workers()


def _ends(processes: Sequence[multiprocessing.process.BaseProcess]) -> list[int | None]:
    """Return the exit statuses of processes, None of those that live; one that is just ending is waited for."""
    ended = multiprocessing.connection.wait([p.sentinel for p in processes], timeout=_ENDING_S)
    for process in processes:
        # The system closes the files of a process, by which its end is seen here, before it has a status.
        if process.sentinel in ended:
            process.join(_ENDING_S)
    return [process.exitcode for process in processes]


def _how_lost(ends: Iterable[int | None]) -> str:
    """Return what happened to the workers, given their exit statuses: None of those that live."""
    number = next((-end for end in ends if end is not None and end < 0), None)
    remedy = "use fewer --workers, or give the machine more memory"
    if number == signal.SIGKILL:
        return f"a process that reads data was killed, most often for want of memory; {remedy}"
    if number == signal.SIGBUS:
        return "a process that reads data found /dev/shm full; enlarge it (docker run --shm-size), or use fewer --workers"
    how = "ended" if number is None else f"was ended by signal {number}"
    return f"a process that reads data {how}; if memory was short, {remedy}"


class _Guarded:
    """Hands a DataError over as a value: raised in a worker, it would arrive wrapped in a page of traceback."""

    def __init__(self, parts: _Parts) -> None:
        self.parts = parts

    def __getitem__(self, key: Any) -> Batch | DataError:
        try:
            return self.parts[key]
        except DataError as error:
            return error


def _same(part: Any) -> Any:
    return part


def _ignore_signals(_: int) -> None:
    """Ctrl-C and a scheduler's signals reach every process of a run; whether to stop is for the main one to say.

    The main process itself ends its workers by SIGTERM, so that this one is obeyed if it comes from there.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # Blocked before the thread begins, so that it is the one to receive it: a handler would not know the sender.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
