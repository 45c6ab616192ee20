"""The number of threads of a run on the CPU: measured, chosen, and kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import NANO
from shards import write_csv
from torch import nn

from clipcore import train
from clipcore.ranks.distributed import World
from clipcore.run import threads
from clipcore.run.config import TrainConfig
from clipcore.run.folders import resumed_config
from clipcore.run.recipe import RunConfig, resolve
from clipcore.towers.resnet import BatchNorm2d


@pytest.fixture(autouse=True)
def as_many_threads_as_before():
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


class Machine:
    """A model of one number whose passes take a time that depends on the threads, by the clock that it is."""

    def __init__(self, seconds_a_row: dict[int, float]) -> None:
        self.module = nn.Sequential(nn.Conv2d(1, 1, 1), BatchNorm2d(1))
        self.seconds_a_row = seconds_a_row
        self.passes: list[tuple[int, int]] = []
        self.now = 0.0

    def embed(self, rows: slice, following: slice | None) -> list[torch.Tensor]:
        number = torch.get_num_threads()
        self.passes.append((number, rows.stop))
        self.now += self.seconds_a_row[number] * rows.stop
        return [self.module(torch.ones(rows.stop, 1, 1, 1)), torch.ones(2)]


def measured(
    monkeypatch, seconds_a_row: dict[int, float], **given
) -> tuple[Machine, threads.Timed]:
    machine = Machine(seconds_a_row)
    # Of the module alone: the process's own clock goes on.
    monkeypatch.setattr(threads, "time", SimpleNamespace(perf_counter=lambda: machine.now))
    before = {name: value.clone() for name, value in machine.module.state_dict().items()}
    found = threads.set_faster(
        machine.embed, machine.module, **{"most_rows": 256, "most": 3} | given
    )
    assert torch.get_num_threads() == found.number
    assert all(torch.equal(machine.module.state_dict()[name], before[name]) for name in before)
    assert all(weight.grad is None for weight in machine.module.parameters())
    return machine, found


@pytest.mark.fast
def test_the_faster_of_one_and_all_threads(monkeypatch):
    machine, found = measured(monkeypatch, {1: 2e-4, 3: 1.5e-4})
    assert found == (3, 3, 256, pytest.approx(0.0512), pytest.approx(0.0384))
    # All rows, since with fewer a pass is too short to tell; then in turn.
    searched = [(3, rows) for rows in (2, 4, 8, 16, 32, 64, 128) for _ in range(2)]
    assert machine.passes == [*searched, (3, 256), *[(3, 256), (1, 256)] * 3]

    # Few rows, once, where a pass is long and the difference large.
    machine, found = measured(monkeypatch, {1: 0.1, 3: 1.5})
    assert found == (1, 3, 2, pytest.approx(0.2), pytest.approx(3.0))
    assert machine.passes == [*[(3, 2)] * 3, (3, 2), (1, 2)]
    assert str(found) == (
        "threads: 1; 2 pairs take 200 ms with 1 and 3,000 ms with 3 (--threads N to choose)"
    )
    assert measured(monkeypatch, {1: 1e-3, 3: 1e-3}, most_rows=5)[1].rows == 5


@pytest.mark.fast
def test_ranks_decide_alike(monkeypatch):
    """By the sum of their times, though this one alone would choose otherwise."""

    def add_up(values: list[float]) -> list[float]:
        return [value + other for value, other in zip(values, [5.0, 1.0], strict=False)]

    assert measured(monkeypatch, {1: 1e-3, 3: 2e-3}, add_up=add_up)[1].number == 3


@pytest.mark.fast
def test_ranks_and_loader_processes_leave_the_other_cores(monkeypatch):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert threads.most_threads(world_size=1, workers=2) == 14
    assert threads.most_threads(world_size=4, workers=1) == 3
    assert threads.most_threads(world_size=4, workers=9) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert threads.most_threads(world_size=8, workers=0) == 8


def test_a_run_keeps_the_number_that_it_began_with(tmp_path: Path, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(train, "make_deterministic", lambda: None)  # for the whole process
    monkeypatch.setattr(threads, "most_threads", lambda world_size, workers: 2)
    computed = []
    monkeypatch.setattr(
        train, "describe", lambda *_: computed.append(torch.get_num_threads()) or "a run"
    )
    data = write_csv(tmp_path / "table", num_pairs=16)
    line = ["--logs", str(tmp_path), "--name", "r", "--train-data", str(data), *NANO]
    line += ["--batch-size", "8", "--lr", "1e-3"]

    def run(*given: str) -> tuple[int, str]:
        """Return the number of threads that the run notes, and what it says."""
        assert train.main([*line, *given]) == 0
        noted = json.loads((tmp_path / "r" / "config.json").read_text())["threads"]
        assert torch.get_num_threads() == noted
        said = capfd.readouterr()
        return noted, said.out + said.err

    timed = threads.Timed(1, 2, 8, 0.1, 0.2)

    def set_faster(*_):
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        return timed

    monkeypatch.setattr(threads, "set_faster", set_faster)
    noted, said = run("--epochs", "1")
    assert noted == 1 and str(timed) in said

    monkeypatch.delattr(threads, "set_faster")
    assert run("--epochs", "2", "--resume", "latest")[0] == 1
    assert computed[-1] == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    noted, said = run("--epochs", "3", "--resume", "latest")
    assert noted == 2 and "OMP_NUM_THREADS is 2, where this run had 1" in said
    noted, said = run("--epochs", "4", "--resume", "latest", "--threads", "1")
    assert noted == 1 and "--threads was 2 in this run, now 1" in said


def config_of(**settings: object) -> RunConfig:
    return dataclasses.replace(resolve(TrainConfig()), **settings)  # type: ignore[arg-type]


@pytest.mark.fast
def test_a_number_that_the_machine_has_not_to_give_is_measured_anew(monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "most_threads", lambda world_size, workers: 4 - workers)
    cpu = World(0, 1, 0, torch.device("cpu"))
    kept = threads.set_threads(config_of(threads=3, workers=1), False, cpu)
    assert kept.threads == torch.get_num_threads() == 3 and capfd.readouterr().out == ""

    anew = threads.set_threads(config_of(threads=5, workers=1), False, cpu)
    assert anew.threads is None and torch.get_num_threads() == 3
    said = capfd.readouterr()
    assert "this run had 5 threads, and here it may have 3" in said.out + said.err
    # As many as the user says.
    assert threads.set_threads(config_of(threads=5), True, cpu).threads == 5
    assert torch.get_num_threads() == 5
    # One core is no question.
    assert threads.set_threads(config_of(workers=3), False, cpu).threads == 1

    # What was measured on a CPU is nothing to a GPU's host.
    gpu = World(0, 1, 0, torch.device("cuda"))
    torch.set_num_threads(2)
    assert threads.set_threads(config_of(threads=1), False, gpu).threads == 1
    assert torch.get_num_threads() == 2


def test_another_data_loader_is_measured_anew(tmp_path: Path):
    world = World(0, 1, 0, torch.device("cpu"))
    (tmp_path / "config.json").write_text(
        json.dumps(dataclasses.asdict(config_of(threads=3, workers=0)))
    )
    for given, expected in (({}, 3), ({"workers": 0}, 3), ({"workers": 1}, None)):
        found = resumed_config(tmp_path, config_of(**given), frozenset(given), world)
        assert found.threads == expected
    chosen = config_of(workers=1, threads=2)
    assert resumed_config(tmp_path, chosen, frozenset({"workers", "threads"}), world).threads == 2


@pytest.mark.parametrize(("one_s", "both_s", "expected"), [(10, 6, 2), (4, 61, 1), (5, 5, 2)])
def test_products_take_the_faster_number_of_threads(monkeypatch, one_s, both_s, expected):
    now, seconds = [0], {1: one_s, 2: both_s}

    def product(*_: torch.Tensor) -> None:
        now[0] += seconds[torch.get_num_threads()]

    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(threads, "time", clock)
    monkeypatch.setattr(threads.torch, "mm", product)
    assert threads.set_faster_for_products(2) == torch.get_num_threads() == expected
