"""Sequences of any length in bounded memory: hidden states chunk by chunk, and log-probabilities turn by turn."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crocuta.model.lm import Model
from crocuta.model.state import ModelState
from crocuta.types import Hidden, TokenIds

CHUNK = 8_192
"""Tokens of a row that are run at once; longer rows go through the state."""
LOGITS = 1 << 24
"""Logits that are held at once."""


@torch.no_grad()
def hidden_chunks(
    model: Model,
    ids: TokenIds,
    *,
    state: ModelState | None = None,
    lengths: Int[Tensor, " b"] | None = None,
    layer: int | None = None,
    chunk: int | None = None,
) -> Iterator[tuple[int, Hidden]]:
    """(first position, hidden states) of consecutive pieces of ids [b l], at most ``chunk`` (CHUNK) tokens each.

    ``state`` is what was read before, moved on piece by piece; None: the ids start the sequences, and one piece needs
    no state. ``lengths`` and ``layer`` as in ``Model.extend_hidden``. The ids may lie on another device than the model.
    """
    chunk = chunk or CHUNK
    device = next(model.parameters()).device
    length = ids.shape[1]
    if state is None and length <= chunk and lengths is None:
        yield 0, model.hidden(ids.to(device), layer)
        return
    state = model.init_state(ids.shape[0], length) if state is None else state
    for start in range(0, length, chunk):
        piece = ids[:, start : start + chunk]
        own = None if lengths is None else (lengths - start).clamp(0, piece.shape[1])
        yield start, model.extend_hidden(piece.to(device), state, own, layer)


@torch.no_grad()
def token_log_probs(
    model: Model, hidden: Hidden, targets: Int[Tensor, "b l"], *, logits: int | None = None
) -> Float[Tensor, "b l"]:
    """log p(target) of each position, natural, without ever holding more than ``logits`` (LOGITS) numbers.

    The log-softmax is float32 (float64 for a float64 model), and in upstream precision rounded to the model's dtype.
    """
    turn = max(1, (logits or LOGITS) // (hidden.shape[0] * model.config.vocab_size))
    pieces = []
    for start in range(0, hidden.shape[1], turn):
        values = model.logits(hidden[:, start : start + turn])
        wide = torch.promote_types(values.dtype, torch.float32)  # bfloat16 on a CPU would round the maximum, too
        log_softmax = torch.log_softmax(values, dim=-1, dtype=wide).to(values.dtype)
        wanted = targets[:, start : start + turn].to(values.device)
        pieces.append(log_softmax.gather(2, wanted[..., None])[..., 0])
    return torch.cat(pieces, dim=1)
