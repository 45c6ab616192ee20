"""Run programs by torchrun, with ranks that are forked from this process: run_loops.py NUM_RANKS PROGRAM...

It has imported what they import, once for all. A line of dashes comes before the output of each.
"""

import gc
import runpy
import sys

import accelerate  # noqa: F401
from forking_torchrun import forking
from torch.distributed import run

num_ranks, *programs = sys.argv[1:]


def be_rank(*line: str) -> None:
    runpy.run_path(line[-1], run_name="__main__")


gc.freeze()  # as of train_server.py
run.elastic_launch = forking(be_rank)
for program in programs:
    print("---", flush=True)
    run.main(["--standalone", "--nproc-per-node", num_ranks, program])
