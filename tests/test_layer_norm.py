"""LayerNorm and its passes: the references, both devices' paths against them, determinism, one differentiation."""

from __future__ import annotations

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
from torch.utils.checkpoint import checkpoint

from clipcore.kernels import launch
from clipcore.kernels import layer_norm as norm
from clipcore.kernels.embed_layer_norm import embed_layer_norm, embed_layer_norm_ref
from clipcore.kernels.layer_norm import layer_norm, layer_norm_ref
from clipcore.kernels.layer_norm_triton import MAX_WIDTH, backward_triton, forward_triton

EPS = 1e-5
ALL_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("stream", "y", "dx", "dweight", "dbias", "dx_sum")
# One row; ragged and whole columns; every entry of the launch table; with the processors below, several blocks a program.
SHAPES = [(1, 1), (31, 2), (5, 96), (70, 16), (9, 640), (7, 768), (3, 896), (5, 1280), (3, 1408)]


def rows(N: int, D: int, dtype: torch.dtype, device: str = KERNEL_DEVICE) -> Tensor:
    return (0.5 + torch.randn(N, D)).to(device, dtype)


def gains(D: int, device: str = KERNEL_DEVICE) -> tuple[Tensor, Tensor]:
    """float32 whatever the rows are, as a model under autocast has them."""
    return (1 + 0.1 * torch.randn(D)).to(device), torch.randn(D).to(device)


def embedding(B: int, P: int, D: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Patches, class token, positions, weight, bias."""
    position = torch.randn(P + 1, D, device=device)
    patches = torch.randn(B, P, D, device=device).to(dtype)
    return [patches, torch.randn(D, device=device), position, *gains(D, device)]


def by_autograd(stream: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, dstream: Tensor):
    """Return the reference's results from a stream that is already rounded."""
    leaves = [t.detach().requires_grad_() for t in (stream, weight, bias)]
    y = layer_norm_ref(*leaves, EPS)
    grads = torch.autograd.grad((y, leaves[0]), leaves, (dy.to(y.dtype), dstream.to(y.dtype)))
    return [stream, y.detach(), *grads, grads[0].sum(0)]


def assert_passes_accurate(found: list[Tensor], x: Tensor, delta: Tensor, *rest: Tensor) -> None:
    """Check the rule for the stream, and for everything that follows from the rounded stream."""
    stream = found[0]
    assert_accurate("stream", stream, x + delta, x.double() + delta.double())
    exact = by_autograd(*(t.double() for t in (stream, *rest)))
    for name, got, reference, value in zip(
        NAMES, found, by_autograd(stream, *rest), exact, strict=True
    ):
        assert_accurate(name, got, reference.to(got.dtype), value)


def problem(N: int, D: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """x, delta, weight, bias, dy, dstream."""
    x, delta, dy, dstream = (rows(N, D, dtype, device) for _ in range(4))
    return x, delta, *gains(D, device), dy, dstream


# 1. The reference.


@pytest.mark.fast
def test_reference_is_torchs_own() -> None:
    x, weight, bias = torch.randn(4, 9, dtype=torch.float64), torch.randn(9), torch.randn(9)
    expected = torch.nn.functional.layer_norm(x, (9,), weight.double(), bias.double(), 1e-3)
    torch.testing.assert_close(
        layer_norm_ref(x, weight, bias, 1e-3), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.fast
def test_finite_differences() -> None:
    inputs = [t.double().requires_grad_() for t in (torch.randn(2, 3, 5), *gains(5, "cpu"))]
    assert torch.autograd.gradcheck(layer_norm, inputs)
    inputs = [t.double().requires_grad_() for t in embedding(3, 2, 5, torch.float64, "cpu")]
    assert torch.autograd.gradcheck(embed_layer_norm, inputs)


# 2. The kernels.


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(("N", "D"), SHAPES)
def test_kernels_are_accurate(
    N: int, D: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    """Forward with a sum before, backward with a gradient and a sum beside; both twice with the same bits."""
    monkeypatch.setattr(launch, "NUM_PROCESSORS", dict.fromkeys(launch.NUM_PROCESSORS, 2))
    x, delta, weight, bias, dy, dstream = problem(N, D, dtype, KERNEL_DEVICE)

    def passes() -> list[Tensor]:
        stream, y, mean, rstd = forward_triton(x, weight, bias, EPS, delta_ND=delta)
        grads = backward_triton(
            *(dy, stream, mean, rstd, weight), dstream_ND=dstream, want_column_sum=True
        )
        return [stream, y, *(t.reshape(-1) if i == 3 else t for i, t in enumerate(grads))]

    found = passes()
    assert all(torch.equal(a, b) for a, b in zip(found, passes(), strict=True))
    assert_passes_accurate(found, x, delta, weight, bias, dy, dstream)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_kernel_modes_have_the_same_bits(dtype: torch.dtype, poisoned_memory: None) -> None:
    """A sum before or not, statistics taken or read; dstream of zeros or none; with a column sum or without."""
    x, delta, weight, bias, dy, _ = problem(11, 768, dtype, KERNEL_DEVICE)
    stream, y, mean, rstd = forward_triton(x, weight, bias, EPS, delta_ND=delta)
    _, *plain = forward_triton(stream, weight, bias, EPS)
    assert all(torch.equal(a, b) for a, b in zip(plain, (y, mean, rstd), strict=True))
    _, again, *_ = forward_triton(stream, weight, bias, EPS, statistics=(mean, rstd))
    assert torch.equal(again, y)
    arguments = dy, stream, mean, rstd, weight
    *expected, no_sum = backward_triton(*arguments)
    *found, _ = backward_triton(*arguments, dstream_ND=torch.zeros_like(x), want_column_sum=True)
    assert no_sum.numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(("B", "P", "D"), [(1, 1, 16), (9, 3, 80), (3, 16, 768)])
def test_embedding_kernels_are_accurate(
    B: int, P: int, D: int, dtype: torch.dtype, poisoned_memory: None
) -> None:
    inputs = embedding(B, P, D, dtype, KERNEL_DEVICE)
    patches, *tokens, weight, bias = inputs
    dy = torch.randn(B, P + 1, D).to(KERNEL_DEVICE, dtype)
    _, y, mean, rstd = forward_triton(patches, weight, bias, EPS, tokens=tokens)
    dpatches, dweight, dbias, dposition = backward_triton(
        *(dy, patches, mean, rstd, weight), tokens=tokens, want_column_sum=True
    )
    found = [y, dpatches, dposition[0], dposition, dweight, dbias]
    # The tokens round as in the definition, whose exact value is therefore that of rounded tokens.
    rounded = [patches, *(t.to(dtype) for t in tokens), weight, bias]
    stream = torch.cat([rounded[1].expand(B, 1, D), patches], 1) + rounded[2]
    reference = with_gradients(embed_layer_norm_ref, inputs, dy)
    exact = exactly(layer_norm_ref, [stream, weight, bias], dy)
    exact_grads = [exact[1][:, 1:], exact[1][:, 0].sum(0), exact[1].sum(0), *exact[2:]]
    for name, got, same_dtype, value in zip(
        ("y", "dpatches", "dclass", "dposition", "dweight", "dbias"),
        found,
        reference,
        [exact[0], *exact_grads],
        strict=True,
    ):
        assert_accurate(name, got, same_dtype, value)


@pytest.mark.parametrize("device", ["cuda"] if KERNEL_DEVICE == "cuda" else [])
def test_kernels_reach_past_two_to_the_31_elements(device: str) -> None:
    N, D = 2**31 // 768 + 9, 768
    x, (weight, bias) = torch.ones(N, D, dtype=torch.bfloat16, device=device), gains(D)
    x[-1] = rows(1, D, torch.bfloat16)
    _, y, mean, rstd = forward_triton(x, weight, bias, EPS)
    _, last, *_ = forward_triton(x[-1:], weight, bias, EPS)
    assert torch.equal(y[-1:], last)
    dx, *_ = backward_triton(y, x, mean, rstd, weight)
    expected, *_ = backward_triton(y[-1:], x[-1:], mean[-1:], rstd[-1:], weight)
    assert torch.equal(dx[-1:], expected)


# 3. Ahead of time.


def aot_launches() -> None:
    """Every entry of the launch table at the widest rows it has in CLIP, in the pass that needs most registers."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for D in (512, 896, 1024, 1408, 2048):
        x, weight, mean = empty(5000, D, dtype=torch.bfloat16), empty(D), empty(5000)
        forward_triton(x, weight, weight, EPS, delta_ND=x)
        backward_triton(x, x, mean, mean, weight, dstream_ND=x, want_column_sum=True)
    patches, weight, mean = empty(100, 50, 768, dtype=torch.bfloat16), empty(768), empty(5100)
    tokens = weight, empty(51, 768)
    forward_triton(patches, weight, weight, EPS, tokens=tokens)
    dy = empty(100, 51, 768, dtype=torch.bfloat16)
    backward_triton(dy, patches, mean, mean, weight, tokens=tokens, want_column_sum=True)


def test_ahead_of_time_without_spills_in_the_memory_there_is() -> None:
    assert_compiled_well(compiled("test_layer_norm"))


# The passes and public functions.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, *ALL_DTYPES], ids=str)
@pytest.mark.parametrize(("N", "D"), [(1, 8), (2000, 96), (33, 768)])
def test_passes_are_accurate(
    N: int, D: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU torch's own float32 passes, whose order of summation is theirs, have float64 held to the reference."""
    monkeypatch.setattr(launch, "STRIP_ELEMENTS", 300 * D)
    x, delta, weight, bias, dy, dstream = problem(N, D, dtype, device)
    stream, y, mean, rstd = norm.add_layer_norm_forward(x, delta, weight, bias, EPS)
    grads = norm.layer_norm_backward(dy, stream, mean, rstd, weight, dstream, True)
    found = [stream, y, *grads]
    again = norm.layer_norm_apply(stream, mean, rstd, weight, bias, EPS)
    assert torch.equal(again, y) or device == "cuda"
    assert (again - y).abs().max() <= 2 * ulp(y.abs().max().item(), dtype)
    alone = norm.layer_norm_backward(dy, stream, mean, rstd, weight, None, False)
    assert alone[3].numel() == 0 and torch.equal(alone[1], grads[1])
    if dtype.itemsize == 2 or (device == "cuda" and dtype == torch.float32):
        assert_passes_accurate(found, x, delta, weight, bias, dy, dstream)
        return
    exact = by_autograd(*(t.double() for t in (stream, weight, bias, dy, dstream)))
    for got, value in zip(found, exact, strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert (got - value).abs().max() <= tolerance * max(1.0, value.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_many_16_bit_rows_are_summed_in_float32(dtype: torch.dtype) -> None:
    """torch's own sum of these is off by a third."""
    x, weight = rows(6400, 64, dtype, "cpu"), torch.ones(64)
    dy = rows(6400, 64, dtype, "cpu")
    _, _, *found = with_gradients(layer_norm, [x, weight, weight], dy)
    _, _, *exact = exactly(layer_norm_ref, [x, weight, weight], dy)
    for got, value in zip(found, exact, strict=True):
        assert (got - value).abs().max() <= 1e-5 * value.abs().max()


@pytest.mark.fast
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_public_functions_and_their_gradients_are_accurate(dtype: torch.dtype, device: str) -> None:
    x, (weight, bias) = torch.randn(3, 5, 96).to(device, dtype), gains(96, device)
    strided = x.transpose(0, 1)
    upstream = torch.randn(5, 3, 96).to(device, dtype)
    inputs = strided, weight, bias.to(dtype)
    found, reference = (with_gradients(f, inputs, upstream) for f in (layer_norm, layer_norm_ref))
    exact = exactly(layer_norm_ref, inputs, upstream)
    for i, values in enumerate(zip(found, reference, exact, strict=True)):
        assert_accurate(f"tensor {i}", *values)
    # With tokens that are 16-bit already, as no rounding separates the reference from its exact value.
    inputs = [t.to(dtype) for t in embedding(4, 6, 96, dtype, device)]
    upstream = torch.randn(4, 7, 96).to(device, dtype)
    found, reference = (
        with_gradients(f, inputs, upstream) for f in (embed_layer_norm, embed_layer_norm_ref)
    )
    exact = exactly(embed_layer_norm_ref, inputs, upstream)
    for i, values in enumerate(zip(found, reference, exact, strict=True)):
        assert_accurate(f"embedding's tensor {i}", *values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_has_float32_statistics_and_gains(dtype: torch.dtype, device: str) -> None:
    """Low-precision rows with float32 gain and bias, as under autocast: one rounding, that of the result."""
    x = (100 + torch.randn(4, 256)).to(device, dtype)
    weight, bias = gains(256, device)
    got = layer_norm(x, weight, bias)
    exact = layer_norm_ref(x.double(), weight.double(), bias.double())
    assert_accurate("output", got, exact.to(dtype), exact)
    with torch.autocast(device, dtype):
        assert torch.equal(layer_norm(x, weight, bias), got)
        assert layer_norm(x.float(), weight, bias).dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device: str, dtype: torch.dtype) -> None:
    x, delta, weight, bias, dy, dstream = problem(5, 32, dtype, device)
    ops = torch.ops.clipcore
    x.requires_grad_()
    weight.requires_grad_()
    torch.library.opcheck(ops.layer_norm_forward, (x, weight, bias, EPS))
    x, weight = x.detach(), weight.detach()
    stream, _, mean, rstd = ops.add_layer_norm_forward(x, delta, weight, bias, EPS)
    torch.library.opcheck(ops.add_layer_norm_forward, (x, delta, weight, bias, EPS))
    torch.library.opcheck(ops.layer_norm_apply, (stream, mean, rstd, weight, bias, EPS))
    for last in ((dstream, True), (None, False)):
        torch.library.opcheck(ops.layer_norm_backward, (dy, stream, mean, rstd, weight, *last))
    inputs = [t.requires_grad_() for t in embedding(3, 4, 32, dtype, device)]
    torch.library.opcheck(ops.embed_layer_norm_forward, (*inputs, EPS))
    *inputs, bias = [t.detach() for t in inputs]
    y, mean, rstd = ops.embed_layer_norm_forward(*inputs, bias, EPS)
    *inputs, weight = inputs
    torch.library.opcheck(ops.embed_layer_norm_backward, (y, *inputs, mean, rstd, weight))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph_with_equal_results(device: str) -> None:
    inputs = embedding(3, 4, 32, torch.float32, device)

    def both(patches: Tensor, *rest: Tensor) -> Tensor:
        return layer_norm(embed_layer_norm(patches, *rest), *rest[-2:]).sin()

    upstream = torch.randn(3, 5, 32, device=device)
    whole = torch.compile(both, fullgraph=True, backend="aot_eager")
    expected, found = (with_gradients(f, inputs, upstream) for f in (both, whole))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_activation_checkpointing_gives_the_same_bits(device: str) -> None:
    inputs = embedding(3, 4, 32, torch.float32, device)
    dy = torch.randn(3, 5, 32, device=device)

    def both(*x: Tensor) -> Tensor:
        return layer_norm(embed_layer_norm(*x), *x[-2:])

    def replayed(*x: Tensor) -> Tensor:
        return checkpoint(both, *x, use_reentrant=False)

    expected, found = (with_gradients(f, inputs, dy) for f in (both, replayed))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_and_one_vector(device: str) -> None:
    weight, bias = gains(8, device)
    empty = torch.ones(0, 3, 8, device=device)
    nothing = with_gradients(layer_norm, [empty, weight, bias], empty)
    assert nothing[0].shape == (0, 3, 8) and nothing[2].count_nonzero() == 0
    vector = torch.randn(8, device=device)
    assert torch.equal(layer_norm(vector, weight, bias), layer_norm(vector[None], weight, bias)[0])
    sums = norm.layer_norm_backward(
        *(torch.ones(0, 8, device=device), torch.ones(0, 8, device=device)),
        *(torch.ones(0, device=device), torch.ones(0, device=device), weight, None, True),
    )
    assert all(t.shape == (8,) and t.count_nonzero() == 0 for t in sums[1:])


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_row(device: str) -> None:
    x, (weight, bias) = torch.randn(5, 96, device=device), gains(96, device)
    x[3, 7] = torch.nan
    assert layer_norm(x, weight, bias).isnan().any(1).tolist() == [False] * 3 + [True, False]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer_norm(torch.ones(2, 4), torch.ones(3), torch.ones(4)), r"must be \[4\]"),
        (lambda: layer_norm(torch.ones(2, 4), torch.ones(4), torch.ones(2, 4)), r"must be \[4\]"),
        (
            lambda: embed_layer_norm(torch.ones(2, 3, 4), *(torch.ones(4),) * 4),
            r"position \[P \+ 1, D\], got \(2, 3, 4\)",
        ),
    ],
)
def test_a_wrong_argument_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("device", ["cuda"] if KERNEL_DEVICE == "cuda" else [])
def test_a_gpu_refuses_what_its_kernels_lack(device: str) -> None:
    gain = torch.ones(MAX_WIDTH + 1, device=device)
    with pytest.raises(ValueError, match="wider than"):
        layer_norm(gain, gain, gain)
