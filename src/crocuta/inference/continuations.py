"""How probable a model finds what might come next: many continuations of one text, which is read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crocuta.errors import InputError, NonFiniteError
from crocuta.inference.batches import TextOrIds, batches, evaluating, pad_right, to_ids
from crocuta.inference.prefix import Prefix, check_prefix, first_fault, read_prefix
from crocuta.inference.score import Score, summary
from crocuta.model.chunks import hidden_chunks, token_log_probs
from crocuta.model.lm import Model
from crocuta.model.state import ModelState
from crocuta.tokenizers.base import Tokenizer

STATE_BYTES = 256 << 20
"""Bytes of states that are held at once; the number of rows side by side follows from it."""


@torch.no_grad()
def score_continuations(
    model: Model, tokenizer: Tokenizer | None, prefix: Prefix | TextOrIds, continuations: Sequence[TextOrIds]
) -> list[Score]:
    """The log-likelihood of each continuation (text or ids) given ``prefix``, in the given order.

    ``log_probs`` of a score is [l]: log p(token t | prefix, tokens before t) for every token, the first included. The
    prefix is read once, or not at all where it has been read (``read_prefix``), and is left as it is. A continuation's
    ids are those it has alone: tokenizers of sub-words may cut the joined text elsewhere.

    Raises:
        InputError: an empty continuation, ids outside the vocabulary, or more tokens than the filters are defined for.
        StateError: another model's prefix. NonFiniteError: NaN logits, naming the continuation.
    """
    if isinstance(continuations, str | bytes):
        raise InputError("continuations must be a list", given="one text", fix="pass [text]")
    names = [f"continuation {i}" for i in range(len(continuations))]
    rows = [to_ids(model, tokenizer, text, name) for name, text in zip(names, continuations)]
    start = prefix if isinstance(prefix, Prefix) else read_prefix(model, tokenizer, prefix)
    check_prefix(model, start, "the prefix")
    for name, row in zip(names, rows):
        check_limit(model, start.length + len(row), f"{name}, with its prefix,")
    values = start.logits[0]
    wide = torch.promote_types(values.dtype, torch.float32)
    first = torch.log_softmax(values, dim=-1, dtype=wide).to(values.dtype).cpu()
    if first.isnan().any():
        raise NonFiniteError("the logits after the prefix are not a number", fix=first_fault(start.state))
    scores: list[Score | None] = [None] * len(rows)
    with evaluating(model):
        for i, later in suffix_log_probs(model, start.state, rows, names):
            log_probs = torch.cat([first[rows[i][:1]], later])
            scores[i] = summary((log_probs.float().numpy(),))
    return [score for score in scores if score is not None]


def check_limit(model: Model, tokens: int, name: str) -> None:
    """InputError for more tokens than the model's filters are defined for."""
    limit = model.config.max_length
    if limit is not None and tokens > limit:
        raise InputError(
            f"{name} is longer than the model's filters are defined for",
            given=f"{tokens} tokens",
            expected=f"at most {limit}",
        )


def suffix_log_probs(
    model: Model, state: ModelState, rows: Sequence[Tensor], names: Sequence[str]
) -> Iterator[tuple[int, Float[Tensor, " l"]]]:
    """(index, log p of all tokens but the first) of rows of ids that continue a state of one row, which stays.

    They come in any order, on the CPU, float32 or wider. Rows are run side by side from forks of the state, as many as
    bounded memory allows. ``names`` are what a NonFiniteError calls them.
    """
    longest = max((len(row) for row in rows), default=1)
    state = with_room_for(model, state, longest - 1)
    most = max(1, STATE_BYTES // max(1, state.nbytes))
    for group in batches(rows):
        for begin in range(0, len(group), most):
            batch = group[begin : begin + most]
            ids, lengths = pad_right([rows[i] for i in batch])
            fork = state.select([0] * len(batch))
            values = advance(model, fork, ids)
            for place, (i, length) in enumerate(zip(batch, lengths.tolist())):
                if values[place, : length - 1].isnan().any():
                    fault = first_fault(fork.select([place]), [i])
                    raise NonFiniteError(f"the model's logits are not a number for {names[i]}", fix=fault)
                yield i, values[place, : length - 1]


def with_room_for(model: Model, state: ModelState, tokens: int) -> ModelState:
    """``state``, or a copy with more room if so many more tokens do not fit."""
    longest = int(state.lengths.max()) + tokens
    return state if state.max_length is None or longest <= state.max_length else model.with_room(state, longest)


def advance(model: Model, state: ModelState, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l-1"]:
    """Read all ids but the last of each row into ``state``: log p of all but the first, on the CPU."""
    pieces = [torch.empty(len(ids), 0)]
    if ids.shape[1] > 1:
        pieces = [
            token_log_probs(model, hidden, ids[:, start + 1 : start + 1 + hidden.shape[1]]).cpu()
            for start, hidden in hidden_chunks(model, ids[:, :-1], state=state)
        ]
    return torch.cat(pieces, dim=1)
