"""Ranks and the collectives that training needs, on top of torch.distributed.

One process without a launcher has world size 1. It starts no process group, and every function here
then returns at once with the result for a group of one.

Letters: B rows on this rank that G rows of all ranks are gathered from, E embedding size, W ranks;
N and M the same as B and G where rows are of any kind.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from clipcore.ranks import slurm, watchdog
from clipcore.terminal import first_line, printable_lines

T = TypeVar("T")

# The longest wait for another rank, in seconds. A rank may be late because only it writes a
# checkpoint. A rank that is later than this is dead, and the others must end too.
TIMEOUT_S = 600.0

# torch 2.13 renamed it and warns about the old name.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run."""

    rank: int
    """0 to world_size - 1; rank 0 writes logs and checkpoints."""
    world_size: int
    """Number of processes."""
    local_rank: int
    """Rank among the processes of this machine; it picks the GPU."""
    device: torch.device
    """The device this process computes on."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    def print(self, message: str) -> None:
        """Print a line on rank 0 only."""
        if self.is_main:
            print(printable_lines(message))


def init_distributed(
    device: str | torch.device | None = None, timeout_s: float = TIMEOUT_S
) -> World:
    """Join the process group that torchrun or Slurm's srun describes in the environment.

    Args:
        device: "cpu" or "cuda" to insist on one; None takes CUDA where there is a GPU.
        timeout_s: how long a rank may keep the others waiting in a collective, in seconds.

    Returns:
        The place of this process; world size 1, and no process group, without a launcher.

    Raises:
        ValueError: the launcher's environment variables are incomplete, or there are more ranks on this
            machine than GPUs, or CUDA is requested and there is none.
        RankError: another rank did not start.
    """
    slurm.set_torchrun_variables()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    missing = [name for name in names if name not in os.environ]
    if 0 < len(missing) < len(names):
        raise ValueError(
            f"the environment sets some of {', '.join(names)} but not {', '.join(missing)}; "
            "start several processes with `torchrun --nproc-per-node N -m -- clipcore.train ...`, or "
            "unset all of them for a single process"
        )
    rank, world_size, local_rank = (0, 1, 0) if missing else map(_whole_number, names)
    if not 0 <= rank < world_size or local_rank < 0:
        raise ValueError(
            f"the environment sets RANK={rank}, WORLD_SIZE={world_size}, LOCAL_RANK={local_rank}, but ranks count from 0 to "
            "below WORLD_SIZE; let torchrun set them, or unset all of them for a single process"
        )
    world = World(rank, world_size, local_rank, pick_device(device, local_rank))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if world_size > 1 and not dist.is_initialized():
        on_cuda = world.device.type == "cuda"
        # The start has its own time limit: its duration varies more between machines than that of a step.
        start = timedelta(seconds=watchdog.START_S)
        try:
            store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=start))
        except dist.DistError as error:
            where = ":".join(os.environ.get(n, "") for n in ("MASTER_ADDR", "MASTER_PORT"))
            raise ValueError(
                f"rank {rank} cannot reach the others at {where}: {first_line(error)}; MASTER_ADDR and MASTER_PORT must "
                "name a free port of rank 0's machine that all ranks can reach"
            ) from error
        is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = watchdog.start_watchdog(store, rank, world_size, timeout_s, is_launchers)
        # NCCL's own watchdog aborts without naming the other ranks, so ours must come first.
        slack_s = 2 * (watchdog.MARGIN_S + watchdog.PATIENCE_S) if on_cuda else 0.0
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s + slack_s),
            device_id=world.device if on_cuda else None,
        )
    return world


def _whole_number(name: str) -> int:
    """Return the integer value of an environment variable."""
    try:
        return int(os.environ[name])
    except ValueError:
        raise ValueError(
            f"{name} is {os.environ[name]!r} in the environment, no whole number; let torchrun set it, or unset it"
        ) from None


def pick_device(device: str | torch.device | None, local_rank: int) -> torch.device:
    """Return the device of a process; None takes CUDA where there is a GPU.

    Raises:
        ValueError: the device is neither "cpu" nor "cuda", or the GPU does not exist.
    """
    asked: torch.device | None
    try:
        asked = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        asked = None
    if asked is None or asked.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is cpu or cuda, not {str(device)!r}")
    if asked.type == "cpu":
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        raise ValueError(f"--device {asked}: this machine shows no GPU; use --device cpu")
    if asked.index is not None:
        if "LOCAL_RANK" in os.environ:
            raise ValueError(
                f"--device {asked} names one GPU, but torchrun gives each process its own; pass --device cuda"
            )
        if asked.index >= num_gpus:
            raise ValueError(
                f"--device {asked}: this machine shows {num_gpus} GPUs, counted from 0"
            )
        return asked
    if local_rank >= num_gpus:
        raise ValueError(
            f"local rank {local_rank} needs GPU {local_rank}, but this machine shows {num_gpus}; "
            "start at most one process per GPU (in Slurm give --gpus-per-node, not --gpus-per-task), or ask for the CPU"
        )
    return torch.device("cuda", local_rank)


def close_distributed() -> None:
    """Leave the process group, if there is one."""
    watchdog.stop_watchdog()
    if dist.is_initialized():
        # What holds the group in a cycle of references, such as a kept error, would take it apart when the interpreter
        # ends, and a thread of the group's that then asks for the interpreter aborts the process.
        gc.collect()
        dist.destroy_process_group()


def is_main() -> bool:
    """Return whether this process is rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Wait until every rank of the group (None: all ranks) has entered the barrier."""
    if _group_size(group) > 1:
        with watchdog.collective("barrier", group):
            _meet("barrier", group)


def _group_size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def _wire_device(group: dist.ProcessGroup | None) -> torch.device:
    """Return the device on which this group's backend needs a small tensor."""
    if "gloo" in dist.get_backend(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def gather_equal(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Gather [N, ...] into [W * N, ...]; N must be equal on all ranks, which the caller checks."""
    y = x.new_empty((_group_size(group) * x.shape[0], *x.shape[1:]))
    all_gather_single(y, x, group=group)
    return y


def _meet(
    name: str, group: dist.ProcessGroup | None, a: int = 0, b: int = 0
) -> list[tuple[int, int]]:
    """Return two numbers of each rank, after a check that all ranks entered this collective at this step.

    All collectives share one header format. Ranks that are out of step thus exchange headers, and never payloads.
    """
    header = torch.tensor([watchdog.fingerprint(name), a, b], device=_wire_device(group))
    headers = gather_equal(header, group).view(-1, 3).tolist()
    watchdog.check_fingerprints(name, [theirs for theirs, _, _ in headers])
    return [(a, b) for _, a, b in headers]


def all_reduce_flag(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Return whether any rank raised its flag; the answer is the same on all ranks."""
    if _group_size(group) == 1:
        return flag
    with watchdog.collective("vote", group):
        return any(raised for raised, _ in _meet("vote", group, int(flag)))


def all_reduce_sum(values: list[float], group: dist.ProcessGroup | None = None) -> list[float]:
    """Return each number summed over the ranks, in one collective; the bits are the same on every rank."""
    if _group_size(group) == 1:
        return [float(value) for value in values]
    with watchdog.collective("sum of numbers", group):
        _meet("sum of numbers", group)
        total = torch.tensor(values, dtype=torch.float64, device=_wire_device(group))
        dist.all_reduce(total, group=group)
        return total.tolist()


def all_reduce_(
    x: torch.Tensor,
    name: str,
    op: Any = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Replace the tensor by its sum (or another ``op``) over the ranks; ``name`` appears in a RankError."""
    with watchdog.collective(name, group):
        dist.all_reduce(x, op, group=group)


@torch.no_grad()
def broadcast_tensors(
    tensors: Iterable[torch.Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Copy the values of the group's first rank into the tensors of all others."""
    if _group_size(group) > 1:
        with watchdog.collective("broadcast of tensors", group):
            _meet("broadcast of tensors", group)
            for tensor in tensors:
                dist.broadcast(tensor, group_src=0, group=group)


def gather_sizes(
    first: int, second: int, name: str, group: dist.ProcessGroup | None = None
) -> list[tuple[int, int]]:
    """Return two numbers of every rank, in rank order; the host waits for them. ``name`` appears in a RankError."""
    if _group_size(group) == 1:
        return [(first, second)]
    with watchdog.collective(name, group):
        return _meet(name, group, first, second)


@torch.no_grad()
def gather_rows(x: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Return the rows of all ranks, in rank order, without gradient; ranks may hold different numbers.

    Args:
        x: [N, ...] of any dtype; N may differ between ranks and be 0, the other sizes may not.
        group: the ranks to gather from; None means all.

    Returns:
        [M, ...] on the device of x, M the sum of all N.

    Raises:
        ValueError: x has no axis of rows, or the ranks differ in the size of a row.
    """
    if x.dim() == 0:
        raise ValueError("gather_rows needs [N, ...], got a tensor without axes")
    if _group_size(group) == 1:
        return x.detach()
    device = _wire_device(group)
    row_bytes = torch.Size(x.shape[1:]).numel() * x.element_size()
    with watchdog.collective("gathering of rows", group):
        headers = _meet("gathering of rows", group, x.shape[0], row_bytes)
        if any(theirs != row_bytes for _, theirs in headers):
            raise ValueError(
                f"gather_rows: ranks differ in bytes per row: {[b for _, b in headers]}"
            )
        counts = [count for count, _ in headers]
        if max(counts) * row_bytes == 0:
            return x.new_empty((sum(counts), *x.shape[1:]))
        # Bytes, because gloo does not carry every dtype.
        padded = torch.zeros((max(counts), row_bytes), dtype=torch.uint8, device=device)
        padded[: x.shape[0]] = x.contiguous().flatten().view(torch.uint8).view(-1, row_bytes)
        blocks = gather_equal(padded, group).view(len(counts), max(counts), row_bytes)
    rows = torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])
    return rows.flatten().view(x.dtype).view(-1, *x.shape[1:]).to(x.device)


def broadcast_object(value: T, source: int = 0, group: dist.ProcessGroup | None = None) -> T:
    """Return the picklable value that rank ``source`` of the group passed; the other ranks' values are ignored."""
    if _group_size(group) == 1:
        return value
    values = [value]
    with watchdog.collective("broadcast of a value", group):
        _meet("broadcast of a value", group)
        dist.broadcast_object_list(
            values, group_src=source, group=group, device=_wire_device(group)
        )
    return values[0]


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the picklable values of all ranks of the group, in rank order, on every rank."""
    if _group_size(group) == 1:
        return [value]
    values: list[T | None] = [None] * _group_size(group)
    with watchdog.collective("gather of values", group):
        _meet("gather of values", group)
        dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]
