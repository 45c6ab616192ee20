"""The models between a run's first weights and its last: what ``--wise-alpha`` keeps, writes and evaluates.

A run's folder then holds ``start`` and ``wise/alpha_0.5``, folders as ``export_model`` writes them for open_clip,
or, of a model that open_clip does not have, as ``CLIP.save_pretrained`` writes them.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path

from clipcore.evaluate.tasks import EvaluationPlan
from clipcore.export.vocabulary import write_tokenizer
from clipcore.export.write import export_model, open_clip_can_hold
from clipcore.files import is_folder
from clipcore.ranks.distributed import World
from clipcore.run.config import ConfigError
from clipcore.run.metrics import MetricsLogger
from clipcore.run.state import RunState
from clipcore.tokenizer import Tokenizer
from clipcore.towers.factory import create_model_from_pretrained
from clipcore.towers.interpolation import interpolated
from clipcore.towers.model import CLIP

START_FOLDER, ALPHAS_FOLDER = "start", "wise"


def keep_start(
    model: CLIP, tokenizer: Tokenizer, run_dir: Path, world: World, is_beginning: bool
) -> None:
    """Write the weights that a run begins with into its folder, on the main rank.

    Args:
        model: whole, as it is before the first step.
        is_beginning: False for a run that goes on, whose first weights have to be there.

    Raises:
        ConfigError: they are not.
    """
    folder = run_dir / START_FOLDER
    if not is_beginning and not is_folder(folder):
        raise ConfigError(
            f"--wise-alpha and --lora-rank need the weights that the run began with, which only a run that begins with them "
            f"keeps ({folder}); leave --wise-alpha out, and use python -m clipcore.interpolate START {run_dir} --alpha X OUT"
        )
    if is_beginning and world.is_main:
        _write(model, tokenizer, folder)


def write_interpolations(
    state: RunState,
    evaluations: EvaluationPlan,
    tokenizer: Tokenizer,
    log: MetricsLogger,
    run_dir: Path,
    alphas: Sequence[float],
    epochs: int,
) -> None:
    """Write the models at ``alphas`` of the way from a run's first weights to its last, and evaluate them; on all ranks.

    Args:
        epochs: of the whole run.
    """
    if not alphas:
        return
    end = state.evaluated_model()
    start = create_model_from_pretrained(
        None, run_dir / START_FOLDER, device=evaluations.world.device, return_transform=False
    )
    for alpha in alphas:
        model = interpolated(start, end, alpha)
        with log.whole_or_nothing():
            evaluations.run(model, log, state.step, epochs, True, alpha)
        folder = run_dir / ALPHAS_FOLDER / f"alpha_{alpha:g}"
        if evaluations.world.is_main:
            _write(model, tokenizer, folder)
        log.print(f"--wise-alpha: {folder}")


def _write(model: CLIP, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder in the place of an earlier one."""
    if is_folder(folder):
        shutil.rmtree(folder)
    # The export moves the model to the CPU and changes its dtype.
    copied = copy.deepcopy(model)
    if open_clip_can_hold(model.config):
        export_model(copied, tokenizer, "open_clip", folder, is_checked=False)
        return
    # For clipcore alone, in float32 as the export; whole or not at all.
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    copied.cpu().float().save_pretrained(aside)
    write_tokenizer(tokenizer, aside)
    aside.rename(folder)
