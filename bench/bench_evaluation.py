"""A zero-shot evaluation of images in files: the encoder's share of the time, and the peak of memory.

python bench/bench_evaluation.py [--model ViT-B-32 ViT-B-16] [--images 256 1024] [--workers 0] [--device cuda]

Pictures of 500 x 375, as ImageNet's are on average, are written as JPEGs into ten class folders. Weights are random,
which changes no time. The encoder's share is the time in ``encode_image`` over that of the whole evaluation: reading the
folder, decoding, encoding, storing the features, the texts and the scores. The peak is the memory above the model's; if it
is the same in all rows of a model, it does not depend on the number of images.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import leaving_out, parse, record_row, run
from PIL import Image
from torch import Tensor

from clipcore.data.transforms import ImageTransform
from clipcore.evaluate.datasets import open_set
from clipcore.evaluate.features import FeatureStore
from clipcore.evaluate.loading import LoadedModel
from clipcore.evaluate.measure import Subject, measure_zero_shot
from clipcore.run import memory
from clipcore.tokenizer import byte_tokenizer
from clipcore.towers.factory import create_model

CLASSES = ("ant", "bear", "cat", "dog", "eel", "fox", "goat", "hen", "ibis", "jay")
SIZE = (500, 375)


def write_pictures(folder: Path, number: int) -> None:
    """Write smooth noise as JPEGs, which decodes about as fast as photos do."""
    rng = np.random.default_rng(0)
    for index in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        path = folder / CLASSES[index % len(CLASSES)] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize(SIZE, Image.Resampling.BICUBIC).save(path, quality=90)


class TimedEncoder:
    """A wrapper of a model's ``encode_image`` that adds up its seconds."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.seconds, self._encode, self._device = 0.0, model.encode_image, device
        model.encode_image = self

    def __call__(self, images: Tensor, **options: Any) -> Tensor:
        begun = time.perf_counter()
        features = self._encode(images, **options)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds += time.perf_counter() - begun
        return features


def bench(name: str, folder: Path, num_images: int, workers: int, device: torch.device) -> None:
    """Record a row: the encoder's share of a zero-shot evaluation, its seconds and its peak."""
    torch.manual_seed(0)
    model = create_model(name, device=device).eval()
    transform = ImageTransform(model.config.vision.image_size, is_train=False)
    loaded = LoadedModel(name, "random", model, transform, byte_tokenizer(), ("a photo of a {}.",))
    # Warm up: kernels may have to be compiled, and first calls are slow.
    size = transform.image_size
    with torch.no_grad():
        model.encode_image(torch.zeros(2, 3, size, size, device=device))

    encoder = TimedEncoder(model, device)
    with memory.watch(device) as watched:
        begun = time.perf_counter()
        store = FeatureStore(model, transform, workers=workers, progress=False)
        measure_zero_shot(Subject(loaded, store), open_set(str(folder)))
        seconds = time.perf_counter() - begun
    record_row(
        "zero_shot",
        "clipcore",
        device=device,
        figures={
            "seconds": round(seconds, 2),
            "encoder_share": encoder.seconds / seconds,
            "extra_bytes": watched.peak,
        },
        model=name,
        images=num_images,
        batch=store.batch_size,
        workers=workers,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["ViT-B-32", "ViT-B-16"])
    parser.add_argument("--images", type=int, nargs="+", default=[256, 1024], help="[256 1024]")
    parser.add_argument("--workers", type=int, default=0, help="[%(default)s]")
    arguments = parse(parser, ["tests/test_measure.py", "tests/test_features.py"], argv)

    for num_images in arguments.images:
        with tempfile.TemporaryDirectory() as folder:
            write_pictures(Path(folder), num_images)
            for name in arguments.model:
                with leaving_out(name):
                    bench(name, Path(folder), num_images, arguments.workers, arguments.device)


if __name__ == "__main__":
    run(main)
