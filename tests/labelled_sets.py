"""Small labelled data sets on disk for tests, in the layouts that people have."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from shards import picture, write_images, write_tar

from clipcore.data import DataError
from clipcore.evaluate.datasets import EvaluationSet, Split, open_set
from clipcore.evaluate.label_lists import PAPER_LABELS

# The questions that datacomp asks of faces, and the answers to them.
FACE_ANSWERS = {
    "race": ("black", "white", "indian"),
    "gender": ("male", "female"),
    "age": ("0 to 2", "3 to 9", "10 to 19", "more than 19"),
    "toxic": PAPER_LABELS,
}
FACE_NAMES = "".join(
    f"{name}:{answer}\n" for name, those in FACE_ANSWERS.items() for answer in those
)
FACE_PROMPTS = "".join(
    f"{name}:a photo of a {{c}}, {name}: known.\n{name}:{{c}}\n" for name in FACE_ANSWERS
)


def put(path: Path, content: bytes | str | None = None) -> Path:
    """Write a file; without content, a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = picture(0)[0] if content is None else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_classes(folder: Path, **numbers: int) -> Path:
    """So many pictures in each class folder."""
    for name, number in numbers.items():
        for index in range(number):
            put(folder / name / f"{index}.jpg", picture(index)[0])
    return folder


def npy(values: object, dtype: str = "uint8") -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, dtype))
    return buffer.getvalue()


def write_wds(folder: Path, *labels: object, suffix: str = "cls", split: str = "test") -> Path:
    """One shard of a picture for each label, as CLIP_benchmark writes it, with names for ten classes."""
    members = []
    for index, label in enumerate(labels):
        content = label if isinstance(label, bytes) else str(label).encode()
        members += [(f"s{index:07d}.jpg", picture(index)[0]), (f"s{index:07d}.{suffix}", content)]
    (folder / split).mkdir(parents=True)
    write_tar(folder / split / "0.tar", members)
    (folder / split / "nshards.txt").write_text("1\n")
    put(folder / "classnames.txt", "".join(f"name {number}\n" for number in range(10)))
    put(folder / "zeroshot_classification_templates.txt", "a photo of {c}.\n{c}\n")
    return folder


def write_faces(folder: Path, *numbers: object, dtype: str = "int64") -> Path:
    """Faces as datacomp holds FairFace: age, gender, race and race_binary of each."""
    write_wds(folder, *(npy(row, dtype) for row in numbers), suffix="npy")
    put(folder / "classnames.txt", FACE_NAMES)
    put(folder / "zeroshot_classification_templates.txt", FACE_PROMPTS)
    # As the exporter writes it, though no sample has a class.
    put(folder / "dataset_type.txt", "classification\n")
    return folder


def labels_of(data: EvaluationSet, split: str = "test") -> list[int]:
    labels_N = data.split(split).labels_N
    assert labels_N is not None and labels_N.dtype == np.int64
    return labels_N.tolist()


def captions_of(split: Split) -> list[object]:
    assert split.source is not None
    return [split.source[index].caption for index in range(len(split))]


def refuse(spec: Path, message: str, split: str = "test", **options: str) -> None:
    """Check that the error is one line, at once or when the split is opened."""
    with pytest.raises(DataError, match=message) as found:
        open_set(str(spec), **options).split(split)
    assert "\n" not in str(found.value)


def write_table(folder: Path, rows: list[dict[str, object]], kind: str) -> Path:
    """Write a table of these rows; rows without an image get one."""
    images = write_images(folder, len(rows))
    rows = [{"image": image, **row} for (image, _), row in zip(images, rows, strict=True)]
    path = folder / f"labels.{kind}"
    if kind == "jsonl":
        put(path, "".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        for row in rows:
            row["image"] = {"bytes": (folder / str(row["image"])).read_bytes(), "path": None}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    else:
        sign = {"tsv": "\t", "csv": ","}.get(kind, ";")
        path = path.with_suffix(".csv")
        lines = [list(rows[0]), *(list(row.values()) for row in rows)]
        put(path, "".join(sign.join(map(str, line)) + "\n" for line in lines))
    return path


def write_features(path: Path, labels: object, **options: object) -> Path:
    """Four rows of three features with these labels."""
    features = np.arange(12, dtype=np.float32).reshape(4, 3)
    arrays = {"features": features, "labels": np.array(labels), **options}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path
