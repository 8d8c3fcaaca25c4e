"""Held-out bits: what the model would need to store unseen text, per token and per byte."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from crocuta.data.windows import TokenSource, held_out_windows
from crocuta.model.lm import Model
from crocuta.tokenizers.base import Tokenizer

_TOKENS_A_PASS = 8192


@dataclass(frozen=True)
class HeldOut:
    """Mean code length over ``tokens`` held-out tokens, in bits a token and bits a byte of text."""

    bits_per_token: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: Model,
    source: TokenSource,
    tokenizer: Tokenizer,
    length: int,
    *,
    max_tokens: int | None = None,
    context: int = 0,
) -> HeldOut:
    """Bits of the stream's tokens (its first ``max_tokens``), each predicted inside a window of ``length``.

    ``context``: tokens that every window but the first repeats from the one before, so that each prediction has at
    least that much to go by. Losses are summed in float64.
    """
    taken = source if max_tokens is None or max_tokens + 1 >= len(source) else source.slice(0, max_tokens + 1)
    windows = held_out_windows(taken, min(length, len(taken) - 1), min(context, len(taken) - 2))
    device = next(model.parameters()).device
    was_training, rows = model.training, max(1, _TOKENS_A_PASS // windows.inputs.shape[1])
    model.eval()
    nats = 0.0
    for start in range(0, len(windows.inputs), rows):
        inputs, targets, mask = (torch.from_numpy(part[start : start + rows]).to(device) for part in windows)
        losses = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")
        nats += float(losses.double()[mask.flatten()].sum())
    model.train(was_training)
    tokens = int(windows.mask.sum())
    size = len(tokenizer.decode(taken.read(1, tokens)).encode()) if tokenizer.type == "pieces" else tokens
    return HeldOut(nats / math.log(2) / tokens, nats / math.log(2) / max(1, size), tokens)
