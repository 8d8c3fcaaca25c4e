"""AdamW with groups by the role of a parameter's module, and the learning rate as a function of progress."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from crocuta.model.filters import Filter
from crocuta.training.config import OptimizerConfig


def parameter_groups(model: nn.Module, new: Iterable[nn.Parameter] = ()) -> dict[str, dict[str, nn.Parameter]]:
    """Trainable parameters by role: "matrices" (decayed), "others" (norms, biases, short taps, D), "filters".

    A role comes from the module that owns the parameter, never from a name. A tied parameter counts once. Those of
    ``new``, which did not come with a pretrained model, are apart: "new matrices" and "new others".
    """
    groups: dict[str, dict[str, nn.Parameter]] = {"matrices": {}, "others": {}, "filters": {}}
    in_filters = {id(p) for module in model.modules() if isinstance(module, Filter) for p in module.parameters()}
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)}
    fresh = {id(p) for p in new}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            role = "filters" if id(parameter) in in_filters else "matrices" if id(parameter) in matrices else "others"
            role = f"new {role}" if id(parameter) in fresh else role
            groups.setdefault(role, {})[name] = parameter
    return groups


def make_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    new: Iterable[nn.Parameter] = (),
    new_learning_rate: float | None = None,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); each group remembers its ``peak`` learning rate and its ``role``.

    ``new_learning_rate`` is that of the parameters of ``new``; None: the same as the rest.
    """
    groups = []
    for role, parameters in parameter_groups(model, new).items():
        peak = config.learning_rate
        if role == "filters" and config.filter_learning_rate is not None:
            peak = config.filter_learning_rate
        if role.startswith("new ") and new_learning_rate is not None:
            peak = new_learning_rate
        decay = config.weight_decay if role.endswith("matrices") else 0.0
        if parameters:
            groups.append(
                {"params": list(parameters.values()), "weight_decay": decay, "lr": peak, "peak": peak, "role": role}
            )
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def learning_rate_factor(config: OptimizerConfig, step: int, progress: float) -> float:
    """Warm-up by steps, then decay by ``progress`` (0 at the start of the run, 1 at its end)."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = 0.5 * (1 + math.cos(math.pi * min(1.0, progress))) if config.schedule == "cosine" else max(0.0, 1 - progress)
    return warm * (config.final_fraction + (1 - config.final_fraction) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's rate becomes its peak times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state under names made of the parameters' names."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of ``optimizer_tensors``."""
    for name, parameter in model.named_parameters():
        state = {
            key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in tensors
        }
        if state:
            optimizer.state[parameter] = {k: v.to(parameter.device, copy=True) for k, v in state.items()}
