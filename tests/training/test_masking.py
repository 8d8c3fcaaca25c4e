"""Masked language modelling: which tokens are hidden, the loss, and held-out figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCABULARY, chain_model, tiny_model
from tiny_run import PIECES

from crocuta.config import (
    AttentionConfig,
    BidirectionalHyenaConfig,
    BlockConfig,
    ExplicitFilterConfig,
    GatedMLPConfig,
    MixerConfig,
    ModelConfig,
)
from crocuta.data.windows import TokenSource
from crocuta.errors import InputError
from crocuta.model.build import build_model
from crocuta.model.lm import Model
from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.dna import DNATokenizer
from crocuta.tokenizers.pieces import PiecesTokenizer
from crocuta.training import evaluate as evaluate_module
from crocuta.training import loss as loss_module
from crocuta.training.config import MaskedConfig, NextTokenConfig
from crocuta.training.evaluate import evaluate, evaluate_masked
from crocuta.training.loss import loss_of, masked_loss, next_token_loss
from crocuta.training.masking import NOT_COUNTED, Masking, special_ids

DNA, BYTES = DNATokenizer(), ByteTokenizer()
MASK = 3
LETTERS = [7, 8, 9, 10, 11]


def masking(seed: int = 1, vocab_size: int = VOCABULARY, **changes: float) -> Masking:
    return Masking(MaskedConfig(**changes), DNA, vocab_size, seed)


def letters(*shape: int, seed: int = 0) -> np.ndarray:
    """Ids of A, C, G and T."""
    return np.random.default_rng(seed).integers(7, 11, shape)


# --- which tokens, and what becomes of them ---


@pytest.mark.parametrize("fraction", [0.15, 0.5, 1.0])
def test_a_fraction_of_the_tokens_is_chosen(fraction):
    ids = letters(60, 100)
    inputs, targets = masking(fraction=fraction).batch(ids, 0)
    chosen = targets != NOT_COUNTED
    assert chosen.sum() == round(fraction * ids.size)
    assert (inputs.shape, inputs.dtype, targets.dtype) == (ids.shape, np.int64, np.int64)
    assert (targets[chosen] == ids[chosen]).all()
    assert (inputs[~chosen] == ids[~chosen]).all()
    if fraction < 1:  # spread over rows and places as chance does: 5 standard deviations
        for axis in (0, 1):
            share, deviation = chosen.mean(axis), math.sqrt(fraction * (1 - fraction) / ids.shape[axis])
            assert np.abs(share - fraction).max() < 5 * deviation
            assert share.std() > 0.5 * deviation


def test_chosen_tokens_become_the_mask_a_random_token_or_stay():
    ids = np.full((16, 2000), 7)
    inputs, targets = masking().batch(ids, 3)
    after = inputs[targets != NOT_COUNTED]
    shares = {token: float((after == token).mean()) for token in (*LETTERS, MASK)}
    assert sum(shares.values()) == pytest.approx(1)
    deviation = 4 / math.sqrt(len(after))
    assert shares[MASK] == pytest.approx(0.8, abs=0.4 * deviation)
    assert shares[7] == pytest.approx(0.1 + 0.1 / 5, abs=0.4 * deviation)
    for token in LETTERS[1:]:
        assert shares[token] == pytest.approx(0.1 / 5, abs=0.15 * deviation)


def test_the_shares_are_those_of_the_configuration():
    ids = letters(4, 500)
    inputs, targets = masking(mask_token=1.0, random_token=0.0).batch(ids, 0)
    assert set(inputs[targets != NOT_COUNTED]) == {MASK}
    inputs, targets = masking(mask_token=0.0, random_token=0.0).batch(ids, 0)
    assert (inputs == ids).all()
    inputs, targets = masking(mask_token=0.0, random_token=1.0).batch(np.full_like(ids, 9), 0)
    assert set(inputs[targets != NOT_COUNTED]) == set(LETTERS)


def test_special_tokens_are_never_hidden_and_never_come_in():
    ids = np.random.default_rng(0).integers(0, 16, (16, 200))
    special = ~np.isin(ids, LETTERS)
    inputs, targets = masking(fraction=1.0, mask_token=0.5, random_token=0.5).batch(ids, 0)
    assert (targets[special] == NOT_COUNTED).all()
    assert (inputs[special] == ids[special]).all()
    assert (targets[~special] != NOT_COUNTED).all()
    assert set(inputs[~special]) == {MASK, *LETTERS}


def test_special_tokens_of_every_tokenizer():
    assert special_ids(DNA) == set(range(7))
    assert special_ids(BYTES) == {0, 1}
    assert special_ids(PiecesTokenizer(PIECES, eos="ship", pad="[UNK]")) == {0, 2}
    inputs, targets = Masking(MaskedConfig(mask_id=300, fraction=1.0), BYTES, 512, 0).batch(np.arange(512)[None], 0)
    assert (np.flatnonzero(targets[0] != NOT_COUNTED) == np.arange(2, 256)).all()
    assert inputs.max() == 511
    assert 300 in inputs[0, :256]


def test_a_byte_that_serves_as_the_mask_is_special():
    own = Masking(MaskedConfig(mask_id=2, fraction=1.0, mask_token=0.0, random_token=1.0), BYTES, 256, 0)
    inputs, targets = own.batch(np.tile(np.arange(256), (8, 4)), 0)
    assert not (targets == 2).any()
    assert (inputs == 2).sum() == 32


@pytest.mark.parametrize("count", [1, 2, 6])
def test_at_least_one_token_is_chosen(count):
    ids = np.full((2, 10), 4)
    ids[1, :count] = 7
    for index in range(20):
        assert (masking().batch(ids, index)[1] != NOT_COUNTED).sum() == 1


def test_nothing_but_special_tokens_is_left_alone():
    ids = np.full((2, 10), 4)
    inputs, targets = masking().batch(ids, 0)
    assert (inputs == ids).all()
    assert (targets == NOT_COUNTED).all()


def test_a_batch_is_a_function_of_seed_and_number():
    ids, first = letters(4, 64), masking(seed=5)
    expected = first.batch(ids, 7)
    first.batch(ids, 8)
    again = masking(seed=5).batch(ids.copy(), 7)
    assert all((one == other).all() for one, other in zip(expected, again, strict=True))
    for other in (masking(seed=5).batch(ids, 8), masking(seed=6).batch(ids, 7)):
        assert (other[1] != expected[1]).sum() > 20


def test_the_choice_is_the_same_for_ever():
    """The random words are numpy's raw Philox bits; a change here would change what resumed runs learn."""
    rule = masking(seed=5, fraction=0.5, mask_token=0.4, random_token=0.4)
    inputs, targets = rule.batch(np.full((1, 20), 7), 7)
    assert np.flatnonzero(targets[0] != NOT_COUNTED).tolist() == [4, 5, 8, 10, 12, 13, 14, 16, 17, 18]
    assert inputs[0].tolist() == [7, 7, 7, 7, 9, 9, 7, 7, 7, 7, 8, 7, 7, 7, 3, 7, 7, 3, 7, 7]


# --- the loss ---


def hidden_batch(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = masking(fraction=0.3).batch(letters(*shape), 0)
    return torch.from_numpy(inputs), torch.from_numpy(targets)


@pytest.mark.parametrize("kind", ["attention", "real-raw"])  # an untied and a tied head
@pytest.mark.parametrize("turn", [1, 7, 17, 18, 10_000])
def test_the_loss_is_the_mean_over_hidden_tokens(kind, turn, monkeypatch):
    model = tiny_model(kind, torch.float64, seed=1)
    inputs, targets = hidden_batch(3, 20)
    assert (targets != NOT_COUNTED).sum() == 18
    direct = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100)
    direct.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(loss_module, "_LOGITS", turn * VOCABULARY)
    sizes: list[int] = []
    original = Model.logits
    monkeypatch.setattr(Model, "logits", lambda self, h: sizes.append(h.shape[1]) or original(self, h))
    loss = masked_loss(model, inputs, targets)
    loss.backward()
    assert sum(sizes[: -(-18 // turn)]) == 18, "logits of tokens that do not count"
    assert max(sizes) <= turn
    torch.testing.assert_close(loss, direct, rtol=1e-6, atol=0, check_dtype=False)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-6, atol=1e-9, msg=name)


def test_the_losses_differ_only_in_which_logits_are_made():
    model = tiny_model("stripe", torch.float64, seed=1)
    inputs, targets = hidden_batch(3, 20)
    losses = [float(loss(model, inputs, targets).detach()) for loss in (masked_loss, next_token_loss)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_each_objective_has_its_loss():
    assert loss_of(MaskedConfig()) is masked_loss
    assert loss_of(NextTokenConfig()) is next_token_loss


def test_a_batch_without_targets_teaches_nothing():
    model = tiny_model("stripe", seed=1)
    inputs = torch.full((2, 9), 4)
    loss = masked_loss(model, inputs, torch.full((2, 9), NOT_COUNTED))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


# --- held-out figures ---


def both_sides(mixer: str = "hyena", dtype: torch.dtype = torch.float64, seed: int = 1) -> Model:
    mixers: dict[str, MixerConfig] = {
        "hyena": BidirectionalHyenaConfig(filter=ExplicitFilterConfig(taps=5)),
        "attention": AttentionConfig(num_heads=2, causal=False),
    }
    block = BlockConfig(mixer=mixers[mixer], mlp=GatedMLPConfig(intermediate_size=12))
    return build_model(ModelConfig(vocab_size=VOCABULARY, hidden_size=8, blocks=(block, block)), dtype=dtype, seed=seed)


@torch.no_grad()
def bits(model: Model, ids: np.ndarray, length: int, rule: Masking) -> tuple[float, int]:
    """By definition, one window after the other."""
    total, count = 0.0, 0
    for index, start in enumerate(range(0, len(ids), length)):
        inputs, targets = rule.batch(ids[None, start : start + length], index)
        log_probs = model(torch.from_numpy(inputs)).double().log_softmax(-1)[0]
        for place in np.flatnonzero(targets[0] != NOT_COUNTED):
            total -= float(log_probs[place, targets[0, place]]) / math.log(2)
            count += 1
    return total / count, count


@pytest.mark.parametrize("model", [both_sides(), both_sides("attention"), tiny_model("stripe", torch.float64, seed=1)])
@pytest.mark.parametrize(("length", "passes"), [(20, 8192), (20, 45), (20, 1), (7, 50), (1, 30), (500, 8192)])
def test_bits_are_those_of_the_hidden_tokens(model, length, passes, monkeypatch):
    source, rule = TokenSource.from_array(letters(101)), masking(seed=9)
    monkeypatch.setattr(evaluate_module, "_TOKENS_A_PASS", passes)
    sizes: list[int] = []
    handle = model.embedding.register_forward_pre_hook(lambda m, inputs: sizes.append(inputs[0].numel()))
    result = evaluate_masked(model, source, rule, length)
    handle.remove()
    expected = bits(model, letters(101), length, rule)
    assert result.tokens == expected[1]
    assert result.bits_per_masked_token == pytest.approx(expected[0], rel=1e-9)
    assert max(sizes) <= max(passes, length)


def test_the_first_tokens_alone():
    model, source = both_sides(), TokenSource.from_array(letters(301))
    part = evaluate_masked(model, source, masking(), 20, max_tokens=50)
    assert part == evaluate_masked(model, source.slice(0, 50), masking(), 20)
    whole = evaluate_masked(model, source, masking(), 20)
    assert whole.tokens > part.tokens
    assert whole == evaluate_masked(model, source, masking(), 20, max_tokens=10_000)


def test_a_uniform_model_needs_log2_v_bits():
    model = chain_model({}, VOCABULARY)
    with torch.no_grad():
        model.head.weight.zero_()
    result = evaluate_masked(model, TokenSource.from_array(letters(300)), masking(), 100)
    assert (result.tokens, result.bits_per_masked_token) == (45, pytest.approx(4, abs=1e-6))
    assert result.figures == {"masked_bits": result.bits_per_masked_token, "masked_tokens": 45}


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_the_model_and_chance_as_they_were(training):
    model = tiny_model("stripe", dropout=0.5, seed=1).train(training)
    state = torch.get_rng_state()
    source = TokenSource.from_array(letters(101))
    assert len({evaluate_masked(model, source, masking(), 20) for _ in range(3)}) == 1
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), state)


def test_text_without_a_token_to_hide():
    with pytest.raises(InputError, match="no token that could be hidden: got 30 special tokens"):
        evaluate_masked(both_sides(), TokenSource.from_array(np.full(30, 4)), masking(), 20)


@pytest.mark.parametrize("mixer", ["hyena", "attention"])
def test_a_model_that_looks_ahead_has_no_bits_of_next_tokens(mixer):
    with pytest.raises(InputError, match="looks ahead has no bits of next tokens; use evaluate_masked"):
        evaluate(both_sides(mixer), TokenSource.from_array(letters(30)), DNA, 20)
