"""The configuration of a training run: one frozen dataclass, whose fields are the command line.

Flags keep the names and the meaning that open_clip's users know. A field that is ``None`` takes the value of a recipe
(``resolve``): the paper's for user data, a small one for the embedded data.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import os
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from clipcore.data.embedded import EMBEDDED
from clipcore.data.transforms import MAX_PIXELS
from clipcore.run.schedule import SCHEDULES
from clipcore.terminal import is_printable, printable
from clipcore.towers.architectures import OPENAI_NAMES, QUICK_GELU_SUFFIX


class ConfigError(ValueError):
    """A setting that cannot work; the message names it and the remedy."""


DATA, MODEL, OPTIMISATION, COST, EVALUATION, RUN, ACCEPTED = (
    "data",
    "model",
    "optimisation",
    "memory and speed",
    "evaluation",
    "run, logs and checkpoints",
    "accepted from open_clip, without effect",
)

# How the loss treats pairs of equal captions: as negatives, left out, or as positives.
DUPLICATE_CAPTIONS = ("negative", "ignore", "positive")


def _option(default: Any, group: str, help: str, **arguments: Any) -> Any:
    metadata = {"group": group, "help": help, "arguments": arguments}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of ``python -m clipcore.train``."""

    train_data: str = _option(
        "glyphs", DATA, "'glyphs', 'icons', tar shards {000..099} (a::b mixes), a table, a folder"
    )
    train_data_upsampling_factors: str | None = _option(
        None, DATA, "weights of the mixed sources, 1::2", metavar="W"
    )
    train_num_samples: int | None = _option(
        None, DATA, "samples of an epoch [all of the data]", metavar="N"
    )
    dataset_type: str = _option(
        "auto",
        DATA,
        "kind of the data",
        choices=("auto", "webdataset", "csv", "jsonl", "parquet", "folder", "synthetic"),
        metavar="KIND",
    )
    csv_img_key: str = _option("filepath", DATA, "image column of a table", metavar="KEY")
    csv_caption_key: str = _option("title", DATA, "caption column of a table", metavar="KEY")
    csv_separator: str | None = _option(
        None, DATA, "separator of a csv table [tab, or , ; | by its header]", metavar="SEP"
    )
    csv_no_quotes: bool = _option(False, DATA, "quotation marks in a csv table are text")
    image_decoder: str = _option("pillow", DATA, "JPEG decoder", choices=("pillow", "simplejpeg"))
    max_pixels: int = _option(
        MAX_PIXELS, DATA, "pixels of a picture; one of more is unreadable", metavar="N"
    )
    max_bad_fraction: float = _option(
        0.01, DATA, "share of unreadable samples that stops the run", metavar="X"
    )
    aug_scale: float | None = _option(
        None, DATA, "smallest share of the area that the random crop keeps", metavar="X"
    )
    aug_ratio: float | None = _option(
        None, DATA, "most uneven sides of the crop; 1 is the paper's square", metavar="X"
    )
    aug_resize: int | None = _option(
        None,
        DATA,
        "in their place: resize the shorter side to so many pixels, then cut out the crop",
        metavar="N",
    )
    tokenizer: str | None = _option(None, DATA, "'openai', 'bytes', a vocabulary file, or 'train'")
    vocab_size: int | None = _option(
        None, DATA, "size of a vocabulary made by --tokenizer train", metavar="N"
    )
    workers: int | None = _option(None, DATA, "data loader processes a device", metavar="N")

    model: str | None = _option(
        None, MODEL, "architecture: a name of clipcore.list_models()", metavar="NAME"
    )
    pretrained: str | None = _option(
        None, MODEL, "weights to start from: OpenAI's, open_clip's, a run", metavar="FILE"
    )
    force_image_size: int | None = _option(
        None, MODEL, "pixels; position embeddings are resized", metavar="N"
    )
    force_quick_gelu: bool = _option(False, MODEL, "QuickGELU in both towers")
    force_patch_dropout: float | None = _option(
        None, MODEL, "share of patches dropped in training", metavar="X"
    )
    lock_image: bool = _option(False, MODEL, "train the text tower alone (LiT)")
    lock_image_unlocked_groups: int = _option(
        0, MODEL, "last groups of the image tower left free", metavar="N"
    )
    lock_image_freeze_bn_stats: bool = _option(
        False, MODEL, "freeze BatchNorm statistics of locked layers"
    )
    lock_text: bool = _option(False, MODEL, "train the image tower alone")
    lock_text_unlocked_layers: int = _option(
        0, MODEL, "last layers of the text tower left free", metavar="N"
    )

    epochs: int | None = _option(None, OPTIMISATION, "passes over the data", metavar="N")
    global_batch_size: int | None = _option(
        None, OPTIMISATION, "pairs of the loss, on all devices together", metavar="N"
    )
    batch_size: int | None = _option(
        None, OPTIMISATION, "in its place: pairs a device, times --accum-freq", metavar="N"
    )
    accum_freq: int = _option(
        1, OPTIMISATION, "micro-batches of --batch-size a device and step, exact", metavar="K"
    )
    lr: float | None = _option(
        None, OPTIMISATION, "peak learning rate [the paper's for the model]", metavar="X"
    )
    beta1: float | None = _option(None, OPTIMISATION, "AdamW [table 18 of the paper]", metavar="X")
    beta2: float | None = _option(None, OPTIMISATION, "AdamW [table 18]", metavar="X")
    eps: float | None = _option(None, OPTIMISATION, "AdamW [table 18]", metavar="X")
    wd: float | None = _option(
        None, OPTIMISATION, "weight decay, not on gains and biases", metavar="X"
    )
    warmup: int | None = _option(None, OPTIMISATION, "steps of linear warm-up", metavar="N")
    lr_scheduler: str = _option(
        "cosine", OPTIMISATION, "after the warm-up", choices=SCHEDULES, metavar="NAME"
    )
    epochs_cooldown: int | None = _option(
        None, OPTIMISATION, "epochs of const-cooldown's end", metavar="N"
    )
    lr_cooldown_end: float = _option(0.0, OPTIMISATION, "learning rate at its end", metavar="X")
    lr_cooldown_power: float = _option(1.0, OPTIMISATION, "power of its decay", metavar="X")
    skip_scheduler: bool = _option(False, OPTIMISATION, "constant learning rate, no warm-up")
    grad_clip_norm: float | None = _option(
        None, OPTIMISATION, "clip the gradient's L2 norm", metavar="X"
    )
    ema_decay: float | None = _option(
        None, OPTIMISATION, "evaluate a moving average of the weights", metavar="X"
    )
    siglip: bool = _option(
        False, OPTIMISATION, "SigLIP's sigmoid loss, with its first scale and bias"
    )
    label_smoothing: float = _option(
        0.0, OPTIMISATION, "share of each target that is spread over the whole batch", metavar="X"
    )
    duplicate_captions: str = _option(
        "negative",
        OPTIMISATION,
        "pairs of equal captions: 'negative', 'ignore' (left out) or 'positive'",
        choices=DUPLICATE_CAPTIONS,
        metavar="KIND",
    )
    seed: int = _option(0, OPTIMISATION, "of the weights, the order and the crops", metavar="N")

    precision: str | None = _option(
        None,
        COST,
        "arithmetic [amp_bf16 on a GPU, else fp32]; bf16 holds the matrices in 16 bits too",
        choices=("fp32", "amp_bf16", "amp_bfloat16", "amp", "bf16"),
    )
    adam_moments: str = _option(
        "fp32",
        COST,
        "AdamW's moments; bf16, rounded without bias, takes 4 bytes a weight less",
        choices=("fp32", "bf16"),
    )
    micro_batch_size: int | None = _option(
        None, COST, "pairs that a device embeds at once [found]", metavar="N"
    )
    keep_graphs: int | None = _option(
        None, COST, "micro-batches that are not embedded twice [as many as fit]", metavar="N"
    )
    step_memory: float | None = _option(
        None, COST, "GB of a step beside the model [90%% of a free GPU; 4 on a CPU]", metavar="X"
    )
    verify_gradients: bool = _option(
        False, COST, "first compare a small step with plain float64, and stop if they differ"
    )
    grad_checkpointing: bool = _option(False, COST, "recompute activations in the backward pass")
    fsdp: bool = _option(
        False,
        COST,
        "split weights, gradients and moments among the ranks (FSDP2), for large models",
    )
    torchcompile: bool = _option(False, COST, "compile the towers with torch.compile")
    profile: bool = _option(
        False, COST, "record steps 5 to 7: trace, and time and floor of every operator"
    )
    threads: int | None = _option(
        None, COST, "threads of a process on a CPU [1 or all, whichever is faster]", metavar="N"
    )
    device: str | None = _option(
        None, COST, "'cpu' or 'cuda' [cuda where there is one]", metavar="NAME"
    )

    val_data: str | None = _option(
        None, EVALUATION, "pairs for retrieval and validation loss", metavar="DATA"
    )
    val_frequency: int | None = _option(
        None, EVALUATION, "epochs between retrievals, 0 for never", metavar="N"
    )
    imagenet_val: str | None = _option(
        None, EVALUATION, "folder of one folder a class: zero-shot accuracy", metavar="DIR"
    )
    zeroshot_frequency: int | None = _option(
        None, EVALUATION, "epochs between zero-shot evaluations, 0 for never", metavar="N"
    )

    logs: str = _option("./logs", RUN, "folder of all runs", metavar="DIR")
    name: str | None = _option(None, RUN, "folder of this run in it [date, model, batch]")
    resume: str | None = _option(
        None, RUN, "'latest', a run's folder, or a checkpoint", metavar="WHAT"
    )
    new_log: bool = _option(
        False, RUN, "resume although metrics.jsonl is not as the checkpoint left it; set it aside"
    )
    save_frequency: int = _option(1, RUN, "epochs between checkpoints, 0 for none", metavar="N")
    save_every_steps: int | None = _option(None, RUN, "steps between checkpoints", metavar="N")
    save_every_minutes: float | None = _option(
        None, RUN, "minutes between checkpoints", metavar="X"
    )
    keep_checkpoints: int = _option(3, RUN, "newest checkpoints kept, 0 for all", metavar="K")
    delete_previous_checkpoint: bool = _option(False, RUN, "same as --keep-checkpoints 1")
    report_to: str = _option(
        "", RUN, "'tensorboard', 'wandb', 'all', comma separated", metavar="NAMES"
    )
    wandb_project_name: str = _option("clipcore", RUN, "Weights & Biases project", metavar="NAME")
    log_every_n_steps: int = _option(1, RUN, "steps between lines of metrics.jsonl", metavar="N")
    quiet: bool = _option(False, RUN, "no progress bar")
    timeout: float = _option(
        600.0, RUN, "seconds that a rank may keep the others waiting", metavar="S"
    )

    local_loss: bool = _option(False, ACCEPTED, "the loss is always the exact one")
    gather_with_grad: bool = _option(False, ACCEPTED, "likewise")
    dataset_resampled: bool = _option(False, ACCEPTED, "each epoch sees each sample once")
    lock_text_freeze_layer_norm: bool = _option(False, ACCEPTED, "locked layers are frozen whole")
    save_most_recent: bool = _option(False, ACCEPTED, "--resume latest needs no extra file")

    def __post_init__(self) -> None:
        _check_types(self)
        _check(self)


def _check_types(config: TrainConfig) -> None:
    """Refuses values that no flag gives, such as those of a config.json that somebody edited."""
    for name, kind in _kinds().items():
        value, flag = getattr(config, name), f"--{name.replace('_', '-')}"
        if value is None and kind.is_optional:
            continue
        is_whole = type(value) is int
        if type(value) is not kind.type and not (kind.type is float and is_whole):
            raise ConfigError(f"{flag} is {value!r}, which is no {_WORDS[kind.type]}")
        is_unlimited = name == "grad_clip_norm" and value == math.inf
        if isinstance(value, float) and not math.isfinite(value) and not is_unlimited:
            raise ConfigError(f"{flag} is a finite number, got {value}")
        if is_whole and abs(value) > _MAX_WHOLE:
            raise ConfigError(f"{flag} has too many digits for a number of 64 bits")
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"{flag} holds a zero byte, which no name or path does")
        if kind.choices and value not in kind.choices:
            raise ConfigError(f"{flag} is one of {', '.join(kind.choices)}, got {value!r}")


_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
# What torch and numpy take for a whole number.
_MAX_WHOLE = (1 << 63) - 1
# More are a mistake: OpenMP ends the process where it cannot start them.
_MAX_THREADS = 1024
_MAX_TIMEOUT_S = 10**8
_MAX_RATIO = 100
_MIN_SCALE = 1e-4


class _Kind(NamedTuple):
    """What a setting may be."""

    type: type
    is_optional: bool
    choices: Sequence[str]


@functools.cache
def _kinds() -> dict[str, _Kind]:
    hints = typing.get_type_hints(TrainConfig)
    kinds = {}
    for field in dataclasses.fields(TrainConfig):
        types = typing.get_args(hints[field.name]) or (hints[field.name],)
        plain = next(t for t in types if t is not type(None))
        choices = tuple(field.metadata["arguments"].get("choices", ()))
        kinds[field.name] = _Kind(plain, type(None) in types, choices)
    return kinds


def _check(config: TrainConfig) -> None:
    """Refuses values that no run can use."""
    for name in (
        "epochs",
        "global_batch_size",
        "batch_size",
        "accum_freq",
        "micro_batch_size",
        "keep_graphs",
        "threads",
        "train_num_samples",
        "save_every_steps",
        "log_every_n_steps",
        "aug_resize",
        "max_pixels",
        "force_image_size",
        "vocab_size",
    ):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in (
        "warmup",
        "workers",
        "save_frequency",
        "keep_checkpoints",
        "zeroshot_frequency",
        "val_frequency",
        "seed",
        "wd",
        "lock_image_unlocked_groups",
        "lock_text_unlocked_layers",
        "epochs_cooldown",
        "lr_cooldown_end",
        "lr_cooldown_power",
    ):
        value = getattr(config, name)
        if value is not None and value < 0:
            raise ConfigError(f"--{name.replace('_', '-')} must not be negative, got {value}")
    if config.aug_ratio is not None and not 1 <= config.aug_ratio <= _MAX_RATIO:
        raise ConfigError(
            f"--aug-ratio is 1, for square crops, to {_MAX_RATIO}; got {config.aug_ratio:g}"
        )
    if config.aug_scale is not None and not _MIN_SCALE <= config.aug_scale <= 1:
        raise ConfigError(
            f"--aug-scale is a share of the area, from {_MIN_SCALE:g} to 1; got {config.aug_scale:g}"
        )
    if config.aug_resize is not None and (config.aug_scale, config.aug_ratio) != (None, None):
        raise ConfigError(
            "--aug-resize takes the place of --aug-scale and --aug-ratio; leave one or the other out"
        )
    for name in ("lr", "eps", "grad_clip_norm", "save_every_minutes", "step_memory", "timeout"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be positive, got {value}")
    for name in (
        "force_patch_dropout",
        "max_bad_fraction",
        "beta1",
        "beta2",
        "ema_decay",
    ):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"--{name.replace('_', '-')} must lie between 0 and 1, got {value}")
    if not 0 <= config.label_smoothing < 1:
        raise ConfigError(
            f"--label-smoothing must be at least 0 and less than 1, got {config.label_smoothing:g}"
        )
    if config.siglip and config.label_smoothing > 0:
        raise ConfigError(
            "--label-smoothing is of the softmax loss, and --siglip has none; leave one of them out"
        )
    if config.fsdp and config.torchcompile:
        raise ConfigError("--fsdp and --torchcompile do not go together; leave one of them out")
    if config.fsdp and config.precision == "bf16":
        # fully_shard wants one dtype for all weights of a module.
        raise ConfigError("--fsdp splits float32 weights: take --precision amp_bf16 with it")
    if config.profile and config.torchcompile:
        raise ConfigError(
            "--profile names operators, which --torchcompile merges; leave one of them out"
        )
    for name in ("threads", "workers"):
        value = getattr(config, name)
        if value is not None and value > _MAX_THREADS:
            raise ConfigError(f"--{name} is at most {_MAX_THREADS}, got {value}")
    if config.timeout > _MAX_TIMEOUT_S:
        raise ConfigError(
            f"--timeout is at most {_MAX_TIMEOUT_S:,} seconds, got {config.timeout:g}"
        )
    if config.lr_scheduler == "const-cooldown" and config.epochs_cooldown is None:
        raise ConfigError("--lr-scheduler const-cooldown needs --epochs-cooldown N")
    if (unknown := set(reporters(config)) - {"tensorboard", "wandb"}) != set():
        raise ConfigError(
            f"--report-to knows tensorboard, wandb and all, not {', '.join(sorted(unknown))}"
        )


def reporters(config: TrainConfig) -> tuple[str, ...]:
    """The names in ``--report-to``."""
    if config.report_to == "all":
        return ("tensorboard", "wandb")
    return tuple(name.strip() for name in config.report_to.split(",") if name.strip())


# The paper's learning rates that are not the 5e-4 of the other models (tables 19 and 20).
PAPER_LEARNING_RATES = {
    "RN50x16": 4e-4,
    "RN50x64": 3.6e-4,
    "ViT-L-14": 4e-4,
    "ViT-L-14-336": 2e-5,
}

PAPER_RECIPE: dict[str, Any] = {
    "model": "ViT-B-32",
    "epochs": 32,
    "batch_size": 64,
    "lr": 5e-4,
    "wd": 0.2,
    "warmup": 2000,
    "aug_scale": 0.9,
    "aug_ratio": 4 / 3,
    "val_frequency": 1,
    "zeroshot_frequency": 2,
    "tokenizer": "openai",
    "vocab_size": 3072,
    "workers": 4,
}


def resolve(config: TrainConfig) -> TrainConfig:
    """Fills the unset fields from the recipe of the data; what depends on the number of steps stays for the run."""
    embedded = EMBEDDED.get(config.train_data)
    recipe = dict(PAPER_RECIPE if embedded is None else embedded.recipe)
    # More processes than cores only take turns.
    recipe["workers"] = min(recipe["workers"], len(os.sched_getaffinity(0)))
    if config.model is not None and embedded is None:
        name = OPENAI_NAMES.get(config.model, config.model).removesuffix(QUICK_GELU_SUFFIX)
        recipe["lr"] = PAPER_LEARNING_RATES.get(name, recipe["lr"])
    unset = {name: value for name, value in recipe.items() if getattr(config, name) is None}
    if config.global_batch_size is not None:
        unset.pop("batch_size", None)
    if config.aug_resize is not None:
        unset = {name: unset[name] for name in unset if name not in ("aug_scale", "aug_ratio")}
    if config.delete_previous_checkpoint:
        unset["keep_checkpoints"] = 1
    return dataclasses.replace(config, **unset)


def in_global_batches(config: TrainConfig, world_size: int) -> TrainConfig:
    """The same with ``--batch-size`` and ``--accum-freq`` turned into a global batch and its micro-batches.

    open_clip's ``--batch-size`` is what a device embeds at once, ``--accum-freq`` how often a step does so.

    Raises:
        ConfigError: both ways are taken and say different things.
    """
    if config.batch_size is None:
        if config.accum_freq > 1:
            raise ConfigError(
                "--accum-freq counts micro-batches of --batch-size: give that too, or choose --micro-batch-size"
            )
        return config
    total = config.batch_size * config.accum_freq * world_size
    if config.global_batch_size not in (None, total):
        raise ConfigError(
            f"--batch-size {config.batch_size} x --accum-freq {config.accum_freq} x {world_size} devices is {total} "
            f"pairs, and --global-batch-size says {config.global_batch_size}; leave one of them out"
        )
    micro_batch_size = config.micro_batch_size or config.batch_size
    return dataclasses.replace(
        config,
        global_batch_size=total,
        micro_batch_size=micro_batch_size,
        batch_size=None,
        accum_freq=1,
    )


def warmup_steps(config: TrainConfig, explicit: bool, num_steps: int) -> int:
    """The warm-up of a run of ``num_steps``: a recipe's is cut to a tenth of the run, a user's is taken or refused."""
    assert config.warmup is not None
    if explicit and config.warmup > num_steps:
        raise ConfigError(
            f"--warmup {config.warmup} is longer than the run of {num_steps} steps; lower it or raise --epochs"
        )
    return config.warmup if explicit else min(config.warmup, num_steps // 10)


class _Parser(argparse.ArgumentParser):
    """One clear line for a mistake, with the nearest flag for an unknown one."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class _Lines(argparse.HelpFormatter):
    """One line a flag."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=37, width=118)


def build_parser() -> argparse.ArgumentParser:
    """The command line, derived from the fields of ``TrainConfig``."""
    parser = _Parser(
        prog="python -m clipcore.train",
        # A description of its own would be an empty line below it, and the help has two screens.
        usage="python -m clipcore.train [--train-data DATA] [--model NAME] [--global-batch-size N] ...\n"
        "Train a CLIP. Without arguments: five minutes on the embedded pictures of writing.",
        formatter_class=_Lines,
        allow_abbrev=False,
        add_help=False,
    )
    groups = {
        name: parser.add_argument_group(name)
        for name in (DATA, MODEL, OPTIMISATION, COST, EVALUATION, RUN, ACCEPTED)
    }
    for field in dataclasses.fields(TrainConfig):
        add = groups[field.metadata["group"]].add_argument
        flag, help, arguments = (
            f"--{field.name.replace('_', '-')}",
            field.metadata["help"],
            field.metadata["arguments"],
        )
        kind = _kinds()[field.name].type
        if kind is bool:
            add(flag, action="store_true", help=help)
            continue
        if field.default not in (None, ""):
            help += " [%(default)s]"
        add(
            flag,
            type=kind,
            default=field.default,
            help=help,
            **{"metavar": kind.__name__.upper(), **arguments},
        )
    # In a group of its own it would take three lines of the two screens.
    groups[RUN].add_argument("-h", "--help", action="help", help="show this help and exit")
    # A bare --resume means the newest checkpoint.
    resume = next(action for action in parser._actions if action.dest == "resume")
    resume.nargs, resume.const = "?", "latest"
    return parser


_UNSET = object()


def parse_command_line(
    arguments: Sequence[str] | None = None,
) -> tuple[TrainConfig, frozenset[str]]:
    """The configuration that the flags give, and the names of the fields that were given.

    Raises:
        ConfigError: an unknown flag (with the nearest one that exists) or a value that cannot work.
    """
    parser = build_parser()
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    # argparse leaves attributes that exist alone: what is still unset afterwards was not given.
    unset = argparse.Namespace(**dict.fromkeys(names, _UNSET))
    namespace, unknown = parser.parse_known_args(
        sys.argv[1:] if arguments is None else arguments, unset
    )
    if unknown:
        flag = unknown[0].partition("=")[0]
        known = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
        raise ConfigError(
            f"unknown argument {flag}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        )
    given = {name: value for name, value in vars(namespace).items() if value is not _UNSET}
    name = given.get("name")
    if name is not None and (name in (".", "..") or "/" in name or not is_printable(name)):
        raise ConfigError(f"--name is of one folder in --logs, without a slash; got {name!r}")
    for name in ("logs", "name", "resume"):
        # safetensors opens nothing else.
        if not _is_utf8(str(given.get(name, ""))):
            raise ConfigError(
                f"--{name} {printable(str(given[name]))} is not UTF-8; rename the folder"
            )
    return TrainConfig(**given), frozenset(given)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
