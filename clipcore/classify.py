"""Name what is in an image: ``python -m clipcore.classify IMAGE... --labels "a, b, c" --checkpoint RUN``.

For more than one image a summary follows, with the accuracy where their folders are named as labels.

Legend: N images, K best names of each.

Exit status: 0 done, 2 a mistake in the arguments, an unreadable file or too little memory, 70 a fault of clipcore's own.
"""

from __future__ import annotations

import argparse
import collections
import io
import itertools
import json
import os
import signal
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from clipcore.data import BadSample, LeftOut, printable
from clipcore.data.folders import images_below
from clipcore.data.tables import decode_bytes
from clipcore.data.tar import IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from clipcore.data.transforms import MAX_PIXELS, Decoder, ImageTransform, was_transparent
from clipcore.evaluate.loading import load_model
from clipcore.evaluate.zero_shot import build_zero_shot_classifier, classify
from clipcore.files import is_folder, mode_of, not_utf8, read_regular
from clipcore.ranks.distributed import pick_device
from clipcore.ranks.failures import end_with
from clipcore.terminal import Parser, check_whole_numbers, complain

# Decoded images in memory at once.
IMAGES_AT_ONCE = 64
_MAX_LABEL_BYTES, _SHOWN_CHARS = 1 << 20, 80
_SHOWN_NAMES = 10  # of a summary


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog="python -m clipcore.classify", description=__doc__)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="JPEG, PNG or WebP files, or folders of them"
    )
    parser.add_argument(
        "--labels",
        required=True,
        help="names separated by commas, or a file with one name per line",
    )
    parser.add_argument(
        "--templates",
        action="append",
        metavar="TEXT",
        help="prompt with {} for the name; repeat it to average several [a photo of a {}. for --pretrained, else {}]",
    )
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument(
        "--checkpoint", metavar="RUN", help="a run's folder, or one of its checkpoints"
    )
    weights.add_argument(
        "--pretrained",
        metavar="FILE",
        help="weights of OpenAI, open_clip or transformers, or a run",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="architecture of --pretrained [from the shapes of its weights]",
    )
    parser.add_argument("--bpe-path", metavar="FILE", help="vocabulary of --pretrained [OpenAI's]")
    parser.add_argument(
        "--top", type=int, default=5, metavar="K", help="names shown for each image [5]"
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help=f"most pixels of an image; a larger one is refused [{MAX_PIXELS}]",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def read_labels(text: str) -> list[str]:
    """Return the names in a comma-separated text, or in a UTF-8 file with one name per line.

    Raises:
        ValueError: fewer than two names, one of them twice, or a file that is not there or cannot be read.
    """
    path = Path(text)
    if text.strip() and _is_there(path):
        try:
            # utf-8-sig: editors begin some files with a byte-order mark.
            content = _read_labels_file(path)
            if len(content) > _MAX_LABEL_BYTES:
                raise ValueError(
                    f"the file of labels {text} has more than {_MAX_LABEL_BYTES:,} bytes"
                )
            parts = content.decode("utf-8-sig").splitlines()
        except OSError as error:
            raise ValueError(f"cannot read the labels {text}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ValueError(not_utf8(f"the file of labels {text}", error)) from None
    elif "," not in text and (path.suffix or os.sep in text):
        raise ValueError(f'there is no file of labels {text}; names are written as "a cat, a dog"')
    else:
        parts = text.split(",")

    labels = [part.strip() for part in parts if part.strip()]
    if len(labels) < 2:
        found = f"only {labels[0][:_SHOWN_CHARS]!r}" if labels else "no name"
        raise ValueError(
            f'--labels holds {found}, and a picture is compared with at least two; write them as "a cat, a dog"'
        )
    same: dict[str, list[str]] = {}
    for label in labels:
        same.setdefault(_as_compared(label), []).append(label)
    if twice := [names for names in same.values() if len(names) > 1]:
        names = " and ".join(repr(name[:_SHOWN_CHARS]) for name in twice[0][:2])
        raise ValueError(f"--labels holds {names}, one prompt that would share its probability")
    return labels


def _as_compared(label: str) -> str:
    """Return a name in lower case with single spaces: a vocabulary tells nothing else apart."""
    return " ".join(label.lower().split())


def _read_labels_file(path: Path) -> bytes:
    # A shell's <(...) is a pipe that somebody writes to; another may be waited for without end.
    if path.parent in (Path("/dev/fd"), Path("/proc/self/fd")):
        with open(path, "rb") as pipe:
            return pipe.read(_MAX_LABEL_BYTES + 1)
    return read_regular(path, _MAX_LABEL_BYTES + 1)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # such as a text longer than any file's name
        return False


def read_image(path: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the decoded image of a file.

    Raises:
        ValueError: the file cannot be read, is no image, or has more than ``max_pixels``.
    """
    try:
        data = read_regular(path, MAX_IMAGE_BYTES + 1)
        return decode_bytes(data, "", Decoder(max_pixels=max_pixels))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except BadSample as error:
        raise ValueError(f"{path} is no readable image: {error}") from error


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


class _Input(NamedTuple):
    """An image to classify.

    Attributes:
        inner: the image's place below the folder that was given, None where the image itself was.
        own: index of the label that its folder is named as, -1 where none is.
    """

    path: str
    inner: str | None
    own: int


def find_images(
    given: Sequence[str], index_of: Mapping[str, int], left_out: LeftOut
) -> Iterator[_Input]:
    """Yield the images at the given paths, and those below the given folders, in order.

    Args:
        index_of: index of each label, by its name as ``_as_compared`` returns it.
        left_out: counts the files in the folders that are not yielded.
    """
    for path in given:
        where = os.path.abspath(path)
        if not is_folder(Path(path)):
            yield _Input(path, None, _own_label(where, 1, index_of))
            continue
        for inner in images_below(path, left_out):
            # The folder itself may be a class, or one between it and the image.
            num_folders = inner.count(os.sep) + 1
            own = _own_label(os.path.join(where, inner), num_folders, index_of)
            yield _Input(os.path.join(path, inner), inner, own)


def _own_label(path: str, num_folders: int, index_of: Mapping[str, int]) -> int:
    """Return the index of the label that an image's nearest folder is named as, among the innermost; -1 for none."""
    for _ in range(num_folders):
        path = os.path.dirname(path)
        name = _as_compared(os.path.basename(path).replace("_", " "))
        if name in index_of:
            return index_of[name]
    return -1


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError for arguments that cannot work, before a model is loaded."""
    check_whole_numbers(arguments, ("top", "max_pixels"))
    if arguments.top < 1:
        raise ValueError(f"--top is at least 1, got {arguments.top}")
    if arguments.max_pixels < 1:
        raise ValueError(f"--max-pixels is at least 1, got {arguments.max_pixels}")
    for path in arguments.images:
        if mode_of(Path(path)) is None:
            raise ValueError(f"cannot read {path}: there is no such file")
        left_out = LeftOut()
        if is_folder(Path(path)) and next(images_below(path, left_out), None) is None:
            kinds = ", .".join(IMAGE_SUFFIXES)
            raise ValueError(f"the folder {path} holds no image (.{kinds}){left_out.found()}")


class _Readable(NamedTuple):
    """An image that could be read; ``picture`` is what the model takes."""

    path: str
    own: int
    picture: Tensor
    is_transparent: bool


def _read_all(
    images: Iterator[_Input], transform: ImageTransform, max_pixels: int, left_out: LeftOut
) -> Iterator[_Readable]:
    """Yield the readable images, transformed; raise ValueError for an unreadable one that was named.

    Args:
        left_out: counts the images of folders that cannot be read.
    """
    for path, inner, own in images:
        try:
            picture = read_image(path, max_pixels)
            try:
                prepared = transform(picture)
            except BadSample as error:
                raise ValueError(f"{path} is no usable image: {error}") from error
        except ValueError as error:
            if inner is None:
                raise
            left_out.add("image that cannot be read", str(error))
            continue
        yield _Readable(path, own, prepared, was_transparent(picture))


def run_classification(arguments: argparse.Namespace) -> Classified:
    """Return the images of the arguments with their best names.

    An image that was named must be readable; unreadable ones in a folder are counted and left out.

    Raises:
        ValueError, OSError: a mistake in the arguments, or a file that cannot be read.
    """
    labels = read_labels(arguments.labels)
    _check_arguments(arguments)
    arguments.device = pick_device(arguments.device, local_rank=0)
    loaded = load_model(
        arguments.checkpoint,
        arguments.pretrained,
        arguments.model,
        arguments.bpe_path,
        arguments.device,
    )
    model, transform = loaded.model, loaded.transform
    templates = arguments.templates or loaded.templates
    classifier_EC = build_zero_shot_classifier(
        model, loaded.tokenizer, labels, templates, device=arguments.device
    )

    left_out, num_transparent = LeftOut(), 0
    paths: list[str] = []
    own, classes, probabilities = array("q"), list[Tensor](), list[Tensor]()
    index_of = {_as_compared(label): index for index, label in enumerate(labels)}
    images = find_images(arguments.images, index_of, left_out)
    readable = _read_all(images, transform, arguments.max_pixels, left_out)
    while batch := list(itertools.islice(readable, IMAGES_AT_ONCE)):
        pictures = torch.stack([image.picture for image in batch]).to(arguments.device)
        probabilities_BK, classes_BK = classify(model, pictures, classifier_EC, arguments.top)
        if not probabilities_BK.isfinite().all():
            raise ValueError("the model's features are not finite; its weights are not usable")
        paths += [image.path for image in batch]
        own.extend(image.own for image in batch)
        classes.append(classes_BK.cpu())
        probabilities.append(probabilities_BK.cpu())
        num_transparent += sum(image.is_transparent for image in batch)

    if not paths:
        raise ValueError(f"no image of {arguments.images[0]} can be read{left_out.found()}")
    if left_out:
        complain("clipcore.classify", f"note: left out of the folders: {left_out}")
    if num_transparent:
        counts = f"{num_transparent} of {len(paths)} images are transparent"
        complain("clipcore.classify", f"note: {counts}: laid over white")
    return Classified(
        paths, labels, torch.cat(classes), torch.cat(probabilities), torch.tensor(own)
    )


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
    # Written image by image: as one object it would take some kilobytes for each.
    separator = "{\n"
    for path, image in {path: image for image, path in enumerate(classified.paths)}.items():
        row = json.dumps(dict(classified.best(image)), indent=2).replace("\n", "\n  ")
        print(f"{separator}  {json.dumps(path)}: {row}", end="")
        separator = ",\n"
    print("\n}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    # A name of a class or a file may have letters that the terminal's encoding lacks.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parsed = build_parser().parse_args(arguments)
    try:
        classified = run_classification(parsed)
    except KeyboardInterrupt:
        complain("clipcore.classify", "stopped")
        return 128 + signal.SIGINT
    except Exception as error:
        return end_with("clipcore.classify", error, "take a smaller model")
    try:
        if parsed.json:
            print_json(classified)
        else:
            print_table(classified)
            if len(classified.paths) > 1:
                print_summary(classified)
        sys.stdout.flush()
    except OSError as error:
        # Python would try to write the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has enough, such as head
            return 0
        print(f"clipcore.classify: error: standard output: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
