"""A run that stands at the loss of guessing without a gradient is named; one that learns, or has not begun to, is not."""

from __future__ import annotations

import math

import pytest
import torch

from clipcore.kernels.contrastive import contrastive_ref
from clipcore.kernels.sigmoid import sigmoid_ref
from clipcore.run.collapse import NUM_STEPS, CollapseWatch, loss_of_guessing

pytestmark = pytest.mark.fast

LEVEL = math.log(256)


def watch_of(rows: list[tuple[float, float]], warmup: int = 3) -> tuple[CollapseWatch, list[str]]:
    """Return a watch that has seen (loss, gradient) of steps 1, 2, ..., and its messages."""
    watch = CollapseWatch(256, is_sigmoid=False, warmup=warmup)
    said = [watch.see(step, *row) for step, row in enumerate(rows, start=1)]
    return watch, [line for line in said if line is not None]


@pytest.mark.parametrize("num_pairs", [2, 7, 64])
def test_the_loss_of_guessing_is_that_of_equal_features(num_pairs):
    image, text = (torch.ones(num_pairs, 4, dtype=torch.float64) for _ in range(2))
    found = contrastive_ref(image, text, torch.tensor(100.0, dtype=torch.float64))
    assert found.item() == pytest.approx(loss_of_guessing(num_pairs, False), rel=1e-12)

    bias = torch.tensor(0.0, dtype=torch.float64)
    logit = torch.tensor(-math.log(num_pairs - 1), dtype=torch.float64)
    equal = torch.zeros(num_pairs, 4, dtype=torch.float64)
    loss = sigmoid_ref(equal, equal, torch.tensor(1.0, dtype=torch.float64), bias + logit)
    assert loss.item() == pytest.approx(loss_of_guessing(num_pairs, True), rel=1e-12)
    for other in (logit - 0.01, logit + 0.01):  # the least of all equal logits
        worse = sigmoid_ref(equal, equal, torch.tensor(1.0, dtype=torch.float64), other)
        assert worse > loss


def test_a_collapse_is_said_once_and_stays_on_the_page():
    rows = [(6.1, 4.0), (5.8, 3.0), (5.6, 2.0), *[(LEVEL + 1e-3, 0.05)] * 40]
    watch, said = watch_of(rows)
    assert len(said) == 1 and said[0].startswith(f"step {3 + NUM_STEPS}: the run has collapsed: ")
    assert "ln(256), 5.545 since step 4, with a gradient of 0.05 where 3 was usual" in said[0]
    assert "start again with a lower --lr, --grad-clip-norm 1 or a longer --warmup" in said[0]
    assert watch.is_collapsed and [(c.first, c.last) for c in watch.collapses] == [(4, 43)]


def test_a_run_that_comes_out_of_it_says_so():
    rows = [(6.0, 4.0), *[(LEVEL, 0.01)] * 30, (5.2, 1.0), *[(LEVEL, 0.01)] * 30]
    watch, said = watch_of(rows, warmup=0)
    assert [line.partition(": ")[0] for line in said] == ["step 21", "step 32", "step 52"]
    assert said[1] == "step 32: the loss has left ln(256), 5.545, where it stood since step 2"
    first, second = map(watch.describe, watch.collapses)
    assert "had collapsed" in first and "from step 2 to 31" in first and "start again" not in first
    assert "has collapsed" in second and "since step 33" in second


@pytest.mark.parametrize("grad_norm", [math.inf, math.nan, 3.0])
def test_a_gradient_that_comes_and_goes_ends_no_collapse(grad_norm):
    rows = [(6.0, 4.0), *[(LEVEL, 0.01)] * 30, (LEVEL, grad_norm), *[(LEVEL, 0.01)] * 30]
    watch, said = watch_of(rows, warmup=0)
    assert len(said) == 1 and len(watch.collapses) == 1 and watch.is_collapsed


def test_a_gradient_that_sinks_slowly_is_measured_by_what_it_was():
    sinking = [8.0, 8.0, 1.5, 1.2, 1.0, 0.9, 0.7, 0.5, 0.3, 0.2, *[0.05] * 100]
    rows = [(6.0, 8.0), (6.0, 8.0), *((LEVEL, grad_norm) for grad_norm in sinking)]
    watch, said = watch_of(rows, warmup=2)
    assert len(said) == 1 and [c.usual for c in watch.collapses] == [8.0]


@pytest.mark.parametrize(("num_steps", "is_said"), [(4, False), (5, True), (19, True), (30, True)])
def test_a_run_that_ends_in_a_collapse_says_so(num_steps, is_said):
    watch, _ = watch_of([(6.0, 4.0), *[(LEVEL, 0.01)] * num_steps], warmup=0)
    said = watch.end()
    assert (said is not None and "has collapsed" in said) == is_said == (len(watch.collapses) == 1)


def test_the_remedy_is_none_that_the_run_has_taken():
    watch = CollapseWatch(256, is_sigmoid=False, warmup=0, is_clipped=True)
    for step, (loss, grad_norm) in enumerate([(6.0, 4.0), *[(LEVEL, 0.01)] * 30], 1):
        watch.see(step, loss, grad_norm)
    said = watch.end()
    assert said is not None and said.endswith("start again with a lower --lr or a longer --warmup")


def test_a_few_spikes_are_not_what_is_usual():
    """Of a run that has not begun to learn: its gradient is a tenth of a spike."""
    rows = [(5.0, 50.0) if step % 40 == 7 else (LEVEL, 1.0) for step in range(200)]
    assert watch_of(rows)[1] == []


@pytest.mark.parametrize(
    "rows",
    [
        [(LEVEL, 1.0)] * 100,  # has not begun to learn
        [(5.0, 1.0), *[(4.0, 0.01)] * 100],  # has learned
        [(6.0, 1.0), *[(LEVEL, 0.01)] * (NUM_STEPS - 1), (5.0, 1.0)] * 5,
        [(6.0, math.inf), *[(LEVEL, math.nan)] * 100],
        [(math.nan, 1.0)] * 100,
        [(LEVEL, 0.0)] * 100,  # never had one
    ],
)
def test_other_runs_are_left_alone(rows):
    watch, said = watch_of(rows)
    assert said == [] and watch.collapses == [] and not watch.is_collapsed


def test_a_batch_of_one_pair_has_no_loss_to_learn_from():
    watch = CollapseWatch(1, is_sigmoid=False, warmup=0)
    assert [watch.see(step, 0.0, 0.0) for step in range(100)] == [None] * 100


def test_nothing_is_said_in_the_warm_up():
    rows = [(6.0, 1.0), *[(LEVEL, 0.01)] * 100]
    assert watch_of(rows, warmup=200)[1] == []
    late = [(6.0, 1.0)] * 50 + [(LEVEL, 0.01)] * 100
    assert watch_of(late, warmup=50)[1][0].startswith(f"step {50 + NUM_STEPS}: ")


def test_a_resumed_run_knows_the_steps_before():
    whole = CollapseWatch(256, is_sigmoid=False, warmup=0)
    resumed = CollapseWatch(256, is_sigmoid=False, warmup=0)
    losses = [(6.0, 4.0), *[(LEVEL, 0.01)] * 40]
    rows = [{"step": i, "loss": loss, "grad_norm": g} for i, (loss, g) in enumerate(losses, 1)]
    rows.insert(3, {"step": 3, "loss": LEVEL, "grad_norm": None})
    whole.see_all(rows)
    resumed.see_all(rows[:12])
    resumed.see_all(rows[12:])
    assert whole.collapses == resumed.collapses and whole.is_collapsed
