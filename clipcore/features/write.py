"""Writes a model's features of images or captions to a file.

Legend: N rows, E embedding size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipcore.data import DataError
from clipcore.data.choices import JUDGED_ROWS
from clipcore.data.loader import too_many_bad
from clipcore.data.sources import left_out_of
from clipcore.data.transforms import MAX_PIXELS, Decoder, ImageTransform
from clipcore.evaluate.features import converted, hash_of_tower, settings_of
from clipcore.evaluate.loading import LoadedModel
from clipcore.evaluate.same_weights import hash_of_model
from clipcore.features.arguments import DTYPES
from clipcore.features.encode import encode_captions, encode_images
from clipcore.features.inputs import open_captions, open_images
from clipcore.features.row_file import RowFile
from clipcore.files import is_folder
from clipcore.progress import Progress
from clipcore.tokenizer import Tokenizer
from clipcore.towers.model import CLIP


def write_features(
    model: CLIP,
    transform: ImageTransform,
    data: str | Sequence[str],
    out: str | Path,
    *,
    captions_by: Tokenizer | None = None,
    normalize: bool = False,
    dtype: str = "float32",
    batch_size: int = 256,
    workers: int = 0,
    max_bad_fraction: float = 0.01,
    max_pixels: int = MAX_PIXELS,
    quiet: bool = True,
    note: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> np.ndarray:
    """Write features to a ``.npy`` file, and return it as a memory map [N, E].

    The rows are in the order of the data. A sample that cannot be read has no row. Beside ``X.npy``, ``X.txt`` names the
    samples of the rows, and ``X.json`` holds the settings, hashes of model and data, and the unreadable samples. A killed
    process leaves what it has done: the same call goes on with it, to the same bits. A file that is whole is not made again.

    Args:
        model: in evaluation mode.
        transform: its preprocessing, such as ``preprocess_val`` of ``create_model_and_transforms``.
        data: image files, folders, and what ``clipcore.data.sources.open_source`` takes; glyphs or icons.
        out: the file, X.npy; its folder exists.
        captions_by: the model's tokenizer, to encode the captions instead of the images; one row for each caption.
        normalize: whether to scale features to unit length.
        dtype: "float32" or "float16", of the file.
        batch_size: rows encoded at once.
        workers: processes that read images; 0 reads in this process.
        max_bad_fraction: largest share of the samples, or of 512 where they are fewer, that may be unreadable.
        max_pixels: most pixels of an image.
        quiet: show no progress on standard error.
        note: called with lines for the user.
        options: of ``open_source``: ``img_key``, ``caption_key``, ``separator`` and others.

    Raises:
        ValueError: an argument cannot work; ``out`` is a file of another model, of other data or of something else; too
            much of the data is unreadable.
        OSError: a file cannot be read or written.
    """
    out = Path(out)
    _check(out, dtype, batch_size, workers, max_bad_fraction, max_pixels)
    names = [data] if isinstance(data, str) else list(data)
    decoder = Decoder(max_pixels=max_pixels)
    open_inputs = open_images if captions_by is None else open_captions
    source, fingerprint = open_inputs(names, decoder, **options)
    if left_out := left_out_of(source):
        note(f"not used: {left_out}")

    settings = {
        "of": "images" if captions_by is None else "captions",
        "model_sha256": _hash_of(model, transform, captions_by),
        "data_sha256": fingerprint,
        "batch_size": batch_size,
        "dtype": dtype,
        "normalize": normalize,
        "device": model.logit_scale.device.type,
    }
    file = RowFile(out, settings)
    if (rows_NE := file.whole()) is not None:
        note(f"{out} is whole already")
        return rows_NE

    with file:
        start = file.num_samples
        if start:
            note(f"goes on behind {start:,} of {len(source):,} samples")
        if captions_by is None:
            batches = encode_images(model, transform, source, start, batch_size, workers, normalize)
        else:
            batches = encode_captions(model, captions_by, source, start, batch_size, normalize)
        unit = "images" if captions_by is None else "samples"
        with Progress(len(source), unit, out.name, initial=start, quiet=quiet) as shown:
            for batch in batches:
                remedy = "take --dtype float32"
                converted(batch.features_BE, np.dtype(dtype), source.name, remedy)
                file.add(batch)
                bad = file.unreadable
                if len(bad) > max_bad_fraction * max(len(source), JUDGED_ROWS):
                    raise too_many_bad(len(bad), len(source), source.name, max_bad_fraction, bad)
                shown.update(file.num_samples - start)
                start = file.num_samples
        if not file.num_rows:
            reasons = f", such as {bad[0][0]}: {bad[0][1]}" if (bad := file.unreadable) else ""
            raise DataError(f"nothing of {source.name} can be read{reasons}")
        if file.unreadable:
            key, reason = file.unreadable[0]
            note(
                f"{len(file.unreadable):,} of {len(source):,} samples cannot be read and have no row, such as {key}: "
                f"{reason}; {file.record} lists them"
            )
        if file.num_transparent:
            note(f"{file.num_transparent:,} transparent pictures are laid over white")
        return file.finish({"data": names, "model": model.config.short_name})


def _check(
    out: Path,
    dtype: str,
    batch_size: int,
    workers: int,
    max_bad_fraction: float,
    max_pixels: int,
) -> None:
    """Raise ValueError for arguments that cannot work, before the data is opened."""
    if out.suffix != ".npy":
        raise ValueError(f"--out names a file that ends in .npy, got {out}")
    if not is_folder(out.parent):
        raise ValueError(f"--out {out}: there is no folder {out.parent}; create it first")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {' or '.join(DTYPES)}, got {dtype!r}")
    for flag, number, least in (
        ("--batch-size", batch_size, 1),
        ("--max-pixels", max_pixels, 1),
        ("--workers", workers, 0),
    ):
        if number < least:
            raise ValueError(f"{flag} is at least {least}, got {number}")
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"--max-bad-fraction lies between 0 and 1, got {max_bad_fraction}")


def _hash_of(model: CLIP, transform: ImageTransform, tokenizer: Tokenizer | None) -> str:
    """Return a hash of all of a model that its features depend on."""
    tower_hash = hash_of_tower(model)
    if tokenizer is not None:
        return hash_of_model(LoadedModel("", "", model, transform, tokenizer, ()), tower_hash)
    parts = {"tower": tower_hash, "transform": settings_of(transform)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
