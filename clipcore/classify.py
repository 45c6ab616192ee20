"""Name what is in a picture: ``python -m clipcore.classify IMAGE... --labels "a, b, c" --checkpoint RUN``.

Exit status: 0 done, 2 a mistake in the arguments, an unreadable file or too little memory, 70 a fault of clipcore's own.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from clipcore.data import BadSample, printable
from clipcore.data.tables import decode_bytes
from clipcore.data.tar import MAX_IMAGE_BYTES
from clipcore.data.transforms import MAX_PIXELS, Decoder, was_transparent
from clipcore.distributed import pick_device
from clipcore.evaluate.zero_shot import build_zero_shot_classifier, classify
from clipcore.failures import end_with
from clipcore.files import mode_of, not_utf8, read_regular
from clipcore.loading import load_model
from clipcore.terminal import Parser, check_whole_numbers, complain

# So many decoded pictures are in memory at once.
IMAGES_AT_ONCE = 64
_MAX_LABEL_BYTES, _SHOWN_CHARS = 1 << 20, 80


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m clipcore.classify", description=__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG, PNG or WebP files")
    parser.add_argument(
        "--labels", required=True, help="names separated by commas, or a file of one name a line"
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
        "--model", metavar="NAME", help="architecture of --pretrained [read off its shapes]"
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
        help=f"pixels of a picture, of which more are not read [{MAX_PIXELS}]",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def read_labels(text: str) -> list[str]:
    """Return the names in a comma-separated text, or in a file of one name a line, UTF-8.

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
    # A vocabulary knows neither capitals nor runs of spaces.
    same: dict[str, list[str]] = {}
    for label in labels:
        same.setdefault(" ".join(label.lower().split()), []).append(label)
    if twice := [names for names in same.values() if len(names) > 1]:
        names = " and ".join(repr(name[:_SHOWN_CHARS]) for name in twice[0][:2])
        raise ValueError(f"--labels holds {names}, one prompt that would share its probability")
    return labels


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
    """Return the decoded picture of a file, of at most so many pixels."""
    try:
        data = read_regular(path, MAX_IMAGE_BYTES + 1)
        return decode_bytes(data, "", Decoder(max_pixels=max_pixels))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except BadSample as error:
        raise ValueError(f"{path} is no readable image: {error}") from error


def run_classification(arguments: argparse.Namespace) -> list[list[tuple[str, float]]]:
    """Return for each image its best names with their probabilities, the most probable first.

    Raises:
        ValueError, OSError: a mistake in the arguments, or a file that cannot be read.
    """
    labels = read_labels(arguments.labels)
    check_whole_numbers(arguments, ("top", "max_pixels"))
    if arguments.top < 1:
        raise ValueError(f"--top is at least 1, got {arguments.top}")
    if arguments.max_pixels < 1:
        raise ValueError(f"--max-pixels is at least 1, got {arguments.max_pixels}")
    for path in arguments.images:
        # Before a model is loaded.
        if mode_of(Path(path)) is None:
            raise ValueError(f"cannot read {path}: there is no such file")
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

    rows: list[list[tuple[str, float]]] = []
    num_transparent = 0
    for start in range(0, len(arguments.images), IMAGES_AT_ONCE):
        pictures = []
        for path in arguments.images[start : start + IMAGES_AT_ONCE]:
            picture = read_image(path, arguments.max_pixels)
            num_transparent += was_transparent(picture)
            try:
                pictures.append(transform(picture))
            except BadSample as error:
                raise ValueError(f"{path} is no usable image: {error}") from error
        images = torch.stack(pictures).to(arguments.device)
        probabilities, classes = classify(model, images, classifier_EC, arguments.top)
        if not probabilities.isfinite().all():
            raise ValueError("the model's features are not finite; its weights are not usable")
        rows += [
            [(labels[c], p) for c, p in zip(best, row, strict=True)]
            for best, row in zip(classes.tolist(), probabilities.tolist(), strict=True)
        ]
    if num_transparent:
        print(
            f"clipcore.classify: note: {num_transparent} of {len(rows)} images are transparent: laid over white",
            file=sys.stderr,
        )
    return rows


def print_table(paths: Sequence[str], rows: list[list[tuple[str, float]]]) -> None:
    """One block an image: names with their probabilities as figures and bars."""
    width = max(len(name) for row in rows for name, _ in row)
    for path, row in zip(paths, rows, strict=True):
        print(printable(path))
        for name, probability in row:
            print(
                f"  {printable(name):<{width}}  {probability:6.1%}  {'#' * round(30 * probability)}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    # A name of a class or a file may have letters that the terminal's encoding lacks.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parsed = build_parser().parse_args(arguments)
    try:
        rows = run_classification(parsed)
    except KeyboardInterrupt:
        complain("clipcore.classify", "stopped")
        return 128 + signal.SIGINT
    except Exception as error:
        return end_with("clipcore.classify", error, "take a smaller model")
    try:
        if parsed.json:
            print(json.dumps(dict(zip(parsed.images, map(dict, rows), strict=True)), indent=2))
        else:
            print_table(parsed.images, rows)
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
