"""Try the attacks, and print how their cases ended; the exit status is 1 where one was a finding."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
for folder in (TESTS.parent, TESTS, TESTS / "programs", TESTS.parent / "bench"):
    sys.path.insert(0, str(folder))
# Read by OpenMP when torch is imported: one thread, so that this process may fork.
os.environ["OMP_NUM_THREADS"] = "1"

import attack.disk  # noqa: E402


def parsed(known: Collection[str]) -> argparse.Namespace:
    """Return the arguments; ends the program where an attack's name is unknown."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("names", nargs="*", help="attacks to try [all]")
    parser.add_argument("--fast", action="store_true", help="only the part that the suite tries")
    parser.add_argument("--case", help="only the cases whose name has this in it")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="[one a core]")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(known):
        parser.error(f"no attack is called {min(unknown)!r}; there are: {', '.join(known)}")
    return arguments


def main() -> int:
    from attack.all import ATTACKS
    from attack.harness import chosen, try_all

    arguments = parsed(ATTACKS)
    # A child would copy all of this process's memory to look for cycles in it.
    gc.freeze()
    names = arguments.names or list(ATTACKS)
    num_findings = 0
    with tempfile.TemporaryDirectory(prefix="attack") as place:
        for name in names:
            if arguments.fast and not ATTACKS[name].fast:
                continue
            folder = Path(place, name.replace(" ", "_"))
            folder.mkdir()
            made = ATTACKS[name](folder)
            made.is_fast = arguments.fast
            cases = {n: c for n, c in made.cases().items() if (arguments.case or "") in n}
            if arguments.fast:
                cases = chosen(cases, made.fast)
            result = try_all(made, cases, folder / "cases", arguments.processes)
            num_findings += len(result.findings)
            ended = ", ".join(
                f"{count:,} {outcome}" for outcome, count in result.outcomes.most_common()
            )
            found = f"{len(result.findings)} findings" if result.findings else "no finding"
            print(
                f"{name}: {len(cases):,} cases, {found}, {result.seconds:.0f} s: {ended}",
                flush=True,
            )
            for case, what in result.findings.items():
                print(f"FOUND {name}: {case}: {what}", flush=True)
    return int(num_findings > 0)


if __name__ == "__main__":
    if "faulty_disk" in os.environ.get("LD_PRELOAD", ""):
        sys.exit(main())
    # The library has to be there before any other is loaded.
    with tempfile.TemporaryDirectory(prefix="attack") as built:
        library = attack.disk.build(Path(built))
        earlier = os.environ.get("LD_PRELOAD", "")
        os.environ["LD_PRELOAD"] = f"{library} {earlier}".strip()
        command = [sys.executable, *sys.orig_argv[1:]]
        sys.exit(os.spawnve(os.P_WAIT, sys.executable, command, os.environ))
