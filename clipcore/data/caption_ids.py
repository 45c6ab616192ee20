"""Caption ids: 64-bit hashes that are equal for equal captions, on any rank and in any batch.

Legend: B captions, L tokens of a row.

An id hashes what the model reads of a caption: its tokens up to the end-of-text token, with their positions. Each
(token, position) has a random word, and the id is the sum of a caption's words modulo 2^64. Padding and the length of a
row thus do not change it. Exact ids would need the tokens of all ranks on every rank, and a sort; a rank computes hashes
from its own captions. In a batch of 32,768, two different captions have the same id with a probability of 3e-11, and
would then count as equal in that step.

Source: Zobrist 1970 (A New Hashing Method with Application for Game Playing); the words are those of splitmix64.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clipcore.data.order import hash64

# Differs from the keys of other hashes.
_CAPTION = 301


def caption_ids(tokens_BL: Tensor, ignores_padding: bool = True) -> Tensor:
    """Return an id for each caption, int64 [B], on the host.

    Args:
        tokens_BL: int64 [B, L] on the host, as a tokenizer returns them. A caption ends where its largest token first
            occurs, as for CLIP's ``encode_text``; later tokens are ignored.
        ignores_padding: False for a text tower that reads the whole row, such as SigLIP's.

    >>> ids_B = caption_ids(torch.tensor([[1, 5, 9, 0], [1, 9, 0, 0], [1, 5, 9, 9]]))
    >>> (ids_B[:, None] == ids_B).tolist()
    [[True, False, True], [False, True, False], [True, False, True]]
    """
    tokens = tokens_BL.numpy()
    last_B = tokens.argmax(1) if ignores_padding else np.full(len(tokens), tokens.shape[1] - 1)
    # Columns after the longest caption hold nothing to hash.
    tokens = tokens[:, : int(last_B.max(initial=-1)) + 1]
    places_L = np.arange(tokens.shape[1])
    is_read_BL = places_L <= last_B[:, None]

    words_BL = hash64((places_L << 32) + tokens, _CAPTION)
    ids_B = np.where(is_read_BL, words_BL, np.uint64(0)).sum(1, dtype=np.uint64)
    return torch.from_numpy(ids_B.view(np.int64))
