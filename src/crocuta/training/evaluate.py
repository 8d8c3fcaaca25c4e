"""Held-out bits: what the model would need to store unseen text, per token and per byte, or per hidden token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray

from crocuta.data.windows import TokenSource, held_out_windows
from crocuta.errors import InputError
from crocuta.model.chunks import hidden_chunks, token_log_probs
from crocuta.model.lm import Model
from crocuta.model.memory import Size, plan
from crocuta.tokenizers.base import Tokenizer
from crocuta.training.masking import NOT_COUNTED, Masking

_TOKENS_A_PASS = 8192
_TOKEN_BYTES = 2 * 8 + 1 + 4 + 8
"""Input and target, whether it counts, its log-probability, and that once more in float64."""


@dataclass(frozen=True)
class HeldOut:
    """Mean code length over ``tokens`` held-out tokens, in bits a token and bits a byte of text."""

    bits_per_token: float
    bits_per_byte: float
    tokens: int

    @property
    def figures(self) -> dict[str, float]:
        """By the names that they have in a run's metrics."""
        return {"held_out_bits": self.bits_per_token, "bits_per_byte": self.bits_per_byte, "tokens": self.tokens}

    @property
    def headline(self) -> float:
        """The figure on show while a model trains."""
        return self.bits_per_byte


@dataclass(frozen=True)
class MaskedHeldOut:
    """Mean cross-entropy of ``tokens`` hidden held-out tokens, in bits; no code length, as all tokens around help."""

    bits_per_masked_token: float
    tokens: int

    @property
    def figures(self) -> dict[str, float]:
        """By the names that they have in a run's metrics."""
        return {"masked_bits": self.bits_per_masked_token, "masked_tokens": self.tokens}

    @property
    def headline(self) -> float:
        """The figure on show while a model trains."""
        return self.bits_per_masked_token


@torch.no_grad()
def evaluate(
    model: Model,
    source: TokenSource,
    tokenizer: Tokenizer,
    length: int,
    *,
    max_tokens: int | None = None,
    context: int = 0,
    max_memory: Size | None = None,
) -> HeldOut:
    """Bits of the stream's tokens (its first ``max_tokens``), each predicted inside a window of ``length``.

    ``context``: tokens that every window but the first repeats from the one before, so that each prediction has at
    least that much to go by. Losses are summed in float64. Windows of any length are read in chunks, and logits are
    made in turns. ``max_memory``: bytes, or text such as "2GiB", that the passes may take beyond the model and the
    stream (``model.memory``); None: 8,192 tokens a pass, or one window in chunks of as many.

    Raises InputError for a stream of less than two tokens, an impossible context, too little max_memory, or a model
    that looks ahead, to which the next token is no secret.
    """
    if not model.config.causal:
        raise InputError("a model that looks ahead has no bits of next tokens", fix="use evaluate_masked")
    taken = source if max_tokens is None or max_tokens + 1 >= len(source) else source.slice(0, max_tokens + 1)
    windows = held_out_windows(taken, min(length, len(taken) - 1), min(context, len(taken) - 2))
    length = windows.inputs.shape[1]
    rows = max(1, _TOKENS_A_PASS // length)
    run = plan(model, [length] * rows, max_memory, token_bytes=_TOKEN_BYTES)
    rows = min(rows, max(1, run.tokens // length))
    was_training = model.training
    model.eval()
    nats = 0.0
    for first in range(0, len(windows.inputs), rows):
        inputs, targets, mask = (torch.from_numpy(part[first : first + rows]) for part in windows)
        for start, hidden in hidden_chunks(model, inputs, chunk=run.chunk):
            piece = slice(start, start + hidden.shape[1])
            log_probs = token_log_probs(model, hidden, targets[:, piece], logits=run.logits).cpu()
            nats -= float(log_probs.double()[mask[:, piece]].sum())
    model.train(was_training)
    tokens = int(windows.mask.sum())
    size = len(tokenizer.decode(taken.read(1, tokens)).encode()) if tokenizer.type == "pieces" else tokens
    return HeldOut(nats / math.log(2) / tokens, nats / math.log(2) / max(1, size), tokens)


@torch.no_grad()
def evaluate_masked(
    model: Model, source: TokenSource, masking: Masking, length: int, *, max_tokens: int | None = None
) -> MaskedHeldOut:
    """Bits of the tokens that ``masking`` chooses in the stream (its first ``max_tokens``), hidden as in training.

    The stream is cut into windows of ``length``, which do not overlap, and what is left over. Window i is masked as
    batch i, so the figure does not depend on how many are run at once: whole, about 8,192 tokens a pass, with logits of
    the chosen tokens alone. Losses are summed in float64. Raises InputError for a stream without a token to hide.
    """
    tokens = len(source) if max_tokens is None else min(max_tokens, len(source))
    device, rows, was_training = next(model.parameters()).device, max(1, _TOKENS_A_PASS // length), model.training
    model.eval()
    nats, counted = 0.0, 0
    for first in range(0, -(-tokens // length), rows):
        for ids in _windows(source, first * length, min(rows * length, tokens - first * length), length):
            pairs = [masking.batch(row[None], first + index) for index, row in enumerate(ids)]
            inputs, targets = (torch.from_numpy(np.concatenate(part)) for part in zip(*pairs))
            first += len(ids)
            keep = targets != NOT_COUNTED
            if keep.any():
                hidden = model.hidden(inputs.to(device))[keep.to(device)]
                nats -= float(token_log_probs(model, hidden[None], targets[keep][None]).double().sum())
                counted += int(keep.sum())
    model.train(was_training)
    if not counted:
        raise InputError("the stream has no token that could be hidden", given=f"{tokens} special tokens")
    return MaskedHeldOut(nats / math.log(2) / counted, counted)


def _windows(source: TokenSource, start: int, tokens: int, length: int) -> list[Int[NDArray, "b l"]]:
    """Tokens ``start`` ... of the stream as windows of ``length``, and the shorter rest, if any, as one of its own."""
    whole = tokens // length * length
    ids = source.read(start, tokens)
    return [part for part in (ids[:whole].reshape(-1, length), ids[None, whole:]) if part.size]
