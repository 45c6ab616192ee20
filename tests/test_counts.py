"""The counts of a training step: clipcore's are those of the committed rows, and the rule counts what a GPU would do."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from autocast_models import attention, of_models
from runs import PROGRAMS
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))
import bench_counts
import harness
from fake_gpu import GPU, FakeGpu, tensors_in

from clipcore.kernels.gelu import gelu
from clipcore.towers.architectures import list_models
from clipcore.towers.factory import create_model

# One of each family; the others differ in sizes.
COMPARED = ["ViT-B-32", "RN50"]


def committed(provider: str, name: str) -> dict[str, Any]:
    """Return the newest row of a step of 64 pairs."""
    _, computed = harness.newest_rows()
    case = {"model": name, "pairs": 64}
    rows = [row for row in computed if row["op"] == bench_counts.OP and harness._case(row) == case]
    (row,) = [row for row in rows if row["provider"] == provider]
    return row


@pytest.mark.parametrize("name", COMPARED)
def test_a_step_counts_what_its_committed_row_says(name: str) -> None:
    found = bench_counts.of_clipcore(name, 64)
    row = committed("clipcore", name)
    differing = {key: (row[key], value) for key, value in found.items() if row[key] != value}
    assert not differing, (
        f"a step of {name} has other counts than bench/results says (there, now): {differing}; if that is meant, commit the "
        "change and then the rows of: python bench/bench_counts.py"
    )


@pytest.mark.fast
def test_every_counted_model_has_a_row_of_both_packages() -> None:
    assert set(COMPARED) <= set(bench_counts.COUNTED) <= set(list_models())
    for name in bench_counts.COUNTED:
        for provider in ("clipcore", "open_clip"):
            row = committed(provider, name)
            assert harness.COUNTS - row.keys() <= {"image_saved"} and not row["dirty"]


@pytest.mark.parametrize("name", COMPARED)
def test_the_flops_are_those_of_torchs_counter(name: str) -> None:
    row = committed("clipcore", name)
    total = row["flops_forward"] + row["flops_backward"]
    assert total == bench_counts.flops_of_clipcore(name, 64)
    assert row["flops_over_needed"] == round(total / bench_counts.needed(name, 64), 3)


def test_open_clips_own_loop_is_counted_between_its_batches() -> None:
    """Several micro-batches are embedded twice, and uploaded once."""
    direct, split = (bench_counts.of_open_clip("ViT-S-32", 16, size) for size in (None, 8))
    once = direct["flops_forward"] + direct["flops_backward"]
    twice = split["flops_forward"] + split["flops_backward"]
    assert 1.32 < twice / once < 1.34
    assert split["copies"] == 2 * direct["copies"] == 4
    assert split["copied_bytes"] == direct["copied_bytes"]
    # Of a logged step: two terms of the loss, one of them the sum, and the scale.
    assert direct["waits"] == split["waits"] == 0
    assert direct["logged_waits"] == split["logged_waits"] == 3
    assert split["launches_update"] == direct["launches_update"]


# The rule


@pytest.mark.fast
def test_what_counts_as_a_launch_a_copy_and_a_wait() -> None:
    host = torch.ones(3, 4)
    with FakeGpu() as gpu:
        values = host.to(GPU, non_blocking=True)
        assert values.is_cuda and values.device == GPU and host.device.type == "cpu"
        assert (gpu.copies, gpu.copied_bytes, gpu.waits) == (1, 48, 0)
        assert values.to(GPU) is not host and gpu.num_launches("forward") == 0

        view = values.T[1:].expand(5, 3, 3)
        torch.empty(7, device=GPU)
        torch.empty(0, device=GPU).zero_()
        assert gpu.num_launches("forward") == 0

        gpu.part = "sums"
        torch.where(view > 0, view, 0.0)  # a comparison, a scalar on the device, a choice
        torch._foreach_add_([values, values], 1.0)
        assert gpu.launches["sums"] == {"gt": 1, "scalar_tensor": 1, "where": 1, "_foreach_add_": 1}

        assert values.sum().item() == 1.0 and bool(values.isfinite().all())
        assert gpu.waits == 2
        torch.tensor([1.0, 2.0], device=GPU)
        assert (gpu.copies, gpu.waits) == (2, 3)
        assert values.cpu().tolist() == [[1.0] * 4] * 3 and gpu.waits == 4
        with pytest.raises(NotImplementedError, match="brings a tensor without values to the host"):
            values.to("cpu", non_blocking=True)
    # Outside all is as it was.
    assert not {"device", "is_cuda", "sum", "__matmul__"} & vars(torch.Tensor).keys()
    assert torch.empty(2, device="meta").device.type == "meta"


@pytest.mark.fast
def test_an_operator_of_ours_counts_as_its_path_on_a_gpu() -> None:
    """GELU's backward pass is one kernel; without a bias it has no column sums to add up."""
    with FakeGpu() as gpu:
        x = torch.empty(8, 16, device=GPU, requires_grad=True)
        gelu(x).sum().backward()
    assert gpu.launches["forward"] == {"gelu_fwd_kernel": 1, "sum": 1, "ones_like": 1}
    assert gpu.launches["backward"]["gelu_bwd_kernel"] == 1


@pytest.mark.fast
def test_a_convolution_backward_counts_its_gradients() -> None:
    for needs_input in (False, True):
        with FakeGpu() as gpu:
            x = torch.empty(2, 3, 8, 8, device=GPU, requires_grad=needs_input)
            weight = torch.empty(4, 3, 3, 3, device=GPU, requires_grad=True)
            F.conv2d(x, weight).sum().backward()
        assert gpu.launches["backward"]["convolution_backward"] == 1 + needs_input


@pytest.mark.fast
def test_what_is_saved_counts_once_and_without_weights() -> None:
    with FakeGpu() as gpu:
        layer = torch.nn.Linear(16, 32, device="meta")
        gpu.place(layer)
        x = torch.empty(8, 16, device=GPU, requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16):
            out = layer(x)  # saves its input in 16 bits; the weight in 16 bits is no activation
            assert out.dtype == torch.bfloat16 and gpu.saved_bytes == 8 * 16 * 2
            out * out  # both factors are one storage
    assert gpu.saved_bytes == 8 * 16 * 2 + 8 * 32 * 2


@pytest.mark.parametrize("name", COMPARED)
def test_a_layer_saves_twenty_bytes_a_token_and_unit_of_width(name: str) -> None:
    """And two float32 statistics of each LayerNorm, and a log-sum-exp of each head."""
    row, config = committed("clipcore", name), create_model(name, device="meta").config

    def of_block(width: int, heads: int) -> float:
        return round(20 + 4 * (4 + heads) / width, 2)

    assert row["text_saved"] == of_block(config.text.width, config.text.heads)
    if not config.vision.is_resnet:
        assert row["image_saved"] == of_block(config.vision.width, config.vision.heads)


class Launched(FakeGpu):
    """Keeps the operators that launch something outside of clipcore's, with the dtype of their result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def _shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = super()._shapes(func, args, kwargs)
        self.dtypes = [x.dtype for x in tensors_in(out)]
        return out

    def _count(self, name: str, number: int) -> None:
        super()._count(name, number)
        if number and not self._num_open:
            # What torch's shapes of BatchNorm call.
            name = name.replace("_native_batch_norm_legit", "native_batch_norm")
            self.seen.append(f"{name} {self.dtypes[0]}")


@pytest.fixture(scope="module")
def under_torchs_autocast(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Return the operators by package and model, from a process whose CUDA has a guard that does nothing."""
    library = "none"
    if torch.version.cuda is None:
        library = str(tmp_path_factory.mktemp("guard") / "guard.so")
        torch_dir = Path(torch.__file__).parent
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        command = [*compiler, "-std=c++20", "-w", "-shared", "-fPIC", f"-I{torch_dir / 'include'}"]
        command += [str(PROGRAMS / "no_op_device_guard.cpp"), "-o", library]
        command += [f"-L{torch_dir / 'lib'}", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    command = [sys.executable, str(PROGRAMS / "operators_under_autocast.py"), library, *COMPARED]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", COMPARED)
def test_autocast_is_torchs_own(name: str, under_torchs_autocast: dict[str, list[str]]) -> None:
    """Towers and losses of both packages make the same operators, with results of the same dtypes."""
    for package, model, inputs, forward in of_models(name):
        with Launched() as gpu, torch.no_grad():
            gpu.place(model)
            placed = inputs(lambda x: x.to(GPU))
            gpu.seen.clear()
            with mock.patch.object(F, "scaled_dot_product_attention", attention):
                forward(*placed)
        found, expected = Counter(gpu.seen), Counter(under_torchs_autocast[f"{package} {name}"])
        assert found == expected, (package, found - expected, expected - found)
