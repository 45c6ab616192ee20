"""The settings of a training run: one frozen dataclass, whose fields are the command line.

Flags keep the names and the meaning that open_clip's users know. A field that is ``None`` is either decided later, from the
data, the model or the machine (``recipe.resolve``), or it turns something off.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from clipcore.data import MAX_PIXELS
from clipcore.data.choices import DATASET_TYPES, DECODERS
from clipcore.run.schedule import SCHEDULES


class ConfigError(ValueError):
    """A setting that cannot work; the message names it and the remedy."""


# The last two: what changes nothing, and what a run decides and records, which has no flag.
DATA, MODEL, OPTIMISATION, COST, EVALUATION, RUN, ACCEPTED, RECORDED = (
    "data",
    "model",
    "optimisation",
    "memory and speed",
    "evaluation",
    "run, logs and checkpoints",
    "accepted from open_clip, without effect",
    "recorded",
)

# Recipes by name, whose settings are in recipe.py; those of datacomp are its scales.
PRESETS = (
    *("small", "paper", "glyphs", "icons"),
    *("datacomp-small", "datacomp-medium", "datacomp-large", "datacomp-xlarge"),
)

# How the loss treats pairs of equal captions: as negatives, left out, or as positives.
DUPLICATE_CAPTIONS = ("negative", "ignore", "positive")

# More are a mistake: OpenMP ends the process if it cannot start them.
MAX_THREADS = 1024
_MAX_TIMEOUT_S = 10**8
_MAX_RATIO = 100
_MIN_SCALE = 1e-4
# More than any device has; bytes of it fit into 64 bits.
_MAX_GB = 10**6
_MIN_WORKSPACE_GB = 0.001


class Limits(NamedTuple):
    """The range of a number; ``str`` says it behind "must be"."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def hold(self, value: float) -> bool:
        """Return whether a value is in the range."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = {
            "at least": self.at_least,
            "above": self.above,
            "at most": self.at_most,
            "less than": self.below,
        }
        return " and ".join(f"{word} {n:,}" for word, n in words.items() if n is not None)


def _option(
    default: Any,
    group: str,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    joined_by: str | None = None,
    **arguments: Any,
) -> Any:
    """Return the field of a setting.

    Args:
        at_least, above, at_most, below: the limits of a number; None checks nothing.
        joined_by: what stands between several words of a text behind its flag; None takes one word.
        arguments: of argparse's ``add_argument``.
    """
    metadata = {
        "group": group,
        "help": help,
        "limits": Limits(at_least, above, at_most, below),
        "joined_by": joined_by,
        "arguments": arguments,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of ``python -m clipcore.train``, as a user gives it.

    Raises:
        ConfigError: a value of another type, out of its range, or at odds with another setting.
    """

    train_data: str = _option(
        "glyphs",
        DATA,
        "'glyphs', 'icons', tar shards {000..099} (a::b mixes), a table, a folder, a URL",
    )
    train_data_upsampling_factors: str | None = _option(
        None, DATA, "weights of the mixed sources, 1::2", metavar="W"
    )
    train_num_samples: int | None = _option(
        None, DATA, "samples of an epoch [all of the data]", at_least=1, metavar="N"
    )
    dataset_type: str = _option(
        "auto",
        DATA,
        "auto, webdataset, csv, jsonl, parquet, folder or synthetic",
        choices=DATASET_TYPES,
        metavar="KIND",
    )
    csv_img_key: str = _option("filepath", DATA, "image column of a table", metavar="KEY")
    csv_caption_key: str = _option("title", DATA, "caption column of a table", metavar="KEY")
    csv_separator: str | None = _option(
        None, DATA, "separator of a csv table [tab, or , ; | by its header]", metavar="SEP"
    )
    csv_no_quotes: bool = _option(False, DATA, "read quotation marks in a csv table as text")
    image_decoder: str = _option(
        "pillow", DATA, "JPEG decoder, pillow or simplejpeg", choices=DECODERS
    )
    max_pixels: int = _option(
        MAX_PIXELS,
        DATA,
        "most pixels of an image; a larger one counts as unreadable",
        at_least=1,
        metavar="N",
    )
    max_bad_fraction: float = _option(
        0.01,
        DATA,
        "share of unreadable samples that stops the run",
        at_least=0,
        at_most=1,
        metavar="X",
    )
    data_cache_gb: float | None = _option(
        None,
        DATA,
        "GB for local copies of data at URLs [half of the free disk]",
        at_least=0,
        at_most=_MAX_GB,
        metavar="X",
    )
    aug_scale: float | None = _option(
        None,
        DATA,
        "least share of the area that the random crop keeps",
        at_least=_MIN_SCALE,
        at_most=1,
        metavar="X",
    )
    aug_ratio: float | None = _option(
        None,
        DATA,
        "largest aspect ratio of the crop; 1 is the paper's square",
        at_least=1,
        at_most=_MAX_RATIO,
        metavar="X",
    )
    aug_resize: int | None = _option(
        None,
        DATA,
        "instead of both: resize the shorter side to N pixels, then crop at random",
        at_least=1,
        metavar="N",
    )
    aug_cfg: str | None = _option(
        None,
        DATA,
        "instead of all three, as in open_clip: scale=(0.9,1.0) ratio=(0.75,1.33)",
        joined_by=" ",
        metavar="K=V",
    )
    tokenizer: str | None = _option(None, DATA, "'openai', 'bytes', a vocabulary file, or 'train'")
    vocab_size: int | None = _option(
        None, DATA, "size of the vocabulary that --tokenizer train learns", at_least=1, metavar="N"
    )
    workers: int | None = _option(
        None, DATA, "data loader processes per device", at_least=0, at_most=MAX_THREADS, metavar="N"
    )

    model: str | None = _option(
        None,
        MODEL,
        "one of clipcore.list_models(), or a JSON file as open_clip has",
        metavar="NAME",
    )
    pretrained: str | None = _option(
        None, MODEL, "weights to start from: OpenAI's, open_clip's, or a run", metavar="FILE"
    )
    pretrained_image: str | None = _option(
        None, MODEL, "weights of the image tower alone, its own or a whole CLIP's", metavar="FILE"
    )
    force_image_size: int | None = _option(
        None, MODEL, "image size in pixels; resizes position embeddings", at_least=1, metavar="N"
    )
    force_quick_gelu: bool = _option(False, MODEL, "use QuickGELU in both towers")
    force_patch_dropout: float | None = _option(
        None, MODEL, "share of patches dropped in training", at_least=0, at_most=1, metavar="X"
    )
    distill_model: str | None = _option(
        None, MODEL, "architecture of a teacher whose probabilities are learnt too", metavar="NAME"
    )
    distill_pretrained: str | None = _option(
        None, MODEL, "its weights; those of a run need no --distill-model", metavar="FILE"
    )
    lora_rank: int | None = _option(
        None, MODEL, "train matrices of this rank beside frozen weights", at_least=1, metavar="R"
    )
    lora_alpha: float | None = _option(
        None, MODEL, "their factor, times the rank [the rank]", above=0, metavar="X"
    )
    lock_image: bool = _option(False, MODEL, "train the text tower alone (LiT)")
    lock_image_unlocked_groups: int = _option(
        0, MODEL, "last groups of the image tower to train all the same", at_least=0, metavar="N"
    )
    lock_image_freeze_bn_stats: bool = _option(
        False, MODEL, "freeze the BatchNorm statistics of locked layers"
    )
    lock_text: bool = _option(False, MODEL, "train the image tower alone")
    lock_text_unlocked_layers: int = _option(
        0, MODEL, "last layers of the text tower to train all the same", at_least=0, metavar="N"
    )

    preset: str | None = _option(
        None,
        OPTIMISATION,
        "recipe: small, paper, glyphs, icons, datacomp-small, -medium, -large, -xlarge",
        choices=PRESETS,
        metavar="NAME",
    )
    epochs: int | None = _option(
        None, OPTIMISATION, "passes over the data", at_least=1, metavar="N"
    )
    global_batch_size: int | None = _option(
        None, OPTIMISATION, "pairs of a step, on all devices together", at_least=1, metavar="N"
    )
    batch_size: int | None = _option(
        None,
        OPTIMISATION,
        "instead: pairs per device, times --accum-freq",
        at_least=1,
        metavar="N",
    )
    accum_freq: int = _option(
        1,
        OPTIMISATION,
        "micro-batches of --batch-size per device and step; gradients stay exact",
        at_least=1,
        metavar="K",
    )
    lr: float | None = _option(
        None, OPTIMISATION, "peak learning rate [the paper's for the model]", above=0, metavar="X"
    )
    finetune: bool = _option(
        False,
        OPTIMISATION,
        "low --lr, warm-up of a tenth and layer decay, where they are not given",
    )
    image_layer_decay: float | None = _option(
        None,
        OPTIMISATION,
        "learning rate of a layer of the image tower, times that of the next one",
        above=0,
        at_most=1,
        metavar="X",
    )
    text_layer_decay: float | None = _option(
        None, OPTIMISATION, "the same of the text tower", above=0, at_most=1, metavar="X"
    )
    beta1: float | None = _option(
        None, OPTIMISATION, "AdamW [table 18 of the paper]", at_least=0, at_most=1, metavar="X"
    )
    beta2: float | None = _option(
        None, OPTIMISATION, "AdamW [table 18]", at_least=0, at_most=1, metavar="X"
    )
    eps: float | None = _option(None, OPTIMISATION, "AdamW [table 18]", above=0, metavar="X")
    wd: float | None = _option(
        None, OPTIMISATION, "weight decay, of all but gains and biases", at_least=0, metavar="X"
    )
    warmup: int | None = _option(
        None, OPTIMISATION, "steps of linear warm-up", at_least=0, metavar="N"
    )
    lr_scheduler: str = _option(
        "cosine",
        OPTIMISATION,
        "cosine, const or const-cooldown, after the warm-up",
        choices=SCHEDULES,
        metavar="NAME",
    )
    epochs_cooldown: int | None = _option(
        None, OPTIMISATION, "epochs of const-cooldown's decay", at_least=0, metavar="N"
    )
    lr_cooldown_end: float = _option(
        0.0, OPTIMISATION, "learning rate at its end", at_least=0, metavar="X"
    )
    lr_cooldown_power: float = _option(
        1.0, OPTIMISATION, "power of its decay", at_least=0, metavar="X"
    )
    skip_scheduler: bool = _option(False, OPTIMISATION, "constant learning rate, no warm-up")
    grad_clip_norm: float | None = _option(
        None, OPTIMISATION, "clip the gradient's L2 norm", above=0, metavar="X"
    )
    ema_decay: float | None = _option(
        None,
        OPTIMISATION,
        "evaluate a moving average of the weights",
        at_least=0,
        at_most=1,
        metavar="X",
    )
    wise_alpha: str | None = _option(
        None,
        OPTIMISATION,
        "at the end also write and evaluate (1 - X) start + X end, such as 0.3,0.5",
        metavar="X,X",
    )
    siglip: bool = _option(
        False, OPTIMISATION, "SigLIP's sigmoid loss, with its first scale and bias"
    )
    label_smoothing: float = _option(
        0.0,
        OPTIMISATION,
        "share of each target that is spread over the whole batch",
        at_least=0,
        below=1,
        metavar="X",
    )
    duplicate_captions: str = _option(
        "negative",
        OPTIMISATION,
        "pairs of equal captions: 'negative', 'ignore' (left out) or 'positive'",
        choices=DUPLICATE_CAPTIONS,
        metavar="KIND",
    )
    seed: int = _option(
        0, OPTIMISATION, "seed of weights, order, crops and dropout", at_least=0, metavar="N"
    )

    precision: str | None = _option(
        None,
        COST,
        "fp32, amp_bf16, amp (float16), bf16 (weights too) [GPU: amp_bf16, CPU: fp32]",
        choices=("fp32", "amp_bf16", "amp_bfloat16", "amp", "bf16"),
    )
    adam_moments: str = _option(
        "fp32",
        COST,
        "AdamW's moments: fp32, or bf16 (unbiased), 4 bytes per weight less",
        choices=("fp32", "bf16"),
    )
    micro_batch_size: int | None = _option(
        None, COST, "pairs that a device embeds at once [measured]", at_least=1, metavar="N"
    )
    keep_graphs: int | None = _option(
        None,
        COST,
        "micro-batches that are not embedded twice [as many as fit]",
        at_least=1,
        metavar="N",
    )
    step_memory: float | None = _option(
        None,
        COST,
        "GB of a step beside the model [90%% of a free GPU; 4 on a CPU]",
        above=0,
        metavar="X",
    )
    loss_stash: float | None = _option(
        None,
        COST,
        "GB of logits kept for the backward, 0: none [GPU: 1/8 of free, fp32 0; CPU: 1.07]",
        at_least=0,
        at_most=_MAX_GB,
        metavar="X",
    )
    gpu_stash_bytes: int | None = _option(
        None, RECORDED, "what a run on GPUs decided where --loss-stash is not given", at_least=0
    )
    loss_workspace: float | None = _option(
        None,
        COST,
        "GB of a block of logits [0.512 on a GPU, 0.067 on a CPU]",
        at_least=_MIN_WORKSPACE_GB,
        at_most=_MAX_GB,
        metavar="X",
    )
    verify_gradients: bool = _option(
        False, COST, "first compare a small step with plain float64; stop if they differ"
    )
    grad_checkpointing: bool = _option(False, COST, "recompute activations in the backward pass")
    fsdp: bool = _option(
        False,
        COST,
        "shard weights, gradients and moments over the ranks (FSDP2), for large models",
    )
    torchcompile: bool = _option(False, COST, "train compiled transformer blocks (torch.compile)")
    profile: bool = _option(
        False, COST, "profile steps 5 to 7: a trace, and time and floor of every operator"
    )
    threads: int | None = _option(
        None,
        COST,
        "threads per process on a CPU [1 or all, whichever is faster]",
        at_least=1,
        at_most=MAX_THREADS,
        metavar="N",
    )
    device: str | None = _option(
        None, COST, "'cpu' or 'cuda' [cuda where there is a GPU]", metavar="NAME"
    )

    val_data: str | None = _option(
        None, EVALUATION, "pairs for retrieval and validation loss", metavar="DATA"
    )
    val_frequency: int | None = _option(
        None, EVALUATION, "epochs between retrievals, 0 for never", at_least=0, metavar="N"
    )
    imagenet_val: str | None = _option(
        None,
        EVALUATION,
        "folders with a folder per class, or NAME=DIR: zero-shot accuracy",
        joined_by="::",
        metavar="DIR",
    )
    imagenet_v2: str | None = _option(None, EVALUATION, "one more of them", metavar="DIR")
    zeroshot_frequency: int | None = _option(
        None,
        EVALUATION,
        "epochs between zero-shot evaluations, 0 for never",
        at_least=0,
        metavar="N",
    )

    logs: str = _option("./logs", RUN, "folder of all runs", metavar="DIR")
    name: str | None = _option(None, RUN, "folder of this run in it [date, model, batch]")
    resume: str | None = _option(
        None, RUN, "'latest', a run's folder, or a checkpoint", metavar="WHAT"
    )
    new_log: bool = _option(
        False, RUN, "resume even if metrics.jsonl is not as the checkpoint left it; set it aside"
    )
    save_frequency: int = _option(
        1, RUN, "epochs between checkpoints, 0 for none", at_least=0, metavar="N"
    )
    save_every_steps: int | None = _option(
        None, RUN, "steps between checkpoints", at_least=1, metavar="N"
    )
    save_every_minutes: float | None = _option(
        None, RUN, "minutes between checkpoints", above=0, metavar="X"
    )
    keep_checkpoints: int = _option(
        3, RUN, "newest checkpoints to keep, 0 for all", at_least=0, metavar="K"
    )
    delete_previous_checkpoint: bool = _option(False, RUN, "same as --keep-checkpoints 1")
    report_to: str = _option(
        "", RUN, "'tensorboard', 'wandb' or 'all', separated by commas", metavar="NAMES"
    )
    wandb_project_name: str = _option("clipcore", RUN, "Weights & Biases project", metavar="NAME")
    wandb_notes: str = _option("", RUN, "notes on the run for Weights & Biases", metavar="TEXT")
    log_every_n_steps: int = _option(
        1, RUN, "steps between lines of metrics.jsonl", at_least=1, metavar="N"
    )
    quiet: bool = _option(False, RUN, "show no progress but the last step")
    timeout: float = _option(
        600.0,
        RUN,
        "seconds that a rank may keep the others waiting",
        above=0,
        at_most=_MAX_TIMEOUT_S,
        metavar="S",
    )

    local_loss: bool = _option(False, ACCEPTED, "the loss is always exact")
    gather_with_grad: bool = _option(False, ACCEPTED, "the loss is always exact")
    dataset_resampled: bool = _option(False, ACCEPTED, "each sample once an epoch")
    lock_text_freeze_layer_norm: bool = _option(False, ACCEPTED, "always so")
    save_most_recent: bool = _option(False, ACCEPTED, "--resume latest works without")
    force_custom_text: bool = _option(
        False, ACCEPTED, "weights of both layouts load into one model"
    )
    opt: str | None = _option(None, ACCEPTED, "always AdamW", choices=("adamw",))
    momentum: float | None = _option(None, ACCEPTED, "always AdamW")
    val_num_samples: int | None = _option(None, ACCEPTED, "samples are counted")
    cache_dir: str | None = _option(None, ACCEPTED, "nothing is downloaded")
    torchscript: bool = _option(False, ACCEPTED, "the kernels are as fast without")
    ddp_static_graph: bool = _option(False, ACCEPTED, "decided by the step")
    dist_url: str | None = _option(None, ACCEPTED, "torchrun's variables name the processes")
    dist_backend: str | None = _option(
        None, ACCEPTED, "the device decides: nccl or gloo", choices=("nccl", "gloo")
    )
    loss_dist_impl: str | None = _option(
        None,
        ACCEPTED,
        "one exchange serves all",
        choices=("bidir", "shift", "reduce", "gather"),
    )
    coca_caption_loss_weight: float | None = _option(None, ACCEPTED, "of CoCa's models")
    coca_contrastive_loss_weight: float | None = _option(None, ACCEPTED, "of CoCa's models")
    log_local: bool = _option(False, ACCEPTED, "rank 0 writes the log")
    debug: bool = _option(False, ACCEPTED, "CLIPCORE_TRACEBACK=1 shows tracebacks")
    copy_codebase: bool = _option(False, ACCEPTED, "the report records the versions")
    remote_sync_frequency: int | None = _option(
        None, ACCEPTED, "of --remote-sync, which is refused"
    )
    remote_sync_protocol: str | None = _option(
        None, ACCEPTED, "of --remote-sync, which is refused", choices=("s3", "fsspec")
    )

    def __post_init__(self) -> None:
        _check_types(self)
        _check_limits(self)
        _check_together(self)

    def precision_on(self, device_type: str) -> str:
        """Return the precision of a run on a device: what the user chose, else what the device is fastest with."""
        if self.precision is not None:
            return self.precision
        return "amp_bf16" if device_type == "cuda" else "fp32"


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return f"--{name.replace('_', '-')}"


class Kind(NamedTuple):
    """What a setting may be."""

    type: type
    is_optional: bool
    choices: Sequence[str]


@functools.cache
def kinds() -> dict[str, Kind]:
    """Return the kind of each setting, by its name."""
    hints = typing.get_type_hints(TrainConfig)
    found = {}
    for field in dataclasses.fields(TrainConfig):
        types = typing.get_args(hints[field.name]) or (hints[field.name],)
        plain = next(t for t in types if t is not type(None))
        choices = tuple(field.metadata["arguments"].get("choices", ()))
        found[field.name] = Kind(plain, type(None) in types, choices)
    return found


_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
# What torch and numpy take for a whole number.
_MAX_WHOLE = (1 << 63) - 1


def _check_types(config: TrainConfig) -> None:
    """Raise ConfigError for values that no flag gives, such as those of a config.json that somebody edited."""
    for name, kind in kinds().items():
        value, flag = getattr(config, name), flag_of(name)
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


def _check_limits(config: TrainConfig) -> None:
    """Raise ConfigError for a number out of its range."""
    for field in dataclasses.fields(TrainConfig):
        value, limits = getattr(config, field.name), field.metadata["limits"]
        is_number = isinstance(value, int | float)
        if is_number and not limits.hold(value):
            raise ConfigError(f"{flag_of(field.name)} must be {limits}, got {value}")


def _check_together(config: TrainConfig) -> None:
    """Raise ConfigError for settings that contradict each other."""
    if config.aug_resize is not None and (config.aug_scale, config.aug_ratio) != (None, None):
        raise ConfigError(
            "--aug-resize takes the place of --aug-scale and --aug-ratio; leave one or the other out"
        )
    if config.aug_cfg is not None:
        if (config.aug_scale, config.aug_ratio, config.aug_resize) != (None, None, None):
            raise ConfigError(
                "--aug-cfg takes the place of --aug-scale, --aug-ratio and --aug-resize; leave one or the other out"
            )
        parse_aug_cfg(config.aug_cfg)
    if config.siglip and config.label_smoothing > 0:
        raise ConfigError(
            "--label-smoothing is of the softmax loss, and --siglip has none; leave one of them out"
        )
    if config.siglip and config.loss_stash is not None:
        raise ConfigError(
            "--loss-stash is of the softmax loss, and --siglip keeps no logits; leave one of them out"
        )
    _check_distillation(config)
    _check_lora(config)
    if config.fsdp and config.precision == "bf16":
        # fully_shard wants one dtype for all weights of a module.
        raise ConfigError("--fsdp splits float32 weights: take --precision amp_bf16 with it")
    if config.profile and config.torchcompile:
        raise ConfigError(
            "--profile names operators, which --torchcompile merges; leave one of them out"
        )
    if config.lr_scheduler == "const-cooldown" and config.epochs_cooldown is None:
        raise ConfigError("--lr-scheduler const-cooldown needs --epochs-cooldown N")
    wise_alphas(config)
    if (unknown := set(reporters(config)) - {"tensorboard", "wandb"}) != set():
        raise ConfigError(
            f"--report-to knows tensorboard, wandb and all, not {', '.join(sorted(unknown))}"
        )


def parse_aug_cfg(text: str) -> dict[str, Any]:
    """Return the settings in ``--aug-cfg``, which are ``KEY=VALUE`` with values as Python writes them.

    Raises:
        ConfigError: a word is no such pair.
    """
    settings = {}
    # A shell leaves the spaces within quotation marks: scale='(0.9, 1.0)'.
    for word in re.split(r"\s+(?=\w+=)", text.strip()):
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(
                f"--aug-cfg takes pairs such as scale='(0.9, 1.0)', got {word!r}; write no space around ="
            )
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            settings[key] = value
    return settings


def _check_distillation(config: TrainConfig) -> None:
    """Raise ConfigError for a teacher without weights, and for what its probabilities take the place of."""
    if config.distill_pretrained is None:
        # A run that is resumed has them from the run.
        if config.distill_model is not None and config.resume is None:
            raise ConfigError(
                "--distill-model needs its weights: name them with --distill-pretrained FILE"
            )
        return
    others = {
        "siglip": config.siglip,
        "label_smoothing": config.label_smoothing > 0,
        "duplicate_captions": config.duplicate_captions != "negative",
    }
    if given := [flag_of(name) for name, is_given in others.items() if is_given]:
        raise ConfigError(
            f"--distill-pretrained learns a teacher's softmax over all pairs, which does not go with {', '.join(given)}; "
            "leave one of them out"
        )


def _check_lora(config: TrainConfig) -> None:
    """Raise ConfigError for what does not go with matrices of low rank."""
    if config.lora_rank is None:
        # A run that is resumed has its rank from the run.
        if config.lora_alpha is not None and config.resume is None:
            raise ConfigError("--lora-alpha is of --lora-rank: give that too")
        return
    others = {
        "fsdp": config.fsdp,
        "torchcompile": config.torchcompile,
        "ema_decay": config.ema_decay is not None,
    }
    if given := [flag_of(name) for name, is_given in others.items() if is_given]:
        raise ConfigError(
            f"--lora-rank trains few numbers, and does not go with {', '.join(given)}; leave one of them out"
        )


def reporters(config: TrainConfig) -> tuple[str, ...]:
    """Return the names in ``--report-to``."""
    if config.report_to == "all":
        return ("tensorboard", "wandb")
    return tuple(name.strip() for name in config.report_to.split(",") if name.strip())


def wise_alphas(config: TrainConfig) -> tuple[float, ...]:
    """Return the numbers in ``--wise-alpha``.

    Raises:
        ConfigError: they are no numbers from 0 to 1.
    """
    words = [] if config.wise_alpha is None else config.wise_alpha.split(",")
    try:
        alphas = tuple(float(word) for word in words)
        if all(0 <= alpha <= 1 for alpha in alphas):
            return alphas
    except ValueError:
        pass
    raise ConfigError(
        "--wise-alpha is numbers from 0, the start, to 1, the end, separated by commas, such as 0.25,0.5; "
        f"got {config.wise_alpha!r}"
    )
