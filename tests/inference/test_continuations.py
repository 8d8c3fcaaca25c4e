"""Continuations of one prefix, scored side by side: each has the score that it has in the whole text."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import KINDS, random_ids, text_model, tiny_model

from crocuta.errors import InputError, NonFiniteError, StateError, TokenizerError
from crocuta.inference import continuations as module
from crocuta.inference.batches import batches
from crocuta.inference.continuations import advance, score_continuations, suffix_log_probs
from crocuta.inference.prefix import Prefix, read_prefix
from crocuta.inference.score import score
from crocuta.model import memory
from crocuta.model.lm import Model
from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.dna import DNATokenizer

BYTES = ByteTokenizer(vocab_size=256)
DNA = DNATokenizer()
LENGTHS = (1, 30, 7, 1, 12, 31)


@torch.no_grad()
def expected_log_probs(model: Model, prefix: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """log p of each token of ``row`` after ``prefix``, from one pass over both."""
    ids = torch.cat([prefix, row])
    log_probs = model(ids[None])[0].log_softmax(-1)
    return log_probs[torch.arange(len(prefix) - 1, len(ids) - 1), row]


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_has_the_log_probability_of_the_whole_text(kind):
    model = tiny_model(kind, torch.float64, seed=1)
    prefix = random_ids(40, seed=1)
    rows = [random_ids(length, seed=10 + i) for i, length in enumerate(LENGTHS)]
    for start in (prefix, read_prefix(model, None, prefix)):
        for row, result in zip(rows, score_continuations(model, None, start, rows), strict=True):
            expected = expected_log_probs(model, prefix, row)
            np.testing.assert_allclose(result.log_probs, expected.float().numpy(), rtol=0, atol=1e-6)
            assert result.log_probs.dtype == np.float32
            assert result.tokens == len(row)
            assert result.total == pytest.approx(float(expected.sum()), abs=1e-5)
            assert result.mean == pytest.approx(result.total / result.tokens)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["stripe", "complex-raw", "attention-gqa", "explicit-fft"])
@pytest.mark.parametrize("bound", ["tokens", "states"])
def test_batches_of_any_size_give_the_same(kind, bound, monkeypatch):
    model = tiny_model(kind, torch.float64, seed=1)
    prefix = random_ids(40, seed=1)
    rows = [random_ids(length, seed=10 + i) for i, length in enumerate(LENGTHS)]
    state = model.init_state(1, 40)
    model.extend(prefix[None, :-1], state)
    before = state.copy()
    rows = [torch.cat([prefix[-1:], row]) for row in rows]
    if bound == "states":
        monkeypatch.setattr(module, "STATE_BYTES", 2 * model.with_room(state, 71).nbytes)
    else:
        monkeypatch.setattr(memory, "FEW", 10)
        monkeypatch.setattr(module, "batches", partial(batches, tokens=50))
    seen = []
    extend = Model.extend_hidden
    monkeypatch.setattr(Model, "extend_hidden", lambda *a: seen.append(tuple(a[1].shape)) or extend(*a))
    results = dict(suffix_log_probs(model, state, rows, [""] * len(rows)))
    assert sorted(results) == list(range(len(rows)))
    assert max(rows for rows, _ in seen) <= (2 if bound == "states" else 3)
    assert len(seen) > 2
    for i, values in results.items():
        torch.testing.assert_close(values, expected_log_probs(model, prefix, rows[i][1:]), rtol=0, atol=1e-9)
    pairs = zip(state.named_tensors(), before.named_tensors(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs), "the state was moved on"


def test_text_is_scored_as_by_score():
    model = tiny_model("stripe", seed=1)
    texts = ["A", "ACGTACGT", "GG"]
    whole = score(model, DNA, ["ACGTTGCA" + text for text in texts])
    for text, part, full in zip(texts, score_continuations(model, DNA, "ACGTTGCA", texts), whole, strict=True):
        np.testing.assert_allclose(part.log_probs, full.log_probs[-len(text) :], rtol=0, atol=1e-5)
    assert score_continuations(model, DNA, "ACGT", []) == []


@torch.no_grad()
def test_upstream_precision_rounds_as_score_does():
    model = tiny_model("stripe", torch.bfloat16, seed=1)
    model._narrow_logits = True
    prefix, row = random_ids(9, seed=1), random_ids(5, seed=2)
    log_probs = score_continuations(model, None, prefix, [row])[0].log_probs
    assert np.array_equal(log_probs, torch.from_numpy(log_probs).bfloat16().float().numpy())


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_in_its_mode(training):
    model = tiny_model("stripe").train(training)
    score_continuations(model, None, [7, 8], [[9, 9]])
    assert model.training == training


WRONG = {
    "one-text": (("a", "bc"), InputError, r"continuations must be a list: got one text; pass \[text\]"),
    "empty": (("a", ["b", ""]), InputError, "continuation 1 is empty"),
    "empty-prefix": (("", ["b"]), InputError, "the prefix is empty"),
    "foreign": (("a", ["b", [256]]), InputError, "continuation 1 has an id outside the vocabulary"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    arguments, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        score_continuations(text_model("abc"), BYTES, *arguments)


def test_prefixes_that_do_not_fit():
    model = tiny_model("stripe")
    prefix = read_prefix(model, None, random_ids(150))
    with pytest.raises(StateError, match="the prefix belongs to a model with another configuration"):
        score_continuations(tiny_model("attention"), None, prefix, [[1]])
    with pytest.raises(StateError, match="the prefix has several rows"):
        score_continuations(model, None, prefix.select([0, 0]), [[1]])
    with pytest.raises(InputError, match=r"continuation 1, with its prefix, is longer .*: got 161 tokens; .* 160"):
        score_continuations(model, None, prefix, [[1], random_ids(11)])
    with pytest.raises(TokenizerError, match="continuation 0 is text and there is no tokenizer"):
        score_continuations(model, None, prefix, ["A"])


@torch.no_grad()
def test_what_is_not_finite_is_named():
    model = tiny_model("complex-raw", seed=1)
    prefix = read_prefix(model, None, random_ids(20, seed=1))
    model.blocks[1].mixer.filter.poles[1, 0] = torch.tensor([0.0, 3.0])
    rows = [random_ids(3), random_ids(200), random_ids(5)]
    message = r"not a number for continuation 1; the first that is not finite is block 1, long\.modes, row 1: check"
    with pytest.raises(NonFiniteError, match=message):
        score_continuations(model, None, prefix, rows)
    broken = Prefix(prefix.state, prefix.logits * torch.nan, prefix.seen)
    with pytest.raises(NonFiniteError, match="the logits after the prefix are not a number"):
        score_continuations(model, None, broken, rows)


@torch.no_grad()
def test_advance_reads_all_but_the_last():
    model = tiny_model("stripe", torch.float64, seed=1)
    ids = random_ids(2, 9, seed=1)
    state = model.init_state(2, 9)
    values = advance(model, state, ids)
    assert values.shape == (2, 8)
    assert state.lengths.tolist() == [8, 8]
    assert advance(model, state, ids[:, -1:]).shape == (2, 0)
    assert state.lengths.tolist() == [8, 8]
