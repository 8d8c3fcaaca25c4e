"""What scoring, embedding and generation share: sequences to ids, and rows to batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crocuta.errors import InputError, TokenizerError
from crocuta.model.encoder import Encoder
from crocuta.model.lm import Model
from crocuta.model.memory import DEFAULT, group
from crocuta.tokenizers.base import Tokenizer

TextOrIds: TypeAlias = "str | bytes | Sequence[int] | NDArray[np.integer] | Tensor"

TOKENS_A_BATCH = DEFAULT.tokens
"""Tokens, padding included, that are run at once."""


def check_causal(model: Model, verb: str) -> None:
    """InputError for a model that sees what it should predict."""
    if not model.config.causal:
        raise InputError(
            f"a model that looks ahead cannot {verb}: it sees the tokens that it would predict",
            given="bidirectional blocks",
            expected="causal ones",
            fix="embed with it, or make an encoder of it",
        )


def to_ids(model: Model | Encoder, tokenizer: Tokenizer | None, sequence: TextOrIds, name: str) -> Tensor:
    """Ids [l] on the CPU of text or ids. Raises InputError for an empty or impossible sequence."""
    if isinstance(sequence, str | bytes):
        if tokenizer is None:
            raise TokenizerError(f"{name} is text and there is no tokenizer", fix="pass ids, or a tokenizer")
        ids = torch.from_numpy(tokenizer.encode(sequence))
    else:
        ids = _as_ids(sequence, name)
    if ids.ndim != 1 or not len(ids):
        raise InputError(
            f"{name} is empty" if ids.ndim == 1 else f"{name} must be one row of ids", given=tuple(ids.shape)
        )
    low, high = (int(x) for x in ids.aminmax())
    size = model.config.vocab_size or 0
    if low < 0 or high >= size:
        raise InputError(
            f"{name} has an id outside the vocabulary",
            given=f"ids from {low} to {high}",
            expected=f"0 to {size - 1}",
            fix="use the tokenizer this model was trained with",
        )
    limit = model.config.max_length
    if limit is not None and len(ids) > limit:
        raise InputError(
            f"{name} is longer than the model's filters are defined for",
            given=f"{len(ids)} tokens",
            expected=f"at most {limit}",
        )
    return ids


def _as_ids(sequence: Sequence[int] | NDArray[np.integer] | Tensor, name: str) -> Tensor:
    try:
        ids = torch.as_tensor(sequence)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is neither text nor ids", given=error, expected="text or one row of ids") from error
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise InputError(f"{name} must hold ids", given=ids.dtype, expected="whole numbers")
    return ids.to("cpu", torch.int64)


@contextmanager
def evaluating(model: Model | Encoder) -> Iterator[None]:
    """Evaluation mode, and afterwards, whatever happens, the mode that the model was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def pad_right(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of ids as one matrix [b l], zeros on the right, and their lengths [b]."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True), torch.tensor([len(row) for row in rows])


def batches(rows: Sequence[Tensor], tokens: int = TOKENS_A_BATCH) -> Iterator[list[int]]:
    """Indices of rows to run together, of similar lengths (``memory.group``)."""
    return group([len(row) for row in rows], tokens)
