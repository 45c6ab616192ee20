"""Converts untrusted JSON values into values that the page of results can show, or None."""

from __future__ import annotations

import math
import re
from typing import Any

from clipcore.data import DataError, printable

_MAX_NAME_CHARS = 500
_MOST_ENTRIES = 5000
# Characters that XML cannot hold, besides those that a terminal cannot.
_NO_XML = re.compile("[\ufffe\uffff]")


def shown(value: object) -> str:
    """Return a name from data, made safe for a page; "–" if it is not text."""
    if not isinstance(value, str):
        return "–"
    return _NO_XML.sub("\ufffd", printable(value[:_MAX_NAME_CHARS]))


def text(value: object) -> str:
    """Return a name as ``shown`` does; an empty text if it is not text."""
    return shown(value) if isinstance(value, str) else ""


def number(value: object) -> float | None:
    """Return a number that a result may have; None for any other value."""
    found = _finite(value)
    return found if found is not None and abs(found) < 1e15 else None


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # from an integer of too many digits
        return None
    return found if math.isfinite(found) else None


def share(value: object) -> float | None:
    """Return a number from 0 to 1; None for any other value."""
    found = number(value)
    return found if found is not None and 0 <= found <= 1 else None


def difference(value: object) -> float | None:
    """Return a difference of two shares; None for any other value."""
    found = number(value)
    return found if found is not None and -1 <= found <= 1 else None


def count(value: object) -> int:
    """Return a whole number from 0; 0 for any other value."""
    found = number(value)
    return int(found) if found is not None and found > 0 else 0


def positive(value: object) -> float | None:
    """Return a number above 0 that a logarithmic axis can hold; None for any other value."""
    found = _finite(value)
    return found if found is not None and 1e-100 < found < 1e100 else None


def interval(value: object) -> tuple[float, float] | None:
    """Return two shares, the lower first; None for any other value."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = share(value[0]), share(value[1])
    return (low, high) if low is not None and high is not None and low <= high else None


def entries(value: object) -> list[Any]:
    """Return a list; an empty one for any other value.

    Raises:
        DataError: there are more entries than a page can show.
    """
    if not isinstance(value, list):
        return []
    if len(value) > _MOST_ENTRIES:
        raise DataError(f"list of more than {_MOST_ENTRIES:,} entries, which no page can show")
    return value


def objects(value: object) -> list[dict[str, Any]]:
    """Return the objects in a list; see ``entries`` for errors."""
    return [entry for entry in entries(value) if isinstance(entry, dict)]
