"""The command ``python -m clipcore.interpolate``; ``interpolate_arguments.py`` has its flags and its exit status."""

from __future__ import annotations

from clipcore.interpolate_arguments import PROGRAM, build_parser
from clipcore.terminal import answer_early, complain, steady_output

if __name__ == "__main__":
    answer_early(build_parser().parse_args)

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from clipcore.evaluate.loading import LoadedModel, load_model
from clipcore.export.write import export_model
from clipcore.ranks.failures import end_with
from clipcore.run.folders import is_run
from clipcore.tokenizer import other_vocabulary_beside
from clipcore.towers.interpolation import interpolated
from clipcore.towers.layouts import open_clip_preprocessing
from clipcore.towers.loading import load_checkpoint
from clipcore.towers.model import CLIP


def load_start(path: str, end: LoadedModel) -> CLIP:
    """Return a model of END's architecture with the weights at ``path``.

    Raises:
        ValueError: they are of another model, or were trained with another vocabulary or preprocessing.
    """
    if is_run(Path(path)):
        loaded = load_model(path)
        start, is_other = loaded.model, loaded.tokenizer.sha256 != end.tokenizer.sha256
    else:
        start = CLIP(end.model.config)
        load_checkpoint(start, path)
        is_other = other_vocabulary_beside(path, start.config.text, end.tokenizer) is not None
    if is_other:
        raise ValueError(
            f"{path} and {end.pretrained} were trained with different vocabularies, so that their weights have no mean; "
            "take the model that the second was fine-tuned from"
        )
    first, last = open_clip_preprocessing(start), open_clip_preprocessing(end.model)
    for name in first:
        if first[name] == last[name]:
            continue
        if name in start.images:
            raise ValueError(
                f"{path} and {end.pretrained} have different preprocessing: {name} is {first[name]} and {last[name]}; "
                "take the model that the second was fine-tuned from"
            )
        complain(
            PROGRAM,
            f"note: {path} does not say its {name}; that of {end.pretrained} is {last[name]}, not the usual {first[name]}",
        )
    return start


@steady_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parsed = build_parser().parse_args(arguments)
    try:
        end = load_model(None, parsed.end, parsed.model, parsed.bpe_path)
        model = interpolated(load_start(parsed.start, end), end.model, parsed.alpha)
        export_model(model, end.tokenizer, "open_clip", parsed.out, print)
    except KeyboardInterrupt:
        complain(PROGRAM, f"stopped; {parsed.out} is not made")
        return 128 + signal.SIGINT
    except Exception as error:
        return end_with(PROGRAM, error, "interpolate on a larger machine")
    print(
        f"{parsed.out}: {end.name}, {parsed.alpha:g} of the way from {parsed.start} to {parsed.end}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
