"""Runs evaluations of each model on each data set; loads each model once, and encodes each image once.

A data set or model that cannot be evaluated is named, and the others continue. Results are written one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from clipcore.data import DataError, LeftOut, printable
from clipcore.evaluate.bias_study import column_names
from clipcore.evaluate.commands import measure, measures_due
from clipcore.evaluate.comparison import compare
from clipcore.evaluate.datasets import EvaluationSet, open_set
from clipcore.evaluate.features import FeatureStore
from clipcore.evaluate.label_lists import read_label_list
from clipcore.evaluate.lines import line_of
from clipcore.evaluate.loading import LoadedModel, load_model
from clipcore.evaluate.measure import Subject, Unsuitable
from clipcore.evaluate.overlap_study import adjust
from clipcore.evaluate.replaced import changes
from clipcore.evaluate.results import (
    OVERLAP,
    Result,
    find_result,
    read_results,
    write_lines,
    write_result,
)
from clipcore.evaluate.robustness_study import FIT, robustness_study
from clipcore.evaluate.same_weights import (
    Identity,
    identity_of,
    name_of_weights,
    of_newest_weights,
    one_name_each,
)
from clipcore.evaluate.scaling_study import scaling_study
from clipcore.evaluate.scores import BadResultError
from clipcore.evaluate.studies import print_study, write_study
from clipcore.evaluate.suites import locate, suite
from clipcore.ranks.distributed import pick_device
from clipcore.run.threads import most_threads, set_faster_for_products
from clipcore.terminal import check_whole_numbers, complain

_PROGRAM = "clipcore.evaluate"


def run_measures(arguments: argparse.Namespace) -> int:
    """Evaluate each model on each data set as the command requests; return the exit status.

    Raises:
        ValueError: the arguments do not fit.
    """
    _check(arguments)
    arguments.device = pick_device(arguments.device, local_rank=0)
    output = Path(arguments.output)
    known = _known_models(output)
    _set_threads(arguments)
    sets, num_failed = _open_sets(arguments)
    models = [("checkpoint", path) for path in arguments.checkpoint]
    models += [("pretrained", path) for path in arguments.pretrained]
    results = list[Result]()

    for kind, path in models or [("none", "")]:
        try:
            subject = _subject(arguments, kind, os.path.normpath(path), known)
        except (ValueError, OSError) as error:
            num_failed += 1
            complain(_PROGRAM, f"error: {error}")
            continue
        if not arguments.json and models:
            print(f"{subject.name}, {printable(subject.pretrained)}", flush=True)
        for dataset in sets:
            found, number = _evaluate(subject, dataset, arguments)
            results += found
            known |= set(map(identity_of, found))
            num_failed += number
        # Freed before the next one is loaded.
        del subject

    if results:
        results, number = _write_summaries(arguments, output, results)
        num_failed += number
    if arguments.json:
        print(json.dumps([result.to_dict() for result in results], indent=2))
    elif results:
        print(f"results are in {arguments.output}")
    return 2 if num_failed else 0


def _known_models(output: Path) -> set[Identity]:
    """Return the models that have results in a folder; raise DataError for a damaged file, which would prevent the page."""
    return set(map(identity_of, read_results(output))) if any(output.glob("*.json")) else set()


def _set_threads(arguments: argparse.Namespace) -> None:
    """Set the requested number of threads, else one or all, whichever is faster now."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
        return
    most = most_threads(1, arguments.workers)
    is_given = "OMP_NUM_THREADS" in os.environ
    if not is_given and most > 1 and torch.device(arguments.device).type == "cpu":
        set_faster_for_products(most)


def _evaluate(
    subject: Subject, dataset: EvaluationSet, arguments: argparse.Namespace
) -> tuple[list[Result], int]:
    """Run and write the measurements on a data set; return the results, and how many failed."""
    try:
        names = measures_due(arguments, dataset)
    except (ValueError, OSError) as error:
        complain(_PROGRAM, f"error: {dataset.name}: {error}")
        return [], 1

    found, num_failed, printed_notes = list[Result](), 0, set(dataset.notes)
    if subject.training is not None and subject.training[1].num_read:
        # They were printed with an earlier data set.
        printed_notes.update(subject.training[1].notes())
    for name in names:
        try:
            result = measure(name, subject, dataset, arguments)
            _print_replaced(Path(arguments.output), result)
            write_result(Path(arguments.output), result)
        except (ValueError, OSError) as error:
            # With the command ``all``, a measurement that does not suit a data set is not a mistake.
            is_skipped = arguments.command == "all" and isinstance(error, Unsuitable)
            num_failed += not is_skipped
            message = error if str(error).startswith(dataset.name) else f"{dataset.name}: {error}"
            complain(_PROGRAM, f"{'note' if is_skipped else 'error'}: {message}")
            continue
        found.append(result)
        if not arguments.json:
            print(line_of(result), flush=True)
        _print_notes(dataset.name, result.details["notes"], printed_notes)
    return found, num_failed


def _print_notes(name: str, notes: Sequence[str], printed: set[str]) -> None:
    """Print notes on a data set or on its measurements that were not printed yet."""
    for note in notes:
        if note not in printed:
            complain(_PROGRAM, f"note: {name}: {note}")
            printed.add(note)


def _print_replaced(output: Path, result: Result) -> None:
    """Print a note that a result replaces another one, and what differs."""
    before = find_result(output, result)
    changed = [] if before is None else changes(before, result)
    if changed:
        complain(
            _PROGRAM,
            f"note: {result.dataset}: this replaces the {result.task} result of other {' and '.join(changed)}; "
            "give another --output to keep both",
        )


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for arguments that do not fit, before a model is loaded."""
    check_whole_numbers(arguments, ("batch_size", "workers", "max_pixels"))
    if arguments.batch_size < 1 or arguments.workers < 0 or arguments.max_pixels < 1:
        raise ValueError("--batch-size and --max-pixels are at least 1, and --workers at least 0")
    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"--threads is at least 1, got {arguments.threads}")
    if not 0 <= arguments.max_bad_fraction <= 1:
        raise ValueError(
            f"--max-bad-fraction is a share from 0 to 1, got {arguments.max_bad_fraction}"
        )
    for option in ("output", "features"):
        path = getattr(arguments, option)
        if path and Path(path).exists() and not Path(path).is_dir():
            raise ValueError(f"--{option} names a folder, and {path} is not one")
    if not arguments.data and not arguments.suite:
        raise ValueError("name a data set with --data, or a suite with --suite and --root")
    if bool(arguments.suite) != bool(arguments.root):
        raise ValueError(
            "--suite and --root belong together: which data sets, and the folder that holds them"
        )
    if arguments.model and len(arguments.pretrained) != 1:
        raise ValueError("--model names the architecture of one --pretrained file")
    if arguments.bpe_path and not arguments.pretrained:
        raise ValueError("--bpe-path is the vocabulary of --pretrained; a run has its own")
    for template in getattr(arguments, "templates", ()):
        if "{}" not in template and "{c}" not in template:
            raise ValueError(f"--templates {template!r} has no {{}} where the class name goes")
    if hasattr(arguments, "C"):
        _check_probe(arguments)
    if hasattr(arguments, "categories"):
        arguments.label_list = read_label_list(
            arguments.labels, arguments.categories, arguments.add_class
        )


def _check_probe(arguments: argparse.Namespace) -> None:
    if arguments.C is not None and not 0 < arguments.C < float("inf"):
        raise ValueError(f"--C is a positive number, got {arguments.C}")
    if not 0 < arguments.val_fraction < 1:
        raise ValueError(f"--val-fraction is a share between 0 and 1, got {arguments.val_fraction}")
    if hasattr(arguments, "shots"):
        arguments.shots = _parse_shots(arguments.shots)
        check_whole_numbers(arguments, ("seeds",))
        if arguments.seeds < 1:
            raise ValueError(f"--seeds is at least 1, got {arguments.seeds}")


def _parse_shots(text: str | None) -> tuple[int, ...] | None:
    """Return the numbers of ``--shots``, ascending."""
    if text is None:
        return None
    try:
        shots = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        shots = ()
    if not shots or shots[0] < 1:
        raise ValueError(
            f"--shots are whole numbers from 1 with commas, such as 1,2,4; got {text!r}"
        )
    return shots


def _open_sets(arguments: argparse.Namespace) -> tuple[list[EvaluationSet], int]:
    """Return the data sets that exist, and the number of missing ones."""
    named = list(arguments.data)
    missing = list[str]()
    if arguments.suite:
        for name in suite(arguments.suite):
            found = locate(Path(arguments.root), name)
            if found is None:
                missing.append(name)
            else:
                named.append(str(found))
    if missing:
        complain(
            _PROGRAM, f"note: {len(missing)} sets are not in {arguments.root}: {', '.join(missing)}"
        )

    given = getattr(arguments, "groups", None)
    groups = [] if given is None else column_names(given)
    sets, num_failed = list[EvaluationSet](), len(missing) if arguments.strict else 0
    for spec in named:
        try:
            dataset = open_set(
                spec,
                max_pixels=arguments.max_pixels,
                img_key=arguments.img_key,
                label_key=arguments.label_key,
                group_columns=groups,
            )
        except (ValueError, OSError) as error:
            num_failed += 1
            complain(_PROGRAM, f"error: {error}")
            continue
        _print_notes(dataset.name, dataset.notes, set())
        sets.append(dataset)
    twice = [name for name, number in Counter(one.name for one in sets).items() if number > 1]
    if twice:
        raise DataError(
            f"two data sets are called {printable(twice[0])}, and would share a result: rename the folder of one"
        )
    if not sets and not num_failed:
        raise DataError(f"none of the data sets of {arguments.suite} is in {arguments.root}")
    return sets, num_failed


def _subject(
    arguments: argparse.Namespace, kind: str, path: str, known: Iterable[Identity]
) -> Subject:
    """Load a model; files of features need none.

    Args:
        known: the models with results; a model that has results only under another name keeps that name.
    """
    if kind == "none":
        return Subject(None, None)
    with warnings.catch_warnings(record=True) as caught:
        try:
            loaded = _loaded(arguments, kind, path)
        finally:
            for warning in caught:
                complain(_PROGRAM, f"note: {warning.message}")
    store = FeatureStore(
        loaded.model,
        loaded.transform,
        Path(arguments.features or Path(arguments.output) / "features"),
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        half=arguments.half_cache,
        max_bad_fraction=arguments.max_bad_fraction,
    )
    subject = Subject(loaded, store)
    asked = Identity(loaded.name, loaded.pretrained, subject.weights_hash)
    name = name_of_weights(known, asked)
    if name != loaded.pretrained:
        complain(
            _PROGRAM,
            f"note: {path} has the weights of {printable(name)}: its results are under that name",
        )
        subject.loaded = loaded._replace(pretrained=name)
    return subject


def _loaded(arguments: argparse.Namespace, kind: str, path: str) -> LoadedModel:
    """Load a run or weights."""
    if kind == "checkpoint":
        return load_model(checkpoint=path, device=arguments.device)
    return load_model(
        pretrained=path,
        name=arguments.model,
        bpe_path=arguments.bpe_path,
        device=arguments.device,
    )


def _write_summaries(
    arguments: argparse.Namespace, output: Path, results: list[Result]
) -> tuple[list[Result], int]:
    """Write the summaries of all results in a folder; return this command's adjusted results, and how many failed.

    Tests of overlap are adjusted for the number of data sets, including those of earlier commands.
    """
    there = read_results(output)
    adjusted = {result.file_name: result for result in adjust(there) if result.task == OVERLAP}
    for result in there:
        if result.task == OVERLAP and result != adjusted[result.file_name]:
            write_result(output, adjusted[result.file_name])
    _print_earlier(there)
    merged, _ = one_name_each(there, LeftOut())
    write_lines(output, merged)
    num_failed = 0
    if arguments.command == "all":
        num_failed = _draw(output, is_quiet=arguments.json)
    return [adjusted.get(result.file_name, result) for result in results], num_failed


def _print_earlier(there: Sequence[Result]) -> None:
    """Print which results the page and the studies leave out, because their models have newer weights."""
    left_out = LeftOut()
    of_newest_weights(there, left_out)
    if left_out:
        complain(
            _PROGRAM,
            f"note: the page and the studies leave out {left_out}; evaluate these sets again, or remove the files",
        )


def _draw(output: Path, is_quiet: bool) -> int:
    """Write the studies that a folder has the results for, and the page; return how many results are unusable.

    Args:
        is_quiet: whether to print nothing of the studies.
    """
    studies = (
        lambda: robustness_study(output, FIT),
        lambda: robustness_study(output),
        lambda: scaling_study(output),
        lambda: compare(output),
    )
    made, errors = set[str](), set[str]()
    for study in studies:
        try:
            found = study()
        except BadResultError as error:
            if str(error) not in errors:
                complain(_PROGRAM, f"error: {error}")
            errors.add(str(error))
            continue
        except DataError:
            # Too few models, or no matching sets: the study's own command reports what is missing.
            continue
        if found["study"] in made:
            continue
        made.add(found["study"])
        write_study(output, found)
        if not is_quiet:
            print(f"\n{print_study(found)}")
    # Matplotlib is imported only when needed; Ctrl-C during its import would end in a traceback.
    from clipcore.evaluate.page import write_page

    page = write_page(output)
    if not is_quiet:
        print(f"\nthe page is {printable(str(page))}")
    return len(errors)
