"""The watchdog of the ranks: it records where each rank is, so that an error names the lost rank and its last position.

Before a collective, each rank writes to a store how many collectives it has entered, the name of this one, and the step.
When a collective fails or times out, the waiting ranks read all positions. The first one to reach a conclusion writes its
diagnosis to the store, and all of them raise it as a ``RankError``. A lost rank that is still alive is ended by its own
watchdog thread.

A position is one message to the store without a reply: 5 to 12 us on a Xeon VM, where the smallest all-reduce of two gloo
ranks takes 200 us. A collective inside another one costs two messages. A process without a group writes nothing.

Under a launcher, the store belongs to the launcher and outlives every rank. Otherwise rank 0 holds it, and the store
ends with rank 0.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist

from clipcore.terminal import write_steadily

# Exit status of a process that ends because of another rank.
EXIT_STATUS = 3
# How much later than the process group the watchdog acts: the group's error unwinds a run properly, the watchdog cannot.
MARGIN_S = 1.0
# How long a lost rank has to raise an error by itself before its watchdog ends it.
PATIENCE_S = 3.0
# The time limit for all ranks to start.
START_S = 600.0
# A connection also closes because another rank raised a RankError. That rank has _DIAGNOSIS_S to write its diagnosis, and
# the ranks that are about to enter the collective have _ARRIVAL_S to write their positions.
_DIAGNOSIS_S = 0.3
_ARRIVAL_S = 1.0
_POLL_S = 0.5
# How long the rank that holds the store stays, so that the others can read it.
_LINGER_S = 1.5

# Parts of gloo's error messages; DistributedDataParallel forwards the last one without a source file.
_GLOO_ERRORS = ("gloo/", "pair closure")

_RUNNING, _FAILED = "", "failed"
_DIAGNOSIS = "diagnosis"


class RankError(RuntimeError):
    """Another rank died, is late or is in another collective; the message names the rank, the collective and the step."""


@dataclass(frozen=True)
class _Position:
    """Where a rank is: how many collectives it has entered, the last one, its step, and the failure that ended it."""

    count: int
    step: int
    name: str
    failure: str = _RUNNING

    @property
    def where(self) -> str:
        return _where(self.name, self.step)

    def pack(self) -> str:
        return f"{self.count}\n{self.step}\n{self.name}\n{self.failure}"

    @staticmethod
    def unpack(record: bytes) -> _Position:
        count, step, name, failure = record.decode().split("\n", 3)
        return _Position(int(count), int(step), name, failure)


def _where(name: str, step: int) -> str:
    return f"the {name} of step {step}" if step else f"the {name} before the first step"


class _Watchdog:
    """The positions of all ranks, and a thread that ends this process when it is lost or another rank is overdue."""

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, timeout_s: float, is_launchers: bool
    ) -> None:
        self._rank, self.world_size = rank, world_size
        self._keys = [str(other) for other in range(world_size)]
        self._timeout_s = timeout_s
        self._is_launchers = is_launchers
        self._is_reported = False
        self._closed = threading.Event()
        self.position = _Position(0, 0, "start")
        self.inside: str | None = None
        self._entered_at = time.monotonic()
        # A separate connection, because a waiting call may block the group's.
        own = cast(Any, store).clone()  # torch's annotations lack it before 2.14
        own.set_timeout(timedelta(seconds=START_S))
        self.session = self._start(own)
        own.set_timeout(timedelta(seconds=PATIENCE_S))
        self._watcher = threading.Thread(target=self._watch, name="rank watchdog", daemon=True)
        self._watcher.start()

    def _start(self, store: dist.Store) -> str:
        """Wait until all ranks have written a position; return the key prefix that the ranks of this start share.

        A launcher's store still holds keys from before a restart. So each rank posts a fresh nonce, and rank 0 replies
        with the prefix, under the nonce as key.
        """
        requests = dist.PrefixStore("start", store)
        limit = time.monotonic() + START_S
        session, nonce = uuid.uuid4().hex, uuid.uuid4().hex
        if self._rank > 0:
            requests.set(str(self._rank), nonce)
            try:
                session = requests.get(nonce).decode()
            except RuntimeError as error:
                raise RankError(f"rank 0 did not start within {START_S:g} s") from error
        self._store = dist.PrefixStore(f"watchdog/{session}", store)
        self._write(self.position)
        while not self._store.check(self._keys):
            for key in self._keys if self._rank == 0 else ():
                if requests.check([key]):
                    requests.set(requests.get(key).decode(), session)
            if time.monotonic() > limit:
                late = [key for key in self._keys if not self._store.check([key])]
                raise RankError(f"{_ranks(late)} did not start within {START_S:g} s")
            time.sleep(0.01)
        return session

    def enter_collective(self, name: str, step: int) -> None:
        self.position = _Position(self.position.count + 1, step, name)
        self._entered_at = time.monotonic()
        self._write(self.position)

    def write_failure(self, reason: str) -> None:
        self._write(_Position(self.position.count, self.position.step, self.position.name, reason))

    def locations(self) -> dict[int, str]:
        """Return each rank's position in words; only this rank's where the store is gone."""
        self._is_reported = True
        try:
            positions = self.positions()
        except RuntimeError:
            return {self._rank: self.position.where}
        self._linger()
        return {rank: position.where for rank, position in enumerate(positions)}

    def _linger(self) -> None:
        """Wait until the others have read the store, if it ends with this process."""
        if self._rank == 0 and not self._is_launchers:
            time.sleep(_LINGER_S)

    def positions(self) -> list[_Position]:
        return [_Position.unpack(record) for record in self._store.multi_get(self._keys)]

    def close(self) -> None:
        """Stop the thread. A thread inside a call of the store when the interpreter exits would abort the process."""
        self._closed.set()
        self._watcher.join(PATIENCE_S)

    def _write(self, position: _Position) -> None:
        # If the store is gone, no position can be written, but the collectives may still work.
        with contextlib.suppress(RuntimeError):
            self._store.set(str(self._rank), position.pack())

    def diagnose(self, error: Exception) -> RankError:
        """Return the error to raise instead of the one that a collective raised."""
        self._is_reported = True
        text = str(error).lower()
        is_late = "timed out" in text or "timeout" in text
        try:
            diagnosis = self._agree_on_diagnosis(is_late)
            self._linger()
            return RankError(diagnosis)
        except RuntimeError:
            end = "its launcher has" if self._is_launchers else "rank 0, which held the store, has"
            what = "timed out" if is_late else "lost a connection"
            return RankError(
                f"{self.position.where} {what}, and {end} ended, so nothing is known of the other ranks ({error})"
            )

    def _agree_on_diagnosis(self, is_late: bool) -> str:
        """Return the diagnosis that another rank has written, or write and return this rank's."""
        mine = self.position
        self.write_failure(_FAILED)
        began = time.monotonic()
        while True:
            if self._store.check([_DIAGNOSIS]):
                return self._store.get(_DIAGNOSIS).decode()
            positions = self.positions()
            waited_s = time.monotonic() - began
            suspects = _suspects(positions, mine, self._rank)
            is_clear = len(suspects) == 1 and waited_s >= _DIAGNOSIS_S
            if is_late or is_clear or waited_s >= _ARRIVAL_S:
                break
            time.sleep(0.02)
        diagnosis = _describe(positions, suspects, mine, is_late, self._timeout_s)
        return self._store.compare_set(_DIAGNOSIS, "", diagnosis).decode()

    def _watch(self) -> None:
        """End this process when the others have diagnosed a failure, or when its collective is overdue."""
        while not self._closed.wait(_POLL_S):
            try:
                if self._store.check([_DIAGNOSIS]):
                    diagnosis = self._store.get(_DIAGNOSIS).decode()
                    is_over = not self._closed.wait(PATIENCE_S)
                else:
                    is_over = self._is_overdue()
                    diagnosis = self._agree_on_diagnosis(is_late=True) if is_over else ""
            except RuntimeError:
                return  # the store is gone; only the group's own timeout remains
            if is_over and not self._is_reported:
                # Unbuffered, because another thread may be in the middle of a line. No error may keep this process alive.
                with contextlib.suppress(AttributeError, OSError, ValueError):
                    line = f"rank {self._rank} ends: {diagnosis}\n"
                    write_steadily(sys.stderr.fileno(), line.encode())
                self._linger()
                os._exit(EXIT_STATUS)

    def _is_overdue(self) -> bool:
        """Return whether this rank has waited too long for a rank that has not entered its collective."""
        mine, entered_at = self.position, self._entered_at
        if time.monotonic() < entered_at + self._timeout_s + MARGIN_S:
            return False
        return self.position == mine and any(
            position.count < mine.count for position in self.positions()
        )


def _suspects(positions: Sequence[_Position], mine: _Position, rank: int) -> list[int]:
    """Return the ranks that may have caused a failure in ``mine``: those that ended, else the absent or misplaced ones."""
    others = [other for other in range(len(positions)) if other != rank]
    if left := [other for other in others if positions[other].failure not in (_RUNNING, _FAILED)]:
        return left
    if absent := [
        o for o in others if positions[o].count < mine.count and not positions[o].failure
    ]:
        return absent
    if elsewhere := [other for other in others if _is_elsewhere(positions[other], mine)]:
        return elsewhere
    return [other for other in others if positions[other].failure == _RUNNING]


def _is_elsewhere(position: _Position, mine: _Position) -> bool:
    """Return whether a rank is in another collective than ``mine``, at the same count or stuck in an earlier one."""
    is_same = (position.step, position.name) == (mine.step, mine.name)
    return not is_same and (position.count == mine.count or position.failure == _FAILED)


def _describe(
    positions: Sequence[_Position],
    suspects: Sequence[int],
    mine: _Position,
    is_late: bool,
    timeout_s: float,
) -> str:
    """Return one line: which ranks, which collective, which step, and their last known positions."""
    if not suspects:
        return f"{mine.where} failed, although all ranks had entered it"
    if any(_is_elsewhere(positions[other], mine) for other in suspects):
        return _out_of_step([position.where for position in positions])
    is_alone = len(suspects) == 1
    end = f" within {timeout_s:g} s" if is_late else ""
    died = "has died (its connection closed)"
    parts = []
    for other in suspects:
        position = positions[other]
        seen = f"; it last entered {position.where}"
        if position.failure:
            parts.append(f"ended with {position.failure}, and did not finish {mine.where}")
        elif position.count < mine.count and is_alone and not is_late:
            parts.append(f"{died} before it entered {mine.where}{seen}")
        elif position.count < mine.count:
            parts.append(f"did not enter {mine.where}{end}{seen}")
        elif is_alone and not is_late:
            parts.append(f"{died} after it entered {mine.where}")
        else:
            parts.append(f"entered {mine.where}, but did not finish it{end}")
    causes = [f"rank {other} {part}" for other, part in zip(suspects, parts, strict=True)]
    if not (is_late or is_alone or positions[suspects[0]].failure):
        causes.append(f"one of them {died}")
    return "; ".join(causes)


def _out_of_step(locations: Sequence[str]) -> str:
    at: dict[str, list[int]] = {}
    for rank, where in enumerate(locations):
        at.setdefault(where, []).append(rank)
    # The smallest group first: its ranks are the likely cause.
    parts = [
        f"{_ranks(at[where])} entered {where}" for where in sorted(at, key=lambda w: len(at[w]))
    ]
    return f"the ranks are out of step: {'; '.join(parts)}"


def _ranks(ranks: Sequence[object]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


_watchdog: _Watchdog | None = None
_step = 0


def start_watchdog(
    store: dist.Store, rank: int, world_size: int, timeout_s: float, is_launchers: bool
) -> dist.Store:
    """Wait until all ranks have started, then start the watchdog; return the store for the process group.

    Args:
        store: shared by all ranks. It may hold keys of earlier starts; the returned store hides them.
        timeout_s: how long a rank may keep the others waiting.
        is_launchers: the store outlives rank 0.

    Raises:
        RankError: a rank did not start.
    """
    global _watchdog
    _watchdog = _Watchdog(store, rank, world_size, timeout_s, is_launchers)
    return dist.PrefixStore(f"group/{_watchdog.session}", store)


def stop_watchdog() -> None:
    """Stop the watchdog, if one runs."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.close()
    _watchdog = None


def at_step(step: int) -> None:
    """Set the step that this rank is in, counted from 1; costs nothing."""
    global _step
    _step = step


@contextlib.contextmanager
def collective(name: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Record that this rank has entered a collective, or code that contains collectives.

    Args:
        name: a noun phrase that fits into "the ... of step 17".
        group: the group of the collective; only collectives of all ranks are recorded.

    Raises:
        RankError: instead of the process group's own error.

    >>> with collective("sum of the losses"):
    ...     pass
    """
    watch = _watchdog
    if watch is None or (group is not None and group != dist.group.WORLD):
        yield
        return
    outer, watch.inside = watch.inside, name
    watch.enter_collective(name, _step)
    try:
        yield
        if outer is not None:
            watch.enter_collective(outer, _step)
    except RankError:
        raise
    except RuntimeError as error:
        # An error of this rank's own code is not the fault of another rank.
        if not (isinstance(error, dist.DistError) or any(s in str(error) for s in _GLOO_ERRORS)):
            raise
        raise watch.diagnose(error) from error
    finally:
        watch.inside = outer


@contextlib.contextmanager
def report_failure() -> Iterator[None]:
    """Record the error that ends the enclosed code, so that the other ranks can name it."""
    try:
        yield
    except RankError:
        raise
    except BaseException as error:
        if _watchdog is not None:
            _watchdog.write_failure(" ".join(f"{type(error).__name__}: {error}".split())[:500])
        raise


def fingerprint(name: str) -> int:
    """Return a collective's name and the step as one number, for a header that ranks compare."""
    return _step << 32 | zlib.crc32(name.encode())


def check_fingerprints(name: str, fingerprints: Sequence[int]) -> None:
    """Raise RankError unless all ranks sent the fingerprint of this collective at this step.

    >>> check_fingerprints("barrier", [fingerprint("barrier"), fingerprint("barrier")])
    """
    mine = fingerprint(name)
    if all(theirs == mine for theirs in fingerprints):
        return
    is_ours = _watchdog is not None and len(fingerprints) == _watchdog.world_size
    where = _watchdog.locations() if _watchdog is not None and is_ours else {}
    for rank, theirs in enumerate(fingerprints):
        # A header mixed with another kind of message tells nothing; the recorded positions do, if there are any.
        is_same_collective = (theirs ^ mine) & 0xFFFFFFFF == 0
        position = _where(name, theirs >> 32) if is_same_collective else "another collective"
        where.setdefault(rank, position)
    raise RankError(_out_of_step([where[rank] for rank in range(len(fingerprints))]))
