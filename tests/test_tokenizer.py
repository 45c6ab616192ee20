"""The tokenizer: OpenAI's ids on clean and dirty text, vocabularies of one's own, files, threads and forks."""

from __future__ import annotations

import collections
import functools
import gzip
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import subprocess
import sys
import threading
import tracemalloc
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

import numpy as np
import pytest
import torch
from openclip import simple_tokenizer
from runs import LIMIT_S, PROGRAMS
from shards import picture, write_csv, write_folder, write_shards

from clipcore import tokenizer as tokenizer_module
from clipcore.data.embedded import EMBEDDED
from clipcore.tokenizer import (
    BYTE_VOCAB_SIZE,
    DEFAULT_CONTEXT_LENGTH,
    OPENAI_FILE,
    OPENAI_SHA256,
    OPENAI_VOCAB_SIZE,
    Tokenizer,
    VocabularyError,
    byte_tokenizer,
    clean,
    find_openai_vocabulary,
    get_tokenizer,
    main,
    tokenize,
    train_tokenizer,
)
from clipcore.towers.architectures import OPENAI_NAMES, UnknownModelError, find_model, list_models

pytestmark = pytest.mark.fast

ASSIGNED = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
_DRAW = random.Random(0)
_SYLLABLES = ["ba", "lo", "chi", "strü", "no", "ké", "ming", "黄色", "га", "x", "ther"]
_WORDS = ["".join(_DRAW.choices(_SYLLABLES, k=_DRAW.randrange(1, 5))) for _ in range(250)]
CAPTIONS = [
    f"a {colour} {thing}, {number} of them; it's the {thing}s' {' '.join(_DRAW.choices(_WORDS, k=3))}!"
    for colour in ("red", "bluish", "grün")
    for thing in ("cat", "caterpillar", "house", "lighthouse")
    for number in range(20)
]


@pytest.fixture(scope="module")
def open_clip_tokenizer() -> ModuleType:
    return simple_tokenizer()


@pytest.fixture(scope="module")
def openai() -> Tokenizer:
    return get_tokenizer()


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(CAPTIONS, 700)


def dirty_strings(count: int, words: Sequence[str]) -> Iterable[str]:
    """Captions as the web has them."""
    draw = random.Random(20210226)
    entities = [
        "&amp;",
        "&amp;amp;",
        "&lt;b&gt;",
        "&#39;",
        "&#x1F600;",
        "&quot;",
        "&nbsp;",
        "&eacute",
        "&#0;",
        "&",
    ]
    oddities = [
        "\u2019s",
        "ﬁne",
        "ＦＵＬＬ",
        "İ",
        "ß",
        "ſ'ſ",
        "…",
        "😀👩🏽‍🚀",
        "\x00\x1c",
        "\ufeff",
        "\u200b",
        "\r\n",
        "\u2028",
        "\x7f",
    ]
    ascii_bits = [
        "it's",
        "We'LL",
        "they've",
        "I'm",
        "'d",
        "$9.99!!",
        "v1.0-rc2",
        "<|endoftext|",
        "a_b",
        "@x #y",
        "--",
        "''",
        "\t\t",
    ]

    def mojibake() -> str:
        text = " ".join(draw.choices(["café", "naïve", "“quoted”", "Ünïcode", "日本"], k=2))
        return text.encode().decode("latin-1")

    makers: list[Callable[[], str]] = [
        lambda: draw.choice(words),
        lambda: draw.choice(words).title(),
        lambda: str(draw.randrange(10 ** draw.randrange(1, 9))),
        lambda: draw.choice(entities),
        lambda: draw.choice(oddities),
        lambda: draw.choice(ascii_bits),
        lambda: "".join(draw.choices(ASSIGNED, k=draw.randrange(1, 6))),
        lambda: "".join(map(chr, draw.choices(range(0x20, 0x250), k=draw.randrange(1, 8)))),
        mojibake,
    ]
    for _ in range(count):
        style = draw.choice(["clean", "mixed", "mixed"])
        chosen = makers[:3] if style == "clean" else makers
        parts = [draw.choice(chosen)() for _ in range(draw.randrange(0, 9))]
        yield draw.choice([" ", " ", "", "  "]).join(parts)


def test_ids_are_open_clips_on_20000_dirty_strings(open_clip_tokenizer, openai):
    theirs = open_clip_tokenizer.SimpleTokenizer()
    words = [w.removesuffix("</w>") for w in list(theirs.encoder)[512:49406] if w.endswith("</w>")]
    texts = list(dirty_strings(20_000, words[:20_000]))
    assert len(set(texts)) > 17_000
    different = [t for t in texts if openai.encode(t) != theirs.encode(t)]
    assert different == []
    assert torch.equal(openai(texts[:2000]), theirs(texts[:2000]))
    assert torch.equal(openai(texts[:2000], 16), theirs(texts[:2000], context_length=16))


def test_ids_are_open_clips_on_every_assigned_character(open_clip_tokenizer, openai):
    theirs = open_clip_tokenizer.SimpleTokenizer()
    # Whole words: a character that one of the two takes for punctuation parts them elsewhere.
    texts = [" ".join(f"x{c}y" for c in ASSIGNED[i : i + 32]) for i in range(0, len(ASSIGNED), 32)]
    different = [t for t in texts if openai.encode(t) != theirs.encode(t)]
    assert different == []


def test_attributes_are_open_clips(open_clip_tokenizer, openai):
    theirs = open_clip_tokenizer.SimpleTokenizer()
    names = ("vocab_size", "sot_token_id", "eot_token_id", "all_special_ids", "context_length")
    for name in names:
        assert getattr(openai, name) == getattr(theirs, name)
    text = "Don't panic — it's <i>mostly</i> harmless"
    assert openai.decode(openai.encode(text)) == theirs.decode(theirs.encode(text)).removesuffix(
        " "
    )


def test_the_hash_is_that_of_openais_file(openai):
    content = find_openai_vocabulary().read_bytes()
    published = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    assert hashlib.sha256(content).hexdigest() == published
    merges = gzip.decompress(content).decode().split("\n")[1:48895]
    assert hashlib.sha256("\n".join(merges).encode()).hexdigest() == OPENAI_SHA256 == openai.sha256


def test_special_strings_are_text(openai):
    for special in ("<start_of_text>", "<end_of_text>", "<|startoftext|>", "<|endoftext|>"):
        row = openai(f"a {special} b")[0].tolist()
        assert row[0] == openai.sot_token_id and row.count(openai.sot_token_id) == 1
        assert row.count(openai.eot_token_id) == 1
        assert openai.decode(row).replace(" ", "") == f"a{special}b"


def test_empty_short_and_over_long_texts(openai):
    start, end = openai.all_special_ids
    assert openai("").tolist() == [[start, end] + [0] * 75]
    assert openai(" \n\t").tolist() == openai([""]).tolist()
    assert openai([]).shape == (0, 77)
    before = openai.truncated
    rows = openai(["cat " * 75, "cat " * 76, "cat"], context_length=77)
    assert rows.dtype == torch.int64 and rows.shape == (3, 77)
    assert rows[:, -1].tolist() == [end, end, 0] and openai.truncated == before + 1
    assert openai("a cat", context_length=2).tolist() == [[start, end]]
    with pytest.raises(ValueError, match="at least 2"):
        openai("a cat", context_length=1)


@pytest.mark.parametrize("bad", [None, float("nan"), b"bytes"])
def test_a_caption_that_is_no_text_is_named(openai, bad):
    with pytest.raises(ValueError, match=type(bad).__name__):
        openai(["a cat", bad])


def test_tokenize_cuts_or_refuses():
    assert torch.equal(tokenize("cat " * 90), get_tokenizer()("cat " * 90))
    assert tokenize(["a", "b"], context_length=5).shape == (2, 5)
    with pytest.raises(ValueError, match="92 tokens"):
        tokenize("cat " * 90, truncate=False)


def plain_bpe(merges: Sequence[tuple[str, str]], text: str) -> list[int]:
    """BPE as the paper tells it: join the best pair of the word everywhere, until none is left."""
    symbols = list(byte_symbols().values())
    vocabulary = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges)]
    ids, rank = {s: i for i, s in enumerate(vocabulary)}, {m: i for i, m in enumerate(merges)}
    found = []
    for word in re.findall(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+", clean(text)):
        parts = [byte_symbols()[b] for b in word.encode()]
        parts[-1] += "</w>"
        while pairs := [p for p in itertools.pairwise(parts) if p in rank]:
            parts = join_pair(parts, min(pairs, key=rank.__getitem__))
        found += [ids[p] for p in parts]
    return found


@functools.cache
def byte_symbols() -> dict[int, str]:
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    hidden = [b for b in range(256) if b not in shown]
    return {**{b: chr(b) for b in shown}, **{b: chr(256 + i) for i, b in enumerate(hidden)}}


def join_pair(parts: Sequence[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    i = 0
    while i < len(parts):
        width = 2 if tuple(parts[i : i + 2]) == pair else 1
        joined.append("".join(parts[i : i + width]))
        i += width
    return joined


def plain_training(captions: Iterable[str], num_merges: int) -> list[tuple[str, str]]:
    """Merge the most frequent pair first; of equals the one whose symbols are older."""
    words: collections.Counter[tuple[str, ...]] = collections.Counter()
    for caption in captions:
        for word in re.findall(
            r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+", clean(caption)
        ):
            parts = [byte_symbols()[b] for b in word.encode()]
            words[(*parts[:-1], parts[-1] + "</w>")] += 1
    symbols = list(byte_symbols().values())
    ids = {s: i for i, s in enumerate([*symbols, *(s + "</w>" for s in symbols)])}
    merges: list[tuple[str, str]] = []
    while len(merges) < num_merges:
        counts: collections.Counter[tuple[str, str]] = collections.Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                counts[pair] += count
        best = max(counts, key=lambda p: (counts[p], -ids[p[0]], -ids[p[1]]))
        ids.setdefault("".join(best), len(ids))
        merges.append(best)
        joined: collections.Counter[tuple[str, ...]] = collections.Counter()
        for word, count in words.items():
            joined[tuple(join_pair(word, best))] += count
        words = joined
    return merges


def test_training_and_encoding_are_plain_bpe(trained):
    assert trained.vocab_size == 700 and trained.all_special_ids == [698, 699]
    merges = plain_training(CAPTIONS, 186)
    assert Tokenizer(merges).sha256 == trained.sha256
    for text in [*CAPTIONS, *dirty_strings(300, ["cats", "lighthouses"])]:
        # The plain expression knows letters and digits, but not marks, odd numbers and the long s.
        cleaned = clean(text).replace("ſ", "\u0300")
        if all(unicodedata.category(c)[0] in "LPSZ" or c in "0123456789" for c in cleaned):
            assert trained.encode(text) == plain_bpe(merges, text), text


def test_a_trained_file_gives_open_clip_the_same_ids(open_clip_tokenizer, trained, tmp_path):
    trained.save(tmp_path / "v.txt.gz")
    theirs = open_clip_tokenizer.SimpleTokenizer(bpe_path=str(tmp_path / "v.txt.gz"))
    assert theirs.vocab_size == trained.vocab_size
    texts = [*CAPTIONS, *dirty_strings(500, ["cats", "lighthouses"])]
    assert torch.equal(theirs(texts), trained(texts))


def test_training_depends_on_the_captions_alone(trained):
    command = [sys.executable, str(PROGRAMS / "train_vocabulary.py"), "700"]
    shuffled = random.Random(1).sample(CAPTIONS, len(CAPTIONS))
    for captions, parallel in ((CAPTIONS, "false"), (shuffled, "true")):
        done = subprocess.run(
            command,
            input=json.dumps(captions),
            env={
                **os.environ,
                "TOKENIZERS_PARALLELISM": parallel,
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == trained.sha256


def test_too_little_text_gives_a_smaller_vocabulary_and_says_so():
    with pytest.warns(UserWarning, match=r"rather than 5,000"):
        small = train_tokenizer(["a cat", "a cat"], 5000)
    assert small.vocab_size == 514 + 2 and small.encode("cat") == [513]


@pytest.mark.parametrize(
    ("captions", "size", "message"),
    [
        ([], 600, "no caption"),
        (["", " \n"], 600, "no caption"),
        (["a"], 513, "514"),
        ("abc", 600, "list"),
    ],
)
def test_impossible_vocabularies_are_refused(captions, size, message):
    with pytest.raises(VocabularyError, match=message):
        train_tokenizer(captions, size)


def test_bytes_need_no_file():
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 514 and tokenizer.all_special_ids == [512, 513]
    assert tokenizer.encode("é") == [plain_bpe([], "é")[0], plain_bpe([], "é")[1]]
    assert tokenizer.decode(tokenizer("Größe 42 日本")[0]) == "größe 4 2 日本"


def test_decode_inverts_encode(openai, trained):
    for tokenizer in (openai, trained, byte_tokenizer()):
        for text in [*CAPTIONS[:20], *dirty_strings(200, ["cats", "lighthouses"])]:
            ids = tokenizer.encode(text)
            decoded = tokenizer.decode(ids)
            assert decoded.replace(" ", "") == clean(text).replace(" ", "")
            assert tokenizer.decode(tokenizer(text, len(ids) + 5)[0]) == decoded
        with pytest.raises(ValueError, match="not in this vocabulary"):
            tokenizer.decode([tokenizer.vocab_size])


def test_files_round_trip(openai, trained, tmp_path):
    for name, tokenizer in {
        "openai": openai,
        "trained": trained,
        "bytes": byte_tokenizer(),
    }.items():
        path = tmp_path / name
        tokenizer.save(path)
        again = Tokenizer.from_file(path)
        assert (again.sha256, again.vocab_size) == (tokenizer.sha256, tokenizer.vocab_size)
        content = path.read_bytes()
        again.save(path)
        assert path.read_bytes() == content
        plain = tmp_path / f"{name}.txt"
        plain.write_bytes(gzip.decompress(content) + b"\n")
        assert Tokenizer.from_file(plain).sha256 == tokenizer.sha256
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    assert Tokenizer.from_file(tmp_path / "trained", vocab_size=600).encode("cat") == plain_bpe(
        trained._merges[:86], "cat"
    )


def test_damaged_files_are_named(trained, tmp_path):
    path = tmp_path / "v.txt.gz"
    trained.save(path)
    content = path.read_bytes()
    lines = gzip.decompress(content).decode().split("\n")
    cases = {
        "cut short": (content[:-20], "damaged"),
        "no gzip": (b"\x1f\x8bnonsense", "damaged"),
        "captions": ("\n".join(CAPTIONS).encode(), "#version"),
        "empty": (b"", "#version"),
        "binary": (b"#version\n\xff\xfe", "damaged"),
        "three": ("\n".join([*lines[:5], "a b c"]).encode(), "merge 5 is not"),
        "unknown": ("\n".join([*lines[:5], "zz qq"]).encode(), "merge 5, 'zz'"),
        "twice": ("\n".join([*lines[:5], lines[2]]).encode(), "merge 5"),
    }
    for damaged, message in cases.values():
        path.write_bytes(damaged)
        with pytest.raises(VocabularyError, match=message) as caught:
            Tokenizer.from_file(path)
        assert str(path) in str(caught.value)
    with pytest.raises(VocabularyError, match="No such file"):
        Tokenizer.from_file(tmp_path / "none.gz")
    os.mkfifo(tmp_path / "pipe.gz")
    with pytest.raises(VocabularyError, match="Not a regular file"):
        Tokenizer.from_file(tmp_path / "pipe.gz")
    with pytest.raises(VocabularyError, match="cannot write"):
        trained.save(tmp_path / "none" / "v.gz")
    trained.save(path)
    with pytest.raises(VocabularyError, match="cut short"):
        Tokenizer.from_file(path, vocab_size=701)


@pytest.mark.parametrize("line", ["\n", "a b\n", "x" * 1000 + "\n"])
def test_a_vocabulary_that_swells_is_refused_before_it_is_split(tmp_path, line):
    path = tmp_path / "v.txt.gz"
    path.write_bytes(gzip.compress(b"#version: 0.2\n" + line.encode() * (2**28 // len(line)), 1))
    tracemalloc.start()
    with pytest.raises(
        VocabularyError, match=r"more than 500,000 lines or 33,554,432 bytes"
    ) as caught:
        Tokenizer.from_file(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 2**25 and str(path) in str(caught.value)


def test_no_vocabulary_is_made_that_would_not_be_read():
    with pytest.raises(VocabularyError, match="at most 500,000 entries; got 500,001"):
        train_tokenizer(CAPTIONS, 500_001)


def test_the_search_for_openais_file(trained, tmp_path, monkeypatch):
    # Another test may have imported it.
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    assert find_openai_vocabulary().name == OPENAI_FILE and "open_clip" not in sys.modules
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VocabularyError, match=r'pip install "clipcore\[openai-vocab\]"'):
        get_tokenizer()
    trained.save(tmp_path / "mine.gz")
    monkeypatch.setenv("CLIPCORE_BPE", str(tmp_path / "mine.gz"))
    assert get_tokenizer(context_length=16).context_length == 16
    assert get_tokenizer().sha256 == trained.sha256


def test_another_vocabulary_of_openais_size_warns(openai, tmp_path):
    # The last merge is of symbols that no merge joins: the file is well-formed, and wrong.
    swapped = [*openai._merges[:-1], ("Ā", "ā")]
    Tokenizer(swapped).save(tmp_path / "other.gz")
    with pytest.warns(UserWarning, match="other merges"):
        get_tokenizer(bpe_path=tmp_path / "other.gz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        openai.save(tmp_path / "same.gz")
        get_tokenizer(bpe_path=tmp_path / "same.gz")


def _encode_in_a_child(
    tokenizer: Tokenizer, texts: list[str], results: multiprocessing.Queue
) -> None:
    results.put(tokenizer(texts).tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("parallel", [None, "true"])
def test_workers_give_the_same_ids(trained, monkeypatch, method, parallel, capfd):
    if parallel is None:
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    else:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
    texts = list(dirty_strings(200, ["cats"]))
    train_tokenizer(CAPTIONS, 600)  # training is where the library may start threads
    context = multiprocessing.get_context(method)
    results = context.Queue()
    worker = context.Process(target=_encode_in_a_child, args=(trained, texts, results))
    worker.start()
    try:
        assert results.get(timeout=LIMIT_S) == trained(texts).tolist()
    finally:
        worker.kill()
        worker.join()
    assert "forked" not in capfd.readouterr().err


def test_pickle_keeps_vocabulary_and_length(trained):
    again = pickle.loads(pickle.dumps(Tokenizer(trained._merges, context_length=9)))
    assert again.sha256 == trained.sha256 and again.context_length == 9


def test_threads_share_a_tokenizer(trained):
    texts = list(dirty_strings(300, ["cats", "lighthouses"]))
    expected = trained(texts)
    fresh = Tokenizer(trained._merges)
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(fresh(texts))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(torch.equal(r, expected) for r in results)


def test_the_cache_of_words_is_bounded(trained, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_MAX_CACHED_WORDS", 10)
    fresh = Tokenizer(trained._merges)
    words = [f"cat{chr(97 + i)}" for i in range(26)]
    assert [fresh.encode(w) for w in words] == [trained.encode(w) for w in words]
    assert len(fresh._cache) == 10


def test_the_command_makes_a_vocabulary(tmp_path, capsys, trained):
    captions, output = tmp_path / "captions.txt", tmp_path / "v.txt.gz"
    captions.write_text("\ufeff" + "\n\n".join(CAPTIONS) + "\n", encoding="utf-8")
    line = ["--train", str(captions), "--vocab-size", "700", "--output", str(output)]
    assert main(line) == 0
    assert Tokenizer.from_file(output).sha256 == trained.sha256
    shown = capsys.readouterr()
    mean = sum(len(trained.encode(c)) + 2 for c in CAPTIONS) / len(CAPTIONS)
    for part in (
        "700 entries, 186",
        trained.sha256,
        f"{len(CAPTIONS)} captions of {mean:.1f}",
        str(output),
    ):
        assert part in shown.out
    line[3] = "60000"
    assert main(line) == 0
    assert "rather than 60,000" in capsys.readouterr().err


def test_the_command_learns_from_whatever_a_run_is_trained_on(tmp_path, capsys):
    (tmp_path / "captions.lines").write_text("".join(f"{picture(i)[1]}\n" for i in range(8)))
    sources = [
        str(tmp_path / "captions.lines"),
        write_shards(tmp_path / "shards", 2, 4),
        str(tmp_path / "shards"),
        str(write_csv(tmp_path / "csv", 8)),
        str(write_folder(tmp_path / "folder", 8)),
        f"{tmp_path}/shards/000.tar::{tmp_path}/shards/001.tar",
    ]
    learnt = []
    for source in sources:
        output = tmp_path / "v.txt.gz"
        assert main(["--train", source, "--vocab-size", "560", "--output", str(output)]) == 0
        learnt.append(Tokenizer.from_file(output).sha256)
    assert set(learnt) == {learnt[0]}
    assert main(["--train", "glyphs", "--vocab-size", "600", "--output", str(output)]) == 0
    expected = train_tokenizer(EMBEDDED["glyphs"].training_captions(), 600)
    assert Tokenizer.from_file(output).sha256 == expected.sha256
    capsys.readouterr()
    assert main(["--train", "none/{0..3}.tar", "--output", str(output)]) == 2
    assert "none/0.tar" in capsys.readouterr().err


def test_captions_in_another_encoding_are_no_vocabulary(tmp_path, capsys):
    (tmp_path / "c.txt").write_bytes("a caf\u00e9\n".encode("latin-1"))
    line = ["--train", str(tmp_path / "c.txt"), "--output", str(tmp_path / "v.txt.gz")]
    assert main(line) == 2 and not (tmp_path / "v.txt.gz").exists()
    assert "c.txt is not UTF-8 (byte 0xe9); convert it with iconv" in capsys.readouterr().err


def test_a_line_of_megabytes_is_no_caption(tmp_path, capsys):
    (tmp_path / "c.txt").write_text("a cat\n" + "x" * (1 << 21))
    line = ["--train", str(tmp_path / "c.txt"), "--output", str(tmp_path / "v.txt.gz")]
    assert main(line) == 2 and not (tmp_path / "v.txt.gz").exists()
    assert "c.txt holds a line of more than 1,048,576 characters" in capsys.readouterr().err


@pytest.mark.parametrize("mistake", ["missing", "empty", "folder", "too small", "no place"])
def test_mistakes_of_the_command_get_one_line(tmp_path, capsys, mistake):
    captions = tmp_path / "captions.txt"
    captions.write_text("" if mistake == "empty" else "a cat\na cat\n")
    source = {"missing": tmp_path / "none.txt", "folder": tmp_path}.get(mistake, captions)
    size = "513" if mistake == "too small" else "600"
    output = tmp_path / ("none/v.gz" if mistake == "no place" else "v.gz")
    assert main(["--train", str(source), "--vocab-size", size, "--output", str(output)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("clipcore.tokenizer: error: ")
    expected = {
        "missing": "none.txt",
        "empty": "no caption",
        "folder": str(tmp_path),
        "too small": "514",
        "no place": "none",
    }
    assert expected[mistake] in error


def test_each_model_has_the_tokenizer_of_its_own_sizes(monkeypatch):
    # OpenAI's file takes 0.2 s.
    monkeypatch.setattr(Tokenizer, "from_file", functools.cache(Tokenizer.from_file))
    for name in [*list_models(), *OPENAI_NAMES]:
        text = find_model(name).text
        if text.hf_tokenizer_name is not None:
            with pytest.raises(VocabularyError, match=f"{name}: .* {text.hf_tokenizer_name}, and"):
                get_tokenizer(name)
            continue
        if text.vocab_size not in (BYTE_VOCAB_SIZE, OPENAI_VOCAB_SIZE):
            with pytest.raises(VocabularyError, match=rf"{name} has 3072 tokens and no vocabulary"):
                get_tokenizer(name)
            continue
        tokenizer = get_tokenizer(name)
        found = (tokenizer.vocab_size, tokenizer.context_length)
        assert found == (text.vocab_size, text.context_length), name
        assert get_tokenizer(name, context_length=20)("a dog").shape == (1, 20)


def test_arguments_of_get_tokenizer(tmp_path):
    assert get_tokenizer("ViT-nano-8-32", context_length=9, cache_dir=tmp_path).context_length == 9
    for length in (0, -3, 1, "77", 7.5, True):
        with pytest.raises(ValueError, match="a whole number of at least 2"):
            get_tokenizer("ViT-nano-8-32", context_length=length)
    tokenizer = get_tokenizer("ViT-nano-8-32")
    both = tokenizer(["a", "b"])
    for texts in (("a", "b"), np.array(["a", "b"]), {"a": 1, "b": 2}.keys(), iter("ab")):
        assert torch.equal(tokenizer(texts), both)
    for texts in (5, None, b"a cat"):
        with pytest.raises(ValueError, match=r"takes a text or a list|is no text|not text|a str"):
            get_tokenizer("ViT-nano-8-32")(texts)


def test_a_run_has_the_tokenizer_that_it_was_made_with(trained, tmp_path, monkeypatch):
    run = tmp_path / "logs" / "run"
    checkpoint = run / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    trained.save(run / "vocabulary.txt.gz")
    (run / "config.json").write_text(json.dumps({"model": "ViT-glyphs"}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPCORE_BPE", "nowhere")
    length = find_model("ViT-glyphs").text.context_length
    assert length != DEFAULT_CONTEXT_LENGTH
    for name in (run, str(run), "logs/run", checkpoint):
        found = get_tokenizer(name)
        assert (found.sha256, found.context_length) == (trained.sha256, length)
    assert get_tokenizer(run, context_length=9).context_length == 9
    (run / "config.json").unlink()
    assert get_tokenizer(run).context_length == DEFAULT_CONTEXT_LENGTH

    # A model's name is a model's.
    trained_there = tmp_path / "ViT-nano-8-32"
    trained_there.mkdir()
    trained.save(trained_there / "vocabulary.txt.gz")
    assert get_tokenizer("ViT-nano-8-32").vocab_size == BYTE_VOCAB_SIZE


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 3}', '{"model": "x"}', "[" * 9000])
def test_a_run_whose_settings_are_damaged_is_one_line(trained, tmp_path, content):
    trained.save(tmp_path / "vocabulary.txt.gz")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(VocabularyError, match="pass its context_length"):
        get_tokenizer(tmp_path)
    assert get_tokenizer(tmp_path, 12).context_length == 12
    with pytest.raises(VocabularyError, match="leave bpe_path out"):
        get_tokenizer(tmp_path, bpe_path=tmp_path / "vocabulary.txt.gz")


def test_folders_that_are_no_runs_have_no_tokenizer(tmp_path):
    with pytest.raises(VocabularyError, match=r"holds no vocabulary\.txt\.gz"):
        get_tokenizer(str(tmp_path))
    with pytest.raises(VocabularyError, match="there is no folder"):
        get_tokenizer(tmp_path / "none")
    for name in ("logs/none", "x" * 5000, "a\0b"):
        with pytest.raises(UnknownModelError, match="unknown model"):
            get_tokenizer(name)


def test_tokenizers_of_unknown_models_and_other_vocabularies_are_refused(trained, tmp_path):
    for name in ("EVA02-B-16", "xlm-roberta-base-ViT-B-32", "hf-hub:laion/x", "no such model"):
        with pytest.raises(UnknownModelError, match=r"unknown model|hf download laion/x"):
            get_tokenizer(name)
    trained.save(tmp_path / "v.txt.gz")
    with pytest.raises(VocabularyError, match=r"tokens, and ViT-B-32 49408.*force_vocab_size"):
        get_tokenizer("ViT-B-32", bpe_path=tmp_path / "v.txt.gz")
