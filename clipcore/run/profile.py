"""``--profile``: where the time of a training step goes, beside what its operators have to cost.

    step 3           bytes and FLOPs of every operator are counted
    step 4           the profiler warms up
    steps 5 to 7     are recorded: the time of every operator, and a trace of all that happened

of this process; then training goes on, to the bits of a run that was not profiled. An operator here is what the dispatcher
is asked for by Python or autograd, with all that it calls itself. Its time is the device's on a GPU and the clock's on the
CPU; its floor what its bytes and FLOPs take at the rates of a copy and of matrix products, measured after the last step.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from clipcore.files import write_durably
from clipcore.kernels.launch import visible_operators
from clipcore.run.ceilings import Ceilings, measure_ceilings
from clipcore.run.traffic import Operator, Traffic, TrafficCounter

COUNTED, FIRST, LAST = 3, 5, 7
NUM_STEPS = LAST - FIRST + 1
STEP = "clipcore.step"
PARTS = ("data", "forward", "loss", "backward", "optimizer")
PROFILE_FOLDER, TABLE, TRACE = "profile", "profile.txt", "trace.json.gz"  # in the run's folder
SHOWN, NAME = 40, 60  # rows of the table, so that it stays a page, and letters of an operator


@dataclass
class Spent:
    """Calls of an operator in all recorded steps, and their time in microseconds."""

    calls: int = 0
    time_us: float = 0.0


@dataclass(frozen=True)
class Row:
    """An operator in one step. ``traffic`` is None where it was not met in the step that was counted."""

    operator: Operator
    calls: float
    time_ms: float
    traffic: Traffic | None
    floor_ms: float

    @property
    def gap_ms(self) -> float:
        """Time above the floor; negative where operands came from a cache."""
        return self.time_ms - self.floor_ms


@dataclass(frozen=True)
class StepTable:
    """What was found about a step; ``str`` is the page about it.

    Attributes:
        step_ms: the clock's time of a step.
        parts_ms: of a step's parts, as the run's own clock charges them.
    """

    title: str
    step_ms: float
    rows: list[Row]
    parts_ms: dict[str, float]
    ceilings: Ceilings

    @property
    def unexplained_ms(self) -> float:
        """Time of a step that no operator explains: data, Python, autograd, waiting."""
        return self.step_ms - sum(row.time_ms for row in self.rows)

    def __str__(self) -> str:
        parts = ", ".join(
            f"{part} {ms:.2f} ({ms / self.step_ms:.1%})" for part, ms in self.parts_ms.items()
        )
        by_time = sorted(self.rows, key=lambda row: -row.time_ms)
        shown = [row for row in self.rows if row in by_time[:SHOWN]]
        others = by_time[SHOWN:]
        lines = [self._line(row.operator.name, _pass_of(row), [row]) for row in shown]
        if others:
            lines.append(self._line(f"{len(others)} others", "", others))
        lines += [
            "",
            self._line("all operators", "", self.rows),
            f"{'host and data':{NAME + 16}}{self.unexplained_ms:10.3f}{self.unexplained_ms / self.step_ms:8.2%}",
            f"{'step':{NAME + 16}}{self.step_ms:10.3f}{1:8.2%}",
        ]
        return "\n".join(
            [
                self.title,
                f"Ceilings measured with it: copy {self.ceilings.bytes_per_s / 1e9:.1f} GB/s (read and written), "
                f"matrix products {self.ceilings.flops_per_s / 1e12:.3f} TFLOP/s.",
                "Floor: the larger of MB and GFLOP at these rates; gap: time above it, negative where a cache served.",
                f"The host's clock by part, ms: {parts}.",
                "",
                f"{'operator':{NAME}}{'pass':9}{'calls':>7}{'ms':>10}{'share':>8}{'MB':>11}{'GFLOP':>11}"
                f"{'floor ms':>10}{'gap ms':>10}",
                *lines,
                "",
            ]
        )

    def _line(self, name: str, passed: str, rows: list[Row]) -> str:
        time_ms = sum(row.time_ms for row in rows)
        counted = [row.traffic for row in rows if row.traffic is not None]
        figures = f"{'-':>11}{'-':>11}{'-':>10}{'-':>10}"
        if counted:
            figures = (
                f"{sum(t.bytes_moved for t in counted) / 1e6:11.3f}{sum(t.flops for t in counted) / 1e9:11.4f}"
                f"{sum(row.floor_ms for row in rows):10.3f}{sum(row.gap_ms for row in rows):10.3f}"
            )
        return (
            f"{name[: NAME - 1]:{NAME}}{passed:9}{sum(row.calls for row in rows):7.0f}{time_ms:10.3f}"
            f"{time_ms / self.step_ms:8.2%}{figures}"
        )


@dataclass
class StepProfile:
    """Follows the steps of a run and profiles some of them; close it, or use it in ``with``.

    Args:
        folder: where ``TABLE`` and ``TRACE`` go; None does nothing at all.
        widths: of the towers, for the products that the ceiling is measured by.
        dtype: of the products, by the run's precision.
        timings: seconds by part of the run, which the run's clock goes on charging.
    """

    folder: Path | None
    device: torch.device
    widths: tuple[int, ...]
    dtype: torch.dtype
    timings: Mapping[str, float]
    num_begun: int = 0
    counter: TrafficCounter = field(default_factory=TrafficCounter)
    recorder: profile | None = None
    before: dict[str, float] = field(default_factory=dict)
    within: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.within.close()
        if self.recorder is not None:
            self.recorder.stop()
            self.recorder = None

    def begin_step(self) -> None:
        """Begin a step of the process, before its data are there."""
        self.num_begun += 1
        if self.folder is None or not COUNTED <= self.num_begun <= LAST:
            return
        if self.num_begun == COUNTED + 1:
            self.recorder = _recorder(self.device)
            self.recorder.start()
        if self.num_begun == FIRST:
            self.before = dict(self.timings)
        self.within.enter_context(visible_operators())
        if self.num_begun == COUNTED:
            self.within.enter_context(self.counter)
        else:
            self.within.enter_context(record_function(STEP))

    def end_step(self) -> str:
        """End a step, before evaluations and checkpoints; return what to print after the last step, else an empty text."""
        if self.folder is None or not COUNTED <= self.num_begun <= LAST:
            return ""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the step's time has all of its device's in it
        self.within.close()
        if self.recorder is None:
            return ""
        if self.num_begun < LAST:
            self.recorder.step()
            return ""
        self.recorder.stop()
        recorder, self.recorder = self.recorder, None
        try:
            return self._write(recorder)
        except OSError as error:
            # The run is worth more than its profile.
            return f"profile: cannot write {self.folder}: {error.strerror or error}; training goes on without it"

    def _write(self, recorder: profile) -> str:
        assert self.folder is not None
        parts_ms = {
            part: 1e3 * (self.timings.get(part, 0.0) - self.before.get(part, 0.0)) / NUM_STEPS
            for part in PARTS
        }
        spent, step_ms = operator_times(recorder.events() or [], self.counter.found)
        ceilings = measure_ceilings(self.widths, self.dtype, self.device)
        table = StepTable(
            f"A training step on {self.device.type}: means of steps {FIRST} to {LAST} of this process, bytes and FLOPs of "
            f"step {COUNTED}.",
            step_ms,
            make_rows(spent, self.counter.found, ceilings),
            parts_ms,
            ceilings,
        )
        if self.folder.is_symlink():
            raise OSError(errno.ELOOP, "it is a symbolic link, which is not followed")
        self.folder.mkdir(parents=True, exist_ok=True)
        # torch writes to a name, which is therefore one that no link has.
        with tempfile.TemporaryDirectory(dir=self.folder) as aside:
            recorder.export_chrome_trace(str(Path(aside, TRACE)))
            Path(aside, TRACE).replace(self.folder / TRACE)
        write_durably(self.folder / TABLE, str(table).encode())
        most = table.rows[0]
        return (
            f"profile: {self.folder / TABLE}: {table.unexplained_ms / step_ms:.0%} of a step is host and data; "
            f"most above its floor: {most.operator.name}, {most.gap_ms:.2f} of {step_ms:.2f} ms"
        )


def check_long_enough(num_steps: int) -> None:
    """Raise ValueError for ``--profile`` in a process that has too few steps to do."""
    if num_steps < LAST:
        raise ValueError(
            f"--profile records steps {FIRST} to {LAST} of a process, and this one has {num_steps} to do; raise --epochs, "
            "lower the batch or leave --profile out"
        )


def make_rows(
    spent: Mapping[Operator, Spent], counted: Mapping[Operator, Traffic], ceilings: Ceilings
) -> list[Row]:
    """Return a row for each operator, those first that are furthest above their floors."""
    rows = []
    for operator, all_steps in spent.items():
        traffic = counted.get(operator)
        floor_ms = ceilings.floor_ms(traffic.bytes_moved, traffic.flops) if traffic else 0.0
        time_ms = all_steps.time_us / NUM_STEPS / 1e3
        rows.append(Row(operator, all_steps.calls / NUM_STEPS, time_ms, traffic, floor_ms))
    return sorted(rows, key=lambda row: -row.gap_ms)


def operator_times(
    events: Iterable[Any], counted: Iterable[Operator]
) -> tuple[dict[Operator, Spent], float]:
    """Return (time of each operator in the recorded steps, milliseconds of one step) from the profiler's events.

    The outermost event that is a counted operator is taken with everything below it. A kernel that no operator has
    launched is a row of its own.
    """
    events, known = list(events), set(counted)
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    on_device = [event for event in events if event.device_type != DeviceType.CPU]
    steps = [event for event in on_host if event.name == STEP]
    spent: dict[Operator, Spent] = defaultdict(Spent)
    # Backward passes of a GPU have a thread, and so a root, of their own.
    others = [
        event
        for event in on_host
        if event.cpu_parent is None and event.thread != steps[0].thread and _is_in(event, steps)
    ]
    for root in (*steps, *others):
        _visit(root, False, known, bool(on_device), spent)
    _add_loose_kernels(on_host, on_device, steps, spent)
    return dict(spent), sum(step.cpu_time_total for step in steps) / len(steps) / 1e3


def _visit(
    event: Any, is_backward: bool, known: set[Operator], on_gpu: bool, spent: dict[Operator, Spent]
) -> None:
    is_backward = is_backward or event.name.startswith("autograd::engine::evaluate_function")
    operator = _operator_of(event.name, is_backward, known)
    time_us = event.device_time_total if on_gpu else event.cpu_time_total
    if operator not in known and not _is_unmet(event, is_backward, known):
        # A wrapper: what lies below it counts, and what it launched itself.
        time_us = event.self_device_time_total if on_gpu else 0.0
        for child in event.cpu_children:
            _visit(child, is_backward, known, on_gpu, spent)
        if not time_us:
            return
    spent[operator].calls += 1
    spent[operator].time_us += time_us


def _operator_of(name: str, is_backward: bool, known: set[Operator]) -> Operator:
    """Return the counted operator of a name: in the counted step autograd changed nothing in place, ``add_`` was ``add``."""
    itself, elsewhere = Operator(name, is_backward), Operator(name.removesuffix("_"), is_backward)
    return elsewhere if itself not in known and elsewhere in known else itself


def _is_unmet(event: Any, is_backward: bool, known: set[Operator]) -> bool:
    """Return whether an event is an operator that the counted step did not have, and no wrapper of those that it had."""
    if "::" not in event.name or event.name.startswith("autograd::"):
        return False
    below = list(event.cpu_children)
    while below:
        child = below.pop()
        if _operator_of(child.name, is_backward, known) in known:
            return False
        below += child.cpu_children
    return True


def _add_loose_kernels(
    on_host: list[Any], on_device: list[Any], steps: list[Any], spent: dict[Operator, Spent]
) -> None:
    """Add what ran on a GPU without an operator: kernels that Python itself launches, such as the optimizer's."""
    loose: dict[str, Spent] = defaultdict(Spent)
    for event in on_device:
        if not event.is_user_annotation and _is_in(event, steps):
            loose[event.name].calls += 1
            loose[event.name].time_us += event.self_device_time_total
    for event in on_host:
        for kernel in event.kernels if _is_in(event, steps) else ():
            loose[kernel.name].calls -= 1
            loose[kernel.name].time_us -= kernel.duration
    for name, found in loose.items():
        if found.calls > 0 and found.time_us > 0:
            spent[Operator(f"kernel {name}", False)] = found


def _is_in(event: Any, steps: list[Any]) -> bool:
    start = event.time_range.start
    return any(step.time_range.start <= start <= step.time_range.end for step in steps)


def _recorder(device: torch.device) -> profile:
    # Kineto, which torch's profiler is made of, else writes lines for its developers among the run's.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=1, active=NUM_STEPS),
        acc_events=True,
    )


def _pass_of(row: Row) -> str:
    return "backward" if row.operator.is_backward else ""
