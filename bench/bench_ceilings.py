"""The device's ceilings: a large copy, and matrix products at the inner sizes of CLIP's towers.

Every share of a floor or of a ceiling in this folder's tables is relative to these rows.

python bench/bench_ceilings.py [--device cuda]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from harness import parse, record, run

from clipcore.run.ceilings import Work, copy_work, product_work


def bench(op: str, work: Work, device: torch.device) -> None:
    record(
        op,
        {"torch": work.fn},
        device=device,
        flops=work.flops,
        bytes_moved=work.bytes_moved,
        **work.case,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    device = parse(parser, [], argv).device
    on_gpu = device.type == "cuda"
    bench("copy", copy_work(device, 2**31 if on_gpu else 2**28), device)
    rows = 65536 if on_gpu else 2048
    for dtype in (torch.bfloat16, torch.float32):
        for width in (512, 768, 1024, 1280) if on_gpu else (512, 768):
            bench("matrix product", product_work(width, dtype, device, rows), device)


if __name__ == "__main__":
    run(main)
