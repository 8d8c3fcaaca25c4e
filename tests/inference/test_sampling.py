"""Sampling against a plain Python oracle, known distributions, and the independence of rows."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_paths import COMPILED, TORCH

from crocuta.errors import InputError, NonFiniteError
from crocuta.inference.sampling import SamplingConfig, _filtered, row_generators, sample, token_history


@pytest.fixture(autouse=True, scope="module", params=[COMPILED, TORCH])
def path(request):
    with request.param():
        yield


GREEDY = SamplingConfig(temperature=0)
# Whole logits make ties common; the shares of top_p and min_p are reached by no sum of their softmaxes.
rows = st.lists(st.integers(-3, 3), min_size=1, max_size=9)
configs = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.none() | st.integers(1, 10),
    top_p=st.none() | st.sampled_from([0.0317, 0.2903, 0.6101, 0.8899, 1.0]),
    min_p=st.none() | st.sampled_from([0.0, 0.0303, 0.2711, 0.9007, 1.0]),
)


def oracle(logits: list[float], config: SamplingConfig) -> list[float]:
    """Probability of each token, one filter after the other, as their definitions say."""
    exact = [math.exp((x - max(logits)) / config.temperature) for x in logits]
    likely = sorted(range(len(logits)), key=lambda i: (-exact[i], i))[: config.top_k]
    if config.top_p is not None and config.top_p < 1:
        mass, reached, kept = sum(exact[i] for i in likely), 0.0, []
        for i in likely:
            kept.append(i)
            reached += exact[i] / mass
            if reached >= config.top_p:
                break
        likely = kept
    likely = [i for i in likely if exact[i] >= (config.min_p or 0) * exact[likely[0]]]
    total = sum(exact[i] for i in likely)
    return [exact[i] / total if i in likely else 0.0 for i in range(len(logits))]


@settings(deadline=None, max_examples=300)
@given(row=rows, config=configs)
def test_filters_are_those_of_the_oracle(row, config):
    weights = _filtered(torch.tensor([row], dtype=torch.float32), config)[0].double()
    assert (weights / weights.sum()).tolist() == pytest.approx(oracle(row, config), rel=1e-6)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SamplingConfig(), [0.4, 0.1, 0.2, 0.2, 0.1]),
        (SamplingConfig(top_k=2), [2 / 3, 0, 1 / 3, 0, 0]),  # ids 2 and 3 are equal: the lower stays
        (SamplingConfig(top_p=0.41), [2 / 3, 0, 1 / 3, 0, 0]),
        (SamplingConfig(top_p=0.39), [1, 0, 0, 0, 0]),
        (SamplingConfig(top_p=0.81), [4 / 9, 1 / 9, 2 / 9, 2 / 9, 0]),
        (SamplingConfig(min_p=0.49), [0.5, 0, 0.25, 0.25, 0]),
        (
            SamplingConfig(top_k=3, top_p=0.6),
            [2 / 3, 0, 1 / 3, 0, 0],
        ),  # 0.4 / 0.8 of the three is not yet 0.6
        (SamplingConfig(temperature=0.5), [16 / 26, 1 / 26, 4 / 26, 4 / 26, 1 / 26]),
        # The temperature acts before the filters: at 0.5 the second token has 4/16 of the first.
        (SamplingConfig(temperature=0.5, min_p=0.3), [1, 0, 0, 0, 0]),
    ],
)
def test_filters_by_hand(config, expected):
    weights = _filtered(torch.tensor([[0.4, 0.1, 0.2, 0.2, 0.1]]).log(), config)[0]
    assert (weights / weights.sum()).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [SamplingConfig(), SamplingConfig(temperature=1.7, top_k=5, top_p=0.93), SamplingConfig(min_p=0.2)],
)
def test_draws_follow_the_distribution(config):
    logits = torch.tensor([0.3, 2.0, -math.inf, 1.1, 0.0, 1.1, -2.0])
    expected = torch.tensor(oracle(logits.tolist(), config))
    seen = torch.zeros(7)
    generators = row_generators(range(400))  # neighbouring seeds: their first numbers must be unrelated too
    for _ in range(25):
        ids = sample(logits.expand(400, 7), config, generators).ids
        seen += torch.bincount(ids, minlength=7)
    assert (seen[expected == 0] == 0).all()
    possible = expected > 0
    chi_square = ((seen - 10_000 * expected) ** 2 / (10_000 * expected))[possible].sum().item()
    assert chi_square < 22.5  # 6 degrees of freedom or fewer: exceeded once in 1,000 runs


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 6),
    vocab=st.integers(1, 70),
    seed=st.integers(0, 2**31),
    config=configs,
    penalty=st.booleans(),
)
def test_a_row_does_not_depend_on_the_batch_around_it(batch, vocab, seed, config, penalty):
    config = SamplingConfig(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=1.5 if penalty else 1.0,
    )
    torch.manual_seed(seed)
    steps = torch.randn(5, batch, 3, vocab) * 3
    history = torch.rand(batch, vocab) < 0.3
    seeds = [seed + row for row in range(batch)]
    together, alone = row_generators(seeds), row_generators(seeds)
    history_alone = history.clone()
    for logits in steps[:, :, -1]:  # a slice with gaps, as the last position of [b l v] is
        whole = sample(logits, config, together, history)
        for row in range(batch):
            one = sample(logits[row : row + 1].clone(), config, [alone[row]], history_alone[row : row + 1])
            assert torch.equal(one.ids[0], whole.ids[row])
            assert torch.equal(one.log_probs[0], whole.log_probs[row])
    assert torch.equal(history, history_alone)


def test_a_draw_takes_one_number_whatever_the_filters():
    """So that a filter that removes nothing changes nothing, at this token or a later one."""
    torch.manual_seed(0)
    steps = torch.randn(20, 3, 50)
    plain, open_ = row_generators([7, 8, 9]), row_generators([7, 8, 9])
    config = SamplingConfig(top_k=50, top_p=1.0, min_p=0.0)
    for logits in steps:
        expected = sample(logits, SamplingConfig(), plain)
        assert torch.equal(sample(logits, config, open_).ids, expected.ids)
    others = [sample(steps[0], SamplingConfig(), row_generators([seed, 8, 9])).ids.tolist() for seed in range(20)]
    assert len({ids[0] for ids in others}) > 1
    assert len({tuple(ids[1:]) for ids in others}) == 1


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (1 - 2**-53, 4)])
def test_the_ends_of_the_unit_interval_fall_on_possible_tokens(monkeypatch, uniform, expected):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([uniform], dtype=torch.float64))
    logits = torch.tensor([[-math.inf, 0.1, 0.3, 5.0, 0.2, -math.inf]])
    assert sample(logits, SamplingConfig(), row_generators([0])).ids.item() == expected


def test_greedy_takes_the_lowest_id_among_equals_and_no_number():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    assert sample(logits, GREEDY).ids.tolist() == [1, 0]
    generators = row_generators([1, 2])
    before = [g.get_state() for g in generators]
    sample(logits, GREEDY, generators)
    assert all(torch.equal(a, g.get_state()) for a, g in zip(before, generators))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_tiny_temperature_tends_to_greedy(temperature):
    logits = torch.tensor([[1e4, -1e4, 1.0001e4]])
    assert sample(logits, SamplingConfig(temperature=temperature), row_generators([0])).ids.item() == 2


def test_log_probabilities_are_the_models_own():
    logits = torch.tensor([[1.0, 3.0, 2.0, -math.inf]], dtype=torch.bfloat16)
    exact = torch.log_softmax(logits.double(), dim=-1)[0]
    config = SamplingConfig(temperature=0.1, top_k=1, repetition_penalty=10)
    found = sample(logits, config, row_generators([0]), token_history([torch.tensor([1])], 4))
    assert found.ids.tolist() == [2]  # 3 / 10 falls behind 2
    assert found.log_probs.dtype == torch.float32
    assert found.log_probs[0].item() == pytest.approx(exact[2].item(), rel=1e-6)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([[3.0, 2.0, -0.5], [-1.0, -1.1, -1.2]])
    history = token_history([torch.tensor([0, 0, 0]), torch.tensor([0])], 3)
    assert history.tolist() == [[True, False, False], [True, False, False]]
    config = SamplingConfig(temperature=0, repetition_penalty=1.4)
    assert sample(logits, GREEDY, history=history.clone()).ids.tolist() == [0, 0]
    # 3 / 1.4 = 2.14 still leads 2, as the three occurrences count once; -1 · 1.4 falls behind -1.1.
    assert sample(logits, config, history=history).ids.tolist() == [0, 1]
    # Both rows' choices are now in the history: 3 / 1.4 against 2; -1.4, -1.54 against -1.2.
    assert history.tolist() == [[True, False, False], [True, True, False]]
    assert sample(logits, config, history=history).ids.tolist() == [0, 2]
    stronger = SamplingConfig(temperature=0, repetition_penalty=1.6)
    # 3 / 1.6 falls behind 2; of the second row everything has occurred, so its order is the plain one.
    assert sample(logits, stronger, history=history).ids.tolist() == [1, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("config", [GREEDY, SamplingConfig(top_k=1)])
def test_logits_that_are_no_number_are_named_by_row(bad, config):
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    with pytest.raises(NonFiniteError, match=re.escape(f"got a largest logit of {bad} in row 1; expected no NaN")):
        sample(logits, config, row_generators([0, 1, 2]))


def test_a_row_with_everything_masked_is_named():
    logits = torch.zeros(7, 2)
    logits[1:] = -math.inf
    with pytest.raises(
        NonFiniteError,
        match=re.escape("-inf in row 1, -inf in row 2, -inf in row 3, -inf in row 4 and 2 more"),
    ):
        sample(logits, GREEDY)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("temperature", -0.1, "a finite number >= 0"),
        ("temperature", math.nan, "a finite number >= 0"),
        ("temperature", math.inf, "a finite number >= 0"),
        ("top_k", 0, "a whole number >= 1, or None"),
        ("top_k", 2.5, "a whole number >= 1, or None"),
        ("top_k", True, "a whole number >= 1, or None"),
        ("top_p", 0.0, "a number in (0, 1], or None"),
        ("top_p", 1.01, "a number in (0, 1], or None"),
        ("min_p", -0.01, "a number in [0, 1], or None"),
        ("min_p", 1.01, "a number in [0, 1], or None"),
        ("repetition_penalty", 0.0, "a finite number > 0 (1 is none)"),
        ("repetition_penalty", math.inf, "a finite number > 0 (1 is none)"),
    ],
)
def test_impossible_settings_are_refused(field, value, expected):
    message = f"SamplingConfig.{field} is out of range: got {value}; expected {expected}"
    with pytest.raises(InputError, match=re.escape(message)):
        SamplingConfig(**{field: value})


def test_arguments_that_do_not_agree_are_refused():
    logits, config = torch.zeros(2, 3), SamplingConfig()
    shared = row_generators([0]) * 2
    with pytest.raises(InputError, match=r"drawing needs generators: got None.*; pass row_generators"):
        sample(logits, config)
    with pytest.raises(InputError, match="its own generator: got 2 generators, 1 distinct; expected 2 distinct ones"):
        sample(logits, config, shared)
    with pytest.raises(InputError, match="its own generator: got 3 generators, 3 distinct; expected 2 distinct ones"):
        sample(logits, config, row_generators([0, 1, 2]))
    with pytest.raises(InputError, match=re.escape("got torch.float32 of shape [3]; expected floats of shape [b v]")):
        sample(logits[0, :], GREEDY)
    with pytest.raises(InputError, match=re.escape("got torch.int64 of shape [2, 3]")):
        sample(logits.long(), GREEDY)
    with pytest.raises(InputError, match=re.escape("history does not fit the logits: got torch.bool of shape [2, 4]")):
        sample(logits, GREEDY, history=torch.zeros(2, 4, dtype=torch.bool))
