"""Be torchrun for clipcore.train, with its own options and agent, but with ranks that are forked.

They are forked from a process that has imported everything: a start costs one second in place of four. As a program the
ranks have the faults of inject_faults.py.
"""

import gc
import os
from collections.abc import Callable, Sequence

from torch.distributed import run
from torch.distributed.launcher.api import elastic_launch

import clipcore.train


def launch(num_ranks: int, arguments: Sequence[str]) -> None:
    """Make a run on so many ranks of this machine; raise torchrun's error where one fails."""
    start = ["--standalone", "--nproc-per-node", str(num_ranks), "-m", "--", "clipcore.train"]
    run.elastic_launch = forked(lambda: None)
    run.main([*start, *arguments])


def forked(prepare: Callable[[], None]):
    """Return what torchrun calls to start ranks of clipcore.train; each calls ``prepare`` first."""

    def rank(*line: str) -> None:
        prepare()
        if status := clipcore.train.main(line[line.index("clipcore.train") + 1 :]):
            os._exit(status)

    return forking(rank)


def forking(rank: Callable[..., None]):
    """Return what torchrun calls to start ranks, each of which is a call with the rank's command line."""

    def start(config, entrypoint):
        config.start_method = "fork"
        return elastic_launch(config, rank)

    return start


if __name__ == "__main__":
    from inject_faults import inject

    run.elastic_launch = forked(inject)
    gc.freeze()  # as of train_server.py
    run.main()
