"""How the kernel of the sigmoid loss is launched, by architecture.

Legend: ``clipcore.kernels.sigmoid``.
"""

from __future__ import annotations

import torch

from clipcore.kernels import launch
from clipcore.kernels.logits.launch_rows import LaunchRow, StripRow
from clipcore.kernels.logits.pairs import LossInputs

# (architecture, kind), of kernels that multiply: "fused" 16-bit operands, "targets" such with ids, "exact" float32 ones. No
# row spills.
# Not yet measured. Tiles on sm_100 are small for the reason given in contrastive/launches.py.
_LAUNCH_TABLE = {
    (80, "fused"): LaunchRow(64, 128, 32, 8, 3),
    (80, "targets"): LaunchRow(64, 128, 32, 8, 3),
    (80, "exact"): LaunchRow(64, 64, 16, 8, 2),
    (90, "fused"): LaunchRow(64, 128, 64, 4, 4),
    (90, "targets"): LaunchRow(64, 128, 64, 8, 3),
    (90, "exact"): LaunchRow(64, 128, 16, 8, 2),
    (100, "fused"): LaunchRow(32, 128, 64, 4, 3),
    (100, "targets"): LaunchRow(32, 128, 64, 4, 3),
    (100, "exact"): LaunchRow(64, 128, 16, 8, 2),
}

# A pass over a block that the library has multiplied, on every chip. Not yet measured.
# With 168 registers a processor runs 12 strips at once, and nothing is moved to memory.
_STRIP = StripRow(columns=256, step=4, most_registers=168)
# Ids are in registers beside the logits. Left to itself the assembler moves a value or two to memory.
_STRIP_WITH_IDS = StripRow(columns=512, step=2, most_registers=255)

FP16_GRADIENT_SCALE = 2.0**15


def launch_row(inputs: LossInputs) -> LaunchRow | StripRow:
    """Return the row of the launch table."""
    has_ids = inputs.pairs.image_ids is not None
    if inputs.engine != "fused":
        return _STRIP_WITH_IDS if has_ids else _STRIP
    kind = "targets" if has_ids else "fused"
    if inputs.operand == torch.float32:
        kind = "exact"
    return _LAUNCH_TABLE[launch.architecture(inputs.image_BE.device), kind]
