"""Packed attention of short rows in Triton: the launches and the launch table.

Legend and contract: attention.py; the mathematics: attention_kernels.py.

At CLIP's lengths attention is bound by memory, and kernels for long sequences spend most of their work on padding: 257
tokens are 2.2 times the work in tiles of 128 x 128, and 1.1 times in blocks and steps of 64 with rests of 16. Operands are
read where the projection's layer wrote them, and the gradient is written where that layer's backward pass reads it.

The backward pass of a short row is one tile, five products. A longer row takes seven: the probabilities are computed once
for blocks of queries and once for blocks of keys. So each sum has one owner and a fixed order, without atomics.

Traffic of b-byte elements, of R L H K: forward 4 b (3 in, 1 out), backward 7 b in one tile, 8 b otherwise (a pass of its
own for queries and one for keys: 12 b), and 4 bytes a token and head. FLOPs, of R H L^2 K: forward 4, backward 10 in one
tile and 14 otherwise.

Sources: NVIDIA apex's fmha (a block of threads for each sequence and head); FlashAttention-2 (arXiv 2307.08691:
probabilities recomputed from the log-sum-exp, delta).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.attention_kernels import (
    attention_bwd_kernel,
    attention_bwd_tile_kernel,
    attention_fwd_kernel,
)
from clipcore.kernels.launch import triton
from clipcore.kernels.logits.pairs import LOG2E

# Longer rows have enough work to fill the library's tiles.
LONGEST = 512
WIDEST = 128

# (architecture, kernel) -> (most tokens, widest head) -> BLOCK, STEP, the least side of a rest or tail, num_warps,
# num_stages. The first row that holds the problem is used. The backward pass takes "tile" where that has a row, else
# "both" (queries and keys in one launch), else "query" and "key". No row spills.
Launches = dict[tuple[int, int], tuple[int, int, int, int, int]]
_SHORT: Launches = {(16, 64): (16, 16, 16, 1, 1), (32, 64): (32, 32, 32, 4, 1)}
_TILE: Launches = {
    **_SHORT,
    (64, 64): (64, 64, 64, 4, 1),
    (64, 128): (64, 64, 64, 8, 1),
    (128, 64): (128, 128, 128, 8, 1),
}
_LAUNCH_TABLE: dict[tuple[int, str], Launches] = {
    (80, "forward"): {**_SHORT, (512, 64): (64, 64, 16, 4, 2), (512, 128): (32, 32, 16, 4, 2)},
    (90, "forward"): {**_SHORT, (512, 64): (64, 64, 16, 4, 2), (512, 128): (64, 64, 16, 4, 2)},
    (100, "forward"): {**_SHORT, (512, 64): (64, 64, 16, 4, 2), (512, 128): (64, 64, 16, 4, 2)},
    (80, "tile"): _TILE,
    (90, "tile"): _TILE,
    (100, "tile"): _TILE,
    (80, "both"): {(512, 64): (64, 32, 16, 4, 2), (512, 128): (64, 32, 64, 8, 2)},
    (90, "both"): {
        (512, 64): (64, 32, 16, 4, 2),
        (512, 80): (64, 32, 64, 4, 2),
        (512, 128): (64, 32, 64, 8, 2),
    },
    (100, "both"): {(512, 64): (64, 64, 16, 4, 2), (512, 128): (64, 32, 64, 8, 2)},
}


def supports(
    length: int, head_size: int, dtype: torch.dtype, is_causal: bool, has_segments: bool
) -> bool:
    """Return whether the kernels serve such rows on a GPU; causality and segments make no difference.

    Heads of 40 and 48 columns (parts of 32 and 16) are left to the library: rows of 33 tokens came out wrong on an H100
    (Triton 3.6, docs/log.md). All other sizes were right there, and 40 is right in the interpreter. No published CLIP has
    such heads.
    """
    fits = 1 <= length <= LONGEST and head_size % 8 == 0 and 8 <= head_size <= WIDEST
    return fits and head_parts(head_size) != (32, 16) and dtype in (torch.float16, torch.bfloat16)


def forward(
    qkv_RL3HK: Tensor, is_causal: bool, segments_RL: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (output [R, L, H*K], float32 [R, H, L] logarithms to base 2 of the softmax's sums)."""
    rows, length, _, heads, size = qkv_RL3HK.shape
    qkv_RL3HK = qkv_RL3HK.contiguous()
    out_RLD = qkv_RL3HK.new_empty(rows, length, heads * size)
    lse_RHL = qkv_RL3HK.new_empty(rows, heads, length, dtype=torch.float32)
    if out_RLD.numel() > 0:
        chosen = _launch_config(qkv_RL3HK, "forward")
        assert chosen is not None
        grid, config = chosen
        attention_fwd_kernel[grid](
            out_ptr=out_RLD,
            lse_ptr=lse_RHL,
            **_problem(qkv_RL3HK, is_causal, segments_RL),
            **config,
        )
    return out_RLD, lse_RHL


def backward(
    grad_RLD: Tensor,
    qkv_RL3HK: Tensor,
    out_RLD: Tensor,
    lse_RHL: Tensor,
    is_causal: bool,
    segments_RL: Tensor | None,
) -> Tensor:
    """Return the projection's gradient [R, L, 3, H, K], every element written, from the output's and `forward`'s results."""
    qkv_RL3HK, grad_RLD = qkv_RL3HK.contiguous(), grad_RLD.contiguous()
    dqkv_RL3HK = torch.empty_like(qkv_RL3HK)
    if dqkv_RL3HK.numel() == 0:
        return dqkv_RL3HK
    problem = _problem(qkv_RL3HK, is_causal, segments_RL)
    problem |= {"grad_ptr": grad_RLD, "lse_ptr": lse_RHL, "dqkv_ptr": dqkv_RL3HK}
    if chosen := _launch_config(qkv_RL3HK, "tile"):
        grid, config = chosen
        del config["blocks"], config["REST"], config["STEP"], config["TAIL"]
        attention_bwd_tile_kernel[grid](**problem, **config)
        return dqkv_RL3HK
    passes = ["both"] if _launch_config(qkv_RL3HK, "both") else ["query", "key"]
    delta_RHL = torch.empty_like(lse_RHL) if len(passes) > 1 else None
    for name in passes:
        chosen = _launch_config(qkv_RL3HK, name)
        assert chosen is not None
        (programs,), config = chosen
        attention_bwd_kernel[(2 * programs if name == "both" else programs,)](
            out_ptr=out_RLD, delta_ptr=delta_RHL, PASS=name, **problem, **config
        )
    return dqkv_RL3HK


def _problem(qkv_RL3HK: Tensor, is_causal: bool, segments_RL: Tensor | None) -> dict[str, Any]:
    """Return the launch keywords that every kernel has."""
    _, length, _, heads, size = qkv_RL3HK.shape
    first_part, second_part = head_parts(size)
    return {
        "qkv_ptr": qkv_RL3HK,
        "segment_ptr": None if segments_RL is None else segments_RL.contiguous(),
        "L": length,
        "H": heads,
        "scale": size**-0.5 * LOG2E,
        "CAUSAL": is_causal,
        "SEGMENTS": segments_RL is not None,
        "SIZE": size,
        "K0": first_part,
        "K1": second_part,
    }


def _launch_config(qkv_RL3HK: Tensor, kernel: str) -> tuple[tuple[int], dict[str, Any]] | None:
    """Return grid and launch keywords by the table; None where the kernel has no row for the problem."""
    rows, length, _, heads, size = qkv_RL3HK.shape
    architecture = launch.architecture(qkv_RL3HK.device)
    table = _LAUNCH_TABLE.get((architecture, kernel), {})
    fitting = [
        chosen for (most, widest), chosen in table.items() if length <= most and size <= widest
    ]
    if not fitting:
        return None
    block, step, least, num_warps, num_stages = fitting[0]
    blocks, rest = divmod(length, block)
    rest = min(block, _side(rest, least))
    if blocks == 0 or rest == block:
        blocks, rest = blocks + 1, 0
    # A row of one step has no loop.
    has_steps = length > step
    tail = min(step, _side(length % step if has_steps else length, least))
    config = {
        "blocks": blocks,
        "BLOCK": block,
        "REST": rest,
        "STEP": step if has_steps else 0,
        "TAIL": tail,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "maxnreg": launch.most_registers(architecture, num_warps),
    }
    return ((blocks + (rest > 0)) * heads * rows,), config


def _side(number: int, least: int = 16) -> int:
    """Return the side of a tile that holds this many, at least `least`; 0 for none."""
    return max(least, triton.next_power_of_2(number)) if number else 0


def head_parts(size: int) -> tuple[int, int]:
    """Split the head size into two sides of tiles where they pad less than one: 64 is (64, 0), 80 is (64, 16)."""
    one = _side(size)
    two = one // 2, _side(size - one // 2)
    return two if two[0] >= 16 and sum(two) < one else (one, 0)
