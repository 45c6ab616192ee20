"""Values of JSON that may be anybody's, as the page of results can show them, or None."""

from __future__ import annotations

import math
import re
from typing import Any

from clipcore.data import printable

_MAX_NAME_CHARS = 500
# What XML cannot hold beside what a terminal cannot.
_NO_XML = re.compile("[\ufffe\uffff]")


def shown(value: object) -> str:
    """Return a name from data as a page can hold it; "–" of what is no text."""
    if not isinstance(value, str):
        return "–"
    return _NO_XML.sub("\ufffd", printable(value[:_MAX_NAME_CHARS]))


def number(value: object) -> float | None:
    """Return a finite number; None of anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # A whole number of JSON may be too large for a float.
    if isinstance(value, int) and abs(value) > 1 << 53:
        return None
    return float(value) if math.isfinite(value) else None


def share(value: object) -> float | None:
    """Return a number from 0 to 1; None of anything else."""
    found = number(value)
    return found if found is not None and 0 <= found <= 1 else None


def difference(value: object) -> float | None:
    """Return a difference of two shares; None of anything else."""
    found = number(value)
    return found if found is not None and -1 <= found <= 1 else None


def count(value: object) -> int:
    """Return a whole number from 0; 0 of anything else."""
    found = number(value)
    return int(found) if found is not None and found > 0 else 0


def positive(value: object) -> float | None:
    """Return a number above 0 that a logarithmic axis can hold; None of anything else."""
    found = number(value)
    return found if found is not None and 1e-100 < found < 1e100 else None


def interval(value: object) -> tuple[float, float] | None:
    """Return two shares, the lower first; None of anything else."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = share(value[0]), share(value[1])
    return (low, high) if low is not None and high is not None and low <= high else None


def objects(value: object) -> list[dict[str, Any]]:
    """Return the objects in a list; none of anything else."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
