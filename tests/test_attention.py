"""Packed attention: the public function, on every device."""

from __future__ import annotations

import pytest
import torch
from numerics import (
    DEVICES,
    KERNEL_DEVICE,
    assert_accurate,
    check,
    exactly,
    with_gradients,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from clipcore.data.packing import pack_captions
from clipcore.kernels import attention_torch
from clipcore.kernels.attention import attention, attention_ref
from clipcore.towers.factory import create_model

pytestmark = pytest.mark.fast

# (rows, tokens, heads, head size, kind); "packed" is causal with segments.
REAL = [
    (1, 50, 2, 64, "dense"),
    (1, 77, 2, 64, "causal"),
    (1, 128, 2, 64, "packed"),
    (1, 197, 2, 64, "dense"),
    (1, 257, 1, 80, "dense"),
]
ODD = [
    (2, 1, 1, 16, "dense"),
    (2, 5, 3, 8, "causal"),
    (1, 33, 2, 24, "packed"),
    (1, 129, 1, 72, "packed"),
    (1, 65, 1, 96, "causal"),
]
# The library's on a GPU.
LONG = [(1, 577, 2, 64, "dense")] if KERNEL_DEVICE == "cuda" else []


def problem(case: tuple, dtype: torch.dtype, device: str) -> tuple[Tensor, bool, Tensor | None]:
    """(projection, is_causal, segments); packed rows hold captions of 1 to 17 tokens and end in padding."""
    rows, length, heads, size, kind = case
    qkv = torch.randn(rows, length, 3, heads, size).to(device, dtype)
    segments = None
    if kind == "packed":
        captions = torch.repeat_interleave(torch.arange(99), torch.randint(1, 18, (99,)))
        segments = captions[:length].int().repeat(rows, 1).to(device)
        segments[:, length - length // 9 :] = -1
    return qkv, kind != "dense", segments


@pytest.mark.parametrize("case", [*REAL, *ODD, (2, 5, 2, 88, "dense"), *LONG], ids=str)
def test_attention(case: tuple) -> None:
    qkv, is_causal, segments = problem(case, torch.float32, "cpu")

    def on(device: torch.device) -> Tensor | None:
        return None if segments is None else segments.to(device)

    check(
        lambda x: attention(x, is_causal, on(x.device)),
        lambda x: attention_ref(x, is_causal, on(x.device)),
        [qkv],
    )


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for kind in ("dense", "packed"):
        qkv, is_causal, segments = problem((2, 30, 2, 16, kind), dtype, device)
        arguments = (qkv.requires_grad_(), is_causal, segments)
        torch.library.opcheck(torch.ops.clipcore.attention_forward, arguments)


def test_compiled_it_has_the_same_bits() -> None:
    qkv, _, segments = problem((2, 30, 2, 16, "packed"), torch.float32, "cpu")
    upstream = torch.randn(2, 30, 32)

    def twice(x: Tensor) -> Tensor:
        return attention(x * 2, True, segments)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        *(with_gradients(fn, [qkv], upstream) for fn in (twice, compiled)), strict=True
    ):
        assert torch.equal(a, b)


def test_wrong_arguments_are_refused() -> None:
    qkv = torch.zeros(2, 3, 3, 1, 8)
    with pytest.raises(ValueError, match=r"\[R, L, 3, H, K\], got \(2, 3, 4\)"):
        attention(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"int32 \[2, 3\], got torch.int64 \[2, 3\]"):
        attention(qkv, True, torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("length", "is_causal"), [(5, False), (40, False), (40, True)])
def test_any_strides_give_the_same(dtype: torch.dtype, length: int, is_causal: bool) -> None:
    """A projection whose heads lie side by side column by column, and one that is a view of another order of rows."""
    torch.manual_seed(0)
    for axes in ((3, 4), (0, 1)):
        shape = [2, length, 3, 4, 16]
        shape[axes[0]], shape[axes[1]] = shape[axes[1]], shape[axes[0]]
        strided = torch.randn(shape, dtype=dtype).transpose(*axes).requires_grad_()
        plain = strided.detach().contiguous().requires_grad_()
        outs = [attention(qkv, is_causal) for qkv in (strided, plain)]
        upstream = torch.randn_like(outs[1])
        for out in outs:
            out.backward(upstream)
        assert torch.equal(*outs)
        assert torch.equal(strided.grad, plain.grad)  # type: ignore[arg-type]


class SDPACalls(TorchDispatchMode):
    """Notes each call of torch's attention, and whether deterministic algorithms are asked for then."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, bool]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name or "efficient_attention" in name:
            self.seen.add((name, torch.are_deterministic_algorithms_enabled()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_torchs_kernel_on_a_gpu_is_flash_attention_and_deterministic(dtype, is_causal) -> None:
    """cuDNN's and the memory-efficient backward pass add up in any order, and cuDNN's gives NaN for some masks."""
    with FakeTensorMode(), torch.no_grad(), SDPACalls() as calls:
        for length, size in ((64, 40), (577, 64)):
            qkv = torch.empty(2, length, 3, 4, size, dtype=dtype, device="cuda")
            out, lse = attention_torch.forward(qkv, is_causal, None)
            attention_torch.backward(out, qkv, out, lse, is_causal, None)
    flash = "_scaled_dot_product_flash_attention"
    assert calls.seen == {(flash, False), (f"{flash}_backward", True)}
    assert not torch.are_deterministic_algorithms_enabled()


class OnGPU(Tensor):
    """A tensor of the CPU that takes the paths of a GPU's."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("kind", "size", "dtype"),
    [
        ("packed", 64, torch.float16),
        ("dense", 100, torch.float16),
        ("causal", 264, torch.float16),
        ("packed", 40, torch.float32),
        ("dense", 64, torch.float32),
        ("causal", 64, torch.float64),
    ],
)
def test_what_flash_attention_does_not_take_is_plain_products(
    kind, size, dtype, monkeypatch
) -> None:
    monkeypatch.setattr(attention_torch, "DENSE_BYTES", 2 * 2 * 30**2 * 4)  # some rows at a time
    qkv, is_causal, segments = problem((5, 30, 2, size, kind), dtype, "cpu")
    grad = torch.randn(5, 30, 2 * size, dtype=dtype)

    with SDPACalls() as calls:
        out, lse = attention_torch.forward(qkv.as_subclass(OnGPU), is_causal, segments)
        dqkv = attention_torch.backward(
            *(grad, qkv.as_subclass(OnGPU), out, lse), is_causal, segments
        )
    assert not calls.seen

    def reference(x: Tensor) -> Tensor:
        return attention_ref(x, is_causal, segments)

    exact, expected = (f(reference, [qkv], grad) for f in (exactly, with_gradients))
    for name, *values in zip(("output", "gradient"), (out, dqkv), expected, exact, strict=True):
        if dtype == torch.float64:
            assert (values[0] - values[1]).abs().max() <= 1e-12 * values[1].abs().max()
        else:
            assert_accurate(name, *values)


def test_the_towers_call_no_attention_of_torchs() -> None:
    """Not even for the one query of the last block: with one, cuDNN's backward pass may give NaN."""
    captions = torch.tensor([[1, 5, 9] + [0] * 61, [1, 9] + [0] * 62])
    for name in ("ViT-nano-8-32", "RN50"):
        model = create_model(name, force_image_size=32) if name == "RN50" else create_model(name)
        text = captions[:, : model.context_length]
        for tokens in (text, pack_captions(text)):
            with SDPACalls() as calls:
                image_BE, text_BE, _ = model(torch.zeros(2, 3, 32, 32), tokens)
                (image_BE.sum() + text_BE.sum()).backward()
            assert not calls.seen
