"""Print the operators of models' and losses' forward passes under torch's own autocast for a GPU, as JSON.

Arguments: a library with `register_no_op_guard`, or "none"; then names of models. Tensors are fake ones, without gradients,
since autograd asks a GPU that is not there for its streams.
"""

import ctypes
import json
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.cuda.amp.common
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS.parent / "bench")]

from autocast_models import attention, of_models  # noqa: E402
from fake_gpu import ALLOCATIONS, GPU, VIEWS, tensors_in  # noqa: E402

library, *names = sys.argv[1:]
if library != "none":
    ctypes.CDLL(library).register_no_op_guard()
fake = FakeTensorMode()


def on_gpu(x: Tensor) -> Tensor:
    return FakeTensor(fake, torch.empty(x.shape, dtype=x.dtype, device="meta"), GPU)


def place(model: nn.Module) -> None:
    """Put the weights on the GPU, as buffers: a fake tensor is no parameter."""
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name in [name for name, value in own.items() if value is not None]:
                module._buffers[name] = on_gpu(own.pop(name))


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in tensors_in(out) if x.device.type == "cuda"]
        # A copy from the host is no launch.
        is_copy = bool(made) and any(x.device.type == "cpu" and x.dim() for x in tensors_in(args))
        is_launch = made and not is_copy and func._opname not in ALLOCATIONS | VIEWS
        if func.namespace == "aten" and is_launch:
            self.seen.append(f"{func._opname} {made[0].dtype}")
        return out


found = {}
for name in names:
    for package, model, inputs, forward in of_models(name):
        place(model)
        inputs = inputs(on_gpu)
        with (
            mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            mock.patch.object(F, "scaled_dot_product_attention", attention),
            torch.backends.cudnn.flags(enabled=False),
            torch.no_grad(),
            fake,
            Recorder() as recorder,
        ):
            forward(*inputs)
        found[f"{package} {name}"] = sorted(recorder.seen)
print(json.dumps(found))
