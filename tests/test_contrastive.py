"""The contrastive loss: the reference, both devices' paths against it, memory, determinism, and open_clip's call."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from aot import assert_compiled_well, compiled
from numerics import (
    DEVICES,
    KERNEL_DEVICE,
    KERNEL_DTYPES,
    LargestStorage,
    LiveStorages,
    Products,
    assert_accurate,
    with_gradients,
)
from problems import KINDS, assert_exact, embeddings, ids_for, unit_embeddings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from clipcore.kernels import launch
from clipcore.kernels.contrastive import (
    contrastive_loss,
    contrastive_ref,
    contrastive_terms,
    gpu,
    mean,
    operator,
    plan,
)
from clipcore.kernels.contrastive.gpu import contrastive_bwd_gpu, contrastive_fwd_gpu
from clipcore.kernels.contrastive.mean_gpu import mean_gradients_gpu, mean_loss_gpu
from clipcore.kernels.contrastive.targets import count_equal, uniform_targets
from clipcore.kernels.logits import launch_rows, pairs, sides, walk_cpu, walk_gpu
from clipcore.kernels.logits.pairs import LossInputs, Pairs
from clipcore.kernels.normalize import normalize_ref
from clipcore.kernels.sigmoid import sigmoid_loss
from clipcore.loss import ClipLoss, clip

ONE = torch.tensor(1.0)
STASHES = [0, 2**40]
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "ignore": {"same_id": "ignore"},
    "ignore, smoothed": {"same_id": "ignore", "label_smoothing": 0.2},
    "positive": {"same_id": "positive"},
    "positive, smoothed": {"same_id": "positive", "label_smoothing": 0.2},
}


# 1. The reference.


@pytest.mark.fast
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_reference_is_the_cross_entropy_of_torch(smoothing: float) -> None:
    image, text = embeddings(9, 9, 6)
    z = 7.0 * image @ text.T
    labels = torch.arange(9)
    expected = sum(F.cross_entropy(m, labels, label_smoothing=smoothing) for m in (z, z.T)) / 2
    actual = contrastive_ref(image, text, 7.0, label_smoothing=smoothing)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)


@pytest.mark.fast
def test_a_second_derivative_is_refused() -> None:
    image, text, scale = (torch.randn(s, requires_grad=True) for s in ((5, 8), (5, 8), ()))
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.autograd.grad(contrastive_loss(image, text, scale.exp()), image, create_graph=True)


@pytest.mark.fast
def test_finite_differences() -> None:
    image, text = embeddings(5, 7, 4)
    inputs = [t.requires_grad_() for t in (image, text, torch.tensor(3.0, dtype=torch.float64))]
    assert torch.autograd.gradcheck(contrastive_loss, inputs)
    assert torch.autograd.gradcheck(
        lambda *inputs: contrastive_loss(*inputs, **ids_for(OPTIONS["positive, smoothed"], 5, 7)),
        inputs,
    )


# The CPU path in float64: exact.


@pytest.mark.fast
@pytest.mark.parametrize("stash_bytes", STASHES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize(("B", "E"), [(1, 8), (2, 8), (3, 640), (63, 8), (127, 384), (1000, 512)])
def test_cpu_is_exact(B: int, E: int, scale: float, kind: str, stash_bytes: int) -> None:
    image, text = embeddings(B, B, E, kind)
    inputs = (image, text, torch.tensor(scale, dtype=torch.float64))
    upstream = torch.tensor(0.37, dtype=torch.float64)

    def chunked(*inputs: Tensor) -> Tensor:
        # A workspace of a few rows makes every case cross blocks.
        workspace_bytes = max(7, B // 5) * 2 * 8 * B
        return contrastive_loss(*inputs, stash_bytes=stash_bytes, workspace_bytes=workspace_bytes)

    expected = with_gradients(lambda *x: contrastive_ref(*x, normalize=True), inputs, upstream)
    length = 1e15 if kind == "huge" else 1.0
    assert_exact(with_gradients(chunked, inputs, upstream), expected, length)


@pytest.mark.parametrize(
    ("B", "E", "scale", "kind"), [(2048, 1024, 14.3, "random"), (4096, 64, 100.0, "matched")]
)
def test_cpu_is_exact_in_a_large_batch(B: int, E: int, scale: float, kind: str) -> None:
    inputs = (*embeddings(B, B, E, kind), torch.tensor(scale, dtype=torch.float64))
    one = torch.tensor(1.0)
    expected = with_gradients(lambda *x: contrastive_ref(*x, normalize=True), inputs, one)
    assert_exact(with_gradients(contrastive_loss, inputs, one), expected)


@pytest.mark.fast
@pytest.mark.parametrize("first_label", [0, 2, -3])
@pytest.mark.parametrize(("B", "G"), [(20, 20), (20, 31), (31, 20)])
@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("stash_bytes", STASHES)
def test_cpu_is_exact_with_every_option(
    B: int, G: int, first_label: int, option: str, stash_bytes: int
) -> None:
    image, text = embeddings(B, G, 16)
    inputs = (image, text, torch.tensor(12.0, dtype=torch.float64))
    keywords = {**ids_for(OPTIONS[option], B, G), "first_label": first_label}
    upstream = torch.tensor(-1.3, dtype=torch.float64)
    expected = with_gradients(
        lambda *x: contrastive_ref(*x, normalize=True, **keywords), inputs, upstream
    )
    actual = with_gradients(
        lambda *x: contrastive_loss(
            *x, stash_bytes=stash_bytes, workspace_bytes=5 * 16 * G, **keywords
        ),
        inputs,
        upstream,
    )
    assert_exact(actual, expected)


@pytest.mark.fast
@pytest.mark.parametrize("scale", [400.0, 3000.0])
@pytest.mark.parametrize("option", ["plain", "ignore", "positive, smoothed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_beyond_the_fixed_offset_take_the_running_maximum(
    scale: float, option: str, dtype: torch.dtype
) -> None:
    """Opposite pairs: the sums of a row underflow, or a raw logit overflows."""
    image, _ = unit_embeddings(12, 12, 8, dtype=dtype)
    text = -image + 0.01 * torch.randn_like(image)
    inputs = (image, text, torch.tensor(scale, dtype=dtype))
    keywords = ids_for(OPTIONS[option], 12, 12)
    exact = with_gradients(
        lambda *x: contrastive_ref(*x, **keywords), [t.double() for t in inputs], torch.tensor(1.0)
    )
    reference = with_gradients(
        lambda *x: contrastive_ref(*x, **keywords), inputs, torch.tensor(1.0)
    )
    actual = with_gradients(
        lambda *x: contrastive_loss(*x, normalize=False, stash_bytes=2**40, **keywords),
        inputs,
        torch.tensor(1.0),
    )
    if dtype == torch.float64:
        assert_exact(actual, exact)
    else:
        for name, *tensors in zip(
            ("loss", "image", "text", "scale"), actual, reference, exact, strict=True
        ):
            assert_accurate(name, *tensors)


def relative_errors(
    inputs: list[Tensor], upstream: Tensor, **keywords: object
) -> list[tuple[float, float]]:
    """Of the loss and the embeddings' gradients: (ours in float32, the reference's), to be compared as whole tensors."""
    exact = with_gradients(contrastive_ref, [t.double() for t in inputs], upstream)
    found = [
        with_gradients(fn, inputs, upstream)
        for fn in (lambda *x: contrastive_loss(*x, normalize=False, **keywords), contrastive_ref)
    ]
    return [
        tuple(float((result[i].double() - exact[i]).norm() / exact[i].norm()) for result in found)
        for i in range(3)
    ]


@pytest.mark.parametrize("upstream", [1e-8, 1.0, 1e6])
@pytest.mark.parametrize("stash_bytes", STASHES)
def test_an_upstream_gradient_of_any_size(upstream: float, stash_bytes: int) -> None:
    """Collapsed embeddings at scale 100 have the largest sums: one over them, over N, is near the end of float32."""
    image = F.normalize(torch.randn(1, 32) + 0.05 * torch.randn(512, 32))
    text = F.normalize(image + 0.01 * torch.randn(512, 32))
    errors = relative_errors(
        [image, text, torch.tensor(100.0)], torch.tensor(upstream), stash_bytes=stash_bytes
    )
    for ours, reference in errors[1:]:
        assert ours <= 2 * reference


@pytest.mark.parametrize("scale", [50.0, 100.0])
def test_unique_ids_are_as_accurate_as_none(scale: float) -> None:
    """Left-out pairs do not bring the positive back into the sums."""
    image = F.normalize(torch.randn(256, 64))
    text = F.normalize(image + 0.3 * F.normalize(torch.randn(256, 64)))
    inputs, ids = [image, text, torch.tensor(scale)], torch.arange(256)
    without, unique = (
        with_gradients(
            lambda *x, k=keywords: contrastive_loss(*x, normalize=False, **k),
            inputs,
            torch.tensor(1.0),
        )
        for keywords in ({}, {"image_ids": ids, "text_ids": ids})
    )
    assert all(torch.equal(a, b) for a, b in zip(without, unique, strict=True))


# 2 and 4. The Triton kernels: in the interpreter, or on the GPU where there is one.


def in_triton_everywhere(monkeypatch: pytest.MonkeyPatch, operand: torch.dtype) -> None:
    """CPU tensors go through the Triton path too, with operands of this dtype."""
    if KERNEL_DEVICE == "cuda":
        return  # real Triton takes no CPU tensors
    monkeypatch.setattr(operator, "contrastive_fwd_cpu", contrastive_fwd_gpu)
    monkeypatch.setattr(operator, "contrastive_bwd_cpu", contrastive_bwd_gpu)
    monkeypatch.setattr(mean, "mean_loss_cpu", mean_loss_gpu)
    monkeypatch.setattr(mean, "mean_gradients_cpu", mean_gradients_gpu)
    monkeypatch.setattr(pairs, "choose_operand", lambda *_: operand)


def in_triton(
    image: Tensor, text: Tensor, scale: Tensor, monkeypatch: pytest.MonkeyPatch, **keywords: object
) -> list[Tensor]:
    """[loss, gradients] through the Triton path, wherever the tensors are."""
    if not image.is_cuda:
        narrow = torch.float32 if image.dtype == torch.float32 else torch.float16
        in_triton_everywhere(monkeypatch, narrow)
    return with_gradients(
        lambda *x: contrastive_loss(*x, **keywords), (image, text, scale), torch.tensor(1.0)
    )


def fixed_point_ref(
    image: Tensor, text: Tensor, scale: Tensor, *, shift: float, normalize: bool, **ids: object
) -> Tensor:
    """Return the reference from cosines as a stash stores them; its derivative is that of the cosines themselves.

    The first step lies `shift` steps below the least.
    """
    if normalize:
        image, text = normalize_ref(image), normalize_ref(text)
    cosine = image @ text.T
    least = cosine.detach().min()
    step = ((cosine.detach().max() - least) / 65535).clamp(min=1e-30)
    least = least - shift * step
    stored = least + step * ((cosine.detach() - least) / step).round()
    columns = torch.eye(len(text), dtype=cosine.dtype, device=cosine.device)
    return contrastive_ref(cosine + (stored - cosine.detach()), columns, scale, **ids)


ENGINES_AND_STASHES = list(itertools.product(("library", "fused"), STASHES))
# A matrix that is kept has the bits of blocks, but reads for a running maximum that are its own.
FORMS = [*ENGINES_AND_STASHES, ("dense", 0)]
# The loss and the scale's gradient are one number each: the rule compares them over this many problems.
NUM_PROBLEMS = 6


def assert_kernels_accurate(
    problems: list[tuple[Tensor, Tensor, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    *,
    normalize: bool = True,
    ids: dict[str, object] | None = None,
    without_row: int | None = None,
    **keywords: object,
) -> None:
    """Check the rule of accuracy.

    A stash stores logits in 16 bits. For 16-bit embeddings its reference is theirs; for float32 ones it has logits in fixed
    point, 65,536 steps between the least and the greatest. Its rounding is random and the loss one number, so its error is
    the largest over four places of the steps.

    If a row is named, the gradients of all other rows also follow the rule on their own.
    """
    ids = ids or {}
    dtype = problems[0][0].dtype
    fixed_point = keywords["stash_bytes"] > 0 and dtype == torch.float32
    narrow = torch.float16 if keywords["stash_bytes"] and not fixed_point else dtype
    columns: list[list[list[Tensor]]] = [[], [], []]
    one = torch.tensor(1.0)
    for image, text, scale in problems:

        def reference(*x: Tensor) -> Tensor:
            return contrastive_ref(*x, normalize=normalize, **ids)

        columns[0].append(
            in_triton(image, text, scale, monkeypatch, normalize=normalize, **ids, **keywords)
        )
        narrow_inputs = (image.to(narrow), text.to(narrow), scale)
        references = [reference]
        if fixed_point:
            references = [
                partial(fixed_point_ref, shift=place / 4, normalize=normalize, **ids)
                for place in range(4)
            ]
        found = [with_gradients(fn, narrow_inputs, one) for fn in references]
        columns[1].append([torch.stack(tensors) for tensors in zip(*found, strict=True)])
        columns[2].append(
            with_gradients(reference, [t.double() for t in (image, text, scale)], one)
        )
    for i, name in enumerate(("loss", "image", "text", "scale")):
        actual, same_dtype, exact = (
            torch.stack([result[i] for result in column]) for column in columns
        )
        same_dtype = same_dtype.transpose(
            0, 1
        )  # the references' results first, to be compared with exact ones each
        assert_accurate(name, actual, same_dtype.to(actual.dtype), exact)
        if without_row is not None and i in (1, 2):
            others = [n for n in range(actual.shape[1]) if n != without_row]
            tensors = (actual, same_dtype.to(actual.dtype), exact)
            assert_accurate(name, *(t[..., others, :] for t in tensors))


def kernel_problems(
    B: int, G: int, E: int, dtype: torch.dtype, scale: float = 14.3
) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [
        (
            *(t.to(KERNEL_DEVICE) for t in embeddings(B, G, E, dtype=dtype)),
            torch.tensor(scale, device=KERNEL_DEVICE),
        )
        # Of few rows the reference's error is luck, as that of one number.
        for _ in range(max(NUM_PROBLEMS, 48 // B))
    ]


# Tens of problems each. A pair or two: every form at each shape and in each dtype of the interpreter, but not all three at
# once.
PROBLEMS = [
    (shape, form, dtype)
    for i, shape in enumerate([(63, 130, 40), (130, 127, 64), (1, 1, 8), (2, 3, 8)])
    for j, form in enumerate(ENGINES_AND_STASHES)
    for k, dtype in enumerate(KERNEL_DTYPES)
    if KERNEL_DEVICE == "cuda" or i < 2 or (i + j + j // 2 + k) % 2 == 0
]


@pytest.mark.parametrize(("shape", "form", "dtype"), PROBLEMS, ids=str)
def test_kernels_are_accurate(
    shape: tuple[int, int, int],
    form: tuple[str, int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problems = kernel_problems(*shape, dtype)
    assert_kernels_accurate(problems, monkeypatch, engine=form[0], stash_bytes=form[1])


@pytest.mark.parametrize(("engine", "stash_bytes"), ENGINES_AND_STASHES)
@pytest.mark.parametrize("kind", ["identical", "zero rows", "huge"])
def test_kernels_take_any_rows(
    kind: str,
    engine: str,
    stash_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    poisoned_memory: None,
) -> None:
    problems = [
        (*(t.to(KERNEL_DEVICE) for t in embeddings(40, 70, 24, kind, torch.float32)), scale)
        for _, _, scale in kernel_problems(1, 1, 8, torch.float32)[:3]
    ]
    if kind == "identical":  # one side: with both the scale's gradient is rounding alone
        problems = [(image, torch.randn_like(text), scale) for image, text, scale in problems]
    assert_kernels_accurate(problems, monkeypatch, engine=engine, stash_bytes=stash_bytes)


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize(("engine", "stash_bytes"), ENGINES_AND_STASHES)
def test_kernels_have_every_option(
    option: str, engine: str, stash_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    B, G = 37, 45
    ids = {**ids_for(OPTIONS[option], B, G, KERNEL_DEVICE), "first_label": 3}
    problems = kernel_problems(B, G, 16, torch.float32, 20.0)
    assert_kernels_accurate(problems, monkeypatch, ids=ids, engine=engine, stash_bytes=stash_bytes)


@pytest.fixture
def low_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let blocks and strips be 64 rows high, so that a few rows cross them: the interpreter takes them one at a time."""
    monkeypatch.setattr(sides, "ROW_MULTIPLE", 64)
    monkeypatch.setattr(launch_rows, "STRIP_ROWS", 64)
    # The sides of blocks are remembered.
    sides.block_sides.cache_clear()
    yield
    sides.block_sides.cache_clear()


@pytest.mark.parametrize(("engine", "stash_bytes"), FORMS)
def test_kernels_cross_blocks(
    engine: str, stash_bytes: int, monkeypatch: pytest.MonkeyPatch, low_blocks: None
) -> None:
    monkeypatch.setattr(walk_gpu, "SUM_SIDE", 128)
    assert_kernels_accurate(
        kernel_problems(140, 520, 24, torch.float32, 20.0)[:2],
        monkeypatch,
        engine=engine,
        stash_bytes=stash_bytes,
        workspace_bytes=1,
    )


@pytest.mark.parametrize(
    ("option", "stash_bytes"),
    [
        ("plain", 0),
        ("smoothed", 2**40),
        ("ignore", 2**40),
        ("ignore, smoothed", 0),
        ("positive", 0),
        ("positive, smoothed", 2**40),
    ],
)
def test_strips_away_from_the_labels_and_the_edges(
    option: str, stash_bytes: int, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    """Strips of 16 rows: of 512 columns the second is without a positive by its place, the third is cut.

    Any two of same_id, smoothing and a stash meet; all three do in test_kernels_have_every_option.
    """
    monkeypatch.setattr(launch_rows, "STRIP_ROWS", 16)
    ids = ids_for(OPTIONS[option], 40, 1040, KERNEL_DEVICE)
    problems = kernel_problems(40, 1040, 16, torch.float32, 20.0)[:3]
    how = {"engine": "library", "stash_bytes": stash_bytes}
    assert_kernels_accurate(problems, monkeypatch, ids=ids, **how)


@pytest.mark.parametrize("first_label", [513, -37])
@pytest.mark.parametrize("scale", [20.0, 300.0], ids=["one offset", "own offsets"])
def test_strips_of_several_blocks(
    scale: float,
    first_label: int,
    monkeypatch: pytest.MonkeyPatch,
    low_blocks: None,
    poisoned_memory: None,
) -> None:
    """Labels begin in any column, and at the larger scale the gradient takes each row's own offset everywhere."""
    monkeypatch.setattr(launch_rows, "STRIP_ROWS", 32)
    assert_kernels_accurate(
        kernel_problems(140, 1100, 16, torch.float32, scale)[:1],
        monkeypatch,
        ids={"first_label": first_label},
        engine="library",
        stash_bytes=0,
        workspace_bytes=1,
    )


def opposite_pairs(num_pairs: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return problems of opposite pairs at scale 400, in float16, where the logits' rounding outweighs all else."""
    problems = []
    for image, _, _ in kernel_problems(num_pairs, num_pairs, 16, torch.float16):
        image = F.normalize(image.float())
        text = -image + 0.01 * torch.randn_like(image)
        scale = torch.tensor(400.0, device=KERNEL_DEVICE)
        problems.append((image.half(), text.half(), scale))
    return problems


@pytest.mark.parametrize(("engine", "stash_bytes"), FORMS)
def test_kernels_fall_back_to_the_running_maximum(
    engine: str, stash_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"normalize": False, "engine": engine, "stash_bytes": stash_bytes}
    assert_kernels_accurate(opposite_pairs(70), monkeypatch, **how)


def test_a_running_maximum_over_blocks_reads_each_ones_texts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the default workspace the operands of all texts are made once, for two rows of blocks."""
    monkeypatch.setattr(walk_gpu, "SUM_SIDE", 128)
    how = {"normalize": False, "engine": "library", "stash_bytes": 0}
    workspace_bytes = pairs.WORKSPACE_BYTES["cuda"]
    assert_kernels_accurate(
        opposite_pairs(140)[:1], monkeypatch, workspace_bytes=workspace_bytes, **how
    )


def problems_with_an_odd_pair(dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return unit rows around one direction, found with some certainty, and one pair of opposite rows apart from all."""
    problems = []
    for _ in range(3):
        centre, *noise = (F.normalize(torch.randn(n, 64)) for n in (1, 130, 130))
        image = F.normalize(noise[0] + 1.5 * centre)
        text = F.normalize(image + 0.3 * noise[1])
        image[0], text[0] = -centre, centre
        scale = torch.tensor(100.0, device=KERNEL_DEVICE)
        problems.append((*(t.to(KERNEL_DEVICE, dtype) for t in (image, text)), scale))
    return problems


@pytest.mark.parametrize(
    ("engine", "stash_bytes", "dtype"),
    [
        ("library", 0, torch.float32),
        ("library", 0, torch.float16),
        ("library", 2**40, torch.float16),
        ("fused", 0, torch.float32),
        ("fused", 2**40, torch.float16),
        ("dense", 0, torch.float32),
    ]
    if KERNEL_DEVICE == "cpu"
    else [(*form, dtype) for form in FORMS for dtype in KERNEL_DTYPES[:2]],
    ids=str,
)
def test_an_odd_pair_leaves_the_others_accurate(
    engine: str,
    stash_bytes: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only what the offset cannot hold takes the running maximum, and from the numbers of all the rest."""
    assert_kernels_accurate(
        problems_with_an_odd_pair(dtype),
        monkeypatch,
        without_row=0,
        engine=engine,
        stash_bytes=stash_bytes,
    )


@pytest.mark.parametrize("option", ["plain", "ignore", "positive, smoothed"])
@pytest.mark.parametrize("stash_bytes", STASHES)
def test_an_odd_pair_leaves_the_others_accurate_on_the_cpu(option: str, stash_bytes: int) -> None:
    problems = [[t.cpu() for t in inputs] for inputs in problems_with_an_odd_pair(torch.float32)]
    ids = ids_for(OPTIONS[option], 130, 130)
    results: list[list[list[Tensor]]] = [[], [], []]
    for inputs in problems:

        def loss(*x: Tensor) -> Tensor:
            return contrastive_loss(*x, normalize=False, stash_bytes=stash_bytes, **ids)

        def reference(*x: Tensor) -> Tensor:
            return contrastive_ref(*x, **ids)

        one = torch.tensor(1.0)
        results[0].append(with_gradients(loss, inputs, one))
        results[1].append(with_gradients(reference, inputs, one))
        results[2].append(with_gradients(reference, [t.double() for t in inputs], one))
    for i, name in enumerate(("loss", "image", "text", "scale")):
        tensors = [torch.stack([found[i] for found in column]) for column in results]
        assert_accurate(name, *tensors)
        if i in (1, 2):
            assert_accurate(name, *(t[:, 1:] for t in tensors))


def test_trusted_rows_keep_their_bits_beside_an_odd_one() -> None:
    """Another sum is too small for the offset: whatever is not of that row is what it would be without."""
    image, text, scale = (t.cpu() for t in problems_with_an_odd_pair(torch.float32)[0])
    # In blocks of rows, so that products are the same; the odd row is a block of its own.
    settings = {"normalize": False, "workspace_bytes": 1, "stash_bytes": 0}
    alone, together = (
        contrastive_terms(image[first:], text, scale, first_label=first, **settings).row_lse_B
        for first in (1, 0)
    )
    assert torch.equal(together[1:], alone) and together[0].isfinite()


@pytest.mark.parametrize(("engine", "stash_bytes"), ENGINES_AND_STASHES)
def test_kernels_keep_nan(engine: str, stash_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = (t.to(KERNEL_DEVICE) for t in unit_embeddings(9, 9, 16))
    image[3, 2] = torch.nan
    loss = in_triton(
        *(image, text, torch.tensor(20.0, device=KERNEL_DEVICE), monkeypatch),
        engine=engine,
        stash_bytes=stash_bytes,
    )[0]
    assert loss.isnan()


@pytest.mark.skipif(KERNEL_DEVICE == "cuda", reason="a GPU has one architecture, and its tests")
@pytest.mark.parametrize(
    ("option", "dtype", "architecture"),
    [
        ("plain", torch.float32, 80),
        ("positive", torch.float16, 80),
        ("plain", torch.float16, 90),
        ("positive", torch.float32, 90),
        ("plain", torch.float32, 100),
        ("positive", torch.float16, 100),
    ],
    ids=str,
)
def test_a_stash_is_read_as_every_architecture_wrote_it(
    option: str, dtype: torch.dtype, architecture: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiles that write a stash differ, and each has a range of its own; across blocks. Any two settings meet."""
    monkeypatch.setattr(launch, "architecture", lambda device: architecture)
    monkeypatch.setattr(walk_gpu, "SUM_SIDE", 128)
    assert_kernels_accurate(
        kernel_problems(70, 200, 32, dtype, 20.0)[:2],
        monkeypatch,
        ids=ids_for(OPTIONS[option], 70, 200),
        engine="fused",
        stash_bytes=2**40,
        workspace_bytes=4 * 256 * 256,
    )


@pytest.mark.parametrize("same_id", ["ignore", "positive"])
def test_ids_may_be_a_column_of_a_table(same_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, scale = kernel_problems(20, 20, 16, torch.float32)[0]
    ids = torch.stack([torch.arange(20) // 3, torch.arange(20)], 1).to(KERNEL_DEVICE)[:, 0]
    strided, whole = (
        in_triton(
            *(image, text, scale, monkeypatch), image_ids=each, text_ids=each, same_id=same_id
        )
        for each in (ids, ids.contiguous())
    )
    assert all(torch.equal(a, b) for a, b in zip(strided, whole, strict=True))


# Gradients at scale 100 from operands of 16 bits: the N at which the requirement is stated on a GPU, a smaller one here.
NUM_PRECISE = 8192 if KERNEL_DEVICE == "cuda" else 256
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 6e-3}


def pairs_found(num_pairs: int, width: int, accuracy: float) -> tuple[Tensor, Tensor]:
    """Random unit rows whose pairs have the cosine at which that share of the images finds its text; 0 for no relation."""
    image, noise = (F.normalize(torch.randn(num_pairs, width)) for _ in range(2))
    if accuracy == 0:
        return image, noise
    low, high = 0.0, 1.0
    for _ in range(12):
        cosine = (low + high) / 2
        text = F.normalize(cosine * image + (1 - cosine**2) ** 0.5 * noise)
        found = (image @ text.T).argmax(1) == torch.arange(num_pairs)
        low, high = (cosine, high) if found.float().mean() < accuracy else (low, cosine)
    return image, text


@pytest.mark.parametrize("operand", KERNEL_DTYPES[1:], ids=str)
@pytest.mark.parametrize("accuracy", [0.0, 0.97])
@pytest.mark.parametrize("stash_bytes", STASHES)
def test_gradients_of_16_bit_operands_at_scale_100(
    operand: torch.dtype,
    accuracy: float,
    stash_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Relative error of both embedding gradients; operands of a GPU's library engine.

    Not bfloat16 in the interpreter, which cuts it off instead of rounding it.
    """
    image, text = pairs_found(NUM_PRECISE, 768, accuracy)
    scale = torch.tensor(100.0)
    exact = with_gradients(
        contrastive_loss, [t.double() for t in (image, text, scale)], scale / 100
    )
    if KERNEL_DEVICE == "cpu":
        in_triton_everywhere(monkeypatch, operand)
    actual = with_gradients(
        lambda *x: contrastive_loss(
            *x, stash_bytes=stash_bytes, operand_dtype=operand, engine="library"
        ),
        [t.to(KERNEL_DEVICE) for t in (image, text, scale)],
        torch.tensor(1.0),
    )
    for ours, theirs in zip(actual[1:3], exact[1:3], strict=True):
        error = torch.linalg.vector_norm(ours.cpu().double() - theirs) / theirs.norm()
        assert error.item() <= LIMITS[operand]


# 3. Ahead of time.


def aot_launches() -> None:
    """Every row of the launch table, with and without a stash, ids and spread targets."""

    for operand, engine, stash, option in [
        (torch.float16, "library", False, "plain"),
        (torch.float16, "library", True, "plain"),
        (torch.float32, "library", False, "plain"),
        (torch.float16, "library", False, "ignore, smoothed"),
        (torch.float16, "library", True, "ignore"),
        (torch.float16, "fused", False, "plain"),
        (torch.bfloat16, "fused", True, "plain"),
        (torch.float16, "fused", False, "positive, smoothed"),
        (torch.float16, "fused", True, "ignore"),
        (torch.float32, "fused", False, "plain"),
        (torch.float16, "dense", False, "plain"),
    ]:
        B, G = 1000, 2000
        dtype = torch.float32 if operand == torch.float32 else torch.bfloat16
        image, text = (torch.empty(rows, 512, dtype=dtype, device="meta") for rows in (B, G))
        keywords = ids_for(OPTIONS[option], B, G, "meta")
        ids = keywords.get("image_ids"), keywords.get("text_ids")
        same_id = keywords.get("same_id", "ignore")
        which, targets = Pairs(ids[0], ids[1], 0, same_id), None
        if option not in ("plain", "ignore"):
            targets = uniform_targets(image, text, which, 0.1)
        scale = torch.empty((), device="meta")
        problem = LossInputs(image, text, scale, which, False, operand, engine, 576 * 10**6)
        outputs = contrastive_fwd_gpu(problem, targets, stash)
        upstream = [
            *outputs.logarithms[:2],
            outputs.row_target_log2_B,
            outputs.column_target_log2_G,
        ]
        contrastive_bwd_gpu(problem, targets, upstream, outputs, (True, True))
        weights = list(targets[::2]) if option.startswith("positive") else []
        loss, counts = mean_loss_gpu(upstream, weights, 0, torch.float32)
        mean_gradients_gpu(loss, counts, weights, (B, G), 0)


def test_ahead_of_time_without_spills_in_the_memory_there_is() -> None:
    assert_compiled_well(compiled("test_contrastive"))


def test_ahead_of_time_the_fused_kernels_have_matrix_instructions() -> None:
    """On sm_100 they are the older ones, as the launch table says, and are not counted."""
    for kernel in compiled("test_contrastive"):
        fused = "GROUP_N" in kernel.constants and "fp32" not in kernel.operand
        if fused and kernel.architecture < 100:
            assert kernel.matrix_instructions > 0, str(kernel)


def test_ahead_of_time_two_fused_programs_fit_on_a_processor_of_hopper() -> None:
    """While one is in its epilogue the other multiplies. Without ids and spread targets, whose kernels would spill."""
    fused = [
        kernel
        for kernel in compiled("test_contrastive")
        if kernel.architecture == 90
        and "GROUP_N" in kernel.constants
        and "fp32" not in kernel.operand
        and kernel.constants["IDS"] == "none"
    ]
    assert fused and all(kernel.programs_on_a_processor >= 2 for kernel in fused)


# The public functions.


@pytest.mark.parametrize("engine", ["cpu", "library", "fused"])
def test_same_bits_every_time(
    engine: str, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    """One row takes the running maximum; memory that nobody wrote is NaN."""
    device, settings = "cpu", {}
    if engine != "cpu":
        in_triton_everywhere(monkeypatch, torch.float32)
        device, settings = KERNEL_DEVICE, {"engine": engine, "stash_bytes": 2**40}
    num_pairs = 700 if device == engine else 150
    inputs = [t.to(device) for t in (*unit_embeddings(num_pairs, num_pairs, 64), ONE * 100)]
    inputs[0][0], inputs[1][0] = -inputs[0][1:].mean(0), inputs[0][1:].mean(0)

    def loss(*x: Tensor) -> Tensor:
        return contrastive_loss(*x, **settings)

    first = with_gradients(loss, inputs, ONE)
    assert all(found.isfinite().all() for found in first)
    # The interpreter has one order; a GPU's programs have many.
    for _ in range(10 if device == "cuda" else 3):
        again = with_gradients(loss, inputs, ONE)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_stash_changes_no_bit_on_the_cpu() -> None:
    inputs = (*unit_embeddings(300, 200, 32), torch.tensor(50.0))
    stashed, recomputed = (
        with_gradients(
            lambda *x, s=stash: contrastive_loss(*x, stash_bytes=s), inputs, torch.tensor(1.0)
        )
        for stash in (2**40, 0)
    )
    assert all(torch.equal(a, b) for a, b in zip(stashed, recomputed, strict=True))


@pytest.mark.parametrize("frozen", ["image", "text", "scale", "both"])
@pytest.mark.parametrize("stash_bytes", STASHES)
@pytest.mark.parametrize("device", DEVICES)
def test_only_what_is_asked_for_is_computed(device: str, stash_bytes: int, frozen: str) -> None:
    """A locked tower costs a product less: 3 of 4, with a stash 2 of 3."""
    inputs = [t.to(device) for t in (*unit_embeddings(40, 30, 16), torch.tensor(20.0))]

    def loss(*x: Tensor) -> Tensor:
        return contrastive_loss(*x, stash_bytes=stash_bytes)

    full = with_gradients(loss, inputs, ONE)[1:]
    same_dtype = with_gradients(lambda *x: contrastive_ref(*x, normalize=True), inputs, ONE)[1:]
    exact = with_gradients(
        lambda *x: contrastive_ref(*x, normalize=True), [t.double() for t in inputs], ONE
    )[1:]
    leaves = [
        t.clone().requires_grad_(name != frozen and (frozen != "both" or name == "scale"))
        for name, t in zip(("image", "text", "scale"), inputs, strict=True)
    ]
    with Products() as products:
        loss(*leaves).backward()
    on_cpu_at_least_one = int(frozen == "both" and device == "cpu")  # the scale's gradient there
    sides = {"scale": 2, "both": on_cpu_at_least_one}.get(frozen, 1)
    assert products.count == (1 if stash_bytes else 2) + sides
    for leaf, *expected in zip(leaves, full, same_dtype, exact, strict=True):
        assert (leaf.grad is None) == (not leaf.requires_grad)
        if leaf.grad is not None and device == "cpu":
            assert_accurate("one of some", leaf.grad, *expected[1:])
        elif leaf.grad is not None:
            assert torch.equal(leaf.grad, expected[0])


@pytest.mark.fast
def test_zero_rows_have_gradient_zero_and_no_effect_on_others() -> None:
    image, text = embeddings(20, 20, 8, dtype=torch.float32)
    image[4] = 0
    loss, d_image, d_text, _ = with_gradients(
        contrastive_loss, (image, text, torch.tensor(30.0)), torch.tensor(1.0)
    )
    assert loss.isfinite() and (d_image[4] == 0).all() and d_text.isfinite().all()


@pytest.mark.fast
def test_nothing_of_n_by_n_is_held() -> None:
    """The largest tensor that the loss makes is a block of the workspace or an embedding."""
    num_pairs, width, workspace_bytes = 4096, 32, 2**20
    image, text = (t.requires_grad_() for t in unit_embeddings(num_pairs, num_pairs, width))
    passes = (operator.contrastive_fwd_cpu, operator.contrastive_bwd_cpu)
    with LargestStorage.inside(operator, *(fn.__name__ for fn in passes)) as largest:
        contrastive_loss(
            image, text, 20.0, stash_bytes=0, workspace_bytes=workspace_bytes
        ).backward()
        limit = max(workspace_bytes, num_pairs * width * 4)
        assert 0 < largest.bytes <= limit
        contrastive_loss(image, text, 20.0, stash_bytes=2**40, workspace_bytes=workspace_bytes)
    assert (
        largest.bytes == 4 * num_pairs**2 > limit
    )  # a stash is seen, and so would be what is not meant to be


def test_no_block_is_held_while_the_running_maximum_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    num_pairs = 256
    image, text = unit_embeddings(num_pairs, num_pairs, 16)
    image, text = image.float().to(KERNEL_DEVICE), text.float().to(KERNEL_DEVICE)
    scale, which = torch.tensor(20.0, device=KERNEL_DEVICE), Pairs(None, None, 0, "ignore")
    inputs = LossInputs(image, text, scale, which, False, torch.float32, "library", 2**20)
    original, alive = gpu.running_max_gpu, []

    def watched(*arguments: object) -> object:
        gc.collect()  # of what the interpreter leaves in circles
        alive.append(storages.alive_bytes)
        return original(*arguments)

    monkeypatch.setattr(gpu, "running_max_gpu", watched)
    with LiveStorages() as storages:
        contrastive_fwd_gpu(inputs, None, False)
    assert 0 < alive[0] < 4 * num_pairs**2 <= storages.peak_bytes


@pytest.mark.fast
@pytest.mark.parametrize("num_pairs", [2048, 4096])
def test_what_is_held_grows_with_the_pairs_and_not_their_square(num_pairs: int) -> None:
    """All tensors that are alive at once, without a stash: the workspace, the gradients, an operand of each side, sums."""
    width, workspace_bytes = 32, 2**20
    image, text = (t.requires_grad_() for t in unit_embeddings(num_pairs, num_pairs, width))
    passes = (operator.contrastive_fwd_cpu, operator.contrastive_bwd_cpu)
    with LiveStorages.inside(operator, *(fn.__name__ for fn in passes)) as live:
        contrastive_loss(
            image, text, 20.0, stash_bytes=0, workspace_bytes=workspace_bytes
        ).backward()
    fixed = workspace_bytes + 2 * walk_cpu.CHUNK_BYTES
    linear = 3 * (image.nbytes + text.nbytes) + 12 * 8 * 2 * num_pairs
    assert workspace_bytes < live.peak_bytes <= fixed + linear < 4 * num_pairs**2


@pytest.mark.fast
def test_the_plan_says_what_it_chose_and_why() -> None:
    image, text = unit_embeddings(64, 128, 8)
    assert plan(image, text).stash and not plan(image, text, backward=False).stash
    tight = plan(image, text, stash_bytes=64 * 128 * 4 - 1)
    assert not tight.stash
    assert "64 x 128 x 8 on cpu: recompute, 4 products in float32, library engine" in str(tight)
    assert "fits the budget of 1,024.0 MiB" in str(plan(image, text))


def test_float32_on_a_gpu_has_a_stash_of_16_bits_only_where_it_is_asked_for() -> None:
    with FakeTensorMode():
        image, text = (torch.empty(64, 8, device="cuda") for _ in range(2))
        assert not plan(image, text, engine="library").stash
        assert plan(image, text, engine="library", stash_bytes=2**20).stash
        assert plan(image.half(), text, engine="library", operand_dtype=torch.float16).stash


def test_a_small_matrix_on_a_gpu_is_kept_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "architecture", lambda _: 90)
    with FakeTensorMode():
        image, text, more = (torch.empty(n, 8, device="cuda") for n in (4096, 4000, 4097))
        chosen = plan(image, text)
        assert chosen.engine == "dense" and not chosen.stash
        assert chosen.kept_bytes == 4096 * 4000 * 4 < 64 * 2**20
        assert "dense, 3 products in float32; up to 4,096 rows and columns" in str(chosen)
        # Not where nobody needs it, where it is large, or where something else is asked for.
        for other in (
            plan(image, text, backward=False),
            plan(image, more),
            plan(more, text),
            plan(image, text, stash_bytes=0),
            plan(image, text, stash_bytes=2**40),
            plan(image, text, engine="library"),
        ):
            assert other.engine == "library"
        assert plan(image, text, stash_bytes=0).kept_bytes == 0

        recomputed = plan(image, text, stash_bytes=0)

    # The loss counts it where it counts a stash.
    held = []
    for answer in (chosen, recomputed):
        monkeypatch.setattr(clip, "plan", lambda *_, answer=answer, **__: answer)
        held.append(ClipLoss().memory_bytes(*unit_embeddings(4, 4, 8)))
    assert held[0] - held[1] == chosen.kept_bytes


@pytest.mark.parametrize("dtype", KERNEL_DTYPES[:2], ids=str)
@pytest.mark.parametrize("option", ["plain", "ignore", "positive, smoothed"])
def test_the_dense_form_has_the_numbers_of_blocks(
    option: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    """To the last bit where the matrix is one block, as its kernels are the same; G is odd, so that rows are padded."""
    image, text, scale = kernel_problems(70, 101, 32, dtype)[0]
    ids = ids_for(OPTIONS[option], 70, 101, KERNEL_DEVICE)
    with Products() as products:
        dense = in_triton(image, text, scale, monkeypatch, engine="dense", **ids)
    assert products.count == 3
    blocks = in_triton(*(image, text, scale, monkeypatch), engine="library", stash_bytes=0, **ids)
    assert all(torch.equal(a, b) for a, b in zip(dense, blocks, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    image, text = (t.to(device).requires_grad_() for t in unit_embeddings(9, 9, 16))
    scale = torch.tensor(20.0, device=device, requires_grad=True)
    operand = torch.float32
    arguments = (image, text, scale, None, None, [], 0, "ignore", True, operand, "library", 2**20)
    for stash in (False, True):
        torch.library.opcheck(torch.ops.clipcore.contrastive_fwd, (*arguments, stash))
    columns = torch.randn(16, 9, device=device).T, text  # rows that are no rows in memory
    terms = torch.ops.clipcore.contrastive_fwd(*columns, *arguments[2:], False)
    with torch.no_grad():
        inputs = [t.detach() for t in (*columns, scale)]
        saved = [t.detach() for t in terms]
        upstream = [torch.ones_like(saved[i]) for i in operator._TERMS]
        for need in ((True, True), (True, False)):
            torch.library.opcheck(
                torch.ops.clipcore.contrastive_bwd,
                (upstream, saved, *inputs, *arguments[3:], *need),
                test_utils=("test_schema", "test_faketensor"),
            )


def test_inductor_compiles_features_that_are_transposed() -> None:
    """Its code trusts the strides that the operators promise."""
    image, text = torch.randn(16, 9), torch.randn(9, 16)

    def loss(image: Tensor, text: Tensor) -> Tensor:
        rows = image.T * 1.5
        return contrastive_loss(rows, text, 5.0) + sigmoid_loss(rows, text, 5.0, -3.0)

    expected = with_gradients(loss, (image, text), ONE)
    actual = with_gradients(torch.compile(loss, fullgraph=True), (image, text), ONE)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_accurate("compiled", ours, theirs, theirs.double())


def test_dtypes_may_differ() -> None:
    """The wider one counts, for each side's gradient as well."""
    image, text = embeddings(9, 9, 16)
    scale = torch.tensor(5.0, dtype=torch.float64)
    exact = with_gradients(
        lambda *x: contrastive_ref(*x, normalize=True), (image, text.float().double(), scale), ONE
    )
    found = with_gradients(contrastive_loss, (image, text.float(), scale), ONE)
    assert found[0].dtype == torch.float64 and found[2].dtype == torch.float32
    assert_exact([*found[:2], found[3]], [*exact[:2], exact[3]])


def test_forward_mode_is_refused() -> None:
    """An operator without it would answer a tangent of zero."""
    image, text = unit_embeddings(4, 4, 8)
    for loss in (
        lambda x: contrastive_loss(x, text, 5.0),
        lambda x: sigmoid_loss(x, text, 5.0, -1.0),
    ):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(loss, (image,), (image,))


def test_no_equal_ids_give_nan() -> None:
    image, text = unit_embeddings(4, 4, 8)
    ids = {"image_ids": torch.arange(4), "text_ids": torch.arange(4) + 4}
    assert contrastive_loss(image, text, 5.0, same_id="positive", **ids).isnan()


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operator makes the tensors' GPU the current one."""
    seen = []

    @contextlib.contextmanager
    def watched(device: torch.device) -> Iterator[None]:
        seen.append(device)
        yield

    monkeypatch.setattr(launch, "on_device", watched)
    image, text = (t.requires_grad_() for t in unit_embeddings(4, 4, 8))
    contrastive_loss(image, text, 5.0).backward()
    sigmoid_loss(image, text, 5.0, -1.0)
    # The terms, their mean and the gradients of both; the other loss.
    assert seen == [image.device] * 5
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "device", lambda device: seen.append(device))
    launch.on_device(torch.device("cuda", 1))
    assert seen[-1] == torch.device("cuda", 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("option", ["plain", "positive, smoothed"])
def test_compiles_into_one_graph_with_equal_results(device: str, option: str) -> None:
    inputs = [t.to(device) for t in (*unit_embeddings(9, 9, 16), torch.tensor(3.0))]
    keywords = ids_for(OPTIONS[option], 9, 9, device)

    def loss(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
        return contrastive_loss(image, text, log_scale.exp(), **keywords)

    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = with_gradients(loss, inputs, torch.tensor(1.0))
    actual = with_gradients(whole, inputs, torch.tensor(1.0))
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_counts_equal_ids() -> None:
    ids, others = torch.tensor([5, 1, 7, 5]), torch.tensor([5, 5, 2, 1])
    assert count_equal(ids, others).tolist() == [2, 1, 0, 2]


@pytest.mark.parametrize("G", [0, 3])
@pytest.mark.parametrize("engine", ["cpu", "library", "fused"])
def test_an_empty_shard(G: int, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its columns have no sum yet, and gradients of zero."""
    if engine != "cpu":
        in_triton_everywhere(monkeypatch, torch.float32)
    device = "cpu" if engine == "cpu" else KERNEL_DEVICE
    image = torch.empty(0, 4, device=device, requires_grad=True)
    text = torch.randn(G, 4, device=device, requires_grad=True)
    scale = torch.tensor(10.0, device=device, requires_grad=True)
    terms = contrastive_terms(image, text, scale, engine=None if engine == "cpu" else engine)
    assert terms.row_lse_B.shape == (0,) and (terms.column_lse_G == -torch.inf).all()
    torch.autograd.backward(terms[:2], [torch.zeros_like(term) for term in terms[:2]])
    assert image.grad.shape == (0, 4) and (text.grad == 0).all() and scale.grad == 0


@pytest.mark.parametrize("engine", ["cpu", "library", "fused"])
def test_a_row_that_ids_leave_nothing_of(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An extra image whose id all texts have is no negative of any of them."""
    if engine != "cpu":
        in_triton_everywhere(monkeypatch, torch.float32)
    device = "cpu" if engine == "cpu" else KERNEL_DEVICE
    inputs = [t.to(device) for t in (*unit_embeddings(4, 3, 8), torch.tensor(5.0))]
    image_ids, text_ids = (torch.zeros(n, dtype=torch.int64, device=device) for n in (4, 3))
    keywords = {"image_ids": image_ids, "text_ids": text_ids}
    actual = with_gradients(
        lambda *x: contrastive_loss(*x, engine=None if engine == "cpu" else engine, **keywords),
        inputs,
        torch.tensor(1.0),
    )
    # Each pair is alone: nothing to lose, nothing to learn, but for the rounding of exponents up to 8, times the scale.
    for tensor in actual:
        assert tensor.abs().max() <= 5 * 2.0**-20


@pytest.mark.fast
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"first_label": 9}, "first_label 9"),
        ({"same_id": "drop"}, "same_id"),
        ({"engine": "fast"}, "engine"),
        ({"image_ids": torch.arange(4)}, "both or none"),
        ({"image_ids": torch.arange(4), "text_ids": torch.arange(3)}, r"text_ids has to be int64"),
        ({"operand_dtype": torch.int8}, "operand_dtype"),
        ({"scale": torch.ones(2)}, "scale has to be"),
    ],
)
def test_a_wrong_argument_is_named(keywords: dict[str, object], message: str) -> None:
    image, text = unit_embeddings(4, 4, 8)
    with pytest.raises(ValueError, match=message):
        contrastive_loss(image, text, **{"scale": 1.0, **keywords})
