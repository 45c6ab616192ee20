"""Formats numbers in the same way for pages, plots and the terminal.

The minus is the typographic sign, U+2212. A number that rounds to zero has no sign. None and non-finite numbers are a dash.
"""

from __future__ import annotations

import math

MISSING = "–"


def decimal(value: float | None, form: str = ".3g") -> str:
    """Return a number in one of Python's formats.

    >>> decimal(-0.001, ".2f"), decimal(-1.5), decimal(None)
    ('0.00', '−1.5', '–')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{value:{form}}"
    digits = text.partition("e")[0]
    if not any(digit in digits for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share in percent."""
    if share is None or not math.isfinite(share):
        return MISSING
    return f"{decimal(100 * share, f'.{digits}f')}%"


def signed_points(difference: float | None, form: str = ".1f") -> str:
    """Return a difference of shares in percentage points, with its sign; zero is "0".

    >>> signed_points(0.061), signed_points(-0.0004), signed_points(-0.5, "g")
    ('+6.1', '0', '−50')
    """
    if difference is None or not math.isfinite(difference):
        return MISSING
    text = decimal(100 * difference, f"+{form}")
    return text if text[0] in "+−" else "0"


def short(value: float) -> str:
    """Return a number in few characters.

    >>> short(1200.0), short(1e-6), short(0.0)
    ('1,200', '1e−6', '0')
    """
    if not value or not math.isfinite(value) or 1e-3 <= abs(value) < 1e5:
        return decimal(value, ",g")
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")
