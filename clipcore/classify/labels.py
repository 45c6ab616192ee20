"""Reads the names that images are compared with."""

from __future__ import annotations

import os
from pathlib import Path

from clipcore.files import not_utf8, read_regular

_MAX_LABEL_BYTES, _SHOWN_CHARS = 1 << 20, 80


def read_labels(text: str) -> list[str]:
    """Return the names in a comma-separated text, or in a UTF-8 file with one name per line.

    Raises:
        ValueError: fewer than two names, one of them twice, or a file that is not there or cannot be read.
    """
    path = Path(text)
    if text.strip() and _is_there(path):
        try:
            # utf-8-sig: editors begin some files with a byte-order mark.
            content = _read_labels_file(path)
            if len(content) > _MAX_LABEL_BYTES:
                raise ValueError(
                    f"the file of labels {text} has more than {_MAX_LABEL_BYTES:,} bytes"
                )
            parts = content.decode("utf-8-sig").splitlines()
        except OSError as error:
            raise ValueError(f"cannot read the labels {text}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ValueError(not_utf8(f"the file of labels {text}", error)) from None
    elif "," not in text and (path.suffix or os.sep in text):
        raise ValueError(f'there is no file of labels {text}; names are written as "a cat, a dog"')
    else:
        parts = text.split(",")

    labels = [part.strip() for part in parts if part.strip()]
    if len(labels) < 2:
        found = f"only {labels[0][:_SHOWN_CHARS]!r}" if labels else "no name"
        raise ValueError(
            f'--labels holds {found}, and a picture is compared with at least two; write them as "a cat, a dog"'
        )
    same: dict[str, list[str]] = {}
    for label in labels:
        same.setdefault(as_compared(label), []).append(label)
    if twice := [names for names in same.values() if len(names) > 1]:
        names = " and ".join(repr(name[:_SHOWN_CHARS]) for name in twice[0][:2])
        raise ValueError(f"--labels holds {names}, one prompt that would share its probability")
    return labels


def as_compared(label: str) -> str:
    """Return a name in lower case with single spaces: a vocabulary tells nothing else apart."""
    return " ".join(label.lower().split())


def _read_labels_file(path: Path) -> bytes:
    # A shell's <(...) is a pipe that somebody writes to; another may be waited for without end.
    if path.parent in (Path("/dev/fd"), Path("/proc/self/fd")):
        with open(path, "rb") as pipe:
            return pipe.read(_MAX_LABEL_BYTES + 1)
    return read_regular(path, _MAX_LABEL_BYTES + 1)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # such as a text longer than any file's name
        return False
