"""The command ``python -m clipcore.export``; ``arguments.py`` has its flags and its exit status."""

from __future__ import annotations

from clipcore.export.arguments import PROGRAM, build_parser
from clipcore.terminal import answer_early, complain, steady_output

if __name__ == "__main__":
    answer_early(build_parser().parse_args)

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

from clipcore.evaluate.loading import load_model
from clipcore.export.write import export_model
from clipcore.ranks.failures import end_with


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Have SIGTERM unwind, as Ctrl-C does, so that no temporary folder stays."""

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@steady_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parsed = build_parser().parse_args(arguments)
    try:
        loaded = load_model(None, parsed.source, parsed.model, parsed.bpe_path)
        with _stopped_by_sigterm():
            export_model(loaded.model, loaded.tokenizer, parsed.to, parsed.out, print)
    except KeyboardInterrupt:
        is_there = parsed.out.exists() and any(parsed.out.iterdir())
        complain(PROGRAM, f"stopped; {parsed.out} is {'whole' if is_there else 'not made'}")
        return 128 + signal.SIGINT
    except Exception as error:
        return end_with(PROGRAM, error, "export it on a larger machine")
    print(f"{parsed.out}: {loaded.name} for {parsed.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
