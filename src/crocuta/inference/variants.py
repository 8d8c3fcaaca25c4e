"""How much an edit changes the likelihood of a sequence: many variants of one, whose shared part is read once.

    crocuta.score_variants(model, tokenizer, genome, [(5, "A", "G"), (120, "", "TT"), (300, "CCC", "")])

One state walks along the sequence. Where variants stand it is forked, and only what follows is computed for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from crocuta.errors import InputError, NonFiniteError
from crocuta.inference.batches import evaluating, to_ids
from crocuta.inference.continuations import advance, suffix_log_probs
from crocuta.inference.prefix import first_fault
from crocuta.inference.score import bos_ids, reverse_complement
from crocuta.model.lm import Model
from crocuta.tokenizers.base import Tokenizer

SLACK = 32
"""Tokens that a variant may be away from the first of its group, and a further 1 / SLACK of what follows: the part
between them is computed for each, which costs less than one more call."""


class Variant(NamedTuple):
    """An edit of a sequence: ``reference``, which stands at ``position`` (from 0), becomes ``alternative``.

    An insertion before ``position`` has an empty reference, a deletion an empty alternative. Any triple will do.
    """

    position: int
    reference: str
    alternative: str


@dataclass(frozen=True)
class VariantScore:
    """What ``score`` says of the whole edited sequence: ``total``, natural, over ``tokens`` tokens.

    ``delta`` is the total minus that of the sequence without the edit: negative for an edit that the model finds
    less likely. With both strands the two are averages over the strands.
    """

    variant: Variant
    total: float
    delta: float
    tokens: int


@torch.no_grad()
def score_variants(
    model: Model,
    tokenizer: Tokenizer,
    sequence: str,
    variants: Sequence[Variant | tuple[int, str, str]],
    *,
    both_strands: bool = False,
    bos: bool = False,
) -> list[VariantScore]:
    """The score of ``sequence`` with each of the variants alone, in the given order.

    Equal to ``score`` of the edited sequences, but for rounding; log-probabilities are added up in float64. The cost is
    that of the sequence, once, and of what follows each variant: n variants at its end cost little more than one.
    ``both_strands`` and ``bos`` as in ``score``.

    Raises:
        InputError: naming the variant: a position outside the sequence, a reference that does not stand there, an edit
            of nothing, or an edited sequence with nothing to score or too long for the model's filters.
        TokenizerError: no BOS token, or no complement. NonFiniteError: NaN logits, naming the variant.
    """
    checked = _checked(sequence, variants)
    start = bos_ids(tokenizer) if bos else torch.empty(0, dtype=torch.int64)
    forward = to_ids(model, tokenizer, sequence, "the sequence")
    strands = [forward, reverse_complement(forward, tokenizer)] if both_strands else [forward]
    references = [torch.cat([start, strand]) for strand in strands]
    _check_length(references[0], "the sequence")
    edits: list[list[_Edit]] = [[] for _ in strands]
    for i, variant in enumerate(checked):
        after = variant.position + len(variant.reference)
        text = sequence[: variant.position] + variant.alternative + sequence[after:]
        ids = to_ids(model, tokenizer, text, f"the sequence with variant {i}")
        _check_length(torch.cat([start, ids]), f"the sequence with variant {i}")
        for strand, reference in enumerate(references):
            edited = ids if strand == 0 else reverse_complement(ids, tokenizer)
            edits[strand].append(_edit(reference, torch.cat([start, edited])))
    with evaluating(model):
        scored = [_totals(model, *strand) for strand in zip(references, edits)]
    results = []
    for i, variant in enumerate(checked):
        total = sum(totals[i] for _, totals in scored) / len(scored)
        before = sum(reference for reference, _ in scored) / len(scored)
        results.append(VariantScore(variant, total, total - before, edits[0][i].length - 1))
    return results


# --- edits of ids ---


@dataclass(frozen=True)
class _Edit:
    """An edited row of ids beside the reference r: r[:shared], then ``middle``, then r[resumed:]."""

    shared: int
    middle: Tensor
    resumed: int
    length: int

    @property
    def fork(self) -> int:
        """How many tokens may be read before its own way begins: one of those that it shares must be left to read."""
        return max(0, self.shared - 1)

    @property
    def changes(self) -> bool:
        return self.shared < self.length or self.shared < self.resumed

    def row(self, reference: Tensor, start: int) -> Tensor:
        """The edited ids from ``start`` on, which is not after ``fork``."""
        return torch.cat([reference[start : self.shared], self.middle, reference[self.resumed :]])


def _edit(reference: Tensor, edited: Tensor) -> _Edit:
    """The shortest edit, found in the ids: tokens of several letters may change before and after the letters do."""
    a, b = reference.numpy(), edited.numpy()
    least = min(len(a), len(b))
    shared = _equal(a[:least], b[:least])
    rest = least - shared
    tail = _equal(a[len(a) - rest :][::-1], b[len(b) - rest :][::-1])
    return _Edit(shared, edited[shared : len(b) - tail].clone(), len(a) - tail, len(b))


def _equal(a: np.ndarray, b: np.ndarray) -> int:
    """How many numbers at the start are equal."""
    differ = a != b
    return int(differ.argmax()) if differ.any() else len(a)


# --- scoring ---


def _totals(model: Model, reference: Tensor, edits: Sequence[_Edit]) -> tuple[float, list[float]]:
    """The total of the reference and that of each edit."""
    last = len(reference) - 1
    room = max([len(reference), *(edit.length for edit in edits)])
    state, position = model.init_state(1, room), 0
    known = torch.zeros(len(reference), dtype=torch.float64)  # log p of each token of the reference but the first
    own = [0.0] * len(edits)
    starts = [last] * len(edits)
    for start, group in [*_groups(edits), (last, [])]:
        known[position + 1 : start + 1] = advance(model, state, reference[None, position : start + 1])[0]
        position = start
        rows = [edits[i].row(reference, start) for i in group]
        for place, log_probs in suffix_log_probs(model, state, rows, [f"variant {i}" for i in group]):
            own[group[place]] = float(log_probs.sum(dtype=torch.float64))
            starts[group[place]] = start
    if known.isnan().any():
        raise NonFiniteError("the model's logits are not a number for the sequence", fix=first_fault(state))
    before = known.cumsum(0)
    return float(before[last]), [float(before[start]) + value for start, value in zip(starts, own)]


def _groups(edits: Sequence[_Edit]) -> Iterator[tuple[int, list[int]]]:
    """(where to fork, edits) of edits that are near one another, in order of position; without those that are none."""
    start, group = 0, list[int]()
    for i in sorted((i for i, edit in enumerate(edits) if edit.changes), key=lambda i: edits[i].fork):
        fork = edits[i].fork
        if group and fork - start > SLACK + (edits[i].length - fork) // SLACK:
            yield start, group
            group = []
        if not group:
            start = fork
        group.append(i)
    if group:
        yield start, group


# --- arguments ---


def _checked(sequence: str, variants: Sequence[Variant | tuple[int, str, str]]) -> list[Variant]:
    if not isinstance(sequence, str):
        raise InputError("the sequence must be text", given=type(sequence).__name__)
    if isinstance(variants, str | Variant):
        raise InputError("variants must be a list", given="one", fix="pass [variant]")
    return [_variant(sequence, i, variant) for i, variant in enumerate(variants)]


def _variant(sequence: str, number: int, given: Variant | tuple[int, str, str]) -> Variant:
    try:
        variant = Variant(*given)
    except TypeError:
        variant = None
    name = f"variant {number}"
    if variant is None or type(variant.position) is not int or not all(isinstance(text, str) for text in variant[1:]):
        raise InputError(f"{name} is none", given=given, expected="(position, reference, alternative)")
    position, reference, alternative = variant
    if not reference and not alternative:
        raise InputError(f"{name} edits nothing", given=given, expected="a reference or an alternative")
    if not 0 <= position <= len(sequence) - len(reference):
        raise InputError(
            f"{name} is not inside the sequence",
            given=f"position {position} and a reference of {len(reference)}",
            expected=f"a position from 0 to {len(sequence) - len(reference)}",
            fix="count positions from 0",
        )
    there = sequence[position : position + len(reference)]
    if there != reference:
        raise InputError(
            f"the reference of {name} does not stand at position {position}",
            given=repr(reference),
            expected=repr(there),
            fix="count positions from 0",
        )
    return variant


def _check_length(ids: Tensor, name: str) -> None:
    if len(ids) < 2:
        raise InputError(f"{name} has nothing to score", given=f"{len(ids)} token", expected="at least 2")
