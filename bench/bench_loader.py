"""Pairs a second that one core reads: tar shards to crops and token ids, against webdataset and Hugging Face datasets.

python bench/bench_loader.py [--pairs 256] [--pairs-per-second 9000]

The same generated pairs are in shards in three forms: JPEG files of about 500 x 375 pixels, a quarter of them upright, at
quality 90, as they come from the web; JPEG files of 256 pixels at quality 95; and raw pixels of that size (the latter two by
clipcore.data.prepare). All readers run in this process, on one thread and one core, with the same random crops and the
same tokenizer, whose time counts for all. Each gives batches of uint8 [B, 3, 224, 224] with token ids. Crops are
open_clip's RandomResizedCrop (0.9 to 1 of the area, bicubic) and the paper's, 224 pixels cut from images whose shorter side
is 256. The peers' crops are made with PIL, as their users make them; "float32" is a peer that continues with open_clip's
ToTensor and Normalize, which clipcore does on the device.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from harness import case_in_words, newest_rows, parse, record, run
from PIL import Image
from torch import Tensor

from clipcore.data.loader import PairLoader
from clipcore.data.prepare import Settings, prepare
from clipcore.data.shards import ImageFormat, write_shard
from clipcore.data.sources import Pair, open_source
from clipcore.data.transforms import ImageTransform, normalize_images, random_box
from clipcore.tokenizer import Tokenizer, VocabularyError, byte_tokenizer, get_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SIZE, RESIZED = 224, 256
CROPS = {
    "resized crop": ImageTransform(SIZE, is_train=True),
    "window": ImageTransform(SIZE, is_train=True, resize=RESIZED),
}
WORDS = (
    "a the of in on with red old small wooden house dog street view from above beach sunset man woman riding bicycle "
    "photo kitchen table white cat sitting window green mountain lake city night lights market fresh fruit"
).split()

Reader = Callable[[], Any]


class Scenes:
    """Smoothed colour noise, whose JPEGs are as large as photographs of these sides, with captions of about 16 tokens."""

    name = "scenes"

    def __init__(self, num_pairs: int) -> None:
        self.num_pairs = num_pairs

    def __len__(self) -> int:
        return self.num_pairs

    def __getitem__(self, index: int) -> Pair:
        rng = np.random.default_rng(index)
        width, height = 500, int(rng.integers(333, 418))
        if index % 4 == 3:
            width, height = height, width
        pixels = np.zeros((height, width, 3), np.float32)
        for scale in (2, 4, 8, 16, 32, 64):
            grid = rng.standard_normal((height // scale + 2, width // scale + 2, 3), np.float32)
            planes = [Image.fromarray(grid[..., c]).resize((width, height), 3) for c in range(3)]
            pixels += np.stack([np.asarray(plane) for plane in planes], -1) * scale**0.5
        pixels = (pixels - pixels.mean()) * (50 / pixels.std()) + 128
        caption = " ".join(rng.choice(WORDS, rng.integers(9, 20)))
        return Pair(pixels.clip(0, 255).astype(np.uint8), caption, f"{index:08d}")


def write_formats(folder: Path, num_pairs: int) -> dict[str, str]:
    """Write the shards of each format; return {name of the format: pattern}."""
    source = Scenes(num_pairs)
    original = folder / "original"
    original.mkdir()
    write_shard(original / "00000.tar", source, range(num_pairs), ImageFormat("jpeg", 1 << 16, 90))
    patterns = {"JPEG 500 px": str(original / "00000.tar")}
    for kind, name in (("jpeg", "JPEG 256 px"), ("raw", "raw 256 px")):
        settings = Settings(ImageFormat(kind, RESIZED), num_pairs)
        prepare(str(original), folder / kind, settings)
        patterns[name] = str(folder / kind / "00000.tar")
    return patterns


def clipcore_reader(
    pattern: str, crop: ImageTransform, tokenizer: Tokenizer, decoder: str
) -> Reader:
    source = open_source(pattern, decoder=decoder, min_side=crop.min_side)
    loader = PairLoader(source, crop, tokenizer, len(source), seed=0, pin_memory=False)
    batches = loader.batches()
    return lambda: next(batches)


def peer_crop(picture: Any, crop: ImageTransform, rng: np.random.Generator) -> Tensor:
    """Return the crop of one picture as uint8 [3, S, S], with PIL; an array that is large enough is sliced."""
    if isinstance(picture, np.ndarray) and crop.resize == min(picture.shape[:2]):
        x, y = rng.random(2)
        left = int(x * (picture.shape[1] - SIZE + 1))
        top = int(y * (picture.shape[0] - SIZE + 1))
        pixels = picture[top : top + SIZE, left : left + SIZE]
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture.convert("RGB")
    if crop.resize is None:
        left, top, width, height = random_box(*image.size, crop.scale, crop.ratio, rng)
        box = image.crop((left, top, left + width, top + height))
        image = box.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    else:
        scale = crop.resize / min(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)), 3)
        x, y = rng.random(2)
        left, top = int(x * (image.width - SIZE + 1)), int(y * (image.height - SIZE + 1))
        image = image.crop((left, top, left + SIZE, top + SIZE))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def peer_reader(
    pairs: Callable[[], Iterable[tuple[Any, str]]],
    crop: ImageTransform,
    tokenizer: Tokenizer,
    in_float: bool = False,
) -> Reader:
    """Return a pass over a peer's pairs: one batch of crops and token ids."""
    rng = np.random.default_rng(0)

    def read() -> tuple[Tensor, Tensor]:
        images, captions = [], []
        for picture, caption in pairs():
            image = peer_crop(picture, crop, rng)
            images.append(normalize_images(image) if in_float else image)
            captions.append(caption)
        return torch.stack(images), tokenizer(captions)

    return read


def webdataset_pairs(pattern: str) -> Callable[[], Iterator[tuple[Any, str]]]:
    import webdataset

    def pairs() -> Iterator[tuple[Any, str]]:
        data = webdataset.WebDataset(pattern, shardshuffle=False)
        yield from data.decode("pil").to_tuple("jpg;npy", "txt")

    return pairs


def datasets_pairs(pattern: str) -> Callable[[], Iterator[tuple[Any, str]]]:
    import datasets

    datasets.disable_progress_bars()
    data = datasets.load_dataset("webdataset", data_files=pattern, split="train", streaming=True)

    def pairs() -> Iterator[tuple[Any, str]]:
        for example in data:
            picture = example["jpg"] if "jpg" in example else example["npy"]
            yield (
                np.asarray(picture, np.uint8) if isinstance(picture, list) else picture,
                example["txt"],
            )

    return pairs


def readers(pattern: str, crop: ImageTransform, tokenizer: Tokenizer) -> dict[str, Reader]:
    """Return the reader of each provider that is installed."""
    fns = {"clipcore": clipcore_reader(pattern, crop, tokenizer, "pillow")}
    try:
        fns["clipcore, simplejpeg"] = clipcore_reader(pattern, crop, tokenizer, "simplejpeg")
    except ValueError as error:
        print(f"clipcore, simplejpeg: left out: {error}", flush=True)
    for name, peer in (("webdataset", webdataset_pairs), ("datasets", datasets_pairs)):
        try:
            pairs = peer(pattern)
            next(iter(pairs()))
        except ImportError:
            print(f"{name}: left out: pip install {name}", flush=True)
            continue
        fns[name] = peer_reader(pairs, crop, tokenizer)
        if name == "webdataset":
            fns["webdataset, float32"] = peer_reader(pairs, crop, tokenizer, in_float=True)
    return fns


def bench(arguments: argparse.Namespace) -> dict[tuple[str, str, str], float]:
    """Record a row for each reader; return {(format, crop, provider): pairs a second}."""
    tokenizer = build_tokenizer()
    speeds = {}
    with tempfile.TemporaryDirectory() as folder:
        patterns = write_formats(Path(folder), arguments.pairs)
        for kind, pattern in patterns.items():
            num_bytes = os.path.getsize(pattern)
            for name, crop in CROPS.items():
                fns = readers(pattern, crop, tokenizer)
                case = {"format": kind, "crop": name, "pairs": arguments.pairs}
                medians = record(
                    "loader",
                    fns,
                    device=torch.device("cpu"),
                    flops=0,
                    bytes_moved=num_bytes,
                    **case,
                )
                for provider, median in medians.items():
                    speeds[kind, name, provider] = 1e3 * arguments.pairs / median
    return speeds


def build_tokenizer() -> Tokenizer:
    """Return OpenAI's vocabulary if it is installed, as a user's run does."""
    try:
        return get_tokenizer()
    except VocabularyError:
        print("OpenAI's vocabulary is not installed: each byte is a token", flush=True)
        return byte_tokenizer()


def training_steps() -> dict[str, float]:
    """Return pairs a second of clipcore's training steps, from the newest row of each case in bench/results."""
    steps = {}
    for row in newest_rows()[0]:
        if (row["op"], row["provider"]) == ("training step", "clipcore"):
            steps[f"{case_in_words(row)}, {row['device']}"] = 1e3 * row["B"] / row["median_ms"]
    return steps


def print_tables(speeds: dict[tuple[str, str, str], float], steps: dict[str, float]) -> None:
    base = speeds.get(("JPEG 500 px", "resized crop", "webdataset"))
    print("\n| format | crop | provider | pairs/s a core | x webdataset on JPEG 500 px |")
    print("|---|---|---|---|---|")
    for (kind, crop, provider), speed in speeds.items():
        ratio = f"{speed / base:.2f}" if base else ""
        print(f"| {kind} | {crop} | {provider} | {speed:.0f} | {ratio} |")
    ours = [(kind, crop) for kind, crop, provider in speeds if provider == "clipcore"]
    if not steps:
        print("\nno row of a training step is in bench/results; give --pairs-per-second N")
        return
    print("\nCores that feed a step, clipcore with Pillow:\n")
    print(f"| step | pairs/s | {' | '.join(f'{kind}, {crop}' for kind, crop in ours)} |")
    print("|---" * (2 + len(ours)) + "|")
    for name, wanted in steps.items():
        cores = [f"{wanted / speeds[kind, crop, 'clipcore']:.2g}" for kind, crop in ours]
        print(f"| {name} | {wanted:.0f} | {' | '.join(cores)} |")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=256, help="pairs in each shard")
    parser.add_argument("--pairs-per-second", type=float, help="speed of the step to feed")
    tests = ["tests/test_prepare.py", "tests/test_loader.py", "tests/test_transforms.py"]
    arguments = parse(parser, tests, argv, has_device=False)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    given = arguments.pairs_per_second
    speeds = bench(arguments)
    print_tables(speeds, {"given": given} if given else training_steps())


if __name__ == "__main__":
    run(main)
