"""Reads other people's weights, files and folders of every origin, into tensors by name, without running their code."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch import Tensor

from clipcore.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    load_latest,
    read_safetensors,
)
from clipcore.files import open_regular, read_regular
from clipcore.terminal import first_line
from clipcore.towers.architectures import ModelConfig, shortened
from clipcore.towers.descriptions import read_description, recorded_images
from clipcore.towers.torchscript import (
    TorchScriptError,
    TorchScriptWeights,
    is_torchscript,
    read_torchscript,
)

# Files in a model's folder as open_clip and Hugging Face name them, preferred names first.
_WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
# Keys under which training programs store weights, preferred ones first. The logit scale identifies a CLIP's weights.
_USUAL_KEYS = ("state_dict", "model")
_MAX_NESTING = 4
_SCALE_NAME = "logit_scale"
_SCALE = re.compile(rf"(?:^|\.){_SCALE_NAME}$")
_INDEX_SUFFIX, _MAX_INDEX_BYTES = ".index.json", 1 << 22
# Modules that torch wraps around others, whose names it inserts into the others' names.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# The name of one of several files of weights in an index.
_PART = re.compile(r"(.+)-\d{5}-of-\d{5}(\.safetensors|\.bin)")
# Limits for a PyTorch file, which may claim more than it holds.
_ZIP_START = b"PK\x03\x04"
_MOST_PICKLES, _MAX_OPCODES, _MAX_TREE_BYTES = 5, 200_000, 8 << 20
_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class Weights:
    """Weights by name, and the description of their model in their file or folder.

    Attributes:
        tensors: on the CPU, under their original names.
        config: the model, if it is described.
        quick_gelu: whether its activation is QuickGELU; None if unknown.
        images: its preprocessing, as arguments of ``ImageTransform``; empty if unknown.
        witness: the source of the description, as the beginning of a sentence.
    """

    tensors: dict[str, Tensor]
    config: ModelConfig | None = None
    quick_gelu: bool | None = None
    images: dict[str, Any] = field(default_factory=dict)
    witness: str = ""


def load_state_dict_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of ``read_weights``."""
    return read_weights(path).tensors


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Return weights, on the CPU, from a file or folder of any origin; no code in them runs.

    It accepts a safetensors file; a PyTorch file of tensors, bare or in a dictionary, as training programs save them; the
    index of weights in several files; OpenAI's TorchScript archives (``torchscript.py``); a folder that holds one of them
    under its usual name; a checkpoint or run of clipcore (its moving average, if it has one). Parts of names that wrappers
    add, such as ``module.``, are removed.

    The model's description is read from open_clip_config.json, config.json and preprocessor_config.json beside a file with
    a usual name, from a run's own record, and from the classes of a TorchScript archive.

    Raises:
        CheckpointError: there is no such file, it holds no weights, is damaged, or would run code.
        ConversionError: the description beside it is damaged, or describes a model that clipcore does not have.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    try:
        _check_start(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot read the weights {path}: {error.strerror}{_hint_for_tag(path)}"
        ) from error
    is_in_checkpoint = (path.parent / MANIFEST).is_file()
    if not is_in_checkpoint and (part := _PART.fullmatch(path.name)) is not None:
        raise CheckpointError(
            f"{path} is one part of several; name their index, {part[1]}{part[2]}{_INDEX_SUFFIX}, or the folder"
        )
    is_described = path.name in _WEIGHT_FILES and not is_in_checkpoint
    described = read_description(path.parent) if is_described else None
    try:
        classes: frozenset[str] = frozenset()
        if path.name.endswith(_INDEX_SUFFIX):
            content: object = _read_parts(path)
        elif path.suffix == ".safetensors":
            content = read_safetensors(path, "cpu")
        elif is_torchscript(path):
            archive = _load_torchscript(path)
            content, classes = archive.tensors, archive.classes
        else:
            content = _load_pickled_tensors(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot read the weights {path}: {error.strerror or error}"
        ) from error

    tensors, is_openai = _unwrap(content, path)
    if is_in_checkpoint:
        # A file of a checkpoint, whose run describes its model.
        return _of_run(load_checkpoint(path.parent, lazily=True), tensors)
    if described is not None:
        config = described.config
        witness = f"{described.origin} says"
        return Weights(tensors, config, config.quick_gelu, described.images, witness)
    activations = classes & {"QuickGELU", "GELU"}
    if len(activations) == 1:
        return Weights(tensors, None, "QuickGELU" in activations, {}, f"the code in {path} says")
    if is_openai:
        names = ", ".join(_OPENAI_EXTRAS)
        return Weights(tensors, None, True, {}, f"{path} holds {names}, as OpenAI's files do:")
    return Weights(tensors)


def _check_start(path: Path) -> None:
    """Raise CheckpointError for a Git LFS pointer instead of weights, OSError for a path that cannot be read as a file."""
    if read_regular(path, 64).startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights; fetch them with git lfs pull"
        )


def _hint_for_tag(path: Path) -> str:
    """Return a hint for a path that is not a file but, for example, open_clip's name of published weights."""
    folder = path.parts[:-1]
    is_file = path.suffix in (".pt", ".pth", ".bin", ".safetensors", ".json")
    # A tag, or an organisation and its model, without such a folder.
    is_name = not folder or (
        len(folder) == 1 and not path.is_absolute() and not path.parent.exists()
    )
    if is_file or not is_name or os.path.lexists(path):
        return ""
    return (
        f"; if {path} is a name of published weights, download them: clipcore downloads nothing, and takes their file or "
        "folder"
    )


def _read_parts(path: Path) -> dict[str, Tensor]:
    """Return the weights in several files that an index names; each must hold the tensors that the index assigns to it.

    Raises:
        CheckpointError: the index is damaged, or a file lacks one of its tensors.
    """
    try:
        content = json.loads(read_regular(path, _MAX_INDEX_BYTES))
        places = dict(content["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an index of weights; download it again") from error
    files: dict[str, list[str]] = {}
    for name, file in places.items():
        # The file must lie beside the index, and must not be an index itself.
        if not _is_file_name(file) or file.endswith(_INDEX_SUFFIX):
            raise CheckpointError(f"{path} names {shortened(file)}, which is not a file beside it")
        files.setdefault(file, []).append(name)

    weights: dict[str, Tensor] = {}
    for file, names in files.items():
        part = path.parent / file
        is_safe = part.suffix == ".safetensors"
        try:
            _check_start(part)
            held = read_safetensors(part, "cpu") if is_safe else _load_pickled_tensors(part)
        except OSError as error:
            raise CheckpointError(
                f"cannot read the weights {part}: {error.strerror or error}; {path.name} names it"
            ) from error
        for name in names:
            if not isinstance(held, Mapping) or name not in held:
                raise CheckpointError(
                    f"{part} holds no {name}, as {path.name} says; download both again"
                )
            weights[name] = held[name]
    return weights


def _is_file_name(name: object) -> bool:
    """Return whether a value can be the name of a file in the same folder."""
    if not isinstance(name, str) or "\0" in name or Path(name).name != name:
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # one half of a surrogate pair
        return False
    return True


def _load_folder(path: Path) -> Weights:
    if (path / MANIFEST).is_file():
        checkpoint: Checkpoint | None = load_checkpoint(path)
    else:
        inner = path / "checkpoints"
        checkpoint = load_latest(inner if inner.is_dir() else path)
    if checkpoint is not None:
        groups = checkpoint.tensors
        if not groups.keys() & {"ema", "model"}:
            raise CheckpointError(f"{checkpoint.path} holds no model")
        return _of_run(checkpoint, dict(groups["ema" if "ema" in groups else "model"]))
    for name in _WEIGHT_FILES:
        if (path / name).is_file():
            return read_weights(path / name)
    raise CheckpointError(
        f"{path} holds no weights: neither a checkpoint of a run nor any of {', '.join(_WEIGHT_FILES)}"
    )


def _of_run(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> Weights:
    """Return the weights of a checkpoint with the run's record of its model."""
    identity = checkpoint.state.get("identity")
    # Tensors that were saved as a checkpoint without a run.
    if not isinstance(identity, dict) or not isinstance(identity.get("model"), dict):
        return Weights(tensors)
    try:
        config = ModelConfig.from_dict(identity["model"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.path} is of a model that cannot be made: {error}"
        ) from error
    images = recorded_images(identity, checkpoint.path)
    witness = f"the run of {checkpoint.path} says"
    return Weights(tensors, config, config.quick_gelu, images, witness)


def _load_torchscript(path: Path) -> TorchScriptWeights:
    try:
        return read_torchscript(path)
    except TorchScriptError as error:
        raise CheckpointError(
            f"cannot read weights from the TorchScript archive {path}: {error}; download it again, or save the model's "
            "state_dict() where you trust its origin"
        ) from error


def _load_pickled_tensors(path: Path) -> object:
    """Return torch.load's result, restricted to tensors and plain containers."""
    _check_cost(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"nsupported (?:global: )?GLOBAL ([\w.]+)", str(error))
        if wanted is not None:
            raise CheckpointError(
                f"{path} is refused: loading it would call {wanted.group(1)}, which weights do not need; nothing was "
                "run. Ask for the weights as safetensors, or convert them where you trust their origin"
            ) from None
        raise CheckpointError(
            f"{path} is not a file of weights, or is damaged; download it again"
        ) from None
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
    ) as error:
        raise CheckpointError(
            f"{path} is not a file of weights, or is damaged ({first_line(error)}); download it again"
        ) from None


def _check_cost(path: Path) -> None:
    """Raise CheckpointError for a PyTorch file whose loading would take far more memory than its size."""

    def refuse(reason: str) -> NoReturn:
        raise CheckpointError(
            f"{path} is refused: {reason}, as no torch.save writes it; ask for the weights as safetensors"
        )

    with open_regular(path) as file:
        is_zip = file.read(4) == _ZIP_START
        file.seek(0)
        if not is_zip:
            _check_pickles(file, refuse)
            return
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
                size = os.fstat(file.fileno()).st_size
                if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                    refuse("it holds compressed records")
                if sum(info.file_size for info in infos) > size:
                    refuse("its records overlap")
                for info in infos:
                    if info.filename.rpartition("/")[2] == "data.pkl":
                        if info.file_size > _MAX_TREE_BYTES:
                            refuse("its objects are too many")
                        with archive.open(info) as record:
                            # torch.save may omit the checksum, and torch.load does not verify it.
                            record._expected_crc = None  # type: ignore[attr-defined]
                            _check_pickles(io.BytesIO(record.read()), refuse)
        except CheckpointError:
            raise
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError):
            raise CheckpointError(
                f"{path} is not a file of weights, or is damaged; download it again"
            ) from None


def _check_pickles(file: IO[bytes], refuse: Callable[[str], NoReturn]) -> None:
    """Refuse pickles with too many objects, or that allocate bytes by size; an older torch.save wrote five per file."""
    num_opcodes = 0
    for _ in range(_MOST_PICKLES):
        try:
            for _, argument, _ in pickletools.genops(file):
                num_opcodes += 1
                if num_opcodes > _MAX_OPCODES:
                    refuse("its objects are too many")
                if argument in ("bytearray", "builtins bytearray", "__builtin__ bytearray"):
                    refuse("it makes bytes of nothing")
        except CheckpointError:
            raise
        except Exception:  # any error, if it is not a pickle: torch.load then reports the problem
            return


def _unwrap(content: object, path: Path) -> tuple[dict[str, Tensor], bool]:
    """Return the weights in a file's content, under plain names, and whether it has the extra keys of OpenAI's files."""
    content = _innermost(content, path)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no weights: it is a {type(content).__name__}")
    weights: dict[str, Tensor] = {}
    is_openai = all(name in content for name in _OPENAI_EXTRAS)
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} holds more than weights by name: {name!r} is a {type(value).__name__}"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise CheckpointError(
                f"{path} holds weights that clipcore's models do not have: {name!r} is {value.dtype}, {value.layout}"
            )
        if value.is_meta:
            raise CheckpointError(
                f"{path} holds shapes without numbers: {name!r} is on the device meta"
            )
        if name not in _OPENAI_EXTRAS:
            weights[name] = value
    return _without_wrappers(weights, path), is_openai


def _innermost(content: object, path: Path) -> object:
    """Return the dictionary of weights in nested ones: under usual keys only, or the only one with a CLIP."""
    clips = dict(_clips(content, (), set()))
    usual = [keys for keys in clips if all(key in _USUAL_KEYS for key in keys)]
    if usual:
        return clips[min(usual, key=lambda keys: [_USUAL_KEYS.index(key) for key in keys])]
    if len(clips) == 1:
        return next(iter(clips.values()))
    if clips:
        names = " and ".join(repr(".".join(keys)) for keys in clips)
        raise CheckpointError(
            f"{path} holds weights more than once, under {names}: save the one that is meant by itself, as a "
            "safetensors file or with torch.save"
        )
    # Weights of another model, or of half a CLIP.
    for _ in _USUAL_KEYS:
        if not isinstance(content, Mapping):
            break
        inner = [content[key] for key in _USUAL_KEYS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    return content


def _clips(
    content: object, keys: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield the nested dictionaries that hold a CLIP, with the keys that lead to them.

    Args:
        seen: ids of the dictionaries that were visited, because one may hold itself.
    """
    if not isinstance(content, Mapping) or id(content) in seen:
        return
    seen.add(id(content))
    if _is_clip(content):
        yield keys, content
    elif len(keys) < _MAX_NESTING:
        for key, value in content.items():
            if isinstance(key, str):
                yield from _clips(value, (*keys, key), seen)


def _is_clip(content: object) -> bool:
    """Return whether a dictionary holds tensors with a CLIP's names, under any prefix."""
    return isinstance(content, Mapping) and any(
        isinstance(name, str) and isinstance(value, Tensor) and _SCALE.search(name)
        for name, value in content.items()
    )


def _without_wrappers(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return weights with the names of wrapper modules removed."""
    plain = {_WRAPPERS.sub("", name): value for name, value in weights.items()}
    # If two names would become equal, they are not a wrapper's.
    weights = plain if len(plain) == len(weights) else weights
    prefixes = [name.removesuffix(_SCALE_NAME) for name in weights if _SCALE.search(name)]
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{path} holds weights more than once, under {' and '.join(map(repr, prefixes))}: save those of one by "
            "themselves"
        )
    if not prefixes or not prefixes[0]:
        return weights

    prefix = prefixes[0]
    if others := [name for name in weights if not name.startswith(prefix)]:
        raise CheckpointError(
            f"{path} holds a CLIP under {prefix!r} and others beside it, such as {others[0]!r}: save those of the CLIP by "
            "themselves"
        )
    return {name.removeprefix(prefix): value for name, value in weights.items()}
