"""AdamW as the paper sets it, with float32 or bfloat16 moments and weights, clipping, the moving average, state by name.

Source: Radford et al. 2021, section 2.5 and table 18: weight decay on all weights that are not gains or
biases; the second-moment decay and epsilon differ between the ResNets and the Vision Transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from clipcore.kernels.adamw import Update, adamw_all_
from clipcore.ranks import watchdog
from clipcore.towers.model import CLIP
from clipcore.towers.modules import parameters_of

MOMENTS = ("exp_avg", "exp_avg_sq")


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a tensor that is split among ranks, without a copy; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def adam_defaults(is_resnet: bool) -> tuple[float, float, float]:
    """Return (beta1, beta2, eps) of the paper's table 18 for the family of the image tower."""
    return (0.9, 0.999, 1e-8) if is_resnet else (0.9, 0.98, 1e-6)


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay applies: to matrices and filters, not to gains, biases and the logit scale."""
    return parameter.ndim >= 2 and not name.endswith("bias")


def first_element(tensor: Tensor) -> int:
    """Return where this rank's part of a tensor split by rows begins in the whole; 0 for any other tensor."""
    if not isinstance(tensor, DTensor):
        return 0
    assert tensor.placements == (Shard(0),), tensor.placements
    num_rows = tensor.shape[0]
    rows_a_rank = -(-num_rows // tensor.device_mesh.size())
    start = min(tensor.device_mesh.get_local_rank() * rows_a_rank, num_rows)
    return start * (tensor.numel() // num_rows)


class AdamW(torch.optim.Optimizer):
    """AdamW whose moments, and parameters that are, are bfloat16, rounded stochastically (kernels/adamw.py).

    A matrix then takes 4 bytes of moments an element in place of 8, and 2 of its own in place of 4. The random bits are a
    function of the seed, the step, the parameter's number and the element's place in the whole parameter: a resumed run has
    the same, and so has a run on another number of ranks. The state has torch's names, with the step on the CPU, where
    reading it keeps no GPU waiting.

    Args:
        moments: bfloat16 or float32.
        seed: of the rounding.
        numbers: of the parameters; None counts them in their order.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        moments: torch.dtype = torch.bfloat16,
        seed: int = 0,
        numbers: Mapping[Tensor, int] | None = None,
    ) -> None:
        self.moments = moments
        self._numbers: dict[Tensor, int] = dict(numbers or {})
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "seed": seed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; parameters without a number get the next ones."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter not in self._numbers:
                self._numbers[parameter] = 1 + max(self._numbers.values(), default=-1)

    def __getstate__(self) -> dict[str, Any]:
        numbers = [[self._numbers[p] for p in group["params"]] for group in self.param_groups]
        return {**super().__getstate__(), "moments": self.moments, "numbers": numbers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        numbers = state.pop("numbers", None)
        super().__setstate__(state)
        if numbers is not None:  # a copy; where a state_dict is loaded the parameters are its own
            groups = zip(self.param_groups, numbers, strict=True)
            self._numbers = {
                p: number
                for group, own in groups
                for p, number in zip(group["params"], own, strict=True)
            }

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | None = None
    ) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again, as in any optimizer of torch.
            grad_scale: one element on the device that all gradients are multiplied with, such as clipping's factor.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_step: dict[int, list[Update]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    step, update = self._update(parameter)
                    by_step.setdefault(step, []).append(update)
            beta1, beta2 = group["betas"]
            for step, updates in by_step.items():
                adamw_all_(
                    updates,
                    lr=group["lr"],
                    beta1=beta1,
                    beta2=beta2,
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=step,
                    grad_scale=grad_scale,
                    seed=group["seed"],
                )
        return loss

    def _update(self, parameter: Tensor) -> tuple[int, Update]:
        """Count a parameter's step, and update it."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for key in MOMENTS:
                state[key] = torch.zeros_like(parameter, dtype=self.moments)
        state["step"] += 1
        for key in MOMENTS:
            # Of a loaded state, or of a model that was given another memory format since.
            if state[key].stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=self.moments).copy_(state[key])
        assert parameter.grad is not None
        tensors = [local_part(t) for t in (parameter, parameter.grad, *map(state.get, MOMENTS))]
        if not tensors[0].is_contiguous():
            # Element by element as they lie in memory, such as channels last.
            order = sorted(range(parameter.ndim), key=tensors[0].stride, reverse=True)
            tensors = [tensor.permute(order) for tensor in tensors]
        param, grad, exp_avg, exp_avg_sq = tensors
        return int(state["step"]), Update(
            *(param, grad.contiguous(), exp_avg, exp_avg_sq),
            stream=self._numbers[parameter],
            first=first_element(parameter),
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as torch does, except for moments, which torch would cast to the dtype of their parameter."""
        super().load_state_dict(state_dict)
        saved = (number for group in state_dict["param_groups"] for number in group["params"])
        own = (parameter for group in self.param_groups for parameter in group["params"])
        for number, parameter in zip(saved, own, strict=True):
            for key in MOMENTS:
                if (value := state_dict["state"].get(number, {}).get(key)) is not None:
                    moment = value.to(parameter.device, self.moments, copy=True)
                    self.state[parameter][key] = moment


def layer_rates(
    model: CLIP, image_decay: float | None = None, text_decay: float | None = None
) -> dict[Tensor, float]:
    """Return what the learning rate of each parameter is multiplied with: less, the nearer it is to a tower's input.

    Of a tower's N groups of layers, from its embeddings to its projection (``layer_groups``), group i has
    decay**(N - 1 - i). The projection has 1; the logit scale and the bias are not named.

    Args:
        model: split among ranks already, if it is to be.
        image_decay, text_decay: above 0, at most 1; None is 1.

    Source: Clark et al. 2020 (ELECTRA, appendix A); Bao et al. 2021 (BEiT), with timm's groups.
    """
    rates: dict[Tensor, float] = {}
    towers = (
        (model.visual.layer_groups(), image_decay),
        (model.text_layer_groups(), text_decay),
    )
    for groups, decay in towers:
        for distance, group in enumerate(reversed(groups)):
            rate = (1.0 if decay is None else decay) ** distance
            rates |= {parameter: rate for part in group for parameter in parameters_of(part)}
    return rates


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    moments: str = "fp32",
    seed: int = 0,
    rates: Mapping[Tensor, float] | None = None,
) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters, in two groups: decayed, and gains and biases.

    What a sharded model does not split, its logit scale, is a group of its own, since one kernel updates a whole group. So
    are parameters of another rate; a group's is its ``lr_rate``.

    Args:
        rates: what the learning rate of a parameter is multiplied with, as of ``layer_rates``; 1 where it is not named.
        moments: ``fp32`` or ``bf16``. The optimizer is torch's where all is float32, the one above where anything is
            bfloat16, moments or parameters.
        seed: of the rounding to bfloat16.
    """
    if moments not in ("fp32", "bf16"):
        raise ValueError(f"Adam's moments are fp32 or bf16, got {moments!r}")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("nothing to train: both towers and the logit scale are locked; unlock one")
    are_split = any(isinstance(p, DTensor) for _, p in named)
    kinds: dict[tuple[float, str], list[nn.Parameter]] = {}
    for name, parameter in named:
        is_whole = are_split and not isinstance(parameter, DTensor)
        assert not (is_whole and is_decayed(name, parameter)), name
        kind = "whole" if is_whole else "decayed" if is_decayed(name, parameter) else "no_decay"
        kinds.setdefault(((rates or {}).get(parameter, 1.0), kind), []).append(parameter)
    # The slowest layers last, and of each rate those without decay first.
    order = sorted(kinds, key=lambda key: (-key[0], ("no_decay", "decayed", "whole").index(key[1])))
    groups = [
        {
            "params": kinds[rate, kind],
            "lr": lr * rate,
            "lr_rate": rate,
            "weight_decay": weight_decay if kind == "decayed" else 0.0,
        }
        for rate, kind in order
    ]
    dtype = torch.bfloat16 if moments == "bf16" else torch.float32
    if torch.bfloat16 in (dtype, *(p.dtype for _, p in named)):
        # By their order in the model, which does not depend on what is split.
        numbers: dict[Tensor, int] = {p: number for number, (_, p) in enumerate(named)}
        return AdamW(groups, lr=lr, betas=betas, eps=eps, moments=dtype, seed=seed, numbers=numbers)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer's state as flat tensors, ``<parameter>.<moment>``, for a checkpoint."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Rebuild the state from what ``optimizer_tensors`` returned, also in an optimizer that has made no step yet.

    Moments of a run with another ``--adam-moments`` take the dtype of this one's: to bfloat16 once to nearest.

    Raises:
        ValueError: the tensors belong to other parameters, such as after a change of the locked towers, or to others of
            these names.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names = {key.rpartition(".")[0] for key in tensors}
    if tensors and names != trained.keys():
        differing = sorted(names ^ trained.keys())
        raise ValueError(
            f"the checkpoint's optimizer state is for other parameters (first: {differing[0]}); resume with the "
            "--lock-image and --lock-text options of the run that wrote it"
        )
    for name in trained if tensors else ():
        if missing := [key for key in ("step", *MOMENTS) if f"{name}.{key}" not in tensors]:
            raise ValueError(
                f"the checkpoint's optimizer state lacks {name}.{missing[0]}; use another checkpoint of the run"
            )
    is_ours = isinstance(optimizer, AdamW)
    moments = optimizer.moments if isinstance(optimizer, AdamW) else None
    for name, parameter in trained.items():
        state = optimizer.state[parameter]
        if (step := tensors.get(f"{name}.step")) is not None:
            if step.numel() != 1:
                raise ValueError(
                    f"the checkpoint's optimizer state is damaged: {name}.step is {list(step.shape)}, no single number; use "
                    "another checkpoint of the run"
                )
            # torch's fused optimizer counts on the device, ours on the CPU.
            state["step"] = step.to("cpu" if is_ours else parameter.device, copy=True)
        for key in MOMENTS:
            if (value := tensors.get(f"{name}.{key}")) is not None:
                if value.shape != parameter.shape:
                    raise ValueError(
                        f"the checkpoint's optimizer state is for another model: {name}.{key} is {list(value.shape)}, and "
                        f"the weights are {list(parameter.shape)}; use another checkpoint of the run"
                    )
                state[key] = value.to(parameter.device, moments or parameter.dtype, copy=True)


class ExponentialMovingAverage:
    """A shadow copy of a model's parameters, ``shadow = decay * shadow + (1 - decay) * parameter`` a step, of float32 at
    least: an average of 16 bits would stand still.

    The decay is warmed up as ``min(decay, (1 + step) / (10 + step))`` so that the random start is forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"the decay of a moving average lies between 0 and 1, got {decay}")
        self.decay = decay
        self.shadow = {n: _wide(v.detach()).clone() for n, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        current = model.state_dict()
        averaged = [n for n, v in self.shadow.items() if v.is_floating_point()]
        torch._foreach_lerp_(
            [local_part(self.shadow[n]) for n in averaged],
            [_wide(local_part(current[n])) for n in averaged],
            1 - decay,
        )
        for name in self.shadow.keys() - set(averaged):
            self.shadow[name].copy_(current[name])

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self.shadow.items():
            value.copy_(tensors[name])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def clipped_step(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: Iterable[Tensor],
    grad_norm: Tensor,
    max_norm: float | None,
) -> None:
    """Update by gradients that are scaled down to a norm of at most ``max_norm``; None takes them as they are.

    clipcore's AdamW scales them as it reads them, without rounding them; torch's gets them scaled in place.
    """
    if max_norm is not None and isinstance(optimizer, AdamW):
        factor = (max_norm / (grad_norm.float() + 1e-6)).clamp(max=1.0)  # as torch's clipping
        scaler.step(optimizer, grad_scale=factor)
        return
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, grad_norm)
    scaler.step(optimizer)


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients, on their device; of a sharded model over all ranks, the same bits on each."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    split = [g for g in gradients if isinstance(g, DTensor)]
    if any(g.dtype == torch.bfloat16 for g in gradients):
        # The norm of a bfloat16 tensor would be one itself.
        norms = torch._foreach_norm([local_part(g) for g in gradients], 2, dtype=torch.float32)
        return torch.linalg.vector_norm(torch.stack(norms))
    if not split:
        return torch.nn.utils.get_total_norm(gradients)
    rest = torch.nn.utils.get_total_norm([g for g in gradients if not isinstance(g, DTensor)])
    # Squared in float64, which holds the square of every float32.
    square = torch.nn.utils.get_total_norm([local_part(g) for g in split]).double().square()
    with watchdog.collective("sum of the gradients' squares"):
        dist.all_reduce(square, group=split[0].device_mesh.get_group())
    return (square + rest.double().to(square.device).square()).sqrt().to(split[0].dtype)
