"""Small data sets on disk for tests: pictures of coloured shapes with captions that describe them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "black", "yellow", "purple", "orange", "brown")
SHAPES = ("square", "circle", "line", "triangle", "cross")


def picture(index: int) -> tuple[bytes, str]:
    """A JPEG and its caption."""
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


def write_csv(folder: Path, num_pairs: int) -> Path:
    """A table in open_clip's form, tab separated, with its images in a folder beside it."""
    (folder / "images").mkdir(parents=True)
    lines = ["filepath\ttitle"]
    for index in range(num_pairs):
        data, caption = picture(index)
        (folder / "images" / f"{index:04d}.jpg").write_bytes(data)
        lines.append(f"images/{index:04d}.jpg\t{caption}")
    path = folder / "pairs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_shards(folder: Path, num_shards: int, pairs_per_shard: int) -> str:
    """Tar shards in the WebDataset layout; returns their brace pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for row in range(pairs_per_shard):
                index = shard * pairs_per_shard + row
                data, caption = picture(index)
                for extension, content in (("jpg", data), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{index:06d}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return str(folder / f"{{000..{num_shards - 1:03d}}}.tar")
