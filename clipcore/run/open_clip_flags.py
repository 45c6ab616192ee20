"""Flags of open_clip 3.3's training that clipcore refuses, and flags of other programs that mean one of clipcore's.

Flags that work, and those that are accepted without effect, are fields of ``TrainConfig``. ``docs/from-open-clip.md`` has a
table of all of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What to do instead.
REFUSED = {
    "--force-context-length": "a run takes the context length of its --model",
    "--horovod": "start several processes with torchrun",
    "--image-interpolation": "a run takes the preprocessing that the weights of --pretrained describe, else bicubic",
    "--image-mean": "a run takes the preprocessing that the weights of --pretrained describe, else OpenAI's",
    "--image-resize-mode": "a run takes the preprocessing that the weights of --pretrained describe, else shortest",
    "--image-std": "a run takes the preprocessing that the weights of --pretrained describe, else OpenAI's",
    "--no-set-device-rank": "let each process see all GPUs, and leave it out",
    "--remote-sync": "copy the folder of --logs with a program of your own",
    "--trace": "python -m clipcore.evaluate evaluates a run, and torch.jit.trace works on its towers",
    "--use-bn-sync": "BatchNorm has the statistics of each device's micro-batch; leave it out",
    "--use-bnb-linear": "--precision bf16, --adam-moments bf16 and --grad-checkpointing save memory",
}

# What other programs call these flags.
_SAME = {
    "--bf16": "--precision amp_bf16",
    "--checkpoint": "--resume",
    "--compile": "--torchcompile",
    "--data": "--train-data",
    "--data-path": "--train-data",
    "--fp16": "--precision amp",
    "--gradient-accumulation-steps": "--accum-freq",
    "--gradient-checkpointing": "--grad-checkpointing",
    "--learning-rate": "--lr",
    "--max-grad-norm": "--grad-clip-norm",
    "--num-epochs": "--epochs",
    "--num-train-epochs": "--epochs",
    "--num-workers": "--workers",
    "--output": "--logs",
    "--output-dir": "--logs",
    "--per-device-train-batch-size": "--batch-size",
    "--resume-from-checkpoint": "--resume",
    "--run-name": "--name",
    "--train-batch-size": "--global-batch-size",
    "--warmup-steps": "--warmup",
    "--weight-decay": "--wd",
}
# Flags that are only spelt like one of clipcore's: a launcher gives the rank by a variable.
_UNRELATED = ("--local-rank",)
# How alike two names are that differ by a slip of the fingers: of the shortest flags even one letter is another word.
_LIKENESS = 0.8


def describe_unknown(argument: str, known: Iterable[str]) -> str:
    """Return what is said of an argument that no setting takes: the remedy, or a flag of the same meaning if there is one.

    Args:
        known: the flags that exist.
    """
    flag = argument.partition("=")[0]
    name = flag.replace("_", "-")
    if name in REFUSED:
        return f"{flag} exists only in open_clip: {REFUSED[name]}"
    by_name = {one.removeprefix("--"): one for one in known if name not in _UNRELATED}
    near = difflib.get_close_matches(name.removeprefix("--"), by_name, n=1, cutoff=_LIKENESS)
    meant = _SAME.get(name) or (by_name[near[0]] if near and flag.startswith("--") else None)
    return f"unknown argument {flag}; " + (f"did you mean {meant}?" if meant else "see --help")
