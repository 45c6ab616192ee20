"""What a stash may take by default: of a GPU's free memory once a process, and what ``ClipLoss`` makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from clipcore.kernels.contrastive import budget, default_stash_bytes, plan
from clipcore.loss import ClipLoss, SigLipLoss

pytestmark = pytest.mark.fast

GPU = torch.device("cuda", 0)


class FakeGPU:
    """A GPU, in the place of torch.cuda, whose driver and allocator say so many bytes."""

    free = 130 * 2**30
    reserved, allocated = 12 * 2**30, 4 * 2**30
    asked = 0

    def is_available(self) -> bool:
        return True

    def memory_reserved(self, index: int) -> int:
        return self.reserved

    def memory_allocated(self, index: int) -> int:
        return self.allocated

    def mem_get_info(self, index: int) -> tuple[int, int]:
        self.asked += 1
        return self.free, 139 * 2**30


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    """Return a GPU without earlier decisions."""
    fake = FakeGPU()
    monkeypatch.setattr(budget, "torch", SimpleNamespace(cuda=fake))
    budget._gpu_stash_bytes.cache_clear()
    yield fake
    budget._gpu_stash_bytes.cache_clear()


def test_a_gpu_decides_once_by_its_free_memory(gpu: FakeGPU) -> None:
    """130 GiB are free and 8 more with torch's allocator: an eighth is 17, and 16 a power of two."""
    assert default_stash_bytes(GPU) == 2**34
    gpu.free = 2**30
    assert default_stash_bytes(GPU) == 2**34 and gpu.asked == 1
    budget._gpu_stash_bytes.cache_clear()
    assert default_stash_bytes(GPU) == 2**30 and gpu.asked == 2


def test_a_full_gpu_has_none(gpu: FakeGPU) -> None:
    gpu.free = gpu.reserved = gpu.allocated = 0
    assert default_stash_bytes(GPU) == 1


def test_the_cpu_and_a_gpu_that_is_not_there_have_a_gibibyte() -> None:
    assert default_stash_bytes(torch.device("cpu")) == 2**30
    if not torch.cuda.is_available():
        assert default_stash_bytes(GPU) == 2**30


def test_the_compiler_takes_it_for_a_constant(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot look into a driver, and one graph has to be possible. The seconds are its import."""

    def reserved(index: int) -> int:
        torch._dynamo.graph_break()
        return gpu.reserved

    monkeypatch.setattr(gpu, "memory_reserved", reserved)

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if default_stash_bytes(GPU) == 2**34 else x

    assert torch.compile(doubled, fullgraph=True, backend="eager")(torch.ones(3)).sum() == 6
    assert gpu.asked == 1


def features(num_rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two sides on a GPU, without memory."""
    image, text = (torch.empty(num_rows, width, dtype=dtype, device="cuda") for _ in range(2))
    return image, text


def test_the_plan_is_by_the_default_of_the_device(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        assert plan(*features(2**16, 512, torch.bfloat16)).stash  # 8 GiB
        assert not plan(*features(2**17, 512, torch.bfloat16)).stash
        assert not plan(*features(2**10, 512, torch.float32)).stash
    assert not ClipLoss(stash_bytes=5).plan(torch.ones(2, 4), torch.ones(2, 4)).stash


def test_a_training_passes_its_decision_on() -> None:
    """A run that goes on in another process has to have the same bits."""
    loss_fn = ClipLoss()
    assert loss_fn.stash_bytes is None
    loss_fn.stash_bytes = 0
    assert loss_fn.options.stash_bytes == 0
    assert not loss_fn.plan(torch.ones(2, 4), torch.ones(2, 4)).stash


@pytest.mark.parametrize("loss", [ClipLoss, SigLipLoss])
def test_memory_counts_the_operands_and_sums_of_texts(
    loss: type[ClipLoss | SigLipLoss],
) -> None:
    """2 bytes a number for operands of another dtype, unless the workspace is small, and 4 for the sum of 16-bit gradients.

    Over ranks the texts of the others come in float32, whose gradients are their own sums.
    """
    B, E = 65536, 512

    def beside_block(dtype: torch.dtype, world_size: int = 1, **keywords: object) -> int:
        with FakeTensorMode():
            options = loss(world_size=world_size, **keywords).options
            taken = options.workspace(*features(B, E, dtype), world_size)
        block_bytes = keywords.get("workspace_bytes", 512 * 10**6)
        return taken - block_bytes - 12 * 8 * B * (1 + world_size)

    assert beside_block(torch.bfloat16) == (2 + 4) * B * E
    assert beside_block(torch.bfloat16, operand_dtype=torch.bfloat16) == 4 * B * E
    assert beside_block(torch.float32) == 0
    assert beside_block(torch.float32, operand_dtype=torch.float16) == 2 * B * E
    assert beside_block(torch.bfloat16, workspace_bytes=10**8) == 4 * B * E
    assert beside_block(torch.bfloat16, world_size=2) == (2 * 4 + 2) * 2 * B * E


@pytest.mark.parametrize(
    ("dtype", "logit_bytes", "operand_bytes"), [(torch.bfloat16, 6, 2), (torch.float32, 4, 4)]
)
def test_memory_counts_all_of_a_problem_of_one_block(
    dtype: torch.dtype, logit_bytes: int, operand_bytes: int
) -> None:
    """As the walk counts it: products and 16-bit gradients, operands, and the sum of the rows' gradients."""
    B, E = 2048, 1024
    with FakeTensorMode():
        taken = ClipLoss().options.workspace(*features(B, E, dtype), 1)
    texts = (2 + 4) * B * E if dtype == torch.bfloat16 else 0
    block = logit_bytes * B * B + operand_bytes * 2 * B * E + 4 * B * E
    assert taken == block + 12 * 8 * 2 * B + texts
