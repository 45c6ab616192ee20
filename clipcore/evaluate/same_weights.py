"""Finds models that results name twice: the same weights by a relative and an absolute path, or as a copy.

A name does not identify weights: a run continues under its name, and its path can be written in several ways. So each
result holds a hash of its model, and names with only one and the same hash are names of one model. Older results, and those
of other programs, hold no hash: their names are used as they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from clipcore.data import LeftOut
from clipcore.evaluate.features import settings_of
from clipcore.evaluate.loading import LoadedModel
from clipcore.evaluate.results import Result, set_key

HASH_KEY = "weights_sha256"


class Identity(NamedTuple):
    """A result's model; ``weights`` is its hash, empty if the result holds none."""

    model: str
    pretrained: str
    weights: str


def identity_of(result: Result) -> Identity:
    """Return the identity of a result's model."""
    value = result.details.get(HASH_KEY)
    is_hash = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return Identity(result.model, result.pretrained, str(value) if is_hash else "")


def hash_of_model(loaded: LoadedModel, tower_hash: str) -> str:
    """Return a hash of everything that a model's answers depend on: weights, shape, preprocessing and vocabulary.

    Args:
        tower_hash: hash of the image tower, from ``hash_of_tower``, which is most of the work and often known.
    """
    digest = hashlib.sha256(tower_hash.encode())
    parts = {
        "config": loaded.model.config.to_dict(),
        "transform": settings_of(loaded.transform),
        "vocabulary": loaded.tokenizer.sha256,
    }
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(loaded.model.state_dict().items()):
        if name.startswith("visual."):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def name_of_weights(known: Iterable[Identity], asked: Identity) -> str:
    """Return the name under which a model's results are written: its existing name, else the requested one.

    A name that has results of other weights too is still kept, so that new results replace the old ones.

    Args:
        known: identities in the existing results.
        asked: the model, under the user's name.
    """
    known = list(known)
    names = _names_by_hash(known).get((asked.model, asked.weights))
    is_of_others = any(one[:2] == asked[:2] and one != asked for one in known)
    return names[0] if names and not is_of_others else asked.pretrained


def of_newest_weights(results: Sequence[Result], left_out: LeftOut) -> list[Result]:
    """Return results without those of a name's earlier weights; count these.

    A run that is evaluated, trained further and evaluated again has results of both states under one name. The newest
    file's weights are the name's; results without a hash stay.
    """
    newest: dict[tuple[str, str], Result] = {}
    for one in results:
        name = (one.model, one.pretrained)
        if not identity_of(one).weights:
            continue
        if name not in newest or one.written_ns > newest[name].written_ns:
            newest[name] = one

    found = list[Result]()
    for one in results:
        weights = identity_of(one).weights
        if weights and weights != identity_of(newest[one.model, one.pretrained]).weights:
            left_out.add("result of a model's earlier weights", one.file_name)
        else:
            found.append(one)
    return found


def one_name_each(
    results: Sequence[Result], left_out: LeftOut
) -> tuple[list[Result], dict[tuple[str, str], str]]:
    """Return results with one name per model, its shortest, and that name by model and other name.

    Only the newest weights of a name count. If two names of one model have results of one data set and task, the newest
    file's stay; the others are counted.
    """
    results = of_newest_weights(results, left_out)
    renamed = {
        (model, name): names[0]
        for (model, _), names in _names_by_hash(map(identity_of, results)).items()
        for name in names[1:]
    }
    if not renamed:
        return results, {}

    pairs = [
        (
            one,
            dataclasses.replace(
                one, pretrained=renamed.get((one.model, one.pretrained), one.pretrained)
            ),
        )
        for one in results
    ]

    def order(pair: tuple[Result, Result]) -> tuple[int, bool]:
        # For equal times, the shortest name's result is last, and stays.
        return pair[0].written_ns, pair[0].pretrained == pair[1].pretrained

    name_kept = {_place(after): before.pretrained for before, after in sorted(pairs, key=order)}
    found = list[Result]()
    for before, after in pairs:
        if name_kept[_place(after)] == before.pretrained:
            found.append(after)
        else:
            left_out.add("older result of a model under another name", before.file_name)
    return found, renamed


def _place(result: Result) -> tuple[str, ...]:
    """Return a key that is unique per result in a folder, whatever the spelling of the data set."""
    dataset = set_key(result.dataset)
    return dataset, result.model, result.pretrained, result.language, result.task


def _names_by_hash(known: Iterable[Identity]) -> dict[tuple[str, str], list[str]]:
    """Return the names of each model by its architecture and hash, the shortest first.

    A name with several hashes, or with results without one, is left out: its weights have changed, or are unknown.
    """
    hashes: dict[tuple[str, str], set[str]] = {}
    for model, name, weights in known:
        hashes.setdefault((model, name), set()).add(weights)
    found: dict[tuple[str, str], list[str]] = {}
    for (model, name), values in hashes.items():
        if len(values) == 1 and "" not in values:
            found.setdefault((model, min(values)), []).append(name)
    return {key: sorted(names, key=lambda name: (len(name), name)) for key, names in found.items()}
