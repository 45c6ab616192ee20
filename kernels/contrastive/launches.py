"""How each kernel of the contrastive loss is launched, by architecture.

Legend: ``clipcore.kernels.contrastive``.
"""

from __future__ import annotations

import torch

from clipcore.kernels import launch
from clipcore.kernels.logits.pairs import LossInputs
from clipcore.kernels.logits.walk_gpu import LaunchRow

# (architecture, kind). "pass" reads a block that the library multiplied; "fused" multiplies 16-bit operands itself,
# "targets" does so with ids or spread targets, and "exact" multiplies float32 ones; "running max" and "running max exact"
# are of the kernel of that name. No row spills. Not yet measured. On sm_100 Triton 3.7 cannot compile the epilogues on a
# tile in tensor memory: tiles of fewer than 64 rows take the older matrix instruction.
_LAUNCH_TABLE = {
    (80, "pass"): LaunchRow(64, 128, 16, 8, 1),
    (80, "fused"): LaunchRow(64, 128, 32, 8, 3),
    (80, "targets"): LaunchRow(64, 128, 32, 8, 3),
    (80, "exact"): LaunchRow(64, 64, 16, 8, 2),
    (80, "running max"): LaunchRow(64, 64, 64, 4, 3),
    (80, "running max exact"): LaunchRow(32, 64, 16, 4, 3),
    (90, "pass"): LaunchRow(64, 128, 16, 8, 1),
    (90, "fused"): LaunchRow(128, 128, 64, 8, 3),
    (90, "targets"): LaunchRow(64, 128, 64, 8, 3),
    (90, "exact"): LaunchRow(64, 128, 16, 8, 2),
    (90, "running max"): LaunchRow(64, 64, 64, 4, 3),
    (90, "running max exact"): LaunchRow(32, 64, 32, 4, 3),
    (100, "pass"): LaunchRow(64, 128, 16, 8, 1),
    (100, "fused"): LaunchRow(32, 128, 64, 4, 3),
    (100, "targets"): LaunchRow(32, 128, 64, 4, 3),
    (100, "exact"): LaunchRow(64, 64, 16, 8, 2),
    (100, "running max"): LaunchRow(32, 64, 32, 4, 3),
    (100, "running max exact"): LaunchRow(32, 64, 32, 4, 3),
}

# The engine by (architecture, width, operand bits), where both were measured; elsewhere the library's.
ENGINE_TABLE: dict[tuple[int, int, int], str] = {}

# |dz| over the largest upstream gradient is at most 4 (each direction takes off and puts back at most 1 of 2).
FP16_GRADIENT_SCALE = 2.0**13


def sums_row(inputs: LossInputs, by_place: bool) -> LaunchRow:
    """Return the launch of the pass that sums, and that writes a stash."""
    return _LAUNCH_TABLE[_architecture(inputs), _kind(inputs, by_place, inputs.engine == "fused")]


def gradient_row(inputs: LossInputs, by_place: bool, has_stash: bool) -> LaunchRow:
    """Return the launch of the gradient pass."""
    if inputs.engine == "fused" and not has_stash:
        return _LAUNCH_TABLE[_architecture(inputs), _kind(inputs, by_place, True)]
    # A tile that reads a stash has to lie in one of those that wrote it, which have a range each.
    writer, row = sums_row(inputs, by_place), _LAUNCH_TABLE[_architecture(inputs), "pass"]
    row = row._replace(
        block_n=min(row.block_n, writer.block_n), block_m=min(row.block_m, writer.block_m)
    )
    assert writer.block_n % row.block_n == 0 and writer.block_m % row.block_m == 0
    return row


def running_max_row(inputs: LossInputs, has_stash: bool) -> LaunchRow:
    """Return the launch of the running maximum."""
    is_exact = has_stash or inputs.operand == torch.float32
    return _LAUNCH_TABLE[_architecture(inputs), "running max exact" if is_exact else "running max"]


def _architecture(inputs: LossInputs) -> int:
    return launch.architecture(inputs.image_BE.device)


def _kind(inputs: LossInputs, by_place: bool, is_fused: bool) -> str:
    """Return the kind of launch for a block."""
    if not is_fused:
        return "pass"
    if inputs.operand == torch.float32:
        return "exact"
    return "fused" if by_place and inputs.pairs.image_ids is None else "targets"


def dense_shape(B: int, G: int) -> tuple[int, int]:
    """Return the shape of a dense matrix of float32 logits, whose rows begin at multiples of 64 bytes."""
    return B, -(-G // 16) * 16


def packed_shapes(B: int, G: int) -> tuple[tuple[int, int], tuple[int, int, int], torch.dtype]:
    """Return the shapes of a stash and of its ranges, as many as the finest tile makes, and the stash's dtype."""
    rows = [row for (_, kind), row in _LAUNCH_TABLE.items() if not kind.startswith("running max")]
    block_n, block_m = min(row.block_n for row in rows), min(row.block_m for row in rows)
    return (B, -(-G // 8) * 8), (-(-B // block_n), -(-G // block_m), 2), torch.int16
