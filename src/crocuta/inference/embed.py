"""Embeddings: hidden states of any layer, pooled over each sequence's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crocuta.errors import InputError, NonFiniteError, TokenizerError
from crocuta.inference.batches import TextOrIds, batches, evaluating, pad_right, to_ids
from crocuta.model.chunks import hidden_chunks
from crocuta.model.lm import Model
from crocuta.model.memory import Plan, Size, plan
from crocuta.tokenizers.base import Tokenizer

Pooling: TypeAlias = Literal["mean", "last", "none"]


@torch.no_grad()
def embed(
    model: Model,
    tokenizer: Tokenizer | None,
    sequences: Sequence[TextOrIds],
    *,
    layer: int | None = None,
    pooling: Pooling = "mean",
    last: int = 1,
    special_tokens: bool = False,
    max_memory: Size | None = None,
) -> list[NDArray[np.float32]]:
    """One float32 array a sequence, in the given order: [d], or [l d] with pooling "none".

    ``layer`` as in ``Model.hidden``: None is after the final norm, k the residual stream after block k. "mean", and
    "last", the mean of the ``last`` tokens or of all where there are fewer, look at a sequence's own tokens only, never
    at padding; sums are in float32. Sequences of any length are run in chunks of bounded memory, but for models that
    look ahead, which read them whole. ``special_tokens`` puts those around each sequence that the model's publisher
    does (``Tokenizer.prefix_ids`` and ``suffix_ids``); they count as its own tokens. ``max_memory`` as in ``score``:
    bytes, or text such as "2GiB", that the call may take beyond the loaded model, results included.

    Raises:
        InputError: an empty sequence, ids outside the vocabulary, no such layer or pooling, too little max_memory.
        TokenizerError: special tokens of a tokenizer that has none.
        NonFiniteError: naming the sequence.
    """
    if isinstance(sequences, str | bytes):
        raise InputError("sequences must be a list", given="one text", fix="pass [text]")
    if pooling not in ("mean", "last", "none"):
        raise InputError("unknown pooling", given=repr(pooling), expected="mean, last or none")
    if isinstance(last, bool) or not isinstance(last, int) or last < 1:
        raise InputError("last must be a positive whole number", given=repr(last))
    rows = [to_ids(model, tokenizer, sequence, f"sequence {i}") for i, sequence in enumerate(sequences)]
    if special_tokens:
        prefix, suffix = _special_ids(tokenizer)
        rows = [torch.cat([prefix, row, suffix]) for row in rows]
    result: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(rows)
    of_token = 3 * 8 + (4 * model.config.hidden_size if pooling == "none" else 0)
    run = plan(model, [len(row) for row in rows], max_memory, token_bytes=of_token)
    with evaluating(model):
        for batch in batches(rows, run.tokens):
            for index, values in zip(batch, _pooled(model, [rows[i] for i in batch], layer, pooling, last, run)):
                if not torch.isfinite(values).all():
                    raise NonFiniteError(
                        f"the hidden states of sequence {index} are not finite", fix="check the model's weights"
                    )
                result[index] = values.numpy()
    return result


def _special_ids(tokenizer: Tokenizer | None) -> tuple[Tensor, Tensor]:
    if tokenizer is None or not (tokenizer.prefix_ids or tokenizer.suffix_ids):
        raise TokenizerError("this tokenizer puts no special tokens around a sequence", fix="embed without them")
    prefix, suffix = (torch.tensor(ids, dtype=torch.int64) for ids in (tokenizer.prefix_ids, tokenizer.suffix_ids))
    return prefix, suffix


def _pooled(
    model: Model, rows: list[Tensor], layer: int | None, pooling: Pooling, last: int, run: Plan
) -> list[Tensor]:
    ids, lengths = pad_right(rows)
    seen = None if model.config.causal else lengths  # nothing of a causal model's rows can see their padding
    pieces = hidden_chunks(model, ids, layer=layer, chunk=run.chunk, lengths=seen)
    if pooling == "none":
        every = [torch.empty(len(row), model.config.hidden_size) for row in rows]
        for start, hidden in pieces:
            for row, values in zip(every, hidden):
                row[start : start + len(values)] = values[: max(0, len(row) - start)]
        return every
    total = torch.zeros(len(rows), model.config.hidden_size)
    for start, hidden in pieces:
        positions = torch.arange(start, start + hidden.shape[1])
        counts = positions < lengths[:, None]
        if pooling == "last":
            counts &= positions >= lengths[:, None] - last
        wide = hidden.float().masked_fill(~counts.to(hidden.device)[..., None], 0)
        total += wide.sum(1).cpu()
    return list(total / (lengths if pooling == "mean" else lengths.clamp(max=last))[:, None])
