"""bench/wire.py: its formulas against the bytes that two gloo ranks exchange, and its times by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import harness
from scaling_ranks import LOSSES, collectives_on_rank
from wire import (
    ETHERNET,
    GATHER,
    NVLINK,
    REDUCE,
    SCATTER,
    Collective,
    Wire,
    gradient_collectives,
    loss_collectives,
)

CASES = [
    (loss, rows, width, dtype)
    for loss in LOSSES
    for rows, width, dtype in (
        (8, 24, torch.float32),
        (5, 7, torch.bfloat16),
        (16, 32, torch.float64),
    )
]


def test_the_formula_is_what_two_ranks_exchange(pool_of_two):
    for loss, rows, width, dtype in CASES:
        expected = loss_collectives(2 * rows, width, 2, dtype, loss=loss, on_gpu=False)
        for found in pool_of_two.run(collectives_on_rank, loss, rows, width, dtype):
            assert found == expected, (loss, rows, width, dtype)
    for found in pool_of_two.run(averaged_gradients):
        assert found == gradient_collectives(NUM_PARAMETERS)


NUM_PARAMETERS = 3 * 5 + 5


def averaged_gradients(world):
    from wire import CollectiveCounter

    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 5))
    for _ in range(2):  # the second step of a process sends the order of the buckets
        F.mse_loss(model(torch.ones(2, 3)), torch.ones(2, 5)).backward()
    with CollectiveCounter() as counter:
        F.mse_loss(model(torch.ones(2, 3)), torch.ones(2, 5)).backward()
    return counter.found


def test_a_ring_sends_all_but_a_rank_s_own_share():
    assert Collective(GATHER, 800).sent_bytes(4) == 600
    assert Collective(SCATTER, 800).sent_bytes(4) == 600
    assert Collective(REDUCE, 800).sent_bytes(4) == 1200
    assert Collective(REDUCE, 800).sent_bytes(1) == 0


def test_time_of_a_wire_is_latency_and_bytes():
    wire = Wire("", bytes_per_s=1e6, latency_s=1e-3, assumptions="")
    assert wire.time_ms([Collective(GATHER, 2000), Collective(REDUCE, 1000)], 2) == pytest.approx(4)
    assert NVLINK.bytes_per_s == pytest.approx(360e9)
    assert ETHERNET.bytes_per_s == pytest.approx(11.25e9)


def test_what_is_computed_stays_out_of_the_measured_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "device_name", lambda device: "a chip")
    cpu, found = torch.device("cpu"), {"ours": harness.Measured([1.0, 2.0, 3.0], 0)}
    harness.record_measured("loss", found, device=cpu, flops=0.0, bytes_moved=0.0, N=4)
    for time_ms in (5.0, 7.0):  # the newest counts
        harness.record_computed("loss on a wire", time_ms, 3e6, "no overlap", N=4, ranks=8)
    rows = [json.loads(line) for line in (tmp_path / "computed.jsonl").read_text().splitlines()]
    assert all(row["computed"] is True for row in rows)
    assert "computed" not in (tmp_path / "a-chip.jsonl").read_text()
    measured, _, computed = harness.results_page().partition("## computed, not measured")
    assert "| N 4 | ours | 2.0 |" in measured and "wire" not in measured
    assert computed.count("loss on a wire") == 1
    assert "| loss on a wire | N 4, ranks 8 | 7.0 | 3.0 | no overlap |" in computed
