"""What a run does between the gradients of a step and its row in the log is what bench/bench_counts.py counts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from runs import NANO, leave_process_alone
from shards import write_csv
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))
import bench_counts

from clipcore import train
from clipcore.run.metrics import MetricsLogger
from clipcore.run.optim import build_optimizer
from clipcore.run.train_step import TrainingStep
from clipcore.towers.factory import create_model


class Names(TorchDispatchMode):
    """Keeps the names of all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_the_update_is_that_of_the_training_loop(tmp_path: Path, monkeypatch: Any) -> None:
    """Between a step's gradients and its row in the log: the same operators in the same order, by the second step on."""
    leave_process_alone(monkeypatch)
    gradients, log = TrainingStep.gradients, MetricsLogger.step
    of_loop: list[Names] = []

    def gradients_then_recorded(*args: Any, **kwargs: Any) -> Any:
        output = gradients(*args, **kwargs)
        of_loop.append(Names())
        of_loop[-1].__enter__()
        return output

    def log_unrecorded(*args: Any, **kwargs: Any) -> None:
        of_loop[-1].__exit__(None, None, None)
        log(*args, **kwargs)

    monkeypatch.setattr(TrainingStep, "gradients", gradients_then_recorded)
    monkeypatch.setattr(MetricsLogger, "step", log_unrecorded)
    data = write_csv(tmp_path / "table", num_pairs=24)
    line = ["--logs", str(tmp_path), "--name", "r", "--train-data", str(data), *NANO]
    line += ["--batch-size", "8", "--micro-batch-size", "8", "--lr", "1e-3", "--epochs", "1"]
    assert train.main([*line, "--threads", "1"]) == 0
    assert len(of_loop) == 3 and of_loop[1].seen == of_loop[2].seen

    model = create_model("ViT-nano-8-32")
    optimizer = build_optimizer(model, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    bench_counts._warm_up(optimizer, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    output: Any = mock.Mock(loss=torch.tensor(1.0))
    with Names() as of_bench:
        bench_counts.update(model, optimizer, scaler, output)
    assert of_bench.seen == of_loop[1].seen
    # The logit scale; loss and norm come in one transfer of a list.
    assert of_bench.seen.count("_local_scalar_dense") == 1
