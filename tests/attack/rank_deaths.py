"""Launches whose ranks die, sleep or stop one after another: the others name them, and the end has the same bits."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from runs import NANO, PROGRAMS, ROOT, assert_same_bits
from shards import write_csv

from attack.harness import Attack

# Three epochs of five steps of some eight pairs.
STEPS_PER_EPOCH, NUM_STEPS = 5, 15
SIZES = "--epochs 3 --lr 1e-3 --save-every-steps 1 --resume latest --timeout 15".split()

# By name: ranks, deaths, the seed of these, and what is set besides.
_LAUNCHES: dict[str, tuple[int, int, int, str]] = {
    "two ranks": (2, 9, 0, "--batch-size 4 --ema-decay 0.9"),
    "two ranks, micro-batches": (2, 8, 1, "--batch-size 2 --accum-freq 2 --keep-graphs 1"),
    "two ranks, split": (2, 8, 34, "--batch-size 4 --fsdp"),
    "three ranks, uneven": (3, 8, 3, "--global-batch-size 8 --micro-batch-size 2 --siglip"),
    "three ranks, readers": (3, 8, 4, "--global-batch-size 8 --micro-batch-size 3 --workers 1"),
}
# (rank, step, phase, what), as programs/inject_faults.py takes them.
Death = tuple[int, int, str, str]


class RankDeaths(Attack):
    """A launch loses a rank in one step after another, and torchrun starts all of them anew."""

    fast: ClassVar[int] = 0
    limit_s: ClassVar[float] = 900.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.table = write_csv(folder / "table", num_pairs=41)

    def cases(self) -> Mapping[str, Any]:
        return {name: name for name in _LAUNCHES}

    def attempt(self, what: Any, folder: Path) -> str:
        num_ranks, num_deaths, seed, settings = _LAUNCHES[what]
        deaths = _deaths(num_ranks, num_deaths, "--fsdp" in settings, random.Random(seed))
        self._launch(folder, "unbroken", num_ranks, settings, [])
        text = self._launch(folder, "broken", num_ranks, settings, deaths)

        missing = [death for n, death in enumerate(deaths) if not (folder / str(n)).exists()]
        assert not missing, f"these did not come: {missing}"
        _check_names(text, deaths, num_ranks)
        assert_same_bits(folder / "unbroken", folder / "broken")
        return f"{num_deaths} deaths of {num_ranks} ranks"

    def _launch(
        self, folder: Path, name: str, num_ranks: int, settings: str, deaths: Sequence[Death]
    ) -> str:
        """Make a launch, which succeeds in the end; return what it wrote."""
        torchrun = f"--standalone --nproc-per-node {num_ranks} --max-restarts {len(deaths)} -m --"
        command = [sys.executable, str(PROGRAMS / "forking_torchrun.py"), *torchrun.split()]
        command += ["clipcore.train", "--logs", str(folder), "--name", name, *NANO, *SIZES]
        data = str(self.table)
        command += ["--train-data", data, "--val-data", data, *settings.split()]
        given = {"FAULTS": json.dumps(deaths), "MARKS": str(folder), "PYTHONPATH": str(ROOT)}
        output = folder / f"{name}.out"
        with open(output, "wb") as file:
            status = subprocess.run(
                command, stdout=file, stderr=file, env={**os.environ, **given}
            ).returncode
        text = output.read_text(errors="replace")
        assert status == 0, f"{deaths}: the launch ended with {status}: {text[-3000:]}"
        return text


def _deaths(num_ranks: int, number: int, is_split: bool, draws: random.Random) -> list[Death]:
    """Return what happens to one rank in each of so many steps; torchrun waits half a minute for one that stands still."""
    steps = sorted(draws.sample(range(1, NUM_STEPS), number))
    whats = ["sleep", "stop", *draws.choices(["kill", "kill", "raise", "leave"], k=number - 2)]
    draws.shuffle(whats)
    deaths = []
    for step, what in zip(steps, whats, strict=True):
        phases = "data forward loss backward collective optimizer checkpoint writing".split()
        if deaths and deaths[-1][1] == step - 1:
            phases.remove(
                "data"
            )  # which a rank may come to before another one is lost in the step before
        if step % STEPS_PER_EPOCH == 0:
            phases += ["evaluation", "evaluating"]
        rank, phase = draws.randrange(num_ranks), draws.choice(phases)
        if phase == "evaluating" or (phase == "writing" and not is_split):
            rank = 0  # which does so alone
        deaths.append((rank, step, phase, what))
    return deaths


def _check_names(text: str, deaths: Sequence[Death], num_ranks: int) -> None:
    """Raise unless those who are left have named the lost rank each time.

    Of three ranks two may come into question, where one was lost inside a collective.
    """
    # Rank 0 says what it is about to do at each start.
    starts = re.split(r"pairs; 3 epochs of batch ", text)[1:]
    assert len(starts) == len(deaths) + 1, f"{len(starts)} starts for {deaths}: {text[-3000:]}"
    for said, death in zip(starts, deaths, strict=False):
        lines = re.findall(r"clipcore\.train: rank (\d) ends: (.*)", said)
        messages = [message for speaker, message in lines if int(speaker) != death[0]]
        # torchrun may end the others of three before all of them have spoken.
        is_told = len(messages) == 1 if num_ranks == 2 else 1 <= len(messages) < num_ranks
        named = rf"\brank {death[0]} (has died|did not enter|ended with|entered)"
        is_named = all(re.search(named, message) for message in messages)
        assert is_told and is_named, f"{death}: {messages}: {said[-4000:]}"
