"""The contrastive loss's kernels over rows and columns, against the formulas that the CPU runs (``sums.py``)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from numerics import KERNEL_DEVICE
from torch import Tensor

from clipcore.kernels.contrastive import mean, mean_gpu, sums_gpu
from clipcore.kernels.contrastive.sums import (
    Logarithms,
    Outputs,
    RunningMax,
    Sums,
    Upstream,
    exponents,
    logarithms,
    mean_gradients,
    mean_loss,
)
from clipcore.kernels.contrastive.targets import Targets
from clipcore.kernels.logits.pairs import LossInputs, Pairs

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# More than a program's block, an odd rest of one, and one row.
SHAPES = [(2 * sums_gpu.BLOCK + 77, 1), (3, 2 * sums_gpu.BLOCK), (200, 300)]
INF, NAN = torch.inf, torch.nan


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Of float64 to 1e-12, of float32 to the last place, of whole numbers exactly; NaN and infinities are the same."""
    rtol = {torch.float64: 1e-12, torch.float32: 2.0**-23}.get(actual.dtype, 0.0)
    atol = 1e-12 if actual.dtype == torch.float64 else 0.0
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


def inputs_of(
    shape: tuple[int, int], scale: float, dtype: torch.dtype = torch.float32
) -> LossInputs:
    B, G = shape
    image, text = (torch.zeros(rows, 8, device=KERNEL_DEVICE) for rows in (B, G))
    number = torch.tensor(scale, dtype=dtype, device=KERNEL_DEVICE)
    pairs = Pairs(None, None, 0, "ignore")
    return LossInputs(image, text, number, pairs, True, torch.float32, "library", 2**20)


def vector(length: int, *special: float) -> Tensor:
    """Return random numbers, the last few of which are given."""
    values = torch.randn(length, dtype=torch.float64)
    kept = special[: max(0, length - 1)]
    values[length - len(kept) :] = torch.tensor(kept, dtype=torch.float64)
    return values.to(KERNEL_DEVICE)


def sums_of(shape: tuple[int, int]) -> Sums:
    """Return sums that are to be trusted, and some that are not: too small, too large, NaN, of no pair, of one pair."""
    rows, columns = (vector(length, 1e-35, 1e38, NAN, 0.0, 0.0, 2.0).abs() for length in shape)
    row_targets, column_targets = (
        vector(length, -200.0, 30.0, 1.0, -INF, 7.3, -INF) for length in shape
    )
    return Sums(rows, columns, row_targets, column_targets)


def targets_of(shape: tuple[int, int]) -> Targets:
    """Return weights, of some rows none."""
    B, G = shape
    weights = [vector(length, 0.0, 0.5).abs() for length in (B, B, G, G)]
    return Targets._make(weights)


def logarithms_of(shape: tuple[int, int], offset_log2: float) -> Logarithms:
    """Return logarithms, of which a row is without a valid pair and some have an offset of their own."""
    lse = [vector(length, -INF, 3.0) for length in shape]
    rests = [vector(length, 0.0, 0.25).abs() for length in shape]
    offsets = [
        torch.full((n,), offset_log2, dtype=torch.float64, device=KERNEL_DEVICE) for n in shape
    ]
    offsets[0][-1:] += 4 if shape[0] > 1 else 0
    return Logarithms(lse[0], lse[1], rests[0], rests[1], offsets[0], offsets[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0, -100.0, 3000.0])
def test_exponents(scale: float, dtype: torch.dtype) -> None:
    inputs = inputs_of((2, 2), scale, dtype)
    found, expected = sums_gpu.exponents_gpu(inputs), torch.stack(exponents(inputs))
    assert_same(found.exponents, expected)
    high, low, offset = found.factors.double()
    # Two floats have 48 bits of the factor.
    assert (high + low - expected[0]).abs() <= 2.0**-47 * expected[0].abs()
    assert offset == expected[1]


@pytest.mark.parametrize("has_targets", [False, True])
@pytest.mark.parametrize("tiles", [(1, 1), (5, 40)], ids=str)
@pytest.mark.parametrize("shape", [(1, 300), (77, 130)], ids=str)
def test_partial_sums_are_added(
    shape: tuple[int, int], tiles: tuple[int, int], has_targets: bool
) -> None:
    """To the sums of the blocks before; exactly, since a float64 holds every sum of these."""
    block = SimpleNamespace(
        shape=shape, rows=slice(1, 1 + shape[0]), columns=slice(2, 2 + shape[1])
    )
    partial = Sums._make(
        torch.randint(-99, 99, (tiles[i % 2], shape[i % 2]), device=KERNEL_DEVICE).float()
        for i in range(4)
    )
    sums = Sums._make(vector(length + 5).round() for length in shape * 2)
    expected = [values.clone() for values in sums]
    for i, values in enumerate(expected[: 4 if has_targets else 2]):
        first = 1 + i % 2
        values[first : first + shape[i % 2]] += partial[i].sum(0).double()
    targets = targets_of(shape) if has_targets else None
    sums_gpu.add_partials(block, partial, sums, targets)
    assert all(torch.equal(*pair) for pair in zip(sums, expected, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_uniform_weights_over_those_of_positives(shape: tuple[int, int]) -> None:
    targets = targets_of(shape)
    found, expected = sums_gpu.relative_uniform_gpu(targets), targets.relative_uniform()
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("has_targets", [False, True])
@pytest.mark.parametrize("scale", [20.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logarithms(shape: tuple[int, int], scale: float, has_targets: bool) -> None:
    inputs, sums = inputs_of(shape, scale), sums_of(shape)
    targets = targets_of(shape) if has_targets else None
    own = Sums._make(values.clone() for values in sums)
    logs, states = sums_gpu.logarithms_gpu(sums_gpu.exponents_gpu(inputs), targets, own)
    if targets is not None:
        sums.row_target_log2_B.mul_(targets.row_positive_B)
        sums.column_target_log2_G.mul_(targets.column_positive_G)

    expected, untrusted = logarithms(inputs, targets is None, sums, torch.float32)
    for pair in zip((*logs, *own), (*expected, *sums), strict=True):
        assert_same(*pair)
    if targets is None:
        # A row of one pair: its logarithm is the logit to the last bit.
        alone = (sums.row_B == 0) & sums.row_target_log2_B.isfinite()
        assert torch.equal(logs.row_lse_log2_B[alone], sums.row_target_log2_B[alone])
        assert alone.any() or len(alone) < 4
    for state, side in zip(states, untrusted, strict=True):
        assert torch.equal(state.is_untrusted_N, side.to(torch.int32))
        assert (state.largest_N == -INF).all() and (state.total_N == 0).all()
    assert any(side.any() and not side.all() for side in untrusted)


@pytest.mark.parametrize("by_place", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_a_running_maximum_finds(shape: tuple[int, int], by_place: bool) -> None:
    """Also of a row without a valid pair; trusted rows keep their bits."""
    inputs, sums = inputs_of(shape, 100.0), sums_of(shape)
    powers = sums_gpu.exponents_gpu(inputs)
    logs, states = sums_gpu.logarithms_gpu(powers, None, sums)
    untrusted = [state.is_untrusted_N.bool() for state in states]
    running = []
    for state, target_log2 in zip(
        states, (sums.row_target_log2_B, sums.column_target_log2_G), strict=True
    ):
        state.largest_N.copy_(target_log2.float().floor())
        state.largest_N[target_log2 == -INF] = -3e38
        state.total_N.copy_(torch.where(target_log2 == -INF, 0.0, 1.0 + target_log2.abs() / 300))
        rest = state.largest_N.double() + state.total_N.double().log2()
        running.append(RunningMax(rest, target_log2))

    expected = logs.completed(inputs, by_place, untrusted, running)
    before = [values.clone() for values in logs]
    sums_gpu.complete(logs, powers, by_place, sums, states)
    for i, (found, wanted, kept) in enumerate(zip(logs, expected, before, strict=True)):
        assert_same(found, wanted)
        trusted = ~untrusted[i % 2]
        assert_same(found[trusted], kept[trusted])
    assert untrusted[0].any() or untrusted[1].any()


@pytest.mark.parametrize("parts", [2, 128])
@pytest.mark.parametrize("special", [(), (0.0,), (-50.0,), (NAN,)], ids=str)
@pytest.mark.parametrize("has_targets", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_upstream_gradients(
    shape: tuple[int, int],
    has_targets: bool,
    special: tuple[float, ...],
    parts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over the largest of all, which may be of any row of either side; NaN where one is. Few programs take many rows."""
    monkeypatch.setattr(sums_gpu, "PARTS", parts)
    inputs = inputs_of(shape, 100.0)
    powers = sums_gpu.exponents_gpu(inputs)
    logs = logarithms_of(shape, float(powers.exponents[1]))
    targets = targets_of(shape) if has_targets else None
    upstream = [vector(length, *special) for length in shape * 2]
    terms = [torch.empty(0, device=KERNEL_DEVICE)] * 4
    found = sums_gpu.gradient_vectors(powers, targets, upstream, Outputs(*logs, *terms), 2.0**13)

    over, largest = Upstream.from_terms(upstream, targets, logs).over_largest()
    row_factor, column_factor = over.factors(logs)
    offset = powers.exponents[1]
    expected = sums_gpu.GradientVectors(
        row_factor,
        column_factor,
        logs.row_offset_log2_B,
        logs.column_offset_log2_G,
        over.row_positive_B,
        over.column_positive_G,
        over.row_uniform_B,
        over.column_uniform_G,
        torch.cat(logs.untrusted(offset)).any()[None],
        largest[None],
        powers.exponents[:1] * largest / 2.0**13,
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs.to(ours.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("parts", [1, 128])
@pytest.mark.parametrize("by_weight", [False, True])
@pytest.mark.parametrize("first_label", [0, 2, -1])
@pytest.mark.parametrize("shape", [(700, 700), (3, 1100), (130, 128)], ids=str)
def test_mean(
    shape: tuple[int, int],
    first_label: int,
    by_weight: bool,
    dtype: torch.dtype,
    parts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows that do not count may be NaN."""
    monkeypatch.setattr(sums_gpu, "PARTS", parts)
    weights = list(targets_of(shape)[::2]) if by_weight else []
    terms = [vector(length) for length in shape * 2]
    if by_weight:
        terms[0][weights[0] == 0] = NAN
    loss, counts = mean_gpu.mean_loss_gpu(terms, weights, first_label, dtype)
    expected, expected_counts = mean_loss(terms, weights, first_label, dtype)
    assert_same(loss, expected)
    assert torch.equal(counts, expected_counts) and loss.isfinite()

    upstream = torch.tensor(-1.7, dtype=dtype, device=KERNEL_DEVICE)
    arguments = upstream, counts, weights, shape, first_label
    for ours, theirs in zip(
        mean_gpu.mean_gradients_gpu(*arguments), mean_gradients(*arguments), strict=True
    ):
        assert_same(ours, theirs)


def test_a_mean_over_nothing_is_nan() -> None:
    terms = [vector(3) for _ in range(4)]
    weights = [torch.zeros_like(terms[0])] * 2
    loss, counts = mean_gpu.mean_loss_gpu(terms, weights, 0, torch.float32)
    assert loss.isnan() and (counts == 0).all()


@pytest.mark.parametrize("by_weight", [False, True])
def test_opcheck(by_weight: bool) -> None:
    terms = [vector(5).requires_grad_() for _ in range(4)]
    weights = [vector(5).abs() for _ in range(2)] if by_weight else []
    torch.library.opcheck(torch.ops.clipcore.contrastive_mean, (*terms, weights, 1, torch.float64))
    upstream, counts = vector(1)[0], torch.tensor([4.0, 4.0], dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.clipcore.contrastive_mean_bwd,
        (upstream, counts.to(KERNEL_DEVICE), weights, 5, 5, 1),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("by_weight", [False, True])
def test_the_mean_is_differentiated(by_weight: bool) -> None:
    terms = [vector(5).cpu().requires_grad_() for _ in range(4)]
    weights = [vector(5, 0.0).cpu().abs() for _ in range(2)] if by_weight else []

    def loss(*terms: Tensor) -> Tensor:
        empty = torch.empty(0)
        outputs = Outputs(*terms[:2], *[empty] * 4, *terms[2:], empty, empty)
        return mean.contrastive_mean(outputs, weights, 1, torch.float64)

    assert torch.autograd.gradcheck(loss, terms)
