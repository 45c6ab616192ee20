"""What a run writes down: metrics.jsonl, the progress bar, TensorBoard, Weights & Biases.

``metrics.jsonl`` holds one JSON object a line. A step's line: step (of steps done), epoch, loss, lr, logit_scale,
grad_norm, bad_samples, then the clock's: pairs_per_s and time_s (seconds of training so far). An evaluation's line has a
``task``. Everything but the clock is the same, bit for bit, in a run that was stopped and resumed.

The file is part of the run's state: a checkpoint notes how much of it there was and its hash (``LogMark``), a resumed run
compares both, and goes on behind that place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from tqdm import tqdm

from clipcore.files import open_own, open_regular, sync_directory
from clipcore.progress import Progress
from clipcore.terminal import first_line, printable_lines

_MAX_LINE_BYTES = 1 << 16
METRICS_FILE = "metrics.jsonl"
STEP_KEYS = frozenset({"step", "loss", "lr", "logit_scale", "pairs_per_s", "time_s"})
CLOCK_KEYS = frozenset({"pairs_per_s", "time_s"})


class LogError(ValueError):
    """metrics.jsonl is not what a checkpoint says of it."""


@dataclass(frozen=True)
class LogMark:
    """A place in metrics.jsonl, between two lines.

    Attributes:
        size: bytes before it.
        sha256: of these bytes; None in checkpoints of earlier versions, of which the size alone is compared.
    """

    size: int = 0
    sha256: str | None = None


class PartClock:
    """Charges the time since the last charge to a part of the run, in ``timings`` (seconds by part)."""

    def __init__(self, timings: dict[str, float]) -> None:
        self.timings = timings
        self._last = time.perf_counter()

    def charge(self, part: str) -> None:
        now = time.perf_counter()
        self.timings[part] = self.timings.get(part, 0.0) + now - self._last
        self._last = now


class MetricsLogger:
    """The log of one run.

    Args:
        run_dir: the run's folder, or None on the ranks that write nothing.
        num_steps, first_step: of the progress bar.
        mark: up to where an existing metrics.jsonl is kept; a resumed run drops the lines after its checkpoint.
        elapsed_s: seconds of training before this process.
        reporters: of "tensorboard", "wandb".
        config: the settings that the reporters show.
        quiet: no progress; the last step is printed all the same.

    Raises:
        ValueError: a reporter is not installed.
        LogError: metrics.jsonl is not what it was at ``mark``.
    """

    def __init__(
        self,
        run_dir: Path | None,
        *,
        num_steps: int,
        first_step: int = 0,
        mark: LogMark = LogMark(),
        elapsed_s: float = 0.0,
        reporters: Sequence[str] = (),
        config: dict[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        self.writes = run_dir is not None
        self._file: BinaryIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if run_dir is not None:
            if "tensorboard" in reporters:
                self._tensorboard = _tensorboard(run_dir, first_step)
            if "wandb" in reporters:
                self._wandb = _wandb(run_dir, config or {})
            self._digest = compare_log(run_dir, mark)
            self._path = run_dir / METRICS_FILE
            self._file = os.fdopen(open_own(self._path, os.O_WRONLY | os.O_APPEND), "ab")
            with self._named():
                self._file.truncate(mark.size)
                self._file.seek(mark.size)
            sync_directory(run_dir)
        self._start = self._last_step = self._last_progress = time.perf_counter()
        self._elapsed_before_s = elapsed_s
        self._step, self._num_steps, self._detail = first_step, num_steps, ""
        self._shown = Progress(
            num_steps, "steps", initial=first_step, quiet=quiet or not self.writes, stays=True
        )

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._shown.close()
        # A bar stays as the last line; without one there would be none.
        if self._detail and not self._shown.is_bar:
            self.print(f"step {self._step} of {self._num_steps}: {self._detail}")
        if self._file is not None:
            # Each line was flushed; what could not be written is an error already.
            with contextlib.suppress(OSError):
                self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    @property
    def elapsed_s(self) -> float:
        """Return the seconds of training, those before a resume included."""
        return self._elapsed_before_s + time.perf_counter() - self._start

    def step(self, row: dict[str, Any], num_pairs: int, every: int = 1) -> None:
        """Log a training step of ``num_pairs`` pairs: move the bar, and write a line every ``every`` steps."""
        now = time.perf_counter()
        pairs_per_s = num_pairs / (now - self._last_step)
        self._last_step = now
        clock = {"pairs_per_s": round(pairs_per_s, 1), "time_s": round(self.elapsed_s, 3)}
        if row["step"] % every == 0:
            self._write({**row, **clock}, "train")
        self._step = row["step"]
        figures = f"loss {row['loss']:.3f}, {pairs_per_s:.0f} pairs/s, lr {row['lr']:.1e}"
        self._detail = f"{figures}, scale {row['logit_scale']:.1f}"
        self._shown.update(1, self._detail)

    def progress(self, num_done: int, num_passes: int) -> None:
        """Show on the bar how far a step of several passes has come, twice a second at most."""
        now = time.perf_counter()
        if num_done < num_passes and now - self._last_progress > 0.5:
            self._last_progress = now
            self._shown.detail(f"micro-batch {num_done} of {num_passes} of this step")

    def evaluation(self, row: dict[str, Any], headline: Sequence[str]) -> None:
        """Log an evaluation: a line in the file, and above the bar the figures of ``headline`` and what they leave out."""
        self._write(row, row["task"])
        figures = ", ".join(f"{key} {row[key]:.1%}" for key in headline if key in row)
        if number := int(row.get("num_unreadable", 0)):
            figures += f" (without {number:,} that could not be read)"
        self.print(f"step {row['step']}: {row['task']}: {figures}")
        # The time of an evaluation is not a training step's.
        self._last_step = time.perf_counter()

    def print(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.writes:
            tqdm.write(printable_lines(message))

    def sync(self) -> LogMark:
        """Put the lines on the disk; return the place behind the last one, for the checkpoint."""
        if self._file is None:
            return LogMark()
        with self._named():
            self._file.flush()
            os.fsync(self._file.fileno())
        return LogMark(self._file.tell(), self._digest.hexdigest())

    @contextlib.contextmanager
    def whole_or_nothing(self) -> Iterator[None]:
        """Take back the lines that are written inside, if what is done inside does not come to its end."""
        if self._file is None:
            yield
            return
        size, digest = self._file.tell(), self._digest.copy()
        try:
            yield
        except BaseException:
            self._file.flush()
            self._file.truncate(size)
            self._file.seek(size)
            self._digest = digest
            raise

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Name the file in an error of writing to it."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(self._path)) from error

    def _write(self, row: dict[str, Any], prefix: str) -> None:
        if self._file is None:
            return
        # JSON has no infinity: an overflowing norm of a run in float16 is written as null.
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        line = (json.dumps(clean) + "\n").encode()
        with self._named():
            self._file.write(line)
            self._file.flush()
        self._digest.update(line)
        scalars = {
            f"{prefix}/{key}": value
            for key, value in clean.items()
            if isinstance(value, (int, float)) and key != "step"
        }
        if self._tensorboard is not None:
            for key, value in scalars.items():
                self._tensorboard.add_scalar(key, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(scalars, step=row["step"])


def compare_log(run_dir: Path, mark: LogMark) -> Any:
    """Return SHA-256 over metrics.jsonl up to a mark, to be gone on with.

    Raises:
        LogError: the file is missing or shorter, or has changed before the mark.
    """
    path = run_dir / METRICS_FILE
    digest = hashlib.sha256()
    if mark.size == 0 and mark.sha256 in (None, digest.hexdigest()):
        return digest

    left = mark.size
    try:
        with open_regular(path) as file:
            while left and (chunk := file.read(min(left, 1 << 20))):
                digest.update(chunk)
                left -= len(chunk)
    except FileNotFoundError:
        problem = "is missing"
    else:
        if left:
            problem = f"has {mark.size - left:,} bytes, not {mark.size:,}"
        elif mark.sha256 not in (None, digest.hexdigest()):
            problem = f"has changed in its first {mark.size:,} bytes"
        else:
            return digest
    raise LogError(
        f"{path} {problem} of the checkpoint; put it back, or begin a new one, without the lines so far, with --new-log"
    )


def set_log_aside(run_dir: Path) -> Path | None:
    """Give metrics.jsonl the first free of the names metrics.jsonl.old, .old2, ...; return it, None without a file."""
    path = run_dir / METRICS_FILE
    if not os.path.lexists(path):
        return None
    number = 1
    while os.path.lexists(
        aside := path.with_name(f"{path.name}.old{number if number > 1 else ''}")
    ):
        number += 1
    path.rename(aside)
    return aside


def read_metrics(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the lines of metrics.jsonl: (steps, evaluations). What is no line of a run is left out."""
    rows = []
    for line in _short_lines(run_dir / METRICS_FILE):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and ("task" in row or row.keys() >= STEP_KEYS):
            rows.append(row)
    return [r for r in rows if "task" not in r], [r for r in rows if "task" in r]


def _short_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, without those that are longer than any of a run."""
    is_inside = False
    with open_regular(path) as file:
        while piece := file.readline(_MAX_LINE_BYTES):
            is_end = piece.endswith(b"\n")
            if not is_inside and (is_end or len(piece) < _MAX_LINE_BYTES):
                yield piece
            is_inside = not is_end


def _tensorboard(run_dir: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            '--report-to tensorboard needs TensorBoard: pip install "clipcore[tensorboard]"'
        ) from error
    return SummaryWriter(
        str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None
    )


def _wandb(run_dir: Path, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            '--report-to wandb needs Weights & Biases: pip install "clipcore[wandb]"'
        ) from error
    try:
        return wandb.init(
            project=config.get("wandb_project_name"),
            name=run_dir.name,
            notes=config.get("wandb_notes") or None,
            id=run_dir.name,
            resume="allow",
            dir=run_dir,
            config=config,
        )
    # Of many kinds: no network, no login, a project of somebody else.
    except Exception as error:
        raise ValueError(
            f"--report-to wandb: {first_line(error)}; log in with `wandb login`, or set WANDB_MODE=offline"
        ) from error
