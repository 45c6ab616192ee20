"""The outputs of single blocks, for ``forward_intermediates`` of the towers.

Legend: B sequences, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clipcore.kernels.residual_attention import Stream
from clipcore.towers.modules import Transformer

# Which blocks: the last n, those of these indices (negative ones from the end), or None for all.
Indices = int | Sequence[int] | None


def taken_blocks(num_blocks: int, indices: Indices) -> list[int]:
    """Return the indices of the chosen blocks, in the order of the tower.

    Raises:
        ValueError: there is no such block, or none is chosen.
    """
    if indices is None:
        return list(range(num_blocks))
    if isinstance(indices, int):
        if not 0 < indices <= num_blocks:
            raise ValueError(f"the tower has {num_blocks} blocks, so not the last {indices}")
        return list(range(num_blocks - indices, num_blocks))
    taken = {index + num_blocks if index < 0 else index for index in indices}
    if not taken or min(taken) < 0 or max(taken) >= num_blocks:
        raise ValueError(
            f"the tower's blocks are 0 to {num_blocks - 1}, or -{num_blocks} to -1 from the end; got {list(indices)}"
        )
    return sorted(taken)


def run_blocks(
    transformer: Transformer, x_BLD: Tensor, indices: Indices, stop_early: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Return every token after the last block that was run, and after each chosen block, [B, L, D].

    Args:
        indices: see ``Indices``.
        stop_early: run no block after the last chosen one.
    """
    taken = taken_blocks(len(transformer.blocks), indices)
    found = []
    for i, block in enumerate(transformer.blocks):
        if stop_early and i > taken[-1]:
            break
        # Joined after each block, because only then the stream is a block's output.
        if transformer.grad_checkpointing and torch.is_grad_enabled():
            parts = checkpoint(block, x_BLD, None, transformer.is_causal, use_reentrant=False)
        else:
            parts = block(x_BLD, None, transformer.is_causal)
        x_BLD = parts if isinstance(parts, Tensor) else Stream(*parts).joined()
        if i in taken:
            found.append(x_BLD)
    return x_BLD, found


def check_format(output_fmt: str, allowed: Sequence[str]) -> None:
    """Raise ValueError for a layout of the outputs that a tower does not have."""
    if output_fmt not in allowed:
        raise ValueError(f"the tower's output format is {' or '.join(allowed)}, got {output_fmt!r}")
