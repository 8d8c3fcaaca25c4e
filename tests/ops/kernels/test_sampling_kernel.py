"""The compiled sampler against the torch one, and at the ends of what it may be given."""

import math

import pytest
import torch
from compiled import needs_library, threads

from crocuta.inference import sampling
from crocuta.inference.sampling import SamplingConfig, row_generators
from crocuta.ops.kernels.decode import sample
from crocuta.ops.kernels.library import switched_off

pytestmark = needs_library

CHOICES = (
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5},
    {"top_k": 1},
    {"top_p": 0.9},
    {"temperature": 2.5, "top_k": 90, "top_p": 0.95},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"temperature": 0.3, "top_k": 40, "top_p": 0.7, "min_p": 0.02},
)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("v", [1, 16, 700, 3001])
def test_sampling_draws_what_the_sampler_draws(choice, v):
    """Few distinct logits in some rows, so that equals lie at the border of what is kept."""
    rows = 24
    logits = 3 * torch.randn(rows, v, generator=torch.Generator().manual_seed(v))
    logits[::3] = logits[::3].round()
    logits[1::4, v // 2 :] = -math.inf
    logits[1::4, 0] = 0.0
    uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in row_generators(range(rows))])
    with switched_off():
        expected = sampling.sample(logits, SamplingConfig(**choice), row_generators(range(rows)))
    ids, log_probs = sample(logits, uniform, **choice)
    assert torch.equal(ids, expected.ids)
    assert float((log_probs - expected.log_probs).abs().max()) < 1e-5
    with threads(2):
        assert torch.equal(sample(logits.repeat(30, 1), uniform.repeat(30), **choice)[0], ids.repeat(30))


def test_the_ends_of_the_uniform_number():
    logits, ends = (
        torch.log(torch.tensor([[1.0, 0.0, 3.0, 0.0]] * 3)),
        torch.tensor([0.0, 0.26, 1 - 2.0**-53], dtype=torch.float64),
    )
    ids, log_probs = sample(logits, ends)
    assert ids.tolist() == [0, 2, 2]
    assert log_probs.exp().tolist() == pytest.approx([0.25, 0.75, 0.75], rel=1e-6)


def test_logits_that_are_no_distribution_have_no_token():
    logits = torch.zeros(4, 40)
    logits[1, 39], logits[2, 0], logits[3] = math.nan, math.inf, -math.inf
    for temperature in (0.0, 1.0):
        ids, _ = sample(logits, torch.full((4,), 0.5, dtype=torch.float64), temperature=temperature)
        assert ids.tolist()[1:] == [-1, -1, -1]
        assert ids[0] >= 0
