"""How kernels over a block of logits are launched: rows of launch tables, and the keywords that they come to.

Legend and the two engines: ``clipcore.kernels.logits``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from clipcore.kernels import launch
from clipcore.kernels.logits.pairs import Pairs

# The rows of a strip. Each strip leaves one partial sum a column: 128 rows make them a small part of a block's bytes, and
# a block of 8,192 x 8,192 still has 1,024 strips for 132 processors.
STRIP_ROWS = 128


class LaunchRow(NamedTuple):
    """A row of a launch table, of a kernel that multiplies tiles: their sides, and how it is compiled."""

    block_n: int
    block_m: int
    block_d: int
    num_warps: int
    num_stages: int

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of logits that a program works on."""
        return self.block_n, self.block_m

    def arguments(self, x_RE: Tensor, y_CE: Tensor) -> dict[str, Any]:
        """Return the launch keywords of this row, with descriptors of the operands of a block."""
        architecture = launch.architecture(x_RE.device)
        return {
            "x_desc": descriptor(x_RE, self.block_n, self.block_d),
            "y_desc": descriptor(y_CE, self.block_m, self.block_d),
            "D": x_RE.shape[1],
            "BLOCK_N": self.block_n,
            "BLOCK_M": self.block_m,
            "BLOCK_D": self.block_d,
            "GROUP_N": 8,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": launch.most_registers(architecture, self.num_warps),
        }


class StripRow(NamedTuple):
    """A row of a launch table, of a kernel that passes over a block in memory; see ``clipcore.kernels.strips``.

    Attributes:
        columns: of a strip.
        step: rows that are in registers at once.
        most_registers: of a thread; None leaves them to the chip's row.
    """

    columns: int
    step: int
    most_registers: int | None = None

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of logits that a program works on."""
        return STRIP_ROWS, self.columns

    def arguments(self, x_RE: Tensor, y_CE: Tensor) -> dict[str, Any]:
        """Return the launch keywords of this row."""
        architecture = launch.architecture(x_RE.device)
        return {
            "ROWS": STRIP_ROWS,
            "COLS": self.columns,
            "STEP": self.step,
            "num_warps": 1,
            "num_stages": 1,
            "maxnreg": self.most_registers or launch.most_registers(architecture, 1),
        }


def block_arguments(pairs: Pairs, shape: tuple[int, int]) -> dict[str, Any]:
    """Return the launch keywords that every kernel over a block of a shape has."""
    return {
        "image_id_ptr": pairs.image_ids,
        "text_id_ptr": pairs.text_ids,
        "N": shape[0],
        "M": shape[1],
        "first_label": pairs.first_label,
        "IDS": pairs.ids,
    }


def descriptor(x_ND: Tensor, block_n: int, block_d: int) -> Any:
    """Return a tensor descriptor of an operand for ``tiles.multiply``."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x_ND, [block_n, block_d])
