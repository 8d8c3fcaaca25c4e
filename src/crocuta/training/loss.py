"""Next-token cross-entropy without ever holding the logits of a whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crocuta.model.lm import Model

_LOGITS = 1 << 24
"""Logits held at once; more positions than fit are done in turns and computed again in the backward pass."""


def next_token_loss(model: Model, ids: Int[Tensor, "b l"], targets: Int[Tensor, "b l"]) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats, from float32 logits; targets of -100 do not count."""
    hidden, flat_targets = model.hidden(ids).flatten(0, 1), targets.flatten()
    turn = max(1, _LOGITS // model.config.vocab_size)
    counted = (flat_targets != -100).sum()
    if len(hidden) <= turn:
        return _summed(model, hidden, flat_targets) / counted
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(hidden), turn):
        piece = hidden[start : start + turn], flat_targets[start : start + turn]
        total = total + checkpoint(_summed, model, *piece, use_reentrant=False)
    return total / counted


def _summed(model: Model, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model.logits(hidden[None])[0], targets, reduction="sum", ignore_index=-100)
