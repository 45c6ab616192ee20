"""The benches' own machinery: rows and their tables, the steps that are compared, and the script for a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from openclip import import_open_clip

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))

import harness  # noqa: E402
import step_providers  # noqa: E402

from clipcore.architectures import find_model  # noqa: E402
from clipcore.model import create_model  # noqa: E402


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "_commit", lambda: {"commit": "abc1234", "dirty": False})
    return tmp_path


def record(**settings: Any) -> dict[str, float]:
    fns = {"first": lambda: torch.ones(10), "second": lambda: torch.ones(10)}
    given = {"flops": 2e6, "bytes_moved": 0.0, "min_rounds": 1, **settings}
    return harness.record("adding", fns, device=torch.device("cpu"), **given)


def test_a_row_has_what_it_takes_to_believe_it(results: Path) -> None:
    medians = record(num_pairs=8, ceiling_tflops=0.5, extras={"second": {"repeatable": True}}, N=10)
    rows = [json.loads(line) for line in next(results.glob("*.jsonl")).read_text().splitlines()]
    assert [row["provider"] for row in rows] == ["first", "second"]
    for row in rows:
        assert row["N"] == 10 and row["commit"] == "abc1234" and row["device"].endswith("threads")
        assert row["pairs_per_s"] == pytest.approx(8e3 / medians[row["provider"]], rel=1e-2)
    assert rows[1]["repeatable"] and "repeatable" not in rows[0]


def test_the_page_has_the_newest_row_of_each_case_and_no_empty_column(results: Path) -> None:
    record(N=10)
    path = next(results.glob("*.jsonl"))
    newer = path.read_text().replace('"tflops": ', '"tflops": 7').replace("abc1234", "def5678")
    path.write_text(path.read_text() + newer)
    record(N=20, num_pairs=8)
    page = harness.results_page()
    lines = [line for line in page.splitlines() if line.startswith("| N")]
    assert len(lines) == 4 and sum("def5678" in line for line in lines) == 2
    assert "pairs/s" in page and "gradient's error" not in page and "GB/s" not in page


def test_rows_without_a_time_show_what_they_count(results: Path) -> None:
    figures = {"peak_bytes": 3 * 2**20, "expected_bytes": 4 * 2**20, "kept": 0, "page_faults": 7}
    device = torch.device("cpu")
    harness.record_row("memory of a test", "ours", device=device, figures=figures, N=10)
    harness.record_computed("memory of a test, theirs", None, 5 * 2**20, "a formula", N=10)
    page = harness.results_page()
    (row,) = [line for line in page.splitlines() if line.startswith("| N") and "ours" in line]
    cells = [cell.strip() for cell in row.split("|")]
    assert {"3.0", "4.0", "0.750", "0", "7"} <= set(cells)
    assert "5.0" in page and "a formula" in page


def test_committed_tables_are_those_of_the_rows() -> None:
    assert (harness.RESULTS / "RESULTS.md").read_text() == harness.results_page()
    text = harness.README.read_text()
    assert "<!-- rows: training step -->" in text and harness.readme(text) == text


def test_captions_have_the_committed_lengths() -> None:
    text = step_providers.captions(1024, 49408, 77)
    lengths = (text.argmax(1) + 1).tolist()
    counts = {length: 8 * count for length, count in step_providers.CAPTION_LENGTHS.items()}
    assert {length: lengths.count(length) for length in counts} == counts
    assert sum(counts.values()) == 1024 and 15 < sum(lengths) / 1024 < 17


@pytest.mark.parametrize("number", [1, 4, 8, 64, 100, 512, 1000])
def test_any_number_of_captions_has_their_mean_length(number: int) -> None:
    text = step_providers.captions(number, 49408, 77)
    assert abs((text.argmax(1) + 1.0).mean() - 16.3) < (3.5 if number == 1 else 1.0)


def test_useful_work_is_that_of_the_models_tables() -> None:
    """Forward GFLOPs a pair of open_clip's model_profile.csv, where captions are full and every token sees all."""
    for name, gflops in (("ViT-B-32", 14.78), ("ViT-B-16", 41.09), ("ViT-L-14", 175.33)):
        config, case = find_model(name), step_providers.Case(name, 1, torch.device("cpu"), "fp32")
        full = torch.zeros(1, 77, dtype=torch.int64)
        full[0, -1] = 1
        found = step_providers.useful_flops(config, case, full) / 3e9
        # Less by what causal tokens do not see and the gradient of the pixels.
        assert 0.985 * gflops < found < gflops


@pytest.mark.parametrize("setting", [{}, {"patch_dropout": 0.5}, {"micro_batch_size": 3}])
def test_the_step_that_is_measured_trains_and_names_its_parts(setting: dict[str, Any]) -> None:
    case = step_providers.Case("ViT-nano-8-32", 8, torch.device("cpu"), "fp32", **setting)
    batch = step_providers.random_batch(case, find_model(case.model))
    [(_, make)] = step_providers.providers(case, ["clipcore"])
    step, clock = make(), step_providers.Clock(case.device)
    step(clock)
    names = (
        ["forward"] if case.num_parts > 1 else "data upload,image forward,text forward".split(",")
    )
    assert list(clock.parts)[-3:] == ["loss", "backward", "optimizer"]
    assert names[-1] in clock.parts and min(clock.parts.values()) >= 0
    assert batch.images.dtype == torch.uint8
    step(step_providers.ignore)


@pytest.mark.parametrize("num_parts", [1, 3])
def test_peers_compute_the_same_gradients(num_parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """clipcore's step and open_clip's, in micro-batches those of its --accum-freq, which count the scale's each time."""
    case = step_providers.Case(
        "ViT-S-32", 6, torch.device("cpu"), "fp32", micro_batch_size=6 // num_parts
    )
    ours = create_model(case.model).train()
    theirs = import_open_clip().create_model(case.model, load_weights=False).train()
    theirs.load_state_dict(ours.state_dict())
    batch = step_providers.random_batch(case, ours.config)
    # Gradients stay, for want of an optimizer that sets them to None.
    monkeypatch.setattr(
        step_providers, "_optimizer", lambda model: torch.optim.SGD([torch.ones(1)])
    )
    for step in (
        step_providers.clipcore(case, batch, ours),
        step_providers.open_clip(case, batch, theirs),
    ):
        step(step_providers.ignore)
    expected = dict(theirs.named_parameters())
    expected["logit_scale"].grad /= num_parts
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and expected[name].grad is not None, name
        difference = (parameter.grad - expected[name].grad).abs().max()
        assert difference <= 1e-3 * expected[name].grad.abs().max() + 1e-8, name


# bench/gpu.sh with another `python`, which notes what it is asked for.


def gpu(tmp_path: Path, fails: str = "", **environment: str) -> tuple[int, list[str], str]:
    """(exit status, commands, output) of a call."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    fake, calls = tmp_path / "bin" / "python", tmp_path / "calls"
    fake.write_text(
        f'#!/bin/bash\necho "$*" >> {calls}\n[ -z "{fails}" ] || [[ "$*" != *{fails}* ]]\n'
    )
    fake.chmod(0o755)
    calls.write_text("")
    path = f"{fake.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(tmp_path / "tree/bench/gpu.sh"), "losses"],
        env={**os.environ, "PATH": path, "CLIPCORE_COMMIT": "abc", **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, calls.read_text().splitlines(), done.stdout + done.stderr


def test_what_needs_a_gpu_goes_on_where_it_stopped(tmp_path: Path) -> None:
    (tmp_path / "tree/bench/results").mkdir(parents=True)
    (tmp_path / "tree/bench/gpu.sh").write_bytes((ROOT / "bench/gpu.sh").read_bytes())
    (tmp_path / "tree/bench/results/a.jsonl").write_text("{}\n")
    out = {"OUT": str(tmp_path / "out")}
    status, calls, text = gpu(tmp_path, LIMIT_S="59", **out)
    assert status == 75 and "left for another call: tests-losses" in text
    assert [call for call in calls if "ceilings" in call] == ["bench/bench_ceilings.py"]
    assert (tmp_path / "out/a.jsonl").exists() and (tmp_path / "out/ceilings.log").exists()
    status, calls, text = gpu(tmp_path, **out)
    assert status == 0 and not any("ceilings" in call for call in calls), text
    assert sum("pytest" in call for call in calls) == 2
    assert gpu(tmp_path, **out)[1][1:] == ["bench/harness.py"]  # nothing is left
    assert gpu(tmp_path, **out, CLIPCORE_COMMIT="other")[1][1] == "bench/bench_ceilings.py"


def test_no_figures_where_tests_are_red(tmp_path: Path) -> None:
    (tmp_path / "tree/bench/results").mkdir(parents=True)
    (tmp_path / "tree/bench/gpu.sh").write_bytes((ROOT / "bench/gpu.sh").read_bytes())
    status, calls, text = gpu(tmp_path, fails="test_contrastive.py", OUT=str(tmp_path / "out"))
    assert status == 1 and "failed: tests-losses" in text
    assert not any("bench_contrastive" in call for call in calls)
    assert any("bench_similarity" in call for call in calls)
    status, calls, _ = gpu(tmp_path, OUT=str(tmp_path / "out"))
    assert status == 0 and any("bench_contrastive" in call for call in calls)
    assert not any("bench_similarity" in call for call in calls)
