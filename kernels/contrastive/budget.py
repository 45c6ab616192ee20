"""What a stash may take where the caller says nothing.

Legend: ``clipcore.kernels.contrastive``.
"""

from __future__ import annotations

import functools

import torch

# On the CPU.
STASH_BYTES = 2**30
# A GPU's free memory, over what a stash may take of it. The rest is for activations, which live as long as the stash.
GPU_SHARE = 8


def default_stash_bytes(device: torch.device) -> int:
    """Return the most that a stash may take by default: 1 GiB on the CPU, at most an eighth of a GPU's free memory.

    A GPU's is a power of two, decided at the first call of the process and kept: a loss has other bits with a stash than
    without one, so that neither the next step nor, mostly, the next run may decide otherwise. Whoever has to repeat bits in
    another process passes the number on. Ranks may differ, since a rank's stash is its own affair.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return STASH_BYTES
    return _gpu_stash_bytes(torch.cuda.current_device() if device.index is None else device.index)


# The compiler calls it and takes the answer for a constant: it cannot look into the driver. This is what
# torch.compiler.assume_constant_result sets, which would import the compiler with this module.
default_stash_bytes._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _gpu_stash_bytes(index: int) -> int:
    """Return the largest power of two in the share of what is free now."""
    free, _ = torch.cuda.mem_get_info(index)
    # What torch's allocator holds and does not use.
    free += torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return int(2 ** max(0, (free // GPU_SHARE).bit_length() - 1))
