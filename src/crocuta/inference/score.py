"""Log-likelihoods: how probable a model finds given sequences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crocuta.errors import InputError, NonFiniteError, TokenizerError
from crocuta.inference.batches import TextOrIds, batches, check_causal, evaluating, pad_right, to_ids
from crocuta.model.chunks import hidden_chunks, token_log_probs
from crocuta.model.lm import Model
from crocuta.model.memory import Plan, Size, plan
from crocuta.tokenizers.base import Tokenizer

_TOKEN_BYTES = 8 + 8 + 8 + 4
"""Ids as they came, with what goes before them, and in a batch; and a log-probability."""


@dataclass(frozen=True)
class Score:
    """Natural log-likelihood of a sequence, given its first token (or the BOS token, where asked for).

    ``log_probs`` float32 [l - 1]: log p(token t | tokens before t) for t = 1 .. l-1; with BOS, [l] from t = 0.
    ``total`` is their sum, accumulated in float64, and ``mean`` the total over their number. With both strands,
    ``total`` and ``mean`` are the averages over the strands, ``log_probs`` the given strand's.
    """

    log_probs: NDArray[np.float32]
    total: float
    mean: float
    tokens: int


@torch.no_grad()
def score(
    model: Model,
    tokenizer: Tokenizer | None,
    sequences: Sequence[TextOrIds],
    *,
    both_strands: bool = False,
    bos: bool = False,
    max_memory: Size | None = None,
) -> list[Score]:
    """The log-likelihood of each sequence (text or ids), in the given order.

    Logits and log-softmax are float32 (float64 for a float64 model); in upstream precision both are rounded to the
    model's dtype. A sequence's score does not depend on what it is batched with, but for rounding; sequences of any
    length are run in chunks of bounded memory.

    Args:
        both_strands: also score the reverse complement and average; needs a tokenizer of nucleotides.
        bos: put the tokenizer's beginning-of-sequence token first, so that the first token is scored too.
        max_memory: bytes, or text such as "2GiB", that the call may take beyond the loaded model: states, chunks,
            logits, ids and results (``model.memory`` says how it is counted). None: batches of 16,384 tokens, chunks
            of 8,192. It changes scores by rounding alone.

    Raises:
        InputError: an empty sequence, one with nothing to score, ids outside the vocabulary, too little max_memory.
        TokenizerError: no BOS token, or no complement. NonFiniteError: NaN logits, naming the sequence.
    """
    if isinstance(sequences, str | bytes):
        raise InputError("sequences must be a list", given="one text", fix="pass [text]")
    check_causal(model, "score")
    rows = [to_ids(model, tokenizer, sequence, f"sequence {i}") for i, sequence in enumerate(sequences)]
    other = [reverse_complement(row, tokenizer) for row in rows] if both_strands else []
    prefix = bos_ids(tokenizer) if bos else torch.empty(0, dtype=torch.int64)
    all_rows = [torch.cat([prefix, row]) for row in [*rows, *other]]
    for i, row in enumerate(all_rows):
        if len(row) < 2:
            raise InputError(
                f"sequence {i} has nothing to score",
                given="1 token",
                expected="at least 2",
                fix="pass bos=True if the tokenizer has a BOS token",
            )
    log_probs: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(all_rows)
    run = plan(model, [len(row) for row in all_rows], max_memory, token_bytes=_TOKEN_BYTES)
    with evaluating(model):
        for batch in batches(all_rows, run.tokens):
            names = [i % len(rows) for i in batch]  # a strand goes by its sequence
            for index, values in zip(batch, _log_probs(model, [all_rows[i] for i in batch], names, run)):
                log_probs[index] = values
    strands = [log_probs[: len(rows)], *([log_probs[len(rows) :]] if both_strands else [])]
    return [summary(values) for values in zip(*strands)]


def _log_probs(model: Model, rows: list[Tensor], names: list[int], run: Plan) -> list[NDArray[np.float32]]:
    ids, lengths = pad_right(rows)
    whole = torch.empty(len(rows), ids.shape[1] - 1)
    for start, hidden in hidden_chunks(model, ids[:, :-1], chunk=run.chunk):
        end = start + hidden.shape[1]
        whole[:, start:end] = token_log_probs(model, hidden, ids[:, start + 1 : end + 1], logits=run.logits)
    result = []
    for row, length, name in zip(whole, lengths.tolist(), names):
        values = row[: length - 1]
        if torch.isnan(values).any():
            raise NonFiniteError(f"the model's logits are not a number for sequence {name}", fix="check its weights")
        result.append(values.numpy())
    return result


def summary(strands: tuple[NDArray[np.float32], ...]) -> Score:
    """The score of one sequence from the log-probabilities [l] of its strand or strands, the given one first."""
    totals = [math.fsum(_floats(values)) for values in strands]
    total, tokens = sum(totals) / len(totals), len(strands[0])
    return Score(strands[0], total, total / tokens, tokens)


def _floats(values: NDArray[np.float32]) -> Iterator[float]:
    """One after the other: a list of a million Python floats takes ten times what the array does."""
    for start in range(0, len(values), 1024):
        yield from values[start : start + 1024].tolist()


def reverse_complement(row: Tensor, tokenizer: Tokenizer | None) -> Tensor:
    """The ids of the other strand. Raises TokenizerError for a tokenizer without nucleotides."""
    table = None if tokenizer is None else tokenizer.complement_ids
    if table is None:
        raise TokenizerError(
            "both strands need a tokenizer of nucleotides", given=None if tokenizer is None else tokenizer.type
        )
    return torch.tensor(table)[row.flip(0)]


def bos_ids(tokenizer: Tokenizer | None) -> Tensor:
    """The BOS token as ids [1]. Raises TokenizerError if there is none."""
    if tokenizer is None or tokenizer.bos_id is None:
        raise TokenizerError("this tokenizer has no BOS token", fix="score without bos")
    return torch.tensor([tokenizer.bos_id])
