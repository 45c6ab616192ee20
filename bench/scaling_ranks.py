"""What one of several gloo ranks does for bench_scaling.py: its share of a loss, timed or with its collectives counted."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn import functional as F
from wire import Collective, CollectiveCounter

from clipcore.kernels.logits.pages import give_back_idle_pages
from clipcore.loss import ClipLoss, SigLipLoss
from clipcore.ranks.distributed import World, barrier
from clipcore.run import memory

LOSSES = {"softmax": ClipLoss, "sigmoid": SigLipLoss}


def loss_inputs(
    loss: str, rows: int, width: int, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> list[Tensor]:
    """Return related image and text features of length one, then the factors; all are leaves."""
    image, noise = (F.normalize(torch.randn(rows, width, device=device)) for _ in range(2))
    text = F.normalize(0.3 * image + noise)
    factors = {"softmax": (50.0,), "sigmoid": (10.0, -10.0)}[loss]
    features = [image.to(dtype), text.to(dtype)]
    return [
        t.requires_grad_() for t in (*features, *(torch.tensor(f, device=device) for f in factors))
    ]


def loss_on_rank(
    world: World, loss: str, num_pairs: int, width: int, rounds: int
) -> tuple[list[float], int]:
    """Return (milliseconds of each round, peak bytes of one) for this rank's share of ``num_pairs`` pairs."""
    torch.manual_seed(world.rank)
    leaves = loss_inputs(loss, num_pairs // world.world_size, width, torch.float32)
    loss_fn = LOSSES[loss](rank=world.rank, world_size=world.world_size)

    def step() -> None:
        torch.autograd.grad(loss_fn(*leaves), leaves)

    step()
    give_back_idle_pages()
    with memory.watch(world.device) as watched:
        step()
    times_ms = []
    for _ in range(rounds):
        barrier()
        start = time.perf_counter()
        step()
        times_ms.append(1e3 * (time.perf_counter() - start))
    return times_ms, watched.peak


def collectives_on_rank(
    world: World, loss: str, rows: int, width: int, dtype: torch.dtype
) -> list[Collective]:
    """Return the collectives of one forward and backward pass with ``rows`` pairs on each rank, in order."""
    leaves = loss_inputs(loss, rows, width, dtype)
    loss_fn = LOSSES[loss](rank=world.rank, world_size=world.world_size)
    with CollectiveCounter() as counter:
        torch.autograd.grad(loss_fn(*leaves), leaves)
    return counter.found
