"""Writes tar shards in the WebDataset layout; the same pairs always give the same bytes.

Each member has a hash of its bytes in its header, with which ``tar.py`` compares what it reads.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clipcore.data import BadSample, DataError, Pair, PairSource, printable
from clipcore.data.raw import RAW_SUFFIX, encode_raw
from clipcore.data.resample import Picture, as_image
from clipcore.data.sources import MixtureSource
from clipcore.data.tar import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    TarSource,
    checksum_name,
    load_index,
)
from clipcore.data.transforms import resize_shorter, sides, was_transparent
from clipcore.files import open_regular

MAX_KEY_CHARS = 200
_TEMPORARY = ".tmp"


@dataclass(frozen=True)
class ImageFormat:
    """The format of images in a shard.

    Args:
        kind: one of ``choices.PREPARED_FORMATS``: a JPEG file, or raw pixels as in ``raw.py``.
        size: pixels of the shorter side; smaller images are not enlarged.
        quality: JPEG quality, 1 to 100.
    """

    kind: str = "jpeg"
    size: int = 256
    quality: int = 95

    @property
    def suffix(self) -> str:
        return "jpg" if self.kind == "jpeg" else RAW_SUFFIX

    def encode(self, image: Picture) -> bytes:
        """Return an image's member; raise BadSample for an image that is too large for one."""
        if min(sides(image)) > self.size:
            image = resize_shorter(image, self.size)
        image = as_image(image).convert("RGB")
        if self.kind == "raw":
            data = encode_raw(np.asarray(image))
        else:
            buffer = io.BytesIO()
            try:
                image.save(buffer, "JPEG", quality=self.quality)
            except (OSError, ValueError) as error:
                raise BadSample(f"no JPEG of {image.width} x {image.height}: {error}") from None
            data = buffer.getvalue()
        if len(data) > MAX_IMAGE_BYTES:
            raise BadSample(f"{image.width} x {image.height} pixels are too large for a member")
        return data


@dataclass
class ShardReport:
    """The content of a shard: pairs, the file's bytes, and (index in the source, key, reason) of each skipped sample.

    ``transparent`` counts pictures that were laid over white. ``sha256`` is the file's, in hexadecimal; empty in the
    record of an earlier version, which had none.
    """

    pairs: int = 0
    bytes: int = 0
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    transparent: int = 0
    sha256: str = ""


def fault_of(path: Path, report: ShardReport) -> str | None:
    """Return what is wrong with a finished shard, compared by size and SHA-256; None if nothing is."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != report.bytes:
                return f"has {size:,} bytes instead of {report.bytes:,}"
            if report.sha256 and _sha256(file) != report.sha256:
                return "is damaged: its bytes are not those that were written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _sha256(file: BinaryIO) -> str:
    """Return the SHA-256 of a file that is at its beginning, in hexadecimal."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


class _Hashed(io.BufferedIOBase):
    """A file that is written from its beginning to its end, with the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, content: Any) -> int:
        self.digest.update(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self._file.tell()


def write_shard(
    path: Path,
    source: PairSource,
    rows: Iterable[int],
    image_format: ImageFormat,
    tick: Callable[[], None] = lambda: None,
) -> ShardReport:
    """Write one shard atomically, with its byte index.

    Args:
        rows: indices of the samples in the source, in order; unreadable samples are skipped and reported.
        tick: called after each sample; an exception that it raises ends the shard.

    Raises:
        DataError: the shard cannot be written, or the source cannot be read any further.
    """
    report, taken = ShardReport(), set[str]()
    temporary = path.with_name(f"{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            hashed = _Hashed(file)
            with tarfile.open(fileobj=hashed, mode="w", format=tarfile.GNU_FORMAT) as archive:
                for row in rows:
                    try:
                        members, transparent = _members(source, row, image_format, taken)
                    except BadSample as error:
                        report.bad.append((row, printable(error.key), printable(error.reason)))
                    else:
                        for name, content in members:
                            _add(archive, name, content)
                        report.pairs += 1
                        report.transparent += transparent
                    tick()
            file.flush()
            os.fsync(file.fileno())
            report.bytes, report.sha256 = file.tell(), hashed.digest.hexdigest()
        os.replace(temporary, path)
        load_index(str(path))
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror}; fix that, and the same command continues with the missing shards"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return report


def _members(
    source: PairSource, row: int, image_format: ImageFormat, taken: set[str]
) -> tuple[list[tuple[str, bytes]], bool]:
    """Return (name, content) of a sample's image and caption, and whether the picture was laid over white.

    Its key is added to the used ones.
    """
    try:
        pair = source[row]
    except OSError as error:
        # An error of reading, which must not be reported as a full disk.
        raise DataError(f"cannot read sample {row} of {source.name}: {error.strerror}") from None
    try:
        image = image_format.encode(pair.image)
        suffix, caption = _caption(pair)
    except BadSample as error:
        raise BadSample(error.reason, pair.key) from None
    key = _unused_key(shard_key(source, row, pair.key), row, taken)
    members = [(f"{key}.{image_format.suffix}", image), (f"{key}.{suffix}", caption)]
    return members, was_transparent(pair.image)


def _caption(pair: Pair) -> tuple[str, bytes]:
    """Return (suffix, content) of the caption's member; several captions become a JSON object with their list."""
    if isinstance(pair.caption, str):
        return "txt", pair.caption.encode()
    content = json.dumps({"caption": list(pair.caption)}, ensure_ascii=False).encode()
    if len(content) > MAX_CAPTION_BYTES:
        raise BadSample(f"captions of {len(content)} bytes are too large for a member")
    return "json", content


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    # Time, owner's number and mode are TarInfo's constants, so that a shard depends only on its samples.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.uname = checksum_name(content)
    archive.addfile(member, io.BytesIO(content))


def shard_key(source: PairSource, row: int, key: str) -> str:
    """Return the key of a sample in a shard: as close to the source's key as WebDataset allows.

    A tar's key is kept; a path loses the image's suffix. Further dots in the last component become underscores, because
    WebDataset ends a key at the first one. No key leads out of the folder where a shard is unpacked.
    """
    while isinstance(source, MixtureSource):
        number, row = source.locate(row)
        source = source.parts[number]
    if isinstance(source, TarSource):
        key = key.partition("/")[2]
    else:
        key = re.sub(rf"\.({'|'.join(IMAGE_SUFFIXES)})$", "", key, flags=re.IGNORECASE)
    parts = printable(key)[-MAX_KEY_CHARS:].split("/")
    *folders, last = [part for part in parts if part not in ("", ".", "..")] or ["sample"]
    key = "/".join([*folders, last.replace(".", "_")])
    # WebDataset reads names with two leading underscores as the shard's own metadata.
    return f"key{key}" if key.startswith("__") else key


def _unused_key(key: str, row: int, taken: set[str]) -> str:
    """Return the key, or the key and the row if another sample has the key (an image with several rows)."""
    while key in taken:
        key = f"{key}-{row}"
    taken.add(key)
    return key


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files of killed writers."""
    for path in folder.glob(f"*.tar.*{_TEMPORARY}"):
        path.unlink(missing_ok=True)
