"""Encodes captions as token ids, equal to OpenAI's: byte-level BPE with 49,408 entries, or with a custom vocabulary.

A vocabulary is a list of merges. Its ids are, in this order: the 256 bytes, the 256 bytes that end a word
(``</w>``), one id per merge, start of text, end of text. OpenAI's merges are not part of this package: they are found
in an installed open_clip or CLIP, or read from a file. ``train_tokenizer`` learns a vocabulary in the same format from
captions, also as ``python -m clipcore.tokenizer --train DATA --vocab-size N``. ``byte_tokenizer`` needs no file.
Models such as SigLIP have vocabularies of other kinds, whose files ``HubTokenizer`` reads.

There are two differences from open_clip's SimpleTokenizer. Special strings in a caption ("<end_of_text>") are plain text,
because they would end the caption early. Letters and digits newer than Unicode 16 count as punctuation.

Source: Radford et al. 2021, section 2.4; Sennrich et al. 2016 (BPE). Shapes: B texts, L tokens.
"""

from __future__ import annotations

from clipcore.terminal import answer_early, complain, steady_output
from clipcore.tokenizer_arguments import BYTE_VOCAB_SIZE, OPENAI_VOCAB_SIZE, build_parser

if __name__ == "__main__":
    answer_early(build_parser().parse_args)

import codecs
import functools
import gzip
import hashlib
import html
import io
import json
import os
import signal
import string
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ftfy
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, trainers
from torch import LongTensor, Tensor

from clipcore.data.embedded import EMBEDDED
from clipcore.data.sources import names_pairs, open_source, spread_captions
from clipcore.files import is_file, is_folder, not_utf8, open_regular, read_regular, write_durably
from clipcore.hub_vocabulary import HubVocabularyError, JsonVocabulary, SentencePieceVocabulary
from clipcore.packages import package_folder
from clipcore.ranks.failures import end_with
from clipcore.towers.architectures import (
    TextConfig,
    UnknownModelError,
    described_in,
    find_model,
)
from clipcore.towers.descriptions import HF_MERGES_FILE, read_description
from clipcore.towers.published import LOCAL_PREFIX, place_of, refuse_hub

DEFAULT_CONTEXT_LENGTH = 77
OPENAI_FILE = "bpe_simple_vocab_16e6.txt.gz"
# Names of the vocabulary and the settings in a run's folder.
VOCABULARY_FILE, _SETTINGS_FILE = "vocabulary.txt.gz", "config.json"
# Vocabularies of other kinds than CLIP's, in a run's folder or beside weights; and how their files end.
HUB_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")
_HUB_SUFFIXES = (".json", ".model", ".spm")
_MAX_SETTINGS_BYTES = 1 << 22
# Hash of the 48,894 merges in use, as Tokenizer.sha256 computes it.
OPENAI_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"

# The pieces that are encoded separately: English endings, words, single digits, runs of anything else. U+0345 is in
# none: it folds to the letter iota, so OpenAI's case-insensitive expression finds it in no class and drops it.
_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
_MAX_CACHED_WORDS = 1 << 17
# OpenAI's file has 262,145 lines and 3.2 MB; models use only a part of it.
_MAX_LINES, _MAX_FILE_BYTES = 500_000, 1 << 25
# XLM-V's tokenizer.json, of 901,629 tokens, has 60 MB.
_MAX_HUB_BYTES = 1 << 28
# Files beside a tokenizer.json, whose pad_token is the padding.
_HUB_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MAX_CAPTION_CHARS = 1 << 20  # limit of a caption to learn from


class VocabularyError(ValueError):
    """A vocabulary is missing, damaged, or cannot be made; the message names the remedy."""


def clean(text: str) -> str:
    """Fix broken encodings, resolve HTML entities, collapse white space, and lower the case, as OpenAI does."""
    # The first two steps change nothing in printable ASCII without "&".
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@functools.cache
def _byte_symbols() -> dict[int, str]:
    """Return a printable character for each byte; the order of the keys is the order of the first 256 ids."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    pieces = pre_tokenizers.Split(tokenizers.Regex(_PIECES), "removed", invert=True)
    return pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


class Tokenizer:
    """Encodes captions with one vocabulary.

    Safe to share between threads and forked workers (nothing in it starts a thread), and picklable.

    Args:
        merges: pairs of symbols, the highest priority first.
        context_length: tokens per row, including start and end.

    Attributes:
        file_name: the name of its file in the folder of a run.
        vocab_size: ids are below this; also the rows of a model's token embedding.
        sot_token_id, eot_token_id: start and end of text, the two highest ids.
        all_special_ids: both of these ids.
        context_length: the default of ``__call__``.
        truncated: the number of texts that ``__call__`` has truncated in this process.

    Raises:
        VocabularyError: a merge joins unknown symbols, or creates an existing one.

    Example:
        >>> byte_tokenizer()("a cat", context_length=8).tolist()
        [[512, 320, 66, 64, 339, 513, 0, 0]]
    """

    file_name = VOCABULARY_FILE

    def __init__(
        self, merges: Iterable[tuple[str, str]], context_length: int = DEFAULT_CONTEXT_LENGTH
    ) -> None:
        self._merges = [(left, right) for left, right in merges]
        symbols = list(_byte_symbols().values())
        ids = {symbol: i for i, symbol in enumerate([*symbols, *(s + "</w>" for s in symbols)])}
        for number, (left, right) in enumerate(self._merges, start=1):
            if left not in ids or right not in ids or left + right in ids:
                raise VocabularyError(
                    f"merge {number}, {left!r} + {right!r}, does not follow from those before it: the vocabulary is "
                    "damaged, or is not in OpenAI's format"
                )
            ids[left + right] = len(ids)
        self.symbols = list(ids)
        self._bpe = tokenizers.Tokenizer(
            models.BPE(ids, self._merges, end_of_word_suffix="</w>", fuse_unk=False)
        )
        self._bpe.pre_tokenizer = _pre_tokenizer()
        self._cache: dict[str, list[int]] = {}
        self.sot_token_id, self.eot_token_id = len(ids), len(ids) + 1
        self.all_special_ids = [self.sot_token_id, self.eot_token_id]
        self.vocab_size = len(ids) + 2
        self.context_length = context_length
        self.truncated = 0

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], vocab_size: int | None = None) -> Tokenizer:
        """Read a vocabulary: a header line, then one merge per line; plain or gzipped text.

        Args:
            path: a file that ``save`` wrote, OpenAI's file, or the merges.txt of a Hugging Face CLIP.
            vocab_size: ids to use, 514 + merges [all merges; for OpenAI's file the 49,408 of the published models].

        Raises:
            VocabularyError: the file is missing, has another format, or fewer than ``vocab_size`` entries.
        """
        merges = _read_merges(Path(path), vocab_size)
        try:
            return cls(merges)
        except VocabularyError as error:
            raise VocabularyError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary, gzipped, in the format of OpenAI's file; the same bytes every time.

        Raises:
            VocabularyError: the file cannot be written.
        """
        # No newline at the end, because open_clip would read the empty line after it as a merge.
        text = "\n".join(["#version: 0.2 clipcore", *self.merge_lines()])
        try:
            write_durably(Path(path), gzip.compress(text.encode(), mtime=0))
        except OSError as error:
            raise VocabularyError(f"cannot write {path}: {error.strerror}") from error

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of the merges, which identifies the vocabulary in any file format."""
        return hashlib.sha256("\n".join(self.merge_lines()).encode()).hexdigest()

    def merge_lines(self) -> Iterator[str]:
        """Yield each merge as a line of a vocabulary file."""
        return (f"{left} {right}" for left, right in self._merges)

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text of any length, without start and end."""
        if not isinstance(text, str):
            raise ValueError(f"a text to tokenize is a str, not {type(text).__name__}: {text!r}")
        # No piece crosses white space, and captions repeat their words: a cached word is several times as fast as
        # encoding it again.
        ids: list[int] = []
        for word in clean(text).split():
            ids += self._cache.get(word) or self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        ids = list(self._bpe.encode(word).ids)
        if ids and len(self._cache) < _MAX_CACHED_WORDS and len(word) <= 32:
            self._cache[word] = ids
        return ids

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Return the text of a row of ids, up to the end of text; words are separated by one space.

        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        numbers = ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]
        text = bytearray()
        byte_of = {symbol: byte for byte, symbol in _byte_symbols().items()}
        for number in numbers:
            if number == self.eot_token_id:
                break
            if not 0 <= number < self.vocab_size:
                raise ValueError(f"id {number} is not in this vocabulary of {self.vocab_size:,}")
            if number != self.sot_token_id:
                symbol = self.symbols[number]
                text += bytes(byte_of[s] for s in symbol.removesuffix("</w>"))
                text += b" " * symbol.endswith("</w>")
        return text.decode(errors="replace").removesuffix(" ")

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> LongTensor:
        """Return rows of start, ids, end, padded with 0; a longer text is truncated, and keeps its end of text.

        Args:
            texts: one text, or B of them.
            context_length: L, at least 2 [the tokenizer's].

        Returns:
            int64 [B, L].

        Raises:
            ValueError: a text is not a str, or the context length is too small.
        """
        length = self.context_length if context_length is None else context_length
        if length < 2:
            raise ValueError(
                f"context_length holds start and end, so it is at least 2; got {length}"
            )
        return self._rows(texts, length, [self.sot_token_id], [self.eot_token_id], 0)

    def _rows(
        self,
        texts: str | Sequence[str],
        length: int,
        start: Sequence[int],
        end: Sequence[int],
        padding: int,
    ) -> LongTensor:
        """Return rows of ``start``, ids, ``end`` and padding, int64 [B, L]; count the texts that are truncated."""
        if isinstance(texts, bytes) or not isinstance(texts, Iterable):
            raise ValueError(
                f"the tokenizer takes a text or a list of texts, got {type(texts).__name__}"
            )
        batch = [texts] if isinstance(texts, str) else list(texts)
        room = length - len(start) - len(end)
        rows_BL = torch.full((len(batch), length), padding, dtype=torch.long)
        rows = rows_BL.numpy()
        for row, text in zip(rows, batch, strict=True):
            ids = self.encode(text)
            self.truncated += len(ids) > room
            tokens = [*start, *ids[:room], *end]
            row[: len(tokens)] = tokens
        return rows_BL  # type: ignore[return-value]

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self._merges, self.context_length)


def _restored(
    kind: type[Tokenizer], merges: list[tuple[str, str]], context_length: int
) -> Tokenizer:
    """Return a tokenizer from a pickle; that of a subclass is made without its file."""
    tokenizer = kind.__new__(kind)
    Tokenizer.__init__(tokenizer, merges, context_length)
    return tokenizer


def _read_merges(path: Path, vocab_size: int | None) -> list[tuple[str, str]]:
    """Return the merges in a file, as ``Tokenizer.from_file`` reads it."""
    header, *lines = _read_lines(path)
    if "#version" not in header:
        raise VocabularyError(
            f'{path} is not a vocabulary: its first line has no "#version"; make one with python -m '
            "clipcore.tokenizer --train captions.txt --vocab-size N"
        )
    if vocab_size is None and "bpe_simple_vocab_16e6" in header:
        vocab_size = OPENAI_VOCAB_SIZE
    lines = [line for line in lines if line.strip()]
    num_merges = len(lines) if vocab_size is None else vocab_size - BYTE_VOCAB_SIZE
    if not 0 <= num_merges <= len(lines):
        raise VocabularyError(
            f"{path} has {len(lines) + BYTE_VOCAB_SIZE:,} entries, so that a vocabulary of {vocab_size:,} cannot "
            "be taken from it: the file is cut short, or belongs to another model"
        )
    merges = []
    for number, line in enumerate(lines[:num_merges], start=1):
        parts = line.split()
        if len(parts) != 2:
            raise VocabularyError(f"{path}: merge {number} is not two symbols: {line[:80]!r}")
        merges.append((parts[0], parts[1]))
    return merges


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, gzipped or not."""
    try:
        content = read_regular(path, _MAX_FILE_BYTES + 1)
        if content.startswith(b"\x1f\x8b"):
            with gzip.open(io.BytesIO(content)) as unzipped:
                content = unzipped.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES or content.count(b"\n") > _MAX_LINES:
            raise VocabularyError(
                f"the vocabulary {path} holds more than {_MAX_LINES:,} lines or {_MAX_FILE_BYTES:,} bytes; no CLIP's does"
            )
        return content.decode().split("\n")
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise VocabularyError(f"the vocabulary {path} is damaged: {error}") from error
    except OSError as error:
        raise VocabularyError(f"cannot read the vocabulary {path}: {error.strerror}") from error


class SimpleTokenizer(Tokenizer):
    """open_clip's tokenizer: its arguments, in its order, with OpenAI's vocabulary or another file's.

    Args:
        bpe_path: vocabulary file [OpenAI's, see ``find_openai_vocabulary``].
        additional_special_tokens: None; the text of a caption never becomes a special token.
        context_length: tokens per row; None is its default too.
        clean: "lower", how CLIP's captions are cleaned.
        reduction_mask: "", so that a longer text is truncated.

    Raises:
        ValueError: an argument requests what only open_clip has.
        VocabularyError: the file is missing or damaged.
    """

    def __init__(
        self,
        bpe_path: str | os.PathLike[str] | None = None,
        additional_special_tokens: Sequence[str] | None = None,
        context_length: int | None = DEFAULT_CONTEXT_LENGTH,
        clean: str = "lower",
        reduction_mask: str = "",
    ) -> None:
        _check_settings(additional_special_tokens, clean, reduction_mask)
        path = find_openai_vocabulary() if bpe_path is None else Path(bpe_path)
        super().__init__(_read_merges(path, None), context_length or DEFAULT_CONTEXT_LENGTH)

    @functools.cached_property
    def encoder(self) -> dict[str, int]:
        """The id of each symbol, as in open_clip: bytes as printable characters, ``</w>`` at the end of a word."""
        return {symbol: number for number, symbol in enumerate(self._with_special())}

    @functools.cached_property
    def decoder(self) -> dict[int, str]:
        """The symbol of each id."""
        return dict(enumerate(self._with_special()))

    def _with_special(self) -> list[str]:
        return [*self.symbols, "<start_of_text>", "<end_of_text>"]

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Return the text of a row of ids, as open_clip does: with start, end and what follows it, such as padding.

        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        numbers = ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]
        for number in numbers:
            if number not in self.decoder:
                raise ValueError(f"id {number} is not in this vocabulary of {self.vocab_size:,}")
        byte_of = {symbol: byte for byte, symbol in _byte_symbols().items()}
        joined = "".join(self.decoder[number] for number in numbers)
        text = bytes(byte_of[symbol] for symbol in joined).decode(errors="replace")
        return text.replace("</w>", " ")


def _check_settings(
    additional_special_tokens: Sequence[str] | None, clean: str, reduction_mask: str
) -> None:
    """Raise ValueError for settings of open_clip's tokenizer that clipcore's lacks."""
    for name, value, is_usual, remedy in (
        (
            "additional_special_tokens",
            additional_special_tokens,
            not additional_special_tokens,
            "a CLIP's text tower has no rows for them",
        ),
        ("clean", clean, clean == "lower", "clipcore's models were trained with 'lower'"),
        ("reduction_mask", reduction_mask, not reduction_mask, "longer captions are truncated"),
    ):
        if not is_usual:
            raise ValueError(f"{name}={value!r} exists only in open_clip; leave it out: {remedy}")


# How captions are cleaned for the vocabularies of the hub, by open_clip's names, see ``CLEANINGS``.


def _mended(text: str) -> str:
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _canonical(text: str) -> str:
    """Clean a caption as SigLIP does: without punctuation, in lower case."""
    plain = _mended(text).replace("_", " ").translate(_NO_PUNCTUATION)
    return " ".join(plain.lower().split())


def _spaced(text: str) -> str:
    return " ".join(_mended(text).split())


_CLEAN: dict[str, Callable[[str], str]] = {
    "lower": clean,
    "canonicalize": _canonical,
    "whitespace": _spaced,
}


class HubTokenizer(Tokenizer):
    """Encodes captions with the vocabulary in a file; a tokenizer.json, or SentencePiece's.

    Rows are those of open_clip's ``HFTokenizer``: cleaned as the model's description says, encoded, truncated so that the
    end of text stays, and padded. Special strings in a caption ("</s>") are plain text, as with CLIP's vocabulary.

    Safe to share between threads and forked workers, and picklable.

    Args:
        content: what is in the file; a tokenizer.json begins with "{", perhaps after a byte order mark.
        text: the text tower that the rows are for: how captions are cleaned, the size of its vocabulary (which may be larger
            than the file's) and its context length. None cleans white space, as open_clip does.
        pad_token: the padding of a tokenizer.json that does not say its own.

    Attributes:
        pad_token_id: the padding.
        file_name: the name of the file in the folder of a run.

    Raises:
        VocabularyError: the file is damaged, has no end of text or no padding, has more tokens than the tower, or has
            its end of text at another id than the tower reads.
    """

    def __init__(
        self, content: bytes, text: TextConfig | None = None, pad_token: str | None = None
    ) -> None:
        self._text = text
        self._clean = _CLEAN[(text and text.clean) or "whitespace"]
        self._strips_end = text is not None and text.strip_sep_token
        self._vocabulary: JsonVocabulary | SentencePieceVocabulary
        plain = content.removeprefix(codecs.BOM_UTF8).lstrip()
        try:
            if plain.startswith(b"{"):
                self._vocabulary = JsonVocabulary(plain, pad_token)
            else:
                self._vocabulary = SentencePieceVocabulary(content)
        except HubVocabularyError as error:
            raise VocabularyError(str(error)) from error
        self.content = self._vocabulary.content
        self.file_name = self._vocabulary.file_name
        self.pad_token_id, self.eot_token_id = self._vocabulary.pad_id, self._vocabulary.end_id
        self.all_special_ids = sorted({self.pad_token_id, self.eot_token_id})
        self.vocab_size = self._vocabulary.size
        self.context_length = DEFAULT_CONTEXT_LENGTH
        self.truncated = 0
        if text is None:
            return
        self.context_length = text.context_length
        # Of a published model: the tower has rows to spare, such as CLIPA's 32,000 for BERT's 30,522.
        if text.hf_tokenizer_name is not None:
            if self.vocab_size > text.vocab_size:
                raise VocabularyError(
                    f"the vocabulary has {self.vocab_size:,} tokens, and the model {text.vocab_size:,}: give that of "
                    f"{text.hf_tokenizer_name}"
                )
            self.vocab_size = text.vocab_size
        self._check_end(text)

    def _check_end(self, text: TextConfig) -> None:
        """Raise VocabularyError unless a text tower reads its features at this vocabulary's end of text."""
        largest = self._vocabulary.size - 1
        if text.pool_type == "argmax" and self.eot_token_id != largest:
            raise VocabularyError(
                f"the text tower reads its features at the largest id, {largest:,}, and this vocabulary's end of text is "
                f"{self.eot_token_id:,}: choose a model with pool_type last or eos"
            )
        if text.pool_type == "eos" and self.eot_token_id != text.eos_id:
            raise VocabularyError(
                f"the text tower reads its features at the id {text.eos_id:,}, and this vocabulary's end of text is "
                f"{self.eot_token_id:,}: give the model's own vocabulary, or choose a model with that eos_id"
            )

    @classmethod
    def from_hub_file(
        cls, path: str | os.PathLike[str], text: TextConfig | None = None
    ) -> HubTokenizer:
        """Read a tokenizer.json, or a ``.model`` of SentencePiece; see the class.

        Raises:
            VocabularyError: see the class; or the file cannot be read, or sentencepiece is not installed.
        """
        path = Path(path)
        try:
            content = read_regular(path, _MAX_HUB_BYTES)
        except OSError as error:
            raise VocabularyError(
                f"cannot read the vocabulary {path}: {error.strerror or error}"
            ) from error
        try:
            return cls(content, text, _pad_token_beside(path))
        except VocabularyError as error:
            raise VocabularyError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary as it was read, with its padding.

        Raises:
            VocabularyError: the file cannot be written.
        """
        try:
            write_durably(Path(path), self.content)
        except OSError as error:
            raise VocabularyError(f"cannot write {path}: {error.strerror}") from error

    @property
    def pad_token(self) -> str:
        """The padding as a text."""
        return self._vocabulary.token(self.pad_token_id)

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of the file, which identifies the vocabulary."""
        return hashlib.sha256(self.content).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text of any length, without special ones such as the end."""
        if not isinstance(text, str):
            raise ValueError(f"a text to tokenize is a str, not {type(text).__name__}: {text!r}")
        return self._vocabulary.encode(self._clean(text))

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Return the text of a row of ids, without special ones.

        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        numbers = ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]
        for number in numbers:
            if not 0 <= number < self._vocabulary.size:
                raise ValueError(
                    f"id {number} is not in this vocabulary of {self._vocabulary.size:,}"
                )
        return self._vocabulary.decode(numbers)

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> LongTensor:
        """Return rows of ids with their end, padded; a longer text is truncated, and keeps its end.

        Args:
            texts: one text, or B of them.
            context_length: L [the tokenizer's].

        Returns:
            int64 [B, L].

        Raises:
            ValueError: a text is not a str, or the context length has no room for the special ids.
        """
        length = self.context_length if context_length is None else context_length
        start, end = self._vocabulary.around
        if length < len(start) + len(end):
            raise ValueError(
                f"context_length holds {len(start) + len(end)} special ids, so it is at least as large; got {length}"
            )
        rows_BL = self._rows(texts, length, start, end, self.pad_token_id)
        if self._strips_end:
            # As open_clip does, with 0 and not with the padding.
            rows_BL[rows_BL == self.eot_token_id] = 0
        return rows_BL

    def merge_lines(self) -> Any:
        """Raise VocabularyError: there are no merges of CLIP's kind."""
        raise VocabularyError("the vocabulary is not of CLIP's kind, and has no merges of its own")

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored_hub, (self.content, self._text, self.context_length)


def _restored_hub(content: bytes, text: TextConfig | None, context_length: int) -> HubTokenizer:
    tokenizer = HubTokenizer(content, text)
    tokenizer.context_length = context_length
    return tokenizer


def _pad_token_beside(path: Path) -> str | None:
    """Return the padding that a settings file beside a tokenizer.json names, None without such a file."""
    for name in _HUB_SETTINGS:
        settings = path.parent / name
        if path.suffix != ".json" or not is_file(settings):
            continue
        try:
            token = json.loads(read_regular(settings, _MAX_HUB_BYTES)).get("pad_token")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise VocabularyError(
                f"cannot read {settings}, which names the padding: {error}"
            ) from error
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


def byte_tokenizer(context_length: int = DEFAULT_CONTEXT_LENGTH) -> Tokenizer:
    """Return the vocabulary without merges: 514 entries, one token per byte, no file."""
    return Tokenizer([], context_length)


def train_tokenizer(
    captions: Iterable[str], vocab_size: int, context_length: int = DEFAULT_CONTEXT_LENGTH
) -> Tokenizer:
    """Learn merges from captions: the most frequent pair of symbols first; pairs that occur once are never merged.

    The result depends only on the captions, not on their order or the number of threads. If the captions do not have
    enough pairs, it is smaller than requested, with a warning.

    Args:
        captions: any number of texts, read once.
        vocab_size: entries to make, at least 514.

    Raises:
        VocabularyError: ``vocab_size`` is too small, or there is no caption with text.
    """
    if isinstance(captions, str):
        raise VocabularyError("captions are several texts; put a single one into a list")
    if vocab_size < BYTE_VOCAB_SIZE:
        raise VocabularyError(
            f"a vocabulary has at least {BYTE_VOCAB_SIZE} entries (bytes, bytes that end a word, start, end); "
            f"got {vocab_size}"
        )
    if vocab_size > _MAX_LINES:
        raise VocabularyError(
            f"a vocabulary has at most {_MAX_LINES:,} entries; got {vocab_size:,}"
        )
    merges = _learn_merges(captions, vocab_size)
    tokenizer = Tokenizer(merges, context_length)
    if tokenizer.vocab_size < vocab_size:
        warnings.warn(
            f"the captions give {len(merges):,} merges, so that the vocabulary has {tokenizer.vocab_size:,} entries "
            f"rather than {vocab_size:,}; more text gives more",
            stacklevel=2,
        )
    return tokenizer


def _learn_merges(captions: Iterable[str], vocab_size: int) -> list[tuple[str, str]]:
    num_captions = 0

    def cleaned() -> Iterator[str]:
        nonlocal num_captions
        for caption in captions:
            if text := clean(caption):
                num_captions += 1
                yield text

    bpe = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = _pre_tokenizer()
    symbols = list(_byte_symbols().values())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        end_of_word_suffix="</w>",
        show_progress=False,
        # The ids of the symbols break ties between equal counts. By default the trainer numbers the ends of words in
        # the order of a hash table, which differs between processes; so all symbols are given here.
        special_tokens=[*symbols, *(symbol + "</w>" for symbol in symbols)],
    )
    parallel = os.environ.get("TOKENIZERS_PARALLELISM")
    # Threads are used only if the user requests them: a process that has run the library's threads cannot fork workers
    # without a warning, or, if the variable is true, without a hang.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        bpe.train_from_iterator(cleaned(), trainer)
    finally:
        if parallel is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
    if not num_captions:
        raise VocabularyError("there is no caption with text to learn a vocabulary from")
    return [(left, right) for left, right in json.loads(bpe.to_str())["model"]["merges"]]


def open_vocabulary(path: str | os.PathLike[str], text: TextConfig | None = None) -> Tokenizer:
    """Read a vocabulary of CLIP's kind, or a tokenizer.json or SentencePiece's file, by the name of the file.

    Args:
        text: the text tower that its rows are for, which says how captions are cleaned for the other kinds.

    Raises:
        VocabularyError: the file is missing, damaged or of another kind.
    """
    if not Path(path).name.endswith(_HUB_SUFFIXES):
        return Tokenizer.from_file(path)
    return HubTokenizer.from_hub_file(path, text)


def vocabulary_of_run(run_dir: Path) -> Path:
    """Return the vocabulary in a run's folder, whether it is there or not."""
    hub_files = (run_dir / name for name in HUB_FILES)
    return next((path for path in hub_files if is_file(path)), run_dir / VOCABULARY_FILE)


def how_to_get_vocabulary(repository: str) -> str:
    """Return in words how to get the vocabulary that a published model has on the Hugging Face hub."""
    folder = repository.rpartition("/")[2]
    return (
        f"it has the vocabulary of {repository}, and clipcore downloads nothing: run hf download {repository} "
        f"tokenizer.json tokenizer_config.json --local-dir {folder}, and give {folder}/tokenizer.json"
    )


def find_openai_vocabulary() -> Path:
    """Return the path of OpenAI's file: CLIPCORE_BPE, or in an installed open_clip or clip (which are not imported).

    Raises:
        VocabularyError: it is in none of them.
    """
    if given := os.environ.get("CLIPCORE_BPE"):
        return Path(given)
    for package in ("open_clip", "clip"):
        folder = package_folder(package)
        if folder is not None and (path := folder / OPENAI_FILE).is_file():
            return path
    raise VocabularyError(
        'OpenAI\'s vocabulary is not installed: pip install "clipcore[openai-vocab]", or set CLIPCORE_BPE to a '
        f"{OPENAI_FILE}, or make your own vocabulary: python -m clipcore.tokenizer --train captions.txt"
    )


def get_tokenizer(
    model_name: str | os.PathLike[str] = "",
    context_length: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    bpe_path: str | os.PathLike[str] | None = None,
    additional_special_tokens: Sequence[str] | None = None,
    clean: str = "lower",
    reduction_mask: str = "",
) -> Tokenizer:
    """Return the tokenizer of a model, of a run, or of another vocabulary.

    Args:
        model_name: one of ``list_models()``, OpenAI's spelling, or a JSON file that describes a model; the folder of
            a run or of one of its checkpoints; or ``local-dir:`` and such a folder, or one that describes its model
            [OpenAI's vocabulary].
        context_length: tokens per row [the model's, 77 without a name].
        cache_dir: accepted, as in open_clip; nothing is downloaded.
        bpe_path: vocabulary file, also a tokenizer.json or a SentencePiece ``.model`` [OpenAI's, see
            ``find_openai_vocabulary``; the byte vocabulary for models of 514 tokens].
        additional_special_tokens, clean, reduction_mask: see ``SimpleTokenizer``; accepted with open_clip's defaults.

    Raises:
        UnknownModelError: there is no model of that name.
        ValueError: the context length is not an integer, or is too small for start and end; or an argument requests what
            only open_clip has.
        VocabularyError: no vocabulary is found, it is damaged or not of the model's size, or a run is given ``bpe_path``.
    """
    if context_length is not None and (type(context_length) is not int or context_length < 2):
        raise ValueError(
            f"context_length is a whole number of at least 2, for start and end; got {context_length!r}"
        )
    _check_settings(additional_special_tokens, clean, reduction_mask)
    described = None
    if isinstance(model_name, str) and (place := place_of(model_name)) is not None:
        if place[0] != LOCAL_PREFIX:
            refuse_hub(model_name, place[1])
        folder = Path(place[1])
        if not is_folder(folder):
            raise VocabularyError(f"{model_name}: there is no folder {folder}")
        if (found := read_description(folder)) is None:
            model_name = folder
        else:
            described = found.config.text
    if described is None and (run_dir := run_folder(model_name)) is not None:
        if bpe_path is not None:
            raise VocabularyError(f"{run_dir} has a vocabulary of its own: leave bpe_path out")
        return _tokenizer_of_run(run_dir, context_length)
    if described is not None and bpe_path is None:
        bpe_path = vocabulary_beside(folder)
    model = described
    if model is None and model_name:
        model = find_model(model_name).text  # type: ignore[arg-type]
    if bpe_path is None and model is not None and model.vocab_size == BYTE_VOCAB_SIZE:
        tokenizer = byte_tokenizer()
        tokenizer.context_length = context_length or model.context_length
        return tokenizer

    if bpe_path is None and model is not None and model.hf_tokenizer_name is not None:
        raise VocabularyError(
            f"{model_name}: {how_to_get_vocabulary(model.hf_tokenizer_name)} as bpe_path"
        )
    if bpe_path is None and model is not None and model.vocab_size != OPENAI_VOCAB_SIZE:
        raise VocabularyError(
            f"{model_name} has {model.vocab_size} tokens and no vocabulary of its own: pass the one that its run was "
            "trained with as bpe_path, such as vocabulary.txt.gz in the run's folder"
        )
    path = find_openai_vocabulary() if bpe_path is None else Path(bpe_path)
    tokenizer = open_vocabulary(path, model)
    if model is not None:
        if tokenizer.vocab_size != model.vocab_size:
            raise VocabularyError(
                f"{path} has {tokenizer.vocab_size} tokens, and {model_name} {model.vocab_size}: pass the vocabulary of the "
                "model, or make the model with force_vocab_size"
            )
        tokenizer.context_length = model.context_length
    note_other_merges(tokenizer, path)
    if context_length is not None:
        tokenizer.context_length = context_length
    return tokenizer


def note_other_merges(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Warn the caller's caller if a vocabulary could be taken for OpenAI's by its size."""
    if tokenizer.vocab_size == OPENAI_VOCAB_SIZE and tokenizer.sha256 != OPENAI_SHA256:
        warnings.warn(
            f"{path} has the size of OpenAI's vocabulary, but other merges: not for a published model",
            stacklevel=3,
        )


def vocabulary_beside(weights: str | os.PathLike[str]) -> Path | None:
    """Return the vocabulary file that belongs to weights, None if there is none beside them.

    Args:
        weights: a run, one of its checkpoints or a file in one; or a folder of transformers' kind, such as an export, or a
            file of weights in it.
    """
    path = Path(weights)
    folder = path if is_folder(path) else path.absolute().parent
    for run in _possible_runs(folder):
        if is_folder(run / "checkpoints") and is_file(vocabulary_of_run(run)):
            return vocabulary_of_run(run)
    is_described = is_file(folder / "tokenizer_config.json")
    # A CLIP's folder may have a tokenizer.json too, of the same vocabulary.
    names = (HF_MERGES_FILE, *HUB_FILES) if is_described else HUB_FILES[1:]
    return next((folder / name for name in names if is_file(folder / name)), None)


def other_vocabulary_beside(
    weights: str | os.PathLike[str], text: TextConfig, tokenizer: Tokenizer
) -> Path | None:
    """Return the vocabulary file that belongs to weights if it is another than a tokenizer's; None if there is none.

    Files of two kinds may hold one vocabulary, so they are not compared.

    Args:
        weights: see ``vocabulary_beside``.
        text: their text tower.

    Raises:
        VocabularyError: the file is damaged, or is not of the text tower.
    """
    path = vocabulary_beside(weights)
    if path is None:
        return None
    found = open_vocabulary(path, text)
    is_other = found.file_name == tokenizer.file_name and found.sha256 != tokenizer.sha256
    return path if is_other else None


def run_folder(name: str | os.PathLike[str]) -> Path | None:
    """Return the folder of a run, given it or one of its checkpoints; None if the name is not a folder.

    Raises:
        VocabularyError: the folder has no vocabulary, or the path does not exist.
    """
    is_path = isinstance(name, os.PathLike)
    if not name or not (is_path or isinstance(name, str)) or _is_model(name):
        return None
    path = Path(name)
    try:
        is_there = is_folder(path)
    except (OSError, ValueError):  # such as a text that is too long for a file name
        is_there = False
    if not is_there:
        if is_path:
            raise VocabularyError(f"there is no folder {path}")
        return None

    for folder in _possible_runs(path):
        if is_file(vocabulary_of_run(folder)):
            return folder
    raise VocabularyError(
        f"{path} holds no {VOCABULARY_FILE}, as the folder of a run does; name one, or a file as bpe_path"
    )


def _possible_runs(folder: Path) -> tuple[Path, ...]:
    """Return a folder, and the one of the run whose checkpoint it is by its place."""
    above = folder.absolute().parent
    return (folder, above.parent) if above.name == "checkpoints" else (folder,)


def _is_model(name: object) -> bool:
    """Return whether a name is a model's; a folder with a model's name is ignored."""
    try:
        find_model(name)  # type: ignore[arg-type]
    except UnknownModelError:
        return False
    return True


def _tokenizer_of_run(run_dir: Path, context_length: int | None) -> Tokenizer:
    """Return a run's tokenizer, for rows of its model's length or of another one."""
    settings = run_dir / _SETTINGS_FILE
    path, text = vocabulary_of_run(run_dir), None
    is_other = path.name != VOCABULARY_FILE
    if (context_length is None or is_other) and is_file(settings):
        try:
            name = json.loads(read_regular(settings, _MAX_SETTINGS_BYTES))["model"]
            text = find_model(described_in(run_dir, name)).text
            context_length = context_length or text.context_length
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise VocabularyError(
                f"cannot read the model of the run in {settings} ({error}); pass its context_length"
            ) from error
    if is_other and text is None:
        raise VocabularyError(
            f"{run_dir} has no {_SETTINGS_FILE}, which says how captions are cleaned for {path.name}; put it back"
        )
    tokenizer = open_vocabulary(path, text)
    tokenizer.context_length = context_length or DEFAULT_CONTEXT_LENGTH
    return tokenizer


@functools.cache
def _openai_tokenizer() -> Tokenizer:
    return get_tokenizer()


@functools.cache
def _simple_tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


def decode(output_ids: Tensor) -> str:
    """Return the text of a row of ids of OpenAI's vocabulary, with start and end, as open_clip's function does."""
    return _simple_tokenizer().decode(output_ids)


def tokenize(
    texts: str | Sequence[str],
    context_length: int = DEFAULT_CONTEXT_LENGTH,
    truncate: bool = True,
) -> LongTensor:
    """Encode texts with OpenAI's vocabulary into ids, int64 [B, context_length].

    Args:
        truncate: whether to truncate longer texts, as in open_clip; otherwise they are errors, as in OpenAI's package.

    Raises:
        ValueError: a text is too long and ``truncate`` is False.
    """
    tokenizer = _openai_tokenizer()
    if not truncate:
        for text in [texts] if isinstance(texts, str) else texts:
            if (num_tokens := len(tokenizer.encode(text)) + 2) > context_length:
                raise ValueError(
                    f"{text!r} has {num_tokens} tokens, more than context_length={context_length}; shorten it or "
                    "pass truncate=True"
                )
    return tokenizer(texts, context_length)


def _read_captions(path: Path) -> Iterator[str]:
    """Yield the lines of a file; raise VocabularyError if it is not UTF-8."""
    with io.TextIOWrapper(open_regular(path), "utf-8-sig") as file:
        try:
            while line := file.readline(_MAX_CAPTION_CHARS):
                if len(line) == _MAX_CAPTION_CHARS:
                    raise VocabularyError(
                        f"{path} holds a line of more than {_MAX_CAPTION_CHARS:,} characters, which is not a caption"
                    )
                yield line
        except UnicodeDecodeError as error:
            raise VocabularyError(not_utf8(str(path), error)) from error


def _captions_of(data: str) -> Iterable[str]:
    """Return the captions of training data, at most as many as a run learns from, or the lines of a text file.

    Raises:
        DataError: the data cannot be opened.
    """
    if data in EMBEDDED:
        return EMBEDDED[data].training_captions()
    return spread_captions(open_source(data)) if names_pairs(data) else _read_captions(Path(data))


def _describe(tokenizer: Tokenizer, captions: Iterable[str]) -> str:
    """Return a vocabulary's size and hash, and the lengths of the captions in its tokens."""
    lengths = [len(ids) + 2 for ids in map(tokenizer.encode, captions) if ids]
    num_longer = sum(length > DEFAULT_CONTEXT_LENGTH for length in lengths)
    return (
        f"{tokenizer.vocab_size:,} entries, {tokenizer.vocab_size - BYTE_VOCAB_SIZE:,} of them merges; "
        f"sha256 {tokenizer.sha256}\n"
        f"{len(lengths):,} captions of {sum(lengths) / len(lengths):.1f} tokens on average (start and end included); "
        f"{num_longer:,} are longer than {DEFAULT_CONTEXT_LENGTH}"
    )


@steady_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status, see ``clipcore.ranks.failures``."""
    parsed = build_parser().parse_args(arguments)
    # This process never forks, so the library may use all cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        with warnings.catch_warnings(record=True) as notes:
            tokenizer = train_tokenizer(_captions_of(parsed.train), parsed.vocab_size)
        for note in notes:
            complain("clipcore.tokenizer", f"note: {note.message}")
        tokenizer.save(parsed.output)
        print(_describe(tokenizer, _captions_of(parsed.train)))
    except KeyboardInterrupt:
        complain("clipcore.tokenizer", "stopped")
        return 128 + signal.SIGINT
    except Exception as error:
        return end_with("clipcore.tokenizer", error, "train it from fewer captions")
    print(
        f"wrote {parsed.output}; use it with python -m clipcore.train --tokenizer {parsed.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
