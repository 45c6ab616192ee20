"""How a rank's share of a batch goes through memory: the size of a micro-batch, and how many graphs are kept.

Both are measured on the batch in hand, once, before the first step: micro-batches of growing size run forward and
backward, while their time and their memory are watched. ``str`` of a plan says what was chosen and what it should take.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from clipcore.kernels.weight_casts import WeightCasts
from clipcore.ranks.distributed import gather_sizes
from clipcore.run import memory
from clipcore.run.grad_cache import Embed, sharing
from clipcore.run.optim import local_part
from clipcore.towers.resnet import replayed

GB = 10**9
SMALLEST_PROBE = 32
# A larger micro-batch is taken while it is faster a pair by this factor.
WORTHWHILE = 1.03
# Of a GPU's free memory; the rest is for what an allocator cannot use, and for longer captions than the first batch's.
SHARE_OF_GPU = 0.9
CPU_BYTES = 4 * GB
# Of a process's memory over the tensors in it; docs/log.md has the measurement.
CPU_OVERHEAD = 1.25


def bytes_of(gigabytes: float | None) -> int | None:
    """Return GB in bytes; None stays None."""
    return None if gigabytes is None else round(gigabytes * GB)


@dataclass(frozen=True)
class StepPlan:
    """What a step will do; bytes are on the device that computes.

    Attributes:
        num_rows: pairs of the rank that has most.
        micro_batch_size: pairs that are embedded at once.
        num_kept_graphs: micro-batches that keep their graphs.
        parts: expected bytes by part, all of which are held at the peak.
        budget_bytes: what the peak may be.
        cost: expected share that a step takes more than a direct one would.
    """

    num_rows: int
    micro_batch_size: int
    num_kept_graphs: int
    parts: dict[str, int]
    budget_bytes: int
    cost: float

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        number = -(-self.num_rows // self.micro_batch_size)
        parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in self.parts.items())
        how = (
            f"{number} micro-batches of {-(-self.num_rows // number):,}, {self.num_kept_graphs} of which keep their graphs"
            if number > 1
            else "at once"
        )
        tight = ", more than --step-memory" if self.peak_bytes > self.budget_bytes else ""
        return (
            f"step of {self.num_rows:,} pairs on this device: {how}; about {100 * self.cost:.0f}% more than a direct "
            f"step\nexpected memory, GB: {parts}; {self.peak_bytes / GB:.2f} of {self.budget_bytes / GB:.2f} together{tight}"
        )


@dataclass(frozen=True)
class Probe:
    """A micro-batch that ran forward and backward: its rows, seconds, and bytes beside the parameters' gradients.

    The other bytes are without the weights' copies in 16 bits, which all micro-batches share.
    """

    rows: int
    forward_s: float
    backward_s: float
    graph_bytes: int  # held from the forward pass to the backward pass
    peak_bytes: int  # of both
    block_casts: int  # bytes of the blocks' copies; a direct step frees each at once
    autocast_casts: int  # bytes of autocast's copies, which a direct step's graph holds too

    @property
    def seconds_a_row(self) -> float:
        return (self.forward_s + self.backward_s) / self.rows


def default_budget(device: torch.device) -> int:
    """Return the bytes that a step may take beside model and optimizer where the user says nothing."""
    free = memory.available(device)
    if device.type == "cuda":
        return int(SHARE_OF_GPU * free)
    # The ranks of a machine share its memory.
    return min(CPU_BYTES, free // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def shared_stash_bytes(own_bytes: int, precision: str) -> int:
    """Return what the softmax loss's stash may take on every rank: the least of the ranks' own defaults.

    A loss has other bits with a stash than without one, so that all ranks decide alike. In float32 it is 0: a stash of
    a GPU would round the logits of float32 features to 16 bits.

    Args:
        own_bytes: ``clipcore.kernels.contrastive.default_stash_bytes`` on this rank.
        precision: of the run.
    """
    if precision == "fp32":
        return 0
    return min(number for number, _ in gather_sizes(own_bytes, 0, "defaults of the loss's stash"))


def make_plan(
    embed: Embed,
    module: nn.Module,
    num_rows: int,
    device: torch.device,
    *,
    fixed: dict[str, int],
    loss_bytes: int,
    budget_bytes: int,
    micro_batch_size: int | None = None,
    num_kept_graphs: int | None = None,
    all_but_last: bool = False,
    agree: Callable[[bool], bool] = bool,
) -> StepPlan:
    """Measure micro-batches and return the plan of a step.

    The parameters end without gradients, and BatchNorm's statistics stay as they were.

    Args:
        embed: as of ``grad_cache.differentiate``.
        fixed: bytes by part that a step holds whatever the plan.
        loss_bytes: what the loss takes at its peak, beside its inputs and their gradients.
        budget_bytes: what all parts together may take.
        micro_batch_size, num_kept_graphs: where the user has chosen.
        all_but_last: the last micro-batch cannot keep its graph.
        agree: whether something is so on all ranks, whose towers may have to run in step.

    Raises:
        ValueError: the smallest micro-batch does not fit.
    """
    gradients = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    fixed = {**fixed, "gradients": gradients}
    on_cpu = device.type == "cpu"

    def room(probe: Probe) -> int:
        """Return the bytes left for kept graphs beside one micro-batch.

        On the CPU the loss's memory stays with the process.
        """
        transient = probe.peak_bytes - probe.graph_bytes
        others = transient + loss_bytes if on_cpu else max(transient, loss_bytes)
        casts = probe.block_casts + probe.autocast_casts
        return budget_bytes - sum(fixed.values()) - casts - others

    with replayed(module):
        if micro_batch_size is not None:
            chosen = _probe(embed, module, min(micro_batch_size, num_rows), device)
        else:
            chosen = _fastest(embed, module, num_rows, device, room, agree)
    number = -(-num_rows // chosen.rows)
    rows = -(-num_rows // number)
    graph = max(1, chosen.graph_bytes * rows // chosen.rows)
    most = number - 1 if all_but_last and number > 1 else number
    if num_kept_graphs is None:
        num_kept_graphs = max(1, min(most, room(chosen) // graph))
    num_kept_graphs = min(num_kept_graphs, most)
    transient = (chosen.peak_bytes - chosen.graph_bytes) * rows // chosen.rows
    casts = chosen.autocast_casts + (chosen.block_casts if number > 1 else 0)
    parts = {**fixed, **({"weights in 16 bits": casts} if casts else {})}
    parts |= {"kept graphs": num_kept_graphs * graph}
    if on_cpu:
        parts |= {"loss": loss_bytes, "one micro-batch": transient}
    elif loss_bytes > transient:
        parts |= {"loss": loss_bytes}
    else:
        parts |= {"one micro-batch": transient}
    replayed_share = (number - num_kept_graphs) / number
    forward_share = chosen.forward_s / (chosen.forward_s + chosen.backward_s)
    return StepPlan(
        num_rows=num_rows,
        micro_batch_size=rows,
        num_kept_graphs=num_kept_graphs,
        parts=parts,
        budget_bytes=budget_bytes,
        cost=replayed_share * forward_share,
    )


def _fastest(
    embed: Embed,
    module: nn.Module,
    num_rows: int,
    device: torch.device,
    room: Callable[[Probe], int],
    agree: Callable[[bool], bool],
) -> Probe:
    """Return the smallest micro-batch that fits and that no larger one beats by much."""
    best = _probe(embed, module, min(SMALLEST_PROBE, num_rows), device)
    if not agree(room(best) >= best.graph_bytes):
        raise ValueError(
            f"a micro-batch of {best.rows} pairs takes {best.peak_bytes / GB:.2f} GB, and "
            f"{max(0, room(best) + best.peak_bytes - best.graph_bytes) / GB:.2f} GB are left for it; raise --step-memory, "
            "set --loss-stash 0, or lower --global-batch-size, --micro-batch-size or the memory of a pair "
            "(--grad-checkpointing)"
        )
    size = best.rows
    while size < num_rows:
        size = min(2 * size, num_rows)
        probe = None
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            probe = _probe(embed, module, size, device)
        if probe is None and device.type == "cuda":
            torch.cuda.empty_cache()
        if not agree(probe is not None and room(probe) >= probe.graph_bytes):
            break
        assert probe is not None
        if not agree(best.seconds_a_row > WORTHWHILE * probe.seconds_a_row):
            break
        best = probe
    return best


def _probe(embed: Embed, module: nn.Module, rows: int, device: torch.device) -> Probe:
    """Run some rows forward and backward twice, and return what the second pass takes.

    The graph of the first pass is still there then: what a first pass takes for good, and what an allocator has left
    over, is not counted. A GPU's allocator counts exactly, so that no first graph is needed, which might not fit.
    """
    casts = WeightCasts()
    try:
        with sharing(casts, module):
            return _measured(embed, module, rows, device, casts)
    finally:
        module.zero_grad(set_to_none=True)  # also of a pass that has run out of memory


def _measured(
    embed: Embed, module: nn.Module, rows: int, device: torch.device, casts: WeightCasts
) -> Probe:
    first, saved = _forward_counted(embed, module, rows)
    outputs = sum(part.nbytes for part in first)
    if device.type == "cuda":
        del first
    _backward(_forward(embed, rows))
    _wait_for(device)
    with memory.watch(device) as forward:
        start = time.perf_counter()
        second = _forward(embed, rows)
        _wait_for(device)
        middle = time.perf_counter()
    with memory.watch(device) as backward:
        again = time.perf_counter()
        _backward(second)
        _wait_for(device)
        end = time.perf_counter()
    first = second = []
    # What outlives its graph is autocast's, for the next pass.
    autocast_casts = sum(size for storage, size in saved if not storage.expired())
    held = outputs + sum(size for _, size in saved) - autocast_casts
    # The resident set grows in jumps: a graph is what its tensors take there, and a little for what lies between them.
    graph = max(1, forward.held) if device.type == "cuda" else round(CPU_OVERHEAD * held)
    peak = max(forward.peak, graph + backward.peak)
    return Probe(rows, middle - start, end - again, graph, peak, casts.nbytes, autocast_casts)


def _forward_counted(
    embed: Embed, module: nn.Module, rows: int
) -> tuple[list[Tensor], list[tuple[StorageWeakRef, int]]]:
    """Run a forward pass; return its outputs, and the memory that its graph holds beside the parameters, in bytes."""
    own = {local_part(weight).untyped_storage().data_ptr() for weight in module.parameters()}
    saved: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Tokens are a view of the whole batch, which is there in any case.
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            saved[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return tensor.detach()  # an operation that keeps its own output would keep itself

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = _forward(embed, rows)
    return outputs, list(saved.values())


def _forward(embed: Embed, rows: int) -> list[Tensor]:
    return [part for part in embed(slice(0, rows), None) if part.requires_grad]


def _backward(trained: list[Tensor]) -> None:
    """Run the backward pass, which ends the graph; the parameters keep their gradients."""
    torch.autograd.backward(trained, [torch.ones_like(part) for part in trained])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
