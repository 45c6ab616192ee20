"""FLOPs of the operators that torch's own registry does not know or overcounts: this project's, and attention on the CPU.

Importing it registers the formulas with ``torch.utils.flop_counter``, so that ``FlopCounterMode`` counts them as well.
Matrix products are counted, 2 FLOP a multiplication and addition; of attention those pairs of query and key that see each
other.

Legend: B images, G texts, R rows of tokens, L tokens, H heads, K head size, N and M rows of a matrix, D its columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

# The operators exist once their files are imported.
from clipcore.kernels import attention, contrastive, sigmoid, similarity, similarity_topk

assert attention and contrastive and sigmoid and similarity and similarity_topk

_ops, _aten = torch.ops.clipcore, torch.ops.aten


def _formula(target: Any, get_raw: bool = False) -> Callable[[Callable[..., int]], Any]:
    """Register a formula of shapes, or, for what depends on values, of the arguments themselves.

    It replaces torch's own: from 2.15 on torch has one for attention on the CPU, which counts what a causal mask hides.
    """
    flop_registry.pop(target, None)
    return register_flop_formula(target, get_raw=get_raw)


def flops_of(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the FLOPs of one call of an operator; 0 for one without matrix products."""
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def visible_pairs(rows: int, length: int, is_causal: bool, segments_RL: Tensor | None) -> int:
    """Return the number of pairs of query and key that see each other, over all rows.

    Segments are read off their values, of which -1 is padding.

    On the meta device, where segments have no values, a row counts as one caption: the most that it may hold.

    >>> visible_pairs(2, 4, is_causal=True, segments_RL=None)
    20
    """
    if segments_RL is None or segments_RL.is_meta:
        return rows * (length * (length + 1) // 2 if is_causal else length**2)
    ids_RL = segments_RL.long()
    # Two rows may count their captions alike.
    ids_RL = ids_RL + (ids_RL.max() + 1) * torch.arange(rows, device=ids_RL.device)[:, None]
    _, lengths = ids_RL[segments_RL >= 0].unique(return_counts=True)
    return int((lengths * (lengths + 1) // 2 if is_causal else lengths**2).sum())


def _packed_attention(products: int, qkv: Tensor, is_causal: bool, segments: Tensor | None) -> int:
    rows, length, _, heads, size = qkv.shape
    return products * 2 * heads * size * visible_pairs(rows, length, is_causal, segments)


@_formula(_ops.attention_forward, get_raw=True)
def _(qkv: Tensor, is_causal: bool, segments: Tensor | None, **_: Any) -> int:
    return _packed_attention(2, qkv, is_causal, segments)


@_formula(_ops.attention_backward, get_raw=True)
def _(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    segments: Tensor | None,
    **_: Any,
) -> int:
    return _packed_attention(
        5, qkv, is_causal, segments
    )  # the scores once more, and four gradients


def _cpu_attention(products: int, q: Any, k: Any, is_causal: bool) -> int:
    rows, heads, length, size = q
    pairs = visible_pairs(rows, length, True, None) if is_causal else rows * length * k[2]
    return products * 2 * heads * size * pairs


@_formula(_aten._scaled_dot_product_flash_attention_for_cpu)
def _(q: Any, k: Any, v: Any, dropout_p: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    return _cpu_attention(2, q, k, is_causal)


@_formula(_aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dropout: float, causal: bool, **_: Any
) -> int:
    return _cpu_attention(5, q, k, causal)


def _similarity(products: int, x: Any, y: Any) -> int:
    """Return the FLOPs of so many products of the size [N, D] x [D, M]."""
    return products * 2 * x[0] * y[0] * x[1]


@_formula(_ops.contrastive_fwd)
def _(image: Any, text: Any, *_: Any, **__: Any) -> int:
    return _similarity(1, image, text)


@_formula(_ops.contrastive_bwd)
def _(upstream: Any, terms: Any, image: Any, text: Any, *rest: Any, **_: Any) -> int:
    need_image, need_text = rest[-2:]
    has_stash = terms[-2][0] > 0  # else the logits are made once more
    return _similarity((not has_stash) + need_image + need_text, image, text)


@_formula(_ops.sigmoid_fwd)
def _(image: Any, text: Any, *rest: Any, **_: Any) -> int:
    backward, need_image, need_text = rest[-3:]
    return _similarity(1 + (need_image + need_text if backward else 0), image, text)


@_formula(_ops.similarity_fwd)
def _(x: Any, y: Any, scale: Any, **_: Any) -> int:
    return _similarity(1, x, y)


@_formula(_ops.similarity_bwd)
def _(grad: Any, x: Any, y: Any, scale: Any, need_x: bool, need_y: bool, **_: Any) -> int:
    return _similarity((need_x or not need_y) + need_y, x, y)


@_formula(_ops.similarity_topk)
def _(x: Any, y: Any, k: int, **_: Any) -> int:
    return _similarity(1, x, y)
