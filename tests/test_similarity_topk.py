"""similarity_topk: the kernel under the interpreter or on a GPU, its compiled form, the CPU's stream, the order."""

from __future__ import annotations

import pytest
import torch
from aot import assert_compiled_well, compiled
from numerics import DEVICES, KERNEL_DEVICE, KERNEL_DTYPES, LargestStorage, assert_accurate
from torch import Tensor

from clipcore.kernels import similarity_topk as topk_file
from clipcore.kernels.similarity_topk import (
    _similarity_topk_cpu,
    _similarity_topk_triton,
    similarity_topk,
    similarity_topk_ref,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = [
    (1, 1, 1, 1),
    (1, 7, 8, 3),
    (3, 200, 8, 5),
    (17, 130, 384, 10),
    (33, 65, 512, 1),
    (5, 300, 640, 64),
]
WIDE_SHAPES = [(2, 129, 768, 7), (16, 64, 1024, 16)]


def rows(N: int, D: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * N + D + seed)
    return torch.randn(N, D, generator=generator, dtype=torch.float64).to(device, dtype)


def coarse(N: int, D: int, device: str = "cpu") -> Tensor:
    """Rows of few distinct directions, exactly representable: ties everywhere."""
    generator = torch.Generator().manual_seed(N)
    signs = torch.randint(0, 2, (N, 1), generator=generator) * 2.0 - 1
    axes = torch.nn.functional.one_hot(torch.randint(0, 3, (N,), generator=generator), D)
    return (signs * axes * 2.0).to(device)


def check_result(values: Tensor, indices: Tensor, x: Tensor, y: Tensor, k: int) -> None:
    """Values by the rule of accuracy; the indices are distinct, sorted by the values, and of those values."""
    exact = similarity_topk_ref(x.double(), y.double(), k)[0]
    reference = similarity_topk_ref(x, y, k)[0]
    if values.dtype == torch.float64:
        # The reference is exact here, and another order of sums differs by some units in the last place.
        assert (values - exact).abs().max() <= 1e-12
    else:
        assert_accurate("values", values, reference, exact)
    assert indices.dtype == torch.int64 and ((indices >= 0) & (indices < len(y))).all()
    assert all(len(set(row)) == k for row in indices.tolist())
    assert (values.float().diff(dim=1) <= 0).all()
    if values.dtype == torch.float64:
        return
    cosine = (
        torch.nn.functional.normalize(x.double(), dim=1)
        @ torch.nn.functional.normalize(y.double(), dim=1).T
    )
    assert_accurate("values at the indices", values, reference, cosine.gather(1, indices))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(("N", "M", "D", "k"), SHAPES + WIDE_SHAPES)
def test_kernel_finds_the_nearest(N: int, M: int, D: int, k: int, dtype: torch.dtype) -> None:
    x, y = rows(N, D, dtype, KERNEL_DEVICE), rows(M, D, dtype, KERNEL_DEVICE, seed=1)
    check_result(*_similarity_topk_triton(x, y, k), x, y, k)


@pytest.mark.fast
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize(("N", "M", "D", "k"), SHAPES)
def test_stream_finds_the_nearest(
    N: int, M: int, D: int, k: int, dtype: torch.dtype, monkeypatch
) -> None:
    monkeypatch.setattr(topk_file, "CHUNK_N", 7)
    monkeypatch.setattr(topk_file, "CHUNK_M", 32)
    x, y = rows(N, D, dtype), rows(M, D, dtype, seed=1)
    check_result(*_similarity_topk_cpu(x, y, k), x, y, k)


@pytest.mark.parametrize("k", [1, 3, 16, 100])
def test_equals_come_by_lower_index(k: int, monkeypatch) -> None:
    """Against a stable sort, on rows whose similarities are exactly -1, 0 or 1, in kernel and stream."""
    x, y = coarse(9, 8, KERNEL_DEVICE), coarse(100, 8, KERNEL_DEVICE)
    expected = similarity_topk_ref(x, y, k)
    got = _similarity_topk_triton(x, y, k)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    monkeypatch.setattr(topk_file, "CHUNK_M", 13)
    streamed = _similarity_topk_cpu(x.cpu(), y.cpu(), k)
    assert torch.equal(streamed[0], expected[0].cpu()) and torch.equal(
        streamed[1], expected[1].cpu()
    )


@pytest.mark.fast
def test_identical_rows_come_in_order() -> None:
    x, y = torch.ones(2, 4, device=KERNEL_DEVICE), torch.ones(300, 4, device=KERNEL_DEVICE)
    for find in (_similarity_topk_triton, similarity_topk):
        assert find(x, y, 5)[1].tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.fast
@pytest.mark.parametrize("device", DEVICES)
def test_zero_rows_have_similarity_zero(device: str) -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0]], device=device)
    y = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [2.0, 0.0]], device=device)
    values, indices = similarity_topk(x, y, 3)
    assert values.tolist() == [[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]
    assert indices.tolist() == [[2, 1, 0], [0, 1, 2]]


def test_nan_ranks_above_every_number() -> None:
    x = torch.randn(2, 4, device=KERNEL_DEVICE)
    y = torch.randn(5, 4, device=KERNEL_DEVICE)
    y[3] = torch.nan
    for find in (_similarity_topk_triton, similarity_topk):
        values, indices = find(x, y, 2)
        assert values[:, 0].isnan().all() and indices[:, 0].tolist() == [3, 3]
        assert values[:, 1].isfinite().all()


def test_kernel_repeats_bit_for_bit_and_reads_any_strides() -> None:
    x, y = (
        rows(20, 96, torch.float32, KERNEL_DEVICE),
        rows(150, 96, torch.float32, KERNEL_DEVICE, seed=1),
    )
    first = _similarity_topk_triton(x, y, 6)
    strided = _similarity_topk_triton(x.T.contiguous().T, torch.cat([y, y], 1)[:, :96], 6)
    for again in (_similarity_topk_triton(x, y, 6), strided):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_stream_never_holds_the_matrix() -> None:
    """The largest tensor is a chunk, at 2,000 x 50,000."""
    x, y = torch.randn(2000, 16), torch.randn(50_000, 16)
    with LargestStorage() as largest:
        _similarity_topk_cpu(x, y, 5)
    assert largest.bytes <= topk_file.CHUNK_N * topk_file.CHUNK_M * 4 < 2000 * 50_000 * 4


def aot_launches() -> None:
    """Every row of the launch table, by the launcher itself."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for N, M, k in (
            (4096, 50_000, 10),
            (4096, 50_000, 64),
            (8, 50_000, 10),
            (4096, 50_000, 128),
        ):
            x, y = (torch.empty(n, 512, dtype=dtype, device="meta") for n in (N, M))
            _similarity_topk_triton(x, y, k)


def test_ahead_of_time_without_spills_in_the_memory_there_is() -> None:
    assert_compiled_well(compiled("test_similarity_topk"))


def test_ahead_of_time_every_row_of_the_table_is_launched_and_large_tiles_use_the_matrix_unit() -> (
    None
):
    kernels = [k for k in compiled("test_similarity_topk") if k.name == "_similarity_topk_kernel"]
    launched = {
        (
            k.architecture,
            *(k.constants[f"BLOCK_{axis}"] for axis in "NMD"),
            k.num_warps,
            k.num_stages,
        )
        for k in kernels
    }
    assert launched == {(arch, *row) for (arch, _), row in topk_file._LAUNCH_TABLE.items()}
    for kernel in kernels:
        if kernel.operand != "fp32" and kernel.constants["BLOCK_N"] >= 64:
            assert kernel.matrix_instructions > 0, str(kernel)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    x, y = rows(5, 16, torch.float32, device), rows(9, 16, torch.float32, device, seed=1)
    torch.library.opcheck(torch.ops.clipcore.similarity_topk.default, (x, y, 3))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph_and_has_no_gradient(device: str) -> None:
    x = rows(6, 16, torch.float32, device).requires_grad_()
    y = rows(40, 16, torch.float32, device, seed=1)
    compiled_topk = torch.compile(
        lambda a, b: similarity_topk(a, b, 4), fullgraph=True, backend="aot_eager"
    )
    for got, expected in zip(compiled_topk(x, y), similarity_topk(x, y, 4), strict=True):
        assert torch.equal(got, expected) and not got.requires_grad


@pytest.mark.fast
@pytest.mark.parametrize(
    ("x", "y", "k", "message"),
    [
        ((3, 4), (5, 4), 6, "between 1 and the 5 rows"),
        ((3, 4), (5, 4), 0, "between 1 and"),
        ((3, 4), (5, 3), 1, r"got x \[3, 4\] and y \[5, 3\]"),
        ((4,), (5, 4), 1, r"got x \[4\]"),
    ],
)
def test_a_wrong_argument_is_named(x, y, k, message) -> None:
    with pytest.raises(ValueError, match=message):
        similarity_topk(torch.ones(x), torch.ones(y), k)
