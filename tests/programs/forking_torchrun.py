"""Be torchrun for clipcore.train, with its own options and agent, but with ranks that are forked.

They are forked from a process that has imported everything: a start costs one second in place of four. The ranks have the
faults of inject_faults.py where the environment names some.
"""

import gc
import os
from collections.abc import Callable, Sequence

from torch.distributed import run
from torch.distributed.launcher.api import elastic_launch

import clipcore.train


def launch(options: Sequence[str], arguments: Sequence[str]) -> None:
    """Make a run, or a machine's part of one, with these options of torchrun; raise its error where a rank fails."""
    if "FAULTS" in os.environ:
        from inject_faults import inject

        run.elastic_launch = forked(inject)
    else:
        run.elastic_launch = forked(lambda: None)
    run.main([*options, "-m", "--", "clipcore.train", *arguments])


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
