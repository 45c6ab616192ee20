"""Numbers as texts, the same on pages, in their plots and in the terminal.

A minus is the true sign, U+2212. What is rounded to zero has no sign, and None is a dash.
"""

from __future__ import annotations

MISSING = "–"


def decimal(value: float | None, form: str = ".3g") -> str:
    """Return a number in one of Python's formats.

    >>> decimal(-0.001, ".2f"), decimal(-1.5), decimal(None)
    ('0.00', '−1.5', '–')
    """
    if value is None:
        return MISSING
    text = f"{value:{form}}"
    digits = text.partition("e")[0]
    if not any(digit in digits for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share in percent."""
    return MISSING if share is None else f"{decimal(100 * share, f'.{digits}f')}%"


def signed_points(difference: float | None, form: str = ".1f") -> str:
    """Return a difference of shares in points, with its sign; that of zero is "0".

    >>> signed_points(0.061), signed_points(-0.0004), signed_points(-0.5, "g")
    ('+6.1', '0', '−50')
    """
    if difference is None:
        return MISSING
    text = decimal(100 * difference, f"+{form}")
    return text if text[0] in "+−" else "0"


def short(value: float) -> str:
    """Return a number in few letters.

    >>> short(1200.0), short(1e-6)
    ('1,200', '1e−6')
    """
    if 1e-3 <= abs(value) < 1e5:
        return decimal(value, ",g")
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")
