"""The benches' own machinery: rows and their tables, the steps that are compared, and the script for a GPU."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import pytest
import torch
from openclip import import_open_clip
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))

import harness  # noqa: E402
import step_providers  # noqa: E402

from clipcore.run.ceilings import Ceilings  # noqa: E402
from clipcore.run.command_line import parse_command_line  # noqa: E402
from clipcore.towers.architectures import find_model  # noqa: E402
from clipcore.towers.factory import create_model  # noqa: E402


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "_commit", lambda: {"commit": "abc1234", "dirty": False})
    monkeypatch.setattr(harness, "settings", harness.Settings())
    monkeypatch.delenv("BENCH_ROWS", raising=False)
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


def test_counts_have_a_table_of_their_own_and_both_packages_share_a_cell(results: Path) -> None:
    figures: dict[str, Any] = dict.fromkeys(harness.COUNTS, 2) | {"flops_over_needed": 1.0144}
    for provider, flops in (("clipcore", 5e9), ("open_clip", 3e9), ("clipcore", 7e9)):
        figures["flops_forward"] = flops
        case = {"model": "ViT-B-32", "pairs": 2}
        harness.record_counted("counts of a step", provider, figures, "a rule", **case)
    harness.record_counted("counts of a step", "clipcore", figures, "a rule", **case, micro_batch=1)
    harness.record_computed("memory", None, 5 * 2**20, "a formula", N=10)

    before, after = harness.results_page().split("## computed, not measured")
    rows = [line for line in before.splitlines() if line.startswith("| model")]
    assert [line.split(" | ")[1:5] for line in rows] == [
        ["clipcore", "3.50", "0.00", "1.014"],
        ["open_clip", "1.50", "0.00", "1.014"],
        ["clipcore", "3.50", "0.00", "1.014"],
    ]
    assert "a formula" in after and "ViT" not in after

    marks = "<!-- rows: counts of a step -->\n", "<!-- end of rows -->\n"
    (line,) = [x for x in harness.readme("".join(marks)).splitlines() if x.startswith("| model")]
    assert line == "| model ViT-B-32, pairs 2 | 3.50 / 1.50 | 0.00 | 8 | 0.00 | 2 | abc1234 |"


def test_a_provider_that_fails_costs_no_other_its_row(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At its first call, at its fourth, or in memory: clipcore's own end the bench with 1, after all rows."""

    def failing(after: int, error: Exception) -> Callable[[], torch.Tensor]:
        calls = iter(range(after))

        def call() -> torch.Tensor:
            if next(calls, None) is None:
                raise error
            return torch.ones(10)

        return call

    fns = {
        "missing": failing(0, ModuleNotFoundError("No module named 'peer'")),
        "late": failing(3, RuntimeError("compiler\nsays more")),
        "clipcore large": failing(0, torch.cuda.OutOfMemoryError("out of memory")),
        "clipcore": failing(0, ValueError("wrong")),
        "fine": lambda: torch.ones(10),
    }

    def main() -> None:
        harness.record("adding", fns, device=torch.device("cpu"), flops=0.0, bytes_moved=0.0)

    with pytest.raises(SystemExit, match=r"failed: clipcore large, clipcore$"):
        harness.run(main)
    rows = [json.loads(line) for line in next(results.glob("*.jsonl")).read_text().splitlines()]
    assert [row["provider"] for row in rows] == ["fine"]
    said = capsys.readouterr().out
    assert "missing is left out: ModuleNotFoundError: No module named 'peer'" in said
    assert "late is left out: RuntimeError: compiler\n" in said


def test_red_rows_are_marked_and_displace_no_others(results: Path) -> None:
    parser = argparse.ArgumentParser()
    harness.parse(parser, ["tests/none.py"], ["--tests", "failed", "--skip", "second"])
    record(N=10)
    rows = [json.loads(line) for line in next(results.glob("*.jsonl")).read_text().splitlines()]
    assert [(row["provider"], row["tests"]) for row in rows] == [("first", "red")]
    assert "abc1234 (tests red)" in harness.results_page()

    harness.settings.tests_failed = False
    record(N=10)
    harness.settings.tests_failed = True
    record(N=10)
    assert "tests red" not in harness.results_page()


def test_a_bench_ends_where_its_tests_fail(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def fail(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(SystemExit, match="--tests failed measures anyway"):
        harness.parse(argparse.ArgumentParser(), ["tests/test_wire.py"], [])
    assert asked[0][-1] == "tests/test_wire.py"


@pytest.mark.parametrize(
    ("missing", "option", "raised"),
    [
        ("absent.part", True, pytest.skip.Exception),
        ("absent.part", False, ModuleNotFoundError),
        ("torch.absent", True, ModuleNotFoundError),
    ],
)
def test_only_a_missing_package_is_skipped_and_only_on_request(
    missing: str, option: bool, raised: type[BaseException]
) -> None:
    item: Any = SimpleNamespace(config=SimpleNamespace(getoption=lambda name: option))
    call = conftest.pytest_runtest_call(item)
    next(call)
    with pytest.raises(raised, match="absent"):
        call.throw(ModuleNotFoundError(f"No module named {missing!r}", name=missing))


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


# bench/gpu.sh with another python, which notes what it is asked for.


class Machine:
    """A copy of the script in a tree of its own; commands fail that have `fails` in them, and come late that have `late`."""

    def __init__(self, root: Path) -> None:
        self.root, self.fails, self.late = root, "", ""
        (root / "tree/bench").mkdir(parents=True)
        (root / "tree/bench/gpu.sh").write_bytes((ROOT / "bench/gpu.sh").read_bytes())

    def run(self, *families: str, **environment: str) -> tuple[int, list[list[str]], str]:
        """(exit status, the arguments of each command, output) of a call. Its benches write a row of their arguments."""
        fake, calls = self.root / "python", self.root / "calls"
        fake.write_text(
            "#!/bin/bash\n"
            f'printf "%s\\t" "$@" >> {calls}; echo >> {calls}\n'
            f'[ -z "{self.fails}" ] || [[ "$*" != *{self.fails}* ]] || exit 1\n'
            '[[ "$1" != -c ]] || echo H200\n'
            '[[ "$1" != bench/* ]] || echo "$*" >> "$BENCH_ROWS/gpu.jsonl"\n'
            f'[ "$PYTHONPATH" = "{self.root}/tree:{self.root}/tree/bench/out/site" ]\n'
        )
        # No clock decides what comes late.
        (self.root / "bin").mkdir(exist_ok=True)
        timeout = self.root / "bin/timeout"
        timeout.write_text(
            "#!/bin/bash\nshift 2\n"
            f'[ -z "{self.late}" ] || [[ "$*" != *{self.late}* ]] || {{ "$@"; exit 124; }}\n'
            '"$@"\n'
        )
        for program in (fake, timeout):
            program.chmod(0o755)
        calls.write_text("")
        given = {"PYTHON": str(fake), "OUT": str(self.root / "out"), "CLIPCORE_COMMIT": "abc@c0de"}
        done = subprocess.run(
            ["bash", str(self.root / "tree/bench/gpu.sh"), *families],
            env={
                "PATH": f"{timeout.parent}:{os.environ['PATH']}",
                **given,
                "LIMIT_S": "100000",
                **environment,
            },
            capture_output=True,
            text=True,
        )
        commands = [line.split("\t")[:-1] for line in calls.read_text().splitlines()]
        return done.returncode, commands, done.stdout + done.stderr

    def ran(self, *families: str, **environment: str) -> list[str]:
        """Return the scripts and test files of a call."""
        _, commands, _ = self.run(*families, **environment)
        words = [word for command in commands for word in command]
        return [Path(word).stem for word in words if word.endswith(".py")]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_what_needs_a_gpu_goes_on_where_it_stopped(machine: Machine) -> None:
    assert machine.ran("probe") == ["probe", "bench_ceilings"]
    status, _, text = machine.run("probe", "loss", LIMIT_S="0")
    assert status == 75 and "left for another call: tests-contrastive" in text
    assert "softmax-32768-768" in text and "probe" not in text.partition("left for")[2]
    first = machine.ran("loss")
    assert first.count("test_contrastive") == 1 and "bench_contrastive" in first
    assert machine.ran("loss") == []  # nothing is left
    assert machine.ran("probe", CLIPCORE_COMMIT="def@c0de") == []
    assert machine.ran("probe", CLIPCORE_COMMIT="abc+@1234") == ["probe", "bench_ceilings"]


def test_one_file_comes_back_with_the_rows_of_all_calls(machine: Machine, results: Path) -> None:
    for family in ("probe", "encoders"):
        machine.run(family)
    assert [path.name for path in (machine.root / "out").iterdir()] == ["gpu.tgz"]
    with tarfile.open(machine.root / "out/gpu.tgz") as archive:
        names = archive.getnames()
        archive.extractall(machine.root / "home", filter="data")
    assert {"bench/out/done", "bench/out/logs/probe.log"} <= set(names)

    rows = sorted((machine.root / "home").rglob("*.jsonl"))
    assert len(rows) == 2
    (results / "gpu.jsonl").write_text("one that is there\n")
    for _ in range(2):
        harness.merge(rows)
    lines = (results / "gpu.jsonl").read_text().splitlines()
    # The order of two calls in one second is that of their process numbers as text.
    assert lines[0] == "one that is there"
    assert sum(line.startswith("bench/probe.py") for line in lines) == 1
    assert len(lines) == len(set(lines)) == 1 + 2 + 7


def test_rows_behind_red_tests_are_marked_until_these_pass(machine: Machine) -> None:
    machine.fails = "test_contrastive.py"
    status, commands, text = machine.run("loss")
    assert status == 1 and "failed: tests-contrastive (failed)\n" in text
    benches = [command for command in commands if "bench" in command[0]]
    verdicts = {
        name: {c[c.index("--tests") + 1] for c in benches if name in " ".join(c)}
        for name in ("--loss softmax", "--loss sigmoid", "bench_similarity")
    }
    assert verdicts == {
        "--loss softmax": {"failed"},
        "--loss sigmoid": {"passed"},
        "bench_similarity": {"passed"},
    }
    # Red rows are not made twice, and stay red.
    status, commands, text = machine.run("loss")
    assert status == 1 and "failed: tests-contrastive (failed)\n" in text and len(commands) == 1

    machine.fails = ""
    assert "test_contrastive" not in machine.ran()  # among all, what failed is not tried again
    assert "test_contrastive" in machine.ran("correctness")
    status, commands, _ = machine.run("loss")
    again = [command for command in commands if "bench" in command[0]]
    assert status == 0 and len(again) == sum("softmax" in command for command in benches)
    assert all(command[2] == "passed" for command in again)


def noted(machine: Machine, *verdicts: str) -> None:
    """Write what an earlier call has found."""
    done = machine.root / "tree/bench/out/done"
    done.parent.mkdir(exist_ok=True)
    done.write_text("".join(f"c0de@H200 {verdict}\n" for verdict in verdicts))


def test_tests_that_came_late_are_tried_last_and_once(machine: Machine) -> None:
    noted(machine, "tests-contrastive late", "tests-sigmoid passed")
    machine.fails = "test_contrastive.py"
    ran = machine.ran("loss")
    assert ran.count("test_contrastive") == 1
    assert ran.index("test_contrastive") > ran.index("test_similarity")
    # Without time for them nothing is said to be red.
    noted(machine, "tests-contrastive late")
    status, commands, text = machine.run("loss", LIMIT_S="0")
    assert status == 75 and "failed" not in text
    assert not [command for command in commands if "softmax" in command]


def test_what_comes_late_twice_has_failed(machine: Machine) -> None:
    machine.late = "bench_ceilings"
    for verdict in ("late", "failed"):
        status, _, text = machine.run("probe")
        assert status == 1 and f"failed: ceilings ({verdict})\n" in text
    machine.late = ""
    assert "bench_ceilings" not in machine.ran()  # among all
    assert machine.ran("probe") == ["bench_ceilings"]


def test_an_unknown_family_is_refused_before_anything_runs(machine: Machine) -> None:
    status, commands, text = machine.run("probe", "losses")
    assert status == 2 and not commands and "losses is none of: all probe" in text
    status, commands, text = machine.run("probe", CLIPCORE_COMMIT="")
    assert status == 2 and not commands and "set CLIPCORE_COMMIT" in text


def test_changed_code_has_another_name_and_rows_have_not(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = machine.root / "tree"

    def commit() -> str:
        return subprocess.run(
            ["bash", "bench/gpu.sh", "commit"], cwd=tree, capture_output=True, text=True
        ).stdout.strip()

    def git(*words: str) -> None:
        subprocess.run(["git", *words], cwd=tree, check=True)

    assert commit() == ""
    (tree / "clipcore").mkdir()
    (tree / "clipcore/old.py").write_text("1")
    git("init", "-q")
    author = ("-c", "user.name=a", "-c", "user.email=a")
    git("add", ".")
    git(*author, "commit", "-qm", "a")
    first = commit()
    name, code = first.split("@")
    assert "+" not in name

    (tree / "README.md").write_text("figures")
    (tree / "bench/results").mkdir()
    (tree / "bench/results/gpu.jsonl").write_text("{}")
    assert commit() == first
    git("add", ".")
    git(*author, "commit", "-qm", "b")
    assert commit().partition("@")[2] == code and commit() != first

    codes = {code}
    for path, text in (("old.py", "2"), ("new.py", "1"), ("new.py", "2")):
        (tree / "clipcore" / path).write_text(text)
        assert commit().partition("@")[0].endswith("+")
        codes.add(commit().partition("@")[2])
    assert len(codes) == 4
    monkeypatch.setenv("CLIPCORE_COMMIT", first)
    assert harness._commit() == {"commit": name, "dirty": False}
    monkeypatch.setenv("CLIPCORE_COMMIT", f"{name}+@{code}")
    assert harness._commit() == {"commit": name, "dirty": True}


ON_GPU_ONLY = {"clipcore fused", "inf_cl", "siglip-kernel", "cut-cross-entropy x 2"}
# What a bench's sizes are in the rehearsal, by option; and what only single benches have.
TINY = {
    "--model": ["ViT-nano-8-32"],
    "--batch": ["4"],
    "--micro-batch-size": ["2"],
    "--widths": ["16"],
    "--sizes": ["64"],
    "--skip": ["torch.compile"],  # torch's attention has one name on a CPU
}
TINY_OF_BENCH = {
    "bench_adamw": ["--millions", "0.01", "--model", "ViT-nano-8-32"],
    "bench_attention": ["--towers", "text", "--batch", "1"],
    "bench_attention_pool": ["--models", "ViT-B-32", "--batch", "1"],
    "bench_gelu": ["--shapes", "64x16"],
    "bench_global_batch": ["--model", "ViT-nano-8-32", "--micro-batch-size", "32"],
    "bench_layer_norm": ["--shapes", "64x16"],
    "bench_patchify": ["--batch", "1"],
    "bench_scaling": "--model ViT-nano-8-32 --seconds 0 --sizes 4 8 --batch 2 --width 16".split(),
    "bench_similarity": ["--sizes", "64", "--width", "16"],
}


def made_tiny(arguments: list[str]) -> list[str]:
    """Return the same options with the values above."""
    found, values = [], iter(arguments)
    kept = True
    for word in values:
        if word.startswith("--"):
            found += [word, *TINY.get(word, [])]
            kept = word not in TINY
        elif kept:
            found.append(word)
    return found


def unwatched(fn: Callable[[], Any], device: torch.device) -> int:
    """Call a provider without watching its memory."""
    fn()
    return 0


@pytest.fixture
def rehearsal(results: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows go to the folder, nothing is compiled, and what takes a GPU or minutes is only called."""
    import bench_attention
    import bench_contrastive
    import bench_memory
    import bench_step
    import probe

    monkeypatch.setattr(probe, "CALLS", 2)
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
    # open_clip knows the small model as well.
    config = results / "ViT-nano-8-32.json"
    config.write_text(json.dumps(find_model("ViT-nano-8-32").to_dict()))
    import_open_clip().add_model_config(config)
    # A peak of the resident set takes a pass over all pages.
    monkeypatch.setattr(harness, "extra_bytes_of", unwatched)
    monkeypatch.setattr(bench_contrastive, "FIRST_TRIED", 64)
    monkeypatch.setattr(bench_contrastive, "LAST_TRIED", 128)
    monkeypatch.setattr(bench_attention, "sweep", lambda rows, names: print(rows, names))
    monkeypatch.setattr(bench_memory, "bench", lambda names, device: print(names))
    monkeypatch.setattr(bench_step, "measure_ceilings", lambda *_: Ceilings(1e11, 1e12))
    return results


def test_every_part_is_rehearsed(machine: Machine, rehearsal: Path) -> None:
    """Each command of the script, here and on tiny sizes: its options are known, and its own providers run."""
    status, commands, text = machine.run(LIMIT_S="10000")
    assert status == 0, text
    benches, files, runs = [], set(), []
    for command in commands:
        if command[0].startswith("bench/"):
            benches.append((Path(command[0]).stem, command[1:]))
        elif "pytest" in command:
            files |= {word for word in command if word.endswith(".py")}
        elif command[:2] == ["-m", "torch.distributed.run"]:
            launcher = get_args_parser().parse_args(command[2:])
            assert launcher.module and launcher.training_script == "clipcore.train"
            runs.append(launcher.training_script_args)
        elif command[:2] == ["-m", "clipcore.train"]:
            runs.append(command[2:])
    assert len(benches) >= 40 and len(runs) == 3
    assert len(files) >= 16 and all((ROOT / file).exists() for file in files)
    for settings in runs:
        assert parse_command_line(settings)[0].device == "cuda"

    for name, arguments in benches:
        small = [*made_tiny(arguments), *TINY_OF_BENCH.get(name, [])]
        small += ["--device", "cpu", "--budget", "0"]
        harness.run(functools.partial(importlib.import_module(name).main, small))
        made = rows_made(rehearsal)
        if name == "bench_memory" or "--sweep" in small or "--largest" in small:
            continue  # called without their work, or without rows
        providers = {row["provider"] for row in made}
        if "--providers" in small:
            wanted = set(small[small.index("--providers") + 1 : small.index("--device")])
            assert wanted - ON_GPU_ONLY <= providers, small
        elif name != "bench_ceilings":
            assert any(provider.startswith(harness.OWN) for provider in providers), small


def rows_made(results: Path) -> list[dict[str, Any]]:
    """Return the rows since the last call."""
    rows = []
    for path in results.glob("*.jsonl"):
        rows += [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
    return rows
