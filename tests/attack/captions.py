"""Hostile captions: ids of the vocabulary, the same each time, and open_clip's."""

from __future__ import annotations

import importlib.util
import random
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import regex
from openclip import simple_tokenizer

from attack.fuzz import (
    NUM_CASES,
)
from attack.harness import Attack
from clipcore.tokenizer import (
    Tokenizer,
    VocabularyError,
    byte_tokenizer,
    clean,
    get_tokenizer,
    train_tokenizer,
)

_PIECES: dict[str, Sequence[str]] = {
    "words": (
        "a",
        "Cat's",
        "DON'T",
        "42nd",
        "naïve",
        "ΣΊΣΥΦΟΣ",
        "İstanbul",
        "ﬁne",
        "ＦＵＬＬ",
        "straße",
        "日本語",
    ),
    "entities": (
        "&amp;",
        "&amp;amp;lt;",
        "&#39;",
        "&#x1F600;",
        "&#0;",
        "&#xD800;",
        "&#1114112;",
        "&eacute",
        "&",
        "&#",
        ";",
    ),
    "spaces": (
        " ",
        "\t",
        "\n",
        "\r",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x1f",
        "\x85",
        "\xa0",
        "\u1680",
        "\u2003",
        "\u2028",
        "\u3000",
    ),
    "hidden": (
        "\0",
        "\x07",
        "\x1b[31m",
        "\x7f",
        "\xad",
        "\u200b",
        "\u200d",
        "\u2060",
        "\ufeff",
        "\ufff9",
        "\U000e0041",
    ),
    "directions": ("\u202e", "\u202d", "\u2066", "\u2069", "\u061c", "\u200f", "שלום", "مرحبا"),
    "marks": (
        "\u0301",
        "\u0345",
        "\u0323",
        "\u20dd",
        "\ufe0f",
        "\u0e33",
        "\u1ab0",
        "e\u0301",
        "q\u0307\u0323",
    ),
    "emoji": ("😀", "👩🏽‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "1️⃣", "\U0001f3fb"),
    "surrogates": ("\ud800", "\udfff", "\ud83d\ude00", "\ude00\ud83d"),
    "mojibake": ("cafÃ©", "â€œquotedâ€\x9d", "Ã¢â‚¬â„¢", "ÐŸÑ€Ð¸", "æ—¥æœ¬"),
    "specials": (
        "<|endoftext|>",
        "</w>",
        "Ġ",
        "##",
        "''",
        "'S",
        "'ſ",
        "_",
        "--",
        "$9.99",
        "\\u0041",
        "\\x00",
    ),
}
_PLANES = (
    (0, 0x80),
    (0x80, 0x250),
    (0x300, 0x370),
    (0x250, 0x10000),
    (0x10000, 0x20000),
    (0x20000, 0x110000),
)
_LONGEST = 20_000


def hostile_text(dice: random.Random) -> str:
    """Return a text of whatever Unicode has."""
    parts = list[str]()
    for _ in range(dice.randrange(10)):
        pieces = dice.choice([*_PIECES.values(), ()])
        if pieces:
            parts += dice.choices(pieces, k=dice.choice([1, 1, 3]))
        else:
            plane = dice.choice(_PLANES)
            parts += map(chr, dice.choices(range(*plane), k=dice.randrange(1, 6)))
    text = dice.choice(["", " ", " ", "  "]).join(parts)
    if not dice.randrange(40):
        text = (text * _LONGEST)[: dice.randrange(_LONGEST)]
    return text


def is_younger(text: str) -> bool:
    """Return whether a text has letters or digits that are younger than this Python's Unicode, which count elsewhere."""
    return any(
        unicodedata.category(c) == "Cn" and regex.match(r"[\p{L}\p{N}]", c) for c in set(text)
    )


class Captions(Attack):
    """A text of hostile Unicode gets the ids of open_clip, in rows of the right form, and comes back from them."""

    fast: ClassVar[int] = 400

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        dice = random.Random(0)
        words = [*_PIECES["words"], *_PIECES["emoji"]]
        captions = [" ".join(dice.choices(words, k=4)) for _ in range(200)]
        self._tokenizers = {
            "small": train_tokenizer(captions, 600),
            "bytes": byte_tokenizer(),
        }
        self._theirs: Any = None
        try:
            self._tokenizers["openai"] = get_tokenizer()
        except VocabularyError:
            return
        if importlib.util.find_spec("open_clip") is not None:
            self._theirs = simple_tokenizer().SimpleTokenizer()

    def cases(self) -> Mapping[str, Any]:
        # OpenAI's is what others are compared with.
        names = (
            ["openai", "small", "openai", "bytes"]
            if "openai" in self._tokenizers
            else ["small", "bytes"]
        )
        return {
            f"{number}, {names[number % len(names)]}": (names[number % len(names)], number)
            for number in range(NUM_CASES)
        }

    def attempt(self, what: Any, folder: Path) -> str:
        name, seed = what
        tokenizer, dice = self._tokenizers[name], random.Random(seed)
        text = hostile_text(dice)
        ids = tokenizer.encode(text)
        assert ids == tokenizer.encode(text), "the same text gets other ids"
        assert all(0 <= number < tokenizer.vocab_size - 2 for number in ids), f"{ids}"
        self._check_row(tokenizer, text, ids, dice.choice([2, 3, 16, 77]))
        outcome = self._come_back(tokenizer, text, ids)

        if name != "openai" or self._theirs is None or is_younger(clean(text)):
            return outcome
        try:
            expected = self._theirs.encode(text)
        except Exception:
            return f"{outcome}, open_clip fails"
        assert ids == expected, f"{text!r} is {ids}, in open_clip {expected}"
        return f"{outcome}, as open_clip's"

    def _check_row(self, tokenizer: Tokenizer, text: str, ids: list[int], length: int) -> None:
        """Raise unless a row has start, ids, end and padding, and is cut where it is long."""
        rows = tokenizer([text], length)
        assert tuple(rows.shape) == (1, length)
        kept = ids[: length - 2]
        expected = [tokenizer.sot_token_id, *kept, tokenizer.eot_token_id]
        expected += [0] * (length - len(expected))
        assert rows[0].tolist() == expected, f"the row is {rows[0].tolist()}, not {expected}"

    def _come_back(self, tokenizer: Tokenizer, text: str, ids: list[int]) -> str:
        """Return whether the text of ids has the same ids; raise where it has other letters."""
        decoded = tokenizer.decode(ids)
        # Which no piece takes in.
        expected = clean(text).replace("\u0345", "")
        assert decoded.replace(" ", "") == expected.replace(" ", ""), f"{text!r} is {decoded!r}"
        if clean(decoded) != decoded:  # such as an entity in an entity in an entity
            return "cleaned again"
        assert tokenizer.encode(decoded) == ids, f"{decoded!r} does not keep its ids"
        return "came back"
