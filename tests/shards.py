"""Small data sets on disk for tests: pictures of coloured shapes with captions that describe them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "black", "yellow", "purple", "orange", "brown")
SHAPES = ("square", "circle", "line", "triangle", "cross")


def picture(index: int) -> tuple[bytes, str]:
    """Return a JPEG and its caption."""
    colour, shape = COLOURS[index % 8], SHAPES[index // 8 % 5]
    width, height = 36 + index % 7, 40 - index % 5
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    box = (8, 8, width - 8, height - 8)
    if shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(8, height - 8), (width // 2, 8), (width - 8, height - 8)], fill=colour)
    else:
        pen.line(box, fill=colour, width=4)
        if shape == "cross":
            pen.line((8, height - 8, width - 8, 8), fill=colour, width=4)
    pixels = np.asarray(image).astype(np.int16)
    pixels += np.random.default_rng(index).integers(-5, 6, pixels.shape, dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue(), f"a {colour} {shape}, number {index}"


def write_images(folder: Path, num_pairs: int) -> list[tuple[str, str]]:
    """(path relative to the folder, caption) of pictures in ``images/`` in the folder."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for index in range(num_pairs):
        data, caption = picture(index)
        path = f"images/{index:04d}.jpg"
        (folder / path).write_bytes(data)
        rows.append((path, caption))
    return rows


def write_csv(folder: Path, num_pairs: int) -> Path:
    """Write a table in open_clip's form, tab separated, with its images in a folder beside it."""
    rows = [("filepath", "title"), *write_images(folder, num_pairs)]
    path = folder / "pairs.csv"
    path.write_text("".join(f"{image}\t{caption}\n" for image, caption in rows))
    return path


def write_jsonl(folder: Path, num_pairs: int) -> Path:
    """One object a line, with an image's path and its caption."""
    path = folder / "pairs.jsonl"
    rows = write_images(folder, num_pairs)
    lines = [json.dumps({"file_name": image, "caption": caption}) for image, caption in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_parquet(folder: Path, num_pairs: int) -> Path:
    """Images as bytes, in Hugging Face's layout of a column of {bytes, path}."""
    import pyarrow
    import pyarrow.parquet

    pairs = [picture(index) for index in range(num_pairs)]
    images = [{"bytes": data, "path": f"{index}.jpg"} for index, (data, _) in enumerate(pairs)]
    table = pyarrow.table({"image": images, "caption": [caption for _, caption in pairs]})
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, folder / "pairs.parquet", row_group_size=7)
    return folder / "pairs.parquet"


def write_folder(folder: Path, num_pairs: int) -> Path:
    """Images with their captions in text files of the same stem."""
    for path, caption in write_images(folder, num_pairs):
        (folder / path).with_suffix(".txt").write_text(caption)
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """Write a tar file of these members."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, num_shards: int, pairs_per_shard: int) -> str:
    """Tar shards in the WebDataset layout; returns their brace pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        members = []
        for index in range(shard * pairs_per_shard, (shard + 1) * pairs_per_shard):
            data, caption = picture(index)
            members += [(f"{index:06d}.jpg", data), (f"{index:06d}.txt", caption.encode())]
        write_tar(folder / f"{shard:03d}.tar", members)
    return str(folder / f"{{000..{num_shards - 1:03d}}}.tar")
