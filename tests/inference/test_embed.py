"""Embeddings are hidden states, pooled over a sequence's own tokens."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from tiny_models import FILTERS, HIDDEN, KINDS, loud, random_ids, tiny_model

from crocuta.config import AttentionConfig, BidirectionalHyenaConfig, BlockConfig, ModelConfig
from crocuta.errors import InputError, NonFiniteError, TokenizerError
from crocuta.inference import embed as embed_module
from crocuta.inference.embed import embed
from crocuta.model import memory
from crocuta.model.build import build_model
from crocuta.model.lm import Model
from crocuta.tokenizers.dna import DNATokenizer

DNA = DNATokenizer()
ROWS = [random_ids(length, seed=length) for length in (13, 1, 40, 7, 40)]


@torch.no_grad()
def direct(model: Model, row: torch.Tensor, layer: int | None, pooling: str) -> torch.Tensor:
    hidden = model.hidden(row[None], layer)[0].double()
    return {"mean": hidden.mean(0), "last": hidden[-1], "none": hidden}[pooling]


def check(results, model: Model, layer: int | None, pooling: str) -> None:
    for result, row in zip(results, ROWS, strict=True):
        assert result.dtype == np.float32
        assert result.shape == ((len(row), HIDDEN) if pooling == "none" else (HIDDEN,))
        np.testing.assert_allclose(result, direct(model, row, layer, pooling), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_hidden_states(kind, pooling):
    model = tiny_model(kind, torch.float64, seed=1)
    check(embed(model, None, ROWS, pooling=pooling), model, None, pooling)


@pytest.mark.parametrize("pooling", ["mean", "last", "none"])
@pytest.mark.parametrize("layer", [0, 2, 5, -1, -4])
@pytest.mark.parametrize("chunk", [9, 8192])
def test_any_layer_whole_and_in_chunks(layer, pooling, chunk, monkeypatch):
    model = tiny_model("stripe", torch.float64, seed=1)
    monkeypatch.setattr(memory, "DEFAULT", dataclasses.replace(memory.DEFAULT, chunk=chunk))
    sizes: list[int] = []
    model.blocks[0].pre_norm.register_forward_hook(lambda module, inputs, output: sizes.append(output[1].shape[1]))
    results = embed(model, None, ROWS, layer=layer, pooling=pooling)
    assert max(sizes, default=0) <= chunk
    check(results, model, layer, pooling)


@pytest.mark.parametrize("pooling", ["mean", "last", "none"])
def test_many_batches_and_junk_for_padding(pooling, monkeypatch):
    model = tiny_model("stripe", torch.float64, seed=1)

    def padded(rows):
        ids = random_ids(len(rows), max(map(len, rows)) + 3, seed=9)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = row
        return ids, torch.tensor([len(row) for row in rows])

    monkeypatch.setattr(embed_module, "pad_right", padded)
    monkeypatch.setattr(memory, "DEFAULT", dataclasses.replace(memory.DEFAULT, tokens=30))
    check(embed(model, None, ROWS, pooling=pooling), model, None, pooling)


def test_text_and_ids_are_the_same():
    model = tiny_model("stripe", seed=1)
    by_text, by_ids = embed(model, DNA, ["GATTACA"])[0], embed(model, None, [DNA.encode("GATTACA")])[0]
    assert np.array_equal(by_text, by_ids)


def test_results_are_independent_arrays():
    model = tiny_model("stripe", seed=1)
    first, second = embed(model, None, [ROWS[2], ROWS[4]])
    before = second.copy()
    first[:] = 0
    assert np.array_equal(second, before)


def test_bfloat16_models_give_float32_means():
    model = tiny_model("attention", torch.bfloat16, seed=1)
    result = embed(model, None, ROWS[2:3])[0]
    np.testing.assert_allclose(result, direct(model, ROWS[2], None, "mean"), rtol=0, atol=1e-6)


WRONG = {
    "one-text": ({"sequences": "ACGT"}, InputError, r"sequences must be a list: got one text; pass \[text\]"),
    "empty": ({"sequences": ["A", ""]}, InputError, "sequence 1 is empty"),
    "pooling": ({"pooling": "max"}, InputError, "unknown pooling: got 'max'; expected mean, last or none"),
    "layer": ({"layer": 6}, InputError, "no such layer: got layer=6; expected None or a number from -5 to 5"),
    "no-tokenizer": ({"tokenizer": None}, TokenizerError, "sequence 0 is text and there is no tokenizer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    arguments, kind, message = WRONG[name]
    model = tiny_model("stripe").train()
    with pytest.raises(kind, match=message) as failure:
        embed(model, **{"tokenizer": DNA, "sequences": ["ACGT"], **arguments})
    assert "\n" not in str(failure.value)
    assert model.training


@pytest.mark.parametrize("pooling", ["mean", "last", "none"])
def test_hidden_states_that_are_not_finite_name_the_sequence(pooling):
    model = tiny_model("real-raw").train()
    with torch.no_grad():
        model.embedding.weight[10] = math.inf
    with pytest.raises(
        NonFiniteError, match="the hidden states of sequence 2 are not finite; check the model's weights"
    ):
        embed(model, DNA, ["ACG", "GCA", "ACT", "C"], pooling=pooling)
    assert model.training


@pytest.mark.parametrize("pooling", ["mean", "last", "none"])
def test_a_bound_of_memory_makes_the_pieces_shorter(pooling, monkeypatch):
    monkeypatch.setattr(memory, "BASE", 0)
    model = tiny_model("stripe", torch.float64, seed=1)
    rows = [random_ids(150), *ROWS]
    with pytest.raises(InputError, match="max_memory is too small even for the shortest chunks: got 1kB") as least:
        embed(model, None, rows, pooling=pooling, max_memory="1kB")
    read: list[int] = []
    model.embedding.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].numel()))
    results = embed(model, None, rows, pooling=pooling, max_memory=str(least.value.expected).split()[2])
    assert 20 < max(read) <= memory.SMALLEST
    check(results[1:], model, None, pooling)
    np.testing.assert_allclose(results[0], direct(model, rows[0], None, pooling), rtol=1e-5, atol=1e-5)


def test_one_vector_a_token_counts(monkeypatch):
    monkeypatch.setattr(memory, "BASE", 0)
    model, rows = tiny_model("real-raw"), [random_ids(20_000)]
    assert len(embed(model, None, rows, max_memory="900kB")) == 1
    with pytest.raises(InputError, match="max_memory is too small"):
        embed(model, None, rows, pooling="none", max_memory="900kB")


@pytest.mark.parametrize("chunk", [4, 8192])
@pytest.mark.parametrize("last", [1, 3, 20])
def test_the_mean_of_the_last_tokens(last, chunk, monkeypatch):
    model = tiny_model("stripe", torch.float64, seed=1)
    monkeypatch.setattr(memory, "DEFAULT", dataclasses.replace(memory.DEFAULT, chunk=chunk))
    for result, row in zip(embed(model, None, ROWS, pooling="last", last=last), ROWS, strict=True):
        expected = direct(model, row, None, "none")[-last:].mean(0)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last", [0, -1, True, 1.5])
def test_an_impossible_number_of_last_tokens(last):
    with pytest.raises(InputError, match="last must be a positive whole number"):
        embed(tiny_model("stripe"), None, ROWS, pooling="last", last=last)


@pytest.mark.parametrize("pooling", ["mean", "last", "none"])
def test_models_that_look_ahead_are_embedded_whole(pooling, monkeypatch):
    """Rows of unequal length in one batch, and a chunk shorter than they are."""
    mixers = (BidirectionalHyenaConfig(filter=FILTERS["implicit"]), AttentionConfig(num_heads=2, causal=False))
    blocks = tuple(BlockConfig(mixer=mixer, mlp=None) for mixer in mixers)
    config = ModelConfig(vocab_size=16, hidden_size=HIDDEN, blocks=blocks)
    model = loud(build_model(config), 1).double().eval()
    monkeypatch.setattr(memory, "DEFAULT", dataclasses.replace(memory.DEFAULT, chunk=8))
    check(embed(model, None, ROWS, pooling=pooling), model, None, pooling)
