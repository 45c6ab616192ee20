"""Sharded training (FSDP2): each rank keeps a part of every weight, gradient and moment, and of the checkpoint.

``shard`` splits a model by ``torch.distributed.fsdp.fully_shard``: the rows of every parameter lie with the ranks in
order, and a block's are brought together while it computes. Logit scale and bias, single numbers, stay on every rank.
The rest here is what a run does otherwise with such a model; ``gradient_sync`` is for any, ``replicate`` for whole ones.

Source: Rajbhandari et al. 2020 (ZeRO, stage 3); Zhao et al. 2023 (FSDP).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from clipcore.checkpoint import TensorGroup, Writers
from clipcore.ranks.distributed import World, gather_objects
from clipcore.run.optim import MOMENTS, local_part
from clipcore.towers.model import CLIP
from clipcore.towers.modules import ResidualAttentionBlock
from clipcore.towers.resnet import AttentionPool2d, Bottleneck

# What is brought together and freed as one; the rest of the model is a group of its own. A ResNet's stages are called
# block by block, never as a whole, so that only a block can be one.
_UNITS = (ResidualAttentionBlock, Bottleneck, AttentionPool2d)


def shard(model: CLIP, world: World, group: dist.ProcessGroup | None = None) -> None:
    """Split a model, in place, among the ranks of a group; before its optimizer and its moving average are made.

    Parameters keep their dtype, and gradients are averaged in it; what is computed in which dtype is autocast's decision,
    as without sharding. The ranks must hold equal weights. The model may lie on the CPU: it is moved to the rank's
    device block by block, so that no device ever holds the whole.

    Args:
        model: whose towers are locked already, if they are to be.
        world: of several ranks, with their process group.
        group: the ranks that share the model; None means all.
    """
    group = group or dist.group.WORLD
    assert group is not None, "several ranks have a process group"
    mesh = DeviceMesh.from_group(group, world.device.type)
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for part in list(model.modules()):
        if isinstance(part, _UNITS):
            fully_shard(part, mesh=mesh, mp_policy=policy)
            if isinstance(part, ResidualAttentionBlock):
                register_fsdp_forward_method(part, "pooled")
    # fully_shard refuses a tensor without axes, and leaves what it is told to ignore where it is.
    scalars = {p for p in (model.logit_scale, model.logit_bias) if p is not None}
    for scalar in scalars:
        scalar.data = scalar.to(world.device)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=set(scalars))
    for name in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, name)


def replicate(towers: nn.Module, group: dist.ProcessGroup | None = None) -> DistributedDataParallel:
    """Wrap the towers in DistributedDataParallel, which averages their gradients over the ranks.

    Looking for unused parameters keeps the buckets as they are; built anew after the first step of a process, they would
    add gradients in another order. torch's warning about it cannot be silenced from Python. BatchNorm's statistics are
    each rank's own: brought into line before each of several passes, they would break the graphs of those before.
    """
    # torch 2.13 renamed the argument and warns about the old name.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    settings: dict[str, Any] = {name: False, "find_unused_parameters": True}
    return DistributedDataParallel(towers, process_group=group, **settings)


def is_sharded(module: nn.Module) -> bool:
    """Return whether ``shard`` has split a module."""
    return isinstance(module, FSDPModule)


def shard_group(model: nn.Module) -> dist.ProcessGroup:
    """Return the group of ranks among which a sharded model is split."""
    # Between two passes the parameters outside the blocks may be whole; a block's are split again at once.
    return next(p for p in model.parameters() if isinstance(p, DTensor)).device_mesh.get_group()


@contextlib.contextmanager
def gradient_sync(module: nn.Module, is_last: bool) -> Iterator[None]:
    """Wrap the passes that fill gradients, of which only the last of a step averages them over the ranks.

    Those before it add up on each rank, which for a sharded model takes the memory of its whole gradient until the last.
    Gradients that do not come from these passes, such as the logit scale's of a loss over stored features, must be there
    before the last one ends.

    Args:
        module: sharded, or in DistributedDataParallel, or of a single process.
    """
    if not isinstance(module, FSDPModule):
        is_early = isinstance(module, DistributedDataParallel) and not is_last
        with module.no_sync() if is_early else contextlib.nullcontext():  # type: ignore[operator]
            yield
        return
    module.set_requires_gradient_sync(is_last)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)
    if is_last:
        assert isinstance(module, nn.Module)
        group = shard_group(module)
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor) and parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=group)
                parameter.grad /= dist.get_world_size(group)


def whole(tensor: Tensor) -> Tensor:
    """Return all rows of a tensor, on all ranks that share it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gathered(model: CLIP, tensors: Mapping[str, Tensor] | None = None) -> CLIP:
    """Return a whole copy of a sharded model on each of its ranks, for evaluation; called by all of them.

    Ranks may then encode different numbers of batches, or one rank alone, which a sharded model cannot: each of its
    passes is one of all ranks.

    Args:
        tensors: split as the model's own, to be in the copy in their place, such as a moving average.
    """
    complete = {}
    for name, value in (tensors or model.state_dict()).items():
        complete[name] = value.full_tensor() if isinstance(value, DTensor) else value.clone()
    with torch.device("meta"):
        copy = CLIP(model.config, model.output_dict)
    copy.load_state_dict(complete, assign=True)
    return copy.train(model.training)


def checkpoint_writers(model: nn.Module) -> Writers:
    """Return the ranks of a sharded model as the writers of its checkpoint."""
    group = shard_group(model)
    return Writers(
        dist.get_rank(group),
        dist.get_world_size(group),
        lambda value: gather_objects(value, group),
    )


def own_parts(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return a rank's part of a checkpoint: its shard of split tensors; rank 0 alone writes the replicated ones."""
    return {
        name: local_part(value)
        for name, value in tensors.items()
        if isinstance(value, DTensor) or rank == 0
    }


class OwnRows(Mapping[str, Tensor]):
    """The tensors of a checkpoint, split as a sharded model is; of each only this rank's rows are read, when asked for.

    Args:
        saved: whole tensors, of parameters and buffers or of their moments (``<parameter>.<moment>``).
        model: says how a tensor is split.
    """

    def __init__(self, saved: Mapping[str, Tensor], model: nn.Module) -> None:
        self._saved = saved
        self._split = {n: v for n, v in model.state_dict().items() if isinstance(v, DTensor)}

    def __getitem__(self, name: str) -> Tensor:
        owner, _, last = name.rpartition(".")
        like = self._split.get(owner if last in MOMENTS else name)
        if like is None:
            return self._saved[name]
        num_ranks, num_rows = like.device_mesh.size(), like.shape[0]
        size = -(-num_rows // num_ranks)
        start = min(like.device_mesh.get_local_rank() * size, num_rows)
        stop = min(start + size, num_rows)
        assert stop - start == like.to_local().shape[0], (name, start, stop)
        saved = self._saved
        if isinstance(saved, TensorGroup):
            shape, rows = saved.shape(name), saved.rows(name, start, stop)
        else:
            shape, rows = saved[name].shape, saved[name][start:stop]
        return DTensor.from_local(
            rows.to(like.device),
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=shape,
            stride=like.stride(),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved)

    def __len__(self) -> int:
        return len(self._saved)
