"""The log of a run: what is written, what a resumed run keeps, and what the reporters receive."""

from __future__ import annotations

import json
import math
import sys
from types import ModuleType
from typing import Any

import pytest

from clipcore.logbook import Logbook, read_metrics

pytestmark = pytest.mark.fast


def row(step: int, **values: float) -> dict[str, Any]:
    return {"step": step, "loss": 1.5, "lr": 1e-3, "logit_scale": 14.3, **values}


def test_a_resumed_log_drops_the_lines_after_its_checkpoint(tmp_path):
    with Logbook(tmp_path, num_steps=3, quiet=True) as log:
        log.step(row(1), num_pairs=8)
        size = log.sync()
        log.step(row(2), num_pairs=8)
        before = log.elapsed_s
    with Logbook(
        tmp_path, num_steps=3, first_step=1, size_bytes=size, elapsed_s=before, quiet=True
    ) as log:
        log.step(row(2, loss=0.5), num_pairs=8)
        log.evaluation({"step": 2, "task": "unseen", "acc1": 0.25}, ["acc1"])
    steps, evaluations = read_metrics(tmp_path)
    assert [(r["step"], r["loss"]) for r in steps] == [(1, 1.5), (2, 0.5)]
    assert evaluations == [{"step": 2, "task": "unseen", "acc1": 0.25}]
    assert steps[1]["time_s"] >= round(before, 3)


def test_a_log_that_went_missing_is_begun_anew(tmp_path):
    with Logbook(tmp_path, num_steps=2, first_step=1, size_bytes=500, quiet=True) as log:
        log.step(row(2), num_pairs=8)
    assert [r["step"] for r in read_metrics(tmp_path)[0]] == [2]


def test_lines_are_json_without_infinities_and_as_often_as_asked(tmp_path):
    with Logbook(tmp_path, num_steps=4, quiet=True) as log:
        for step in range(1, 5):
            log.step(row(step, grad_norm=math.inf), num_pairs=8, every=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [(r["step"], r["grad_norm"]) for r in parsed] == [(2, None), (4, None)]


def test_tensorboard_keeps_the_step_that_is_resumed_at(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    size = 0
    for first in (0, 2):  # the step after the checkpoint is made twice, differently
        with Logbook(
            tmp_path,
            num_steps=3,
            first_step=first,
            size_bytes=size,
            reporters=["tensorboard"],
            quiet=True,
        ) as log:
            for step in range(first + 1, 4):
                log.step(row(step, loss=step + first / 10), num_pairs=8)
                size = log.sync() if step == 2 else size
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    told = [(event.step, round(event.value, 3)) for event in events.Scalars("train/loss")]
    assert told == [(1, 1.0), (2, 2.0), (3, 3.2)]


def test_weights_and_biases_receives_every_figure(tmp_path, monkeypatch):
    calls: dict[str, list[Any]] = {"init": [], "log": [], "finish": []}

    class Run:
        def log(self, scalars: dict[str, float], step: int) -> None:
            calls["log"].append((step, scalars))

        def finish(self) -> None:
            calls["finish"].append(True)

    module = ModuleType("wandb")
    module.init = lambda **settings: calls["init"].append(settings) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = {"wandb_project_name": "letters", "lr": 1e-3}
    run_dir = tmp_path / "mine"
    run_dir.mkdir()
    with Logbook(run_dir, num_steps=1, reporters=["wandb"], config=config, quiet=True) as log:
        log.step(row(1, grad_norm=math.nan), num_pairs=8)
        log.evaluation({"step": 1, "task": "unseen", "acc1": 0.25}, ["acc1"])
    assert len(calls["init"]) == len(calls["finish"]) == 1
    settings = calls["init"][0]
    # A resumed run goes on in the same curve: the id is the run's own, and may exist.
    assert (settings["id"], settings["resume"], settings["project"]) == ("mine", "allow", "letters")
    (first, train), (second, unseen) = calls["log"]
    assert (first, second) == (1, 1) and unseen == {"unseen/acc1": 0.25}
    assert (
        train["train/loss"] == 1.5 and "train/grad_norm" not in train and "train/step" not in train
    )


@pytest.mark.parametrize("reporter", ["tensorboard", "wandb"])
def test_a_missing_reporter_names_the_extra(reporter, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=rf'pip install "clipcore\[{reporter}\]"'):
        Logbook(tmp_path, num_steps=1, reporters=[reporter], quiet=True)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_other_ranks_write_nothing(tmp_path, capsys):
    with Logbook(None, num_steps=1) as log:
        log.step(row(1), num_pairs=8)
        log.say("nothing")
        assert log.sync() == 0
    assert capsys.readouterr() == ("", "") and not any(tmp_path.iterdir())
