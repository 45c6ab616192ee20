"""Evaluations of a trained model as in the paper, from the command line or from Python.

======================  ================================================================
``__main__.py``         the command, with its flags in ``arguments.py``; ``runner.py`` and ``commands.py`` do its work
``datasets.py``         ``open_set``: labelled data sets in all common layouts
``loading.py``          loads the models that a command line names
``features.py``         ``FeatureStore``: encodes each image once per model
``measure.py``          zero-shot, prompt gains, linear probe and few-shot on one data set
``*_study.py``          retrieval, overlap and bias on one data set; robustness and scaling of many results
``results.py``          one JSON file per result; ``page.py`` draws them all
``tasks.py``            the evaluations inside a training run, on one rank or all of them
======================  ================================================================

The public names are resolved on first use, like those of ``clipcore``.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "FeatureStore": "features",
    "ProbeOptions": "measure",
    "Result": "results",
    "Subject": "measure",
    "compare": "comparison",
    "effective_robustness": "robustness",
    "few_shot_curve": "few_shot",
    "fit_baseline": "robustness",
    "fit_linear_probe": "linear_probe",
    "fit_power_law": "scaling",
    "labels_per_class": "few_shot",
    "leave_out_largest": "scaling",
    "measure_few_shot": "measure",
    "measure_linear_probe": "measure",
    "measure_prompts": "measure",
    "measure_zero_shot": "measure",
    "open_set": "datasets",
    "read_results": "results",
    "retrieval_recall": "retrieval",
    "search_C": "linear_probe",
    "write_page": "page",
    "write_result": "results",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipcore.evaluate' has no attribute {name!r}")
    return getattr(importlib.import_module(f"clipcore.evaluate.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
