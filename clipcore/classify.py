"""Name what is in a picture: ``python -m clipcore.classify IMAGE... --labels "a, b, c" --checkpoint RUN``.

Exit status: 0 done, 2 a mistake in the arguments or an unreadable file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from clipcore import native
from clipcore.data import BadSample
from clipcore.data.transforms import ImageTransform, decode_image
from clipcore.evaluate.zero_shot import build_zero_shot_classifier, classify
from clipcore.model import CLIP, create_model_from_pretrained
from clipcore.run_state import load_run
from clipcore.tokenizer import Tokenizer, get_tokenizer


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m clipcore.classify", description=__doc__)
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
    weights.add_argument("--pretrained", metavar="FILE", help="a state dict of OpenAI or open_clip")
    parser.add_argument(
        "--model", metavar="NAME", help="architecture of --pretrained [read off its shapes]"
    )
    parser.add_argument("--bpe-path", metavar="FILE", help="vocabulary of --pretrained [OpenAI's]")
    parser.add_argument(
        "--top", type=int, default=5, metavar="K", help="names shown for each image [5]"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def read_labels(text: str) -> list[str]:
    """Names from a comma-separated text or from a file of one name a line."""
    path = Path(text)
    is_file = "," not in text and path.is_file()
    parts = path.read_text().splitlines() if is_file else text.split(",")
    labels = [part.strip() for part in parts if part.strip()]
    if not labels:
        raise ValueError('--labels holds no name; write them as "a cat, a dog"')
    return labels


def load_model(
    arguments: argparse.Namespace,
) -> tuple[CLIP, ImageTransform, Tokenizer, tuple[str, ...]]:
    """The model in evaluation mode, its preprocessing, its tokenizer, and the prompts that suit it."""
    if arguments.checkpoint:
        model, transform, tokenizer = load_run(Path(arguments.checkpoint), arguments.device)
        return model, transform, tokenizer, ("{}",)
    model, transform = create_model_from_pretrained(
        arguments.model, pretrained=arguments.pretrained, device=arguments.device
    )
    tokenizer = get_tokenizer(context_length=model.context_length, bpe_path=arguments.bpe_path)
    if tokenizer.vocab_size != model.vocab_size:
        raise ValueError(
            f"the model has {model.vocab_size} tokens, but the vocabulary {tokenizer.vocab_size}: give the one it was "
            "trained with as --bpe-path"
        )
    return model, transform, tokenizer, ("a photo of a {}.",)


def read_image(path: str) -> Image.Image:
    """The decoded picture of a file."""
    try:
        return decode_image(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except BadSample as error:
        raise ValueError(f"{path} is no readable image: {error}") from error


def print_table(paths: Sequence[str], rows: list[list[tuple[str, float]]]) -> None:
    """One block an image: names with their probabilities as figures and bars."""
    width = max(len(name) for row in rows for name, _ in row)
    for path, row in zip(paths, rows, strict=True):
        print(path)
        for name, probability in row:
            print(f"  {name:<{width}}  {probability:6.1%}  {'#' * round(30 * probability)}")


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = build_parser().parse_args(arguments)
    try:
        labels = read_labels(parsed.labels)
        pictures = [read_image(path) for path in parsed.images]
        model, transform, tokenizer, default_templates = load_model(parsed)
        classifier_EC = build_zero_shot_classifier(
            model, tokenizer, labels, parsed.templates or default_templates, device=parsed.device
        )
        images = torch.stack([transform(picture) for picture in pictures]).to(parsed.device)
        probabilities, classes = classify(model, images, classifier_EC, parsed.top)
    except (ValueError, OSError, native.WrongBuildError) as error:
        print(f"clipcore.classify: error: {error}", file=sys.stderr)
        return 2
    rows = [
        [(labels[c], p) for c, p in zip(best, row, strict=True)]
        for best, row in zip(classes.tolist(), probabilities.tolist(), strict=True)
    ]
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
