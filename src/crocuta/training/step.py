"""One update: gradients of the accumulated batches, clipping, a guard against non-finite numbers, AdamW."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crocuta.errors import NonFiniteError
from crocuta.model.lm import Model
from crocuta.training.config import TrainConfig
from crocuta.training.loss import loss_of

PATIENCE = 10
"""Updates in a row that may be skipped before the run stops."""


@dataclass(frozen=True)
class StepResult:
    """Mean loss in nats, the gradient norm before clipping, and whether the update was skipped as not finite."""

    loss: float
    gradient_norm: float
    skipped: bool


def train_step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    config: TrainConfig,
) -> StepResult:
    """Accumulate ``config.accumulation`` batches and update; parameters stay as they are if anything is not finite."""
    total, loss_function = 0.0, loss_of(config.objective)
    device = next(model.parameters()).device.type
    for micro in range(config.accumulation):
        ids, targets = batch(micro)
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"):
            loss = loss_function(model, ids, targets) / config.accumulation
        loss.backward()
        total += float(loss.detach())
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip))
    finite = torch.isfinite(torch.tensor([total, norm])).all().item()
    if finite:
        optimizer.step()
    return StepResult(total, norm, not finite)


def clear_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Forget the gradients of the last step."""
    optimizer.zero_grad(set_to_none=True)


def non_finite_names(model: Model) -> list[str]:
    """Parameters whose value or gradient is not finite, to say where the trouble began."""
    return [
        name
        for name, p in model.named_parameters()
        if not torch.isfinite(p).all() or (p.grad is not None and not torch.isfinite(p.grad).all())
    ]


def refuse_to_go_on(model: Model, step: int, skipped: int) -> None:
    """NonFiniteError after too many skipped updates in a row."""
    names = non_finite_names(model)
    raise NonFiniteError(
        f"{skipped} updates in a row were not finite, up to step {step}",
        given=f"{len(names)} parameters, first {names[:3]}",
        fix="lower the learning rate, or resume from an earlier checkpoint",
    )
