"""Held-out bits are the code length of the text: exact for models whose code length is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_models import chain_model, random_ids, tiny_model
from tiny_run import PIECES

from crocuta.data.windows import TokenSource
from crocuta.errors import InputError
from crocuta.model import memory
from crocuta.model.lm import Model
from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.dna import DNATokenizer
from crocuta.tokenizers.pieces import PiecesTokenizer
from crocuta.training import evaluate as module
from crocuta.training.evaluate import evaluate

DNA, BYTES = DNATokenizer(), ByteTokenizer(vocab_size=256)


def source(length: int, seed: int = 1) -> TokenSource:
    return TokenSource.from_array(random_ids(length, seed=seed).numpy())


def uniform(vocabulary: int) -> Model:
    model = chain_model({}, vocabulary)
    with torch.no_grad():
        model.head.weight.zero_()
    return model


@pytest.mark.parametrize("length", [1, 7, 64, 1000])
@pytest.mark.parametrize("context", [0, 3])
def test_a_uniform_model_needs_log2_v_bits(length, context):
    result = evaluate(uniform(16), source(101), DNA, length, context=min(context, length - 1))
    assert result.tokens == 100
    assert result.bits_per_token == pytest.approx(4, abs=1e-6)
    assert result.bits_per_byte == pytest.approx(4, abs=1e-6)


@torch.no_grad()
def bits(model: Model, tokens: np.ndarray, length: int, context: int) -> float:
    """By definition: every token but the first, each predicted once, inside windows that overlap by ``context``."""
    total, start, ids = 0.0, 0, torch.from_numpy(tokens)[None]
    while start + context < len(tokens) - 1 or start == 0:
        window = ids[:, start : start + length + 1]
        log_probs = model(window[:, :-1]).double().log_softmax(-1).gather(2, window[:, 1:, None])[0, :, 0]
        total -= float(log_probs[0 if start == 0 else context :].sum())
        start += length - context
    return total / math.log(2) / (len(tokens) - 1)


@pytest.mark.parametrize(("length", "context"), [(20, 0), (20, 10), (20, 19), (7, 3), (100, 50), (500, 0), (1, 0)])
def test_bits_are_those_of_the_windows(length, context):
    model, data = tiny_model("stripe", torch.float64, seed=1), source(101)
    expected = bits(model, data.read(0, 101), min(length, 100), context)
    assert evaluate(model, data, DNA, length, context=context).bits_per_token == pytest.approx(expected, rel=1e-9)


def test_context_matters_to_a_model_that_remembers_and_to_no_other():
    data = TokenSource.from_array(np.tile([7, 8, 9, 10, 7, 7], 40))
    bigram, striped = chain_model({7: 8, 8: 9, 9: 10, 10: 7}, vocabulary=16), tiny_model("stripe", seed=1)
    gains = [
        evaluate(m, data, DNA, 20).bits_per_token - evaluate(m, data, DNA, 20, context=10).bits_per_token
        for m in (bigram, striped)
    ]
    assert gains[0] == pytest.approx(0, abs=1e-6)
    assert abs(gains[1]) > 1e-2


@pytest.mark.parametrize("passes", [1, 50, 8192])
def test_windows_are_run_a_few_at_a_time(passes, monkeypatch):
    model, data = tiny_model("stripe", torch.float64, seed=1), source(301)
    expected = evaluate(model, data, DNA, 20, context=5)
    monkeypatch.setattr(module, "_TOKENS_A_PASS", passes)
    sizes: list[int] = []
    model.embedding.register_forward_pre_hook(lambda m, inputs: sizes.append(inputs[0].numel()))
    result = evaluate(model, data, DNA, 20, context=5)
    assert max(sizes) <= max(passes, 20)
    assert result.bits_per_token == pytest.approx(expected.bits_per_token, rel=1e-12)


@pytest.mark.parametrize("kind", ["stripe", "real-raw"])
@pytest.mark.parametrize("chosen", [memory.Plan(tokens=64, chunk=7, logits=50), memory.PLANS[-1]])
def test_windows_of_any_length_are_read_in_chunks(kind, chosen, monkeypatch):
    model, data = tiny_model(kind, torch.float64, seed=1), source(301)
    expected = bits(model, data.read(0, 301), 150, 30)
    monkeypatch.setattr(memory, "DEFAULT", chosen)
    read: list[int] = []
    made: list[int] = []
    model.embedding.register_forward_pre_hook(lambda m, inputs: read.append(inputs[0].numel()))
    original = Model.logits
    monkeypatch.setattr(Model, "logits", lambda self, h: made.append(h.shape[0] * h.shape[1]) or original(self, h))
    assert evaluate(model, data, DNA, 150, context=30).bits_per_token == pytest.approx(expected, rel=1e-9)
    assert max(read) <= chosen.chunk
    assert max(made) <= max(1, chosen.logits // 16)


def test_a_bound_of_memory_decides_how_much_is_run_at_once(monkeypatch):
    model, data = tiny_model("stripe", seed=1), source(301)
    expected = evaluate(model, data, DNA, 20)
    read: list[int] = []
    model.embedding.register_forward_pre_hook(lambda m, inputs: read.append(inputs[0].numel()))
    assert evaluate(model, data, DNA, 20, max_memory="1GiB") == expected
    assert max(read) == 300
    with pytest.raises(InputError, match="max_memory is too small even for the shortest chunks: got 1MB"):
        evaluate(model, data, DNA, 20, max_memory="1MB")
    monkeypatch.setattr(memory, "BASE", 0)  # which is more than this model takes for anything
    for length, most in ((20, 160), (150, memory.SMALLEST)):  # several windows at once, or parts of one
        with pytest.raises(InputError, match="too small") as least:
            evaluate(model, data, DNA, length, max_memory=1)
        whole = evaluate(model, data, DNA, length)
        read.clear()
        found = evaluate(model, data, DNA, length, max_memory=str(least.value.expected).split()[2])
        assert found.bits_per_token == pytest.approx(whole.bits_per_token, rel=1e-6)
        assert 20 <= max(read) <= most


def test_the_first_tokens_alone():
    model, data = tiny_model("stripe", torch.float64, seed=1), source(301)
    part = evaluate(model, data, DNA, 20, max_tokens=50)
    assert part.tokens == 50
    assert part == evaluate(model, data.slice(0, 51), DNA, 20)
    assert evaluate(model, data, DNA, 20, max_tokens=300) == evaluate(model, data, DNA, 20)
    assert evaluate(model, data, DNA, 20, max_tokens=10_000).tokens == 300


@pytest.mark.parametrize("size", [2, 3])
def test_the_shortest_texts(size):
    result = evaluate(uniform(256), TokenSource.from_array(np.arange(size)), BYTES, 32, context=16)
    assert (result.tokens, result.bits_per_token) == (size - 1, pytest.approx(8, abs=1e-5))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_stays(training):
    model = tiny_model("stripe", dropout=0.5, seed=1).train(training)
    random_state = torch.get_rng_state()
    results = {evaluate(model, source(101), DNA, 20) for _ in range(3)}
    assert len(results) == 1
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())


def test_bits_a_byte_of_a_tokenizer_of_pieces():
    """Pieces are longer than a byte, so a byte costs less than a token: by the bytes of the predicted text."""
    tokenizer = PiecesTokenizer(PIECES)
    tokens = np.array([2, 1, 1, 2, 3])
    result = evaluate(uniform(4), TokenSource.from_array(tokens), tokenizer, 8)
    size = len("whalewhaleshipé".encode())
    assert result.bits_per_token == pytest.approx(2, abs=1e-6)
    assert result.bits_per_byte == pytest.approx(2 * 4 / size, abs=1e-6)
