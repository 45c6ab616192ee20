"""Files of a run and of its data with a change in them: it is seen, and what was whole is gone back to or made again."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import random
import re
import shutil
import struct
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from runs import NANO, final_state
from shards import picture, write_csv, write_parquet, write_tar

from attack.harness import Attack, one_line, redirected
from clipcore import train
from clipcore.checkpoint import (
    Checkpoint,
    CheckpointError,
    UnreadableError,
    load_checkpoint,
    load_latest,
)
from clipcore.data import BadSample, DataError, PairSource, tar
from clipcore.data.parquet import ParquetSource
from clipcore.data.prepare import Settings, prepare
from clipcore.data.raw import encode_raw
from clipcore.data.shards import ImageFormat
from clipcore.data.tar import TarSource, load_index
from clipcore.data.transforms import EARLIER_MAX_PIXELS
from clipcore.ranks.distributed import World
from clipcore.run.config import ConfigError, TrainConfig
from clipcore.run.faults import newest_sound
from clipcore.run.folders import LAUNCH_SETTINGS, resumed_config
from clipcore.run.metrics import LogError, compare_log, read_metrics
from clipcore.run.state import load_run, log_mark
from clipcore.tokenizer import Tokenizer

T = TypeVar("T")

ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


# Changes of bytes. Each may give back what it was given; ``changed`` then draws again.


def flip_bit(draw: random.Random, content: bytes) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def change_byte(draw: random.Random, content: bytes) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + draw.randbytes(1) + content[at + 1 :]


def change_block(draw: random.Random, content: bytes) -> bytes:
    start, stop = block(draw, content)
    return content[:start] + draw.randbytes(stop - start) + content[stop:]


def cut_off(draw: random.Random, content: bytes) -> bytes:
    return content[: draw.randrange(len(content))]


def zero_block(draw: random.Random, content: bytes) -> bytes:
    start, stop = block(draw, content)
    return content[:start] + bytes(stop - start) + content[stop:]


def append(draw: random.Random, content: bytes) -> bytes:
    return content + draw.choice([bytes(4096), content, draw.randbytes(draw.randrange(1, 64))])


def insert(draw: random.Random, content: bytes) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + draw.randbytes(draw.randrange(1, 64)) + content[at:]


def swap_blocks(draw: random.Random, content: bytes) -> bytes:
    ends = sorted(draw.randrange(len(content) + 1) for _ in range(4))
    a, b, c, d = ends
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def repeat_block(draw: random.Random, content: bytes) -> bytes:
    start, stop = block(draw, content)
    return content[:stop] + content[start:stop] + content[stop:]


def drop_block(draw: random.Random, content: bytes) -> bytes:
    start, stop = block(draw, content)
    return content[:start] + content[stop:]


def block(draw: random.Random, content: bytes) -> tuple[int, int]:
    """Return where a part of a quarter at most begins and ends."""
    size = draw.randrange(1, max(len(content) // 4, 2))
    start = draw.randrange(max(len(content) - size, 1))
    return start, min(start + size, len(content))


CHANGES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "bit": flip_bit,
    "byte": change_byte,
    "block": change_block,
    "cut": cut_off,
    "zeros": zero_block,
    "appended": append,
    "inserted": insert,
    "swapped": swap_blocks,
    "repeated": repeat_block,
    "dropped": drop_block,
}
# What may have a file's name in its place; "other" is a file of the same name from elsewhere.
REPLACEMENTS = (
    "emptied",
    "removed",
    "folder",
    "pipe",
    "other",
    "link to other",
    "link to nothing",
    "link to itself",
)


def changed(kind: str, seed: int, content: bytes) -> bytes:
    """Return other bytes, by a change of ``CHANGES``."""
    draw = random.Random(f"{kind} {seed}")
    while (result := CHANGES[kind](draw, content)) == content:
        pass
    return result


def mutate(path: Path, kind: str, seed: int, other: Path) -> None:
    """Change a file, or put something else in its place."""
    if kind in CHANGES:
        path.write_bytes(changed(kind, seed, path.read_bytes()))
        return
    path.unlink()
    if kind == "emptied":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "other":
        shutil.copy2(other, path)
    elif kind == "link to other":
        path.symlink_to(other)
    elif kind == "link to nothing":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "link to itself":
        path.symlink_to(path.name)
    else:
        assert kind == "removed", kind


def kinds(num_seeds: int) -> list[tuple[str, int]]:
    """Return all ways to change a file, those that are drawn so many times."""
    return [*itertools.product(CHANGES, range(num_seeds)), *((kind, 0) for kind in REPLACEMENTS)]


def content_of(path: Path) -> bytes | None:
    """Return the bytes of a regular file, links followed; None of anything else."""
    return path.read_bytes() if path.is_file() else None


def refusal(call: Callable[[], object], *expected: type[Exception]) -> str:
    """Return the one line of a refusal; raise if the call succeeds or fails otherwise."""
    try:
        call()
    except expected as error:
        return line_of(error)
    raise AssertionError("it was taken")


def line_of(error: Exception) -> str:
    """Return what an error says, with the file that an OSError is about; raise unless it is one line."""
    text = str(error)
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}"
    assert text and len(text.splitlines()) == 1 and len(text) < 2000, f"said {text[:500]!r}"
    return text


def quietly(call: Callable[[], T]) -> T:
    """Return what a call returns, its warnings unsaid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def assert_same_tensors(checkpoint: Checkpoint, expected: Checkpoint) -> None:
    assert (
        checkpoint.state == expected.state and checkpoint.tensors.keys() == expected.tensors.keys()
    )
    for group, tensors in expected.tensors.items():
        assert checkpoint.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.tensors[group][name], tensor), f"{group}: {name} differs"


# Runs to be changed.

STEPS = 5
NEWEST, BEFORE = f"checkpoints/step_{STEPS:08d}", f"checkpoints/step_{STEPS - 1:08d}"
# Of the captions in shards.py.
MERGES = (
    "r e,re d</w>,g r,e e,gr ee,gree n</w>,b l,bl u,blu e</w>,n u,nu m,num b,numb e,numbe r</w>"
)


def write_vocabulary(path: Path) -> Path:
    """Write a vocabulary, by hand: a library that makes one would start threads in this process."""
    path.write_text("\n".join(["#version: 0.2", *MERGES.split(",")]))
    return path


def run_flags(folder: Path, *more: str) -> list[str]:
    """Return the command line of a run of five steps an epoch, whose epochs do not depend on how many there are."""
    table = folder / "data" / "pairs.csv"
    if not table.exists():
        write_csv(folder / "data", num_pairs=4 * STEPS)
    line = ["--train-data", str(table), "--val-data", str(table), *NANO]
    line += "--val-frequency 1 --batch-size 4 --epochs 1 --lr 1e-3 --save-every-steps 1".split()
    line += "--lr-scheduler const --warmup 0 --ema-decay 0.9".split()
    return [*line, "--logs", str(folder), *more]


def in_a_child(act: Callable[[], int], output: Path) -> tuple[int, str]:
    """Call a function in a process of its own; return its status, or minus a signal, and what it wrote, also from C."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        status = 1
        try:
            with redirected(output):
                try:
                    status = act()
                except SystemExit as error:  # argparse's
                    status = error.code if isinstance(error.code, int) else 1
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended), output.read_text(errors="replace")


def trained(arguments: list[str], output: Path) -> tuple[int, str]:
    """Make a run of ``clipcore.train`` in a process of its own; return its status and what it wrote."""
    return in_a_child(lambda: train.main(arguments), output)


def finish(arguments: list[str], output: Path) -> None:
    """Make a run that succeeds."""
    status, text = trained(arguments, output)
    assert status == 0, text


class Mutations(Attack):
    """One file of a finished run has changed: a checkpoint's, its log, its settings or its vocabulary."""

    fast: ClassVar[int] = 30

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        vocabulary = write_vocabulary(folder / "vocabulary.txt")
        output = folder / "output"
        finish(run_flags(folder, "--name", "run", "--tokenizer", str(vocabulary)), output)
        finish(run_flags(folder, "--name", "other", "--seed", "1", "--lr", "2e-3"), output)
        self.run, self.other = folder / "run", folder / "other"
        self.checkpoints = {path: load_checkpoint(self.run / path) for path in (BEFORE, NEWEST)}

        # Gone on with as it is, to be compared with those that went back by a step before.
        straight = shutil.copytree(self.run, folder / "straight")
        finish(["--resume", str(straight), "--epochs", "2"], output)
        self.tensors, self.rows = final_state(straight)

    def cases(self) -> Mapping[str, Any]:
        parts = [f"{NEWEST}/{path.name}" for path in sorted((self.run / NEWEST).iterdir())]
        files = dict.fromkeys(parts, self._try_checkpoint)
        files |= {"metrics.jsonl": self._try_log, "vocabulary.txt.gz": self._try_vocabulary}
        files["config.json"] = self._try_settings
        cases = {
            f"{path}, {kind}, {seed}": (path, kind, seed, attempt)
            for path, attempt in files.items()
            for kind, seed in kinds(16)
        }
        return cases | {
            f"resumed, {path}, {kind}, {seed}": (path, kind, seed, self._try_resume)
            for path in files
            for kind, seed in kinds(3)
        }

    def attempt(self, what: Any, folder: Path) -> str:
        path, kind, seed, attempt = what
        run = shutil.copytree(self.run, folder / "run")
        other = self.run / BEFORE / Path(path).name
        mutate(run / path, kind, seed, other if path.startswith(NEWEST) else self.other / path)
        return attempt(run, path)

    def _try_checkpoint(self, run: Path, path: str) -> str:
        newest = run / NEWEST
        for lazily in (False, True):
            load = functools.partial(load_checkpoint, newest, lazily=lazily)
            said = refusal(load, CheckpointError)
            assert newest.name in said, f"the checkpoint is not named: {said}"
        try:
            load_checkpoint(newest)
        except CheckpointError as error:
            assert not isinstance(error, UnreadableError), "it is not passed over"

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            latest = load_latest(run / "checkpoints")
        assert latest is not None
        assert_same_tensors(latest, self.checkpoints[BEFORE])
        told = [str(warning.message) for warning in caught]
        assert len(told) == 1 and f"skipped {newest.name}" in told[0], f"it warned {told}"
        assert newest_sound(run / "checkpoints") == run / BEFORE, "another one is said to be sound"

        model, _, _ = quietly(lambda: load_run(run))
        for name, value in self.checkpoints[BEFORE].tensors["ema"].items():
            assert torch.equal(model.state_dict()[name], value)
        return "a checkpoint is passed over"

    def _try_log(self, run: Path, path: str) -> str:
        mark = log_mark(self.checkpoints[NEWEST])
        content, original = content_of(run / path), content_of(self.run / path)
        assert original is not None
        is_kept = content is not None and content[: mark.size] == original[: mark.size]
        if content is not None:
            steps, evaluations = read_metrics(run)  # for the report, whatever is in it
            assert all(isinstance(row, dict) for row in (*steps, *evaluations))
        if is_kept:
            assert compare_log(run, mark).hexdigest() == mark.sha256
            return "a log is whole up to the mark"

        said = refusal(lambda: compare_log(run, mark), LogError, OSError)
        assert str(run / path) in said
        # Where it is no file at all, what it is says enough.
        assert "--new-log" in said or content is None, said
        return "a log is refused"

    def _try_vocabulary(self, run: Path, path: str) -> str:
        expected = Tokenizer.from_file(self.run / path)
        try:
            found = Tokenizer.from_file(run / path)
        except (ValueError, OSError) as error:
            assert str(run / path) in line_of(error)
            is_same = False
        else:
            is_same = found.sha256 == expected.sha256
        if not is_same:
            assert str(run / path) in refusal(lambda: load_run(run), ValueError, OSError)
            return "a vocabulary is refused"

        _, _, tokenizer = load_run(run)
        captions = [picture(number)[1] for number in range(8)]
        assert tokenizer.sha256 == expected.sha256
        assert torch.equal(found(captions), expected(captions))
        return "a vocabulary is the same"

    def _try_settings(self, run: Path, path: str) -> str:
        config, given = TrainConfig(resume=str(run)), frozenset({"resume"})
        own = {name: getattr(config, name) for name in LAUNCH_SETTINGS}
        try:
            saved = json.loads(content_of(run / path) or b"")
            is_object = isinstance(saved, dict)
        except (ValueError, RecursionError):
            is_object = False
        try:
            found = resumed_config(run, config, given, ALONE)
        except ConfigError as error:
            assert str(run / path) in line_of(error)
            return "settings are refused"

        # A digit of a setting may be another one; but no setting is other than the file has it.
        assert is_object, "settings were read from what is none"
        names = {field.name for field in dataclasses.fields(TrainConfig)}
        settings = {name: value for name, value in saved.items() if name in names}
        expected = TrainConfig(**({"max_pixels": EARLIER_MAX_PIXELS} | settings | own))
        assert found == expected
        is_same = content_of(self.run / path) is not None and expected == resumed_config(
            self.run, config, given, ALONE
        )
        return f"settings are {'the same' if is_same else 'others, as the file has them'}"

    def _try_resume(self, run: Path, path: str) -> str:
        before = whole_checkpoints(run)
        original, content = content_of(self.run / path), content_of(run / path)
        line = ["--resume", str(run), "--epochs", "2"]
        status, text = trained(line, run.with_name("output"))

        mark = log_mark(self.checkpoints[NEWEST])
        expected = {0}
        if path == "metrics.jsonl":
            assert original is not None
            # A run that writes to its log follows no link.
            is_kept = content is not None and content[: mark.size] == original[: mark.size]
            expected = {0} if is_kept and not (run / path).is_symlink() else {2}
        elif path == "config.json":
            expected = {0, 1, 2}
        elif path == "vocabulary.txt.gz" and (run / path).is_dir():
            expected = {2}
        assert status in expected, f"the run ended with {status}: {text[-300:]}"

        if status:
            said = one_line(text)
            if path != "config.json":
                assert path in said, said
            assert whole_checkpoints(run) >= before, "a refused run took checkpoints away"
            return f"a resumed run is refused for {path}"
        assert "Traceback" not in text and "clipcore." not in text.partition("report: ")[0]
        if path.startswith(NEWEST):
            assert f"skipped {Path(NEWEST).name}" in text, text
        if path != "config.json":
            tensors, rows = final_state(run)
            assert rows == self.rows, "the log is another one"
            assert tensors.keys() == self.tensors.keys()
            for name, tensor in self.tensors.items():
                assert torch.equal(tensors[name], tensor), f"{name} has other bits"
        return (
            "a resumed run ends with the same bits"
            if path != "config.json"
            else "a resumed run ends"
        )


def whole_checkpoints(run: Path) -> set[str]:
    """Return the names of the checkpoints of a run that can be loaded."""
    names = set()
    for path in (run / "checkpoints").glob("step_*"):
        try:
            load_checkpoint(path, lazily=True)
        except CheckpointError:
            continue
        names.add(path.name)
    return names


# Data to be changed.

NUM_PAIRS = 12


def samples(source: PairSource) -> list[Any]:
    """Return all samples of a source, comparable; of an unreadable one the reason."""
    found: list[Any] = []
    for index in range(len(source)):
        try:
            image, caption, key = source[index]
        except BadSample as error:
            found.append(line_of(error))
        else:
            pixels = np.asarray(image)
            found.append((key, caption, pixels.shape, pixels.tobytes()))
    return found


def write_members(path: Path, first: int) -> Path:
    """Write a shard of pictures, as JPEG files or pixels, with captions of both kinds."""
    members = []
    for number in range(first, first + NUM_PAIRS):
        data, caption = picture(number)
        if number % 4 == 3:
            pixels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), np.uint8)
            members.append((f"{number:04d}.npy", encode_raw(pixels)))
        else:
            members.append((f"{number:04d}.jpg", data))
        record = json.dumps({"caption": [caption, caption.upper()]})
        text = ("json", record) if number % 3 == 0 else ("txt", caption)
        members.append((f"{number:04d}.{text[0]}", text[1].encode()))
    return write_tar(path, members)


# What a hand that knows the checksum may write into an index.
NUMBERS = (-1, 0, 1, 511, 512, 1 << 20, (1 << 28) + 1, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))


class MutatedData(Attack):
    """An index of a shard, a copy of a table, or what ``prepare`` made has changed: no other sample comes out."""

    fast: ClassVar[int] = 60

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.whole, self.other = folder / "whole", folder / "other"
        for place, first in ((self.whole, 0), (self.other, 100)):
            place.mkdir()
            load_index(str(write_members(place / "shard.tar", first)))
            num_pairs = NUM_PAIRS if first else NUM_PAIRS - 1
            ParquetSource(str(write_parquet(place, num_pairs)))
            write_csv(place / "source", num_pairs)
            self._prepare(place)
        self.shard = samples(TarSource([str(self.whole / "shard.tar")]))
        self.table = samples(ParquetSource(str(self.whole / "pairs.parquet")))
        self.prepared = self._prepared(self.whole)

    def cases(self) -> Mapping[str, Any]:
        made = sorted(path.name for path in (self.whole / "prepared").glob("[!.]*"))
        files = {
            "shard.tar.clipcore-index": (self._try_shard, 24),
            "pairs.parquet.clipcore-rows": (self._try_table, 40),
            **{f"prepared/{name}": (self._try_prepared, 4) for name in made},
            "prepared/manifest.json": (self._try_prepared, 24),
        }
        cases = {
            f"{path}, {kind}, {seed}": (path, kind, seed, attempt)
            for path, (attempt, num_seeds) in files.items()
            for kind, seed in kinds(num_seeds)
        }
        rows = "pairs.parquet.clipcore-rows"
        cases |= {
            f"{rows}, open, {kind}, {seed}": (rows, kind, seed, self._try_open_table)
            for kind, seed in kinds(8)
        }
        signed = {"shard.tar.clipcore-index": self._try_signed_index, rows: self._try_signed_rows}
        return cases | {
            f"{path}, signed, {seed}": (path, "signed", seed, attempt)
            for path, attempt in signed.items()
            for seed in range(150)
        }

    def attempt(self, what: Any, folder: Path) -> str:
        path, kind, seed, attempt = what
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        place = shutil.copytree(self.whole, folder / "data")
        if kind == "signed":
            return attempt(place, seed)
        change = functools.partial(mutate, place / path, kind, seed, self.other / path)
        if attempt == self._try_open_table:
            return attempt(place, change)
        change()
        before = content_of(self.other / path)
        outcome = attempt(place, path)
        assert content_of(self.other / path) == before, "a file that a link leads to was written"
        return outcome

    def _try_shard(self, place: Path, path: str) -> str:
        for _ in range(2):  # the index is made again, and then read
            found = samples(TarSource([str(place / "shard.tar")]))
            assert found == self.shard, "other samples came out"
        if not (place / path).is_dir():
            same = content_of(place / path) == content_of(self.whole / path)
            assert same, "the index that was made again is another one"
        return "an index is made again"

    def _try_signed_index(self, place: Path, seed: int) -> str:
        path = place / "shard.tar.clipcore-index"
        body = bytearray(path.read_bytes()[:-4])
        draw = random.Random(f"index {seed}")
        # Behind the head, whose sizes would be compared with the file's.
        for _ in range(draw.randrange(1, 4)):
            at = tar._SIDECAR.size + 8 * draw.randrange(6 * NUM_PAIRS)
            struct.pack_into("<q", body, at, draw.choice([*NUMBERS, draw.randrange(1 << 16)]))
        path.write_bytes(body + struct.pack("<I", zlib.crc32(body)))
        shard = str(place / "shard.tar")
        outcome = self._try_signed(lambda: TarSource([shard]), self.shard)
        # What leads out of the shard is not read in the first place.
        reasons = [s for s in samples(TarSource([shard])) if isinstance(s, str)]
        beyond = [r for r in reasons if re.search("cut off|reading failed|too large", r)]
        assert not beyond, f"it was read out of bounds: {beyond[0]}"
        return outcome

    def _try_table(self, place: Path, path: str) -> str:
        table, copy = str(place / "pairs.parquet"), place / path
        outcome = self._compared(samples(ParquetSource(table)), copy)
        if outcome != "all samples are the same":
            copy.unlink()  # as it says
        assert samples(ParquetSource(table)) == self.table, "the copy made again is another one"
        return f"a copy of a table: {outcome}"

    def _try_open_table(self, place: Path, change: Callable[[], None]) -> str:
        source = ParquetSource(str(place / "pairs.parquet"))
        change()
        try:
            found = samples(source)
        except DataError as error:
            assert "pairs.parquet" in line_of(error)
            return "a copy that was changed after it was opened is refused"
        outcome = self._compared(found, place / "pairs.parquet.clipcore-rows")
        return f"a copy that was changed after it was opened: {outcome}"

    def _try_signed_rows(self, place: Path, seed: int) -> str:
        path = place / "pairs.parquet.clipcore-rows"
        content = bytearray(path.read_bytes())
        trailer = struct.Struct("<8sQQI")
        magic, num_rows, num_state, _ = trailer.unpack(content[-trailer.size :])
        start = len(content) - trailer.size - num_state - 48 * num_rows
        draw = random.Random(f"rows {seed}")
        for _ in range(draw.randrange(1, 4)):
            at = start + 8 * draw.randrange(6 * num_rows)
            struct.pack_into("<q", content, at, draw.choice([*NUMBERS, draw.randrange(1 << 12)]))
        checksum = zlib.crc32(content[start : -trailer.size])
        content[-trailer.size :] = trailer.pack(magic, num_rows, num_state, checksum)
        path.write_bytes(content)
        source = functools.partial(ParquetSource, str(place / "pairs.parquet"))
        # A sample has a checksum of its own, so that it may only be one that the table has.
        return self._try_signed(source, self.table, any_of=self.table)

    def _try_signed(
        self, opened: Callable[[], PairSource], whole: list[Any], any_of: list[Any] | None = None
    ) -> str:
        """Read what a forged index says: samples or reasons, whichever they are, and nothing else."""
        try:
            found = samples(opened())
        except DataError as error:
            line_of(error)
            return "a forged index is refused"
        assert len(found) == len(whole)
        if any_of is not None:
            pictures = {sample[2:] for sample in any_of}
            assert all(isinstance(s, str) or s[2:] in pictures for s in found), "another picture"
        same = "made again" if found == whole else "read within its bounds"
        return f"a forged index is {same}"

    def _compared(self, found: list[Any], copy: Path) -> str:
        """Return how many samples are the same; raise if one is another, or is not said to be damaged."""
        assert len(found) == len(self.table)
        bad = [f for f, expected in zip(found, self.table, strict=True) if f != expected]
        for reason in bad:
            assert isinstance(reason, str), "another sample came out"
            is_clear = (
                f"damaged in {copy}; delete that file" in reason or "reading failed" in reason
            )
            assert is_clear, f"it says {reason}"
        return "some samples are refused" if bad else "all samples are the same"

    def _prepare(self, place: Path) -> None:
        settings = Settings(ImageFormat("raw", size=16), shard_size=4)
        prepare(str(place / "source" / "pairs.csv"), place / "prepared", settings)

    def _prepared(self, place: Path) -> dict[str, Any]:
        """Return the bytes of all shards that ``prepare`` made, and their samples."""
        found: dict[str, Any] = {}
        for path in sorted((place / "prepared").glob("*.tar")):
            found[path.name] = path.read_bytes()
            found[f"samples of {path.name}"] = samples(TarSource([str(path)]))
        return found

    def _try_prepared(self, place: Path, path: str) -> str:
        name = Path(path).name
        try:
            with redirected(place / "output"):
                self._prepare(place)
        except DataError as error:
            assert str(place / "prepared") in line_of(error)
            # A shard that is there as it should be is never refused.
            assert name == "manifest.json" or (place / path).is_dir(), error
            return "prepared shards are refused"
        assert self._prepared(place) == self.prepared, "the shards are others"
        return "prepared shards are the same"
