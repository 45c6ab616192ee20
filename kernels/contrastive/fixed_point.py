"""A stash of logits in 16 bits: each row segment between its own least and greatest value, in Triton.

A code k of 0 to 65,535 stands for least + step * k. Packing adds 1.5 * 2^23, whose last place is one, so that the sum is
rounded to a whole number and its low bits are the code; unpacking puts them back. No conversion instruction is needed, of
which a processor does a quarter as many as additions.

Ranges are float32 [segments, rows, 2]: least and step of ``segment`` columns of a row.
"""

from __future__ import annotations

from clipcore.kernels.launch import tl, triton
from clipcore.kernels.strips import strip_load, strip_store


@triton.jit
def pack_rows(
    cosine,  # float32 [rows, columns]
    stash_ptrs,  # to int16 [rows, columns]
    range_ptrs,  # to float32 [rows]: the least, and behind it the step
    inside,
    in_n,
    EDGE: tl.constexpr,
):
    """Store rows of one segment; return the values that were stored. A NaN stays one, and is stored as any code."""
    if EDGE:
        least = tl.min(tl.where(inside, cosine, float("inf")), axis=1)
        most = tl.max(tl.where(inside, cosine, float("-inf")), axis=1)
    else:
        least, most = tl.min(cosine, axis=1), tl.max(cosine, axis=1)
    # A row without a valid pair has no range, one of equal values a range of 0.
    step = tl.maximum((most - least) * (1.0 / 65535.0), 1e-30)
    inverse = 1.0 / step

    shifted = (cosine - least[:, None]) * inverse[:, None] + 12582912.0
    code = shifted.to(tl.int32, bitcast=True).to(tl.int16)  # the low half
    strip_store(stash_ptrs, code, inside, EDGE)
    strip_store(range_ptrs, least, in_n, EDGE)
    strip_store(range_ptrs + 1, step, in_n, EDGE)
    return least[:, None] + step[:, None] * (shifted - 12582912.0)


@triton.jit
def unpack(code, least, step):
    """Return the values of int16 codes."""
    # The bits of 1.5 * 2^23, from a register: beside a constant the assembler masks and sets in two instructions.
    # Grids have one axis, and the number of a program along another is 0.
    bits = 0x4B400000 + tl.program_id(1)
    shifted = code.to(tl.uint16, bitcast=True).to(tl.int32) | bits
    return least + step * (shifted.to(tl.float32, bitcast=True) - 12582912.0)


@triton.jit
def unpack_rows(stash_ptrs, range_ptrs, inside, in_n, EDGE: tl.constexpr):
    """Return the values of stored rows of one segment; the arguments of ``pack_rows``."""
    code = strip_load(stash_ptrs, inside, EDGE)
    least = strip_load(range_ptrs, in_n, EDGE)
    step = strip_load(range_ptrs + 1, in_n, EDGE)
    return unpack(code, least[:, None], step[:, None])
