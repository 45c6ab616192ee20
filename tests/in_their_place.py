"""clipcore in the place of open_clip and of OpenAI's clip, for code that imports those.

Names of their modules lead to clipcore's public ones, and a name that clipcore lacks is missing. As a plugin of pytest it
runs the other side's own test files, which open_clip's source distribution holds:

    pip download --no-deps --no-binary open_clip_torch open_clip_torch==3.3.0
    tar xf open_clip_torch-3.3.0.tar.gz
    PYTHONPATH=tests:. pytest -p in_their_place -c /dev/null open_clip_torch-3.3.0/tests
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

import clipcore
import clipcore.train
from clipcore.data.loader import PairLoader
from clipcore.data.sources import expand_pattern, open_source
from clipcore.data.transforms import ImageTransform
from clipcore.run.command_line import parse_command_line
from clipcore.tokenizer import byte_tokenizer

# Submodules whose names are also clipcore's public ones.
SUBMODULES = ("factory", "loss", "model", "tokenizer", "transform")


@contextlib.contextmanager
def clipcore_in_their_place() -> Iterator[None]:
    """Let ``import open_clip``, ``open_clip_train`` and ``clip`` find clipcore, and nothing of theirs."""
    theirs = ("open_clip", "open_clip_train", "clip")
    hidden = [name for name in sys.modules if name.partition(".")[0] in theirs]
    with mock.patch.dict(sys.modules):
        for name in hidden:
            del sys.modules[name]
        sys.modules.update(modules())
        yield


def pytest_configure(config: Any) -> None:
    """Put clipcore in their place for a whole run of pytest, which has this file as a plugin."""
    sys.modules.update(modules())


def modules() -> dict[str, ModuleType]:
    """Return the modules, by name, that stand for theirs."""
    made = {"open_clip": public("open_clip"), "clip": public("clip")}
    for name in SUBMODULES:
        made[f"open_clip.{name}"] = public(f"open_clip.{name}")
        setattr(made["open_clip"], name, made[f"open_clip.{name}"])
    training: dict[str, dict[str, Callable[..., Any]]] = {
        "main": {"main": main, "random_seed": random_seed},
        "params": {"parse_args": parse_args},
        "data": {"get_dataset_size": get_dataset_size, "get_wds_dataset": get_wds_dataset},
    }
    made["open_clip_train"] = ModuleType("open_clip_train")
    for name, functions in training.items():
        module = ModuleType(f"open_clip_train.{name}")
        vars(module).update(functions)
        made[module.__name__] = module
    return made


def public(name: str) -> ModuleType:
    """Return a module of clipcore's public names."""
    module = ModuleType(name)
    # clipcore looks for the file of OpenAI's vocabulary in an installed package, which it does not import.
    if "." not in name:
        module.__spec__ = importlib.util.find_spec(name)
    module.__getattr__ = lambda attribute: getattr(clipcore, attribute)  # type: ignore[method-assign]
    return module


# --- open_clip_train, whose functions clipcore has in other places ---


def main(arguments: Sequence[str]) -> None:
    """Make a run; raise where it does not end well."""
    if (status := clipcore.train.main(arguments)) != 0:
        raise RuntimeError(f"clipcore.train ended with status {status}")


def random_seed(seed: int, rank: int = 0) -> None:
    """Seed the generators of this process."""
    random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the settings of a command line, which may be changed."""
    return argparse.Namespace(**vars(parse_command_line(arguments)[0]))


def get_dataset_size(shards: str | Sequence[str]) -> tuple[None, int]:
    """Return the number of shards of a pattern; that of their samples is known once they are opened."""
    patterns = shards.split("::") if isinstance(shards, str) else shards
    return None, sum(len(expand_pattern(pattern)) for pattern in patterns)


def get_wds_dataset(
    args: Any, preprocess_img: Any, is_train: bool, tokenizer: Callable[[str], list[Any]]
) -> Any:
    """Return the training batches of clipcore's loader, with its own transform and what ``tokenizer`` makes of captions."""
    assert is_train and args.workers is not None
    source = open_source(args.train_data, upsampling_factors=args.train_data_upsampling_factors)
    transform = ImageTransform(32, is_train=True)
    loader = PairLoader(source, transform, byte_tokenizer(), args.batch_size, args.seed)

    def batches() -> Iterator[tuple[torch.Tensor, list[Any]]]:
        num_batches = args.train_num_samples // args.batch_size
        for batch in itertools.islice(loader.batches(), num_batches):
            captions = [str(source.captions(index)) for index in batch.indices.tolist()]
            yield batch.images, [tokenizer(caption)[0] for caption in captions]

    return SimpleNamespace(dataloader=batches())
