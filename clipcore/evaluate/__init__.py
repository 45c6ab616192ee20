"""Evaluations of a trained model: the paper's, from one command or from Python.

======================  ================================================================
``__main__.py``         the command line; ``runner.py`` goes through models and data sets, ``commands.py`` measures one
``datasets.py``         ``open_set``: labelled data sets in the layouts that people have
``loading.py``          models as a command line names them
``features.py``         ``FeatureStore``: each image encoded once a model
``measure.py``          zero-shot, prompt gains, linear probe, few-shot of one data set
``*_study.py``          retrieval, overlap and bias of one data set; robustness and scaling of many results
``results.py``          one JSON file a result; ``page.py`` draws them all
``tasks.py``            the evaluations inside a training run, on one rank or all of them
======================  ================================================================

The public names are resolved when they are first used, as those of ``clipcore``.
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
