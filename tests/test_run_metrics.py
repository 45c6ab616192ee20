"""The log of a run: what is written, what a resumed run keeps, and what the reporters receive."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from clipcore.run.metrics import (
    LogError,
    LogMark,
    MetricsLogger,
    compare_log,
    read_metrics,
    set_log_aside,
)

pytestmark = pytest.mark.fast


def row(step: int, **values: float) -> dict[str, Any]:
    return {"step": step, "loss": 1.5, "lr": 1e-3, "logit_scale": 14.3, **values}


def test_a_resumed_log_drops_the_lines_after_its_checkpoint(tmp_path):
    with MetricsLogger(tmp_path, num_steps=3, quiet=True) as log:
        log.step(row(1), num_pairs=8)
        mark = log.sync()
        log.step(row(2), num_pairs=8)
        before = log.elapsed_s
    with MetricsLogger(
        tmp_path, num_steps=3, first_step=1, mark=mark, elapsed_s=before, quiet=True
    ) as log:
        log.step(row(2, loss=0.5), num_pairs=8)
        log.evaluation({"step": 2, "task": "unseen", "acc1": 0.25}, ["acc1"])
    steps, evaluations = read_metrics(tmp_path)
    assert [(r["step"], r["loss"]) for r in steps] == [(1, 1.5), (2, 0.5)]
    assert evaluations == [{"step": 2, "task": "unseen", "acc1": 0.25}]
    assert steps[1]["time_s"] >= round(before, 3)


def logged(tmp_path: Path) -> LogMark:
    """Write two steps; return the mark behind them."""
    with MetricsLogger(tmp_path, num_steps=2, quiet=True) as log:
        for step in (1, 2):
            log.step(row(step), num_pairs=8)
        return log.sync()


@pytest.mark.parametrize("what", ["missing", "empty", "short", "cut in a line", "one bit"])
def test_a_log_that_is_not_the_checkpoints_is_refused(tmp_path, what):
    mark = logged(tmp_path)
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    middle = mark.size // 2
    changed = {
        "missing": None,
        "empty": b"",
        "short": content[: content.index(b"\n") + 1],
        "cut in a line": content[:-3],
        "one bit": content[:middle]
        + bytes([content[middle] ^ 1])
        + content[middle + 1 :]
        + b"{}\n",
    }[what]
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)
    said = {"missing": "is missing", "one bit": "has changed in its first"}.get(
        what, "has .* bytes, not"
    )
    with pytest.raises(LogError, match=f"metrics.jsonl {said}.*--new-log"):
        MetricsLogger(tmp_path, num_steps=3, first_step=2, mark=mark, quiet=True)
    assert (path.read_bytes() if path.exists() else None) == changed


def test_a_log_goes_on_from_any_mark_with_its_hash(tmp_path):
    first = logged(tmp_path)
    with MetricsLogger(tmp_path, num_steps=4, first_step=2, mark=first, quiet=True) as log:
        assert log.sync() == first
        log.step(row(3), num_pairs=8)
        second = log.sync()
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert second == LogMark(len(content), hashlib.sha256(content).hexdigest())
    # A checkpoint of an earlier version has no hash, and the size alone counts.
    with MetricsLogger(
        tmp_path, num_steps=4, first_step=2, mark=LogMark(first.size), quiet=True
    ) as log:
        assert log.sync() == first


def test_a_log_that_should_hold_something_is_not_cut_to_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(LogError, match="has changed in its first 0 bytes"):
        compare_log(tmp_path, LogMark(0, hashlib.sha256(b"{}\n").hexdigest()))
    for sha256 in (None, hashlib.sha256(b"").hexdigest()):
        compare_log(tmp_path, LogMark(0, sha256))


def test_a_line_of_megabytes_is_no_line_of_a_run(tmp_path):
    row = {"step": 1, "loss": 1.0, "lr": 1.0, "logit_scale": 1.0, "pairs_per_s": 1.0, "time_s": 1.0}
    lines = [json.dumps(row), json.dumps({**row, "note": "x" * 200_000}), json.dumps(row)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_metrics(tmp_path) == ([row, row], [])


def test_a_log_set_aside_never_takes_the_place_of_another(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert set_log_aside(tmp_path) is None
    names = []
    for number in range(3):
        path.write_text(str(number))
        names.append(set_log_aside(tmp_path).name)
    assert names == ["metrics.jsonl.old", "metrics.jsonl.old2", "metrics.jsonl.old3"]
    assert [(tmp_path / name).read_text() for name in names] == ["0", "1", "2"]


def test_what_is_no_line_of_a_run_is_left_out(tmp_path):
    whole = b'{"step": 1, "loss": 2.0, "lr": 1, "logit_scale": 1, "pairs_per_s": 1, "time_s": 1}'
    lines = [
        whole,
        b'{"step": 1}',
        b'{"step": 2, "lo',
        b"",
        b"[1]",
        b'{"loss": 1}',
        b"\xff\x00",
    ]
    lines += [b"[" * 100_000, b'{"step": 3, "task": "unseen"}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    steps, evaluations = read_metrics(tmp_path)
    assert [r["step"] for r in steps] == [1] and [r["step"] for r in evaluations] == [3]


def test_lines_are_json_without_infinities_and_as_often_as_asked(tmp_path):
    with MetricsLogger(tmp_path, num_steps=4, quiet=True) as log:
        for step in range(1, 5):
            log.step(row(step, grad_norm=math.inf), num_pairs=8, every=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [(r["step"], r["grad_norm"]) for r in parsed] == [(2, None), (4, None)]


def test_tensorboard_keeps_the_step_that_is_resumed_at(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    mark = LogMark()
    for first in (0, 2):  # the step after the checkpoint is made twice, differently
        with MetricsLogger(
            tmp_path,
            num_steps=3,
            first_step=first,
            mark=mark,
            reporters=["tensorboard"],
            quiet=True,
        ) as log:
            for step in range(first + 1, 4):
                log.step(row(step, loss=step + first / 10), num_pairs=8)
                mark = log.sync() if step == 2 else mark
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
    config = {"wandb_project_name": "letters", "wandb_notes": "of mine", "lr": 1e-3}
    run_dir = tmp_path / "mine"
    run_dir.mkdir()
    with MetricsLogger(run_dir, num_steps=1, reporters=["wandb"], config=config, quiet=True) as log:
        log.step(row(1, grad_norm=math.nan), num_pairs=8)
        log.evaluation({"step": 1, "task": "unseen", "acc1": 0.25}, ["acc1"])
    assert len(calls["init"]) == len(calls["finish"]) == 1
    settings = calls["init"][0]
    # A resumed run goes on in the same curve: the id is the run's own, and may exist.
    assert (settings["id"], settings["resume"], settings["project"]) == ("mine", "allow", "letters")
    assert settings["notes"] == "of mine"
    (first, train), (second, unseen) = calls["log"]
    assert (first, second) == (1, 1) and unseen == {"unseen/acc1": 0.25}
    assert (
        train["train/loss"] == 1.5 and "train/grad_norm" not in train and "train/step" not in train
    )


def test_a_service_that_refuses_is_named_with_the_remedy(tmp_path, monkeypatch):
    def refuse(**_: object) -> None:
        raise RuntimeError("api_key not configured\nmore")

    module = ModuleType("wandb")
    module.init = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ValueError, match="--report-to wandb: api_key not configured; log in with"):
        MetricsLogger(tmp_path, num_steps=1, reporters=["wandb"], quiet=True)


@pytest.mark.parametrize("reporter", ["tensorboard", "wandb"])
def test_a_missing_reporter_names_the_extra(reporter, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=rf'pip install "clipcore\[{reporter}\]"'):
        MetricsLogger(tmp_path, num_steps=1, reporters=[reporter], quiet=True)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_other_ranks_write_nothing(tmp_path, capsys):
    with MetricsLogger(None, num_steps=1) as log:
        log.step(row(1), num_pairs=8)
        log.print("nothing")
        assert log.sync() == LogMark()
    assert capsys.readouterr() == ("", "") and not any(tmp_path.iterdir())


def test_the_last_step_is_printed_where_no_bar_shows_it(tmp_path, capsys):
    for number, quiet in enumerate((False, True)):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        with MetricsLogger(run_dir, num_steps=3, quiet=quiet) as log:
            log.step(row(1), num_pairs=8)
            log.step(row(2, loss=1.25), num_pairs=8)
        said = capsys.readouterr()
        (line,) = said.out.splitlines()
        assert re.fullmatch(
            r"step 2 of 3: loss 1\.250, \d+ pairs/s, lr 1\.0e-03, scale 14\.3", line
        )
        assert said.err == ""
        # A log without a step has nothing to say.
        with MetricsLogger(run_dir, num_steps=3, quiet=quiet):
            pass
        assert capsys.readouterr() == ("", "")


def test_progress_without_a_terminal_is_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("clipcore.progress.LINE_EVERY_S", 0.0)
    with MetricsLogger(tmp_path, num_steps=3, first_step=1) as log:
        log.step(row(2), num_pairs=8)
        log.step(row(3, loss=1.25), num_pairs=8)
    said = capsys.readouterr()
    lines = [line.partition(" pairs/s")[0] for line in said.err.splitlines()]
    assert [line.rpartition(", ")[0] for line in lines] == [
        "2 of 3 steps, loss 1.500",
        "3 of 3 steps, loss 1.250",
    ]
    assert said.out.startswith("step 3 of 3: loss 1.250")


def test_a_terminal_has_a_bar_whose_last_state_stays(tmp_path, capsys, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    with MetricsLogger(tmp_path, num_steps=1) as log:
        log.step(row(1), num_pairs=8)
    assert "1/1" in terminal.getvalue() and "loss 1.500" in terminal.getvalue()
    assert capsys.readouterr().out == ""
