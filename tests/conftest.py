"""What every test shares: threads, seeds, poisoned memory on request, Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

# Read by OpenMP when torch is imported, and by every process that a test starts. Workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

import numpy as np
import pytest
import torch

# Triton decides at decoration time, so before any kernel file is imported. Users on the CPU never meet the
# interpreter: it runs only where a test calls a Triton launcher with CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, alone or in any order."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # the global generator is what libraries draw from
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin come filled with NaN (integers: their maximum), so an unwritten element shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
