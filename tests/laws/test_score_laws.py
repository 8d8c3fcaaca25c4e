"""Log-likelihoods are those of one distribution: chain rule, both strands, and what generation says of its tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import KINDS, random_ids, tiny_model

from crocuta.inference.generate import generate
from crocuta.inference.sampling import SamplingConfig
from crocuta.inference.score import score
from crocuta.tokenizers.dna import DNATokenizer

TOKENIZER = DNATokenizer()
sequences = st.text("ACGTN", min_size=1, max_size=60)


def reverse_complement(sequence: str) -> str:
    return sequence[::-1].translate(str.maketrans("ACGT", "TGCA"))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5)
@given(first=sequences, second=sequences)
def test_chain_rule(kind, first, second):
    """log p(xy) = log p(x) + log p(y | x), the last from the state that x has left."""
    model = tiny_model(kind, torch.float64, seed=1)
    whole, prefix = score(model, TOKENIZER, [first + second, first], bos=True)
    with torch.no_grad():
        state = model.init_state(1, 150)
        ids = torch.from_numpy(np.concatenate([[TOKENIZER.bos_id], TOKENIZER.encode(first)]))[None]
        targets = torch.from_numpy(TOKENIZER.encode(second))[None]
        logits = [model.extend(ids, state)[:, -1:], model.extend(targets, state)[:, :-1]]
        log_probs = torch.cat(logits, dim=1).log_softmax(-1).gather(2, targets[..., None])
    assert whole.total == pytest.approx(prefix.total + float(log_probs.sum()), rel=1e-6, abs=1e-5)
    assert whole.total == pytest.approx(prefix.total + math.fsum(whole.log_probs[len(first) :]), rel=1e-6, abs=1e-5)
    assert (whole.tokens, prefix.tokens) == (len(first + second), len(first))
    assert whole.mean == whole.total / whole.tokens


@pytest.mark.parametrize("kind", ["stripe", "implicit", "real-raw"])
@settings(max_examples=10)
@given(sequence=st.text("ACGTN", min_size=2, max_size=60), bos=st.booleans())
def test_both_strands_score_as_one(kind, sequence, bos):
    model = tiny_model(kind, torch.float64, seed=1)
    other = reverse_complement(sequence)
    forward, backward = score(model, TOKENIZER, [sequence, other], bos=bos, both_strands=True)
    assert forward.total == backward.total
    assert forward.mean == backward.mean
    one, two = score(model, TOKENIZER, [sequence, other], bos=bos)
    assert forward.total == pytest.approx((one.total + two.total) / 2, rel=1e-6, abs=1e-5)
    np.testing.assert_allclose(forward.log_probs, one.log_probs, rtol=1e-6)
    if sequence != other:
        assert one.total != two.total  # the control: one strand alone is not symmetric


@pytest.mark.parametrize("kind", KINDS)
def test_generated_tokens_score_as_they_were_generated(kind):
    """The model's own log-probabilities, whatever the temperature and the filters of the draw."""
    model = tiny_model(kind, torch.float64, seed=1)
    prompts = [random_ids(length, seed=length) for length in (1, 7, 30)]
    sampling = SamplingConfig(temperature=1.7, top_k=9, top_p=0.9, repetition_penalty=1.3)
    results = generate(model, None, prompts, max_tokens=25, sampling=sampling, samples=2, seed=3)
    whole = [torch.cat([prompts[r.prompt], torch.tensor(r.ids)]) for r in results]
    for result, scored in zip(results, score(model, None, whole), strict=True):
        assert len(result.ids) == 25
        np.testing.assert_allclose(result.log_probs, scored.log_probs[-25:], rtol=0, atol=2e-6)
