"""What a run takes where its user gives no setting: the recipe of its data, and the settings that follow from others."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clipcore.data.embedded import EMBEDDED
from clipcore.run.config import ConfigError, TrainConfig, flag_of
from clipcore.run.optim import adam_defaults
from clipcore.run.schedule import learning_rate
from clipcore.tokenizer import how_to_get_vocabulary
from clipcore.towers.architectures import OPENAI_NAMES, QUICK_GELU_SUFFIX, find_model

# The paper's learning rates that are not the 5e-4 of the other models (tables 19 and 20).
PAPER_LEARNING_RATES = {
    "RN50x16": 4e-4,
    "RN50x64": 3.6e-4,
    "ViT-L-14": 4e-4,
    "ViT-L-14-336": 2e-5,
}

# Of user data without a --preset; embedded data have recipes of their own.
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

# Of --finetune, in place of the above. The learning rate is that of contrastive fine-tuning in Goyal et al. 2022 (FLYP,
# arXiv 2212.00638); the decays are those with which Sun et al. 2023 (EVA-CLIP, arXiv 2303.15389) train from other weights.
FINETUNE_RECIPE: dict[str, Any] = {
    "lr": 1e-5,
    "image_layer_decay": 0.75,
    "text_layer_decay": 0.75,
}


def _of_datacomp(model: str, pairs: int, batch: int = 4096, **more: Any) -> dict[str, Any]:
    """Return the recipe of a scale of datacomp: the run sees so many pairs, in five epochs, however large the data is."""
    recipe = {name: value for name, value in PAPER_RECIPE.items() if name != "batch_size"}
    sizes = {"model": model, "global_batch_size": batch, "epochs": 5, "warmup": 500}
    return recipe | sizes | {"train_num_samples": pairs // 5} | more


# What --preset names. The scales of datacomp are those of its scale_configs.py (Gadre et al. 2023, arXiv 2304.14108).
RECIPES: dict[str, Mapping[str, Any]] = {
    # For a CPU: the model and the recipe of the glyphs, read by processes of their own.
    "small": {**EMBEDDED["glyphs"].recipe, "workers": PAPER_RECIPE["workers"]},
    "paper": PAPER_RECIPE,
    **{name: embedded.recipe for name, embedded in EMBEDDED.items()},
    "datacomp-small": _of_datacomp("ViT-B-32", 12_800_000),
    "datacomp-medium": _of_datacomp("ViT-B-32", 128_000_000),
    "datacomp-large": _of_datacomp("ViT-B-16", 1_280_000_000, batch=8192),
    "datacomp-xlarge": _of_datacomp(
        "ViT-L-14", 12_800_000_000, batch=90_112, lr=1e-3, warmup=10_000, beta2=0.95
    ),
}


def recipe_name(config: TrainConfig) -> str:
    """Return the name of the recipe that fills the settings: ``--preset``, or else by the data."""
    if config.preset is not None:
        return config.preset
    return config.train_data if config.train_data in EMBEDDED else "paper"


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainConfig):
    """The settings of a run: what every run needs has a value.

    A field that may still be None is one of three kinds:

    - something is absent: validation data, a moving average, clipping, checkpoints between epochs, a cooldown, the decay
      of learning rates from layer to layer; ``aug_scale`` and ``aug_ratio`` under ``aug_resize`` or ``aug_cfg``;
      ``batch_size``, which ``global_batch_size`` replaces;
    - each launch decides it by its device: ``device``, ``precision`` (``precision_on``), ``step_memory``,
      ``loss_stash``, ``loss_workspace``;
    - the first step decides it by measurement, and the run records it: ``threads``, ``micro_batch_size``,
      ``keep_graphs``, ``gpu_stash_bytes``.
    """

    model: str
    epochs: int
    global_batch_size: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    wd: float
    warmup: int
    val_frequency: int
    zeroshot_frequency: int
    tokenizer: str
    vocab_size: int
    workers: int

    def learning_rate(self, step_index: int, num_steps: int, steps_per_epoch: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if self.skip_scheduler:
            return self.lr
        cooldown_epochs = 0 if self.epochs_cooldown is None else self.epochs_cooldown
        return learning_rate(
            step_index,
            schedule=self.lr_scheduler,
            lr_peak=self.lr,
            num_steps=num_steps,
            warmup_steps=self.warmup,
            cooldown_steps=cooldown_epochs * steps_per_epoch,
            cooldown_end=self.lr_cooldown_end,
            cooldown_power=self.lr_cooldown_power,
        )


def resolve(config: TrainConfig, world_size: int = 1) -> RunConfig:
    """Return the settings with a value in every field that a run needs; what is resolved stays as it is.

    What depends on the number of steps stays for the run: ``warmup_steps``.

    Raises:
        ConfigError: the sizes of the batch contradict each other, there is nothing to fine-tune, or the embedded data are of
            no such type.
        UnknownModelError: there is no such model.
    """
    if config.resume is None:
        check_has_weights(config)
    if config.dataset_type == "synthetic":
        config = dataclasses.replace(config, train_data="synthetic")  # noise, whatever is named
    elif config.dataset_type != "auto" and config.train_data in EMBEDDED:
        raise ConfigError(
            f"--dataset-type {config.dataset_type} is for files: name them with --train-data, where {config.train_data!r} "
            f"means the embedded data (a folder of that name is ./{config.train_data})"
        )
    preset = recipe_name(config)
    recipe = dict(RECIPES[preset])
    # More processes than cores only take turns.
    recipe["workers"] = min(recipe["workers"], len(os.sched_getaffinity(0)))
    if config.model is not None and preset == "paper":
        name = OPENAI_NAMES.get(config.model, config.model).removesuffix(QUICK_GELU_SUFFIX)
        recipe["lr"] = PAPER_LEARNING_RATES.get(name, recipe["lr"])
    model = recipe["model"] if config.model is None else config.model
    shape = find_model(model)
    betas_and_eps = adam_defaults(shape.vision.is_resnet)
    recipe = dict(zip(("beta1", "beta2", "eps"), betas_and_eps, strict=True)) | recipe
    if config.finetune:
        recipe |= FINETUNE_RECIPE

    repository = shape.text.hf_tokenizer_name
    is_openais = config.tokenizer is None and recipe["tokenizer"] == "openai"
    if is_openais and repository is not None:
        raise ConfigError(f"{model}: {how_to_get_vocabulary(repository)} as --tokenizer")

    unset = {name: value for name, value in recipe.items() if getattr(config, name) is None}
    if config.global_batch_size is not None:
        unset.pop("batch_size", None)
    if config.batch_size is not None:
        unset.pop("global_batch_size", None)
    if config.aug_resize is not None or config.aug_cfg is not None:
        unset = {name: unset[name] for name in unset if name not in ("aug_scale", "aug_ratio")}
    if config.delete_previous_checkpoint:
        unset["keep_checkpoints"] = 1
    whole = in_global_batches(dataclasses.replace(config, **unset), world_size)
    return RunConfig(**{f.name: getattr(whole, f.name) for f in dataclasses.fields(TrainConfig)})


def in_global_batches(config: TrainConfig, world_size: int) -> TrainConfig:
    """Return the settings with ``--batch-size`` and ``--accum-freq`` as a global batch and its micro-batches.

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
    chosen = config.micro_batch_size
    return dataclasses.replace(
        config,
        global_batch_size=total,
        micro_batch_size=config.batch_size if chosen is None else chosen,
        batch_size=None,
        accum_freq=1,
    )


def check_has_weights(config: TrainConfig) -> None:
    """Raise ConfigError for a run that would fine-tune random weights."""
    if config.pretrained is not None or config.pretrained_image is not None:
        return
    for name in ("finetune", "wise_alpha", "lora_rank"):
        if getattr(config, name):
            raise ConfigError(
                f"{flag_of(name)} goes on from weights: name them with --pretrained FILE, or those of the image tower alone "
                "with --pretrained-image FILE"
            )


def finetune_note(given: TrainConfig, config: RunConfig, is_warmup_given: bool) -> str | None:
    """Return in a line which settings ``--finetune`` has made; None if it has made none.

    Args:
        given: the settings as the user, or a run that is resumed, gave them.
        config: the same, resolved, with the warm-up of the run.
    """
    if not config.finetune:
        return None
    names = [name for name in FINETUNE_RECIPE if getattr(given, name) is None]
    if not is_warmup_given:
        names.append("warmup")
    made = [f"{flag_of(name)} {getattr(config, name):g}" for name in names]
    return f"--finetune sets {', '.join(made)}" if made else None


def warmup_steps(config: RunConfig, is_chosen: bool, num_steps: int) -> int:
    """Return the warm-up of a run of ``num_steps``: a recipe's is cut to a tenth of the run, ``--finetune``'s is a tenth.

    Args:
        is_chosen: the user or an earlier launch has set it, and it is not cut.

    Raises:
        ConfigError: a warm-up that was chosen is longer than the run.
    """
    if not is_chosen and config.finetune:
        return num_steps // 10
    if not is_chosen:
        return min(config.warmup, num_steps // 10)
    if config.warmup > num_steps:
        raise ConfigError(
            f"--warmup {config.warmup} is longer than the run of {num_steps} steps; lower it or raise --epochs"
        )
    return config.warmup
