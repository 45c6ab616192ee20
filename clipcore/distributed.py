"""Ranks and the collectives that training needs, on top of torch.distributed.

One process without a launcher is world size 1: it starts no process group, and every function here
then returns at once with what a group of one would give.

Letters: B pairs on this rank, G pairs of the global batch (G = world size * B), E embedding size,
N rows on this rank, M rows of all ranks together.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from clipcore import native, roll_call

T = TypeVar("T")

# The longest wait for another rank, in seconds. A rank may be late by a checkpoint that only it
# writes; beyond this it is dead, and the others must end too.
TIMEOUT_S = 600.0

# torch 2.13 renamed the single-tensor collectives and warns about the old names.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# The dtypes that all_gather_with_grad carries, with their numbers in c10::ScalarType.
_DTYPE_CODES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}


@dataclass(frozen=True)
class World:
    """Where this process stands among all processes of the run."""

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

    def say(self, message: str) -> None:
        """Prints a line once for all processes."""
        if self.is_main:
            print(message)


def init_distributed(
    device: str | torch.device | None = None, timeout_s: float = TIMEOUT_S
) -> World:
    """Joins the process group that torchrun describes in the environment.

    Args:
        device: "cpu" or "cuda" to insist on one; None takes CUDA where there is a GPU.
        timeout_s: how long a rank may keep the others waiting in a collective, in seconds.

    Returns:
        The place of this process; world size 1, and no process group, without torchrun.

    Raises:
        ValueError: the environment is torchrun's only in part, or there are more ranks on this
            machine than GPUs, or CUDA is asked for and there is none.
        RankError: another rank did not start.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    missing = [name for name in names if name not in os.environ]
    if 0 < len(missing) < len(names):
        raise ValueError(
            f"the environment sets some of {', '.join(names)} but not {', '.join(missing)}; "
            "start several processes with `torchrun --nproc-per-node N -m -- clipcore.train ...`, or "
            "unset all of them for a single process"
        )
    rank, world_size, local_rank = (0, 1, 0) if missing else (int(os.environ[n]) for n in names)
    world = World(rank, world_size, local_rank, _pick_device(device, local_rank))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if world_size > 1 and not dist.is_initialized():
        on_cuda = world.device.type == "cuda"
        # The start has a time limit of its own: machines differ more in it than in a step.
        start = timedelta(seconds=roll_call.START_S)
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=start))
        is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = roll_call.open_roll_call(store, rank, world_size, timeout_s, is_launchers)
        # NCCL's own watchdog aborts without a word about the other ranks: the roll call's comes first.
        slack_s = 2 * (roll_call.MARGIN_S + roll_call.PATIENCE_S) if on_cuda else 0.0
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s + slack_s),
            device_id=world.device if on_cuda else None,
        )
    return world


def _pick_device(device: str | torch.device | None, local_rank: int) -> torch.device:
    try:
        asked = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device is cpu or cuda, not {device!r}") from None
    if asked.type != "cuda":
        return torch.device(asked.type)
    num_gpus = torch.cuda.device_count()
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
            "start at most one process per GPU, or ask for the CPU"
        )
    return torch.device("cuda", local_rank)


def close_distributed() -> None:
    """Leaves the process group, if there is one."""
    roll_call.close_roll_call()
    if dist.is_initialized():
        dist.destroy_process_group()


def is_main() -> bool:
    """Whether this process is rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Waits until every rank of the group (None: all ranks) has come here."""
    if _group_size(group) > 1:
        with roll_call.collective("barrier", group):
            _meet("barrier", group)


def _group_size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def _wire_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where a small tensor has to lie for this group's backend."""
    if "gloo" in dist.get_backend(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _gather(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[N, ...] -> [W * N, ...], equal rows on all ranks."""
    y = x.new_empty((_group_size(group) * x.shape[0], *x.shape[1:]))
    _all_gather_single(y, x, group=group)
    return y


def _meet(
    name: str, group: dist.ProcessGroup | None, a: int = 0, b: int = 0
) -> list[tuple[int, int]]:
    """Two numbers of each rank, after checking that all ranks came to this collective of this step.

    One header for all: ranks that are out of step exchange headers, and never each other's payload.
    """
    header = torch.tensor([roll_call.mark(name), a, b], device=_wire_device(group))
    headers = _gather(header, group).view(-1, 3).tolist()
    roll_call.compare_marks(name, [mark for mark, _, _ in headers])
    return [(a, b) for _, a, b in headers]


def _check_same_on_all_ranks(x_BE: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Ranks that disagree about shape or dtype would hang, or exchange garbage: compare first.

    One number per rank, packed as csrc/all_gather.cpp packs it: dtype (7 bits), rows (32), columns
    (24). On CUDA the comparison stays on the device, so that the host does not wait for it.
    """
    mine = (_DTYPE_CODES[x_BE.dtype] << 56) | (x_BE.shape[0] << 24) | x_BE.shape[1]
    signatures = _gather(torch.full((1,), mine, dtype=torch.int64, device=x_BE.device), group)
    message = "all_gather_with_grad: every rank must pass the same shape and dtype"
    if x_BE.is_cuda:
        torch._assert_async((signatures == mine).all(), message)
        return
    dtypes = {code: dtype for dtype, code in _DTYPE_CODES.items()}
    for rank, theirs in enumerate(signatures.tolist()):
        if theirs != mine:
            shape = [(theirs >> 24) & 0xFFFFFFFF, theirs & 0xFFFFFF]
            raise ValueError(
                f"{message}, but rank {dist.get_rank(group)} has {list(x_BE.shape)} {x_BE.dtype} "
                f"and rank {rank} has {shape} {dtypes[theirs >> 56]}"
            )


class _AllGatherRef(torch.autograd.Function):
    """Forward gathers rows; backward sums their gradient over ranks, in at least float32."""

    @staticmethod
    def forward(ctx: Any, x_BE: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        _check_same_on_all_ranks(x_BE, group)
        return _gather(x_BE, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (dy_GE,) = grads
        sum_dtype = torch.float64 if dy_GE.dtype == torch.float64 else torch.float32
        rows = dy_GE.shape[0] // _group_size(ctx.group)
        dx_BE = dy_GE.new_empty((rows, dy_GE.shape[1]), dtype=sum_dtype)
        with roll_call.collective("reduce-scatter of the texts' gradient", ctx.group):
            _reduce_scatter_single(dx_BE, dy_GE.to(sum_dtype).contiguous(), group=ctx.group)
        return dx_BE.to(dy_GE.dtype), None


def all_gather_with_grad_ref(
    x_BE: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """The reference of `all_gather_with_grad`, in torch.distributed alone; same contract."""
    _check_rows(x_BE)
    if _group_size(group) == 1:
        return x_BE
    gathered: torch.Tensor = _AllGatherRef.apply(x_BE.contiguous(), group)
    return gathered


def all_gather_with_grad(
    x_BE: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Every rank's rows, in rank order, with the gradient of all ranks' losses.

    The backward pass sums the gradient over ranks (a reduce-scatter) in float32, or in float64 for
    float64 input, and rounds once to the input's dtype. Each rank thus differentiates the sum of
    all ranks' losses: divide by the world size, or let DistributedDataParallel do it.

    Args:
        x_BE: [B, E] in float16, bfloat16, float32 or float64, the same shape and
            dtype on all ranks, on the device that the group's backend serves.
        group: the ranks to gather from; None means all.

    Returns:
        [W * B, E] in the dtype of x_BE; x_BE itself when the group has one rank.

    Raises:
        ValueError: x_BE has another shape or dtype, or (on the CPU; on CUDA a device assertion) the
            ranks disagree about them.
        ImportError: the extension was built for another torch.

    Source: the sharded similarities of CLIP (Radford et al. 2021, section 2.5) need every rank's
    features, and the exact gradient of the whole batch needs the sum over ranks.
    """
    _check_rows(x_BE)
    if _group_size(group) == 1:
        return x_BE
    with roll_call.collective("all-gather of texts", group):
        if (
            x_BE.is_cpu
        ):  # on a GPU the host would wait; there a step that differs shows in its sum of numbers
            _meet("all-gather of texts", group)
        extension = native.load()
        if extension is None:
            return all_gather_with_grad_ref(x_BE, group)
        group = group or dist.group.WORLD
        assert group is not None, "a group of several ranks exists"
        gathered: torch.Tensor = extension.all_gather_with_grad(x_BE.contiguous(), group.group_name)
        return gathered


def _check_rows(x_BE: torch.Tensor) -> None:
    if x_BE.dim() != 2 or x_BE.dtype not in _DTYPE_CODES:
        raise ValueError(
            "x_BE must be [B, E] in float16, bfloat16, float32 or float64, got "
            f"{list(x_BE.shape)} {x_BE.dtype}"
        )


def all_reduce_flag(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Whether any rank raised its flag; the same answer on all ranks."""
    if _group_size(group) == 1:
        return flag
    with roll_call.collective("vote", group):
        return any(raised for raised, _ in _meet("vote", group, int(flag)))


def all_reduce_sum(values: list[float], group: dist.ProcessGroup | None = None) -> list[float]:
    """Each number summed over the ranks, in one collective; the same bits on every rank."""
    if _group_size(group) == 1:
        return [float(value) for value in values]
    with roll_call.collective("sum of numbers", group):
        _meet("sum of numbers", group)
        total = torch.tensor(values, dtype=torch.float64, device=_wire_device(group))
        dist.all_reduce(total, group=group)
        return total.tolist()


def all_reduce_(x: torch.Tensor, name: str, op: Any = dist.ReduceOp.SUM) -> None:
    """Replaces the tensor by its sum (or another ``op``) over all ranks; ``name`` is for a rank that fails in it."""
    with roll_call.collective(name):
        dist.all_reduce(x, op)


@torch.no_grad()
def broadcast_tensors(
    tensors: Iterable[torch.Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Writes the values of the group's first rank into the tensors of all others."""
    if _group_size(group) > 1:
        with roll_call.collective("broadcast of tensors", group):
            _meet("broadcast of tensors", group)
            for tensor in tensors:
                dist.broadcast(tensor, group_src=0, group=group)


@torch.no_grad()
def gather_rows(x: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The rows of all ranks, in rank order, without gradient; ranks may hold different numbers.

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
    wire_device = _wire_device(group)
    row_bytes = torch.Size(x.shape[1:]).numel() * x.element_size()
    with roll_call.collective("gathering of rows", group):
        headers = _meet("gathering of rows", group, x.shape[0], row_bytes)
        if any(theirs != row_bytes for _, theirs in headers):
            raise ValueError(
                f"gather_rows: ranks differ in bytes per row: {[b for _, b in headers]}"
            )
        counts = [count for count, _ in headers]
        if max(counts) * row_bytes == 0:
            return x.new_empty((sum(counts), *x.shape[1:]))
        # Bytes, because gloo does not carry every dtype.
        padded = torch.zeros((max(counts), row_bytes), dtype=torch.uint8, device=wire_device)
        padded[: x.shape[0]] = x.contiguous().flatten().view(torch.uint8).view(-1, row_bytes)
        blocks = _gather(padded, group).view(len(counts), max(counts), row_bytes)
    rows = torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])
    return rows.flatten().view(x.dtype).view(-1, *x.shape[1:]).to(x.device)


def broadcast_object(value: T, source: int = 0, group: dist.ProcessGroup | None = None) -> T:
    """The picklable value that rank `source` of the group passed; the other ranks' is ignored."""
    if _group_size(group) == 1:
        return value
    values = [value]
    with roll_call.collective("broadcast of a value", group):
        _meet("broadcast of a value", group)
        dist.broadcast_object_list(
            values, group_src=source, group=group, device=_wire_device(group)
        )
    return values[0]
