"""AdamW's pass: against torch's, the kernel against the reference, the random bits, the mean of what is rounded."""

from __future__ import annotations

import pytest
import torch
from aot import assert_compiled_well, compiled
from numerics import DEVICES, KERNEL_DEVICE, assert_accurate
from torch import Tensor

from clipcore import native
from clipcore.kernels.adamw import (
    CHUNK,
    MOMENTS,
    WEIGHTS,
    Factors,
    Update,
    adamw_,
    adamw_all_,
    adamw_all_triton,
    adamw_ref,
    random_words,
    round_stochastically,
)

FP32, BF16 = torch.float32, torch.bfloat16
SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.2, "step": 7}
SEED = 2**63 + 12345  # more than a signed word holds
# Elements and where they begin: one, odd ones, a chunk, an aligned part, parts that begin within a chunk.
PLACES = [
    (1, 0),
    (777, 0),
    (CHUNK, 0),
    (5008, 4096 - 32),
    (3001, 3 * CHUNK + 5),
    (2 * CHUNK + 1, 7),
]


def tensors(
    numel: int, param: torch.dtype, grad: torch.dtype, moments: torch.dtype
) -> list[Tensor]:
    """Parameter, gradient and moments as in the middle of a run; some gradients are 0."""
    g = torch.randn(numel) * torch.randn(numel).exp()
    g[::5] = 0
    p, m, v = torch.randn(numel), 0.1 * torch.randn(numel), 0.1 * torch.rand(numel)
    v[::10], m[::10] = 0, 0
    return [p.to(param), g.to(grad), m.to(moments), v.to(moments)]


def updated(
    engine: str, parts: list[Tensor], shadow: Tensor | None, scale: Tensor, **place: int
) -> list[Tensor]:
    """Return the new parameter and moments, and the shadow."""
    device = KERNEL_DEVICE if engine == "kernel" else "cpu"
    moved = [None if t is None else t.clone().to(device) for t in (*parts, shadow)]
    update = Update(*moved, **place)
    if engine == "kernel":
        factors = Factors.of(**SETTINGS)
        adamw_all_triton([update], factors, SETTINGS["step"], scale.to(device), SEED)
    else:
        adamw_all_([update], **SETTINGS, grad_scale=scale, seed=SEED)
    return [t.cpu() for t in (moved[0], *moved[2:]) if t is not None]


# 1. The reference.


@pytest.mark.parametrize("wd", [0.0, 0.2])
def test_reference_is_torchs_adamw(wd: float) -> None:
    param, *_ = tensors(1000, torch.float64, FP32, FP32)
    theirs = param.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=wd)
    m = v = torch.zeros_like(param)
    for step in range(1, 6):
        grad = torch.randn_like(param)
        theirs.grad = 0.3 * grad
        optimizer.step()
        settings = {**SETTINGS, "weight_decay": wd, "step": step}
        param, m, v = adamw_ref(param, grad, m, v, grad_scale=torch.tensor(0.3), **settings)
        torch.testing.assert_close(param, theirs.detach(), rtol=1e-7, atol=1e-9)
    exact = torch.tensor(0.3).double()
    assert exact != 0.3  # of the scale, a float32 number, hence the tolerance


def test_philox_has_the_published_answers() -> None:
    """Of seven rounds, from the reference implementation's known-answer tests (Random123, kat_vectors)."""
    words = random_words(0, 0, 0, 0, CHUNK)
    lanes = CHUNK // 4
    assert [int(w) & 0xFFFFFFFF for w in words[::lanes]] == [
        0x5F6FB709,
        0x0D893F64,
        0x4F121F81,
        0x4F730A48,
    ]


def test_random_words_are_known_by_their_place() -> None:
    whole = random_words(SEED, 3, 5, 0, 3 * CHUNK)
    for first, count in [(0, 1), (5, 100), (CHUNK - 1, 2), (CHUNK, CHUNK), (4000, 5000)]:
        assert torch.equal(random_words(SEED, 3, 5, first, count), whole[first : first + count])
    others = [(SEED + 1, 3, 5), (SEED, 4, 5), (SEED, 3, 6)]
    for other in [random_words(*key, 0, len(whole)) for key in others] + [
        random_words(SEED, 3, 5, 0, len(whole), WEIGHTS)
    ]:
        assert (other == whole).float().mean() < 1e-3
    assert MOMENTS != WEIGHTS


def test_stochastic_rounding_is_without_bias() -> None:
    """The mean over many draws lies within five standard errors; every draw is one of the two neighbours."""
    x = torch.cat(
        [torch.randn(30) * 10.0 ** torch.arange(-15, 15), torch.tensor([1.0, -0.0, 1e-40])]
    )
    num_draws = 40_000
    below = (x.view(torch.int32) & -0x10000).view(FP32).double()
    gap = ((x.view(torch.int32) & -0x10000) + 0x10000).view(FP32).double() - below
    total, square = torch.zeros(len(x)).double(), torch.zeros(len(x)).double()
    for stream in (0, 16):  # the low and the high half of a word, as m and v take them
        words = random_words(1, 1, stream, 0, num_draws * len(x)).view(num_draws, -1) >> stream
        share = (round_stochastically(x.expand_as(words), words).double() - below) / gap
        assert ((share == 0) | (share == 1)).all()
        total, square = share.mean(0), (x.double() - below) / gap
        error = (square * (1 - square) / num_draws).sqrt()
        assert ((total - square).abs() <= 5 * error).all()


def test_stochastic_rounding_of_what_is_not_finite() -> None:
    bits = torch.full((4,), -1, dtype=torch.int32)
    canonical = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(FP32)  # NaN as GPUs write it
    x = torch.cat([canonical, torch.tensor([torch.inf, -torch.inf])])
    found = round_stochastically(x, bits)
    assert found[:2].isnan().all() and torch.equal(found[2:].float(), x[2:])


# 2. The kernel and the CPU's path.


@pytest.mark.parametrize("engine", ["kernel", "extension", "cpu"])
@pytest.mark.parametrize(("numel", "first"), PLACES)
@pytest.mark.parametrize(
    ("param", "grad", "moments"),
    [(FP32, FP32, FP32), (FP32, BF16, BF16), (FP32, torch.float16, BF16), (BF16, FP32, BF16)],
)
def test_a_step_is_the_references(
    engine: str,
    numel: int,
    first: int,
    param: torch.dtype,
    grad: torch.dtype,
    moments: torch.dtype,
    poisoned_memory: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if engine == "extension" and native.load() is None:
        pytest.skip("clipcore._C is not built: pip install -e .")
    if engine == "cpu":
        monkeypatch.setattr(native, "load", lambda: None)
    parts = tensors(numel, param, grad, moments)
    shadow = torch.empty(numel, dtype=BF16) if param == FP32 else None
    scale = torch.tensor(0.37)
    place = {"stream": 11, "first": first}
    found = updated(engine, parts, shadow, scale, **place)
    settings = {**SETTINGS, "grad_scale": scale, "seed": SEED, **place}
    reference = adamw_ref(*parts, **settings)
    exact = adamw_ref(*(part.double() for part in parts), **settings)
    for name, *values in zip(("param", "m", "v"), found, reference, exact, strict=False):
        assert_accurate(name, *values)
        # The reference's square root is not rounded as IEEE 754 has it, the extension's is.
        same = engine == "cpu" or (engine == "extension" and name != "param")
        assert not same or torch.equal(values[0], values[1])
    if shadow is not None:
        nearest = found[0].to(BF16)
        assert_accurate("shadow", found[3], nearest, found[0].double())
        # The interpreter's casts to bfloat16 cut off.
        assert (engine, KERNEL_DEVICE) == ("kernel", "cpu") or torch.equal(found[3], nearest)


def test_kernel_draws_the_bits_of_the_reference() -> None:
    """Moments that the step only decays by powers of two, so that all that rounds is the rounding to bfloat16."""
    m, v = torch.randn(9001).to(BF16), torch.rand(9001).to(BF16)
    parts = [torch.zeros(9001), torch.zeros(9001), m, v]
    settings = {**SETTINGS, "beta1": 0.5, "beta2": 1 - 2.0**-9}
    expected = adamw_ref(*parts, **settings, seed=SEED, stream=2, first=CHUNK + 3)
    moved = [t.clone().to(KERNEL_DEVICE) for t in parts]
    update = Update(*moved, stream=2, first=CHUNK + 3)
    adamw_all_triton([update], Factors.of(**settings), 7, None, SEED)
    assert torch.equal(moved[2].cpu(), expected[1])
    assert torch.equal(moved[3].cpu(), expected[2])
    assert not torch.equal(expected[2], (v.float() * (1 - 2.0**-9)).to(BF16))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("moments", [FP32, BF16])
def test_many_tensors_at_once_are_each_alone_and_split_ones_whole(
    device: str, moments: torch.dtype
) -> None:
    """Also of different dtypes and alignments, and an empty one; the parts of a split tensor end as the whole does."""
    settings = {**SETTINGS, "seed": 3}
    sizes = [1, 16, 5000, 0, 2 * CHUNK, 33]
    wholes = [
        [t.to(device) for t in tensors(size, FP32, BF16 if size == 33 else FP32, moments)]
        for size in sizes
    ]
    alone = [[t.clone() for t in whole] for whole in wholes]
    split = [[t.clone() for t in whole] for whole in wholes]
    if device == "cpu" and KERNEL_DEVICE == "cpu":
        updates = [Update(*whole, stream=i) for i, whole in enumerate(wholes)]
        adamw_all_triton(updates, Factors.of(**SETTINGS), SETTINGS["step"], None, 3)
    else:
        adamw_all_([Update(*whole, stream=i) for i, whole in enumerate(wholes)], **settings)
    for i, parts in enumerate(alone):
        adamw_(*parts, **settings, stream=i)
    for i, parts in enumerate(split):
        cut = len(parts[0]) // 3
        for first, last in ((0, cut), (cut, len(parts[0]))):
            adamw_(*(t[first:last] for t in parts), **settings, stream=i, first=first)
    for whole, one, pieces in zip(wholes, alone, split, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, pieces, strict=True))
        # The interpreter and the CPU round the parameter of float32 moments alike but for an ulp.
        assert torch.equal(whole[2], one[2]) and torch.equal(whole[3], one[3])
        for a, b, c in zip(whole, one, pieces, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-7)


# 3. Ahead of time.


def aot_launches() -> None:
    """Both kinds of moments, with shadow and scale and without, aligned or not."""
    for numel, param, grad, moments, extra in [
        (2**20, FP32, FP32, BF16, True),
        (2**20, FP32, FP32, FP32, False),
        (2**20, BF16, BF16, BF16, True),
        (1001, FP32, FP32, BF16, True),
    ]:
        kinds = (param, grad, moments, moments)
        parts = [torch.empty(numel, dtype=dtype, device="meta") for dtype in kinds]
        shadow = torch.empty(numel, dtype=BF16, device="meta") if extra and param == FP32 else None
        scale = torch.empty((), device="meta") if extra else None
        adamw_all_triton([Update(*parts, shadow)] * 300, Factors.of(**SETTINGS), 7, scale, SEED)


def test_ahead_of_time_without_spills_in_the_memory_there_is() -> None:
    assert_compiled_well(compiled("test_adamw"))


# The public function.


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_moments_follow_slow_changes(device: str) -> None:
    """v under a constant gradient: to nearest it would never leave a value that is within 1/512 of where it goes."""
    p, g, m, v = (torch.full((4096,), x, device=device) for x in (0.0, 1.0, 0.0, 0.0))
    m, v = m.to(BF16), v.to(BF16)
    settings = {**SETTINGS, "beta2": 0.999}
    for step in range(1, 301):
        adamw_(p, g, m, v, **{**settings, "step": step}, seed=1)
    expected = 1 - 0.999**300
    assert v.float().mean().item() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_the_scale_is_read_on_the_device_and_a_step_is_repeatable(device: str) -> None:
    parts = [t.to(device) for t in tensors(5000, FP32, BF16, BF16)]
    ends = []
    for scaled in (False, True, True):
        p, g, m, v = (t.clone() for t in parts)
        scale = torch.tensor([0.25], device=device) if scaled else None
        adamw_(p, g if scaled else g * 0.25, m, v, **SETTINGS, grad_scale=scale, seed=4)
        ends.append((p, m, v))
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 0}, "counts from 1"),
        ({"grad": torch.ones(5)}, r"grad has to be contiguous \[4\]"),
        ({"grad": torch.ones(4, dtype=torch.int64)}, "grad has to be floating-point"),
        ({"param": torch.ones(4).half()}, "param has to be float32 or bfloat16"),
        ({"exp_avg": torch.ones(4).bfloat16()}, "both float32 or both bfloat16"),
        ({"param": torch.ones(8)[::2]}, r"of strides \(2,\)"),
        ({"shadow": torch.ones(4)}, "shadow has to be bfloat16"),
        ({"grad_scale": torch.ones(2)}, "grad_scale has to be one element"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, object], message: str) -> None:
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    usual = {name: torch.ones(4) for name in names}
    with pytest.raises(ValueError, match=message):
        adamw_(**{**usual, **SETTINGS, **arguments})


@pytest.mark.skipif(native.load() is None, reason="clipcore._C is not built: pip install -e .")
def test_on_the_cpu_what_is_not_finite_and_the_number_of_threads() -> None:
    """NaN and infinities of the gradient end as in the reference; the bits are those of one thread."""
    parts = tensors(50_000, BF16, FP32, BF16)
    parts[1][[0, 777]] = torch.nan
    parts[1][[1, 4099]] = torch.inf
    expected = adamw_ref(*parts, **SETTINGS, seed=SEED)
    threads, first = torch.get_num_threads(), None
    for number in (1, 2):
        torch.set_num_threads(number)
        try:
            found = updated("cpu", parts, None, torch.ones(()))
        finally:
            torch.set_num_threads(threads)
        for got, value in zip(found[1:], expected[1:], strict=True):
            assert torch.equal(got.view(torch.int16), value.view(torch.int16))
        assert torch.equal(found[0].isnan(), expected[0].isnan())
        first = found[0] if first is None else first
        assert torch.equal(found[0].view(torch.int16), first.view(torch.int16))
