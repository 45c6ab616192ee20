"""The examples of docs/cluster.md, as they are written there: two machines, a Slurm job, and what the others would start."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from runs import NANO, ROOT, Run, RunServer, assert_same_bits, wait_until
from shards import write_csv
from torch.distributed.run import get_args_parser

from clipcore.checkpoint import latest_checkpoint
from clipcore.ranks.slurm import set_torchrun_variables
from clipcore.run.command_line import parse_command_line
from clipcore.run.metrics import read_metrics

DOCUMENT = (ROOT / "docs/cluster.md").read_text()
TORCHRUN, SLURM = re.findall(r"```bash\n(.*?)```", DOCUMENT, re.DOTALL)
(RAY,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
RUNTIME, JOB = yaml.safe_load_all(re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)[0])


def flags_behind(command: Sequence[str]) -> list[str]:
    """Return what stands behind clipcore.train in a command."""
    return list(command[command.index("clipcore.train") + 1 :])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("table"), num_pairs=40)


def small(table: Path, logs: Path, *more: str) -> list[str]:
    """Return flags that make a document's run one of milliseconds a step; the last of equal flags holds."""
    return [
        *NANO,
        "--train-data",
        str(table),
        "--logs",
        str(logs),
        "--global-batch-size",
        "8",
        *more,
    ]


# --- torchrun ---


def test_two_machines_lose_a_rank_and_train_to_the_bits_of_an_unbroken_run(
    server: RunServer, table: Path, tmp_path: Path
) -> None:
    """Two torchruns of one rank each; the second machine's rank is killed in its fourth step."""
    # The place where they meet has a port of the system's choice, held from here on.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    text = TORCHRUN
    for written, here in {
        "--nproc-per-node 8": "--nproc-per-node 1",
        "$HOST:29500": f"127.0.0.1:{store.port}",
        "$JOB": "broken",
    }.items():
        assert written in text
        text = text.replace(written, here)
    command = shlex.split(text.replace("\\\n", " "))
    assert command[0] == "torchrun" and "--resume latest" in text
    options = command[1 : command.index("-m")]
    more = small(table, tmp_path, "--epochs", "2", "--save-every-steps", "2", "--timeout", "60")
    faults = {"FAULTS": '[[1, 4, "backward", "kill"]]', "MARKS": str(tmp_path)}

    runs = [
        server.start(
            [*flags_behind(command), *more],
            tmp_path / f"out.{machine}",
            torchrun=options,
            environment=faults,
        )
        for machine in range(2)
    ]
    assert [run.wait() for run in runs] == [0, 0], runs[0].text
    assert (tmp_path / "0").exists(), "the rank was not killed"
    said = runs[0].text + runs[1].text
    assert "clipcore.train: rank 0 ends: rank 1 has died" in said
    assert "from step 2, on 2 x cpu" in said

    status, said = server.run([*more, "--name", "unbroken"], tmp_path / "out", num_ranks=2)
    assert status == 0, said
    assert_same_bits(tmp_path / "unbroken", tmp_path / "broken")


# --- Slurm ---

SRUN = """#!/bin/bash
# Hand over what was asked for, and end with the status that the test writes.
printf '%s\\0' "$@" > "$STUB/arguments"
env -0 > "$STUB/environment"
mkfifo "$STUB/status"
touch "$STUB/started"
exit "$(cat "$STUB/status")"
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then echo 127.0.0.1; echo second; else echo "$*" > "$STUB/requeued"; fi
"""


def free_port() -> int:
    """Return a port that the system has free now."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def run_step(
    server: RunServer, folder: Path, more: Sequence[str], num_steps: int
) -> tuple[int, list[Run]]:
    """Do what srun was asked for, with two ranks; send SIGUSR1 once the run has logged so many steps.

    Returns:
        The higher of the ranks' statuses, as srun's own, and the ranks.
    """
    command = (folder / "arguments").read_text().split("\0")[:-1]
    lines = (folder / "environment").read_text().split("\0")[:-1]
    environment = dict(line.split("=", 1) for line in lines)
    assert environment["MASTER_PORT"] == "14711" and environment["SRUN_CPUS_PER_TASK"] == "1"
    place = {"MASTER_ADDR": environment["MASTER_ADDR"], "MASTER_PORT": str(free_port())}
    place |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}

    ranks = []
    for rank in map(str, range(2)):
        own = {"SLURM_PROCID": rank, "SLURM_NODEID": rank, "SLURM_LOCALID": "0"}
        flags = [*flags_behind(command), *more]
        ranks.append(server.start(flags, folder / f"out.{rank}", environment={**place, **own}))

    log = Path(more[more.index("--logs") + 1]) / "clip-4711" / "metrics.jsonl"

    def has_steps() -> bool:
        for rank in ranks:
            assert server.poll(rank.pid) is None, rank.text
        return log.exists() and log.read_text().count('"loss"') >= num_steps

    wait_until(has_steps, f"{num_steps} steps")
    for rank in ranks:
        rank.signal(signal.SIGUSR1)
    return max(rank.wait() for rank in ranks), ranks


def run_job(
    server: RunServer, folder: Path, restarts: int, more: Sequence[str], num_steps: int
) -> tuple[int, str | None, list[Run]]:
    """Run the Slurm script with stand-ins for srun and scontrol, and end its step as ``run_step`` does.

    Returns:
        The script's status, what it asked scontrol for, and the ranks.
    """
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("job.sh", SLURM)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    given = {"STUB": str(folder), "PATH": f"{folder}:{os.environ['PATH']}"}
    given |= {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "1"}
    given |= {"SLURM_RESTART_COUNT": str(restarts)}

    def is_started() -> bool:
        assert job.poll() is None, "the script ended without srun"
        return (folder / "started").exists()

    with subprocess.Popen(["bash", folder / "job.sh"], env={**os.environ, **given}) as job:
        wait_until(is_started, "srun")
        step_status = 1
        try:
            step_status, ranks = run_step(server, folder, more, num_steps)
        finally:
            (folder / "status").write_text(str(step_status))
        status = job.wait()
    requeued = folder / "requeued"
    return status, requeued.read_text() if requeued.exists() else None, ranks


def test_a_slurm_job_saves_before_its_time_limit_and_continues_when_requeued(
    server: RunServer, table: Path, tmp_path: Path
) -> None:
    more = small(table, tmp_path / "logs", "--epochs", "100000", "--save-frequency", "0")
    run_dir = tmp_path / "logs" / "clip-4711"
    status, requeued, ranks = run_job(server, tmp_path / "first", 0, more, 3)
    assert status in (138, 143) and requeued == "requeue 4711\n", ranks[0].text
    assert "on 2 x cpu" in ranks[0].text
    saved = latest_checkpoint(run_dir / "checkpoints")
    steps, _ = read_metrics(run_dir)
    assert saved is not None and saved.name == f"step_{len(steps):08d}"

    # The second start has the same job number; after the twentieth restart the script gives up.
    status, requeued, ranks = run_job(server, tmp_path / "second", 20, more, len(steps) + 3)
    assert status in (138, 143) and requeued is None, ranks[0].text
    assert f"from step {len(steps)}, on 2 x cpu" in ranks[0].text
    assert [row["step"] for row in read_metrics(run_dir)[0]][:3] == [1, 2, 3]


STEP = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "7",
}
PLACE = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("change", "added"),
    [
        ({}, PLACE),
        (
            {"SLURM_NODEID": "3", "SLURM_LOCALID": "0"},
            PLACE | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        ),
        (
            {"SLURM_STEP_TASKS_PER_NODE": None},
            {k: v for k, v in PLACE.items() if k[6:] != "WORLD_SIZE"},
        ),
        ({"SLURM_STEP_NUM_TASKS": "1"}, {}),  # one process
        ({"SLURM_STEP_NUM_TASKS": None, "SLURM_NTASKS": "7"}, {}),  # sbatch's script, outside srun
        ({"SLURM_STEP_NUM_TASKS": "1", "MASTER_ADDR": None}, {}),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {}),  # torchrun's, or the user's
    ],
)
def test_a_process_of_srun_has_its_place(
    change: Mapping[str, str | None], added: Mapping[str, str]
) -> None:
    given = {name: value for name, value in {**STEP, **change}.items() if value is not None}
    found = dict(given)
    set_torchrun_variables(found)
    assert found == {**given, **added}


@pytest.mark.parametrize(
    "missing", [["MASTER_ADDR"], ["MASTER_PORT"], ["MASTER_ADDR", "MASTER_PORT"]]
)
def test_a_job_script_that_does_not_say_where_to_meet_is_told_how(missing: list[str]) -> None:
    given = {name: value for name, value in STEP.items() if name not in missing}
    with pytest.raises(ValueError) as raised:
        set_torchrun_variables(given)
    assert f"srun started 7 processes, but {' and '.join(missing)} is not set; " in str(
        raised.value
    )
    # The remedy is what the script of the document does.
    assert (
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)' in SLURM
    )
    assert 'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)' in str(
        raised.value
    )


# --- Ray and Kubeflow ---


class Recorded:
    """Stands for a class of Ray; keeps its arguments."""

    def __init__(self, *arguments: object, **named: object) -> None:
        self.arguments, self.named = arguments, named

    def fit(self) -> None:
        """Do nothing, like a trainer whose workers are elsewhere."""


@pytest.fixture
def ray_example(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Return the names of the Ray example, executed as a module beside stand-ins for Ray's."""
    names = {
        "ray": {},
        "ray.train": dict.fromkeys(("FailureConfig", "RunConfig", "ScalingConfig"), Recorded),
        "ray.train.collective": {"broadcast_from_rank_zero": lambda value: 4711},
        "ray.train.torch": {"TorchTrainer": Recorded},
    }
    for name, content in names.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    found: dict[str, object] = {"__name__": "__main__"}
    exec(RAY, found)
    return found


def test_a_worker_of_ray_runs_one_rank_and_raises_where_it_fails(
    ray_example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[list[str], Mapping[str, str]]] = []

    def run(command: list[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        called.append((command, env))
        return subprocess.CompletedProcess(command, 0 if len(called) == 1 else 3)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("MASTER_PORT", "1")
    trainer = ray_example["make_trainer"](["--name", "x"], 2, False, "/shared/ray")
    (train,), config = trainer.arguments, trainer.named["train_loop_config"]
    train(config)
    ((command, environment),) = called
    assert command == [sys.executable, "-m", "clipcore.train", "--name", "x"]
    assert environment == {**os.environ, "MASTER_PORT": "4711"}
    with pytest.raises(RuntimeError, match="ended with status 3"):
        train(config)


def test_all_examples_name_a_run_that_restarts_resume(ray_example: dict[str, Any]) -> None:
    """Their flags are clipcore's, mean the same run, and name and resume it."""
    lines = {
        "torchrun": flags_behind(shlex.split(TORCHRUN.replace("\\\n", " "))),
        "Slurm": flags_behind(
            shlex.split(
                re.search(r"^srun (.*?[^\\])\n", SLURM, re.M | re.S)[1].replace("\\\n", " ")
            )
        ),
        "Ray": ray_example["flags"].split(),
        "Kubeflow": JOB["spec"]["trainer"]["args"],
    }
    configs = {launcher: parse_command_line(line)[0] for launcher, line in lines.items()}
    for config in configs.values():
        assert config.name and config.resume == "latest"
        assert dataclasses.replace(config, name=None) == dataclasses.replace(
            configs["Ray"], name=None
        )
    assert configs["Ray"].save_every_minutes == 20 and configs["Ray"].global_batch_size == 32768


def test_the_kubeflow_job_starts_torchrun_by_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*JOB["spec"]["trainer"]["command"], *JOB["spec"]["trainer"]["args"]]
    for name, value in {
        "NNODES": "2",
        "NPROC_PER_NODE": "8",
        "NODE_RANK": "1",
        "MASTER_ADDR": "clip-node-0-0.clip",
        "MASTER_PORT": "29400",
    }.items():
        monkeypatch.setenv(f"PET_{name}", value)
    assert command[0] == "torchrun"
    options = get_args_parser().parse_args(command[1:])
    assert (options.nnodes, options.nproc_per_node, options.node_rank) == ("2", "8", 1)
    assert (options.master_addr, options.master_port) == ("clip-node-0-0.clip", 29400)
    assert options.module and options.training_script == "clipcore.train"
    assert options.training_script_args == JOB["spec"]["trainer"]["args"]


def test_the_kubeflow_runtime_gives_the_job_its_shared_folder_and_its_time_to_save() -> None:
    assert JOB["spec"]["runtimeRef"] == {
        "kind": RUNTIME["kind"],
        "name": RUNTIME["metadata"]["name"],
    }
    (node,) = RUNTIME["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    folders = tuple(mount["mountPath"] + "/" for mount in container["volumeMounts"])
    for flag in JOB["spec"]["trainer"]["args"]:
        _, _, value = flag.partition("=")
        assert not value.startswith("/") or value.startswith(folders)
    given = {entry["name"]: entry["value"] for entry in JOB["spec"]["trainer"]["env"]}
    assert int(given["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
