"""SigLIP's loss: the reference, both devices' paths against it, memory, determinism, and one differentiation."""

from __future__ import annotations

import itertools

import pytest
import torch
from aot import assert_compiled_well, compiled
from numerics import (
    DEVICES,
    KERNEL_DEVICE,
    KERNEL_DTYPES,
    LargestStorage,
    Products,
    assert_accurate,
    root_mean_square,
    with_gradients,
)
from problems import KINDS, assert_exact, embeddings, ids_for, unit_embeddings
from torch import Tensor
from torch.nn import functional as F

from clipcore.kernels.logits import launch_rows, pairs
from clipcore.kernels.logits.pairs import LossInputs, Pairs
from clipcore.kernels.sigmoid import operator, sigmoid_loss, sigmoid_ref
from clipcore.kernels.sigmoid.gpu import sigmoid_fwd_gpu

OPTIONS = {"plain": {}, "ignore": {"same_id": "ignore"}, "positive": {"same_id": "positive"}}
NAMES = ("loss", "image", "text", "scale", "bias")
ONE = torch.tensor(1.0)
# Scales and biases: SigLIP's start, a trained model's, CLIP's largest scale, and beyond what exp can hold.
FACTORS = [(1.0, 0.0), (10.0, -10.0), (112.7, -16.5), (100.0, 5.0), (3000.0, -10.0), (5.0, -90.0)]


def factors(scale: float, bias: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.tensor(scale, dtype=dtype), torch.tensor(bias, dtype=dtype)


# 1. The reference.


@pytest.mark.fast
def test_reference_is_the_papers_algorithm() -> None:
    image, text = embeddings(9, 9, 6)
    z = 7.0 * image @ text.T - 2.0
    labels = 2 * torch.eye(9, dtype=z.dtype) - 1
    expected = -F.logsigmoid(labels * z).sum() / 9
    torch.testing.assert_close(sigmoid_ref(image, text, 7.0, -2.0), expected, rtol=1e-13, atol=0)


@pytest.mark.fast
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_finite_differences(option: str) -> None:
    inputs = [t.requires_grad_() for t in (*embeddings(5, 7, 4), *factors(3.0, -1.0))]
    keywords = ids_for(OPTIONS[option], 5, 7)
    assert torch.autograd.gradcheck(lambda *x: sigmoid_loss(*x, **keywords), inputs)


# The CPU path in float64: exact.


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scale", "bias"), FACTORS)
@pytest.mark.parametrize(("B", "E"), [(1, 8), (2, 8), (3, 640), (63, 8), (127, 384), (1000, 512)])
def test_cpu_is_exact(B: int, E: int, scale: float, bias: float, kind: str) -> None:
    inputs = (*embeddings(B, B, E, kind), *factors(scale, bias))
    upstream = torch.tensor(0.37, dtype=torch.float64)
    # A workspace of a few rows makes every case cross blocks.
    workspace_bytes = max(7, B // 5) * 2 * 8 * B
    expected = with_gradients(lambda *x: sigmoid_ref(*x, normalize=True), inputs, upstream)
    actual = with_gradients(
        lambda *x: sigmoid_loss(*x, workspace_bytes=workspace_bytes), inputs, upstream
    )
    assert_exact(actual, expected, 1e15 if kind == "huge" else 1.0)


@pytest.mark.parametrize(("B", "E"), [(2048, 768), (4096, 128)])
def test_cpu_is_exact_in_a_large_batch(B: int, E: int) -> None:
    inputs = (*embeddings(B, B, E), *factors(10.0, -10.0))
    expected = with_gradients(lambda *x: sigmoid_ref(*x, normalize=True), inputs, ONE)
    assert_exact(with_gradients(sigmoid_loss, inputs, ONE), expected)


@pytest.mark.fast
@pytest.mark.parametrize("first_label", [0, 2, -3, 40, -40])
@pytest.mark.parametrize(("B", "G"), [(20, 20), (20, 31), (31, 20)])
@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("scale", [12.0, 2000.0])
def test_cpu_is_exact_with_every_option(
    B: int, G: int, first_label: int, option: str, scale: float
) -> None:
    """Texts of another rank (first_label 40) are all negatives."""
    inputs = (*embeddings(B, G, 16), *factors(scale, -4.0))
    upstream = torch.tensor(-1.3, dtype=torch.float64)
    keywords = {**ids_for(OPTIONS[option], B, G), "first_label": first_label}
    expected = with_gradients(
        lambda *x: sigmoid_ref(*x, normalize=True, **keywords), inputs, upstream
    )
    actual = with_gradients(
        lambda *x: sigmoid_loss(*x, workspace_bytes=5 * 16 * G, **keywords), inputs, upstream
    )
    assert_exact(actual, expected)


def assert_accurate_everywhere(
    problems: list[tuple[Tensor, ...]], keywords: dict[str, object], how: dict[str, object]
) -> None:
    """Check the rule of accuracy, each output over all problems: loss, scale's and bias's gradient are one number each."""
    results: list[list[list[Tensor]]] = [[], [], []]
    for inputs in problems:
        narrow = [t.to(inputs[0].dtype) for t in inputs[:2]]
        results[0].append(
            with_gradients(lambda *x: sigmoid_loss(*x, **keywords, **how), inputs, ONE)
        )

        def reference(*x: Tensor) -> Tensor:
            return sigmoid_ref(*x, normalize=True, **keywords)

        results[1].append(with_gradients(reference, (*narrow, *inputs[2:]), ONE))
        results[2].append(with_gradients(reference, [t.double() for t in inputs], ONE))
    for i, name in enumerate(NAMES):
        actual, same_dtype, exact = (torch.stack([r[i] for r in found]) for found in results)
        tensors = (actual, same_dtype.to(actual.dtype), exact)
        assert_accurate(name, *tensors, **({"size": root_mean_square} if len(problems) > 6 else {}))


def kernel_problems(
    B: int, G: int, E: int, dtype: torch.dtype, scale: float = 10.0, bias: float = -10.0
) -> list[tuple[Tensor, ...]]:
    return [
        tuple(
            t.to(KERNEL_DEVICE)
            for t in (*embeddings(B, G, E, dtype=dtype), *factors(scale, bias, torch.float32))
        )
        for _ in range(60 if B * G == 1 and dtype == torch.float32 else 6)
    ]


@pytest.mark.parametrize(("scale", "bias"), FACTORS)
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_cpu_is_accurate_in_float32(option: str, scale: float, bias: float) -> None:
    problems = [
        tuple(t.cpu() for t in problem)
        for problem in kernel_problems(300, 200, 64, torch.float32, scale, bias)
    ]
    assert_accurate_everywhere(problems, ids_for(OPTIONS[option], 300, 200), {})


# 2 and 4. The Triton kernels: in the interpreter, or on the GPU where there is one.


def in_triton_everywhere(monkeypatch: pytest.MonkeyPatch, operand: torch.dtype) -> None:
    """CPU tensors go through the Triton path too, with operands of this dtype."""
    if KERNEL_DEVICE == "cpu":
        monkeypatch.setattr(operator, "sigmoid_fwd_cpu", sigmoid_fwd_gpu)
        monkeypatch.setattr(pairs, "choose_operand", lambda *_: operand)


SETTINGS = (
    [(1, 1, 8), (2, 3, 8), (63, 130, 40), (130, 127, 64)],
    ["library", "fused"],
    KERNEL_DTYPES,
    FACTORS[:4],
)
# In the interpreter every second one: any three of the four settings still meet.
COMPARED = [
    (shape, engine, dtype, *pair)
    for (i, shape), (j, engine), (k, dtype), (n, pair) in itertools.product(
        *map(enumerate, SETTINGS)
    )
    if KERNEL_DEVICE == "cuda" or (i + j + k + n) % 2 == 0
]


@pytest.mark.parametrize(("shape", "engine", "dtype", "scale", "bias"), COMPARED, ids=str)
def test_kernels_are_accurate(
    shape: tuple[int, int, int],
    engine: str,
    dtype: torch.dtype,
    scale: float,
    bias: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_triton_everywhere(monkeypatch, torch.float32 if dtype == torch.float32 else torch.float16)
    problems = kernel_problems(*shape, dtype, scale, bias)
    assert_accurate_everywhere(problems, {}, {"engine": engine})


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("engine", ["library", "fused"])
@pytest.mark.parametrize("scale", [20.0, 3000.0])
def test_kernels_have_every_option(
    option: str, engine: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_triton_everywhere(monkeypatch, torch.float32)
    keywords = {**ids_for(OPTIONS[option], 37, 45, KERNEL_DEVICE), "first_label": 3}
    problems = kernel_problems(37, 45, 16, torch.float32, scale, -8.0)
    assert_accurate_everywhere(problems, keywords, {"engine": engine})


@pytest.mark.parametrize("engine", ["library", "fused"])
def test_kernels_cross_blocks(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_triton_everywhere(monkeypatch, torch.float32)
    problems = kernel_problems(300, 520, 24, torch.float32)[:2]
    how = {"engine": engine, "workspace_bytes": 1}
    assert_accurate_everywhere(problems, {}, how)


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [-10.0, -3.0], ids=["far from the margin", "at the margin"])
def test_strips_away_from_the_labels_and_the_edges(
    bias: float, option: str, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    """Strips of 16 rows: of 512 columns the second is without a positive by its place, the third is cut."""
    monkeypatch.setattr(launch_rows, "STRIP_ROWS", 16)
    in_triton_everywhere(monkeypatch, torch.float32)
    keywords = ids_for(OPTIONS[option], 40, 1040, KERNEL_DEVICE)
    problems = kernel_problems(40, 1040, 16, torch.float32, 3.0, bias)[:3]
    assert_accurate_everywhere(problems, keywords, {"engine": "library"})


@pytest.mark.parametrize("same_id", ["ignore", "positive"])
def test_ids_may_be_a_column_of_a_table(same_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_triton_everywhere(monkeypatch, torch.float32)
    inputs = kernel_problems(20, 20, 16, torch.float32)[0]
    ids = torch.stack([torch.arange(20) // 3, torch.arange(20)], 1).to(KERNEL_DEVICE)[:, 0]
    strided, whole = (
        with_gradients(
            lambda *x, i=each: sigmoid_loss(*x, image_ids=i, text_ids=i, same_id=same_id),
            inputs,
            ONE,
        )
        for each in (ids, ids.contiguous())
    )
    assert all(torch.equal(a, b) for a, b in zip(strided, whole, strict=True))


@pytest.mark.parametrize("engine", ["cpu", "library", "fused"])
def test_nan_stays(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine != "cpu":
        in_triton_everywhere(monkeypatch, torch.float32)
    image, text = (t.to(KERNEL_DEVICE) for t in unit_embeddings(9, 9, 16))
    image[3, 2] = torch.nan
    found = with_gradients(
        lambda *x: sigmoid_loss(*x, engine=None if engine == "cpu" else engine),
        (image, text, *(t.to(KERNEL_DEVICE) for t in factors(10.0, -10.0, torch.float32))),
        ONE,
    )
    assert found[0].isnan() and found[1][3].isnan().any() and found[2].isnan().any()


@pytest.mark.parametrize(
    "broken",
    [(torch.nan, 0.0), (10.0, torch.nan), (10.0, torch.inf), (torch.inf, -10.0)],
    ids=str,
)
@pytest.mark.parametrize("engine", ["cpu", "library"])
def test_what_is_not_finite_shows(
    broken: tuple[float, float], engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scale or bias: the loss is not finite either, and nothing is raised."""
    if engine != "cpu":
        in_triton_everywhere(monkeypatch, torch.float32)
    image, text = (t.to(KERNEL_DEVICE) for t in unit_embeddings(9, 9, 16))
    assert not sigmoid_loss(image, text, *broken).isfinite()


@pytest.mark.parametrize("bias", [-1e30, 1e30])
def test_a_bias_of_any_size(bias: float) -> None:
    image, text = unit_embeddings(9, 9, 16)
    found = sigmoid_loss(image, text, 10.0, bias)
    assert_accurate(
        *("loss", found, sigmoid_ref(image, text, 10.0, bias)),
        sigmoid_ref(image.double(), text.double(), 10.0, bias),
    )


@pytest.mark.parametrize("engine", ["library", "fused"])
@pytest.mark.parametrize("kind", ["identical", "zero rows", "huge"])
def test_kernels_take_any_rows(
    kind: str, engine: str, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    in_triton_everywhere(monkeypatch, torch.float32)
    problems = [
        tuple(
            t.to(KERNEL_DEVICE)
            for t in (
                *embeddings(40, 70, 24, kind, torch.float32),
                *factors(10.0, -10.0, torch.float32),
            )
        )
        for _ in range(3)
    ]
    assert_accurate_everywhere(problems, {}, {"engine": engine})


# 3. Ahead of time.


def aot_launches() -> None:
    """Every row of the launch table, with and without gradients and ids."""
    for operand, engine, backward, option in [
        (torch.float16, "library", True, "plain"),
        (torch.float16, "library", False, "plain"),
        (torch.float32, "library", True, "ignore"),
        (torch.float16, "fused", True, "plain"),
        (torch.bfloat16, "fused", True, "ignore"),
        (torch.float16, "fused", True, "positive"),
        (torch.float16, "fused", False, "plain"),
        (torch.float32, "fused", True, "plain"),
    ]:
        dtype = torch.float32 if operand == torch.float32 else torch.bfloat16
        image, text = (torch.empty(rows, 512, dtype=dtype, device="meta") for rows in (1000, 2000))
        keywords = ids_for(OPTIONS[option], 1000, 2000, "meta")
        ids = keywords.get("image_ids"), keywords.get("text_ids")
        which = Pairs(ids[0], ids[1], 0, keywords.get("same_id", "ignore"))
        number = torch.empty((), device="meta")
        problem = LossInputs(image, text, number, which, False, operand, engine, 576 * 10**6)
        sigmoid_fwd_gpu(problem, number, backward, (backward, backward))


def test_ahead_of_time_without_spills_in_the_memory_there_is() -> None:
    assert_compiled_well(compiled("test_sigmoid"))


def test_ahead_of_time_the_fused_kernels_have_matrix_instructions() -> None:
    """On sm_100 they are the older ones, as the launch table says, and are not counted."""
    for kernel in compiled("test_sigmoid"):
        fused = "GROUP_N" in kernel.constants and "fp32" not in kernel.operand
        if fused and kernel.architecture < 100:
            assert kernel.matrix_instructions > 0, str(kernel)


def test_ahead_of_time_two_fused_programs_fit_on_a_processor_of_hopper() -> None:
    """While one is in its epilogue the other multiplies. Without ids and spread targets, whose kernels would spill."""
    fused = [
        kernel
        for kernel in compiled("test_sigmoid")
        if kernel.architecture == 90
        and "GROUP_N" in kernel.constants
        and "fp32" not in kernel.operand
        and kernel.constants["IDS"] == "none"
    ]
    assert fused and all(kernel.programs_on_a_processor >= 2 for kernel in fused)


# The public function.


@pytest.mark.parametrize("engine", ["cpu", "library", "fused"])
def test_same_bits_every_time(
    engine: str, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    device = "cpu"
    if engine != "cpu":
        in_triton_everywhere(monkeypatch, torch.float32)
        device = KERNEL_DEVICE
    num_pairs = 700 if engine == "cpu" else 150
    embedded = unit_embeddings(num_pairs, num_pairs, 64)
    inputs = [t.to(device) for t in (*embedded, *factors(10.0, -10.0, torch.float32))]

    def loss(*x: Tensor) -> Tensor:
        return sigmoid_loss(*x, engine=None if engine == "cpu" else engine)

    first = with_gradients(loss, inputs, ONE)
    assert all(found.isfinite().all() for found in first)
    # The interpreter has one order; a GPU's programs have many.
    for _ in range(10 if device == "cuda" else 3):
        again = with_gradients(loss, inputs, ONE)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("wanted", [*NAMES[1:], "none"])
@pytest.mark.parametrize("engine", ["cpu", "library"])
def test_only_what_is_asked_for_is_computed(
    wanted: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine != "cpu":
        in_triton_everywhere(monkeypatch, torch.float32)
    inputs = [
        t.to(KERNEL_DEVICE)
        for t in (*unit_embeddings(40, 30, 16), *factors(10.0, -10.0, torch.float32))
    ]
    loss, *full = with_gradients(sigmoid_loss, inputs, ONE)
    leaves = [
        t.clone().requires_grad_(name == wanted) for name, t in zip(NAMES[1:], inputs, strict=True)
    ]
    with Products() as products:
        alone = sigmoid_loss(*leaves)
        if wanted != "none":
            alone.backward()
    # The similarity and a product a side; on the CPU the scale's gradient takes one side, and the bias's comes with it.
    sides = int(wanted in ("image", "text") or (engine == "cpu" and wanted in ("scale", "bias")))
    assert KERNEL_DEVICE == "cuda" or products.count == 1 + sides
    assert torch.equal(alone.detach(), loss)
    for leaf, expected in zip(leaves, full, strict=True):
        assert (leaf.grad is None) == (not leaf.requires_grad)
        if leaf.grad is not None:  # of float32 sums over one side or the other
            assert_accurate(wanted, leaf.grad, expected, expected.double())


def test_backward_twice_gives_the_same_and_a_second_derivative_is_refused() -> None:
    inputs = (*unit_embeddings(5, 5, 8), *factors(10.0, -10.0, torch.float32))
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss = sigmoid_loss(*leaves)
    once, again = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.autograd.grad(loss, leaves[0], create_graph=True)


def test_nothing_of_n_by_n_is_held() -> None:
    """The largest tensor that the loss makes is a block of the workspace or an embedding."""
    num_pairs, width, workspace_bytes = 4096, 32, 2**20
    image, text = (t.requires_grad_() for t in unit_embeddings(num_pairs, num_pairs, width))
    with LargestStorage.inside(operator, "sigmoid_fwd_cpu") as largest:
        sigmoid_loss(image, text, 10.0, -10.0, workspace_bytes=workspace_bytes).backward()
        limit = max(workspace_bytes, num_pairs * width * 4)
        assert 0 < largest.bytes <= limit
        sigmoid_loss(image, text, 10.0, -10.0, workspace_bytes=2**40)
    assert largest.bytes == 4 * num_pairs**2 > limit  # as large a block as is allowed is seen


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    inputs = (*unit_embeddings(9, 9, 16), *factors(10.0, -10.0, torch.float32))
    for requires_grad in ((True, True), (True, False), (False, False)):
        image, text, scale, bias = (t.to(device) for t in inputs)
        leaves = image.requires_grad_(requires_grad[0]), text.requires_grad_(requires_grad[1])
        backward = any(requires_grad)
        arguments = (*leaves, scale, bias, None, None, 0, "ignore", True, torch.float32, "library")
        torch.library.opcheck(
            torch.ops.clipcore.sigmoid_fwd, (*arguments, 2**20, backward, *requires_grad)
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("option", ["plain", "positive"])
def test_compiles_into_one_graph_with_equal_results(device: str, option: str) -> None:
    inputs = [
        t.to(device) for t in (*unit_embeddings(9, 9, 16), *factors(3.0, -10.0, torch.float32))
    ]
    keywords = ids_for(OPTIONS[option], 9, 9, device)

    def loss(image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
        return sigmoid_loss(image, text, log_scale.exp(), bias, **keywords)

    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = with_gradients(loss, inputs, ONE)
    actual = with_gradients(whole, inputs, ONE)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("engine", ["cpu", "library", "fused"])
def test_an_empty_shard(
    shape: tuple[int, int], engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine != "cpu":
        in_triton_everywhere(monkeypatch, torch.float32)
    inputs = (*(torch.randn(rows, 4) for rows in shape), *factors(10.0, -10.0, torch.float32))
    found = with_gradients(
        lambda *x: sigmoid_loss(*x, engine=None if engine == "cpu" else engine),
        [t.to(KERNEL_DEVICE) for t in inputs],
        ONE,
    )
    assert all((t == 0).all() for t in found) and found[1].shape == (shape[0], 4)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"same_id": "drop"}, "same_id"),
        ({"engine": "fast"}, "engine"),
        ({"image_ids": torch.arange(4)}, "both or none"),
        ({"operand_dtype": torch.int8}, "operand_dtype"),
        ({"scale": torch.ones(2)}, "scale has to be"),
        ({"bias": torch.ones(2)}, "bias has to be"),
    ],
)
def test_a_wrong_argument_is_named(keywords: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sigmoid_loss(*unit_embeddings(4, 4, 8), **{"scale": 1.0, "bias": 0.0, **keywords})
