"""Start groups of ranks of which one fails: argv is JSON of {case: [number of ranks, timeout in seconds]}, and a folder.

What each rank says at its end is written to FOLDER/CASE.RANK; a line of JSON, [case, rank, exit status], is printed for
each. The failing rank is the last one, or the first, and does what the case says at step 17.
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist

from clipcore.loss import all_gather
from clipcore.ranks import distributed, watchdog

# How long ranks wait for what decides whose fault it was, and the watchdog for the group's own error. Longer than in a
# run, since 25 ranks share two cores here.
watchdog._DIAGNOSIS_S = 3.0
watchdog._ARRIVAL_S = 60.0
watchdog.MARGIN_S = 10.0
watchdog.PATIENCE_S = 8.0
FOREVER_S = 3600


def act(case, rank, last):
    watchdog.at_step(16)
    distributed.barrier()
    watchdog.at_step(16 if case == "behind" and rank == last else 17)
    x = torch.ones(4, 3, requires_grad=True)
    if rank == last:
        if case == "sleep":
            time.sleep(FOREVER_S)
        if case == "die":
            os._exit(9)
        if case == "raise":
            with watchdog.report_failure():
                raise OSError("no disk")
        if case == "elsewhere":
            distributed.gather_rows(x)
        if case in ("other_kind", "other_size"):
            distributed.all_reduce_(torch.ones(5), "sum of columns")
        if case == "host_waits":
            time.sleep(FOREVER_S)
        if case == "own_mistake":
            with watchdog.collective("sum of rows"):
                x @ x
    elif case == "other_size":
        distributed.all_reduce_(torch.ones(500), "maximum of columns")
    elif case == "host_dies":
        os._exit(9)
    elif case == "host_waits":
        # As on a GPU, where the collective returns at once and the wait for its result has no end of its own.
        with watchdog.collective("sum of rows"):
            time.sleep(FOREVER_S)
    sizes = distributed.gather_sizes(len(x), 0, "all-gather of texts")
    y = all_gather.start_gather(x, shard_sizes=[size for size, _ in sizes]).wait().rows_GE
    if case == "die_in_backward" and rank == last:
        os._exit(9)
    with watchdog.collective("backward pass"):
        y.sum().backward()


def main(case, rank, last, timeout_s, ports, alive, output):
    """Be one rank: join the group at the port that rank 0 hands over ``ports``, act, and say how it ended.

    All other ranks hold the writing end of ``alive``, so that rank 0, which holds the store, sees them end.
    """
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(last + 1))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    receiver, sender = ports
    if rank == 0:
        os.close(alive[1])
        watchdog._Watchdog._linger = lambda _: os.read(alive[0], 1)
        # A port that the system chose, and that this process holds from now on.
        store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, multi_tenant=True, wait_for_workers=False
        )
        os.environ["MASTER_PORT"] = str(store.port)
        for _ in range(last):
            os.write(sender, f"{store.port:8}".encode())
    else:
        os.environ["MASTER_PORT"] = os.read(receiver, 8).decode().strip()
    distributed.init_distributed("cpu", timeout_s)
    try:
        act(case, rank, last)
    except watchdog.RankError as error:
        os.write(2, f"{error}".encode())
        os._exit(3)
    except Exception as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    os._exit(0)


def start(groups, folder):
    """Fork all ranks of all groups; return (case, rank) by process."""
    ranks = {}
    for case, (size, timeout_s) in groups.items():
        ports, alive = os.pipe(), os.pipe()
        for rank in range(size):
            pid = os.fork()
            if not pid:
                main(case, rank, size - 1, timeout_s, ports, alive, f"{folder}/{case}.{rank}")
            ranks[pid] = (case, rank)
        for end in (*ports, *alive):
            os.close(end)
    return ranks


ranks = start(json.loads(sys.argv[1]), sys.argv[2])
while ranks:
    pid, status = os.wait()
    case, rank = ranks.pop(pid)
    print(json.dumps([case, rank, os.waitstatus_to_exitcode(status)]), flush=True)
