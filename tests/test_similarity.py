"""normalized_similarity: the reference, the Triton kernels, what they compile to, and the public function."""

from __future__ import annotations

import itertools

import pytest
import torch
from aot import assert_compiled_well, compiled
from numerics import (
    DEVICES,
    KERNEL_DEVICE,
    KERNEL_DTYPES,
    assert_accurate,
    exactly,
    ulp,
    with_gradients,
)
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels import similarity
from clipcore.kernels.normalize import MAX_WIDTH
from clipcore.kernels.similarity import normalized_similarity, similarity_ref

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# One row, odd sizes, widths of one element and of every CLIP model, tiles that end early in each direction.
SHAPES = [
    (1, 1, 8),
    (1, 70, 384),
    (33, 17, 1),
    (65, 129, 77),
    (130, 3, 512),
    (7, 200, 640),
    (66, 66, 768),
    (31, 5, 1024),
]
# The logit scale's gradient is one number: the rule compares its values under this many upstream gradients.
NUM_UPSTREAM = 8


def rows(N: int, D: int, dtype: torch.dtype, device: str = KERNEL_DEVICE) -> Tensor:
    """Random rows whose lengths differ by a factor of a hundred."""
    lengths_N1 = torch.logspace(-1, 1, N)[torch.randperm(N), None]
    return (torch.randn(N, D) * lengths_N1).to(device=device, dtype=dtype)


def problem(
    N: int, M: int, D: int, dtype: torch.dtype, device: str = KERNEL_DEVICE
) -> tuple[Tensor, Tensor, Tensor]:
    return rows(N, D, dtype, device), rows(M, D, dtype, device), torch.tensor(14.3, device=device)


# 1. The reference.


@pytest.mark.fast
def test_reference_is_the_scaled_product_of_normalized_rows() -> None:
    x, y, scale = problem(5, 7, 12, torch.float64, "cpu")
    expected = scale * F.normalize(x) @ F.normalize(y).T
    torch.testing.assert_close(similarity_ref(x, y, scale), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.fast
def test_gradients_match_finite_differences() -> None:
    x, y, _ = problem(4, 3, 6, torch.float64, "cpu")
    scale = torch.tensor([2.5], dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (x, y, scale)]
    assert torch.autograd.gradcheck(similarity_ref, inputs)
    assert torch.autograd.gradcheck(normalized_similarity, inputs)


# 2 and 4. The Triton kernels: in the interpreter, or on the GPU where there is one.


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(("N", "M", "D"), SHAPES)
def test_kernel_forward_is_accurate(N: int, M: int, D: int, dtype: torch.dtype) -> None:
    x, y, scale = problem(N, M, D, dtype)
    actual = similarity._similarity_fwd_triton(x, y, scale)
    exact = similarity_ref(x.double(), y.double(), scale.double())
    assert_accurate("S", actual, similarity_ref(x, y, scale), exact)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(("N", "M", "D"), SHAPES)
def test_kernel_gradients_are_accurate(N: int, M: int, D: int, dtype: torch.dtype) -> None:
    inputs = problem(N, M, D, dtype)
    upstreams = torch.randn(NUM_UPSTREAM, N, M).to(device=KERNEL_DEVICE, dtype=dtype)
    actual = list(similarity._similarity_bwd_triton(upstreams[0], *inputs, True, True))
    reference = with_gradients(similarity_ref, inputs, upstreams[0])[1:]
    exact = exactly(similarity_ref, inputs, upstreams[0])[1:]
    for upstream in upstreams[1:]:
        more = similarity._similarity_bwd_triton(upstream, *inputs, False, False)[2]
        actual[2] = torch.hstack((actual[2], more))
        reference[2] = torch.hstack(
            (reference[2], with_gradients(similarity_ref, inputs, upstream)[3])
        )
        exact[2] = torch.hstack((exact[2], exactly(similarity_ref, inputs, upstream)[3]))
    for name, *tensors in zip(("dx", "dy", "dscale"), actual, reference, exact, strict=True):
        assert_accurate(name, *tensors)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_kernel_reads_any_strides(dtype: torch.dtype) -> None:
    wide, tall = rows(20, 60, dtype), rows(24, 9, dtype)
    x, y, scale = wide[::2, 3:27], tall.T, torch.tensor(3.0, device=KERNEL_DEVICE)
    upstream = torch.randn(9, 10).to(x).T
    plain = x.clone(), y.contiguous(), scale
    assert torch.equal(
        similarity._similarity_fwd_triton(x, y, scale), similarity._similarity_fwd_triton(*plain)
    )
    strided = similarity._similarity_bwd_triton(upstream, x, y, scale, True, True)
    contiguous = similarity._similarity_bwd_triton(upstream.contiguous(), *plain, True, True)
    for actual, expected in zip(strided, contiguous, strict=True):
        torch.testing.assert_close(actual, expected)


def test_kernel_computes_only_the_gradients_asked_for() -> None:
    inputs = problem(9, 21, 40, torch.float32)
    upstream = torch.randn(9, 21, device=KERNEL_DEVICE)
    full = similarity._similarity_bwd_triton(upstream, *inputs, True, True)
    for need_x, need_y in itertools.product((False, True), repeat=2):
        dx, dy, dscale = similarity._similarity_bwd_triton(upstream, *inputs, need_x, need_y)
        assert not need_x or torch.equal(dx, full[0])
        assert torch.equal(dy, full[1]) if need_y else dy.numel() == 0
        torch.testing.assert_close(dscale, full[2])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_kernel_repeats_bit_for_bit(dtype: torch.dtype) -> None:
    inputs = problem(65, 129, 77, dtype)
    upstream = torch.randn(65, 129).to(inputs[0])
    first = similarity._similarity_bwd_triton(upstream, *inputs, True, True)
    for _ in range(2):
        again = similarity._similarity_bwd_triton(upstream, *inputs, True, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_kernel_gives_zero_rows_nothing(dtype: torch.dtype) -> None:
    x, y, scale = problem(6, 5, 12, dtype)
    x[2] = 0
    y[4] = 0
    upstream = torch.randn(6, 5).to(x)
    out = similarity._similarity_fwd_triton(x, y, scale)
    dx, dy, dscale = similarity._similarity_bwd_triton(upstream, x, y, scale, True, True)
    assert (out[2] == 0).all() and (out[:, 4] == 0).all() and (out != 0).sum() == 20
    assert (dx[2] == 0).all() and (dy[4] == 0).all()
    assert all(tensor.isfinite().all() for tensor in (dx, dy, dscale))


@pytest.mark.parametrize("device", ["cuda"] if KERNEL_DEVICE == "cuda" else [])
def test_kernel_reaches_past_two_to_the_31_elements(device: str) -> None:
    storage = torch.zeros(2**31 + 64, dtype=torch.float16, device=device)
    x = storage.as_strided((3, 16), (2**30 + 8, 1))
    x.copy_(rows(3, 16, torch.float16))
    y, scale = rows(5, 16, torch.float16), torch.tensor(2.0, device=device)
    assert torch.equal(
        normalized_similarity(x, y, scale), normalized_similarity(x.contiguous(), y, scale)
    )


# 3. Ahead of time.


def aot_launches() -> None:
    """Every row of the launch table, and the row kernels for a usual and the greatest width."""

    def problem(N: int, M: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        x, y = (torch.empty(rows, D, dtype=dtype, device="meta") for rows in (N, M))
        return x, y, torch.empty((), device="meta")

    for N, M, D, dtype in [
        (32768, 32768, 512, torch.bfloat16),
        (100, 1000, 77, torch.float16),
        (256, 1000, 512, torch.float32),
    ]:
        similarity._similarity_fwd_triton(*problem(N, M, D, dtype))
    for D, dtype in [(1024, torch.bfloat16), (MAX_WIDTH, torch.float32)]:
        upstream = torch.empty(64, 96, dtype=dtype, device="meta")
        similarity._similarity_bwd_triton(upstream, *problem(64, 96, D, dtype), True, True)


def test_ahead_of_time_without_spills_in_the_memory_there_is() -> None:
    assert_compiled_well(compiled("test_similarity"))


def test_ahead_of_time_every_launch_has_the_meant_instructions() -> None:
    kernels = [k for k in compiled("test_similarity") if k.name == "_similarity_fwd_kernel"]
    launched = {
        (
            k.architecture,
            *(k.constants[f"BLOCK_{axis}"] for axis in "NMD"),
            k.num_warps,
            k.num_stages,
        )
        for k in kernels
    }
    table = similarity._LAUNCH_TABLE.items()
    assert launched == {(architecture, *config) for (architecture, _), config in table}
    for kernel in kernels:
        assert (kernel.matrix_instructions > 0) == (kernel.operand != "fp32"), str(kernel)


# The public function.


@pytest.mark.fast
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_public_function_and_its_gradients_are_accurate(device: str, dtype: torch.dtype) -> None:
    inputs = problem(19, 23, 96, dtype, device)
    upstreams = torch.randn(NUM_UPSTREAM, 19, 23).to(device=device, dtype=dtype)
    columns = [
        [run(fn, inputs, upstream) for upstream in upstreams]
        for run, fn in [
            (with_gradients, normalized_similarity),
            (with_gradients, similarity_ref),
            (exactly, similarity_ref),
        ]
    ]
    for i, name in enumerate(("S", "dx", "dy", "dscale")):
        assert_accurate(
            name, *(torch.stack([result[i] for result in column]) for column in columns)
        )


@pytest.mark.parametrize("device", DEVICES)
def test_zero_and_short_rows_have_similarity_and_gradient_zero(device: str) -> None:
    x = torch.tensor([[0.0, 0.0], [1e-13, 0.0], [1e-11, 0.0]], device=device, requires_grad=True)
    y = torch.tensor([[3.0, 4.0]], device=device)
    out = normalized_similarity(x, y, 10.0)
    out.sum().backward()
    assert (out[:2] == 0).all() and abs(out[2].item() - 6) <= ulp(6, torch.float32)
    assert x.grad is not None
    assert (x.grad[:2] == 0).all() and x.grad[2, 1] > 1e11


@pytest.mark.parametrize("device", DEVICES)
def test_nan_rows_stay_nan_and_touch_no_other(device: str) -> None:
    x, y = rows(3, 4, torch.float32, device), rows(2, 4, torch.float32, device)
    x[1, 2] = torch.nan
    assert normalized_similarity(x, y, 1.0).isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("device", DEVICES)
def test_scale_is_a_number_or_one_element_with_a_gradient_of_its_shape(device: str) -> None:
    x, y, scale = problem(3, 4, 8, torch.float32, device)
    expected = normalized_similarity(x, y, scale)
    assert torch.equal(normalized_similarity(x, y, scale.item()), expected)
    one = scale.reshape(1).half().requires_grad_()
    normalized_similarity(x, y, one).sum().backward()
    assert one.grad is not None and one.grad.shape == (1,) and one.grad.dtype == torch.float16


@pytest.mark.parametrize("device", DEVICES)
def test_mixed_dtypes_are_promoted_and_gradients_keep_their_own(device: str) -> None:
    x = rows(3, 8, torch.float16, device).requires_grad_()
    y = rows(4, 8, torch.bfloat16, device).requires_grad_()
    out = normalized_similarity(x, y, 2.0)
    out.sum().backward()
    assert out.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == torch.float16
    assert y.grad is not None and y.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_give_no_similarities(device: str) -> None:
    x = torch.empty(0, 8, device=device, requires_grad=True)
    y = rows(4, 8, torch.float32, device).requires_grad_()
    out = normalized_similarity(x, y, 2.0)
    out.sum().backward()
    assert out.shape == (0, 4)
    assert y.grad is not None and (y.grad == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_takes_the_operands_to_its_dtype_and_leaves_the_scale(device: str) -> None:
    x, y, scale = problem(5, 6, 32, torch.float32, device)
    x.requires_grad_()
    scale.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        out = normalized_similarity(x, y, scale)
        compiled_out = torch.compile(normalized_similarity, backend="aot_eager")(x, y, scale)
    assert torch.equal(out, normalized_similarity(x.bfloat16(), y.bfloat16(), scale))
    assert torch.equal(out, compiled_out)
    out.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert scale.grad is not None and scale.grad.dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frozen", ["none", "y", "scale"])
def test_opcheck(device: str, frozen: str) -> None:
    x, y, scale = problem(5, 6, 16, torch.float32, device)
    x.requires_grad_()
    y.requires_grad_(frozen != "y")
    scale.requires_grad_(frozen != "scale")
    torch.library.opcheck(torch.ops.clipcore.similarity_fwd, (x, y, scale))
    transposed = [rows(16, N, torch.float32, device).T.requires_grad_() for N in (5, 6)]
    torch.library.opcheck(torch.ops.clipcore.similarity_fwd, (*transposed, scale))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph_with_equal_results(device: str) -> None:
    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return normalized_similarity(x, y, scale.exp()).logsumexp(1)

    inputs = problem(5, 6, 16, torch.float32, device)
    upstream = torch.randn(5, device=device)
    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = with_gradients(loss, inputs, upstream)
    actual = with_gradients(whole, inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("x", "y", "scale", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), 1.0, r"x \[2, 3\] and y \[2, 4\]"),
        (torch.ones(3), torch.ones(2, 3), 1.0, r"x \[3\]"),
        (torch.ones(2, 0), torch.ones(2, 0), 1.0, "D >= 1"),
        (torch.ones(2, 3).int(), torch.ones(2, 3), 1.0, "x has to be a floating-point tensor"),
        (torch.ones(2, 3), torch.ones(2, 3, device="meta"), 1.0, "move one of them"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2), r"got torch.float32 \[2\]"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(1, device="meta"), "on meta"),
    ],
)
def test_a_wrong_argument_is_named(x: Tensor, y: Tensor, scale: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalized_similarity(x, y, scale)
