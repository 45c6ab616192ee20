"""How each kernel of the contrastive loss is launched, by architecture.

Legend: ``clipcore.kernels.contrastive``.
"""

from __future__ import annotations

import torch

from clipcore.kernels import launch
from clipcore.kernels.logits.launch_rows import LaunchRow, StripRow
from clipcore.kernels.logits.pairs import LossInputs

# (architecture, kind), of kernels that multiply. "fused" multiplies 16-bit operands, "targets" does so with ids or spread
# targets, and "exact" multiplies float32 ones; "running max" and "running max exact" are of the kernel of that name. No row
# spills. Not yet measured. On sm_100 Triton 3.7 cannot compile the epilogues on a tile in tensor memory: tiles of fewer than
# 64 rows take the older matrix instruction.
_LAUNCH_TABLE = {
    (80, "fused"): LaunchRow(64, 128, 32, 8, 3),
    (80, "targets"): LaunchRow(64, 128, 32, 8, 3),
    (80, "exact"): LaunchRow(64, 64, 16, 8, 2),
    (80, "running max"): LaunchRow(64, 64, 64, 4, 3),
    (80, "running max exact"): LaunchRow(32, 64, 16, 4, 3),
    (90, "fused"): LaunchRow(64, 128, 64, 4, 4),
    (90, "targets"): LaunchRow(64, 128, 64, 8, 3),
    (90, "exact"): LaunchRow(64, 128, 16, 8, 2),
    (90, "running max"): LaunchRow(64, 64, 64, 4, 3),
    (90, "running max exact"): LaunchRow(32, 64, 32, 4, 3),
    (100, "fused"): LaunchRow(32, 128, 64, 4, 3),
    (100, "targets"): LaunchRow(32, 128, 64, 4, 3),
    (100, "exact"): LaunchRow(64, 64, 16, 8, 2),
    (100, "running max"): LaunchRow(32, 64, 32, 4, 3),
    (100, "running max exact"): LaunchRow(32, 64, 32, 4, 3),
}

# A pass over a block that the library has multiplied or a stash holds, on every chip. Not yet measured.
_STRIP = StripRow(columns=512, step=4)
# Ids and targets are in registers beside the logits: half as many rows at once. Left to itself the assembler moves a value
# or two to memory.
_STRIP_WITH_TARGETS = StripRow(columns=512, step=2, most_registers=255)

# The engine by (architecture, width, operand bits), where both were measured; elsewhere the library's.
ENGINE_TABLE: dict[tuple[int, int, int], str] = {}

# |dz| over the largest upstream gradient is at most 4 (each direction takes off and puts back at most 1 of 2).
FP16_GRADIENT_SCALE = 2.0**13


def sums_row(inputs: LossInputs, by_place: bool) -> LaunchRow | StripRow:
    """Return the launch of the pass that sums, and that writes a stash."""
    is_plain = by_place and inputs.pairs.image_ids is None
    if inputs.engine != "fused":
        return _STRIP if is_plain else _STRIP_WITH_TARGETS
    kind = "fused" if is_plain else "targets"
    if inputs.operand == torch.float32:
        kind = "exact"
    return _LAUNCH_TABLE[_architecture(inputs), kind]


def gradient_row(inputs: LossInputs, by_place: bool, has_stash: bool) -> LaunchRow | StripRow:
    """Return the launch of the gradient pass."""
    writer = sums_row(inputs, by_place)
    if inputs.engine == "fused" and not has_stash:
        return writer
    is_plain = by_place and inputs.pairs.image_ids is None
    row = _STRIP if is_plain else _STRIP_WITH_TARGETS
    # A strip that reads a stash has to lie in one of the segments, which have a range each row.
    return row._replace(columns=min(row.columns, writer.sides[1]))


def segment_columns(inputs: LossInputs, by_place: bool) -> int:
    """Return the columns of a stash's segments, which are those of what writes them."""
    return sums_row(inputs, by_place).sides[1]


def running_max_row(inputs: LossInputs, has_stash: bool) -> LaunchRow:
    """Return the launch of the running maximum."""
    is_exact = has_stash or inputs.operand == torch.float32
    return _LAUNCH_TABLE[_architecture(inputs), "running max exact" if is_exact else "running max"]


def _architecture(inputs: LossInputs) -> int:
    return launch.architecture(inputs.image_BE.device)


def dense_shape(B: int, G: int) -> tuple[int, int]:
    """Return the shape of a dense matrix of float32 logits, whose rows begin at multiples of 64 bytes."""
    return B, -(-G // 16) * 16


def packed_shapes(
    B: int, G: int, engine: str
) -> tuple[tuple[int, int], tuple[int, int, int], torch.dtype]:
    """Return the shapes of a stash and of its ranges, as many as the engine's shortest segments make, and its dtype."""
    columns = _STRIP.columns
    if engine == "fused":
        tiles = [row for (_, kind), row in _LAUNCH_TABLE.items() if "running max" not in kind]
        columns = min(row.block_m for row in tiles)
    # Rows begin at multiples of 32 bytes, so that a strip is read 16 at a time.
    return (B, -(-G // 16) * 16), (-(-G // columns), B, 2), torch.int16
