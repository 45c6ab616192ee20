"""How the commands end: one line and status 2 for what a user can mend, a trace and status 70 for a fault of their own."""

from __future__ import annotations

import errno
import importlib
import os

import pytest
import torch

from clipcore.data import DataError
from clipcore.native import WrongBuildError
from clipcore.ranks.distributed import init_distributed
from clipcore.ranks.failures import FAULT_STATUS, MISTAKE_STATUS, end_with, is_out_of_memory
from clipcore.run.parts import check_compiler
from clipcore.run.verify import VerificationError

pytestmark = pytest.mark.fast

MISTAKES = {
    "value": (DataError("a.tar holds no samples"), "error: a.tar holds no samples"),
    "build": (WrongBuildError("built for torch 2.11"), "error: built for torch 2.11"),
    "file": (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.bin"),
        "error: x.bin: No space left on device",
    ),
    "nameless file": (OSError("the device is gone"), "error: the device is gone"),
    "gpu memory": (
        torch.OutOfMemoryError("CUDA out of memory.\nmore"),
        "too little memory: CUDA out of memory; buy more",
    ),
    "host memory": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        "too little memory: [enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes; buy more",
    ),
    "python memory": (MemoryError(), "too little memory: MemoryError; buy more"),
}
FAULTS = [
    RuntimeError("shapes differ"),
    KeyError("x"),
    AssertionError(),
    TypeError("no"),
    ZeroDivisionError(),
]


@pytest.fixture(autouse=True)
def without_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIPCORE_TRACEBACK", raising=False)


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case, capfd):
    error, line = MISTAKES[case]
    assert end_with("clipcore.test", error, "buy more") == MISTAKE_STATUS == 2
    said = capfd.readouterr().err
    assert (
        said.startswith("clipcore.test: ") and said.endswith(f"{line}\n") and said.count("\n") == 1
    )


def test_a_name_with_a_line_end_makes_no_second_line(capfd):
    end_with("clipcore.test", DataError("there is no a\nb"), "")
    assert capfd.readouterr().err == "clipcore.test: error: there is no a b\n"


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_a_fault_shows_its_trace_and_is_no_loss_that_is_not_finite(error, capfd):
    assert end_with("clipcore.test", error, "") == FAULT_STATUS == 70
    *trace, last = capfd.readouterr().err.splitlines()
    assert any(type(error).__name__ in line for line in trace)
    assert (
        last
        == "clipcore.test: error: this is a bug in clipcore; please report it with the lines above"
    )


def test_memory_that_the_machine_does_not_have_is_told_from_faults():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value) and not is_out_of_memory(RuntimeError("other"))


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error: Cuda failure 'out of memory'",
        "std::bad_alloc",
    ],
)
@pytest.mark.parametrize(
    "kind", [RuntimeError, torch.OutOfMemoryError, torch.distributed.DistBackendError]
)
def test_a_gpus_ways_to_run_out_of_memory_are_known(said, kind):
    assert is_out_of_memory(kind(said)) and not is_out_of_memory(ValueError(said))


def test_developers_see_where_a_mistake_was_found(monkeypatch, capfd):
    monkeypatch.setenv("CLIPCORE_TRACEBACK", "1")
    assert end_with("clipcore.test", DataError("x"), "") == 2
    *trace, last = capfd.readouterr().err.splitlines()
    assert last == "clipcore.test: error: x" and any("DataError" in line for line in trace)


MAIN = ".__main__"
COMMANDS = {
    "train": ("clipcore.train", "init_distributed", []),
    "classify": (
        "clipcore.classify.__main__",
        "run_classification",
        ["x.png", "--labels", "a,b", "--checkpoint", "run"],
    ),
    "prepare": ("clipcore.data.prepare", "prepare", ["in.csv", "--output", "out"]),
    "tokenizer": ("clipcore.tokenizer", "train_tokenizer", ["--train", "captions.txt"]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("error", "status"), [(KeyError("x"), 70), (OSError(5, "no", "f"), 2), (ValueError("y"), 2)]
)
def test_every_command_ends_so(command, error, status, monkeypatch, capfd):
    module, function, line = COMMANDS[command]
    command_module = importlib.import_module(module)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(command_module, function, fail)
    assert command_module.main(line) == status
    assert f"{module.removesuffix(MAIN)}: error: " in capfd.readouterr().err


@pytest.mark.parametrize("command", ["classify", "tokenizer", "prepare"])
def test_ctrl_c_is_no_traceback(command, monkeypatch, capfd):
    module, function, line = COMMANDS[command]
    command_module = importlib.import_module(module)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_module, function, stop)
    assert command_module.main(line) == 130
    said = capfd.readouterr().err
    assert said.startswith(f"{module.removesuffix(MAIN)}: stopped") and said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: unspecified launch failure\nmore"),
        torch.distributed.DistBackendError("NCCL error"),
    ],
)
def test_a_gpu_that_fails_is_no_fault_of_clipcore(error, capfd):
    assert end_with("clipcore.test", error, "") == FAULT_STATUS
    last = capfd.readouterr().err.splitlines()[-1]
    assert (
        "a GPU or the connection to another rank failed: " in last and "please report" not in last
    )


@pytest.mark.parametrize(
    ("compiler", "is_there"), [(None, True), ("none++", False), ("sh -c", True)]
)
def test_a_missing_compiler_is_named_before_the_first_step(
    compiler, is_there, monkeypatch, tmp_path
):
    monkeypatch.delenv("CXX", raising=False)
    if compiler is None:
        (tmp_path / "g++").write_text("")
        (tmp_path / "g++").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CXX", compiler)
    cpu = torch.device("cpu")
    if is_there:
        check_compiler(cpu)
    else:
        with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, and none\+\+ is not there"):
            check_compiler(cpu)


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cpu", r"needs Python's headers, and .* has no Python\.h"),
        ("cuda", "needs Triton on a GPU"),
    ],
)
def test_what_else_a_compiler_needs_is_named_before_the_first_step(
    device, said, monkeypatch, tmp_path
):
    monkeypatch.setenv("CXX", "sh")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=said):
        check_compiler(torch.device(device))


def test_a_compiler_that_is_turned_off_or_no_command_is_named(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("CXX", 'g++ "')
    with pytest.raises(ValueError, match=r"CXX is .* which is no command \(No closing quotation\)"):
        check_compiler(cpu)
    off = pytest.raises(ValueError, match="turned off by TORCH_COMPILE_DISABLE")
    with torch._dynamo.config.patch(disable=True), off:
        check_compiler(cpu)


def test_a_place_where_the_ranks_cannot_meet_is_named(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise torch.distributed.DistNetworkError("The server socket has failed to listen\nmore")

    monkeypatch.setattr(torch.distributed, "rendezvous", fail)
    place = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "host",
        "MASTER_PORT": "7",
    }
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError,
        match="rank 1 cannot reach the others at host:7: The server socket has failed to listen;",
    ):
        init_distributed("cpu")


def test_wrong_gradients_are_told_from_a_loss_that_is_not_finite(monkeypatch, capfd):
    train = importlib.import_module("clipcore.train")

    def fail(*_: object, **__: object) -> None:
        raise VerificationError("the gradients differ by 3")

    monkeypatch.setattr(train, "train", fail)
    assert train.main(["--device", "cpu"]) == 5
    assert capfd.readouterr().err == "clipcore.train: stopped: the gradients differ by 3\n"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("x", "2", "0"), "RANK is 'x'"),
        (("0", "", "0"), "WORLD_SIZE is ''"),
        (("2", "2", "0"), "RANK=2, WORLD_SIZE=2"),
        (("0", "1", "-1"), "LOCAL_RANK=-1"),
        (("0", "0", "0"), "WORLD_SIZE=0"),
    ],
)
def test_an_environment_that_torchrun_does_not_set_is_named(place, message, monkeypatch):
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), place, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        init_distributed("cpu")
