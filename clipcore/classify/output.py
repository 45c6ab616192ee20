"""Prints the best names of images, and writes them to files.

Legend: N images, K best names of each.
"""

from __future__ import annotations

import collections
import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from clipcore.files import is_folder, written_aside
from clipcore.terminal import printable

# Endings of the files that are written.
SUFFIXES = (".csv", ".json")
_SHOWN_NAMES = 10  # of a summary


class Classified(NamedTuple):
    """Images with their best names.

    Attributes:
        paths: of the N images, as they were named, or below the folders that were.
        labels: all names that were compared.
        classes_NK: indices into ``labels``, the most probable first, int64 on the CPU.
        probabilities_NK: of these.
        own_N: index of the label that an image's folder is named as, -1 where none is.
    """

    paths: list[str]
    labels: list[str]
    classes_NK: Tensor
    probabilities_NK: Tensor
    own_N: Tensor

    def best(self, image: int) -> list[tuple[str, float]]:
        """Return the best names of an image with their probabilities."""
        classes, probabilities = self.classes_NK[image], self.probabilities_NK[image]
        pairs = zip(classes.tolist(), probabilities.tolist(), strict=True)
        return [(self.labels[c], p) for c, p in pairs]


def print_table(classified: Classified) -> None:
    """Print a block per image: names with their probabilities as figures and bars."""
    shown = classified.classes_NK.unique().tolist()
    width = max(len(printable(classified.labels[c])) for c in shown)
    for image, path in enumerate(classified.paths):
        print(printable(path))
        for name, probability in classified.best(image):
            bar = "#" * round(30 * probability)
            print(f"  {printable(name):<{width}}  {probability:6.1%}  {bar}")


def print_summary(classified: Classified) -> None:
    """Print how many images each name is the best of, and the top-1 accuracy of those whose folder is a label."""
    num_images, labels = len(classified.paths), classified.labels
    first_N, own_N = classified.classes_NK[:, 0], classified.own_N
    # Among equal counts the label that was given first.
    counts = sorted(
        collections.Counter(first_N.tolist()).items(), key=lambda pair: (-pair[1], pair[0])
    )
    shown, others = counts[:_SHOWN_NAMES], counts[_SHOWN_NAMES:]
    width = max(len(printable(labels[c])) for c, _ in shown)
    digits = len(f"{num_images:,}")

    print(f"\n{num_images:,} images by their best name:")
    for c, count in shown:
        print(f"  {printable(labels[c]):<{width}}  {count:>{digits},}  {count / num_images:6.1%}")
    if others:
        number = sum(count for _, count in others)
        noun = "name" if len(others) == 1 else "names"
        print(f"  and {len(others):,} other {noun}: {number:,}  {number / num_images:.1%}")

    num_own = int((own_N >= 0).sum())
    if num_own:
        num_right = int((first_N == own_N).sum())
        print(
            f"top-1 accuracy {num_right / num_own:.1%}: {num_right:,} of the {num_own:,} images whose folder is named as "
            "a label"
        )


def print_json(classified: Classified) -> None:
    """Print one JSON object: for each path an object of its best names and their probabilities."""
    for piece in _json(classified):
        print(piece, end="")


def _json(classified: Classified) -> Iterator[str]:
    """Yield the pieces of one JSON object, image by image: as one object it would take some kilobytes for each."""
    separator = "{\n"
    for path, image in {path: image for image, path in enumerate(classified.paths)}.items():
        row = json.dumps(dict(classified.best(image)), indent=2).replace("\n", "\n  ")
        yield f"{separator}  {json.dumps(path)}: {row}"
        separator = ",\n"
    yield "\n}\n"


def _csv(classified: Classified) -> Iterator[str]:
    """Yield the lines of a csv table, with a row for each name of each image."""
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")
    writer.writerow(("image", "rank", "label", "probability"))
    for image, path in enumerate(classified.paths):
        for rank, (label, probability) in enumerate(classified.best(image), 1):
            writer.writerow((path, rank, label, probability))
        yield line.getvalue()
        line.seek(0)
        line.truncate()


def check_files(paths: Sequence[Path]) -> None:
    """Raise ValueError for a file that ``write_file`` cannot write, before the work is done."""
    for path in paths:
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"--out writes {' or '.join(SUFFIXES)}, not {path}")
        if not is_folder(path.parent):
            raise ValueError(f"--out {path}: there is no folder {path.parent}; create it first")
        if is_folder(path):
            raise ValueError(f"--out {path} is a folder; name a file")


def write_file(classified: Classified, path: Path) -> None:
    """Write the best names as csv or JSON, by the ending of the name; an earlier file is replaced when all is written.

    Raises:
        OSError: the file cannot be written.
    """
    pieces = _csv(classified) if path.suffix.lower() == ".csv" else _json(classified)
    with written_aside(path) as file:
        for piece in pieces:
            # A name of a file may be no UTF-8.
            file.write(piece.encode("utf-8", "surrogateescape"))
