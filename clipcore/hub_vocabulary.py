"""The ids of a text in a vocabulary of another kind than CLIP's: a tokenizer.json of the hub, or SentencePiece's file.

SigLIP has such vocabularies (T5's English or multilingual one), and so have SigLIP 2 (Gemma's), CLIPA (BERT's) and the
models of many languages. ``HubTokenizer`` in tokenizer.py makes rows of them. Each class here has these attributes:

==============  ======================================================================
``content``     the file, of a tokenizer.json with its padding and without truncation
``file_name``   its name in the folder of a run
``size``        ids are below this
``around``      the special ids before and after a text
``end_id``      the end of text
``pad_id``      the padding
==============  ======================================================================
"""

from __future__ import annotations

import importlib

import tokenizers

from clipcore.packages import package_folder


class HubVocabularyError(ValueError):
    """A file is no such vocabulary, or says too little; the message names the remedy."""


class JsonVocabulary:
    """A tokenizer.json.

    Args:
        content: what is in the file.
        pad_token: the padding that its settings name; None takes that of the file, or the usual one.

    Raises:
        HubVocabularyError: it is damaged, has no end of text, or no padding is known.
    """

    file_name = "tokenizer.json"

    def __init__(self, content: bytes, pad_token: str | None) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library's own class is plain Exception
            raise HubVocabularyError(f"it is not a tokenizer.json: {error}") from error
        padding = self._tokenizer.padding
        if pad_token is None and padding is not None:
            pad_token = padding["pad_token"]
        pad_token = pad_token or self._usual_padding()
        pad_id = None if pad_token is None else self._tokenizer.token_to_id(pad_token)
        if pad_id is None:
            raise HubVocabularyError(
                "nothing says what rows are padded with: put the tokenizer_config.json of its model beside it"
            )
        self._tokenizer.no_truncation()
        self._tokenizer.enable_padding(pad_id=pad_id, pad_token=pad_token)
        self.content = self._tokenizer.to_str().encode()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.size = self._tokenizer.get_vocab_size()
        self.pad_id = pad_id
        # One letter between the special ids, which its tokenizer adds.
        whole, inner = (
            self._tokenizer.encode("a", add_special_tokens=s).ids for s in (True, False)
        )
        places = range(len(whole) - len(inner) + 1)
        at = next((i for i in places if whole[i : i + len(inner)] == inner), 0)
        self.around = whole[:at], whole[at + len(inner) :]
        if not self.around[1]:
            raise HubVocabularyError(
                "it puts no end behind a text, where the text tower's features are read: give the model's own tokenizer.json"
            )
        self.end_id = self.around[1][-1]

    def _usual_padding(self) -> str | None:
        """Return the padding that nothing states: SigLIP pads T5's vocabularies with the end of text."""
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        usual = ["[PAD]", *(["<pad>"] if "<bos>" in known else []), "</s>"]
        return next((token for token in usual if token in known), None)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special ones."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without special ones."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token(self, number: int) -> str:
        """Return the text of one id."""
        return self._tokenizer.id_to_token(number) or ""


class SentencePieceVocabulary:
    """A model of SentencePiece.

    Args:
        content: what is in the file.

    Raises:
        HubVocabularyError: it is damaged or has no end of text, or sentencepiece is not installed.
    """

    file_name = "spiece.model"

    def __init__(self, content: bytes) -> None:
        if package_folder("sentencepiece") is None:
            raise HubVocabularyError(
                'a vocabulary of SentencePiece needs its package: pip install "clipcore[siglip]"; or give its tokenizer.json'
            )
        sentencepiece = importlib.import_module("sentencepiece")
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
            self.size = self._processor.get_piece_size()
        except RuntimeError as error:
            raise HubVocabularyError("it is not a model of SentencePiece, or is damaged") from error
        self.content = content
        self.end_id = self._processor.eos_id()
        if self.end_id < 0:
            raise HubVocabularyError(
                "it has no end of text, where the text tower's features are read"
            )
        self.around: tuple[list[int], list[int]] = ([], [self.end_id])
        # SigLIP pads T5's vocabularies, which have no beginning of text, with the end; Gemma's has a padding that is used.
        has_start, has_pad = self._processor.bos_id() >= 0, self._processor.pad_id() >= 0
        self.pad_id = self._processor.pad_id() if has_start and has_pad else self.end_id

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special ones."""
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without special ones."""
        special = {self.end_id, self._processor.pad_id(), self._processor.bos_id()}
        return self._processor.decode([number for number in ids if number not in special])

    def token(self, number: int) -> str:
        """Return the text of one id."""
        return self._processor.id_to_piece(number)
