"""clipcore: a custom-kernel accelerated core for training CLIP with very large batches on few GPUs.

The public names are resolved on first use, so importing clipcore costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from clipcore import moved

__version__ = "0.1.0"

_HOMES = {
    "CLIP": "clipcore.towers.model",
    "ClipLoss": "clipcore.loss",
    "DistillClipLoss": "clipcore.loss",
    "IMAGENET_CLASSNAMES": "clipcore.towers.published",
    "OPENAI_DATASET_MEAN": "clipcore.data.transforms",
    "OPENAI_DATASET_STD": "clipcore.data.transforms",
    "OPENAI_IMAGENET_TEMPLATES": "clipcore.towers.published",
    "PackedText": "clipcore.data.packing",
    "SIMPLE_IMAGENET_TEMPLATES": "clipcore.towers.published",
    "SigLipLoss": "clipcore.loss",
    "SimpleTokenizer": "clipcore.tokenizer",
    "add_model_config": "clipcore.towers.architectures",
    "available_models": "clipcore.towers.architectures",
    "build_zero_shot_classifier": "clipcore.evaluate.zero_shot",
    "create_model": "clipcore.towers.factory",
    "create_model_and_transforms": "clipcore.towers.factory",
    "create_model_from_pretrained": "clipcore.towers.factory",
    "decode": "clipcore.tokenizer",
    "differentiate": "clipcore.run.grad_cache",
    "get_cast_dtype": "clipcore.towers.factory",
    "get_input_dtype": "clipcore.towers.factory",
    "get_model_config": "clipcore.towers.factory",
    "get_model_preprocess_cfg": "clipcore.towers.factory",
    "get_model_tokenize_cfg": "clipcore.towers.factory",
    "get_tokenizer": "clipcore.tokenizer",
    "image_transform": "clipcore.data.transforms",
    "list_models": "clipcore.towers.architectures",
    "list_openai_models": "clipcore.towers.architectures",
    "list_pretrained": "clipcore.towers.published",
    "load": "clipcore.towers.openai",
    "load_checkpoint": "clipcore.towers.loading",
    "load_run": "clipcore.run.state",
    "normalized_similarity": "clipcore.kernels.similarity",
    "pack_captions": "clipcore.data.packing",
    "read_metrics": "clipcore.run.metrics",
    "similarity_topk": "clipcore.kernels.similarity_topk",
    "tokenize": "clipcore.tokenizer",
    "write_features": "clipcore.features.write",
}
__all__ = ["__version__", *_HOMES]


moved.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipcore' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
