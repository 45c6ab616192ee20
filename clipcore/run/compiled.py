"""``--torchcompile``: the transformer blocks of a model compiled, before the first step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from clipcore.run.config import ConfigError
from clipcore.run.grad_cache import Embed
from clipcore.terminal import first_line, printable
from clipcore.towers.compiled import CompiledHalves
from clipcore.towers.model import CLIP
from clipcore.towers.modules import ResidualAttentionBlock
from clipcore.towers.resnet import replayed

# Pairs of the pass that compiles: code does not depend on their number, and a ResNet's BatchNorm needs two.
_ROWS = 2


class Compiled(NamedTuple):
    """What was compiled: blocks, the graphs (compiled functions) that they share, and the seconds that it took."""

    num_blocks: int
    num_graphs: int
    seconds: float
    is_resnet: bool

    def __str__(self) -> str:
        rest = "; the ResNet runs uncompiled" if self.is_resnet else ""
        made = f"{self.num_blocks} transformer blocks compiled into {self.num_graphs} functions"
        return f"torch.compile: {made}, {self.seconds:.0f} s{rest}"


def compile_blocks(
    model: nn.Module, backend: str | Callable[..., Any] = "inductor"
) -> CompiledHalves:
    """Have the transformer blocks of a model compute by compiled code in training; return that code.

    It is compiled when a kind of block first runs. Parameters and their names stay as they are, and ``model.eval()`` runs
    uncompiled, as do blocks whose modules were replaced or have hooks. A ResNet stays uncompiled.

    Args:
        backend: of ``torch.compile``, a name or a function.
    """
    halves = CompiledHalves(backend)
    for block in _blocks(model):
        block.compiled = halves
    return halves


def uncompile_blocks(model: nn.Module) -> None:
    """Have the blocks of a model compute uncompiled again, as they do when a model is made."""
    for block in _blocks(model):
        block.compiled = None


def compile_now(embed: Embed, model: CLIP, most_rows: int) -> Compiled:
    """Compile the blocks of a model, by a pass over a few pairs and its gradients.

    The parameters end without gradients; BatchNorm's statistics stay as they were.

    Args:
        embed: as of ``grad_cache.differentiate``, of this model outside ``DistributedDataParallel``.
        most_rows: pairs that are there, the same number on every rank.

    Raises:
        ConfigError: the compiler fails, as on code of its cache that a process which was killed has left unfinished.
    """
    start = time.perf_counter()
    halves = compile_blocks(model)
    rows = slice(0, min(_ROWS, most_rows))
    try:
        with replayed(model):
            trained = [part for part in embed(rows, None) if part.requires_grad]
            torch.autograd.backward(trained, [torch.ones_like(part) for part in trained])
    except torch._dynamo.exc.TorchDynamoException as error:
        # Private to torch, so that it is imported only where it is needed.
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        cause = getattr(error, "inner_exception", error)
        raise ConfigError(
            f"--torchcompile: torch.compile fails: {_told(cause)}; leave the flag out, or, in case a killed process has "
            f"left it damaged, remove {cache_dir()}, the cache of compiled code"
        ) from error
    model.zero_grad(set_to_none=True)
    return Compiled(
        num_blocks=len(_blocks(model)),
        num_graphs=halves.num_graphs,
        seconds=time.perf_counter() - start,
        is_resnet=model.is_resnet,
    )


def _told(error: BaseException) -> str:
    """Return an error's line that says most: a compiler's first error, else its first line."""
    told = [line.strip() for line in str(error).splitlines() if "error:" in line]
    return printable(told[0]) if told else first_line(error)


def _blocks(model: nn.Module) -> list[ResidualAttentionBlock]:
    return [part for part in model.modules() if isinstance(part, ResidualAttentionBlock)]
