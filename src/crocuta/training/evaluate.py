"""Held-out bits: what the model would need to store unseen text, per token and per byte."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from crocuta.data.windows import TokenSource, held_out_windows
from crocuta.model.chunks import hidden_chunks, token_log_probs
from crocuta.model.lm import Model
from crocuta.model.memory import Size, plan
from crocuta.tokenizers.base import Tokenizer

_TOKENS_A_PASS = 8192
_TOKEN_BYTES = 2 * 8 + 1 + 4 + 8
"""Input and target, whether it counts, its log-probability, and that once more in float64."""


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
    max_memory: Size | None = None,
) -> HeldOut:
    """Bits of the stream's tokens (its first ``max_tokens``), each predicted inside a window of ``length``.

    ``context``: tokens that every window but the first repeats from the one before, so that each prediction has at
    least that much to go by. Losses are summed in float64. Windows of any length are read in chunks, and logits are
    made in turns. ``max_memory``: bytes, or text such as "2GiB", that the passes may take beyond the model and the
    stream (``model.memory``); None: 8,192 tokens a pass, or one window in chunks of as many.

    Raises InputError for a stream of less than two tokens, an impossible context, or too little max_memory.
    """
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
