"""Measuring: one call records a row for each provider, with device, versions and commit.

Rows are appended to bench/results/<device>.jsonl; ``python bench/harness.py [ROWS.jsonl ...]`` appends rows that were made
elsewhere, and writes bench/results/RESULTS.md from the newest row of each case. A figure of a GPU is only recorded on
that GPU. Rows that are computed and not measured have ``computed: true`` and their assumptions; they are in a separate file
and under a separate heading on the page.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from clipcore.kernels.logits.pages import give_back_idle_pages
from clipcore.run import memory
from clipcore.run.ceilings import time_ms

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"
# How the names of clipcore's providers begin; the last three are those of bench_global_batch.py, which has no peers.
OWN = ("clipcore", "planned", "all but one embedded twice", "direct")


@dataclass
class Settings:
    """How this process measures, from the arguments that all benches have, and which providers it has met."""

    budget_s: float = 2.0
    skipped: set[str] = field(default_factory=set)
    tests_failed: bool = False
    known: set[str] = field(default_factory=set)  # providers that were asked for
    failed: list[str] = field(default_factory=list)  # clipcore's own that failed


settings = Settings()


def parse(
    parser: argparse.ArgumentParser,
    tests: Sequence[str],
    arguments: Sequence[str] | None,
    check: Callable[[argparse.Namespace], None] | None = None,
    has_device: bool = True,
) -> argparse.Namespace:
    """Add the arguments that all benches have, parse them, and run the operation's tests.

    Args:
        tests: pytest's arguments. A bench ends if they fail, since figures of a wrong operation are worthless.
        arguments: None for those of the command line.
        check: called before the tests, to refuse arguments.
        has_device: whether the bench runs on a GPU if there is one.
    """
    if has_device:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        parser.add_argument(
            "--device", type=_device, default=device, help="cpu or cuda [%(default)s]"
        )
    parser.add_argument(
        "--tests",
        choices=["run", "passed", "failed"],
        default="run",
        help="run the operation's tests first, or say how they ended; rows are marked if they failed [run]",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=Settings.budget_s,
        metavar="SECONDS",
        help="seconds for which each provider of a case is timed on a CPU; a fifth of that on a GPU [%(default)g]",
    )
    parser.add_argument(
        "--skip",
        nargs="+",
        default=[],
        metavar="PROVIDER",
        help="leave these providers out, to save time",
    )
    parsed = parser.parse_args(arguments)
    if check is not None:
        check(parsed)

    global settings
    settings = Settings(parsed.budget, set(parsed.skip), parsed.tests == "failed")
    if tests and parsed.tests == "run":
        command = [sys.executable, "-m", "pytest", "-q", "-k", "not ahead_of_time", *tests]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            raise SystemExit("tests failed; --tests failed measures anyway, and marks the rows")
    return parsed


def _device(name: str) -> torch.device:
    """Return the device of a name, for argparse."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"torch has no device {name}") from error


def run(main: Callable[[], None]) -> None:
    """Run a bench to its end. Exit with 1 if a provider of clipcore failed, or --skip names no provider."""
    main()
    if unknown := settings.skipped - settings.known:
        names = ", ".join(sorted(settings.known - settings.skipped))
        raise SystemExit(
            f"--skip {', '.join(sorted(unknown))}: no such provider; there are {names}"
        )
    if settings.failed:
        raise SystemExit(f"failed: {', '.join(dict.fromkeys(settings.failed))}")


def is_wanted(name: str) -> bool:
    """Return whether --skip keeps a provider."""
    settings.known.add(name)
    return name not in settings.skipped


@contextlib.contextmanager
def leaving_out(name: str) -> Iterator[None]:
    """Print a provider's error, and continue without it.

    A peer may be missing, run out of memory, or fail in its own compiler. The others still get their figures.
    """
    try:
        yield
    except Exception as error:
        said = (str(error) or repr(error)).splitlines()[0]
        print(f"{name} is left out: {type(error).__name__}: {said}", flush=True)
        if name.startswith(OWN):
            traceback.print_exc()
            settings.failed.append(name)
        # The frames hold the tensors of the call. Compiled code also needs memory outside torch's allocator.
        traceback.clear_frames(error.__traceback__)
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):  # after an illegal access nothing works
                torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return f"{model.group(1) if model else platform.machine()}, {torch.get_num_threads()} threads"


class Measured(NamedTuple):
    """The time and memory of one provider's calls."""

    times_ms: list[float]
    extra_bytes: int  # peak above the memory before a call, without the call's results


def measure(
    fns: dict[str, Callable[[], Any]],
    device: torch.device,
    budget_s: float | None = None,
    min_rounds: int = 5,
) -> dict[str, Measured]:
    """Time single calls after a warm-up. The providers take turns, so that load on the machine slows all of them alike.

    A provider that fails is left out. With one round, the call that measures memory is the warm-up.

    Args:
        budget_s: a provider is called more often than `min_rounds` while that takes less time; None for the command line's.
    """
    on_gpu = device.type == "cuda"
    budget_s = settings.budget_s if budget_s is None else budget_s
    found: dict[str, Measured] = {}
    for name, fn in fns.items():
        if not is_wanted(name):
            continue
        with leaving_out(name):
            if min_rounds > 1:
                fn()
            found[name] = Measured([], extra_bytes_of(fn, device))

    limit = time.perf_counter() + (0.2 if on_gpu else 1.0) * budget_s * len(found)
    rounds = 0
    while rounds < min_rounds or (time.perf_counter() < limit and rounds < 200):
        rounds += 1
        for name, measured in list(found.items()):
            with leaving_out(name):
                measured.times_ms.append(time_ms(fns[name], device))
            if len(measured.times_ms) < rounds:
                del found[name]
    return found


def _bytes_of(result: Any) -> int:
    """Return the bytes of the tensors in a call's result."""
    tensors = result if isinstance(result, (tuple, list)) else [result]
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def extra_bytes_of(fn: Callable[[], Any], device: torch.device) -> int:
    """Return the peak of a call above the memory before it, without its result; pages kept from earlier calls count."""
    give_back_idle_pages()
    with memory.watch(device) as watched:
        result = fn()
    return max(0, watched.peak - _bytes_of(result))


def record(
    op: str,
    fns: dict[str, Callable[[], Any]],
    *,
    device: torch.device,
    flops: float,
    bytes_moved: float,
    extras: dict[str, dict[str, Any]] | None = None,
    min_rounds: int = 5,
    num_pairs: int | None = None,
    ceiling_tflops: float | None = None,
    **case: Any,
) -> dict[str, float]:
    """Measure providers of one operation, append and print their rows; return their medians in ms.

    Args:
        fns: see `measure`.
        min_rounds: see `measure`; 1 for calls of many seconds.
        flops, bytes_moved, extras, num_pairs, ceiling_tflops, case: see `record_measured`.
    """
    found = measure(fns, device, min_rounds=min_rounds)
    work: dict[str, Any] = {"flops": flops, "bytes_moved": bytes_moved, "extras": extras}
    work |= {"num_pairs": num_pairs, "ceiling_tflops": ceiling_tflops}
    return record_measured(op, found, device=device, **work, **case)


def record_measured(
    op: str,
    found: dict[str, Measured],
    *,
    device: torch.device,
    flops: float,
    bytes_moved: float,
    extras: dict[str, dict[str, Any]] | None = None,
    num_pairs: int | None = None,
    ceiling_tflops: float | None = None,
    **case: Any,
) -> dict[str, float]:
    """Append and print a row for each provider that was measured; return their medians in ms.

    Args:
        flops, bytes_moved: those of the operation, not of one implementation, so that providers compare.
        extras: further results of each provider, with keys of `EXTRAS`.
        num_pairs: pairs a call, if it trains on or reads pairs.
        ceiling_tflops: the speed of the device's matrix products, measured in the same process, for the share of it.
        case: sizes and dtype, which identify this case.
    """
    medians: dict[str, float] = {}
    for provider, (times_ms, extra_bytes) in found.items():
        median = statistics.median(times_ms)
        # A single time has no spread.
        fifths = (
            statistics.quantiles(times_ms, n=5, method="inclusive")
            if len(times_ms) > 1
            else times_ms
        )
        medians[provider] = median
        row = {
            "op": op,
            "provider": provider,
            **case,
            "median_ms": round(median, 4),
            "p20_ms": round(fifths[0], 4),
            "p80_ms": round(fifths[-1], 4),
            "tflops": round(flops / median / 1e9, 4),
            "gb_per_s": round(bytes_moved / median / 1e6, 2),
            "extra_bytes": extra_bytes,
            **({"pairs_per_s": round(1e3 * num_pairs / median, 2)} if num_pairs else {}),
            **({"ceiling_tflops": round(ceiling_tflops, 4)} if ceiling_tflops else {}),
            **(extras or {}).get(provider, {}),
            "device": device_name(device),
            **_versions(),
        }
        _append(_slug(row["device"]), row)
        print(
            f"{op} {provider} {case}: {median:.3f} ms, {row['tflops']} TFLOP/s, "
            f"{extra_bytes / 2**20:.1f} MiB",
            flush=True,
        )
    return medians


def record_row(
    op: str, provider: str, *, device: torch.device, figures: dict[str, Any], **case: Any
) -> None:
    """Append and print a row without a time: memory or counts.

    Args:
        figures: the results, with keys of `FIGURES` and `EXTRAS`.
        case: see `record_measured`.
    """
    assert figures.keys() <= _FOUND
    row = {"op": op, "provider": provider, **case, **figures, "device": device_name(device)}
    _append(_slug(row["device"]), {**row, **_versions()})
    shown = {title: COLUMNS[title](row) for title in (*FIGURE_COLUMNS, *FOUND_COLUMNS)}
    found = ", ".join(f"{title} {cell}" for title, cell in shown.items() if cell)
    print(f"{op} {provider} {case}: {found}", flush=True)


def record_computed(
    op: str, time_ms: float | None, num_bytes: float, assumptions: str, **case: Any
) -> None:
    """Append and print a row that follows from a formula and its assumptions, without a measurement.

    Args:
        time_ms: None for memory that is used and not moved.
    """
    figures: dict[str, Any] = {"computed": True}
    if time_ms is None:
        figures |= {"extra_bytes": int(num_bytes)}
    else:
        figures |= {"time_ms": round(time_ms, 4), "bytes_moved": int(num_bytes)}
    _append("computed", {"op": op, **case, **figures, "assumptions": assumptions, **_versions()})
    took = "" if time_ms is None else f"{time_ms:.3f} ms, "
    print(f"computed: {op} {case}: {took}{num_bytes / 1e6:.1f} MB", flush=True)


def record_counted(
    op: str, provider: str, figures: dict[str, Any], assumptions: str, **case: Any
) -> None:
    """Append and print a row of counts, which are the same on every machine.

    Args:
        figures: with keys of `COUNTS`.
        case: see `record_measured`.
    """
    assert figures.keys() <= COUNTS
    row = {"op": op, "provider": provider, **case, "computed": True, **figures}
    _append("computed", {**row, "assumptions": assumptions, **_versions()})
    found = ", ".join(f"{name} {value}" for name, value in figures.items())
    print(f"counted: {provider} {case}: {found}", flush=True)


def _append(name: str, row: dict[str, Any]) -> None:
    """Append a row to the results, or to the caller's folder: bench/gpu.sh adds its own to the results by `merge`."""
    folder = Path(os.environ.get("BENCH_ROWS") or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def _versions() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        **({"tests": "red"} if settings.tests_failed else {}),
        **_commit(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> dict[str, Any]:
    """Return the commit that was measured, and whether files differed from it (results apart).

    In a copy of the tree without its history, CLIPCORE_COMMIT gives both, as `bench/gpu.sh commit` prints them.
    """
    if copied := os.environ.get("CLIPCORE_COMMIT"):
        commit = copied.partition("@")[0]
        return {"commit": commit.rstrip("+"), "dirty": commit.endswith("+")}

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    changed = [
        line for line in git("status", "--porcelain").splitlines() if "bench/results" not in line
    ]
    return {"commit": git("rev-parse", "--short", "HEAD"), "dirty": bool(changed)}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def newest_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the newest row of each case and provider, by operation and device; and those that are computed."""
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    computed: dict[tuple[str, ...], dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found, key = newest, (row["op"], row.get("device", ""), json.dumps(_case(row)))
            if row.get("computed"):
                found = computed
            if "provider" in row:
                key += (row["provider"],)
            # Figures with failing tests are shown only if there are no others.
            if row.get("tests") != "red" or found.get(key, row).get("tests") == "red":
                found[key] = row
    return [row for _, row in sorted(newest.items())], list(computed.values())


def results_page() -> str:
    """Return RESULTS.md: the newest row of each case, by operation and device."""
    lines = [
        "# Results",
        "",
        "Generated by `python bench/harness.py` from the rows beside it. Medians.",
        "",
    ]
    rows, computed = newest_rows()
    counted = [row for row in computed if row.keys() & COUNTS]
    computed = [row for row in computed if not row.keys() & COUNTS]
    for (op, device), group in itertools.groupby(rows, lambda row: (row["op"], row["device"])):
        lines += [f"## {op} on {device}", "", *table(list(group)), ""]
    if counted:
        lines += ["## counted, not measured", "", *table(counted, COUNTED_COLUMNS), ""]
    if computed:
        lines += ["## computed, not measured", "", *table(computed, COMPUTED_COLUMNS)]
    return "\n".join(lines).rstrip("\n") + "\n"


def table(rows: list[dict[str, Any]], columns: Columns | None = None) -> list[str]:
    """Return lines of Markdown, without the columns that are empty in all rows."""
    columns = columns or COLUMNS
    filled = {title: [show(row) for row in rows] for title, show in columns.items()}
    filled = {title: cells for title, cells in filled.items() if any(cells)}
    lines = ["| " + " | ".join(filled) + " |", "|" + "---|" * len(filled)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in zip(*filled.values(), strict=True)]


def case_in_words(row: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in _case(row).items())


def _share(row: dict[str, Any]) -> str:
    return f"{row['tflops'] / row['ceiling_tflops']:.0%}" if "ceiling_tflops" in row else ""


def _parts(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {ms:g}" for name, ms in row.get("parts_ms", {}).items())


def _number(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: str(row[name]) if row.get(name) else ""


def _mib(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{row[name] / 2**20:.1f}" if name in row else ""


def _count(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: str(row.get(name, ""))


def _over_expected(row: dict[str, Any]) -> str:
    return f"{row['peak_bytes'] / row['expected_bytes']:.3f}" if "expected_bytes" in row else ""


def _pairs_per_s(row: dict[str, Any]) -> str:
    if "median_ms" not in row:
        return ""
    found = row.get("pairs_per_s") or 1e3 * row.get("pairs", 0) / row["median_ms"]
    return f"{found:.4g}" if found else ""


def _at(row: dict[str, Any]) -> str:
    notes = ["changed"] * row["dirty"] + ["tests red"] * (row.get("tests") == "red")
    return row["commit"] + (f" ({', '.join(notes)})" if notes else "")


Columns = dict[str, Callable[[dict[str, Any]], str]]
# Columns of rows without a time.
FIGURE_COLUMNS: Columns = {
    "extra MiB": _mib("extra_bytes"),
    "peak MiB": _mib("peak_bytes"),
    "expected MiB": _mib("expected_bytes"),
    "peak / expected": _over_expected,
    "budget MiB": _mib("budget_bytes"),
    "micro-batch": _count("micro_batch_size"),
    "kept graphs": _count("kept"),
    "page faults": _count("page_faults"),
    "CPU s": _count("cpu_s"),
    "s": _count("seconds"),
    "in the encoder": lambda row: f"{row['encoder_share']:.1%}" if "encoder_share" in row else "",
    "steps": _count("iterations"),
    "excess": lambda row: f"{row['excess']:.1e}" if "excess" in row else "",
    "tolerance": lambda row: f"{row['tolerance']:.0e}" if "tolerance" in row else "",
    "accuracy": lambda row: f"{row['accuracy']:.1%}" if "accuracy" in row else "",
}
# Columns of results with or without a time.
FOUND_COLUMNS: Columns = {
    "gradient's error": lambda row: (
        f"{row['gradient_error']:.1e}" if "gradient_error" in row else ""
    ),
    "finite": lambda row: {True: "yes", False: "no", None: ""}[row.get("finite")],
    "same bits": lambda row: {True: "yes", False: "no", None: ""}[row.get("repeatable")],
}
COLUMNS: Columns = {
    "case": case_in_words,
    "provider": lambda row: row["provider"],
    "ms": _number("median_ms"),
    "pairs/s": _pairs_per_s,
    "TFLOP/s": _number("tflops"),
    "of the ceiling": _share,
    "GB/s": _number("gb_per_s"),
    **FIGURE_COLUMNS,
    "parts, ms": _parts,
    **FOUND_COLUMNS,
    "commit": _at,
}
COMPUTED_COLUMNS: Columns = {
    "what": lambda row: row["op"],
    "case": case_in_words,
    "ms": _number("time_ms"),
    "MB": lambda row: f"{row['bytes_moved'] / 1e6:.1f}" if "bytes_moved" in row else "",
    "extra MiB": _mib("extra_bytes"),
    "assumptions": _number("assumptions"),
    "commit": _at,
}
# Parts of a step whose launches are counted.
PARTS = ("forward", "loss", "backward", "update")


def _a_pair(unit: float, *names: str) -> Callable[[dict[str, Any]], str]:
    """Return how to show a step's sum of some counts for one pair, in a unit."""
    return lambda row: f"{sum(row[name] for name in names) / row['pairs'] / unit:.2f}"


def _launches(row: dict[str, Any]) -> str:
    return str(sum(row[f"launches_{part}"] for part in PARTS))


# Of a step whose operators are counted.
COUNTED_COLUMNS: Columns = {
    "case": case_in_words,
    "provider": lambda row: row["provider"],
    "GFLOP a pair, forward": _a_pair(1e9, "flops_forward"),
    "backward": _a_pair(1e9, "flops_backward"),
    "of the needed": lambda row: f"{row['flops_over_needed']:.3f}",
    "MB saved a pair": _a_pair(1e6, "saved_bytes"),
    "bytes saved a token and image layer, over its width": _count("image_saved"),
    "text layer": _count("text_saved"),
    **{f"launches, {part}": _count(f"launches_{part}") for part in PARTS},
    "all": _launches,
    "copies to the GPU": _count("copies"),
    "MB a pair": _a_pair(1e6, "copied_bytes"),
    "waits": _count("waits"),
    "of a logged step": _count("logged_waits"),
    "torch": _count("torch"),
    "commit": _at,
}
# A provider's results beside its time: errors relative to float64, whether three runs gave the same bits, the
# milliseconds of a step's parts, the plan of a step, bytes that a rank has sent.
ERRORS = {"loss_error", "gradient_error", "scale_error"}
EXTRAS = ERRORS | {"repeatable", "mean_tokens", "parts_ms", "plan", "sent_bytes"}
# Results without a time: memory, the micro-batches of a step, page faults, CPU time of the whole case, whether numbers
# are finite.
FIGURES = {"extra_bytes", "peak_bytes", "expected_bytes", "budget_bytes"}
FIGURES |= {"micro_batch_size", "kept", "page_faults", "cpu_s", "finite"}
# Of a fit: steps, the objective's relative excess over its minimum, the solver's tolerance, accuracy.
FIGURES |= {"iterations", "excess", "tolerance", "accuracy"}
# Of an evaluation: its time, and the encoder's share of it.
FIGURES |= {"seconds", "encoder_share"}
# Of a step, counted by operator: sums of the step, except for what a token saves in a layer, over the width.
COUNTS = {"flops_forward", "flops_backward", "flops_over_needed", "copies", "copied_bytes"}
COUNTS |= {"saved_bytes", "image_saved", "text_saved", "waits", "logged_waits"}
COUNTS |= {f"launches_{part}" for part in PARTS}
_FOUND = EXTRAS | FIGURES
_MEASURED = (
    _FOUND
    | COUNTS
    | {
        "op",
        "provider",
        "median_ms",
        "p20_ms",
        "p80_ms",
        "tflops",
        "gb_per_s",
        "pairs_per_s",
        "ceiling_tflops",
        "computed",
        "time_ms",
        "bytes_moved",
        "assumptions",
        "device",
        "torch",
        "triton",
        "tests",
        "commit",
        "dirty",
        "date",
    }
)


def _case(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in _MEASURED}


# README's tables, each between two comments: pairs a second of these operations, and counts of a step of these models.
README = ROOT / "README.md"
README_TABLES = ("training step", "loader")
README_MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "RN50")


def by_provider(rows: list[dict[str, Any]]) -> list[str]:
    """Return lines of Markdown: pairs a second, a row for each case and a column for each provider."""
    providers = sorted({row["provider"] for row in rows})
    lines = ["| " + " | ".join(["pairs/s", *providers, "commit"]) + " |"]
    lines.append("|" + "---|" * (len(providers) + 2))
    for case, group in itertools.groupby(rows, case_in_words):
        found = {row["provider"]: row for row in group}
        cells = [_pairs_per_s(found[name]) if name in found else "" for name in providers]
        commits = sorted({_at(row) for row in found.values()})
        lines.append("| " + " | ".join([case, *cells, ", ".join(commits)]) + " |")
    return lines


def counts(rows: list[dict[str, Any]]) -> list[str]:
    """Return lines of Markdown: a row for each model, and in each cell clipcore's count and open_clip's."""
    shown: Columns = {
        "GFLOP a pair": _a_pair(1e9, "flops_forward", "flops_backward"),
        "MB saved a pair": COUNTED_COLUMNS["MB saved a pair"],
        "launches": _launches,
        "MB copied to the GPU a pair": COUNTED_COLUMNS["MB a pair"],
        "waits of the host": _count("waits"),
        "commit": _at,
    }
    by_case: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["model"] in README_MODELS and _case(row).keys() == {"model", "pairs"}:
            by_case.setdefault(case_in_words(row), []).append(row)
    lines = [
        "| clipcore / open_clip | " + " | ".join(shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for case, group in by_case.items():
        group.sort(key=lambda row: row["provider"])
        cells = (" / ".join(dict.fromkeys(map(show, group))) for show in shown.values())
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return lines


def readme(text: str) -> str:
    """Return README with its tables made anew from the newest rows."""
    rows, computed = newest_rows()
    tables: dict[str, list[str]] = {}
    for op in README_TABLES:
        tables[op] = []
        for device, group in itertools.groupby(
            (row for row in rows if row["op"] == op), lambda row: row["device"]
        ):
            tables[op] += [f"{op.capitalize()} on {device}:", "", *by_provider(list(group)), ""]
    tables["counts of a step"] = [*counts([row for row in computed if row.keys() & COUNTS]), ""]

    for op, lines in tables.items():
        begin, end = f"<!-- rows: {op} -->\n", "<!-- end of rows -->"
        if begin not in text:
            continue
        before, rest = text.split(begin)
        text = before + begin + "\n".join(["", *lines, ""]) + end + rest.split(end, 1)[1]
    return text


def write_pages() -> None:
    """Write RESULTS.md and README's tables from the rows, unless these go to the caller's folder."""
    if os.environ.get("BENCH_ROWS"):
        return
    (RESULTS / "RESULTS.md").write_text(results_page())
    README.write_text(readme(README.read_text()))


def merge(paths: Sequence[Path]) -> None:
    """Append the rows of other folders to the results, each once."""
    for path in paths:
        own = RESULTS / path.name
        there = set(own.read_text().splitlines()) if own.exists() else set()
        with open(own, "a") as file:
            for line in path.read_text().splitlines():
                if line not in there:
                    file.write(line + "\n")


if __name__ == "__main__":
    merge([Path(name) for name in sys.argv[1:]])
    write_pages()
    print(RESULTS / "RESULTS.md")
