"""Be torchrun for clipcore.train with the faults of inject_faults.py: its own options and agent, but ranks are forked.

They are forked from a process that has imported everything: a start costs one second in place of four.
"""

import os

from inject_faults import inject
from torch.distributed import run
from torch.distributed.launcher.api import elastic_launch

import clipcore.train


def rank(*arguments):
    inject()
    if status := clipcore.train.main(arguments):
        os._exit(status)


def forked(config, entrypoint):
    config.start_method = "fork"
    return lambda *line: elastic_launch(config, rank)(*line[line.index("clipcore.train") + 1 :])


run.elastic_launch = forked
run.main()
