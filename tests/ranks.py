"""A pool of gloo ranks on this machine: started once, then handed any number of functions.

The ranks are forked from a process that has imported torch and computed nothing: a start that imports it costs seconds.
Warnings are errors inside the ranks, so that a deprecated collective shows.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from runs import LIMIT_S

from clipcore.ranks.distributed import close_distributed, init_distributed

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection


def _serve(rank: int, num_ranks: int, connection: Connection) -> None:
    """Be one rank: join the group, then call what comes over the connection until it says to end."""
    if rank == 0:
        # A port that the system chose, and that this process holds from now on.
        store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, multi_tenant=True, wait_for_workers=False
        )
        connection.send(store.port)
        port = store.port
    else:
        port = connection.recv()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    world = init_distributed("cpu")
    warnings.simplefilter("error")
    while (message := connection.recv_bytes()) != b"":
        try:
            function, arguments = pickle.loads(message)
            answer = (True, function(world, *arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
    close_distributed()


class RankPool:
    """`num_ranks` processes in one gloo group; a context manager that ends them."""

    def __init__(self, num_ranks: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "clipcore.train"])
        self.num_ranks = num_ranks
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(num_ranks):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, num_ranks, there), daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)
        port = self._connections[0].recv()
        for connection in self._connections[1:]:
            connection.send(port)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call function(world, *arguments) on every rank; return the results by rank.

        Raises:
            AssertionError: a rank raised, died or kept silent; the message has its traceback.
        """
        message = pickle.dumps((function, arguments))
        for connection in self._connections:
            connection.send_bytes(message)
        results, failures = [], []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(LIMIT_S):
                raise AssertionError(f"rank {rank} is silent after {LIMIT_S} s; {failures}")
            succeeded, answer = pickle.loads(connection.recv_bytes())
            (results if succeeded else failures).append(answer)
        assert not failures, "\n".join(failures)
        return results

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in zip(self._connections, self._processes, strict=True):
            if process.is_alive():
                connection.send_bytes(b"")
        for process in self._processes:
            process.join(timeout=LIMIT_S)
            if process.is_alive():
                process.kill()
