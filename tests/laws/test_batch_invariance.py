"""Scores, embeddings and generated tokens of a sequence do not depend on what it is batched with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import KINDS, random_ids, tiny_model

from crocuta.inference.embed import embed
from crocuta.inference.generate import generate
from crocuta.inference.sampling import SamplingConfig
from crocuta.inference.score import score

neighbours = st.tuples(st.lists(st.integers(2, 60), min_size=1, max_size=5), st.integers(0, 5), st.integers(2, 60))


def hide(needle: torch.Tensor, lengths: list[int], place: int) -> tuple[list[torch.Tensor], int]:
    """The needle among other sequences, and where it is."""
    rows = [random_ids(length, seed=10 + i) for i, length in enumerate(lengths)]
    place = min(place, len(rows))
    return [*rows[:place], needle, *rows[place:]], place


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4)
@given(case=neighbours)
def test_scores(kind, case):
    lengths, place, own = case
    model = tiny_model(kind, torch.float64, seed=1)
    needle = random_ids(own, seed=2)
    rows, place = hide(needle, lengths, place)
    alone, among = score(model, None, [needle])[0], score(model, None, rows)[place]
    np.testing.assert_allclose(among.log_probs, alone.log_probs, rtol=1e-6, atol=0)
    assert among.tokens == own - 1
    assert among.total == pytest.approx(alone.total, rel=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "last", "none"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=2)
@given(case=neighbours)
def test_embeddings(kind, pooling, case):
    lengths, place, own = case
    model = tiny_model(kind, torch.float64, seed=1)
    needle = random_ids(own, seed=2)
    rows, place = hide(needle, lengths, place)
    alone, among = embed(model, None, [needle], pooling=pooling)[0], embed(model, None, rows, pooling=pooling)[place]
    assert among.shape == ((own, 8) if pooling == "none" else (8,))
    np.testing.assert_allclose(among, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampling", [SamplingConfig(temperature=0), SamplingConfig()], ids=["greedy", "drawn"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=2)
@given(case=neighbours)
def test_generation(kind, sampling, case):
    lengths, place, own = case
    model = tiny_model(kind, torch.float64, seed=1)
    needle = random_ids(own, seed=2)
    rows, place = hide(needle, lengths, place)
    seeds = list(range(100, 100 + len(rows)))
    among = generate(model, None, rows, max_tokens=12, sampling=sampling, seeds=seeds)[place]
    alone = generate(model, None, [needle], max_tokens=12, sampling=sampling, seeds=[seeds[place]])[0]
    assert among.ids == alone.ids
    assert among.log_probs == pytest.approx(alone.log_probs, rel=1e-6)
