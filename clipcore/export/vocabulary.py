"""Writes a vocabulary as the tokenizer files of transformers: ``CLIPTokenizer``'s, or a tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

from clipcore.tokenizer import HubTokenizer, Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files of ``CLIPTokenizer.from_pretrained(FOLDER)``, or ``AutoTokenizer`` for a tokenizer.json.

    The ids are clipcore's for text that needs no repair: transformers' tokenizer neither mends broken encodings nor resolves
    HTML entities. It pads with the end of text, where clipcore and open_clip pad with 0; a feature is the same, since no
    token sees those behind it.

    Raises:
        ValueError: a SentencePiece file, from which transformers does not clean captions as the model needs.
    """
    if isinstance(tokenizer, HubTokenizer):
        _write_json(tokenizer, folder)
        return
    ids = {symbol: number for number, symbol in enumerate(tokenizer.symbols)}
    ids |= {START: tokenizer.sot_token_id, END: tokenizer.eot_token_id}
    merges = ["#version: 0.2", *tokenizer.merge_lines()]
    special = {
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    settings = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "processor_class": "CLIPProcessor",
        "model_max_length": tokenizer.context_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }

    contents = {
        "vocab.json": json.dumps(ids, ensure_ascii=False),
        "merges.txt": "\n".join(merges) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")


def _write_json(tokenizer: HubTokenizer, folder: Path) -> None:
    """Write a tokenizer.json with what ``PreTrainedTokenizerFast`` needs beside it."""
    if tokenizer.file_name != "tokenizer.json":
        raise ValueError(
            "the vocabulary is a file of SentencePiece, and an export holds a tokenizer.json: give that of the model as "
            "--bpe-path, or write the model alone with save_pretrained"
        )
    tokenizer.save(folder / tokenizer.file_name)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": tokenizer.pad_token,
        "model_max_length": tokenizer.context_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
