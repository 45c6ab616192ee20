"""AdamW's pass against torch's optimizers and a copy of the same bytes.

python bench/bench_adamw.py [--model ViT-B-16] [--millions 86] [--device cpu]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import parse, record, run
from torch import nn

from clipcore.kernels.adamw import Update, adamw_all_
from clipcore.run.optim import AdamW
from clipcore.towers.factory import create_model

SETTINGS = {"lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}


def parameters(model: str, millions: float, device: torch.device) -> list[nn.Parameter]:
    """Return the image tower's first parameters, with gradients; no zeros, which may change the time of a division."""
    found: list[nn.Parameter] = []
    for parameter in create_model(model).visual.to(device).parameters():
        if sum(p.numel() for p in found) + parameter.numel() <= 1e6 * millions:
            parameter.grad = 1e-3 * torch.randn_like(parameter)
            found.append(parameter)
    return found


def pass_of(
    params: list[nn.Parameter], moments: torch.dtype, with_shadow: bool
) -> Callable[[], None]:
    """Return our pass alone, with a clipping factor on the device."""
    updates = [
        Update(
            *(p.detach(), p.grad, *(torch.full_like(p, 1e-4, dtype=moments) for _ in range(2))),
            torch.empty_like(p, dtype=torch.bfloat16) if with_shadow else None,
            stream=number,
        )
        for number, p in enumerate(params)
    ]
    (beta1, beta2), scale = SETTINGS["betas"], torch.ones((), device=params[0].device)
    rest = {key: value for key, value in SETTINGS.items() if key != "betas"}
    return lambda: adamw_all_(updates, **rest, beta1=beta1, beta2=beta2, step=9, grad_scale=scale)


def compiled(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    return torch.compile(optimizer.step)


def bench_model(model: str, millions: float, device: torch.device) -> None:
    params = parameters(model, millions, device)
    num_elements = sum(p.numel() for p in params)
    # A compiled step reads lr from the device, so that a change of it compiles nothing anew.
    lr = torch.tensor(SETTINGS["lr"], device=device)
    clipped = nn.utils.clip_grads_with_norm_
    norm = torch.ones((), device=device)
    fused = torch.optim.AdamW(params, **SETTINGS, fused=True)

    def clip_and_step() -> None:
        clipped(params, 1.0, norm)
        fused.step()

    providers = {
        "clipcore, fp32 moments": (pass_of(params, torch.float32, False), 28),
        "clipcore, fp32 moments and shadow": (pass_of(params, torch.float32, True), 30),
        "clipcore, bf16 moments": (pass_of(params, torch.bfloat16, False), 20),
        "clipcore, bf16 moments and shadow": (pass_of(params, torch.bfloat16, True), 22),
        "clipcore optimizer, bf16 moments": (AdamW(params, **SETTINGS).step, 20),
        "torch fused": (fused.step, 28),
        "torch fused, clipping apart": (clip_and_step, 28),
        "torch foreach": (torch.optim.AdamW(params, **SETTINGS, foreach=True).step, 28),
    }
    if device.type == "cuda":
        settings = {**SETTINGS, "lr": lr, "capturable": True}
        providers["torch.compile"] = (compiled(torch.optim.AdamW(params, **settings)), 28)
    for num_bytes in (20, 28):
        size = num_bytes * num_elements // 2
        ends = [torch.randint(0, 256, (size,), dtype=torch.uint8, device=device) for _ in range(2)]
        copy = ends[0].copy_
        providers[f"copy of {num_bytes} bytes"] = (lambda copy=copy, x=ends[1]: copy(x), num_bytes)
    # One row of times, so that all providers take turns; bytes are those of float32 moments.
    record(
        "adamw",
        {name: fn for name, (fn, _) in providers.items()},
        device=device,
        flops=15.0 * num_elements,
        bytes_moved=28.0 * num_elements,
        model=model,
        elements=num_elements,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument(
        "--millions", type=float, default=None, help="at most this many million elements"
    )
    arguments = parse(parser, ["tests/test_adamw.py"], argv)
    device = arguments.device
    millions = arguments.millions or (90.0 if device.type == "cuda" else 9.5)
    bench_model(arguments.model, millions, device)


if __name__ == "__main__":
    run(main)
