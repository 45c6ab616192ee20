"""Signals: noted for the loop to see between two steps, and the end of a wait for data that has none."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import LIMIT_S, NANO, RunServer, assert_same_bits, children
from shards import write_csv
from test_loader import Pictures, make, take

from clipcore import train
from clipcore.data import Pair, tables, transforms
from clipcore.ranks import signals
from clipcore.ranks.signals import DataWaitError, Interrupt, waiting_for_data


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """Check that a foreign timer and handler, such as pytest-timeout's, are restored afterwards."""
    before = signal.signal(signal.SIGALRM, others)
    timer = signal.setitimer(signal.ITIMER_REAL, 1e6)
    yield
    assert signal.getsignal(signal.SIGALRM) is others
    assert signal.setitimer(signal.ITIMER_REAL, *timer)[0] > 9e5
    signal.signal(signal.SIGALRM, before)


def others(*_: object) -> None:
    raise AssertionError("the alarm of somebody else")


@pytest.mark.fast
@pytest.mark.parametrize("is_waiting_first", [True, False])
def test_a_wait_for_data_ends_after_a_signal(is_waiting_first):
    with Interrupt(data_wait_s=0.05) as received:
        if not is_waiting_first:
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(DataWaitError) as caught, waiting_for_data():
            if is_waiting_first:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(LIMIT_S)
    assert str(caught.value) == (
        "no data arrived for 0.05 s after SIGTERM; check the disk that holds it"
    )
    assert caught.value.exit_status == received.exit_status == 143


@pytest.mark.fast
def test_only_a_wait_that_is_long_itself_ends(monkeypatch):
    now = 0.0
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: now))
    with Interrupt(data_wait_s=100.0) as received:
        os.kill(os.getpid(), signal.SIGTERM)
        now = 1000.0
        received._end_wait()  # while nothing is waited for
        with waiting_for_data():
            now = 1099.0
            received._end_wait()
            now = 1100.0
            with pytest.raises(DataWaitError):
                received._end_wait()
        received._end_wait()

    # Of a process that is not alone.
    with Interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGALRM) is others


@pytest.mark.fast
def test_slow_data_is_no_data_that_does_not_come(monkeypatch):
    """Each sample that is there begins the wait anew, and none is taken for unreadable."""
    now = 0.0
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: now))
    with Interrupt(data_wait_s=100.0) as received:

        class Slow(Pictures):
            def __getitem__(self, index: int) -> Pair:
                nonlocal now
                now += 99.0
                received._end_wait()
                return super().__getitem__(index)

        os.kill(os.getpid(), signal.SIGTERM)
        (batch,) = take(make(Slow(64)).batches(), 1)
    assert len(batch.indices) == 8 and not batch.bad


@pytest.mark.fast
def test_a_decoder_that_takes_an_error_for_damage_does_not_take_this_one(monkeypatch):
    def decode(*_: object) -> None:
        raise DataWaitError(signal.SIGTERM, 10.0)

    monkeypatch.setattr(transforms, "_decode_pillow", decode)
    with pytest.raises(DataWaitError):
        transforms.decode_image(b"x")


class Stuck(Pictures):
    """A source of which only some pictures ever come, as from a disk that is gone."""

    def __init__(self, size: int, there: set[int]) -> None:
        super().__init__(size)
        self.there = there

    def __getitem__(self, index: int) -> Pair:
        if index not in self.there:
            time.sleep(LIMIT_S)
        return super().__getitem__(index)


@pytest.mark.fast
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_do_not_come_end_after_a_signal_and_leave_no_process(workers):
    before = children(os.getpid())
    first = set(make(Pictures(64)).batch(0).indices.tolist())
    batches = make(Stuck(64, first), workers=workers).batches()
    take(batches, 1)  # the workers are there
    with Interrupt(data_wait_s=0.2), pytest.raises(DataWaitError):
        os.kill(os.getpid(), signal.SIGTERM)
        take(batches, 1)
    assert children(os.getpid()) == before


def test_a_run_whose_data_does_not_come_saves_its_last_step(
    server: RunServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    table = write_csv(tmp_path / "table", num_pairs=40)

    def line(name: str) -> list[str]:
        of_run = ["--logs", str(tmp_path), "--name", name, "--train-data", str(table), *NANO]
        of_run += ["--batch-size", "8", "--epochs", "2", "--save-frequency", "0"]
        return [*of_run, "--threads", "1"]

    assert server.run(line("straight"), tmp_path / "out")[0] == 0
    read, numbers = tables.read_image_file, iter(range(1000))

    def read_some(*arguments: object) -> object:
        if next(numbers) == 30:  # in the fourth step
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(LIMIT_S)
        return read(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(tables, "read_image_file", read_some)
        patched.setattr(train, "DATA_WAIT_S", 0.1)
        patched.setattr(train, "make_deterministic", lambda: None)  # for the whole process
        assert train.main(line("stuck")) == 143
    said = capfd.readouterr()
    assert "saved step 3 of 10; go on with: python -m clipcore.train --resume" in said.out
    assert said.err.splitlines()[-1] == (
        "clipcore.train: stopped: no data arrived for 0.1 s after SIGTERM; check the disk that holds it"
    )
    rows = (tmp_path / "stuck" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]
    assert server.run([*line("stuck"), "--resume", "latest"], tmp_path / "out")[0] == 0
    assert_same_bits(tmp_path / "straight", tmp_path / "stuck")
