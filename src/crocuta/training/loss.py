"""Cross-entropy of next or of hidden tokens without ever holding the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crocuta.model.lm import Model
from crocuta.training.config import MaskedConfig, NextTokenConfig, ObjectiveConfig

Loss: TypeAlias = Callable[[Model, Tensor, Tensor], Tensor]
"""(model, inputs [b l], targets [b l]) -> the mean loss in nats."""

_LOGITS = 1 << 24
"""Logits held at once; more positions than fit are done in turns and computed again in the backward pass."""


def loss_of(objective: ObjectiveConfig) -> Loss:
    """The loss of an objective."""
    match objective:
        case NextTokenConfig():
            return next_token_loss
        case MaskedConfig():
            return masked_loss


def next_token_loss(model: Model, ids: Int[Tensor, "b l"], targets: Int[Tensor, "b l"]) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats, from float32 logits; targets of -100 do not count."""
    hidden, flat_targets = model.hidden(ids).flatten(0, 1), targets.flatten()
    return _in_turns(model, hidden, flat_targets) / (flat_targets != -100).sum()


def masked_loss(model: Model, ids: Int[Tensor, "b l"], targets: Int[Tensor, "b l"]) -> Float[Tensor, ""]:
    """``next_token_loss`` with targets at their own positions; logits are made only where a target is not -100.

    Without any target, as in a batch of nothing but special tokens, the loss is 0 and so are all gradients.
    """
    hidden, flat_targets = model.hidden(ids).flatten(0, 1), targets.flatten()
    places = (flat_targets != -100).nonzero()[:, 0]
    return _in_turns(model, hidden[places], flat_targets[places]) / max(1, len(places))


def _in_turns(model: Model, hidden: Float[Tensor, "n d"], targets: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """The sum of the cross-entropies."""
    turn = max(1, _LOGITS // model.config.vocab_size)
    if len(hidden) <= turn:
        return _summed(model, hidden, targets)
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(hidden), turn):
        piece = hidden[start : start + turn], targets[start : start + turn]
        total = total + checkpoint(_summed, model, *piece, use_reentrant=False)
    return total


def _summed(model: Model, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = model.logits(hidden[None]).squeeze(0)  # the adjoint of [0] would be a copy
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
