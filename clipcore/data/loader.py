"""Batches: which samples a rank reads at a step, and reading them with worker processes.

Legend: B pairs on this rank, G = B * world_size pairs of the global batch, L tokens, S pixels of a side.

The state of the data is (seed, step). Step k reads positions k * G to (k + 1) * G of its epoch's order, and rank r reads
rows r * B to (r + 1) * B of them. The crop and caption of a sample depend only on (seed, epoch, sample). So any step can be
read on its own, and at a fixed global batch the number of workers or ranks does not change the training data.
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
from clipcore.data.choices import JUDGED_ROWS
from clipcore.data.order import SampleRandom, hash64, permutation
from clipcore.data.resample import Picture
from clipcore.data.transforms import ImageTransform, stack_images, was_transparent
from clipcore.ranks.signals import DataWaitError, data_arrived, waiting_for_data

# Rows that a worker reads at once. One whole large batch per worker would fill the memory and arrive late.
PART_ROWS = 256
MAX_REPLACEMENTS = 64
# How many unreadable samples the message that stops a run names.
SHOWN_REASONS = 5
# Seconds within which a worker with a broken connection ends, even on a busy machine.
_ENDING_S = 10.0

Tokenizer = Callable[[list[str]], Tensor]


@dataclass
class Batch:
    """The data of one step.

    Attributes:
        images: uint8 [B, 3, S, S]; ``normalize_images`` makes them the model's input, on the device.
        tokens: int64 [B, L].
        indices: int64 [B], the samples' indices in the source (for a replaced sample, its replacement).
        bad: (key, reason) of each sample that could not be read.
        num_transparent: pictures that were laid over white.
        owners: int64 [L'], the sample of each row of tokens, if samples have all their captions.
        keys: the samples' names, of ``eval_batches`` alone.
    """

    images: Tensor
    tokens: Tensor
    indices: Tensor
    bad: list[tuple[str, str]] = field(default_factory=list)
    num_transparent: int = 0
    owners: Tensor | None = None
    keys: list[str] = field(default_factory=list)


class Sample(NamedTuple):
    """A sample as read: the crop, the caption or captions, whether the picture was laid over white, and its name."""

    image: Picture
    captions: tuple[str, ...]
    was_transparent: bool
    key: str


class PairLoader:
    """The batches of one rank.

    Args:
        source: the pairs.
        transform: crops; its ``image_size`` is S.
        tokenizer: turns captions into token rows of one length, int64 [B, L].
        global_batch_size: pairs of a step on all ranks; the ranks' shares B differ by one pair at most.
        seed: determines the order, the crops, the choice among captions and the replacements.
        rank, world_size: this process's place among those that share the global batch.
        workers: number of worker processes; 0 reads in this process.
        max_bad_fraction: largest share of unreadable samples among those that this rank has read since the last
            ``batches``; above it the rank stops. It is checked after ``JUDGED_ROWS`` samples.
        trim_text: truncate token rows after the longest caption of this rank's batch, to a multiple of 8. The result does
            not change for a causal text tower with its feature at the end-of-text token, the largest id of a row.
        pin_memory: make page-locked batches, which are copied to a GPU while it computes [if CUDA is available].

    Attributes:
        share: the rows of a global batch that this rank reads.
        steps_per_epoch: whole global batches in the data; each epoch's order leaves out other samples.

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
        """Yield the batches from ``step`` on, counted from 0 over all epochs, without end.

        Raises:
            DataError: too many samples cannot be read; the message says why the first ones could not.
            WorkerLostError: a worker was killed. It is not restarted; ``batch`` can read the missing batch.
        """
        keys = ((k, *cut) for k in itertools.count(step) for cut in self._cuts)
        # Reads one batch and the beginning of the next ahead, so that no worker is idle.
        ahead = max(2 * self.workers, len(self._cuts) + min(len(self._cuts), 4))
        num_rows, bad = 0, list[tuple[str, str]]()
        # An error's traceback keeps this frame alive; its workers must not wait for the garbage collector.
        with contextlib.closing(_read(self._parts, keys, self.workers, ahead)) as parts:
            while True:
                batch = self._join(parts)
                num_rows += len(batch.indices)
                bad += batch.bad
                if num_rows >= JUDGED_ROWS and len(bad) > self.max_bad_fraction * num_rows:
                    raise too_many_bad(len(bad), num_rows, self._name, self.max_bad_fraction, bad)
                yield batch
                del batch  # freed before the next one is assembled

    def batch(self, step: int) -> Batch:
        """Return the batch of one step, read in this process."""
        keys = ((step, *cut) for cut in self._cuts)
        return self._join(_read(self._parts, keys, workers=0, ahead=0))

    def _join(self, parts: Iterator[Batch]) -> Batch:
        """Join the next parts into one batch; each part's images are freed before the next is taken."""
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
    """Return the error about a source with too many unreadable samples.

    Args:
        bad: (key, reason) of at least the first ones.
    """
    reasons = "; ".join(f"{key}: {reason}" for key, reason in bad[:SHOWN_REASONS])
    return DataError(
        f"{num_bad} of {num_samples} samples of {name} cannot be read, more than --max-bad-fraction "
        f"{max_fraction:g}: {reasons}"
    )


def share_of_rank(num_rows: int, rank: int, world_size: int) -> slice:
    """Return a rank's share of a number of rows; shares differ by one row at most."""
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
    start: int = 0,
    trim_text: bool = True,
) -> Generator[Batch, None, None]:
    """Yield a rank's share of a source, each sample once and in order: the ranks' shares, joined, are the source.

    Shares differ by one sample at most, and the last batch may be short. A sample that cannot be read is skipped and named
    in ``bad``, so a batch may be empty. The arguments are those of ``PairLoader``, and:

    Args:
        all_captions: return a row of tokens for each caption of a sample, with ``owners``; else only for its first one.
        start: samples of the share to leave out, at its beginning.
        trim_text: see ``PairLoader``.
    """
    share = share_of_rank(len(source), rank, world_size)
    starts = range(share.start + start, share.stop, batch_size)
    keys = ((at, min(at + batch_size, share.stop)) for at in starts)
    parts = _OrderedParts(_Reader(source, transform, tokenizer), all_captions)
    for part in _read(parts, keys, workers, 2 * workers):
        if len(part.indices) and trim_text:
            part.tokens = trim_tokens(part.tokens)
        yield part


def no_tokens(captions: Sequence[str]) -> Tensor:
    """Return one token per caption, [B, 1]; replaces a tokenizer where captions are not used."""
    return torch.zeros(len(captions), 1, dtype=torch.long)


def trim_tokens(tokens_BL: Tensor) -> Tensor:
    """Return token rows truncated after the last end-of-text token, the largest id of a row, to a multiple of 8."""
    longest = int(tokens_BL.argmax(-1).max()) + 1
    return tokens_BL[:, : min(-(-longest // 8) * 8, tokens_BL.shape[1])].contiguous()


class _Reader:
    """Reads samples into arrays, given their indices."""

    def __init__(self, source: PairSource, transform: ImageTransform, tokenizer: Tokenizer) -> None:
        self.source = source
        self.transform = transform
        self.tokenizer = tokenizer

    def sample(self, index: int, rng: np.random.Generator | None) -> Sample:
        """Return a sample with one caption drawn by ``rng``, or with all if it is None; raise BadSample with its key."""
        data_arrived()  # the previous sample's data
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
            return Sample(crop, captions, was_transparent(pair.image), key)
        except BadSample as error:
            raise BadSample(error.reason, error.key or key) from None

    def batch(
        self, samples: Sequence[Sample], indices: np.ndarray, all_captions: bool = False
    ) -> Batch:
        """Return samples as arrays, without rows if there are no samples."""
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
    """Maps each key to a part of a batch; a map-style data set for DataLoader."""

    def __getitem__(self, key: Any) -> Batch | DataError: ...


class _TrainingParts:
    """Maps (step, first row, end row) to that part of this rank's batch."""

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
        """Return the first readable replacement of a bad sample; it depends only on the sample and the epoch."""
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
    """Maps (first index, end index) to the readable samples among them."""

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
        batch.bad, batch.keys = bad, [sample.key for sample in samples]
        return batch


def _cuts(batch_size: int) -> list[tuple[int, int]]:
    """Return the rows of a batch in parts of at most PART_ROWS and similar size."""
    num_parts = -(-batch_size // PART_ROWS)
    ends = [batch_size * i // num_parts for i in range(num_parts + 1)]
    return list(itertools.pairwise(ends))


def _read(
    parts: _Parts, keys: Iterable[Any], workers: int, ahead: int
) -> Generator[Batch, None, None]:
    """Yield the parts of the keys in order, read by worker processes that keep ``ahead`` parts ready."""
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
            # A separate generator, so that the caller's random numbers do not depend on the workers.
            generator=torch.Generator(),
        )
        read = _from_workers(_start_workers(loader))
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


def _start_workers(loader: DataLoader[Any]) -> Any:
    """Start the workers of a loader; return torch's iterator over their results."""
    # torch's SIGCHLD handler raises at any point of this process's work. Without it, a worker's death is still noticed
    # within seconds, where this process waits for the worker's part, between two steps.
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if is_main_thread else None
    # The names below are private to torch, which has no public ones for its workers and their shutdown.
    parts: Any = iter(loader)
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
    return parts


def _from_workers(parts: Any) -> Iterator[Batch | DataError]:
    """Yield the parts that workers read; the workers end with this generator.

    Raises:
        WorkerLostError: one of them was killed.
    """
    try:
        yield from parts
    except DataWaitError:
        # The workers hang in a read that does not end; torch would wait seconds for each before the run is saved.
        for process in parts._workers:
            process.kill()
        raise
    except (RuntimeError, OSError, EOFError) as error:
        # If a worker has announced a part but died before its transfer, the connection to it fails.
        is_named = "DataLoader worker (pid" in str(error)
        if not is_named and isinstance(error, RuntimeError):
            raise
        ends = _ends(parts._workers)
        if not is_named and all(end is None for end in ends):
            raise
        raise WorkerLostError(_describe_loss(ends)) from None
    finally:
        # An error's traceback keeps the iterator alive; its workers must not wait for the garbage collector.
        parts._shutdown_workers()


def _ends(processes: Sequence[multiprocessing.process.BaseProcess]) -> list[int | None]:
    """Return the exit statuses of processes, None for live ones; wait for a process that is just ending."""
    ended = multiprocessing.connection.wait([p.sentinel for p in processes], timeout=_ENDING_S)
    for process in processes:
        # The system closes a process's files, which is noticed here, before its exit status is available.
        if process.sentinel in ended:
            process.join(_ENDING_S)
    return [process.exitcode for process in processes]


def _describe_loss(ends: Iterable[int | None]) -> str:
    """Return what happened to the workers, given their exit statuses (None for live ones)."""
    number = next((-end for end in ends if end is not None and end < 0), None)
    remedy = "use fewer --workers, or give the machine more memory"
    if number == signal.SIGKILL:
        return f"a process that reads data was killed, usually because memory ran out; {remedy}"
    if number == signal.SIGBUS:
        return "a process that reads data found /dev/shm full; enlarge it (docker run --shm-size), or use fewer --workers"
    how = "ended" if number is None else f"was ended by signal {number}"
    return f"a process that reads data {how}; if memory ran out, {remedy}"


class _Guarded:
    """Returns a DataError as a value: raised in a worker, it would arrive wrapped in a long traceback."""

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
    """Ignore Ctrl-C and a scheduler's signals, which reach every process of a run: the main process decides when to stop.

    The main process ends its workers with SIGTERM, so that signal is obeyed if the main process sent it.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # Blocked before the thread starts, so that the thread receives it with its sender, which a handler would not learn.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
