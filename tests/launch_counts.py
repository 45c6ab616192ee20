"""Count the kernels that a loss launches on a GPU, without one: tensors have shapes only, and nothing runs."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from clipcore.kernels import launch
from clipcore.kernels.contrastive import mean
from clipcore.kernels.contrastive import operator as contrastive_operator
from clipcore.kernels.logits import pairs
from clipcore.kernels.sigmoid import operator as sigmoid_operator

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))
from fake_gpu import SYNCHRONISATIONS, num_launches


class Launches(TorchDispatchMode):
    """Counts launches by name: PyTorch's own operations, products of the library, Triton's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @classmethod
    @contextlib.contextmanager
    def counted(cls, operand: torch.dtype = torch.float16) -> Iterator[Launches]:
        """Count inside a ``with``, where losses of tensors of the meta device take the path of a GPU.

        Args:
            operand: what the products multiply.
        """
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        mode = cls()
        counts = mode.counts

        def run(kernel: Any, *_: Any, **__: Any) -> None:
            counts[kernel.__name__.removeprefix("_")] += 1

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pairs, "choose_operand", lambda *_: operand)
            patch.setitem(pairs.WORKSPACE_BYTES, "cpu", pairs.WORKSPACE_BYTES["cuda"])
            for module in (contrastive_operator, mean, sigmoid_operator):
                for name in [name for name in vars(module) if name.endswith("_cpu")]:
                    patch.setattr(module, name, getattr(module, name.removesuffix("cpu") + "gpu"))
            # It does nothing to tensors without values.
            patch.setattr(launch, "addmm_fp32_", lambda *_: counts.update(["addmm"]))
            for kind in (JITFunction, InterpretedFunction):
                patch.setattr(kind, "run", run)
            with mode:
                yield mode

    @property
    def total(self) -> int:
        """All launches."""
        return self.counts.total()

    @property
    def num_blocks(self) -> int:
        """Blocks of logits, each of the forward and each of the backward."""
        names = ("contrastive_sums", "contrastive_gradient", "sigmoid")
        return sum(self.counts[f"{name}_{kind}"] for name in names for kind in ("pass", "kernel"))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "clipcore":
            # A mode does not see into an operator: call what is behind it.
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))

        # What is made of other operations counts as these.
        with self:
            out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out

        name = func._opname
        assert name not in SYNCHRONISATIONS, f"{func} waits for the GPU"
        out = func(*args, **(kwargs or {}))
        if number := num_launches(func, args, out):
            self.counts[name] += number
        return out
