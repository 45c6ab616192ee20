"""How the kernel of the sigmoid loss is launched, by architecture.

Legend: ``clipcore.kernels.sigmoid``.
"""

from __future__ import annotations

import torch

from clipcore.kernels import launch
from clipcore.kernels.logits.pairs import LossInputs
from clipcore.kernels.logits.walk_gpu import LaunchRow

# (architecture, kind) -> BLOCK_N, BLOCK_M, BLOCK_D, num_warps, num_stages. "pass" reads a block that the library
# multiplied, "fused" multiplies 16-bit operands itself, "targets" does so with ids, "exact" float32 ones. No row spills.
# Not yet measured. Tiles on sm_100 are small for the reason given in contrastive/launches.py.
_LAUNCH_TABLE = {
    (80, "pass"): LaunchRow(64, 128, 16, 8, 1),
    (80, "fused"): LaunchRow(64, 128, 32, 8, 3),
    (80, "targets"): LaunchRow(64, 128, 32, 8, 3),
    (80, "exact"): LaunchRow(64, 64, 16, 8, 2),
    (90, "pass"): LaunchRow(64, 128, 16, 8, 1),
    (90, "fused"): LaunchRow(64, 128, 64, 4, 4),
    (90, "targets"): LaunchRow(64, 128, 64, 8, 3),
    (90, "exact"): LaunchRow(64, 128, 16, 8, 2),
    (100, "pass"): LaunchRow(64, 128, 16, 8, 1),
    (100, "fused"): LaunchRow(32, 128, 64, 4, 3),
    (100, "targets"): LaunchRow(32, 128, 64, 4, 3),
    (100, "exact"): LaunchRow(64, 128, 16, 8, 2),
}

FP16_GRADIENT_SCALE = 2.0**15


def launch_row(inputs: LossInputs) -> LaunchRow:
    """Return the row of the launch table."""
    kind = "pass"
    if inputs.engine == "fused" and inputs.operand == torch.float32:
        kind = "exact"
    elif inputs.engine == "fused":
        kind = "fused" if inputs.pairs.image_ids is None else "targets"
    return _LAUNCH_TABLE[launch.architecture(inputs.image_BE.device), kind]
