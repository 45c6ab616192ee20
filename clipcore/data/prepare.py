"""``python -m clipcore.data.prepare``: converts any source of pairs to tar shards of small JPEGs or raw pixels.

A shard is a fixed range of the source's samples, and depends only on them and the settings: neither the number of
processes nor an interruption changes a byte. ``manifest.json`` in the output folder holds the settings, the source's
identity, and for each finished shard its size, its SHA-256 and the samples that could not be read.

Exit status:
    0: the shards are finished
    1: ``--check`` found a shard that is damaged or missing
    2: a mistake of the user, see ``clipcore.ranks.failures``
    128 + n: stopped by signal n; finished shards are kept
"""

from __future__ import annotations

from clipcore.data.prepare_arguments import parse_command_line
from clipcore.terminal import (
    answer_early,
    check_whole_numbers,
    complain,
    printable_lines,
    steady_output,
)

if __name__ == "__main__":
    answer_early(parse_command_line)

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import PIL

from clipcore.checkpoint import run_lock
from clipcore.data import DataError, PairSource
from clipcore.data.choices import DEFAULT_CAPTION_KEY, DEFAULT_IMAGE_KEY
from clipcore.data.embedded import EMBEDDED
from clipcore.data.folders import walk
from clipcore.data.pictures import num_pictures
from clipcore.data.random_access import state_of
from clipcore.data.shards import (
    ImageFormat,
    ShardReport,
    fault_of,
    remove_temporaries,
    write_shard,
)
from clipcore.data.sources import (
    expand_pattern,
    is_folder,
    left_out_of,
    list_shards,
    noted_of,
    open_source,
)
from clipcore.data.transforms import EARLIER_MAX_PIXELS, MAX_PIXELS, REDUCING_GAP
from clipcore.files import read_regular, write_durably
from clipcore.progress import Progress
from clipcore.ranks.failures import end_with

MANIFEST = "manifest.json"
_MOST_SHARDS = 1 << 24  # of a folder that is compared
_SAVE_EVERY_S = 10.0
_POLL_S = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Settings:
    """The settings that, with the source, determine the bytes of the shards."""

    image_format: ImageFormat
    shard_size: int
    decoder: str = "pillow"
    dataset_type: str = "auto"
    img_key: str = DEFAULT_IMAGE_KEY
    caption_key: str = DEFAULT_CAPTION_KEY
    separator: str | None = None
    quotes: bool = True
    max_pixels: int = MAX_PIXELS

    def open(self, train_data: str) -> PairSource:
        """Return the pairs, as the training would open them."""
        if train_data in EMBEDDED:
            return EMBEDDED[train_data].open("train")
        return open_source(
            train_data,
            self.dataset_type,
            img_key=self.img_key,
            caption_key=self.caption_key,
            separator=self.separator,
            quotes=self.quotes,
            decoder=self.decoder,
            min_side=REDUCING_GAP * self.image_format.size,
            max_pixels=self.max_pixels,
        )

    def flags(self) -> dict[str, Any]:
        """Return the settings by their flags; a raw shard has no quality."""
        image = self.image_format
        found: dict[str, Any] = {"--format": image.kind, "--size": image.size}
        if image.kind == "jpeg":
            found["--quality"] = image.quality
        return found | {
            "--shard-size": self.shard_size,
            "--image-decoder": self.decoder,
            "--dataset-type": self.dataset_type,
            "--csv-img-key": self.img_key,
            "--csv-caption-key": self.caption_key,
            # None is recorded as a tab, as in older manifests; the table determines the separator.
            "--csv-separator": "\t" if self.separator is None else self.separator,
            "--csv-no-quotes": not self.quotes,
            "--max-pixels": self.max_pixels,
        }


def source_identity(train_data: str, source: PairSource) -> dict[str, Any]:
    """Return the identity of a source and its state: the number of samples, and a digest over its files.

    The digest covers names, sizes and modification times of tables and shards. Of a folder of images it covers only the
    names, because a stat of ten million files takes minutes.
    """
    digest = hashlib.sha256()
    for part in train_data.split("::"):
        generated = part in EMBEDDED or source.name == "synthetic"
        for path in [] if generated else expand_pattern(part):
            for name in _files(path):
                digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return {"samples": len(source), "files": digest.hexdigest()}


_OWN = (
    *(".clipcore-index", ".clipcore-labels-cls", ".clipcore-labels-npy", ".clipcore-arrow"),
    *(".clipcore-rows", ".clipcore-rows.lock"),
)


def _files(path: str) -> Iterator[str]:
    """Yield the names, and the state of tables and shards, of the files in one part of a source, in order."""
    shards = list_shards(path) if is_folder(path) else [path]
    for shard in shards:
        state = state_of(shard)
        yield f"{os.path.basename(shard)} {state.size} {state.version}"
    if not shards:
        for folder, names in walk(path):
            yield from (os.path.join(folder, name) for name in names if not name.endswith(_OWN))


# Defaults for flags that older manifests do not have.
_BEFORE_FLAGS = {"--csv-no-quotes": False, "--max-pixels": EARLIER_MAX_PIXELS}


def _report_of(record: Any) -> ShardReport:
    """Return the report of a shard from its JSON; raise TypeError for wrong types."""
    report = ShardReport(**record)
    counts = (report.pairs, report.bytes, report.transparent)
    if not all(type(count) is int and count >= 0 for count in counts):
        raise TypeError("a shard's counts are not numbers")
    if not isinstance(report.sha256, str) or not re.fullmatch("(?:[0-9a-f]{64})?", report.sha256):
        raise TypeError("a shard's sha256 is not one")
    for case in report.bad if isinstance(report.bad, list) else (None,):
        if not isinstance(case, list) or list(map(type, case)) != [int, str, str]:
            raise TypeError("a shard's bad samples are not a list of numbers, keys and reasons")
    return report


def _read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, ShardReport]]:
    """Return the manifest of a folder, and its reports by the shards' names; raise DataError."""
    path = folder / MANIFEST
    try:
        content = json.loads(read_regular(path))
        shards = {name: _report_of(record) for name, record in content["shards"].items()}
        parts = (content["settings"], content["source"], content.get("versions", {}))
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError("settings, source and versions are not objects")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"cannot read {path} ({error}); choose another --output") from None
    return content, shards


class Manifest:
    """The record of an output folder, ``manifest.json``.

    Args:
        folder: the output folder.
        settings, identity: the settings and the source's identity in this call.

    Attributes:
        shards: the report of each finished shard by its file's name; those of an earlier call are still to be compared
            with the files, see ``drop``.
        made: the number of pairs that this call has written.

    Raises:
        DataError: the folder was begun with other settings or another source, or holds shards of unknown origin.
    """

    def __init__(self, folder: Path, settings: Settings, identity: dict[str, Any]) -> None:
        self.path = folder / MANIFEST
        self.content: dict[str, Any] = {
            "settings": settings.flags(),
            "source": identity,
            "versions": _versions(settings.decoder),
        }
        self.shards: dict[str, ShardReport] = {}
        self.made = 0
        self._saved_at = 0.0
        self._earlier_versions = self.content["versions"]
        if self.path.exists():
            self._continue()
        elif shards := sorted(folder.glob("*.tar")):
            raise DataError(
                f"{folder} holds shards, such as {shards[0].name}, but no {MANIFEST}; choose an empty --output"
            )

    def _continue(self) -> None:
        """Continue from the finished shards of an earlier call."""
        folder = self.path.parent
        earlier, self.shards = _read_manifest(folder)
        settings, identity = earlier["settings"], earlier["source"]
        for flag, value in self.content["settings"].items():
            before = settings.get(flag, _BEFORE_FLAGS.get(flag))
            if before != value:
                raise DataError(
                    f"{folder} was begun with {flag} {before}, now it is {value}; use the old value to continue, or choose "
                    "another --output"
                )
        if identity != self.content["source"]:
            raise DataError(
                f"{folder} was begun with another source or another state of it ({identity.get('samples')} samples then, "
                f"{self.content['source']['samples']} now); use that one to continue, or choose another --output"
            )
        self._earlier_versions = earlier.get("versions", self.content["versions"])

    def drop(self, names: Iterable[str]) -> None:
        """Forget the shards of an earlier call that are to be made again."""
        for name in names:
            del self.shards[name]
        if self.shards:
            self.content["versions"] = self._earlier_versions

    def check_versions(self, here: dict[str, str]) -> None:
        """Raise DataError if the decoders or encoders differ from those that made the finished shards."""
        if here != self.content["versions"]:
            then, now = (
                ", ".join(f"{name} {version}" for name, version in versions.items())
                for versions in (self.content["versions"], here)
            )
            raise DataError(
                f"{self.path.parent} was begun with {then}, here is {now}, whose pixels may differ; install those "
                "versions to continue, or choose another --output"
            )

    def add(self, name: str, report: ShardReport) -> None:
        """Record a finished shard; a recorded shard that is not on the disk after a crash is made again."""
        self.shards[name] = report
        self.made += report.pairs
        if time.monotonic() > self._saved_at + _SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Rewrite the whole file atomically."""
        shards = {name: dataclasses.asdict(self.shards[name]) for name in sorted(self.shards)}
        content = json.dumps(self.content | {"shards": shards}, indent=1) + "\n"
        try:
            write_durably(self.path, content.encode())
        except OSError as error:
            raise DataError(
                f"cannot write {self.path}: {error.strerror}; fix that, and the same command continues"
            ) from None
        self._saved_at = time.monotonic()


def shard_names(num_shards: int) -> list[str]:
    """Return the names of the shards, with enough digits for all and at least as many as img2dataset uses."""
    width = max(5, len(str(num_shards - 1)))
    return [f"{number:0{width}d}.tar" for number in range(num_shards)]


def prepare(
    train_data: str,
    output: Path,
    settings: Settings,
    workers: int = 1,
    quiet: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Make the shards that do not exist yet, and those that are damaged.

    Args:
        train_data: a value as for ``--train-data``.
        output: the folder, which may exist.
        workers: number of processes; 1 works in this process.
        quiet: show no progress bar.
        say: takes a line for each shard of an earlier call that is made again, and one about those without a hash.

    Raises:
        DataError: the source cannot be read, or the output cannot be written or was begun with other settings.
        CheckpointError: another process writes to the output folder.
    """
    source = settings.open(train_data)
    _check_place(train_data, output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {output}: {error.strerror}") from None
    with run_lock(output):
        manifest = Manifest(output, settings, source_identity(train_data, source))
        manifest.content["not used"] = str(left_out_of(source))
        manifest.content["noted"] = str(noted_of(source))
        manifest.content["pictures"] = num_pictures(source)
        size = settings.shard_size
        jobs = [
            _Job(output / name, range(i * size, min((i + 1) * size, len(source))))
            for i, name in enumerate(shard_names(-(-len(source) // size)))
        ]
        damaged = dict(_faults(output, manifest.shards, workers, quiet))
        manifest.drop(list(damaged))
        if unknown := _without_hash(manifest.shards):
            say(unknown)
        missing = [job for job in jobs if job.path.name not in manifest.shards]
        if missing:
            manifest.check_versions(_versions(settings.decoder))
        for name, fault in damaged.items():
            say(f"{output / name} {fault}; it is made again")
        remove_temporaries(output)
        manifest.save()
        done = sum(len(job.rows) for job in jobs) - sum(len(job.rows) for job in missing)
        bar = Progress(len(source), "pairs", initial=done, quiet=quiet, stays=True)
        try:
            # Closed immediately on an interruption, because that stops the processes.
            with bar, closing(_run(missing, source, settings.image_format, workers, bar)) as runs:
                for job, report in runs:
                    manifest.add(job.path.name, report)
        finally:
            manifest.save()
    if not any(report.pairs for report in manifest.shards.values()):
        _, key, reason = manifest.shards[jobs[0].path.name].bad[0]
        raise DataError(
            f"none of the {len(source)} samples of {source.name} could be read, such as {key}: {reason}; "
            f"{manifest.path} lists them"
        )
    return manifest


def check(output: Path, workers: int = 1, quiet: bool = True) -> tuple[list[str], str]:
    """Compare the shards of a folder with its manifest, by size and SHA-256; nothing is written.

    Args:
        output: a folder that ``prepare`` has made.
        workers: number of threads that read.
        quiet: show no progress bar.

    Returns:
        A line for each shard that is damaged, missing or not made yet; and a line that sums up.

    Raises:
        DataError: the folder has no manifest that can be read.
    """
    if not (output / MANIFEST).exists():
        raise DataError(f"{output} has no {MANIFEST}, so clipcore.data.prepare has not made it")
    content, shards = _read_manifest(output)
    samples, size = content["source"].get("samples"), content["settings"].get("--shard-size")
    is_right = type(samples) is int and type(size) is int and samples >= 0 and size > 0
    if not is_right or samples > size * _MOST_SHARDS:
        raise DataError(f"cannot read {output / MANIFEST} (no number of samples or --shard-size)")

    found = dict(_faults(output, shards, workers, quiet))
    names = shard_names(-(-samples // size))
    found |= {name: "is not made yet" for name in names if name not in shards}
    lines = [f"{output / name} {found[name]}" for name in sorted(found)]
    if lines:
        summary = (
            f"{len(lines)} of {len(names)} shards are damaged or missing; the command that made the others, without "
            "--check, makes them again"
        )
    else:
        num_bytes = sum(report.bytes for report in shards.values())
        summary = f"{len(shards)} shards, {num_bytes / 1e9:.3g} GB: all are as they were written"
    if unknown := _without_hash(shards):
        summary += f"; {unknown}"
    return lines, summary


def _faults(
    folder: Path, shards: Mapping[str, ShardReport], workers: int, quiet: bool
) -> Iterator[tuple[str, str]]:
    """Yield the name of each shard that is damaged or missing, and what is wrong with it, in their order."""
    names = sorted(shards)
    # Threads, since both reading and hashing release the interpreter's lock.
    threads = ThreadPoolExecutor(workers)
    try:
        faults = threads.map(lambda name: fault_of(folder / name, shards[name]), names)
        with Progress(len(names), "shards", "comparing", quiet=quiet or not names) as shown:
            for name, fault in zip(names, faults, strict=True):
                shown.update()
                if fault is not None:
                    yield name, fault
    finally:
        threads.shutdown(cancel_futures=True)


def _without_hash(shards: Mapping[str, ShardReport]) -> str:
    """Return a note on the shards that an earlier version made without a hash; empty if there are none."""
    number = sum(not report.sha256 for report in shards.values())
    if not number:
        return ""
    return (
        f"{number} shards of an earlier version have no checksums, and only their sizes were compared; to have them, delete "
        "these shards and make them again"
    )


def _check_place(train_data: str, output: Path) -> None:
    """Raise DataError if the shards would become part of their own source, or if --train-data could not name them."""
    if "::" in str(output) or any(brace in str(output) for brace in "{}"):
        raise DataError(
            f"--output {output}: --train-data reads '::' as a list and braces as a range; choose a name without them"
        )
    for part in train_data.split("::"):
        is_images = is_folder(part) and not list_shards(part)
        if is_images and output.resolve().is_relative_to(Path(part).resolve()):
            raise DataError(
                f"--output {output} lies in the folder of images {part}, whose next listing would hold it too; choose one "
                "outside of it"
            )


def _versions(image_decoder: str) -> dict[str, str]:
    """Return the versions that the bytes of a shard depend on besides its source and settings."""
    versions = {"Pillow": PIL.__version__}
    if image_decoder != "pillow":
        versions[image_decoder] = importlib.metadata.version(image_decoder)
    return versions


@dataclass(frozen=True)
class _Job:
    """A shard to be made, with its samples."""

    path: Path
    rows: range


_Reports = Generator[tuple[_Job, ShardReport], None, None]


def _run(
    jobs: list[_Job], source: PairSource, image_format: ImageFormat, workers: int, bar: Progress
) -> _Reports:
    """Yield each job with its report, as the jobs finish."""
    if workers > 1 and len(jobs) > 1:
        yield from _Pool(source, image_format, min(workers, len(jobs))).run(jobs, bar)
        return
    for job in jobs:
        yield job, write_shard(job.path, source, job.rows, image_format, bar.update)


class _Stopped(Exception):
    """The main process has stopped the work."""


class _Pool:
    """Processes that write shards, and the state shared with them: samples done, and whether to stop."""

    def __init__(self, source: PairSource, image_format: ImageFormat, workers: int) -> None:
        # Forked, so that all processes share one copy of the source's tables.
        context = multiprocessing.get_context("fork")
        self._done = context.Value("q", 0)
        self._stop = context.Value("b", 0, lock=False)
        self._workers = workers
        self._executor = ProcessPoolExecutor(
            workers,
            context,
            initializer=_initialise_process,
            initargs=(source, image_format, self._done, self._stop, os.getpid()),
        )

    def run(self, jobs: list[_Job], bar: Progress) -> _Reports:
        waiting, running = iter(jobs), dict[Future[ShardReport], _Job]()
        shown = 0
        try:
            while True:
                while len(running) < 2 * self._workers and (job := next(waiting, None)) is not None:
                    with _signals_held():  # the first call forks
                        running[self._executor.submit(_write, job)] = job
                if not running:
                    return
                finished, _ = wait(running, _POLL_S, FIRST_COMPLETED)
                done = self._done.value
                bar.update(done - shown)
                shown = done
                for future in finished:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed, usually because memory ran out; run the command again with fewer --workers"
            ) from None
        finally:
            self._stop.value = 1
            self._executor.shutdown(cancel_futures=True)


def _initialise_process(
    source: PairSource, image_format: ImageFormat, done: Any, stop: Any, main: int
) -> None:
    """Initialise a process of the pool."""
    # Ctrl-C reaches all processes of a terminal; only the main one handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(main,), daemon=True).start()
    _process.update(source=source, image_format=image_format, done=done, stop=stop)


# The initial arguments of a process of the pool.
_process: dict[str, Any] = {}


def _end_with_parent(main: int) -> None:
    """End this process when the main one was killed."""
    while os.getppid() == main:
        time.sleep(0.5)
    os._exit(1)


def _write(job: _Job) -> ShardReport:
    def tick() -> None:
        if _process["stop"].value:
            raise _Stopped
        with _process["done"].get_lock():
            _process["done"].value += 1

    return write_shard(job.path, _process["source"], job.rows, _process["image_format"], tick)


def _settings(parsed: argparse.Namespace) -> Settings:
    numbers = ("size", "shard_size", "workers", "max_pixels")
    check_whole_numbers(parsed, (*numbers, "quality"))
    for name in numbers:
        if getattr(parsed, name) < 1:
            flag = f"--{name.replace('_', '-')}"
            raise DataError(f"{flag} must be at least 1, got {getattr(parsed, name)}")
    if not 1 <= parsed.quality <= 100:
        raise DataError(f"--quality must lie between 1 and 100, got {parsed.quality}")
    return Settings(
        ImageFormat(parsed.format, parsed.size, parsed.quality),
        parsed.shard_size,
        parsed.image_decoder,
        parsed.dataset_type,
        parsed.csv_img_key,
        parsed.csv_caption_key,
        parsed.csv_separator,
        not parsed.csv_no_quotes,
        parsed.max_pixels,
    )


def summary(manifest: Manifest, made: int, seconds: float) -> str:
    """Return the lines about the finished shards: their size, the speed, and the command to train on them.

    Args:
        made: the number of pairs that this call wrote in ``seconds``.
    """
    folder, names = manifest.path.parent, sorted(manifest.shards)
    reports = manifest.shards.values()
    pairs = sum(report.pairs for report in reports)
    num_bytes, bad = sum(r.bytes for r in reports), sum(len(r.bad) for r in reports)
    stems = [name.removesuffix(".tar") for name in (names[0], names[-1])]
    pattern = names[0] if len(names) == 1 else f"{{{stems[0]}..{stems[1]}}}.tar"
    lines = [
        f"{pairs} pairs in {len(names)} shards, {num_bytes / 1e9:.3g} GB; {made} of them now, "
        f"{made / max(seconds, 1e-9):.0f} pairs/s"
    ]
    if noted := manifest.content["noted"]:
        lines.append(f"read: {noted}")
    if unused := manifest.content["not used"]:
        lines.append(f"not used: {unused}")
    rows, named = manifest.content["source"]["samples"], manifest.content["pictures"]
    if named is not None and named < rows:
        lines.append(
            f"{rows} rows name {named} pictures, and each is a pair of its own here: for training; evaluate retrieval on "
            "the table itself"
        )
    if transparent := sum(report.transparent for report in reports):
        lines.append(f"{transparent} pictures are transparent and were laid over white")
    if bad:
        lines.append(
            f"{bad} samples could not be read and are left out; {manifest.path} lists them"
        )
    lines.append(f"train on them with --train-data {shlex.quote(str(folder / pattern))}")
    return "\n".join(lines)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Delay signals in the enclosed code: a fork runs hooks of other modules, which swallow a signal's exception.

    The mask of this thread is not enough, because another thread would receive the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {n: signal.signal(n, lambda number, _: came.append(number)) for n in _SIGNALS}
    try:
        yield
    finally:
        for held, handler in handlers.items():
            signal.signal(held, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def _interrupt(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


@steady_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status, see ``clipcore.ranks.failures``."""
    parsed = parse_command_line(arguments)
    previous = {n: signal.signal(n, _interrupt) for n in _SIGNALS}
    start = time.perf_counter()
    try:
        settings = _settings(parsed)
        if parsed.check:
            lines, found = check(parsed.output, parsed.workers, parsed.quiet)
            print(printable_lines("\n".join([*lines, found])))
            return 1 if lines else 0

        def say(line: str) -> None:
            complain("clipcore.data.prepare", line)

        manifest = prepare(
            parsed.source,
            parsed.output,
            settings,
            workers=parsed.workers,
            quiet=parsed.quiet,
            say=say,
        )
        print(printable_lines(summary(manifest, manifest.made, time.perf_counter() - start)))
    except KeyboardInterrupt as interrupt:
        kept = "; finished shards are kept, and the same command continues"
        complain("clipcore.data.prepare", "stopped" + ("" if parsed.check else kept))
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    except Exception as error:
        return end_with("clipcore.data.prepare", error, "take fewer --workers")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
