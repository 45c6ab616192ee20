"""Try both commands of the README beside other versions, and write what came out into docs/versions.md.

    python3.13 .ci/versions.py newest              # one set of packages, by the Python that runs this
    python3.11 .ci/versions.py oldest --only main  # one of the two commands

Each set gets a clone of the last commit and a fresh environment. The extension is required to compile.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs/versions.md"
ROWS = ROOT / "docs/versions.jsonl"

# What pip is asked for beside the project. torchvision, for the tests' open_clip, has to be of the same torch.
SETS = {
    "oldest": ["torch==2.11.0", "torchvision==0.26.0", "triton==3.6.0", "numpy==2.0.2"],
    "CPU build": ["torch<2.14", "triton<3.8"],
    "default": [],
    "newest": ["torch==2.15.0", "torchvision==0.29.2", "triton==3.9.0"],
}

# Printed by the environment.
ASK_FOR_VERSIONS = """
import json, numpy, torch, triton
from clipcore import native
extension = native.load()
compiled = "no extension" if extension is None else "C++, CUDA" if extension.has_cuda_kernels() else "C++"
versions = {module.__name__: module.__version__ for module in (torch, triton, numpy)}
print(json.dumps({**versions, "compiled": compiled}))
"""

COLUMNS = {
    "set": "set",
    "python": "Python",
    "torch": "torch",
    "triton": "Triton",
    "numpy": "numpy",
    "compiled": "compiled",
    "install_s": "install, s",
    "main_job": "main job",
    "main_job_s": "s",
    "tests": "tests",
    "tests_s": "s",
    "date": "date",
    "commit": "commit",
}

HEAD = """# Versions that were tried

`python .ci/versions.py SET` makes these rows: a clone of the commit, a fresh environment, and the README's two commands, on
two cores of a shared machine without a GPU, whose other work shows in the seconds. The main job's figure is its zero-shot
top-1 / top-5 on unseen characters.

"""


def run(command: list[str], clone: Path, environment: dict[str, str]) -> tuple[str, int]:
    """Print what a command prints, and return it with its seconds. Only failing tests do not end the program."""
    start = time.monotonic()
    printed = []
    with subprocess.Popen(
        command,
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            printed.append(line)

    if process.returncode != 0 and "pytest" not in command:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return "".join(printed), round(time.monotonic() - start)


def try_set(name: str, only: str | None) -> dict[str, Any]:
    """Return the row of one set."""
    with tempfile.TemporaryDirectory() as folder:
        clone, venv = Path(folder, "clipcore"), Path(folder, "venv")
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=clone,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        environment = {
            **os.environ,
            "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "CLIPCORE_BUILD": "require",
        }
        row: dict[str, Any] = {"set": name, "python": platform.python_version()}

        pip = ["python", "-m", "pip", "install", "--quiet"]
        row["install_s"] = 0
        # A torch that is not the newest has to be there first: the extension is built for it only then.
        for what in filter(None, (SETS[name], ["-e", ".", *SETS[name]])):
            row["install_s"] += run([*pip, *what], clone, environment)[1]
        if only != "tests":
            _, row["main_job_s"] = run(["python", "-m", "clipcore.train"], clone, environment)
            row["main_job"] = accuracy(clone / "logs")
        if only != "main":
            run([*pip, "-e", ".[test]", *SETS[name]], clone, environment)
            printed, row["tests_s"] = run(["python", "-m", "pytest"], clone, environment)
            row["tests"] = outcome(printed)

        printed, _ = run(["python", "-c", ASK_FOR_VERSIONS], clone, environment)
        row |= json.loads(printed.splitlines()[-1])
    return {**row, "date": datetime.date.today().isoformat(), "commit": commit}


def outcome(printed: str) -> str:
    """Return how many tests failed, passed and were skipped, of pytest's last line."""
    counts = printed.strip().splitlines()[-1].partition(" in ")[0].split(", ")
    return ", ".join(count for count in counts if "warning" not in count)


def accuracy(logs: Path) -> str:
    """Return the last zero-shot top-1 / top-5 on unseen characters, in percent, of the only run under ``logs``."""
    (metrics,) = logs.glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    last = [row for row in rows if row.get("task") == "unseen characters"][-1]
    return f"{last['acc1']:.1%} / {last['acc5']:.1%}"


def write_table(rows: list[dict[str, Any]]) -> None:
    """Write docs/versions.md: one line a set, in the order of SETS."""
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    for row in sorted(rows, key=lambda row: list(SETS).index(row["set"])):
        lines.append([str(row.get(key, "")) for key in COLUMNS])
    TABLE.write_text(HEAD + "".join(f"| {' | '.join(line)} |\n" for line in lines))


def main() -> None:
    """Try one set, replace its row, and write the table again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--only", choices=["main", "tests"], help="one of the two commands")
    parsed = parser.parse_args()

    row = try_set(parsed.set, parsed.only)
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    earlier = [old for old in rows if old["set"] == parsed.set and old["commit"] == row["commit"]]
    if parsed.only and earlier:
        row = earlier[0] | row
    rows = [old for old in rows if old["set"] != parsed.set] + [row]
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_table(rows)


if __name__ == "__main__":
    main()
