"""The model class: hidden states of any layer, dropout, tied weights, and one clear error for each wrong input."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
from tiny_models import HIDDEN, KINDS, VOCABULARY, random_ids, tiny_config, tiny_model

from crocuta.errors import InputError, StateError
from crocuta.model.build import build_model
from crocuta.model.lm import Model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["stripe", "attention-gqa"])
def test_hidden_is_the_residual_stream_after_each_block(kind):
    model = tiny_model(kind, seed=1)
    ids, count = random_ids(2, 20, seed=2), len(model.blocks)
    stream = [model.embedding(ids)]
    for block in model.blocks:
        stream.append(block(stream[-1]))
    for layer, expected in enumerate(stream):
        assert torch.equal(model.hidden(ids, layer), expected)
    for layer in range(1, count + 1):
        assert torch.equal(model.hidden(ids, -layer), stream[count + 1 - layer])
    assert torch.equal(model.hidden(ids), model.norm(stream[-1])[1])
    assert torch.equal(model(ids), model.logits(model.hidden(ids)))


@torch.no_grad()
def test_blocks_above_the_layer_are_not_run():
    model = tiny_model("stripe")
    model.blocks[2].mixer.output.weight.fill_(torch.nan)
    ids = random_ids(1, 20)
    assert torch.isfinite(model.hidden(ids, 2)).all()
    assert not torch.isfinite(model.hidden(ids, 3)).all()


@torch.no_grad()
@pytest.mark.parametrize("layer", [None, 0, 1, 3, 5, -1, -5])
def test_extend_hidden_continues_any_layer(layer):
    model = tiny_model("stripe", torch.float64, seed=1)
    ids, state = random_ids(2, 40, seed=2), model.init_state(2, 40)
    pieces = [model.extend_hidden(piece, state, layer=layer) for piece in ids.split([17, 1, 22], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model.hidden(ids, layer), rtol=0, atol=1e-9)
    assert state.lengths.tolist() == [40, 40]


@torch.no_grad()
@pytest.mark.parametrize("layer", [6, -6, 100])
def test_layers_that_do_not_exist(layer):
    model = tiny_model("stripe")
    message = re.escape(f"no such layer: got layer={layer}; expected None or a number from -5 to 5")
    with pytest.raises(InputError, match=message):
        model.hidden(random_ids(1, 5), layer)
    state = model.init_state(1, 10)
    with pytest.raises(InputError, match=message):
        model.extend_hidden(random_ids(1, 5), state, layer=layer)


def test_tied_weights_are_one_parameter():
    tied, untied = tiny_model("real-raw"), tiny_model("attention")
    assert tied.head is None
    assert untied.head.weight.shape == (VOCABULARY, HIDDEN)
    with torch.no_grad():
        ids, before = random_ids(1, 5), untied(random_ids(1, 5))
        untied.embedding.weight[0] += 1  # id 0 is not read: only a head that is the embedding would notice
        assert torch.equal(untied(ids), before)
        before = tied(ids)
        tied.embedding.weight[0] += 1
        after = tied(ids)
    assert torch.equal(after[..., 1:], before[..., 1:])
    assert not torch.allclose(after[..., 0], before[..., 0])


@torch.no_grad()
def test_dropout_acts_while_training_only():
    model = tiny_model("complex-raw", dropout=0.5, seed=1)
    ids = random_ids(1, 10)
    assert torch.equal(model(ids), model(ids))
    assert torch.equal(model(ids), tiny_model("complex-raw", seed=1)(ids))
    model.train()
    assert not torch.allclose(model(ids), model(ids))
    torch.manual_seed(1)
    first = model(ids)
    torch.manual_seed(1)
    assert torch.equal(model(ids), first)


@torch.no_grad()
def test_embedding_dropout_acts_while_training_only():
    config = dataclasses.replace(tiny_config("complex-raw"), embedding_dropout=0.5)
    model, ids = build_model(config).eval(), random_ids(1, 10)
    assert torch.equal(model.hidden(ids, 0), model.embedding(ids))
    zeros = (model.train().hidden(ids, 0) == 0).float().mean()
    assert 0.2 < zeros < 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_independent(kind):
    model = tiny_model(kind, seed=1)
    ids = random_ids(1, 20)
    with torch.no_grad():
        before, twin = model(ids), copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        assert torch.equal(model(ids), before)
        assert not torch.allclose(twin(ids), before, atol=1e-3)


# --- wrong inputs ---

WRONG_IDS = {
    "one-row": (torch.zeros(5, dtype=torch.int64), r"\[batch, length\] of int64: got \(5,\) torch.int64"),
    "three-axes": (torch.zeros(1, 5, 1, dtype=torch.int64), r"got \(1, 5, 1\) torch.int64"),
    "floats": (torch.zeros(1, 5), r"got \(1, 5\) torch.float32; use torch.tensor\(tokenizer.encode"),
    "booleans": (torch.zeros(1, 5, dtype=torch.bool), "got .* torch.bool"),
    "a-list": ([[1, 2]], "must be a tensor .*: got list"),
    "no-tokens": (torch.zeros(1, 0, dtype=torch.int64), r"ids are empty: got \(1, 0\); expected at least one token"),
    "no-rows": (torch.zeros(0, 5, dtype=torch.int64), r"ids are empty: got \(0, 5\)"),
    "too-large": (torch.tensor([[3, 16]]), "outside the vocabulary: got ids from 3 to 16; expected 0 to 15; use the"),
    "negative": (torch.tensor([[-1, 3]]), "outside the vocabulary: got ids from -1 to 3; expected 0 to 15"),
}


@pytest.mark.parametrize("name", WRONG_IDS)
@pytest.mark.parametrize("call", ["forward", "hidden", "extend"])
def test_wrong_ids_are_named(name, call):
    model, (ids, message) = tiny_model("stripe"), WRONG_IDS[name]
    calls = {"forward": model, "hidden": model.hidden, "extend": lambda x: model.extend(x, model.init_state(1, 10))}
    with pytest.raises(InputError, match=message) as failure:
        calls[call](ids)
    assert "\n" not in str(failure.value)


@torch.no_grad()
def test_int32_ids_are_ids():
    model, ids = tiny_model("attention"), random_ids(1, 9)
    assert torch.equal(model(ids.int()), model(ids))


@pytest.mark.parametrize(
    "lengths",
    [
        torch.tensor([3]),
        torch.tensor([3, 6]),
        torch.tensor([-1, 3]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([[1, 2]]),
        [1, 2],
    ],
    ids=str,
)
def test_wrong_lengths_are_named(lengths):
    model = tiny_model("stripe")
    with pytest.raises(
        InputError, match=r"lengths do not fit the ids: .* expected a tensor of 2 whole numbers from 0 to 5"
    ):
        model.extend(random_ids(2, 5), model.init_state(2, 10), lengths)


def test_a_sequence_longer_than_the_filters_are_defined_for():
    with pytest.raises(
        InputError, match=r"longer than the implicit filter is defined for: got 161 tokens; expected at most 160"
    ):
        tiny_model("implicit")(random_ids(1, 161))


# --- states that do not fit; each error leaves the state as it was ---


def unchanged_after(model: Model, ids: torch.Tensor, message: str, *, max_length: int | None, read: int) -> None:
    """Reading ``ids`` after ``read`` tokens raises, and then the state goes on as if it had never been tried."""
    state = model.init_state(1, max_length)
    model.extend(random_ids(1, read, seed=1), state)
    twin = state.copy()
    with pytest.raises(StateError, match=message) as failure:
        model.extend(ids, state)
    assert "\n" not in str(failure.value)
    for (name, tensor), (_, before) in zip(state.named_tensors(), twin.named_tensors(), strict=True):
        assert torch.equal(tensor, before), name
    token = random_ids(1, 1, seed=2)
    assert torch.equal(model.extend(token, state), model.extend(token, twin))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["attention", "implicit", "real-raw", "stripe"])
def test_more_tokens_than_the_state_has_room_for(kind):
    message = r"longer than the model's state: got 51 tokens; expected at most 50; make the state with a larger"
    unchanged_after(tiny_model(kind), random_ids(1, 11), message, max_length=50, read=40)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "max_length"), [("implicit", None), ("implicit", 500), ("stripe", 500)])
def test_more_tokens_than_the_filters_are_defined_for(kind, max_length):
    message = r"longer than the model's filters are defined for: got 161 tokens; expected at most 160"
    unchanged_after(tiny_model(kind), random_ids(1, 11), message, max_length=max_length, read=150)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_as_many_tokens_as_there_is_room_for(kind):
    model, state = tiny_model(kind), tiny_model(kind).init_state(1, 50)
    model.extend(random_ids(1, 49), state)
    assert torch.isfinite(model.extend(random_ids(1, 1), state)).all()
    with pytest.raises(StateError, match="got 51 tokens"):
        model.extend(random_ids(1, 1), state)


@torch.no_grad()
def test_another_number_of_rows():
    model = tiny_model("stripe")
    with pytest.raises(StateError, match=r"another number of rows than the input: got 3 rows; expected 2 rows"):
        model.extend(random_ids(3, 4), model.init_state(2, 10))


@torch.no_grad()
@pytest.mark.parametrize("owner", [k for k in KINDS if k != "attention"])
def test_the_state_of_another_model(owner):
    with pytest.raises(StateError, match="belongs to a model with another configuration; make it with this model"):
        tiny_model("attention").extend(random_ids(1, 4), tiny_model(owner).init_state(1, 10))


def test_attention_wants_to_know_the_length():
    with pytest.raises(StateError, match=r"how many tokens to make room for: got max_length=None; .* pass max_length"):
        tiny_model("stripe").init_state(1)


@pytest.mark.parametrize(("batch", "max_length"), [(0, 5), (-1, 5), (1, 0), (2.0, 5), ("2", 5), (1, -3)])
def test_impossible_sizes_of_a_state(batch, max_length):
    with pytest.raises(InputError, match="must be a positive whole number"):
        tiny_model("attention").init_state(batch, max_length)
