"""Sequences of any length in bounded memory: hidden states chunk by chunk, and log-probabilities turn by turn."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crocuta.model.lm import Model
from crocuta.model.memory import DEFAULT, Size, chunk_length
from crocuta.model.state import ModelState
from crocuta.types import Hidden, TokenIds


@torch.no_grad()
def hidden_chunks(
    model: Model,
    ids: TokenIds,
    *,
    state: ModelState | None = None,
    lengths: Int[Tensor, " b"] | None = None,
    layer: int | None = None,
    chunk: int | None = None,
    max_memory: Size | None = None,
) -> Iterator[tuple[int, Hidden]]:
    """(first position, hidden states) of consecutive pieces of ids [b l], at most ``chunk`` tokens each.

    ``state`` is what was read before, moved on piece by piece; None: the ids start the sequences, and one piece needs
    no state. A model that looks ahead reads whole sequences, whatever the chunk. ``lengths`` and ``layer`` as in
    ``Model.extend_hidden``. The ids may lie on another device than the model. Without ``chunk`` the pieces are as long
    as ``max_memory`` allows, which counts the state too (see ``memory.chunk_length``); without that either, 8,192
    tokens.
    """
    device = next(model.parameters()).device
    rows, length = ids.shape
    if chunk is None:
        room = None if state is None else state.max_length
        chunk = chunk_length(model, rows, length, max_memory, room=room, ragged=lengths is not None)
    if not model.config.causal or (state is None and length <= chunk and lengths is None):
        yield 0, model.hidden(ids.to(device), layer, lengths)
        return
    state = model.init_state(rows, length) if state is None else state
    for start in range(0, length, chunk):
        piece = ids[:, start : start + chunk]
        own = None if lengths is None else (lengths - start).clamp(0, piece.shape[1])
        yield start, model.extend_hidden(piece.to(device), state, own, layer)


@torch.no_grad()
def token_log_probs(
    model: Model, hidden: Hidden, targets: Int[Tensor, "b l"], *, logits: int | None = None
) -> Float[Tensor, "b l"]:
    """log p(target) of each position, natural, without ever holding more than ``logits`` numbers (2^24).

    The log-softmax is float32 (float64 for a float64 model), and in upstream precision rounded to the model's dtype.
    """
    turn = max(1, (logits or DEFAULT.logits) // (hidden.shape[0] * model.config.vocab_size))
    result = None
    for start in range(0, hidden.shape[1], turn):
        values = _token_log_probs(model, hidden[:, start : start + turn], targets[:, start : start + turn])
        # small tensors that stay between large ones that go would keep the C library from using their place again
        result = values.new_empty(hidden.shape[:2]) if result is None else result
        result[:, start : start + turn] = values
    assert result is not None
    return result


def _token_log_probs(model: Model, hidden: Hidden, targets: Int[Tensor, "b l"]) -> Float[Tensor, "b l"]:
    values = model.logits(hidden)
    wide = torch.promote_types(values.dtype, torch.float32)  # bfloat16 on a CPU would round the maximum, too
    log_softmax = torch.log_softmax(values, dim=-1, dtype=wide).to(values.dtype)
    return log_softmax.gather(2, targets[..., None].to(values.device))[..., 0]
