"""The models of the page of results: those with results, those that only occur in studies, and their titles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from clipcore.data import printable
from clipcore.evaluate.page_values import objects, shown
from clipcore.evaluate.svg import shortened

_MAX_TITLE_CHARS = 40


class Model(NamedTuple):
    """A model: its architecture, its weights as the user named them, and a short unique title.

    ``other_names`` are further names of the same weights.
    """

    architecture: str
    pretrained: str
    title: str
    other_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class PageModels:
    """All models of a page.

    Attributes:
        evaluated: the models with results, in the order of their colours.
        of_studies: the models that occur only in studies; their colours follow.
    """

    evaluated: list[Model]
    of_studies: list[Model]

    @property
    def all(self) -> list[Model]:
        """Both kinds, in the order of their colours."""
        return self.evaluated + self.of_studies

    def place_of(self, row: Mapping[str, Any]) -> int | None:
        """Return the index of a study row's model; None for a model that is not on the page."""
        pair = _pair_of(row)
        for index, model in enumerate(self.all):
            if pair[0] == model.architecture and pair[1] in (model.pretrained, *model.other_names):
                return index
        return None

    def retitled(self, text: str) -> str:
        """Return a study's text about a model, such as "ViT-B-32 logs/a, zero-shot", with its name replaced by its title."""
        titles = {
            printable(f"{model.architecture} {name}".strip()): model.title
            for model in self.all
            for name in (model.pretrained, *model.other_names)
        }
        for name in sorted(titles, key=len, reverse=True):
            if text == name or text.startswith(f"{name},"):
                return titles[name] + text[len(name) :]
        return text


def page_models(
    pairs: Sequence[tuple[str, str]],
    renamed: Mapping[tuple[str, str], str],
    studies: Mapping[str, Mapping[str, Any]],
) -> PageModels:
    """Return the models of a page.

    Args:
        pairs: architecture and weights of the models with results.
        renamed: maps each further name, also architecture and weights, to one of ``pairs``.
        studies: the objects in the files of studies.
    """
    evaluated = [(shown(architecture), shown(pretrained)) for architecture, pretrained in pairs]
    others: dict[tuple[str, str], list[str]] = {}
    for (architecture, name), pretrained in renamed.items():
        others.setdefault((shown(architecture), shown(pretrained)), []).append(shown(name))
    known = {*evaluated, *((pair[0], name) for pair, names in others.items() for name in names)}
    of_studies = [pair for pair in dict.fromkeys(_pairs_of_studies(studies)) if pair not in known]

    every = evaluated + of_studies
    models = [
        Model(*pair, title, tuple(others.get(pair, ())))
        for pair, title in zip(every, _titles(every), strict=True)
    ]
    return PageModels(models[: len(evaluated)], models[len(evaluated) :])


def _pairs_of_studies(studies: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    """Yield architecture and weights of the models of studies, except the models of a baseline."""
    for pair in objects(studies.get("robustness", {}).get("pairs")):
        for row in objects(pair.get("models")):
            if row.get("kind") != "baseline":
                yield _pair_of(row)
    for row in objects(studies.get("scaling", {}).get("models")):
        yield _pair_of(row)


def _pair_of(row: Mapping[str, Any]) -> tuple[str, str]:
    return shown(row.get("model")), shown(row.get("pretrained"))


def _titles(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return a title for each model: its weights, preceded by its architecture unless all share it."""
    one_architecture = len(pairs) > 1 and len({architecture for architecture, _ in pairs}) == 1
    short = _without_shared_folders({pretrained for _, pretrained in pairs})
    titles: dict[str, None] = {}
    for architecture, pretrained in pairs:
        name = short[pretrained]
        whole = name if one_architecture else f"{architecture} {name}".strip()
        title = unique = shortened(whole, _MAX_TITLE_CHARS)
        number = 1
        while unique in titles:
            number += 1
            unique = f"{title} #{number}"
        titles[unique] = None
    return list(titles)


def _without_shared_folders(names: Iterable[str]) -> dict[str, str]:
    """Return names of weights without the leading folders that all paths share; for one path, its last two parts.

    A run's folder "checkpoints" is dropped, because it carries no information.

    >>> _without_shared_folders(["/runs/a/step_1", "/runs/a/step_2", "openai"])
    {'/runs/a/step_1': 'step_1', '/runs/a/step_2': 'step_2', 'openai': 'openai'}
    """
    parts = {name: _parts_of(name) for name in names}
    paths = [path for path in parts.values() if len(path) > 1]
    num_shared = len(paths[0]) - 2 if len(paths) == 1 else 0
    if len(paths) > 1:
        # At least the last part of the shortest path is kept.
        shortest = min(map(len, paths))
        is_shared = (len(set(folders)) == 1 for folders in zip(*paths, strict=False))
        num_shared = min(sum(takewhile(bool, is_shared)), shortest - 1)
    return {
        name: "/".join(path[num_shared:] if len(path) > 1 else path) for name, path in parts.items()
    }


def _parts_of(name: str) -> list[str]:
    """Return the parts of a path, without the folder between a run and its step."""
    parts = name.rstrip("/").split("/")
    if len(parts) > 2 and parts[-2] == "checkpoints":
        del parts[-2]
    return parts
