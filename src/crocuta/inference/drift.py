"""How far the predictions of two models are apart on the same sequences: what an approximation costs end to end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crocuta.errors import InputError, NonFiniteError
from crocuta.inference.batches import batches, evaluating, pad_right
from crocuta.model.chunks import hidden_chunks
from crocuta.model.lm import Model

CHUNK = 8_192
"""Tokens of a row that are run at once."""
LOGITS = 1 << 22
"""Logits of each model that are held at once, in float64."""


@dataclass(frozen=True)
class Drift:
    """Over ``tokens`` predicted tokens, the first of each sequence left out.

    ``max_logit`` and ``mean_logit``: |logit - logit'| over all ids. ``kl``: Kullback-Leibler divergence of the second
    model's distribution from the first's, in bits a token, and ``same_top`` the fraction of positions where both give
    the highest probability to the same id. ``bits_before`` and ``bits_after``: what a token costs each model, so that
    perplexity is 2 to that power. Accumulated in float64.
    """

    tokens: int
    max_logit: float
    mean_logit: float
    kl: float
    same_top: float
    bits_before: float
    bits_after: float

    def to_json(self) -> dict[str, Any]:
        """A plain JSON object."""
        return dataclasses.asdict(self)


@torch.no_grad()
def measure_drift(before: Model, after: Model, rows: Iterable[Tensor]) -> Drift:
    """Both models on each row of ids, any number of rows of any length, in bounded memory; rows of one id say nothing.

    Raises:
        InputError: models of different vocabularies, or nothing to compare. NonFiniteError: NaN logits.
    """
    vocabularies = before.config.vocab_size, after.config.vocab_size
    if len(set(vocabularies)) > 1:
        raise InputError("the models have different vocabularies", given=" and ".join(map(str, vocabularies)))
    total, largest = torch.zeros(6, dtype=torch.float64), 0.0
    with evaluating(before), evaluating(after):
        for group in _groups(rows):
            sums, peak = _compare(before, after, group)
            total, largest = total + sums, max(largest, peak)
    tokens, distance, kl, same, first, second = total.tolist()
    if not tokens:
        raise InputError("there is nothing to compare", expected="sequences of at least two tokens")
    if math.isnan(first) or math.isnan(second):
        raise NonFiniteError(f"the logits of the model {'before' if math.isnan(first) else 'after'} are not a number")
    bit = math.log(2) * tokens
    return Drift(
        tokens=int(tokens),
        max_logit=largest,
        mean_logit=distance / (tokens * vocabularies[0]),
        kl=kl / bit,
        same_top=same / tokens,
        bits_before=first / bit,
        bits_after=second / bit,
    )


def _groups(rows: Iterable[Tensor], most: int = 256) -> Iterable[list[Tensor]]:
    """Rows to run together, of similar length among each ``most`` that follow one another."""
    waiting: list[Tensor] = []
    for row in rows:
        if len(row) > 1:
            waiting.append(row)
        if len(waiting) == most:
            yield from ([waiting[i] for i in group] for group in batches(waiting))
            waiting = []
    yield from ([waiting[i] for i in group] for group in batches(waiting))


def _compare(before: Model, after: Model, rows: list[Tensor]) -> tuple[Tensor, float]:
    """Sums over the real tokens of one batch, and the largest difference of logits."""
    ids, lengths = pad_right(rows)
    inputs = ids[:, :-1]
    total, largest = torch.zeros(6, dtype=torch.float64), 0.0
    turn = max(1, LOGITS // (len(rows) * before.config.vocab_size))
    pairs = zip(hidden_chunks(before, inputs, chunk=CHUNK), hidden_chunks(after, inputs, chunk=CHUNK))
    for (start, first), (_, second) in pairs:
        for offset in range(0, first.shape[1], turn):
            a, b = (m.logits(h[:, offset : offset + turn]).double() for m, h in ((before, first), (after, second)))
            place = start + offset + torch.arange(a.shape[1])
            real = (place < lengths[:, None] - 1).to(a.device)
            targets = ids[:, place + 1].to(a.device)[real]
            a, b = a[real], b[real].to(a.device)
            if len(a):
                difference = (a - b).abs()
                total, largest = total + _sums(a, b, difference, targets).cpu(), max(largest, float(difference.max()))
    return total, largest


def _sums(a: Tensor, b: Tensor, difference: Tensor, targets: Tensor) -> Tensor:
    """Tokens, |logit - logit'|, KL, equal tops, and the two code lengths, in nats, of logits [t v]."""
    log_a, log_b = torch.log_softmax(a, -1), torch.log_softmax(b, -1)
    kl = (log_a.exp() * (log_a - log_b)).sum()
    same = (a.argmax(-1) == b.argmax(-1)).sum().double()
    codes = [-log.gather(1, targets[:, None]).sum() for log in (log_a, log_b)]
    return torch.stack([torch.tensor(float(len(a)), device=a.device).double(), difference.sum(), kl, same, *codes])
