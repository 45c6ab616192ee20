"""AdamW as the paper sets it, the exponential moving average, and their state by parameter name.

Source: Radford et al. 2021, section 2.5 and table 18: weight decay on all weights that are not gains or
biases; the second-moment decay and epsilon differ between the ResNets and the Vision Transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

MOMENTS = ("exp_avg", "exp_avg_sq")


def local_part(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor that is split among ranks, without a copy; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def adam_defaults(is_resnet: bool) -> tuple[float, float, float]:
    """(beta1, beta2, eps) of table 18 for the family of the image tower."""
    return (0.9, 0.999, 1e-8) if is_resnet else (0.9, 0.98, 1e-6)


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: matrices and filters yes, gains, biases and the logit scale no."""
    return parameter.ndim >= 2 and not name.endswith("bias")


def build_optimizer(
    model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in two groups: decayed, and gains and biases.

    What a sharded model does not split, its logit scale, is a group of its own, since one kernel updates a whole group.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("nothing to train: both towers and the logit scale are locked; unlock one")
    are_split = any(isinstance(p, DTensor) for _, p in named)
    kinds: dict[str, list[nn.Parameter]] = {"kept": [], "decayed": [], "whole": []}
    for name, parameter in named:
        is_whole = are_split and not isinstance(parameter, DTensor)
        assert not (is_whole and is_decayed(name, parameter)), name
        kind = "whole" if is_whole else "decayed" if is_decayed(name, parameter) else "kept"
        kinds[kind].append(parameter)
    groups = [
        {"params": parameters, "weight_decay": weight_decay if kind == "decayed" else 0.0}
        for kind, parameters in kinds.items()
        if parameters
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors, ``<parameter>.<moment>``, for a checkpoint."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Inverse of ``optimizer_tensors``: the state is rebuilt, also in an optimizer that has made no step yet.

    Raises:
        ValueError: the tensors belong to other parameters, such as after a change of the locked towers.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names = {key.rpartition(".")[0] for key in tensors}
    if tensors and names != trained.keys():
        differing = sorted(names ^ trained.keys())
        raise ValueError(
            f"the checkpoint's optimizer state is for other parameters (first: {differing[0]}); resume with the "
            "--lock-image and --lock-text options of the run that wrote it"
        )
    for name, parameter in trained.items():
        state = optimizer.state[parameter]
        for key in ("step", *MOMENTS):
            if (value := tensors.get(f"{name}.{key}")) is not None:
                state[key] = value.to(parameter.device, copy=True)


class ExponentialMovingAverage:
    """A shadow copy of a model's parameters, ``shadow = decay * shadow + (1 - decay) * parameter`` a step.

    The decay is warmed up as ``min(decay, (1 + step) / (10 + step))`` so that the random start is forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"the decay of a moving average lies between 0 and 1, got {decay}")
        self.decay = decay
        self.shadow = {n: v.detach().clone() for n, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        current = model.state_dict()
        averaged = [n for n, v in self.shadow.items() if v.is_floating_point()]
        torch._foreach_lerp_(
            [local_part(self.shadow[n]) for n in averaged],
            [local_part(current[n]) for n in averaged],
            1 - decay,
        )
        for name in self.shadow.keys() - set(averaged):
            self.shadow[name].copy_(current[name])

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self.shadow.items():
            value.copy_(tensors[name])


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm over all gradients, on their device; of a sharded model over all ranks, with the same bits on each."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    split = [g for g in gradients if isinstance(g, DTensor)]
    if not split:
        return torch.nn.utils.get_total_norm(gradients)
    rest = torch.nn.utils.get_total_norm([g for g in gradients if not isinstance(g, DTensor)])
    # Squared in float64, which holds the square of every float32.
    square = torch.nn.utils.get_total_norm([local_part(g) for g in split]).double().square()
    dist.all_reduce(square, group=split[0].device_mesh.get_group())
    return (square + rest.double().to(square.device).square()).sqrt().to(split[0].dtype)
