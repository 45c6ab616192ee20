"""Vocabularies of SigLIP's, SigLIP 2's and CLIPA's kinds, from their files: ids as in open_clip and transformers."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hub_vocabularies import GEMMA, T5, json_file, sentencepiece_file
from openclip import import_open_clip, simple_tokenizer
from tokenizers import models
from torch import Tensor

import clipcore
from clipcore.tokenizer import (
    HubTokenizer,
    Tokenizer,
    VocabularyError,
    get_tokenizer,
    open_vocabulary,
)
from clipcore.towers.architectures import TextConfig, find_model

pytestmark = pytest.mark.fast

CAPTIONS = [
    *("", "a", "A photo of TWO dogs.", "the_cat, on the sofa!", "naïve  café\t東京 \n"),
    *("dogs &amp; cats </s> <eos> [SEP]", "an old cat " * 9, "zzz qqq ß 😀"),
]
LENGTH = 12


def text_tower(clean: str | None = "canonicalize", **more: Any) -> TextConfig:
    return TextConfig(LENGTH, clean=clean, width=32, heads=2, layers=1, pool_type="last", **more)


def rows_of(theirs: Any, cleaned: list[str]) -> Tensor:
    """Return the rows of a tokenizer of transformers, as open_clip's ``HFTokenizer`` asks for them."""
    return theirs(
        cleaned, return_tensors="pt", max_length=LENGTH, padding="max_length", truncation=True
    ).input_ids


@pytest.mark.parametrize("clean", ["canonicalize", "lower", "whitespace"])
def test_cleaning_is_open_clips(tmp_path: Path, clean: str) -> None:
    theirs = simple_tokenizer().get_clean_fn(clean)
    ours = HubTokenizer.from_hub_file(json_file(tmp_path, "BERT"), text_tower(clean))
    for caption in CAPTIONS:
        assert ours._clean(caption) == theirs(caption)


def test_rows_of_sentencepiece_are_those_of_siglip(tmp_path: Path) -> None:
    import_open_clip()
    from transformers import SiglipTokenizer

    path = sentencepiece_file(tmp_path, **T5)
    ours = open_vocabulary(path, text_tower())
    clean = simple_tokenizer().get_clean_fn("canonicalize")
    expected = rows_of(SiglipTokenizer(str(path)), [clean(caption) for caption in CAPTIONS])
    rows = ours(CAPTIONS)
    assert torch.equal(rows, expected)
    # Padded with the end of text, which stays where a caption is truncated.
    assert (ours.pad_token_id, ours.eot_token_id) == (1, 1) and (rows[:, -1] == 1).all()
    assert ours.truncated == 2 and ours.vocab_size == 48
    assert ours.decode(rows[2]) == "a photo of two dogs"


def test_rows_of_gemmas_kind_end_and_are_padded_with_other_ids(tmp_path: Path) -> None:
    path = sentencepiece_file(tmp_path, **GEMMA)
    ours = open_vocabulary(path, text_tower("lower"))
    rows = ours(["a cat", "an old cat " * 9])
    assert (ours.pad_token_id, ours.eot_token_id) == (0, 1)
    assert ours.decode(rows[0]) == "a cat" and rows[1, -1] == 1 and 0 not in rows[1]
    end = int((rows[0] == 1).nonzero())
    assert (rows[0, end + 1 :] == 0).all() and (rows[0, :end] > 3).all()


@pytest.mark.parametrize("kind", ["Gemma", "BERT"])
def test_rows_of_a_tokenizer_json_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    import_open_clip()
    from transformers import PreTrainedTokenizerFast

    path = json_file(tmp_path, kind)
    end = "<eos>" if kind == "Gemma" else "[SEP]"
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(path), pad_token="<pad>" if kind == "Gemma" else "[PAD]"
    )
    tower = text_tower(strip_sep_token=kind == "BERT")
    ours = open_vocabulary(path, tower)
    clean = simple_tokenizer().get_clean_fn("canonicalize")
    expected = rows_of(theirs, [clean(caption) for caption in CAPTIONS])
    if kind == "BERT":
        expected = torch.where(expected == theirs.convert_tokens_to_ids(end), 0, expected)
    assert torch.equal(ours(CAPTIONS), expected)

    # A special string in a caption is plain text.
    plain = open_vocabulary(path, text_tower("whitespace"))
    assert int((plain([f"a {end} cat"]) == plain.eot_token_id).sum()) == 1
    # The settings beside the file name the padding.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": end}}))
    assert open_vocabulary(path, tower).pad_token_id == ours.eot_token_id  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["SentencePiece", "Gemma"])
def test_a_vocabulary_is_saved_and_pickled_with_its_rows(tmp_path: Path, kind: str) -> None:
    path = sentencepiece_file(tmp_path, **T5) if kind != "Gemma" else json_file(tmp_path, kind)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<unk>"}')
    ours = open_vocabulary(path, text_tower())
    ours.context_length = 7
    (tmp_path / "run").mkdir()
    ours.save(tmp_path / "run" / ours.file_name)
    again = open_vocabulary(tmp_path / "run" / ours.file_name, text_tower())
    for other in (again, pickle.loads(pickle.dumps(ours))):
        assert other.sha256 == ours.sha256 and other.pad_token_id == ours.pad_token_id
        assert torch.equal(other(CAPTIONS, 9), ours(CAPTIONS, 9))
    assert pickle.loads(pickle.dumps(ours)).context_length == 7


def test_what_is_wrong_with_a_vocabulary_is_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    path = json_file(tmp_path, "Gemma")
    content = json.loads(path.read_text())
    endless, unpadded = tmp_path / "endless.json", tmp_path / "unpadded.json"
    endless.write_text(json.dumps({**content, "post_processor": None}))
    bare = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    bare.save(str(unpadded))
    for name, text, message in (
        ("endless.json", None, "puts no end behind a text"),
        ("unpadded.json", None, "nothing says what rows are padded with"),
        ("broken.json", b'{"version": 1', "not a tokenizer.json"),
        ("broken.model", b"abc", "not a model of SentencePiece"),
        ("none.json", None, "cannot read the vocabulary"),
    ):
        if isinstance(text, bytes):
            (tmp_path / name).write_bytes(text)
        with pytest.raises(VocabularyError, match=message) as caught:
            open_vocabulary(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    small = text_tower(hf_tokenizer_name="timm/x", vocab_size=100)
    with pytest.raises(VocabularyError, match="120 tokens, and the model 100: give that of timm/x"):
        open_vocabulary(path, small)
    with pytest.raises(ValueError, match="holds 1 special ids"):
        open_vocabulary(path)(["a"], 0)
    for call in (open_vocabulary(path), open_vocabulary(path).encode):
        with pytest.raises(ValueError, match="text"):
            call(3)  # type: ignore[operator]
    with pytest.raises(ValueError, match="id 120 is not in this vocabulary of 120"):
        open_vocabulary(path).decode([120])
    monkeypatch.setattr("clipcore.hub_vocabulary.package_folder", lambda name: None)
    with pytest.raises(VocabularyError, match=r'pip install "clipcore\[siglip\]"'):
        open_vocabulary(tmp_path / "broken.model")


def test_a_published_model_names_its_vocabulary_and_takes_its_file(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match=r"hf download timm/ViT-B-16-SigLIP2 tokenizer\.json"):
        get_tokenizer("ViT-B-16-SigLIP2")
    tokenizer = get_tokenizer("ViT-L-14-CLIPA", bpe_path=json_file(tmp_path, "BERT"))
    assert isinstance(tokenizer, HubTokenizer) and isinstance(tokenizer, Tokenizer)
    # The text tower has rows to spare; the end is stripped, as in open_clip.
    assert (tokenizer.vocab_size, tokenizer.context_length) == (32000, 32)
    rows = tokenizer(["a cat"])
    assert rows.shape == (1, 32) and tokenizer.eot_token_id not in rows
    assert clipcore.get_tokenizer("ViT-B-16-SigLIP", bpe_path=tmp_path / "tokenizer.json")
    assert find_model("ViT-B-16-SigLIP").text.clean == "canonicalize"


def test_a_text_tower_that_reads_another_id_than_the_end_is_refused(tmp_path: Path) -> None:
    """A tower that reads the largest id takes CLIP's own tokenizer.json, whose end of text that is."""
    path = json_file(tmp_path, "Gemma")
    for pool_type, message in (
        ("argmax", r"at the largest id, 119, .* end of text is 1: choose a model with pool_type"),
        ("eos", "at the id 2, and this vocabulary's end of text is 1: give the model's own"),
    ):
        with pytest.raises(VocabularyError, match=message) as caught:
            open_vocabulary(path, TextConfig(LENGTH, pool_type=pool_type))
        assert str(path) in str(caught.value)
    for text in (TextConfig(LENGTH, pool_type="eos", eos_id=1), text_tower()):
        assert open_vocabulary(path, text).eot_token_id == 1
    # As CLIP's: the end of text is the largest id, and the padding.
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][1], "id": 120, "content": "<end>"})
    content["post_processor"]["special_tokens"] = {
        "<end>": {"id": "<end>", "ids": [120], "tokens": ["<end>"]}
    }
    for piece in content["post_processor"]["single"]:
        if "SpecialToken" in piece:
            piece["SpecialToken"]["id"] = "<end>"
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<end>"}')
    path.write_text(json.dumps(content))
    rows = open_vocabulary(path, TextConfig(LENGTH))(["a cat"])
    assert rows[0, -1] == 120 and rows.max() == 120


def test_a_byte_order_mark_before_a_tokenizer_json_is_left_out(tmp_path: Path) -> None:
    path = json_file(tmp_path, "BERT")
    plain = open_vocabulary(path, text_tower())
    path.write_bytes(b"\xef\xbb\xbf\r\n " + path.read_bytes())
    marked = open_vocabulary(path, text_tower())
    assert marked.sha256 == plain.sha256 and torch.equal(marked(CAPTIONS), plain(CAPTIONS))
