"""Writing tar shards in the WebDataset layout: the same pairs give the same bytes, whoever writes them and when."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

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
    load_index,
)
from clipcore.data.transforms import resize_shorter, sides, was_transparent

FORMATS = ("jpeg", "raw")
MAX_KEY_CHARS = 200
_TEMPORARY = ".tmp"


@dataclass(frozen=True)
class ImageFormat:
    """What an image of a source becomes in a shard.

    Args:
        kind: one of ``FORMATS``: a JPEG file, or its pixels as ``raw.py`` has them.
        size: pixels of the shorter side; images that are smaller stay as they are.
        quality: of a JPEG, 1 to 100.
    """

    kind: str = "jpeg"
    size: int = 256
    quality: int = 95

    @property
    def suffix(self) -> str:
        return "jpg" if self.kind == "jpeg" else RAW_SUFFIX

    def encode(self, image: Picture) -> bytes:
        """The member of an image; raises BadSample for one that fits no member."""
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
    """What a shard holds: pairs, the file's bytes, and (number in the source, key, reason) of each sample left out.

    ``transparent`` counts pictures that were laid over white.
    """

    pairs: int = 0
    bytes: int = 0
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    transparent: int = 0


def write_shard(
    path: Path,
    source: PairSource,
    rows: Iterable[int],
    image_format: ImageFormat,
    tick: Callable[[], None] = lambda: None,
) -> ShardReport:
    """Writes one shard and its byte index; there is none, or the whole of it.

    Args:
        rows: which samples of the source, in order; those that cannot be read are left out and reported.
        tick: called after each sample; what it raises ends the shard.

    Raises:
        DataError: the shard cannot be written, or the source cannot be read on.
    """
    report, taken = ShardReport(), set[str]()
    temporary = path.with_name(f"{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
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
            report.bytes = file.tell()
        os.replace(temporary, path)
        load_index(str(path))
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror}; mend that, and the same command goes on with what is missing"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return report


def _members(
    source: PairSource, row: int, image_format: ImageFormat, taken: set[str]
) -> tuple[list[tuple[str, bytes]], bool]:
    """Return (name, content) of a sample's image and caption, and whether the picture was laid over white.

    Its key is added to those taken.
    """
    try:
        pair = source[row]
    except OSError as error:
        # Of reading, so that a full disk is not blamed for it.
        raise DataError(f"cannot read sample {row} of {source.name}: {error.strerror}") from None
    try:
        image = image_format.encode(pair.image)
        suffix, caption = _caption(pair)
    except BadSample as error:
        raise BadSample(error.reason, pair.key) from None
    key = _free(shard_key(source, row, pair.key), row, taken)
    members = [(f"{key}.{image_format.suffix}", image), (f"{key}.{suffix}", caption)]
    return members, was_transparent(pair.image)


def _caption(pair: Pair) -> tuple[str, bytes]:
    """(suffix, content) of the member of a caption; of several, a JSON object with their list."""
    if isinstance(pair.caption, str):
        return "txt", pair.caption.encode()
    content = json.dumps({"caption": list(pair.caption)}, ensure_ascii=False).encode()
    if len(content) > MAX_CAPTION_BYTES:
        raise BadSample(f"captions of {len(content)} bytes are too large for a member")
    return "json", content


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    # Time, owner and mode are TarInfo's fixed ones: a shard is a function of its samples.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def shard_key(source: PairSource, row: int, key: str) -> str:
    """The key of a sample in a shard: what WebDataset takes as one, as like the source's own as that allows.

    A tar's key stays; of a path the image's suffix goes. Further dots in the last component, at the first of which
    WebDataset ends a key, become underscores, and nothing leads out of the folder where somebody unpacks the shard.
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
    # Two underscores begin what WebDataset takes for a shard's own metadata.
    return f"key{key}" if key.startswith("__") else key


def _free(key: str, row: int, taken: set[str]) -> str:
    """The key, or where another sample of the shard has it (an image with several rows), the key and the row."""
    while key in taken:
        key = f"{key}-{row}"
    taken.add(key)
    return key


def remove_temporaries(folder: Path) -> None:
    """Removes what writers that were killed left behind."""
    for path in folder.glob(f"*.tar.*{_TEMPORARY}"):
        path.unlink(missing_ok=True)
