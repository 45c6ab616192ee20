"""The command ``python -m clipcore.features``; ``arguments.py`` has its flags and its exit status."""

from __future__ import annotations

from clipcore.features.arguments import PROGRAM, build_parser
from clipcore.terminal import answer_early, complain, printable, steady_output

if __name__ == "__main__":
    answer_early(build_parser().parse_args)

import argparse
import signal
import sys
from collections.abc import Sequence

import numpy as np

from clipcore.evaluate.loading import load_model
from clipcore.features.write import write_features
from clipcore.ranks.distributed import pick_device
from clipcore.ranks.failures import end_with
from clipcore.terminal import check_whole_numbers


def run(arguments: argparse.Namespace) -> np.ndarray:
    """Do what a command line asks for; return the rows of features as a memory map [N, E]."""
    check_whole_numbers(arguments, ("batch_size", "workers", "max_pixels"))
    device = pick_device(arguments.device, local_rank=0)
    loaded = load_model(
        arguments.checkpoint, arguments.pretrained, arguments.model, arguments.bpe_path, device
    )
    return write_features(
        loaded.model,
        loaded.transform,
        arguments.data,
        arguments.out,
        captions_by=loaded.tokenizer if arguments.text else None,
        normalize=arguments.normalize,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        max_bad_fraction=arguments.max_bad_fraction,
        max_pixels=arguments.max_pixels,
        quiet=arguments.quiet,
        note=lambda line: complain(PROGRAM, f"note: {line}"),
        img_key=arguments.csv_img_key,
        caption_key=arguments.csv_caption_key,
        separator=arguments.csv_separator,
    )


@steady_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parsed = build_parser().parse_args(arguments)
    try:
        rows_NE = run(parsed)
    except KeyboardInterrupt:
        complain(PROGRAM, "stopped; the same command goes on with what is done")
        return 128 + signal.SIGINT
    except Exception as error:
        return end_with(PROGRAM, error, "use a smaller --batch-size")
    number, width = rows_NE.shape
    print(f"{printable(str(parsed.out))}: {number:,} rows of {width} {rows_NE.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
