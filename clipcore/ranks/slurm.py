"""The place of a process that Slurm's ``srun`` started: torchrun's variables from Slurm's, as open_clip reads them."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

# srun sets these for each process of a step; sbatch's script itself has no step.
_STEP_SIZE, _PROCESS, _LOCAL = "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"
_TASKS_OF_NODES, _NODE = "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID"
_MEETING_PLACE = ("MASTER_ADDR", "MASTER_PORT")


def set_torchrun_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE in a process of an ``srun`` of several.

    What torchrun or the user has set stays, so ``RANK=0 WORLD_SIZE=1 LOCAL_RANK=0`` makes each process a run of its own.

    Raises:
        ValueError: the job script does not say where the processes meet.
    """
    is_placed = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & environment.keys()
    num_tasks = environment.get(_STEP_SIZE, "1")
    if is_placed or num_tasks == "1" or not {_PROCESS, _LOCAL} <= environment.keys():
        return
    if missing := [name for name in _MEETING_PLACE if not environment.get(name)]:
        raise ValueError(
            f"srun started {num_tasks} processes, but {' and '.join(missing)} is not set; before srun, the job script needs "
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500'
        )
    environment["RANK"], environment["WORLD_SIZE"] = environment[_PROCESS], num_tasks
    environment["LOCAL_RANK"] = environment[_LOCAL]
    counts = _tasks_of_nodes(environment.get(_TASKS_OF_NODES, ""))
    node = environment.get(_NODE, "")
    if node.isdecimal() and int(node) < len(counts):
        environment["LOCAL_WORLD_SIZE"] = str(counts[int(node)])


def _tasks_of_nodes(text: str) -> list[int]:
    """Return the number of processes on each node.

    >>> _tasks_of_nodes("4(x2),1")
    [4, 4, 1]
    """
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))]
