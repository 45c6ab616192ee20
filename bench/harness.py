"""Measuring: one call records a row a provider, with what is needed to believe it.

Rows are appended to bench/results/<device>.jsonl; ``python bench/harness.py`` writes bench/results/RESULTS.md from the
newest row of each case. A figure of a GPU is only ever recorded on that GPU.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from clipcore import memory
from clipcore.kernels.logits_cpu import give_back_idle_pages

RESULTS = Path(__file__).resolve().parent / "results"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return f"{model.group(1) if model else platform.machine()}, {torch.get_num_threads()} threads"


class Measured(NamedTuple):
    """What calls of one provider took."""

    times_ms: list[float]
    extra_bytes: int  # peak above what was there before a call, without what the call returns


def measure(
    fns: dict[str, Callable[[], Any]],
    device: torch.device,
    budget_s: float = 2.0,
    min_rounds: int = 5,
) -> dict[str, Measured]:
    """Times of single calls after a warm-up, the providers in turn: what slows the machine down slows them all.

    At least `min_rounds`, more while they take less than `budget_s` a provider. On a GPU a provider whose warm-up runs out
    of memory is left out. With one round the call that watches the memory is the warm-up.
    """
    on_gpu = device.type == "cuda"
    found: dict[str, Measured] = {}
    for name, fn in fns.items():
        try:
            if min_rounds > 1:
                fn()
            found[name] = Measured([], _extra_bytes(fn, device))
        except torch.cuda.OutOfMemoryError:
            print(f"{name}: out of memory", flush=True)
            torch.cuda.empty_cache()
    limit = time.perf_counter() + budget_s * len(found)
    rounds = 0
    while rounds < min_rounds or (time.perf_counter() < limit and rounds < 200):
        rounds += 1
        for name, measured in found.items():
            measured.times_ms.append(_time_ms(fns[name], on_gpu))
    return found


def _time_ms(fn: Callable[[], Any], on_gpu: bool) -> float:
    if on_gpu:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        fn()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last)
    start = time.perf_counter()
    fn()
    return 1e3 * (time.perf_counter() - start)


def _bytes_of(result: Any) -> int:
    """Bytes of the tensors that a call returned."""
    tensors = result if isinstance(result, (tuple, list)) else [result]
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def _extra_bytes(fn: Callable[[], Any], device: torch.device) -> int:
    """Peak of a call above what was in use before it, without what it returns; pages kept from a call before count."""
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
    **case: Any,
) -> dict[str, float]:
    """Measures providers of one operation, appends and prints their rows; returns their medians in ms.

    Args:
        flops, bytes_moved: of the operation, not of one implementation, so that providers compare.
        extras: what else was found of a provider, of `EXTRAS`.
        min_rounds: see `measure`; 1 for calls of many seconds.
        case: what tells this case from others: sizes and dtype.
    """
    medians: dict[str, float] = {}
    for provider, (times_ms, extra_bytes) in measure(fns, device, min_rounds=min_rounds).items():
        median = statistics.median(times_ms)
        # One time has no spread.
        fifths = statistics.quantiles(times_ms, n=5) if len(times_ms) > 1 else times_ms
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
            **(extras or {}).get(provider, {}),
            "device": device_name(device),
            "torch": torch.__version__,
            "triton": triton.__version__,
            **_commit(),
            "date": datetime.date.today().isoformat(),
        }
        RESULTS.mkdir(exist_ok=True)
        with open(RESULTS / f"{_slug(row['device'])}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{op} {provider} {case}: {median:.3f} ms, {row['tflops']} TFLOP/s, "
            f"{extra_bytes / 2**20:.1f} MiB",
            flush=True,
        )
    return medians


def _commit() -> dict[str, Any]:
    """The commit that was measured, and whether files differed from it (results apart)."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=RESULTS.parent, capture_output=True, text=True
        ).stdout.strip()

    changed = [
        line for line in git("status", "--porcelain").splitlines() if "bench/results" not in line
    ]
    return {"commit": git("rev-parse", "--short", "HEAD"), "dirty": bool(changed)}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def results_page() -> str:
    """RESULTS.md: the newest row of each case, by operation and device."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            newest[(row["op"], row["device"], json.dumps(_case(row)), row["provider"])] = row
    lines = [
        "# Results",
        "",
        "Generated by `python bench/harness.py` from the rows beside it. Medians.",
        "",
    ]
    heading = None
    for (op, device, case, provider), row in sorted(newest.items()):
        if heading != (op, device):
            heading = (op, device)
            lines += [
                f"## {op} on {device}",
                "",
                "| case | provider | ms | TFLOP/s | GB/s | extra MiB | gradient's error | same bits | commit |",
                "|---|---|---|---|---|---|---|---|---|",
            ]
        values = ", ".join(f"{k} {v}" for k, v in json.loads(case).items())
        dirty = " (changed)" if row["dirty"] else ""
        lines.append(
            f"| {values} | {provider} | {row['median_ms']} | {row['tflops']} | {row['gb_per_s']} "
            f"| {row['extra_bytes'] / 2**20:.1f} | {_error(row)} | {_yes_no(row)} | {row['commit']}{dirty} |"
        )
    return "\n".join(lines) + "\n"


def _error(row: dict[str, Any]) -> str:
    return f"{row['gradient_error']:.1e}" if "gradient_error" in row else ""


def _yes_no(row: dict[str, Any]) -> str:
    return {True: "yes", False: "no", None: ""}[row.get("repeatable")]


# Errors relative to float64, and whether three runs gave the same bits.
EXTRAS = {"loss_error", "gradient_error", "scale_error", "repeatable"}
_MEASURED = EXTRAS | {
    "op",
    "provider",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "tflops",
    "gb_per_s",
    "extra_bytes",
    "device",
    "torch",
    "triton",
    "commit",
    "dirty",
    "date",
}


def _case(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in _MEASURED}


if __name__ == "__main__":
    (RESULTS / "RESULTS.md").write_text(results_page())
    print(RESULTS / "RESULTS.md")
