"""Mutated tables and folders: a pair that is read is one of theirs, or has the change in it."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pyarrow.parquet
from PIL import Image

from attack.fuzz import (
    NUM_CASES,
    Sample,
    check_refused,
    common_start,
    digest,
    mutated,
    sample_of,
)
from attack.harness import Attack
from attack.images import encoded
from clipcore.data import DataError
from clipcore.data.sources import open_source
from clipcore.data.transforms import decode_image

NUM_ROWS = 6
_WORDS = ("a red square", "zwei grüne Kreise", "three, 3, III", "四", "five & more;", "6")
_PATHS = tuple(f"images/{row}.png" for row in range(NUM_ROWS))
_SEPARATORS = {"csv": ",", "tsv": "\t", "quoted.csv": ",", "metadata.csv": ","}
FORMATS = (*_SEPARATORS, "jsonl", "metadata.jsonl", "parquet", "folder")


def csv_line(fields: Sequence[str], separator: str, is_quoted: bool = False) -> str:
    """Return a row of a table; a field with the separator is quoted."""
    return separator.join(f'"{f}"' if separator in f or is_quoted else f for f in fields) + "\n"


def table_of(kind: str) -> bytes:
    """Return a whole table of a kind of text."""
    if kind.endswith("jsonl"):
        records = ({"file_name": p, "caption": w} for p, w in zip(_PATHS, _WORDS, strict=True))
        return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    separator = _SEPARATORS[kind]
    header = ("file_name", "text") if kind == "metadata.csv" else ("filepath", "title")
    words = _WORDS
    if kind in ("csv", "metadata.csv"):
        words = tuple(w.replace(",", ";") for w in _WORDS)  # so that no quote is there
    rows = zip(_PATHS, words, strict=True)
    lines = [csv_line(row, separator, kind == "quoted.csv") for row in rows]
    return (csv_line(header, separator) + "".join(lines)).encode()


def parquet_of(images: Sequence[bytes]) -> bytes:
    """Return a parquet table whose pages have checksums."""
    stream = io.BytesIO()
    cells = [{"bytes": image, "path": None} for image in images]
    table = pyarrow.table({"image": cells, "caption": list(_WORDS)})
    pyarrow.parquet.write_table(table, stream, row_group_size=4, write_page_checksum=True)
    return stream.getvalue()


def flipped_pages(content: bytes, dice: random.Random) -> bytes:
    """Return a parquet table with some bits changed before its description, which is at its end."""
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    changed = bytearray(content)
    for _ in range(dice.choice([1, 1, 3])):
        changed[dice.randrange(4, end)] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _with_row(content: bytes, row: int, change: Callable[[bytes], bytes]) -> bytes:
    """Return a table one of whose lines is changed; -1 is the header's."""
    lines = content.splitlines(keepends=True)
    lines[row + 1] = change(lines[row + 1])
    return b"".join(lines)


def _cell(change: Callable[[bytes], bytes], number: int) -> Callable[[bytes], bytes]:
    """Return a change of a line, given that of its last or first cell."""

    def changed(line: bytes) -> bytes:
        separator = b"\t" if b"\t" in line else b","
        cells = line.removesuffix(b"\n").split(separator, 1)
        cells[number] = change(cells[number])
        return separator.join(cells) + b"\n"

    return changed


# What a change of a whole table of text has to give: all of its pairs, a word of the refusal, or what becomes of the third.
_ALL = "all"
_Edit = tuple[Callable[[bytes], bytes], "str | Sample | tuple[str, None]"]
_THIRD = 2


def _third(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda content: _with_row(content, _THIRD, change)


def _caption(text: bytes) -> Callable[[bytes], bytes]:
    return _third(_cell(lambda _: text, 1))


def _image(text: bytes) -> Callable[[bytes], bytes]:
    return _third(_cell(lambda _: text, 0))


def _with_field(line: bytes, field: bytes) -> bytes:
    """Return a line with a field more."""
    separator = b"\t" if b"\t" in line else b","
    return line.removesuffix(b"\n") + separator + field + b"\n"


# Of csv and tsv: a change, and _ALL, a word of the refusal, None for a bad sample, or ("caption", text).
CSV_EDITS: dict[str, tuple[Callable[[bytes], bytes], Any]] = {
    "byte-order mark": (lambda c: b"\xef\xbb\xbf" + c, _ALL),
    "CRLF": (lambda c: c.replace(b"\n", b"\r\n"), _ALL),
    "both line ends": (lambda c: c.replace(b"\n", b"\r\n", 3), _ALL),
    "CR": (lambda c: c.replace(b"\n", b"\r"), _ALL),
    "no last line end": (lambda c: c.removesuffix(b"\n"), _ALL),
    "blank lines": (lambda c: c.replace(b"\n", b"\n\n\r\n"), _ALL),
    "UTF-16": (lambda c: c.decode().encode("utf-16"), "UTF-8"),
    "Latin-1": (lambda c: c.replace("ü".encode(), b"\xfc"), "UTF-8"),
    "surrogate": (_caption(b"\xed\xa0\x80"), "UTF-8"),
    "overlong": (_caption(b"\xc0\xaf"), "UTF-8"),
    "empty": (lambda c: b"", "no column"),
    "zeros": (lambda c: bytes(1000), "no column"),
    "header only": (lambda c: c[: c.index(b"\n") + 1], "no rows"),
    "no header": (lambda c: c[c.index(b"\n") + 1 :], "no column"),
    "other header": (lambda c: c.replace(b"t", b"T", 2), "no column"),
    "open quote": (_caption(b'"open'), "unexpected end of data"),
    "text behind a quote": (_caption(b'"open" shut'), "expected after"),
    "long line": (_caption(b"x" * (1 << 21)), "more than 1048576 characters"),
    "long field": (_caption(b"x" * (1 << 18)), "field larger"),
    "NUL": (_caption(b"a\0b"), ("caption", "a b")),
    "empty caption": (_caption(b" \0 "), None),
    "quotes inside": (_caption(b'6" of a "pipe"'), ("caption", '6" of a "pipe"')),
    "quoted quotes": (_caption(b'"6"" of\na pipe"'), ("caption", '6" of\na pipe')),
    "no caption": (_third(lambda line: b"images/2.png\n"), None),
    "no path": (_image(b""), None),
    "more fields": (_third(lambda line: _with_field(line, b"more")), None),
    "an empty field more": (_third(lambda line: _with_field(line, b"")), _ALL),
    "absent": (_image(b"images/9.png"), None),
    "a folder": (_image(b"images"), None),
    "a path of NUL": (_image(b"images/2.png\0"), None),
    "a long path": (_image(b"a/" * 5000), None),
    "a device": (_image(b"/dev/zero"), None),
    "up and down": (_image(b"images/../images/2.png"), _ALL),
}
# Of values of one record of jsonl, as JSON.
JSON_CAPTIONS: dict[str, Any] = {
    "7": None,
    "null": None,
    "true": None,
    "NaN": None,
    "1" * 5000: None,
    "-1e999": None,
    '""': None,
    '" \\u0000\\n"': None,
    "[]": None,
    "[1, null]": None,
    "[" * 50_000 + "]" * 50_000: None,
    '{"a": "b"}': None,
    '["one", "two"]': ("one", "two"),
    '["one", ["two"], 3]': ("one",),
    '"\\ud83d\\ude00"': "😀",
    '"a\\ud800b"': "a?b",
    '"\\ufeffmark"': "mark",
    '"first", "caption": "second"': "second",
    f'"{"x" * 10_000}"': "x" * 8192,
    f'"{"x" * (1 << 20)}"': None,
    '"cut': None,
    '"single\x01"': None,
}
JSON_IMAGES = (
    "7",
    "null",
    "[]",
    "{}",
    '""',
    '"images"',
    '"absent.png"',
    '"images/2.png\\u0000"',
    '"\\ud800"',
)


def _json_edits() -> dict[str, tuple[Callable[[bytes], bytes], Any]]:
    """Return what is done to a jsonl table, and what it has to give, as of ``CSV_EDITS``."""

    def record(image: str, caption: str) -> Callable[[bytes], bytes]:
        line = f'{{"file_name": {image}, "caption": {caption}}}\n'.encode()
        return _lines_edit(line)

    edits: dict[str, tuple[Callable[[bytes], bytes], Any]] = {
        name: CSV_EDITS[name]
        for name in ("byte-order mark", "CRLF", "both line ends", "no last line end", "blank lines")
    }
    edits |= {
        "empty": (lambda c: b"", "no lines"),
        "zeros": (lambda c: bytes(1000), "not JSON"),
        "CR": (lambda c: c.replace(b"\n", b"\r"), "not JSON"),
        "UTF-16": (lambda c: c.decode().encode("utf-16"), "not JSON"),
        "other names": (lambda c: c.replace(b"caption", b"Caption"), "no column"),
        "a list": (lambda c: b'["file_name", "caption"]\n' + c, "not a JSON object"),
        "depth": (lambda c: b"[" * 100_000 + b"\n" + c, "not JSON"),
        "Latin-1": (_lines_edit(b'{"file_name": "images/2.png", "caption": "\xfc"}\n'), None),
        "a row of depth": (_lines_edit(b'{"a": ' * 50_000 + b"\n"), None),
        "a row of text": (_lines_edit(b"no JSON\n"), None),
        "a row behind a row": (_lines_edit(b"{}{}\n"), None),
        "an empty record": (_lines_edit(b"{}\n"), None),
        "up and down": (record('"images/../images/2.png"', json.dumps(_WORDS[_THIRD])), _ALL),
    }
    image = f'"{_PATHS[_THIRD]}"'
    for value, expected in JSON_CAPTIONS.items():
        result = expected if expected is None else ("caption", expected)
        edits[f"caption {value[:30]!r}"] = (record(image, value), result)
    for value in JSON_IMAGES:
        edits[f"image {value!r}"] = (record(value, '"text"'), None)
    return edits


def _lines_edit(line: bytes) -> Callable[[bytes], bytes]:
    """Return a change that puts a line in place of a jsonl table's third."""
    return lambda content: _with_row(content, _THIRD - 1, lambda _: line)


JSON_EDITS = _json_edits()


class Tables(Attack):
    """A table is mutated; it is refused by name, or its rows are read, those that are whole in their places."""

    fast: ClassVar[int] = 400

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "images").mkdir()
        self._files = list[bytes]()
        for row, path in enumerate(_PATHS):
            self._files.append(encoded(Image.new("RGB", (8, 8), (40 * row, 9, 99)), "PNG"))
            (folder / path).write_bytes(self._files[-1])
        images = [digest(decode_image(data)) for data in self._files]
        self._pairs: list[Sample] = list(zip(_WORDS, images, strict=True))
        self._parquet = parquet_of(self._files)

    def cases(self) -> Mapping[str, Any]:
        named: dict[str, Any] = {f"untouched, {kind}": (kind, "untouched", 0) for kind in FORMATS}
        edits = [
            (kind, edit)
            for kind, those in {"csv": CSV_EDITS, "tsv": CSV_EDITS, "jsonl": JSON_EDITS}.items()
            for edit in those
        ]
        for number in range(NUM_CASES - len(named)):
            kind = FORMATS[number % len(FORMATS)]
            mode = ("edit", "a row", "anywhere")[number % 3]
            if mode == "edit":
                kind, edit = edits[number // 3 % len(edits)]
                named[f"{number}, {kind}, {edit}"] = (kind, mode, edit)
            else:
                named[f"{number}, {kind}, {mode}"] = (kind, mode, number)
        return named

    def attempt(self, what: Any, folder: Path) -> str:
        kind, mode, seed = what
        if kind == "folder":
            return self._try_folder(folder, random.Random(seed), mode)
        path = folder / (kind if kind.startswith("metadata") else f"pairs.{kind}")
        (folder / "images").symlink_to(self.folder / "images")
        content = self._parquet if kind == "parquet" else table_of(kind)
        pairs = self._pairs
        if kind in ("csv", "metadata.csv"):
            pairs = [(pair[0].replace(",", ";"), pair[1]) for pair in pairs if pair]
        if mode == "untouched":
            found = self._read(path, content, kind)
            assert found == pairs, f"{found}"
            return "untouched"
        if mode == "edit":
            return self._try_edit(path, content, kind, seed, pairs)

        dice = random.Random(seed)
        if kind == "parquet":
            damaged = flipped_pages(content, dice) if mode == "a row" else mutated(content, dice)
            return self._try_parquet(path, damaged, pairs)
        if mode == "a row":
            return self._try_row(path, content, kind, dice, pairs)
        return self._try_anywhere(path, content, mutated(content, dice), kind, pairs)

    def _read(self, path: Path, content: bytes, kind: str) -> list[Sample] | str:
        """Return what the rows of a table give, or why it is refused."""
        path.write_bytes(content)
        is_folder = kind.startswith("metadata")
        opened = path.parent if is_folder else path
        separator = _SEPARATORS.get(kind, ",")
        try:
            source = open_source(str(opened), separator=separator)
            return [sample_of(source, index)[0] for index in range(len(source))]
        except DataError as error:
            return check_refused(error, opened)

    def _try_edit(
        self, path: Path, content: bytes, kind: str, edit: str, pairs: list[Sample]
    ) -> str:
        """Make a known change of a table; raise unless it gives what is known."""
        change, expected = (JSON_EDITS if kind == "jsonl" else CSV_EDITS)[edit]
        found = self._read(path, change(content), kind)
        if isinstance(expected, str) and expected != _ALL:
            assert isinstance(found, str) and expected in found, f"not {expected!r}: {found}"
            return "edited and refused"
        wanted = list(pairs)
        if expected is None:
            wanted[_THIRD] = None
        elif expected != _ALL:
            third = pairs[_THIRD]
            wanted[_THIRD] = (expected[1], third and third[1])
        assert found == wanted, f"{found}, not {wanted}"
        return "edited and read"

    def _try_row(
        self, path: Path, content: bytes, kind: str, dice: random.Random, pairs: list[Sample]
    ) -> str:
        """Mutate one row without its line's end and quotes; raise unless all others are in their places."""
        row = dice.randrange(NUM_ROWS)
        is_json = kind.endswith("jsonl")
        forbidden = b"\n" if is_json else b'\n\r"'

        def change(line: bytes) -> bytes:
            changed = mutated(line.removesuffix(b"\n"), dice)
            return bytes(b for b in changed if b not in forbidden) + b"\n"

        damaged = _with_row(content, row - is_json, change)
        found = self._read(path, damaged, kind)
        if isinstance(found, str):
            if is_json:
                assert row == 0, f"one row of jsonl has it refused: {found}"
            else:
                assert not _is_utf8(damaged), f"one row has it refused: {found}"
            return "refused"
        behind = NUM_ROWS - 1 - row
        assert len(found) in (NUM_ROWS - 1, NUM_ROWS), f"{len(found)} rows of {NUM_ROWS}"
        assert found[:row] == pairs[:row], f"rows before row {row} are {found[:row]}"
        assert found[len(found) - behind :] == pairs[row + 1 :], f"rows after row {row} are {found}"
        return "read"

    def _try_anywhere(
        self, path: Path, content: bytes, damaged: bytes, kind: str, pairs: list[Sample]
    ) -> str:
        """Mutate a table anywhere; raise unless the rows before the damage, and if no quote is there those behind it, are
        in their places, and what is new comes of lines that are new."""
        found = self._read(path, damaged, kind)
        is_json = kind.endswith("jsonl")
        prefix = common_start(content, damaged)
        most = min(len(content), len(damaged)) - len(prefix)
        suffix = common_start(content[::-1], damaged[::-1])[:most][::-1]
        before = max(prefix.count(b"\n") - (not is_json), 0)
        behind = max(suffix.count(b"\n") - 1, 0)
        if isinstance(found, str):
            if is_json:
                assert before == 0, f"a later row of jsonl has it refused: {found}"
            elif before and kind != "quoted.csv":
                is_known = not _is_utf8(damaged) or b'"' in damaged[len(prefix) :]
                assert is_known, f"a later row has it refused: {found}"
            return "refused"

        assert found[:before] == pairs[:before], f"{before} rows before the damage are {found}"
        has_header = prefix.count(b"\n") > 0 or is_json
        if has_header and b'"' not in (b"" if is_json else damaged):
            behind = min(behind, NUM_ROWS - before)
            rest = pairs[NUM_ROWS - behind :]
            assert found[len(found) - behind :] == rest, (
                f"{behind} rows behind the damage are {found}"
            )
        lines = set(content.splitlines())
        num_new = sum(line not in lines for line in damaged.splitlines())
        strange = [sample for sample in found if sample is not None and sample not in pairs]
        assert len(strange) <= num_new, f"{num_new} lines are new, and {strange} come of them"
        return "read"

    def _try_parquet(self, path: Path, damaged: bytes, pairs: list[Sample]) -> str:
        """Read a mutated parquet table; raise for a pair that was not there, or that is elsewhere."""
        found = self._read(path, damaged, "parquet")
        if isinstance(found, str):
            return "refused"
        for row, sample in enumerate(found):
            assert sample is None or sample in pairs, f"row {row} is {sample}"
        if len(found) == NUM_ROWS:
            moved = [n for n, s in enumerate(found) if s is not None and s != pairs[n]]
            assert not moved, f"rows {moved} are those of others"
        return "read"

    def _try_folder(self, folder: Path, dice: random.Random, mode: str) -> str:
        """Mutate one caption's file of a folder, its name or its picture; raise unless all others are read."""
        row = dice.randrange(NUM_ROWS)
        for number, word in enumerate(_WORDS):
            content, picture = word.encode(), self._files[number]
            if number == row and mode != "untouched":
                if mode == "a row":
                    content = mutated(content, dice)
                else:
                    picture = mutated(picture, dice)
            (folder / f"{number}.txt").write_bytes(content)
            (folder / f"{number}.png").write_bytes(picture)
        source = open_source(str(folder))
        found = [sample_of(source, index)[0] for index in range(len(source))]
        assert len(found) == NUM_ROWS, f"{len(found)} of {NUM_ROWS} pictures"
        others = [n for n in range(NUM_ROWS) if n != row or mode == "untouched"]
        assert [found[n] for n in others] == [self._pairs[n] for n in others], f"{found}"
        return "untouched" if mode == "untouched" else "read" if found[row] else "bad sample"


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return False
    return True
