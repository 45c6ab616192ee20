"""Formats results as lines for the terminal."""

from __future__ import annotations

from clipcore.data import printable
from clipcore.evaluate.results import (
    BIAS,
    FEW_SHOT,
    LINEAR_PROBE,
    OVERLAP,
    PROMPTS,
    RETRIEVAL,
    ZERO_SHOT,
    Result,
)
from clipcore.number_texts import percent, signed_points

_TITLES = {
    ZERO_SHOT: "zero-shot",
    LINEAR_PROBE: "linear probe",
    FEW_SHOT: "few-shot",
    PROMPTS: "prompts",
    RETRIEVAL: "retrieval",
    OVERLAP: "overlap",
    BIAS: "bias",
}
_DATASET_WIDTH, _TITLE_WIDTH = 24, 12


def line_of(result: Result) -> str:
    """Return the figures of a result in one line."""
    name = printable(result.dataset)
    title = _TITLES.get(result.task, result.task)
    return f"  {name:<{_DATASET_WIDTH}}  {title:<{_TITLE_WIDTH}}  {'; '.join(_parts(result))}"


def _parts(result: Result) -> list[str]:
    """Return the parts of the line, the main metric first."""
    details = result.details
    if result.task == PROMPTS:
        return [
            f"{variant['title']} {percent(variant['value'])}"
            + ("" if variant["name"] == "name" else f" ({signed_points(variant['gain'])})")
            for variant in details["variants"]
        ]
    if result.task == FEW_SHOT:
        shots = [f"{name.removesuffix('shot')}: {percent(v)}" for name, v in result.metrics.items()]
        parts = [f"{details['metric']} by images per class {', '.join(shots)}"]
        if details["labels_per_class"]:
            parts.append(
                f"zero-shot {percent(details['zero_shot'])} equals {details['labels_per_class']['text']} images per class"
            )
        return parts

    main = details.get("main_metric", "")
    first = f"{main} {percent(result.value)}"
    if details.get("ci95"):
        low, high = details["ci95"]
        first += f" ({100 * low:.1f} to {100 * high:.1f})"
    parts = [first]
    if result.task in (ZERO_SHOT, LINEAR_PROBE):
        among = {"acc1", "acc5", "mean_per_class_recall", "map11", "mean_average_precision"}
        parts += [
            f"{name} {percent(value)}"
            for name, value in result.metrics.items()
            if name != main and name.removeprefix("lp_") in among and value is not None
        ]
    if result.task == LINEAR_PROBE:
        parts.append(f"C {details['C']:.3g}")
    if result.task == OVERLAP:
        parts += _overlap_parts(result)
    if result.task == BIAS:
        parts += _bias_parts(result)
    if details.get("chance"):
        chance = f"{100 * details['chance']:.2g}%"
        parts.append(f"chance {chance} of {details['num_classes']:,} classes")
    if details.get("num_images"):
        parts.append(f"{details['num_images']:,} images")
    for name in ("num_unreadable", "num_transparent"):
        if details.get(name):
            parts.append(f"{details[name]:,} {name.removeprefix('num_')}")
    return parts


def _overlap_parts(result: Result) -> list[str]:
    """Return the effect of overlapping images on the score, and the cosine from which images overlap."""
    details, gain = result.details, result.metrics.get("gain")
    parts = [f"from cosine {details['threshold']:.4f} on ({details['threshold_from']})"]
    if gain is not None:
        parts.append(f"acc1 {signed_points(gain)} by it")
    p_value = details.get("p_value_adjusted", result.metrics.get("p_value"))
    if p_value is not None:
        parts.append(f"p {p_value:.2g}")
    return parts


def _bias_parts(result: Result) -> list[str]:
    """Return the worst group, and the most uneven of the labels."""
    details, parts = result.details, list[str]()
    worst = result.metrics.get("worst_group_accuracy")
    if worst is not None:
        group = printable(details["worst_group"]["group"])
        parts.append(f"worst {group} {percent(worst)}")
        parts.append(f"gap {100 * (result.metrics.get('gap') or 0):.1f}")
    differences = details.get("differences") or []
    if differences:
        first = min(differences, key=lambda one: one["p_value"])
        rates = ", ".join(f"{printable(g)} {percent(r)}" for g, r in first["rates"].items())
        parts.append(
            f"label {printable(first['label'])!r} from {percent(first['threshold'])} on: {rates} (p {first['p_value']:.2g})"
        )
    return parts
