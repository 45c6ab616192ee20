"""Exports a model to a folder, which gets its name when everything in it is written and checked."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from clipcore.export.arguments import TARGETS
from clipcore.export.check import check_export
from clipcore.export.onnx_towers import write_onnx
from clipcore.export.vocabulary import write_tokenizer
from clipcore.files import make_directory, sync_directory
from clipcore.tokenizer import OPENAI_SHA256, Tokenizer
from clipcore.towers.architectures import ModelConfig
from clipcore.towers.layouts import write_open_clip, write_openai, write_transformers
from clipcore.towers.model import CLIP


def export_model(
    model: CLIP,
    tokenizer: Tokenizer,
    target: str,
    folder: Path,
    note: Callable[[str], None] = lambda line: None,
    is_checked: bool = True,
) -> None:
    """Write a model with its preprocessing and vocabulary for another package, and check it by loading it.

    Args:
        model: made float32, moved to the CPU and set to evaluation mode.
        target: one of ``TARGETS``.
        folder: a new folder, or an empty one.
        note: called with each line that says what was checked.
        is_checked: False leaves the check out.

    Raises:
        ValueError: the package cannot hold the model or its vocabulary, or loads another model from what was written.
        OSError: the folder is not empty, or cannot be written. In all cases nothing is left in it.
    """
    if target not in TARGETS:
        raise ValueError(f"a model is exported to {', '.join(TARGETS)}, got {target!r}")
    folder = Path(os.path.abspath(folder))
    is_usable = not folder.is_symlink() and folder.is_dir() and not os.path.ismount(folder)
    if os.path.lexists(folder) and (not is_usable or any(folder.iterdir())):
        raise ValueError(
            f"{folder} is there already, and not an empty folder of its own; name another one"
        )
    if folder == Path.cwd():
        raise ValueError("the current folder cannot be replaced; name a new one")
    is_openai = tokenizer.sha256 == OPENAI_SHA256
    if target == "openai" and not is_openai:
        raise ValueError(
            "OpenAI's package has its own vocabulary, and this model another one; export it to open_clip or transformers"
        )
    model = model.float().cpu().eval()

    parents = [path for path in folder.parents if not path.exists()]
    # A name of its own, however long the folder's is.
    aside = folder.with_name(f".export.{secrets.token_hex(4)}.tmp")
    try:
        make_directory(folder.parent)
        aside.mkdir()
        _write(model, tokenizer, target, aside, is_openai)
        for line in check_export(model, tokenizer, aside, target) if is_checked else ():
            note(line)
        for path in aside.iterdir():
            _sync(path)
        # An empty folder of that name is replaced.
        aside.rename(folder)
        sync_directory(folder.parent)
    except OSError as error:
        if error.filename is None or str(aside) in str(error.filename):
            # The temporary name means nothing to the user.
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            # The nearest first; those that hold something stay.
            for path in parents:
                path.rmdir()


def open_clip_can_hold(config: ModelConfig) -> bool:
    """Return whether open_clip has such a model: SigLIP's image towers it has in timm's sizes only."""
    return not config.vision.has_map or "timm_model_name" in config.to_dict()["vision_cfg"]


def _write(model: CLIP, tokenizer: Tokenizer, target: str, folder: Path, is_openai: bool) -> None:
    if target == "open_clip":
        if not open_clip_can_hold(model.config):
            raise ValueError(
                "open_clip has SigLIP's image towers in timm's sizes only, and this is none of them; model.save_pretrained "
                "writes it for clipcore"
            )
        write_open_clip(model, folder, has_own_vocabulary=not is_openai)
    elif target == "openai":
        write_openai(model, folder)
    elif target == "transformers":
        write_transformers(model, folder)
    else:
        write_onnx(model, folder)
    if target != "openai":
        write_tokenizer(tokenizer, folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
