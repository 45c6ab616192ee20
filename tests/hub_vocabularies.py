"""Small vocabularies of the kinds of SigLIP, Gemma and BERT, trained here and written as their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = "a photo of two old dogs and the cat on an unlucky red sofa in naïve café 東京 3 35".split()
LINES = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 3


def sentencepiece_file(folder: Path, **settings: Any) -> Path:
    """Train a model of SentencePiece on LINES."""
    import sentencepiece

    (folder / "lines.txt").write_text("\n".join(LINES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"),
        model_prefix=str(folder / "spiece"),
        minloglevel=2,
        num_threads=1,
        **settings,
    )
    return folder / "spiece.model"


T5 = {"vocab_size": 48, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
GEMMA = {
    "vocab_size": 300,
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "model_type": "bpe",
    "byte_fallback": True,
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
}


def json_file(folder: Path, kind: str) -> Path:
    """Write the tokenizer.json of a vocabulary trained on LINES, as Gemma's or BERT's is."""
    is_gemma = kind == "Gemma"
    special = (
        ["<pad>", "<eos>", "<bos>", "<unk>"] if is_gemma else ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    )
    if is_gemma:
        made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Replace(" ", "▁")
        made.decoder = decoders.Replace("▁", " ")
        trainer: Any = trainers.BpeTrainer(
            vocab_size=120, special_tokens=special, show_progress=False
        )
        around = "$A <eos>", [("<eos>", 1)]
    else:
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=120, special_tokens=special, show_progress=False
        )
        around = "[CLS] $A [SEP]", [("[CLS]", 2), ("[SEP]", 3)]
    made.train_from_iterator(LINES, trainer)
    made.post_processor = processors.TemplateProcessing(single=around[0], special_tokens=around[1])
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
