"""The roll call of the ranks: where each one is, so that those left waiting can say for whom, and where it was seen last.

Before a collective each rank notes in a store how many collectives it has come to, the name of this one, and the step.
When a collective fails, or has lasted too long, the others read all notes, and the first to conclude writes down its
verdict, which all of them raise as a ``RankError``. A rank that itself has been given up on, and sits elsewhere, is
ended by its watchdog. A note is one message to the store without an answer: 5 to 12 us on a Xeon VM, beside 200 us for the
smallest all-reduce of two gloo ranks there; a collective within another costs two. A process without a group notes nothing.

The store is the launcher's where there is one: it outlives every rank. Otherwise rank 0 holds it, and takes it along.
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

# Of a process that ends because of another rank.
EXIT_STATUS = 3
# How much later than the process group the watchdog speaks up: the group's own error unwinds a run, the watchdog cannot.
MARGIN_S = 1.0
# How long a rank that was given up on has to find out by itself, and the ranks to start.
PATIENCE_S = 3.0
START_S = 600.0
# A connection also closes because another rank has given up; so long it has to write down its verdict, and the ranks
# that are on their way to note that they are here.
_VERDICT_S = 0.3
_ARRIVAL_S = 1.0
_POLL_S = 0.5
# How long the rank that holds the notes stays for the others to read them.
_LINGER_S = 1.5

# In the messages of gloo's errors; DistributedDataParallel hands the last one on without a place.
_OF_GLOO = ("gloo/", "pair closure")

_RUNNING, _FAILED = "", "failed"
_VERDICT = "verdict"


class RankError(RuntimeError):
    """Another rank died, is late or is somewhere else; the message names it, the collective and the step."""


@dataclass(frozen=True)
class _Place:
    """Where a rank is: its number of collectives so far, the last one, its step, and why it is there no longer."""

    count: int
    step: int
    name: str
    fate: str = _RUNNING

    @property
    def where(self) -> str:
        return _where(self.name, self.step)

    def pack(self) -> str:
        return f"{self.count}\n{self.step}\n{self.name}\n{self.fate}"

    @staticmethod
    def unpack(note: bytes) -> _Place:
        count, step, name, fate = note.decode().split("\n", 3)
        return _Place(int(count), int(step), name, fate)


def _where(name: str, step: int) -> str:
    return f"the {name} of step {step}" if step else f"the {name} before the first step"


class _RollCall:
    """The notes of all ranks, and a thread that watches for their being overdue."""

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, timeout_s: float, is_launchers: bool
    ) -> None:
        self._rank, self.world_size = rank, world_size
        self._keys = [str(other) for other in range(world_size)]
        self._timeout_s = timeout_s
        self._is_launchers = is_launchers
        self._is_told = False
        self._closed = threading.Event()
        self.place = _Place(0, 0, "start")
        self.inside: str | None = None
        self._came_at = time.monotonic()
        # A connection of its own: the group's may be held by a call that waits.
        own = cast(Any, store).clone()  # torch's annotations lack it before 2.14
        own.set_timeout(timedelta(seconds=START_S))
        self.session = self._start(own)
        own.set_timeout(timedelta(seconds=PATIENCE_S))
        self._watcher = threading.Thread(target=self._watch, name="roll call", daemon=True)
        self._watcher.start()

    def _start(self, store: dist.Store) -> str:
        """A prefix that the ranks of this start share, and notes under it of all of them.

        A launcher's store still holds what the ranks before a restart have left. So each rank asks with a word that was
        never used, and rank 0 answers, under that word, with the prefix.
        """
        calls = dist.PrefixStore("start", store)
        limit = time.monotonic() + START_S
        session, word = uuid.uuid4().hex, uuid.uuid4().hex
        if self._rank > 0:
            calls.set(str(self._rank), word)
            try:
                session = calls.get(word).decode()
            except RuntimeError as error:
                raise RankError(f"rank 0 did not start within {START_S:g} s") from error
        self._store = dist.PrefixStore(f"roll_call/{session}", store)
        self._note(self.place)
        while not self._store.check(self._keys):
            for key in self._keys if self._rank == 0 else ():
                if calls.check([key]):
                    calls.set(calls.get(key).decode(), session)
            if time.monotonic() > limit:
                late = [key for key in self._keys if not self._store.check([key])]
                raise RankError(f"{_ranks(late)} did not start within {START_S:g} s")
            time.sleep(0.01)
        return session

    def come(self, name: str, step: int) -> None:
        self.place = _Place(self.place.count + 1, step, name)
        self._came_at = time.monotonic()
        self._note(self.place)

    def leave(self, reason: str) -> None:
        self._note(_Place(self.place.count, self.place.step, self.place.name, reason))

    def wheres(self) -> dict[int, str]:
        """Each rank's place in words, as far as it can be known."""
        self._is_told = True
        try:
            places = self.places()
        except RuntimeError:
            return {self._rank: self.place.where}
        self._linger()
        return {rank: place.where for rank, place in enumerate(places)}

    def _linger(self) -> None:
        """Leaves the others time to read the notes, if they end with this process."""
        if self._rank == 0 and not self._is_launchers:
            time.sleep(_LINGER_S)

    def places(self) -> list[_Place]:
        return [_Place.unpack(note) for note in self._store.multi_get(self._keys)]

    def close(self) -> None:
        """End the watch. A thread that the interpreter's end meets inside a call of the store would abort the process."""
        self._closed.set()
        self._watcher.join(PATIENCE_S)

    def _note(self, place: _Place) -> None:
        # Without a store there is nothing to tell, but the collectives may still work.
        with contextlib.suppress(RuntimeError):
            self._store.set(str(self._rank), place.pack())

    def conclude(self, error: Exception) -> RankError:
        """What this rank raises instead of the error of a collective."""
        self._is_told = True
        text = str(error).lower()
        is_late = "timed out" in text or "timeout" in text
        try:
            verdict = self._verdict(is_late)
            self._linger()
            return RankError(verdict)
        except RuntimeError:
            end = "its launcher has" if self._is_launchers else "rank 0, which held the notes, has"
            what = "timed out" if is_late else "lost a connection"
            return RankError(
                f"{self.place.where} {what}, and {end} ended, so that no more is known of the other ranks ({error})"
            )

    def _verdict(self, is_late: bool) -> str:
        """The one that another rank wrote down, or this one's."""
        mine = self.place
        self.leave(_FAILED)
        began = time.monotonic()
        while True:
            if self._store.check([_VERDICT]):
                return self._store.get(_VERDICT).decode()
            places = self.places()
            waited_s = time.monotonic() - began
            suspects = _suspects(places, mine, self._rank)
            is_clear = len(suspects) == 1 and waited_s >= _VERDICT_S
            if is_late or is_clear or waited_s >= _ARRIVAL_S:
                break
            time.sleep(0.02)
        verdict = _describe(places, suspects, mine, is_late, self._timeout_s)
        return self._store.compare_set(_VERDICT, "", verdict).decode()

    def _watch(self) -> None:
        """Ends this process when the others have given up on it, or when a wait does not end by itself."""
        while not self._closed.wait(_POLL_S):
            try:
                if self._store.check([_VERDICT]):
                    verdict = self._store.get(_VERDICT).decode()
                    is_over = not self._closed.wait(PATIENCE_S)
                else:
                    is_over = self._is_overdue()
                    verdict = self._verdict(is_late=True) if is_over else ""
            except RuntimeError:
                return  # the store is gone; the group's own timeout is left
            if is_over and not self._is_told:
                # Through no buffer: another thread may be in the middle of a line. And nothing may keep this process alive.
                with contextlib.suppress(AttributeError, OSError, ValueError):
                    line = f"rank {self._rank} ends: {verdict}\n"
                    write_steadily(sys.stderr.fileno(), line.encode())
                self._linger()
                os._exit(EXIT_STATUS)

    def _is_overdue(self) -> bool:
        """Whether this rank has waited for too long, and not merely computed, while all have come."""
        mine, came_at = self.place, self._came_at
        if time.monotonic() < came_at + self._timeout_s + MARGIN_S:
            return False
        return self.place == mine and any(place.count < mine.count for place in self.places())


def _suspects(places: Sequence[_Place], mine: _Place, rank: int) -> list[int]:
    """The ranks that a failure in ``mine`` may be due to: those that left, else those elsewhere or silent."""
    others = [other for other in range(len(places)) if other != rank]
    if left := [other for other in others if places[other].fate not in (_RUNNING, _FAILED)]:
        return left
    if absent := [o for o in others if places[o].count < mine.count and not places[o].fate]:
        return absent
    if elsewhere := [other for other in others if _is_elsewhere(places[other], mine)]:
        return elsewhere
    return [other for other in others if places[other].fate == _RUNNING]


def _is_elsewhere(place: _Place, mine: _Place) -> bool:
    """At its collective of the same number, or stuck in an earlier one, it is not where this rank is."""
    is_same = (place.step, place.name) == (mine.step, mine.name)
    return not is_same and (place.count == mine.count or place.fate == _FAILED)


def _describe(
    places: Sequence[_Place],
    suspects: Sequence[int],
    mine: _Place,
    is_late: bool,
    timeout_s: float,
) -> str:
    """One line: which ranks, which collective, which step, and where they were seen last."""
    if not suspects:
        return f"{mine.where} failed, although all ranks had come to it"
    if any(_is_elsewhere(places[other], mine) for other in suspects):
        return _out_of_step([place.where for place in places])
    is_alone = len(suspects) == 1
    end = f" within {timeout_s:g} s" if is_late else ""
    died = "has died (its connection closed)"
    parts = []
    for other in suspects:
        place = places[other]
        seen = f"; it was last seen coming to {place.where}"
        if place.fate:
            parts.append(f"ended with {place.fate}, and did not get through {mine.where}")
        elif place.count < mine.count and is_alone and not is_late:
            parts.append(f"{died} before it came to {mine.where}{seen}")
        elif place.count < mine.count:
            parts.append(f"did not come to {mine.where}{end}{seen}")
        elif is_alone and not is_late:
            parts.append(f"{died} after it came to {mine.where}")
        else:
            parts.append(f"came to {mine.where}, but did not get through it{end}")
    told = [f"rank {other} {part}" for other, part in zip(suspects, parts, strict=True)]
    if not (is_late or is_alone or places[suspects[0]].fate):
        told.append(f"one of them {died}")
    return "; ".join(told)


def _out_of_step(wheres: Sequence[str]) -> str:
    at: dict[str, list[int]] = {}
    for rank, where in enumerate(wheres):
        at.setdefault(where, []).append(rank)
    # The fewest first: they are the ones to look at.
    parts = [
        f"{_ranks(at[where])} came to {where}" for where in sorted(at, key=lambda w: len(at[w]))
    ]
    return f"the ranks are out of step: {'; '.join(parts)}"


def _ranks(ranks: Sequence[object]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


_call: _RollCall | None = None
_step = 0


def open_roll_call(
    store: dist.Store, rank: int, world_size: int, timeout_s: float, is_launchers: bool
) -> dist.Store:
    """Begins to note where this rank is, once all ranks have started; returns the store for the process group.

    Args:
        store: shared by all ranks, and perhaps by the ranks of earlier starts: what it returns holds nothing of these.
        timeout_s: how long a rank may keep the others waiting.
        is_launchers: the store outlives rank 0.

    Raises:
        RankError: a rank did not start.
    """
    global _call
    _call = _RollCall(store, rank, world_size, timeout_s, is_launchers)
    return dist.PrefixStore(f"group/{_call.session}", store)


def close_roll_call() -> None:
    """Ends what ``open_roll_call`` began."""
    global _call
    if _call is not None:
        _call.close()
    _call = None


def at_step(step: int) -> None:
    """Names the step that this rank is in from now on, counted from 1; costs nothing."""
    global _step
    _step = step


@contextlib.contextmanager
def collective(name: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Around a collective, or a stretch of code that holds some: notes that this rank has come to it.

    Args:
        name: what it is, as it fits "the ... of step 17".
        group: whose collective it is; only those of all ranks are noted.

    Raises:
        RankError: instead of the process group's own error.

    >>> with collective("sum of the losses"):
    ...     pass
    """
    call = _call
    if call is None or (group is not None and group != dist.group.WORLD):
        yield
        return
    outer, call.inside = call.inside, name
    call.come(name, _step)
    try:
        yield
        if outer is not None:
            call.come(outer, _step)
    except RankError:
        raise
    except RuntimeError as error:
        # What a rank's own mistake raises is not for the others to answer for.
        if not (isinstance(error, dist.DistError) or any(s in str(error) for s in _OF_GLOO)):
            raise
        raise call.conclude(error) from error
    finally:
        call.inside = outer


@contextlib.contextmanager
def farewell() -> Iterator[None]:
    """Around a rank's work: notes the error that ends it, for the others to name it."""
    try:
        yield
    except RankError:
        raise
    except BaseException as error:
        if _call is not None:
            _call.leave(" ".join(f"{type(error).__name__}: {error}".split())[:500])
        raise


def mark(name: str) -> int:
    """The collective and the step as one number, for a header that ranks compare."""
    return _step << 32 | zlib.crc32(name.encode())


def compare_marks(name: str, marks: Sequence[int]) -> None:
    """Raises RankError unless all ranks sent the mark of this collective in this step.

    >>> compare_marks("barrier", [mark("barrier"), mark("barrier")])
    """
    mine = mark(name)
    if all(theirs == mine for theirs in marks):
        return
    is_ours = _call is not None and len(marks) == _call.world_size
    where = _call.wheres() if _call is not None and is_ours else {}
    for rank, theirs in enumerate(marks):
        # A header that met another kind of message says nothing; the notes do, if there are any.
        is_same_collective = (theirs ^ mine) & 0xFFFFFFFF == 0
        place = _where(name, theirs >> 32) if is_same_collective else "another collective"
        where.setdefault(rank, place)
    raise RankError(_out_of_step([where[rank] for rank in range(len(marks))]))
