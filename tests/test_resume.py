"""What a resumed run trusts and what it refuses: lock, log, settings, tensors that are not finite, lost workers."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from runs import NANO, ROOT, RunServer, assert_same_bits, children, wait_until
from safetensors.torch import save_file
from shards import write_csv
from torch import Tensor

from clipcore import train
from clipcore.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    run_lock,
    save_checkpoint,
)
from clipcore.ranks.distributed import World
from clipcore.run.config import ConfigError, TrainConfig
from clipcore.run.faults import first_fault, newest_sound
from clipcore.run.folders import find_run, resumed_config
from clipcore.run.metrics import read_metrics
from clipcore.run.optim import ExponentialMovingAverage, build_optimizer
from clipcore.run.state import RunState, load_run, run_record
from clipcore.towers.architectures import ModelConfig
from clipcore.towers.model import CLIP

ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("table"), num_pairs=40)


def flags(logs: Path, table: Path, *more: str, name: str = "r", epochs: int = 1) -> list[str]:
    """Return the command line of a run of five steps an epoch that saves each."""
    line = ["--logs", str(logs), "--name", name, "--train-data", str(table), *NANO]
    return [
        *line,
        *f"--batch-size 8 --epochs {epochs} --lr 1e-3 --save-every-steps 1 --ema-decay 0.9".split(),
        *more,
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, table: Path) -> Iterator[Path]:
    """Return the logs folder of a run ``r`` of one epoch, to be copied; with checkpoints 3, 4 and 5."""
    logs = tmp_path_factory.mktemp("logs")
    server = RunServer()
    status, text = server.run(flags(logs, table), logs / "out")
    server.close()
    assert status == 0, text
    yield logs


def copied(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the run's folder for the test."""
    return shutil.copytree(finished / "r", tmp_path / "r")


def one_line(text: str) -> str:
    """Return the one line of an error in a run's output, which holds no traceback."""
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if "error:" in line or "stopped:" in line]
    assert len(lines) == 1, text
    return lines[0]


# Output that nobody reads.


def test_a_dead_pipe_costs_no_step(server, table, tmp_path):
    line = flags(tmp_path, table, "--resume", "latest", name="piped", epochs=4)
    line.remove("--quiet")
    events = server.counted(flags(tmp_path, table, name="straight", epochs=4), tmp_path / "out")
    moments = random.Random(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        at = moments.randrange(events // 10, events // 5)
        run = server.start(line, tmp_path / "b", signals=[(at, number)], is_pipe_dead=True)
        assert run.wait() == 128 + number
    run = server.start(line, tmp_path / "b", is_pipe_dead=True)
    assert run.wait() == 0
    assert_same_bits(tmp_path / "straight", tmp_path / "piped")


def test_a_closed_terminal_saves(table, tmp_path):
    """The kernel sends SIGHUP, and every write to the terminal fails from then on."""
    line = flags(tmp_path, table, epochs=10_000)
    line[line.index("--save-every-steps") + 1] = "1000000"
    line.remove("--quiet")
    pid, terminal = pty.fork()
    if not pid:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, "-m", "clipcore.train", *line], environment)
    log = tmp_path / "r" / "metrics.jsonl"
    with open(os.devnull, "wb") as sink:
        reader = subprocess.Popen(["cat"], stdin=terminal, stdout=sink, stderr=sink)
        wait_until(lambda: log.exists() and log.stat().st_size > 0, "step")
        # The reader first: with the last descriptor the kernel hangs up. A shell would send one more of its own.
        reader.kill()
        reader.wait()
        os.close(terminal)
        for _ in range(3):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGHUP)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    steps, _ = read_metrics(tmp_path / "r")
    newest = latest_checkpoint(tmp_path / "r" / "checkpoints")
    assert newest is not None and newest.name == f"step_{steps[-1]['step']:08d}"


# The lock.


def test_nothing_in_a_run_is_read_before_its_lock_is_held(finished, tmp_path, monkeypatch, capfd):
    run = copied(finished, tmp_path)

    def find(*_: object) -> None:
        with pytest.raises(CheckpointError, match="this process"), run_lock(run):
            pass
        raise ConfigError("it was locked")

    monkeypatch.setattr(train, "find_checkpoint", find)
    for resume in ("latest", str(run), str(run / "checkpoints" / "step_00000004")):
        assert train.main(["--logs", str(tmp_path), "--resume", resume]) == 2
        assert "it was locked" in capfd.readouterr().err


def test_a_run_that_is_being_written_is_left_alone(server, finished, tmp_path):
    run = copied(finished, tmp_path)
    before = {path: path.stat() for path in run.rglob("*")}
    with run_lock(run):
        before[run / ".lock"] = (run / ".lock").stat()
        status, text = server.run(["--resume", str(run), "--epochs", "2"], tmp_path / "out")
    assert status == 2 and "another run is writing" in one_line(text)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == {
        path: stat.st_mtime_ns for path, stat in before.items()
    }


# The log.


def test_a_log_with_a_hole_is_not_gone_on_with(server, finished, tmp_path):
    run = copied(finished, tmp_path)
    path = run / "metrics.jsonl"
    content = path.read_bytes()
    for changed in (None, content[: len(content) // 2]):
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)
        status, text = server.run(["--resume", str(run), "--epochs", "2"], tmp_path / "out")
        assert status == 2 and "metrics.jsonl" in one_line(text) and "--new-log" in one_line(text)
        assert (path.read_bytes() if path.exists() else None) == changed
        path.write_bytes(content)

    # The remedy works, says so, keeps what was there, and is needed once.
    path.write_bytes(changed)
    status, text = server.run(
        ["--resume", str(run), "--epochs", "2", "--new-log"], tmp_path / "out"
    )
    assert status == 0 and "begins behind step 5" in text, text
    assert (run / "metrics.jsonl.old").read_bytes() == changed
    line = ["--resume", str(run), "--epochs", "3", "--new-log"]  # a log that is whole stays
    status, text = server.run(line, tmp_path / "out")
    assert status == 0 and "begins behind" not in text, text
    assert [row["step"] for row in read_metrics(run)[0]] == list(range(6, 16))


# Which run, with which settings and data.


def test_data_under_another_name_is_known_by_its_captions(server, table, finished, tmp_path):
    run = copied(finished, tmp_path)
    unchanged = shutil.copytree(run, tmp_path / "unchanged")
    assert server.run(["--resume", str(unchanged), "--epochs", "2"], tmp_path / "out")[0] == 0
    renamed = table.with_name("renamed.csv")
    renamed.write_text(table.read_text())
    more = ["--resume", str(run), "--train-data", str(renamed), "--epochs"]
    status, text = server.run([*more, "2"], tmp_path / "out")
    assert status == 0, text
    said = "the data was called pairs.csv of 40 samples, and now renamed.csv of 40 samples; it has"
    assert text.count(said) == 1
    assert_same_bits(unchanged, run)

    # A run may go back to the first name, and says nothing then.
    line = ["--resume", str(run), "--train-data", str(table), "--epochs", "3"]
    status, text = server.run(line, tmp_path / "out")
    assert status == 0 and "was called" not in text, text

    # One other caption, another order or fewer rows are other data.
    header, first, second, *rest = table.read_text().splitlines(keepends=True)
    other = first.replace("\ta ", "\tone ")
    assert other != first
    for rows in ([other, second, *rest], [second, first, *rest], rest):
        renamed.write_text(header + "".join(rows))
        status, text = server.run([*more, "4"], tmp_path / "out")
        assert status == 2 and "is of another data" in one_line(text)


def test_a_checkpoint_of_before_knows_its_data_by_name_alone(server, table, finished, tmp_path):
    run = copied(finished, tmp_path)
    found = load_checkpoint(run / "checkpoints" / "step_00000005")
    del found.state["captions_sha256"]
    save_checkpoint(run / "checkpoints", 5, found.tensors, found.state)
    renamed = table.with_name("again.csv")
    renamed.write_text(table.read_text())
    more = ["--resume", str(run), "--epochs", "2"]
    status, text = server.run([*more, "--train-data", str(renamed)], tmp_path / "out")
    assert status == 2 and "is of another data" in one_line(text)
    assert server.run(more, tmp_path / "out")[0] == 0


def test_latest_is_never_another_run_because_the_newest_is_damaged(server, finished, tmp_path):
    run = copied(finished, tmp_path)
    older = shutil.copytree(run, tmp_path / "older")
    for number, path in enumerate([*older.glob("checkpoints/*"), *run.glob("checkpoints/*")]):
        os.utime(path, (number + 1, number + 1))
    for path in run.glob("checkpoints/*/manifest.json"):
        path.write_bytes(path.read_bytes()[:-9])
        os.utime(path.parent, (1000, 1000))
    status, text = server.run(
        ["--logs", str(tmp_path), "--resume", "latest", "--epochs", "2"], tmp_path / "out"
    )
    assert status == 2 and f"no checkpoint in {run}/checkpoints can be loaded" in one_line(text)

    # Nor is it begun anew, over its own log.
    log = (run / "metrics.jsonl").read_bytes()
    status, text = server.run(["--logs", str(tmp_path), "--name", "r"], tmp_path / "out")
    assert status == 2 and "has checkpoints already" in one_line(text)
    assert (run / "metrics.jsonl").read_bytes() == log


def test_a_run_without_a_checkpoint_yet_goes_on_with_its_settings(server, table, tmp_path):
    line = flags(tmp_path, table, epochs=2)
    assert server.run(line, tmp_path / "out")[0] == 0
    straight = (tmp_path / "r").rename(tmp_path / "straight")
    (tmp_path / "r").mkdir()
    shutil.copy(straight / "config.json", tmp_path / "r")
    status, text = server.run(
        ["--logs", str(tmp_path), "--name", "r", "--resume", "latest"], tmp_path / "out"
    )
    assert status == 0, text
    assert_same_bits(straight, tmp_path / "r")


@pytest.mark.parametrize("more", [[], ["--name", "r"], ["--new-log"]])
def test_latest_alone_begins_no_run(server, tmp_path, more):
    logs = tmp_path / "logs"
    (logs / "notes").mkdir(parents=True)
    line = ["--logs", str(logs), "--resume", "latest", *more]
    status, text = server.run(line, tmp_path / "out")
    said = one_line(text)
    assert status == 2 and "--resume latest finds no run to resume" in said
    looked = f"{logs}/r holds neither a checkpoint nor a config.json"
    if "--name" not in more:
        looked = f"no folder in {logs} holds a checkpoint"
    assert looked in said and "--logs" in said
    assert [path.name for path in logs.iterdir()] == ["notes"]

    # Nor where there is no such folder, which is not made.
    line[1] = str(tmp_path / "none")
    status, text = server.run(line, tmp_path / "out")
    assert status == 2 and "finds no run to resume" in one_line(text)
    assert not (tmp_path / "none").exists()


def test_latest_beside_settings_begins_the_run_that_they_are_of(server, table, tmp_path):
    """As of a launcher that gives each start the same command."""
    line = flags(tmp_path, table, "--resume", "latest", epochs=1)
    status, text = server.run(line, tmp_path / "out")
    assert status == 0 and "no checkpoint in" in text and "starting from the beginning" in text


def test_folders_that_are_no_runs_are_passed_over_aloud(server, finished, tmp_path):
    run = copied(finished, tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "checkpoints").write_text("a file")
    (tmp_path / "file").write_text("")
    status, text = server.run(
        ["--logs", str(tmp_path), "--resume", "latest", "--epochs", "2"], tmp_path / "out"
    )
    assert status == 0, text
    assert f"passed over {tmp_path / 'notes'}" in text and f"writing to {run}" in text


def test_a_run_that_may_not_be_looked_into_does_not_stop_the_others(
    finished, tmp_path, monkeypatch
):
    """Such as one of another user, which a test that runs as root cannot make."""
    run = copied(finished, tmp_path)
    (tmp_path / "theirs").mkdir()
    real = os.stat

    def stat(path: object, *arguments: object, **keywords: object) -> os.stat_result:
        if str(path).startswith(f"{tmp_path}/theirs/"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(os, "stat", stat)
    said: list[str] = []
    config = TrainConfig(logs=str(tmp_path), resume="latest")
    assert find_run(config, "a launch", said.append) == run
    assert len(said) == 1 and f"passed over {tmp_path}/theirs: Permission denied" in said[0]


def test_settings_that_cannot_be_read_are_named(server, finished, tmp_path):
    run = copied(finished, tmp_path)
    for content in ("", "[]", '{"epochs": ', "[" * 100_000):
        (run / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=f"{run}/config.json"):
            resumed_config(run, TrainConfig(), frozenset(), ALONE)
    status, text = server.run(["--resume", str(run)], tmp_path / "out")
    assert status == 2 and f"{run}/config.json" in one_line(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", "3"),
        ("epochs", 1e400),
        ("lr", [1e-3]),
        ("lr", float("nan")),
        ("model", {"name": "ViT-B-32"}),
        ("grad_checkpointing", 1),
        ("precision", "fp1"),
        ("seed", -4),
        ("report_to", None),
        ("train_data", "a\0b"),
    ],
)
def test_settings_that_somebody_edited_are_named(finished, tmp_path, name, value):
    run = copied(finished, tmp_path)
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**settings, name: value}))
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ConfigError, match=f"^{flag} .*{run}/config.json: put them back"):
        resumed_config(run, TrainConfig(), frozenset(), ALONE)


def test_a_run_of_edited_settings_ends_in_one_line(server, finished, tmp_path):
    run = copied(finished, tmp_path)
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**settings, "epochs": {}}))
    status, text = server.run(["--resume", str(run)], tmp_path / "out")
    said = (
        f"--epochs is {{}}, which is no whole number; the run's settings are in {run}/config.json"
    )
    assert status == 2 and said in one_line(text)


def test_a_run_of_a_stranger_writes_to_no_file_of_the_users(server, finished, tmp_path):
    """Links in its folder: those that a run writes through are refused, those that it replaces are replaced."""
    for name in (".lock", "metrics.jsonl"):
        run = copied(finished, tmp_path / name)
        mine = tmp_path / f"of the user, {name}"
        mine.write_bytes((run / name).read_bytes())
        before = mine.read_bytes()
        (run / name).unlink()
        (run / name).symlink_to(mine)
        line = ["--resume", str(run), "--epochs", "2"]
        status, text = server.run(line, tmp_path / "out")
        assert status == 2 and "is a symbolic link, which is not followed" in one_line(text)
        assert f"{name}: " in one_line(text) and mine.read_bytes() == before

    run, mine = copied(finished, tmp_path), tmp_path / "of the user"
    mine.write_text("kept")
    (run / "profile").mkdir()
    names = [
        "config.json",
        "report.html",
        "profile/profile.txt",
        "profile/trace.json.gz",
        ".launch",
    ]
    for name in names:
        saved = (run / name).read_bytes() if name == "config.json" else b""
        (run / name).unlink(missing_ok=True)
        target = tmp_path / "settings" if saved else mine
        if saved:
            target.write_bytes(saved)
        (run / name).symlink_to(target)
    status, text = server.run(
        ["--resume", str(run), "--epochs", "3", "--profile"], tmp_path / "out"
    )
    assert status == 0 and mine.read_text() == "kept", text
    assert (tmp_path / "settings").read_bytes() == (finished / "r" / "config.json").read_bytes()
    assert not any((run / name).is_symlink() for name in names[:-1])


def test_names_of_strangers_do_not_steer_the_terminal(server, table, tmp_path):
    hostile = tmp_path / "\x1b]0;owned\x07\x1b[2J.csv"
    status, text = server.run(flags(tmp_path, hostile), tmp_path / "out")
    assert status == 2 and "owned" in text and "\x1b" not in text and "\x07" not in text
    shutil.copytree(table.parent, tmp_path / "data")
    (tmp_path / "data" / table.name).rename(tmp_path / "data" / hostile.name)
    line = flags(tmp_path, tmp_path / "data" / hostile.name)
    status, text = server.run(line, tmp_path / "out")
    assert status == 0 and "owned" in text and "\x1b" not in text and "\x07" not in text, text
    weights = tmp_path / "weights.safetensors"
    save_file(
        {"\x1b[2Jlogit_scale": torch.ones(()), "token_embedding.weight": torch.ones(2, 2)}, weights
    )
    status, text = server.run(
        [*line, "--name", "other", "--pretrained", str(weights)], tmp_path / "out"
    )
    assert status == 2 and "logit_scale" in one_line(text) and "\x1b" not in text, text


def test_a_path_that_is_no_run_is_named_and_left_alone(server, tmp_path):
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    for path, said in (("none", "does not exist"), ("a/b/c", "is neither the folder of a run nor")):
        status, text = server.run(["--resume", str(tmp_path / path)], tmp_path / "out")
        assert status == 2 and said in one_line(text), text
    assert not list(tmp_path.rglob(".lock"))


# Tensors that no step can go on from.


def put(value: float) -> Callable[[Tensor], Tensor]:
    """Write a value into one element."""

    def edit(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return edit


EDITS = {
    "weight": ("model", "visual.proj", put(float("inf"))),
    "average": ("ema", "text_projection", put(float("nan"))),
    "moment": ("optimizer", "visual.proj.exp_avg", put(float("nan"))),
    "second moment": ("optimizer", "visual.proj.exp_avg_sq", put(float("-inf"))),
    "negative second moment": ("optimizer", "logit_scale.exp_avg_sq", put(-1.0)),
    "negative step": ("optimizer", "text_projection.step", put(-3.0)),
}


def edited(run: Path, what: str) -> str:
    """Put a fault into the newest checkpoint of a run; return what is to be said of it."""
    found = load_checkpoint(run / "checkpoints" / "step_00000005")
    group, name, edit = EDITS[what]
    groups = {key: dict(tensors) for key, tensors in found.tensors.items()}
    groups[group][name] = edit(groups[group][name])
    save_checkpoint(run / "checkpoints", 5, groups, found.state)
    return f"{group}: {name} is {'negative' if what.startswith('negative') else 'not finite'}"


@pytest.mark.parametrize("what", EDITS)
def test_a_state_that_no_step_can_go_on_from_is_seen(finished, tmp_path, what):
    run = copied(finished, tmp_path)
    newest = run / "checkpoints" / "step_00000005"
    assert first_fault(load_checkpoint(newest).tensors) is None
    assert newest_sound(run / "checkpoints") == newest
    said = edited(run, what)
    assert first_fault(load_checkpoint(newest).tensors) == said
    assert newest_sound(run / "checkpoints") == newest.with_name("step_00000004")


@pytest.mark.parametrize("what", ["average", "negative second moment"])
def test_a_faulty_checkpoint_is_refused_and_the_finite_one_named(server, finished, tmp_path, what):
    run = copied(finished, tmp_path)
    said = edited(run, what)
    status, text = server.run(["--resume", str(run), "--epochs", "2"], tmp_path / "out")
    assert status == 2 and said in one_line(text), text
    way_on = one_line(text).partition("then python -m clipcore.train ")[2].split()
    assert way_on == ["--resume", str(run / "checkpoints" / "step_00000004")]
    status, text = server.run([*way_on, "--epochs", "2"], tmp_path / "out")
    assert status == 0, text


def test_weights_that_an_update_made_infinite_are_not_saved(server, finished, tmp_path):
    """Also after the last step, where no later loss would show it."""
    run = copied(finished, tmp_path)
    report = (run / "report.html").read_bytes()
    line = ["--resume", str(run), "--epochs", "2", "--train-num-samples", "24"]  # six steps of 8
    status, text = server.run([*line, "--lr", "1e38", "--wd", "1e38"], tmp_path / "out")
    error = one_line(text)
    assert status == 1 and "step 6 was not saved: model: " in error, text
    assert "newest checkpoint that is finite is step_00000005" in error
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [f"step_0000000{n}" for n in (3, 4, 5)]
    assert (run / "report.html").read_bytes() == report


def test_a_loss_that_is_not_finite_names_the_finite_checkpoint(server, finished, tmp_path):
    """The newest checkpoint is finite here, and its next loss is not: its scale is as large as a number can be."""
    run = copied(finished, tmp_path)
    found = load_checkpoint(run / "checkpoints" / "step_00000005")
    groups = {key: dict(tensors) for key, tensors in found.tensors.items()}
    groups["model"]["logit_scale"] = torch.tensor(1e4)
    save_checkpoint(run / "checkpoints", 5, groups, found.state)
    status, text = server.run(["--resume", str(run), "--epochs", "2"], tmp_path / "out")
    assert status == 1 and "step 6 is not finite" in one_line(text)
    assert "the newest checkpoint that is finite is step_00000005" in one_line(text)


def test_a_state_without_its_values_is_named(server, finished, tmp_path):
    run = copied(finished, tmp_path)
    found = load_checkpoint(run / "checkpoints" / "step_00000005")
    optional = {"global_batch_size", "metrics_sha256", "captions_sha256", "transparent"}
    for key in found.state.keys() - optional:
        for state in (
            {**found.state, key: None},
            {k: v for k, v in found.state.items() if k != key},
        ):
            with pytest.raises(CheckpointError, match=f"its {key} is None"):
                run_record(dataclasses.replace(found, state=state))
    save_checkpoint(run / "checkpoints", 5, found.tensors, {})
    status, text = server.run(["--resume", str(run)], tmp_path / "out")
    assert status == 2 and "is not of a run" in one_line(text)


STATES = {
    "identity": [[], 3, True],
    "evaluated_step": [-1, "3", True, 1.5, 2**63],
    "bad_samples": [-1, None, 10**5000],
    "transparent": [-1, "many", [], 1.5],
    "elapsed_s": [-1.0, float("nan"), "long", 10**400],
    "timings": [[], {"data": "1 s"}, {"data": None}, {"data": -1.0}],
    "metrics_bytes": [-5, 1.0],
    "metrics_sha256": [3, []],
    "captions_sha256": [3, {}],
    "scaler": [[], {"scale": 2.0}, {"scale": "2"}],
}
# A loss scaler's own, and what cannot be in it.
SCALER = {
    "scale": 65536.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 3,
}
STATES["scaler"] += [
    {**SCALER, key: value}
    for key, values in {
        "scale": (0.0, -1.0, 1e300, 10**30, float("inf")),
        "growth_factor": (0, -2.0, float("nan")),
        "backoff_factor": (0.0, "half"),
        "growth_interval": (0, -1, 0.5, 2**63, 10**30),
        "_growth_tracker": (-1, 0.5, 2**40, None),
    }.items()
    for value in values
]


@pytest.mark.parametrize("key", STATES)
def test_a_state_of_other_types_is_named(finished, key):
    found = load_checkpoint(finished / "r" / "checkpoints" / "step_00000005")
    for value in STATES[key]:
        state = {**found.state, key: value}
        with pytest.raises(CheckpointError, match=f"is not of a run: its {key} "):
            run_record(dataclasses.replace(found, state=state))


def test_a_loss_scalers_state_is_one(finished):
    found = load_checkpoint(finished / "r" / "checkpoints" / "step_00000005")
    state = {**found.state, "scaler": SCALER, "transparent": 4, "metrics_sha256": None}
    assert run_record(dataclasses.replace(found, state=state)) == state


def state_of(found: Checkpoint) -> RunState:
    """Return a state at its beginning, which the checkpoint belongs to."""
    identity = found.state["identity"]
    model = CLIP(ModelConfig.from_dict(identity["model"]))
    optimizer = build_optimizer(model, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    ema = ExponentialMovingAverage(model, 0.9)
    return RunState(model, optimizer, scaler, ema, identity, found.state["global_batch_size"])


def without(group: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in group.items() if key != name}


MISFITS: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": ("model", lambda g: without(g, "visual.proj"), "visual.proj is missing"),
    "unknown": ("model", lambda g: {**g, "x": torch.ones(1)}, "x is unknown"),
    "shape": (
        "model",
        lambda g: {**g, "visual.proj": torch.ones(2)},
        r"visual.proj is \[2\] instead",
    ),
    "average": (
        "ema",
        lambda g: {**g, "logit_scale": torch.ones(2)},
        r"logit_scale is \[2\] instead",
    ),
    "no average": ("ema", lambda g: without(g, "logit_scale"), "logit_scale is missing"),
    "moments": (
        "optimizer",
        lambda g: {**g, "visual.proj.exp_avg": torch.ones(2)},
        r"visual.proj.exp_avg is \[2\]",
    ),
    "no moment": (
        "optimizer",
        lambda g: without(g, "visual.proj.exp_avg_sq"),
        "lacks visual.proj.exp_avg_sq",
    ),
    "no count": ("optimizer", lambda g: without(g, "visual.proj.step"), "lacks visual.proj.step"),
    "no moments": ("optimizer", lambda g: {}, "lacks the optimizer's moments"),
    "count": (
        "optimizer",
        lambda g: {**g, "visual.proj.step": torch.ones(2)},
        r"visual.proj.step is \[2\]",
    ),
}


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("what", MISFITS)
def test_tensors_of_another_model_are_named(finished, tmp_path, what, lazily):
    run = copied(finished, tmp_path)
    newest = run / "checkpoints" / "step_00000005"
    found = load_checkpoint(newest)
    state_of(found).load(load_checkpoint(newest, lazily=lazily))
    group, edit, said = MISFITS[what]
    tensors = {key: dict(value) for key, value in found.tensors.items()}
    save_checkpoint(run / "checkpoints", 5, {**tensors, group: edit(tensors[group])}, found.state)
    with pytest.raises(ValueError, match=said):
        state_of(found).load(load_checkpoint(newest, lazily=lazily))


@pytest.mark.parametrize(
    "identity",
    [{}, {"model": 3}, {"model": {}}, {"model": {"embed_dim": 8}}, {"vocabulary": 3}],
)
def test_a_run_that_does_not_say_its_model_is_named(finished, tmp_path, identity):
    run = copied(finished, tmp_path)
    found = load_checkpoint(run / "checkpoints" / "step_00000005")
    known = {**found.state["identity"], **identity} if identity else {}
    save_checkpoint(run / "checkpoints", 5, found.tensors, {**found.state, "identity": known})
    with pytest.raises(CheckpointError, match="step_00000005"):
        load_run(run)


def test_a_run_that_went_back_and_was_killed_goes_on_from_there(server, finished, tmp_path):
    """Between the cut of its log and its first save."""
    run = copied(finished, tmp_path)
    line = ["--resume", str(run / "checkpoints" / "step_00000003"), "--epochs", "2"]
    started = server.start([*line, "--save-every-steps", "1000"], tmp_path / "out")
    wait_until(
        lambda: started.server.poll(started.pid) is not None or len(read_metrics(run)[0]) == 4,
        "a step",
    )
    started.kill()
    started.wait()
    status, text = server.run(["--resume", str(run), "--save-every-steps", "1"], tmp_path / "out")
    assert status == 0, text
    assert [row["step"] for row in read_metrics(run)[0]] == list(range(1, 11))


# Workers.


def test_a_killed_worker_costs_no_step(server, table, tmp_path):
    # A schedule that does not depend on the length of the run.
    constant = ["--lr-scheduler", "const", "--warmup", "0"]
    line = flags(tmp_path, table, "--workers", "1", *constant, epochs=10_000)
    line[line.index("--save-every-steps") + 1] = "1000000"
    run = server.start(line, tmp_path / "out")
    log = tmp_path / "r" / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.stat().st_size > 0, "step")
    (worker,) = children(run.pid)
    os.kill(worker, signal.SIGKILL)
    assert run.wait() == train.WORKER_LOST_STATUS
    assert "was killed, usually because memory ran out; use fewer --workers" in one_line(run.text)
    assert "go on with: python -m clipcore.train --resume" in run.text
    done = [row["step"] for row in read_metrics(tmp_path / "r")[0]][-1]
    newest = latest_checkpoint(tmp_path / "r" / "checkpoints")
    assert newest is not None and newest.name == f"step_{done:08d}"

    # To the bits of a run that lost none.
    end = ["--epochs", str(done // 5 + 1)]
    status, text = server.run(["--resume", str(tmp_path / "r"), *end], tmp_path / "out")
    assert status == 0, text
    line[line.index("--name") + 1] = "straight"
    status, text = server.run([*line, *end], tmp_path / "out")
    assert status == 0, text
    assert_same_bits(tmp_path / "straight", tmp_path / "r")
