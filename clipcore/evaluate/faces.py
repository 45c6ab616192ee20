"""Opens FairFace and UTKFace in datacomp's layout: tar shards of faces with several questions per image.

``DIR/test/{0,1,...}.tar`` hold ``KEY.webp`` (or png, jpg, jpeg) with ``KEY.npy``, four whole numbers: age, gender, race and
race_binary. ``DIR/classnames.txt`` holds a line ``question:answer`` for each answer, and
``DIR/zeroshot_classification_templates.txt`` lines ``question:prompt``. The questions are race, gender, age and toxic. The
number of an age, gender or race is the index of its answer among the answers to its question.

Source: datacomp's evaluation (mlfoundations/datacomp, eval_utils/fairness_eval.py and fairness_tables.py). There
race_binary is 0 for white faces and 1 for all others; race 1 is white; gender 0 is male. The answers to toxic begin with 14
groups of people; 14 to 17 are non-humans, and those from 18 on are crime. The files on the hub were not available. This
reader therefore accepts any integer dtype and a missing question, which may be more than it needs to.

Legend: N images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from clipcore.data import DataError, printable
from clipcore.data.tar import TarImages
from clipcore.data.transforms import Decoder
from clipcore.evaluate.class_names import (
    checked_names,
    is_there,
    read_lines,
    templates_from_lines,
)
from clipcore.evaluate.label_lists import LabelList
from clipcore.evaluate.label_shards import NAMES_FILE, load_numbers
from clipcore.evaluate.splits import (
    EvaluationSet,
    LabelledImages,
    Question,
    Split,
    files_fingerprint,
    keys_of,
    left_out_notes,
    members_hash,
    name_of,
    opened_once,
)
from clipcore.evaluate.wds import TEMPLATES_FILE, find_shards, wds_splits

# The numbers in ``KEY.npy``, in this order.
FIELDS = ("age", "gender", "race", "race_binary")
# The questions whose right answer is known.
KNOWN = ("race", "gender", "age")
LABELS_QUESTION = "toxic"
# Names of race_binary by its number; WHITE is the index of that answer among the races.
WHITE_OR_NOT = ("white", "non-white")
WHITE = 1
# Indices at which the answers to ``LABELS_QUESTION`` for non-humans and for crime begin.
NON_HUMAN, CRIME = 14, 18


def are_faces(path: Path) -> bool:
    """Return whether the class names of a folder of shards are answers to questions; raise DataError."""
    if not is_there(path / NAMES_FILE):
        return False
    lines = [line for line in read_lines(path / NAMES_FILE) if line]
    asked = {line.partition(":")[0] for line in lines}
    # "Alien: Covenant" and "Star Wars: A New Hope" may be classes of another set.
    return all(":" in line for line in lines) and len(asked & set(KNOWN)) > 1


def open_faces(path: Path, decoder: Decoder) -> EvaluationSet:
    """Open a folder of shards of faces. The images have no class, but groups named by the right answers.

    Raises:
        DataError: one of its files is missing, damaged, or does not fit the others.
    """
    splits, questions = wds_splits(path), _questions(path)
    unknown = [name for name in questions if name not in (*KNOWN, LABELS_QUESTION)]
    return EvaluationSet(
        name=name_of(path),
        task="classification",
        classnames=(),
        templates=(),
        split_names=tuple(splits),
        main_metric="acc1",
        open_split=opened_once(lambda split: _open_split(split, splits[split], decoder, questions)),
        notes=tuple(
            f"the question {printable(name)!r} is not asked: no right answer to it is known"
            for name in unknown
        ),
        questions={name: one for name, one in questions.items() if name not in unknown},
    )


def labels_of(question: Question) -> LabelList:
    """Return the answers to ``LABELS_QUESTION`` as a label list, with the categories of non-humans and crime."""
    names = question.classnames
    categories = {"non-human": names[NON_HUMAN:CRIME], "crime": names[CRIME:]}
    return LabelList(names, categories)


def _questions(path: Path) -> dict[str, Question]:
    """Return the questions in the two files of a folder; raise DataError if they do not fit each other."""
    names_file, templates_file = path / NAMES_FILE, path / TEMPLATES_FILE
    lines = [line for line in read_lines(names_file) if line]
    names = _by_question(lines, names_file)
    if not is_there(templates_file):
        raise DataError(
            f"{path} has no {TEMPLATES_FILE}; write a line for each question, such as 'gender:a photo of a {{c}}'"
        )
    templates = _by_question(templates_from_lines(templates_file), templates_file)
    for one, other, file in ((names, templates, templates_file), (templates, names, names_file)):
        if missing := [name for name in one if name not in other]:
            raise DataError(
                f"{file} has no line of the question {printable(missing[0])!r}; write one, such as "
                f"{printable(missing[0])!r}, a colon and the text"
            )

    for name, answers in names.items():
        checked_names([(answer,) for answer in answers], str(names_file))
        twice = [answer for answer, number in Counter(answers).items() if number > 1]
        if twice or len(answers) < 2:
            what = f"the answer {printable(twice[0])!r} twice" if twice else "one answer"
            raise DataError(
                f"{names_file}: the question {printable(name)!r} has {what}; write two different answers or more"
            )
    number = len(names.get(LABELS_QUESTION, ()))
    if 0 < number <= CRIME:
        raise DataError(
            f"{names_file}: the question {LABELS_QUESTION!r} has {number} answers, of which those from {NON_HUMAN} to "
            f"{CRIME - 1}, counted from 0, are not humans and those from {CRIME} on are crime; write all of them"
        )
    return {name: Question(answers, templates[name]) for name, answers in names.items()}


def _by_question(lines: Sequence[str], file: Path) -> dict[str, tuple[str, ...]]:
    """Return the texts of lines by the question before the first colon; raise DataError for a line without one."""
    found = dict[str, list[str]]()
    for line in lines:
        question, colon, text = line.partition(":")
        if not colon or not question.strip() or not text.strip():
            raise DataError(
                f"{file}: the line {printable(line[:80])!r} has no question before a colon; write 'question:text'"
            )
        found.setdefault(question.strip(), []).append(text.strip())
    return {question: tuple(texts) for question, texts in found.items()}


def _open_split(
    split: str, folder: Path, decoder: Decoder, questions: Mapping[str, Question]
) -> Split:
    """Open a split of faces; raise DataError."""
    shards, notes = find_shards(folder)
    indices, number_N4 = load_numbers(shards, len(FIELDS))
    images = TarImages(indices, decoder, folder.name)
    if not len(images):
        raise DataError(
            f"{folder} holds no image with {', '.join(FIELDS)} in a member of the same name that ends in .npy"
            f"{images.left_out.found()}"
        )
    source = LabelledImages(images, np.arange(len(images)), None, ())
    groups = {
        field: _named(field, number_N4[:, place], questions, source)
        for place, field in enumerate(FIELDS)
    }
    return Split(
        name=split,
        source=source,
        labels_N=None,
        fingerprint=lambda: files_fingerprint(
            shards, folder, "faces", members_hash(images.shards), decoder
        ),
        keys=lambda: keys_of(source),
        groups=groups,
        notes=(*notes, *left_out_notes(split, images), *_race_notes(split, groups, questions)),
    )


def _race_notes(
    split: str, groups: Mapping[str, Sequence[str]], questions: Mapping[str, Question]
) -> list[str]:
    """Return notes on why a split's ``acc_race`` may differ from datacomp's: its definition of white people."""
    if "race" not in questions:
        return []
    white = questions["race"].classnames[WHITE]
    if white.casefold() != "white":
        return [
            f"{split}: the race of number {WHITE} is {printable(white)!r}, and acc_race takes it for white; look at "
            f"{NAMES_FILE}"
        ]
    pairs = zip(groups["race"], groups["race_binary"], strict=True)
    wrong = sum((race == white) != (binary == WHITE_OR_NOT[0]) for race, binary in pairs)
    if not wrong:
        return []
    return [f"{split}: race_binary contradicts the race of {wrong} of {len(groups['race'])} images"]


def _named(
    field: str, number_N: np.ndarray, questions: Mapping[str, Question], source: LabelledImages
) -> list[str]:
    """Return the name of each image's number in a field; raise DataError for a number without a name."""
    if field in questions:
        names = questions[field].classnames
    elif field == "race_binary":
        names = WHITE_OR_NOT
    else:
        return list(map(str, number_N.tolist()))
    wrong = np.flatnonzero((number_N < 0) | (number_N >= len(names)))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{source.key(row)}: its {field} is {number_N[row]}, and there are {len(names)}, 0 to {len(names) - 1}; write "
            f"all of them into {NAMES_FILE}, or correct the number"
        )
    return [names[number] for number in number_N.tolist()]
