"""What every test shares: threads, seeds, poisoned memory on request, Triton's interpreter where there is no GPU."""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import re
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# Read by OpenMP when torch is imported, and by every process that a test starts: workers share the cores. They inherit it
# from the process that starts them, which must not set another number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

# Triton decides at decoration time, so before any kernel file is imported. Users on the CPU never meet the
# interpreter: it runs only where a test calls a Triton launcher with CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Under nohup it is ignored, also by the runs that tests start, and a run then rightly goes on.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Likewise of a shell that starts the tests in the background.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from interpreter import patch_once
from ranks import RankPool
from runs import RunServer, leave_process_alone

if os.environ.get("TRITON_INTERPRET") == "1":
    patch_once()

# Files with a fixture that takes half a minute: each goes to one worker as a whole.
BUILT_ONCE = {"test_packaging.py"}
# Tests with this in their names look at what one process compiles for all of them (tests/aot.py).
COMPILED_ONCE = "ahead_of_time"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give out single tests, but all files that start ranks or whole runs, or fork, to one worker, first.

    So they never compete with each other for the cores, and fork before that worker has grown: a fork copies the tables of
    its memory. This is what xdist's --dist loadgroup is for, which groups nothing
    under pytest 9.2 (pytest-xdist issue 1386).
    """
    from xdist.scheduler import LoadScopeScheduling

    # What they need for it: a pool of ranks, the settings of a small run, or the call itself.
    starts = re.compile(r"\b(RankPool|pool_of_two|NANO|os\.fork|run_ranks)\b")
    is_alone = {
        path.name: bool(starts.search(path.read_text()))
        for path in Path(__file__).parent.glob("test_*.py")
    }

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0].rpartition("/")[2]
            if is_alone.get(file):
                return "ranks and runs"
            if COMPILED_ONCE in nodeid:
                return COMPILED_ONCE
            return file if file in BUILT_ONCE else nodeid

    return Scheduler(config, log)


def pytest_collection_finish() -> None:
    """Spare later searches for cycles, and forked children that make them, all that lasts as long as this process."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what bench/gpu.sh asks for on a machine that nothing can be installed on, and what takes gigabytes."""
    parser.addoption(
        "--skip-missing",
        action="store_true",
        help="skip a test that needs a package which is not installed, and name the package",
    )
    parser.addoption(
        "--all-models",
        action="store_true",
        help="compare every published model with open_clip's [RN50 and ViT-B-32]",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Turn a missing package into a skip where --skip-missing says so; a missing part of one that is there fails."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        is_there = not package or importlib.util.find_spec(package) is not None
        if is_there or not item.config.getoption("--skip-missing"):
            raise
        pytest.skip(f"{package} is not installed")


@pytest.fixture(scope="session")
def server() -> Iterator[RunServer]:
    """Return a server that starts training runs by fork."""
    started = RunServer()
    yield started
    started.close()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs be made in this process: what a run sets for the whole process stays as it is."""
    leave_process_alone(monkeypatch)


@pytest.fixture
def pool_of_two() -> Iterator[RankPool]:
    """Two gloo ranks."""
    with RankPool(2) as ranks:
        yield ranks


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, alone or in any order."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # the global generator is what libraries draw from
    torch.manual_seed(0)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where indices go that may not lie beside their data: a folder of the test's own in place of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "clipcore"


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin come filled with NaN (integers: their maximum), so an unwritten element shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
