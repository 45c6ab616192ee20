"""Small files that would take a reader gigabytes or minutes: each is refused by name, or read at a small cost."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import pickle
import resource
import struct
import traceback
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import bombs
import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from attack.harness import Attack, limit_memory
from attack.images import encoded, noise
from attack.tars import header_of, padded
from clipcore.checkpoint import CheckpointError, load_latest
from clipcore.classify.labels import read_labels
from clipcore.data import BadSample, DataError, tar
from clipcore.data.raw import encode_raw
from clipcore.data.sources import open_source
from clipcore.data.tar import sidecar_paths
from clipcore.data.transforms import DECODERS, Decoder, decode_image
from clipcore.evaluate.tasks import class_folders
from clipcore.ranks.distributed import World
from clipcore.run.config import ConfigError, TrainConfig
from clipcore.run.folders import (
    CONFIG_FILE,
    LAUNCH_FILE,
    find_run,
    resumed_config,
)
from clipcore.run.memory import watch
from clipcore.run.metrics import METRICS_FILE, read_metrics
from clipcore.tokenizer import Tokenizer, VocabularyError
from clipcore.tokenizer import main as tokenizer_main
from clipcore.towers.convert import ConversionError
from clipcore.towers.factory import create_model_from_pretrained

# What a case may take: seconds of the processor, and bytes beside what is in use, some of which any process needs.
MOST_SECONDS = 1.0
MOST_BYTES = (256 + 32) << 20
# An honest picture of as many pixels as are decoded, of the most costly kind, takes more: docs/log.md.
_OF_LARGEST = "of the largest size"
_LARGEST_SECONDS, _LARGEST_BYTES = 2.0, 340 << 20
# Beyond these a case is ended: bytes of address space, of which the first judges with `--fast`, and seconds.
_FAST_BYTES, _GUARD_BYTES, _GUARD_SECONDS = 512 << 20, 3 << 30, 30
_MAKING_SECONDS = 600

REFUSALS = (
    BadSample,
    CheckpointError,
    ConfigError,
    ConversionError,
    DataError,
    VocabularyError,
)

_MIB = 1 << 20
# Of a file without content: more bytes than may be held, which takes no room on the disk.
_SPARSE_BYTES = 320 * _MIB
# How a case is made in a folder, and how what was made is read.
_Make = Callable[[Path], Path]
_Use = Callable[[Path], object]

# ---------------------------------------------------------------------------------------------------------------------
# Readers
# ---------------------------------------------------------------------------------------------------------------------


def read_pairs(path: Path) -> None:
    """Open pairs, and read the first of them; raise for one that cannot be read."""
    source = open_source(str(path))
    for index in range(min(len(source), 4)):
        source[index]


def read_some_pairs(path: Path) -> None:
    """Open pairs, and read some of them, whether they can be read or not."""
    source = open_source(str(path))
    for index in range(min(len(source), 64)):
        try:
            source[index]
        except BadSample:
            continue


def make_model(path: Path) -> None:
    """Make a model of weights, which say what it is."""
    create_model_from_pretrained(None, path)


def resume(path: Path) -> None:
    """Read the settings of a run that is resumed."""
    world = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    resumed_config(path, TrainConfig(), frozenset(), world)


def find_launch(path: Path) -> None:
    """Look for the run that a launch has begun."""
    find_run(TrainConfig(logs=str(path), resume="latest"), "a launch", lambda _: None)


def read_label_names(path: Path) -> None:
    """Read the labels of a classification."""
    try:
        read_labels(str(path))
    except ValueError as error:
        # What this function says of a mistake is a plain ValueError.
        if type(error) is not ValueError:
            raise
        raise DataError(str(error)) from error


def run(
    command: Callable[[list[str]], int], arguments: Callable[[Path], list[str]], path: Path
) -> None:
    """Call a command, which has to end with 0, or with 2 as for a mistake of its user."""
    status = command(arguments(path))
    assert status in (0, 2), f"the exit status is {status}"


def _trained(path: Path) -> list[str]:
    return ["--train", str(path), "--vocab-size", "600", "--output", str(path.with_name("v.gz"))]


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def written(name: str, content: bytes | Callable[[], bytes], folder: Path) -> Path:
    """Write a file, and its folders; return its path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content())
    return path


def sparse(name: str, start: bytes, folder: Path) -> Path:
    """Write a file that is a start and hundreds of megabytes of zeros; return its path."""
    path = written(name, start, folder)
    os.truncate(path, _SPARSE_BYTES)
    return path


def inside(make: _Make, folder: Path) -> Path:
    """Make a file, and return the folder in place of it."""
    make(folder)
    return folder


def _pictures_of_classes(folder: Path) -> None:
    for name in ("cat", "dog"):
        written(f"{name}/0.png", encoded(noise("RGB"), "PNG"), folder)


def classes(name: str, content: bytes, folder: Path) -> Path:
    """Make class folders with a JSON file; return the folder."""
    _pictures_of_classes(folder)
    written(name, content, folder)
    return folder


def described(name: str, content: bytes, folder: Path) -> Path:
    """Make a folder of weights with a file that describes them; return it."""
    torch.save({"logit_scale": torch.zeros(())}, folder / "open_clip_pytorch_model.bin")
    written(name, content, folder)
    return folder


def manifest(name: str, folder: Path) -> Path:
    """Make a checkpoint one of whose files has hundreds of megabytes; return the folder of checkpoints."""
    sparse(f"step_00000001/{name}", b"{", folder)
    return folder


def captioned(name: str, content: bytes, is_sparse: bool, folder: Path) -> Path:
    """Make a folder of a picture and its caption, one of which is written; return it."""
    written("0.png", encoded(noise("RGB"), "PNG"), folder)
    written("0.txt", b"a caption", folder)
    (sparse if is_sparse else written)(name, content, folder)
    return folder


def large_png(folder: Path) -> Path:
    """Make a folder of a PNG with a chunk of hundreds of megabytes; return it."""
    data = encoded(noise("RGB"), "PNG")
    chunk = struct.pack(">I", _SPARSE_BYTES * 3 // 4) + b"tEXt"
    captioned("0.png", data[:33] + chunk, False, folder)
    os.truncate(folder / "0.png", _SPARSE_BYTES * 3 // 4)
    return folder


# --- Vocabularies ---


def zipped_lines(line: bytes, num_bytes: int) -> bytes:
    """Return a compressed vocabulary of equal lines."""
    return gzip.compress(b"#version: 0.2\n" + line * (num_bytes // len(line)), 1)


def zipped_members(num_bytes: int) -> bytes:
    """Return a compressed vocabulary of many small parts."""
    return gzip.compress(b"#version: 0.2\n") + gzip.compress(b"") * (num_bytes // 20)


def doubling_merges() -> bytes:
    """Return a vocabulary each of whose symbols is twice as long as the one before."""
    symbols = ["a" * 2**power for power in range(20)]
    return "\n".join(["#version", *(f"{symbol} {symbol}" for symbol in symbols)]).encode()


# --- Weights ---


def zip_of(tree: bytes, method: int = zipfile.ZIP_DEFLATED) -> Callable[[Path], Path]:
    """Return what writes a file of weights that torch would read with this tree of objects."""

    def make(folder: Path) -> Path:
        path = folder / "weights.pt"
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in {
                "data.pkl": tree,
                "version": b"3\n",
                "byteorder": b"little",
            }.items():
                archive.writestr(f"weights/{name}", content)
        return path

    return make


def deflated_weights(folder: Path) -> Path:
    """Write zeros as torch does, with their records compressed."""
    plain, path = folder / "plain.pt", folder / "weights.pt"
    torch.save({"logit_scale": torch.zeros(100 << 20)}, plain)
    with (
        zipfile.ZipFile(plain) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    plain.unlink()
    return path


def expanded_weights(folder: Path) -> Path:
    """Write a tensor of one element in a great many places."""
    torch.save({"logit_scale": torch.zeros(1).expand(1 << 40)}, folder / "weights.pt")
    return folder / "weights.pt"


def legacy_weights(folder: Path) -> Path:
    """Write weights in torch's old format, whose storage claims to be larger than the file."""
    path = folder / "weights.pt"
    torch.save({"logit_scale": torch.zeros(77)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    claimed = content.replace(b"K\x4d", b"J" + struct.pack("<i", 1 << 30))
    assert claimed != content
    path.write_bytes(claimed)
    return path


def many_records(folder: Path) -> Path:
    """Write a zip file of weights with a great many records."""
    path = folder / "weights.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(60_000):
            archive.writestr(f"weights/data/{number}", b"")
    return path


def safetensors(header: bytes, claimed: int | None = None, data: bytes = b"") -> bytes:
    """Return a file of weights with a header, and the size that it claims."""
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header + data


def _of_tensors(number: int) -> bytes:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(f'"{n}":{entry}' for n in range(number)) + "}").encode()


_ARRAY = pickle.GLOBAL + b"builtins\nbytearray\n"


def _filled(num_bytes: int) -> bytes:
    """Return a pickle that makes an array of so many bytes."""
    return b"\x80\x02" + _ARRAY + b"J" + struct.pack("<i", num_bytes) + b"\x85R."


PICKLES: dict[str, bytes] = {
    "an array of 2 GB": _filled((1 << 31) - 1),
    "millions of lists": b"\x80\x02(" + b"]" * (4 << 20) + b"l.",
    "millions of dicts": b"\x80\x02(" + b"}" * (4 << 20) + b"t.",
    "depth": b"\x80\x02" + b"]" * 400_000 + b"a" * 399_999 + b".",
    "a place of the memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a text that claims 2 GB": b"\x80\x02X\xff\xff\xff\x7fa.",
    "a number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f\0.",
    "a frame of 4 EB": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
}

# --- JSON ---

# As many bytes as a reader of descriptions may take in.
JSONS: dict[str, bytes] = {
    "millions of lists": b"[" + b"[]," * ((16 * _MIB - 8) // 3) + b"[]]",
    "millions of objects": b'{"a": [' + b"{}," * ((16 * _MIB - 16) // 3) + b"{}]}",
    "depth": b"[" * 200_000,
    "depth of objects": b'{"a":' * 200_000,
    "digits": b'{"cat": ' + b"1" * (4 * _MIB) + b"}",
    "a fraction of digits": b'{"cat": 1.' + b"1" * (4 * _MIB) + b"}",
    "one long name": b'{"' + b"a" * (8 * _MIB) + b'": "b"}',
}

# --- Tables ---


def _table(path: Path, images: Any, captions: Any, **settings: Any) -> Path:
    table = pyarrow.table({"image": images, "caption": captions})
    pyarrow.parquet.write_table(table, path, compression="zstd", **settings)
    return path


def _repeated(value: Any, number: int) -> Any:
    return pyarrow.DictionaryArray.from_arrays(np.zeros(number, np.int32), pyarrow.array([value]))


def null_rows(folder: Path) -> Path:
    """Write a table of millions of rows that hold nothing."""
    number = 10_000_000
    images, captions = (
        pyarrow.nulls(number, pyarrow.binary()),
        pyarrow.nulls(number, pyarrow.string()),
    )
    return _table(folder / "a.parquet", images, captions)


def equal_rows(folder: Path) -> Path:
    """Write a table of millions of equal rows."""
    return _table(folder / "a.parquet", _repeated(b"x", 3_000_000), _repeated("x", 3_000_000))


def repeated_picture(folder: Path) -> Path:
    """Write a table of one picture a thousand times, which together have gigabytes."""
    picture = bytes(4 * _MIB)
    return _table(folder / "a.parquet", _repeated(picture, 1000), _repeated("x", 1000))


def large_cell(folder: Path) -> Path:
    """Write a table whose one picture has hundreds of megabytes of zeros."""
    return _table(folder / "a.parquet", pyarrow.array([bytes(_SPARSE_BYTES)]), ["a caption"])


def large_captions(folder: Path) -> Path:
    """Write a table whose one row has millions of captions."""
    return _table(folder / "a.parquet", pyarrow.array([b"x"]), [["a"] * 3_000_000])


def wide_table(folder: Path) -> Path:
    """Write a table of thousands of columns."""
    table = pyarrow.table({f"c{number}": [1] for number in range(4000)})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    return folder / "a.parquet"


def many_groups(folder: Path) -> Path:
    """Write a table of thousands of groups of a row."""
    return _table(folder / "a.parquet", [b"x"] * 3000, ["x"] * 3000, row_group_size=1)


def small_parquet(folder: Path) -> Path:
    """Write a table whose copy of rows is a file of hundreds of megabytes."""
    path = _table(folder / "a.parquet", [encoded(noise("RGB"), "PNG")], ["x"])
    sparse(sidecar_paths(str(path))[0].with_suffix(".clipcore-rows").name, b"", folder)
    return path


# --- Shards ---


def shard(*members: tuple[str, bytes], claims: int | None = None) -> bytes:
    """Return a shard of these members, the last of which claims a size."""
    content = b""
    for number, (name, data) in enumerate(members, 1):
        size = claims if claims is not None and number == len(members) else len(data)
        content += header_of(name, size) + padded(data)
    return content + bytes(1024)


def raw_header(text: str) -> bytes:
    """Return a raw picture with this header."""
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text) & 0xFFFF) + text.encode() + bytes(3)


_CAPTION = ("a.txt", b"a caption")
_RAW = encode_raw(np.zeros((8, 8, 3), np.uint8))
RAW_HEADERS: dict[str, str] = {
    "terabytes": "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000, 3), }",
    "negative": "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -1, 3), }",
    "digits": "{'descr': '|u1', 'fortran_order': False, 'shape': (" + "9" * 900 + ", 1, 3), }",
    "depth": "(" * 900,
    "a product": "{'descr': '|u1', 'shape': " + "9**" * 200 + "9}",
    "fields": "{'descr': [" + "('a', '|u1')," * 60 + "], 'fortran_order': False, 'shape': (1,)}",
    "a long header": " " * 60_000,
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 3), }",
}


def sparse_member(name: str, folder: Path) -> Path:
    """Make a shard whose first member has hundreds of megabytes of zeros."""
    path, size = folder / "a.tar", _SPARSE_BYTES
    path.write_bytes(header_of(name, size))
    os.truncate(path, 512 + size)
    other = ("a.txt", b"a caption") if name != "a.txt" else ("a.png", encoded(noise("RGB"), "PNG"))
    with path.open("ab") as file:
        file.write(shard(other))
    return path


def hostile_index(number: int, folder: Path) -> Path:
    """Make a shard with an index that claims a great many samples, of a size that fits, or is none."""
    path = written("a.tar", shard(("a.png", encoded(noise("RGB"), "PNG")), _CAPTION), folder)
    stat = path.stat()
    head = tar._SIDECAR.pack(tar._MAGIC, stat.st_size, stat.st_mtime_ns, number, 0, 0, 0)
    place = sidecar_paths(str(path))[0]
    place.write_bytes(head + struct.pack("<I", zlib.crc32(head)))
    if number < 2:
        os.truncate(place, _SPARSE_BYTES)
    return path


def deep_index(folder: Path) -> Path:
    """Make a shard with an index that fits, and counts what is left out in JSON of great depth."""
    path = written("a.tar", shard(("a.png", encoded(noise("RGB"), "PNG")), _CAPTION), folder)
    stat, left_out = path.stat(), b"[" * 500_000
    sizes = (0, 0, len(left_out), 0)
    body = tar._SIDECAR.pack(tar._MAGIC, stat.st_size, stat.st_mtime_ns, *sizes) + left_out
    sidecar_paths(str(path))[0].write_bytes(body + struct.pack("<I", zlib.crc32(body)))
    return path


def many_members(folder: Path) -> Path:
    """Make a shard of a great many members without content."""
    blocks = (header_of(f"{number}.txt", 0) for number in range(8000))
    return written("a.tar", b"".join(blocks) + bytes(1024), folder)


# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------


def _decode(decoder: str, path: Path) -> None:
    decode_image(path.read_bytes(), Decoder(decoder))


def picture_cases() -> dict[str, tuple[_Make, _Use]]:
    """Return pictures that promise many pixels, or take a decoder seconds, and the largest that are read."""
    found: dict[str, tuple[_Make, _Use]] = {}
    for decoder in DECODERS:
        use = partial(_decode, decoder)
        for (kind, make), size in itertools.product(bombs.HEADERS.items(), bombs.SIZES):
            content = partial(make, *size)
            found[f"picture, {decoder}, {kind} of {size}"] = (partial(written, "0", content), use)
        for kind, whole in bombs.SLOW.items():
            found[f"picture, {decoder}, {kind}"] = (partial(written, "0", whole), use)
        for kind, whole in bombs.LARGEST.items():
            found[f"picture, {decoder}, {kind} {_OF_LARGEST}"] = (partial(written, "0", whole), use)
    return found


def weight_cases() -> dict[str, tuple[_Make, _Use]]:
    """Return weights."""
    # Their library of hostile archives is a test's, which needs pytest.
    from test_torchscript import HOSTILE_ARCHIVES

    found: dict[str, tuple[_Make, _Use]] = {
        f"TorchScript, {name}": (partial(written, "m.pt", content), make_model)
        for name, content in HOSTILE_ARCHIVES.items()
    }
    for name, tree in PICKLES.items():
        found[f"pickle, {name}"] = (partial(written, "w.pt", tree), make_model)
        found[f"zipped pickle, {name}"] = (zip_of(tree), make_model)
    headers = {
        "claims 4 EB": safetensors(b"{}", 1 << 62),
        "claims 99 MB": safetensors(b"{}", 99_000_000),
        "depth": safetensors(b"[" * 500_000),
        "20,000 tensors": safetensors(_of_tensors(20_000)),
        "a million sides": safetensors(
            b'{"a":{"dtype":"F32","shape":[' + b"1," * 500_000 + b'1],"data_offsets":[0,4]}}',
            None,
            bytes(4),
        ),
        "terabytes of nothing": safetensors(
            b'{"a":{"dtype":"F32","shape":[1000000000000,0],"data_offsets":[0,0]}}'
        ),
        "terabytes": safetensors(
            b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
        ),
    }
    for name, content in headers.items():
        found[f"safetensors, {name}"] = (partial(written, "w.safetensors", content), make_model)
    found |= {
        "safetensors, sparse": (partial(sparse, "w.safetensors", b""), make_model),
        "safetensors, a sparse header": (
            partial(sparse, "w.safetensors", struct.pack("<Q", 99_000_000)),
            make_model,
        ),
        "weights, sparse": (partial(sparse, "w.pt", b""), make_model),
        "weights, sparse behind a zip": (partial(sparse, "w.pt", b"PK\x03\x04"), make_model),
        "weights, compressed zeros": (deflated_weights, make_model),
        "weights, one element everywhere": (expanded_weights, make_model),
        "weights, a claim in the old format": (legacy_weights, make_model),
        "weights, many records": (many_records, make_model),
    }
    return found


def text_cases() -> dict[str, tuple[_Make, _Use]]:
    """Return vocabularies, JSON, labels, logs and other files of text."""
    vocabularies: dict[str, bytes | Callable[[], bytes]] = {
        "newlines": partial(zipped_lines, b"\n", 256 * _MIB),
        "merges": partial(zipped_lines, b"a b\n", 256 * _MIB),
        "long lines": partial(zipped_lines, b"x" * 1000 + b"\n", 256 * _MIB),
        "one long line": partial(zipped_lines, b"x" * 32 * _MIB, 256 * _MIB),
        "parts": partial(zipped_members, 4 * _MIB),
        "symbols that double": doubling_merges,
        "merges of a symbol": b"#version\n" + b"a b\n" * 400_000,
    }
    read_vocabulary: _Use = Tokenizer.from_file
    found: dict[str, tuple[_Make, _Use]] = {
        f"vocabulary, {name}": (partial(written, "v.txt.gz", content), read_vocabulary)
        for name, content in vocabularies.items()
    }
    for name, content in JSONS.items():
        found |= {
            f"classes.json, {name}": (partial(classes, "classes.json", content), class_folders),
            f"templates.json, {name}": (partial(classes, "templates.json", content), class_folders),
            f"open_clip_config.json, {name}": (
                partial(described, "open_clip_config.json", content),
                make_model,
            ),
            f"config.json of a model, {name}": (
                partial(described, "config.json", content),
                make_model,
            ),
            f"config.json of a run, {name}": (
                partial(inside, partial(written, CONFIG_FILE, content)),
                resume,
            ),
            f"index of weights, {name}": (
                partial(inside, partial(written, "model.safetensors.index.json", content)),
                make_model,
            ),
            f"metrics, {name}": (
                partial(inside, partial(written, METRICS_FILE, content)),
                read_metrics,
            ),
        }
    large = {
        "embed_dim": 1 << 24,
        "vision_cfg": {"layers": 1024, "width": 1 << 24, "patch_size": 1, "image_size": 1 << 24},
        "text_cfg": {
            "layers": 1024,
            "width": 1 << 24,
            "context_length": 1 << 24,
            "vocab_size": 1 << 24,
        },
    }
    found |= {
        "vocabulary, sparse": (partial(sparse, "v.txt", b"#version\n"), read_vocabulary),
        "open_clip_config.json, a large model": (
            partial(described, "open_clip_config.json", json.dumps({"model_cfg": large}).encode()),
            make_model,
        ),
        "config.json of a run, sparse": (
            partial(inside, partial(sparse, CONFIG_FILE, b"{")),
            resume,
        ),
        "labels, sparse": (partial(sparse, "labels.txt", b"a\nb\n"), read_label_names),
        "labels, one name": (partial(sparse, "labels.txt", b"a"), read_label_names),
        "labels, many": (partial(written, "labels.txt", b"a\n" * _MIB), read_label_names),
        "metrics, one long line": (
            partial(inside, partial(sparse, METRICS_FILE, b"{}\n")),
            read_metrics,
        ),
        "a launch's note": (
            partial(inside, partial(sparse, f"run/{LAUNCH_FILE}", b"")),
            find_launch,
        ),
        "manifest of a checkpoint": (partial(manifest, "manifest.json"), load_latest),
        "captions to learn": (
            partial(sparse, "captions.txt", b"a cat\na cat\n"),
            partial(run, tokenizer_main, _trained),
        ),
    }
    return found


def data_cases() -> dict[str, tuple[_Make, _Use]]:
    """Return tables, shards and folders."""
    found: dict[str, tuple[_Make, _Use]] = {
        f"parquet, {make.__name__}": (make, read_some_pairs)
        for make in (
            null_rows, equal_rows, repeated_picture, large_cell, large_captions, wide_table, many_groups, small_parquet
        )
    }  # fmt: skip
    header = b"filepath\ttitle\n"
    row = b'{"file_name": "0.png", "caption": "a"}\n'
    tables: dict[str, tuple[str, bytes]] = {
        "blank lines": ("a.csv", header + b"0.png\ta\n" + b"\n" * _MIB),
        "fields": ("a.csv", header + b"0.png\ta\n" + b"\t" * (_MIB - 1)),
        "columns": ("a.csv", b"\t" * (_MIB - 1) + b"\n"),
        "an open quote": ("a.csv", header + b'0.png\t"' + b"a\n" * _MIB),
        "quotes": ("a.csv", header + b"0.png\t" + b'"' * (_MIB - 10) + b"\n"),
        "blank records": ("a.jsonl", row + b"\n" * _MIB),
        "empty records": ("a.jsonl", row + b"{}\n" * (_MIB // 8)),
        "depth": ("a.jsonl", row + b"[" * (_MIB - 10) + b"\n"),
        "lists": ("a.jsonl", row + b"[" + b"[]," * (_MIB // 3 - 10) + b"[]]\n"),
        "digits": ("a.jsonl", row + b"1" * (_MIB - 10) + b"\n"),
        "captions": (
            "a.jsonl",
            b'{"file_name": "0.png", "caption": [' + b'"a",' * (_MIB // 4 - 20) + b'"a"]}\n',
        ),
    }
    for name, (file, content) in tables.items():
        found[f"table, {name}"] = (partial(_beside_picture, file, content), read_some_pairs)
    for file, start in {
        "a.csv": header,
        "b.csv": header + b'0.png\t"',
        "a.jsonl": b"",
        "b.jsonl": row,
    }.items():
        make = partial(_beside_picture, file, start)
        found[f"sparse table, {file}"] = (partial(_grown, make), read_some_pairs)

    for name, text in RAW_HEADERS.items():
        content = shard(("a.npy", raw_header(text)), _CAPTION)
        found[f"raw picture, {name}"] = (partial(written, "a.tar", content), read_pairs)
    shards = {
        "a claim of 8 GB": shard(("a.jpg", b"x"), _CAPTION, claims=(1 << 33) - 1),
        "a long name": header_of("././@LongLink", 1 << 20, b"L") + bytes(1 << 20),
        "long names": (header_of("././@LongLink", 4096, b"L") + b"a/" * 2048) * 200,
        "an extended header": header_of("x", 1 << 20, b"x") + b"9" * (1 << 20),
        "records": header_of("x", 4096, b"x") + b"4 a=\n" * 819 + bytes(513),
        "JSON of depth": shard(("a.json", b"[" * (_MIB - 10)), ("a.npy", _RAW)),
        "JSON of lists": shard(("a.json", b"[" + b"[]," * 340_000 + b"[]]"), ("a.npy", _RAW)),
        "a long caption": shard(("a.txt", b"a" * _MIB), ("a.npy", _RAW)),
        "spaces": shard(("a.txt", b" " * _MIB), ("a.npy", _RAW)),
    }
    for name, content in shards.items():
        found[f"shard, {name}"] = (partial(written, "a.tar", content), read_pairs)
    found |= {
        "shard, a sparse caption": (partial(sparse_member, "a.txt"), read_pairs),
        "shard, a sparse picture": (partial(sparse_member, "a.png"), read_pairs),
        "shard, sparse": (partial(sparse, "a.tar", b""), read_pairs),
        "shard, members": (many_members, read_pairs),
        "shard, an index that claims": (partial(hostile_index, 1 << 60), read_pairs),
        "shard, a sparse index": (partial(hostile_index, 1), read_pairs),
        "shard, an index of depth": (deep_index, read_pairs),
        "folder, a sparse caption": (partial(captioned, "0.txt", b"a", True), read_some_pairs),
        "folder, a sparse picture": (partial(captioned, "0.png", b"", True), read_some_pairs),
        "folder, a sparse JPEG": (
            partial(captioned, "0.png", b"\xff\xd8\xff", True),
            read_some_pairs,
        ),
        "folder, a large chunk": (large_png, read_some_pairs),
        "folder, JSON of depth": (
            partial(captioned, "0.json", b"[" * (_MIB - 10), False),
            read_some_pairs,
        ),
    }
    return found


def _beside_picture(name: str, content: bytes, folder: Path) -> Path:
    """Write a table beside a picture; return its path."""
    written("0.png", encoded(noise("RGB"), "PNG"), folder)
    return written(name, content, folder)


def _grown(make: _Make, folder: Path) -> Path:
    """Make a file, and put hundreds of megabytes of zeros behind it; return its path."""
    path = make(folder)
    os.truncate(path, _SPARSE_BYTES // 2)
    return path


class Costly(Attack):
    """A small file that would be costly is refused, or read, within a second and 256 MB.

    With ``--fast`` a limit of the address space takes the place of what is measured.
    """

    fast: ClassVar[int] = 12

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._cases = {**picture_cases(), **weight_cases(), **text_cases(), **data_cases()}

    def cases(self) -> Mapping[str, Any]:
        return dict(zip(self._cases, self._cases, strict=True))

    def attempt(self, what: Any, folder: Path) -> str:
        make, use = self._cases[what]
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        # Memory that making it has taken and given back would hide what reading it takes.
        made = in_a_child(lambda: {"path": str(make(folder))}, _MAKING_SECONDS, 8 << 30)
        path = Path(made["path"])
        most_bytes = _FAST_BYTES if self.is_fast else _GUARD_BYTES
        most_seconds = _MAKING_SECONDS if self.is_fast else _GUARD_SECONDS
        told = in_a_child(partial(measured, use, path), most_seconds, most_bytes)
        assert "error" not in told, told["error"]
        if not self.is_fast:
            seconds, peak, ended = told["seconds"], told["peak"], told["ended"]
            is_largest = what.endswith(_OF_LARGEST)
            most_held = _LARGEST_BYTES if is_largest else MOST_BYTES
            assert peak <= most_held, f"it takes {peak >> 20} MB and {seconds:.1f} s ({ended})"
            most_spent = _LARGEST_SECONDS if is_largest else MOST_SECONDS
            assert seconds <= most_spent, f"it takes {seconds:.1f} s and {peak >> 20} MB ({ended})"
        return str(told["ended"])


def measured(use: _Use, path: Path) -> dict[str, Any]:
    """Return how reading a file ended, with the seconds and bytes that it took, or what was wrong with its end."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    ended, refusal = "read", None
    with watch(torch.device("cpu")) as watched:
        try:
            use(path)
        except REFUSALS as error:
            ended, refusal = "refused", str(error)
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if refusal is not None:
        if len(refusal.splitlines()) != 1 or len(refusal) > 2000:
            return {"error": f"a message of {len(refusal):,} characters: {refusal[:200]!r}"}
        if "MemoryError" in refusal:
            return {"error": f"it takes too much memory: {refusal}"}
    return {"ended": ended, "seconds": seconds, "peak": watched.peak}


def in_a_child(
    work: Callable[[], dict[str, Any]], most_seconds: int, most_bytes: int
) -> dict[str, Any]:
    """Return what a piece of work returns in a process of its own; raise where that dies.

    Args:
        most_seconds: of the processor, after which it is killed.
        most_bytes: of address space beside what it has.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(reading)
            limit_memory(most_bytes)
            resource.setrlimit(resource.RLIMIT_CPU, (most_seconds, most_seconds))
            told = work()
            os.write(writing, json.dumps(told).encode())
            status = 0
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            raised = f"{type(error).__name__}: {str(error)[:500]} ({where})"
            os.write(writing, json.dumps({"error": raised}).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0 and told, f"reading it ended with {status}"
    return dict(json.loads(told))
