"""The linear probe against scikit-learn: the processor's time, and how far the objective is from the least.

python bench/bench_linear_probe.py [--images 10000] [--width 512] [--classes 10 100] [--search | --few-shot]

Features are drawn: overlapping clouds, one a class. --search makes the paper's search over C instead, 15 fits from 1e-6 to
1e6, and --few-shot the paper's few-shot curve, 1 to 16 images a class with five seeds, a search over C in each.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from harness import is_wanted, leaving_out, parse, record_row, run
from torch import Tensor
from torch.nn import functional as F

from clipcore.evaluate.few_shot import few_shot_curve
from clipcore.evaluate.linear_probe import GRID, fit_linear_probe, search_C

CS = (0.01, 1.0, 100.0, 1e4)


class Fit(NamedTuple):
    """Weights [K, D], bias [K] and the number of steps."""

    weight: Tensor
    bias: Tensor
    iterations: int


def drawn(num_images: int, width: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return features and labels of clouds whose centres are the same for every seed."""
    generator = torch.Generator().manual_seed(0)
    centres = 0.12 * torch.randn(num_classes, width, generator=generator)
    generator.manual_seed(1 + seed)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    return centres[labels] + torch.randn(num_images, width, generator=generator), labels


def objective(fit: Fit, features: Tensor, labels: Tensor, C: float) -> float:
    """Return C times the sum of the cross-entropies plus half of the squared weights, in float64."""
    loss = 0.0
    for block, those in zip(features.split(4096), labels.split(4096), strict=True):
        logits = block.double() @ fit.weight.double().T + fit.bias.double()
        loss += F.cross_entropy(logits, those, reduction="sum").item()
    return C * loss + fit.weight.double().square().sum().item() / 2


def ours(features: Tensor, labels: Tensor, C: float) -> Fit:
    probe = fit_linear_probe(features, labels, C)
    return Fit(probe.weight, probe.bias, probe.num_iterations)


def theirs(features: Tensor, labels: Tensor, C: float, tol: float) -> Fit:
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(C=C, tol=tol, max_iter=1000)
        model.fit(features.double().numpy(), labels.numpy())
    weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    return Fit(weight, bias, int(model.n_iter_.max()))


PROVIDERS: dict[str, Callable[[Tensor, Tensor, float], Fit]] = {
    "clipcore": ours,
    "scikit-learn": lambda features, labels, C: theirs(features, labels, C, 1e-4),
    "scikit-learn, tol 1e-6": lambda features, labels, C: theirs(features, labels, C, 1e-6),
}


def bench_fits(num_images: int, width: int, num_classes: int) -> None:
    """Record a row a provider and C."""
    features, labels = drawn(num_images, width, num_classes, 0)
    for C in CS:
        found: dict[str, tuple[float, float, int]] = {}
        for name, fit in PROVIDERS.items():
            if is_wanted(name):
                with leaving_out(name):
                    begun = time.process_time()
                    result = fit(features, labels, C)
                    seconds = time.process_time() - begun
                    value = objective(result, features, labels, C)
                    found[name] = seconds, value, result.iterations
        least = min((value for _, value, _ in found.values()), default=math.nan)
        for name, (seconds, value, iterations) in found.items():
            figures = {"cpu_s": round(seconds, 3), "excess": value / least - 1}
            record_row(
                "linear_probe",
                name,
                device=torch.device("cpu"),
                figures=figures | {"iterations": iterations},
                images=num_images,
                width=width,
                classes=num_classes,
                C=C,
            )


def bench_search(num_images: int, width: int, num_classes: int) -> None:
    """Record a row a provider: the search over C on a tenth as many validation images."""
    train, val = (
        drawn(number, width, num_classes, seed)
        for seed, number in enumerate((num_images, num_images // 10))
    )
    tried: list[float] = []

    def search_with_theirs() -> float:
        # The points that our search tries, which their scores would lead elsewhere.
        best = 0.0
        for C in tried:
            fit = theirs(*train, C, 1e-4)
            right = (val[0].double() @ fit.weight.T + fit.bias).argmax(1) == val[1]
            best = max(best, right.double().mean().item())
        return best

    def search_with_ours() -> float:
        found = search_C(*train, *val, fit_all=False)
        tried.extend(C for C, _ in found.trace)
        return max(score for _, score in found.trace)

    for name, search in {"clipcore": search_with_ours, "scikit-learn": search_with_theirs}.items():
        with leaving_out(name):
            begun = time.process_time()
            accuracy = search()
            seconds = time.process_time() - begun
            record_row(
                "linear_probe_search",
                name,
                device=torch.device("cpu"),
                figures={"cpu_s": round(seconds, 2), "accuracy": accuracy},
                images=num_images,
                width=width,
                classes=num_classes,
                fits=len(tried),
            )


def bench_few_shot(num_images: int, width: int, num_classes: int) -> None:
    """Record a row: the few-shot curve, from enough training images, scored on half as many as there are images."""
    train, test = (
        drawn(number, width, num_classes, seed)
        for seed, number in enumerate((num_images, num_images // 2))
    )
    keys = [str(number) for number in range(num_images)]
    begun = time.process_time()
    curve = few_shot_curve(*train, keys, *test)
    seconds = time.process_time() - begun
    record_row(
        "few_shot",
        "clipcore",
        device=torch.device("cpu"),
        figures={"cpu_s": round(seconds, 2), "accuracy": curve.means[-1]},
        images=num_images,
        width=width,
        classes=num_classes,
        shots=list(curve.shots),
        seeds=len(curve.scores[0]),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000, help="[%(default)s]")
    parser.add_argument("--width", type=int, default=512, help="[%(default)s]")
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100], help="[10 100]")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--search", action="store_true", help=f"over C, of {len(GRID)} points")
    kinds.add_argument("--few-shot", action="store_true", help="curves of 1 to 16 images a class")
    arguments = parse(parser, ["tests/test_linear_probe.py"], argv, has_device=False)

    # What is imported with a first fit is not its time.
    for name, fit in PROVIDERS.items():
        with leaving_out(name):
            fit(*drawn(100, 8, 3, 0), 1.0)
    for num_classes in arguments.classes:
        if arguments.search:
            bench_search(arguments.images, arguments.width, num_classes)
        elif arguments.few_shot:
            bench_few_shot(arguments.images, arguments.width, num_classes)
        else:
            bench_fits(arguments.images, arguments.width, num_classes)


if __name__ == "__main__":
    run(main)
