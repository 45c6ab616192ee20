"""Shows how far a command has come: a bar on a terminal, and without one a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

# Seconds between two lines.
LINE_EVERY_S = 30.0


class Progress:
    """A progress bar on standard error, if that is a terminal; a line there every ``LINE_EVERY_S`` seconds if it is none.

    Args:
        total: the number of things to do; None if it is not known.
        unit: what they are, in the plural, such as "images".
        title: of the bar and the lines.
        initial: how many were done before.
        quiet: show nothing.
        stays: whether the bar stays when it is closed.
        clock: returns the time in seconds.

    Attributes:
        is_bar: whether a bar is shown.
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        title: str = "",
        *,
        initial: int = 0,
        quiet: bool = False,
        stays: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.is_bar = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self._total, self._unit, self._title = total, unit, title
        self._done = self._initial = initial
        self._quiet, self._clock = quiet, clock
        self._start = self._said = clock()
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=title or None,
            unit=f" {unit}",
            disable=not self.is_bar,
            leave=stays,
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, number: int = 1, detail: str = "") -> None:
        """Count things that are done; ``detail`` is shown with them."""
        self._done += number
        if detail:
            self._bar.set_postfix_str(detail, refresh=False)
        self._bar.update(number)
        if self.is_bar or self._quiet or self._clock() - self._said < LINE_EVERY_S:
            return
        self._said = self._clock()
        self.print(self._line(detail))

    def detail(self, text: str) -> None:
        """Show a text on the bar at once."""
        self._bar.set_postfix_str(text)

    def print(self, line: str) -> None:
        """Print a line on standard error, above the bar."""
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Take the bar away, or leave it where it stands."""
        self._bar.close()

    def _line(self, detail: str) -> str:
        title = f"{self._title}: " if self._title else ""
        of = "" if self._total is None else f" of {self._total:,}"
        if not detail:
            rate = (self._done - self._initial) / max(self._said - self._start, 1e-9)
            detail = f"{rate:,.1f} {self._unit}/s"
            if self._total is not None:
                detail += f", {(self._total - self._done) / max(rate, 1e-9):,.0f} s left"
        return f"{title}{self._done:,}{of} {self._unit}, {detail}"
