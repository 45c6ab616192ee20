"""Reads names and prompts of classes from files beside a data set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from clipcore.data import DataError, printable
from clipcore.data.folders import read_json
from clipcore.evaluate.splits import MAX_CLASSES, Names
from clipcore.files import mode_of, not_utf8, read_regular

_MAX_TEXT_BYTES = 1 << 22  # limit of a file of names or prompts
_SHOWN_CHARS = 80
_SHOWN_TWINS = 3
# ImageNet's class ids, which make no prompts.
_WORDNET_ID = re.compile(r"n[0-9]{8}")


def read_text(path: Path, limit: int = _MAX_TEXT_BYTES) -> str:
    """Return the content of a small text file, UTF-8; raise DataError."""
    try:
        data = read_regular(path, limit + 1)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > limit:
        raise DataError(f"{path} is longer than {limit:,} bytes; write one short text a line")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(str(path), error)) from None


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, without empty lines at its end; raise DataError."""
    # Not splitlines, which also splits at characters that a name may contain.
    lines = [line.strip() for line in read_text(path).replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def names_from_lines(path: Path) -> Names:
    """Return the names in a file with one class per line; raise DataError."""
    return checked_names([(line,) for line in read_lines(path)], str(path))


def names_from_json(path: Path) -> Names:
    """Return the names of classes by index, from a list or an object: ``["cat", ["dog", "hound"]]``.

    Raises:
        DataError: the content is something else, or an index has no name.
    """
    given = read_json(str(path), None)
    shape = "a list of the class names in the order of the labels, or an object of labels to names"
    if isinstance(given, dict):
        numbers = {str(number) for number in range(len(given))}
        if set(given) != numbers:
            raise DataError(f"{path} is not {shape} from 0 to {len(given) - 1}")
        given = [given[str(number)] for number in range(len(given))]
    if not isinstance(given, list):
        raise DataError(f"{path} is not {shape}")

    found = []
    for value in given:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{path} is not {shape}; each name is a text or a list of texts")
        found.append(tuple(name.strip() for name in names))
    return checked_names(found, str(path))


def checked_names(names: Sequence[tuple[str, ...]], origin: str) -> Names:
    """Return the names of classes after checking them.

    Raises:
        DataError: there are no names, too many, an empty one, or most are ids.
    """
    if not names:
        raise DataError(f"{origin} names no class; write the name of each")
    if len(names) > MAX_CLASSES:
        raise DataError(f"{origin} names {len(names):,} classes, more than {MAX_CLASSES:,}")
    for number, those in enumerate(names):
        if not those or not all(those):
            raise DataError(
                f"{origin}: the name of class {number}, counted from 0, is empty; write it"
            )
    ids = [those[0] for those in names if _WORDNET_ID.fullmatch(those[0])]
    if 2 * len(ids) > len(names):
        raise DataError(
            f"{origin} names classes by ids, such as {ids[0]}, which no prompt holds; write names in their place, such as "
            "tench"
        )
    # JSON escapes can hold lone surrogates, which no tokenizer can encode.
    return tuple(
        tuple(name.encode("utf-8", "replace").decode("utf-8") for name in those) for those in names
    )


def with_spaces(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return each name as a class's name, with spaces for underscores."""
    return [(name.replace("_", " ").strip(),) for name in names]


def check_several(names: Names, origin: str) -> None:
    """Raise DataError for fewer than two classes, because every image would be a hit."""
    if len(names) < 2:
        shown = "".join(f", {printable(name)!r}" for those in names for name in those[:1])
        raise DataError(
            f"{origin} has one class{shown}, for all images; a classification needs two or more"
        )


def twin_notes(names: Names) -> tuple[str, ...]:
    """Return a note for each two classes that share a name, which no prompt can distinguish."""
    seen, notes, num_twins = dict[str, int](), list[str](), 0
    for number, those in enumerate(names):
        # A tokenizer ignores case and repeated spaces.
        for name in {" ".join(name.casefold().split()) for name in those}:
            other = seen.setdefault(name, number)
            if other == number:
                continue
            num_twins += 1
            if num_twins <= _SHOWN_TWINS:
                notes.append(
                    f"classes {other} and {number} are both called {printable(name)!r}: one of them always loses"
                )
    if num_twins > len(notes):
        notes.append(f"{num_twins - len(notes):,} more classes share a name with another")
    return tuple(notes)


def is_there(path: Path) -> bool:
    """Return whether anything has that name; if it is not a file, reading it raises the error."""
    try:
        return mode_of(path) is not None
    except OSError:
        return True


def first_file(name: str, folders: Sequence[Path]) -> Path | None:
    """Return the first file of that name in a list of folders, None if there is none."""
    return next((folder / name for folder in folders if is_there(folder / name)), None)


def templates_from_json(path: Path) -> tuple[str, ...]:
    """Return the prompts in a JSON file, a list of texts; raise DataError."""
    templates = read_json(str(path), None)
    if (
        not isinstance(templates, list)
        or not templates
        or not all(isinstance(template, str) for template in templates)
    ):
        raise DataError(f"{path} is not a list of prompts with {{}} where the class name goes")
    return _checked_templates(templates, path)


def templates_from_lines(path: Path) -> tuple[str, ...]:
    """Return the prompts in a text file, one per line; raise DataError."""
    templates = [line for line in read_lines(path) if line]
    if not templates:
        raise DataError(f"{path} holds no prompt; write one a line, with {{c}} for the class name")
    return _checked_templates(templates, path)


def _checked_templates(templates: Sequence[str], path: Path) -> tuple[str, ...]:
    for template in templates:
        if "{}" not in template and "{c}" not in template:
            shown = printable(template[:_SHOWN_CHARS])
            raise DataError(f"{path}: the prompt {shown!r} has no {{}} where the class name goes")
    return tuple(template.encode("utf-8", "replace").decode("utf-8") for template in templates)
