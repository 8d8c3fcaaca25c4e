"""Scores against the model's own logits: in any order, any batch, any chunk; padding is never heard."""

from __future__ import annotations

import dataclasses
import math
import weakref

import numpy as np
import pytest
import torch
from tiny_models import KINDS, VOCABULARY, chain_model, random_ids, tiny_model

from crocuta.errors import InputError, NonFiniteError, TokenizerError
from crocuta.inference import batches
from crocuta.inference import score as score_module
from crocuta.inference.score import score
from crocuta.model import chunks, memory
from crocuta.model.lm import Model
from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.dna import DNATokenizer

DNA = DNATokenizer()
ROWS = [random_ids(length, seed=length) for length in (13, 2, 40, 7, 40, 3)]


@torch.no_grad()
def direct(model: Model, row: torch.Tensor) -> torch.Tensor:
    """log p of tokens 1 .. l-1 of one sequence, by definition."""
    log_probs = model(row[None])[0, :-1].double().log_softmax(-1)
    return log_probs[torch.arange(len(row) - 1), row[1:]]


def check(results, model: Model, rows: list[torch.Tensor], tolerance: float = 1e-6) -> None:
    for result, row in zip(results, rows, strict=True):
        expected = direct(model, row)
        assert result.log_probs.dtype == np.float32
        assert result.tokens == len(row) - 1 == len(result.log_probs)
        np.testing.assert_allclose(result.log_probs, expected, rtol=1e-6, atol=tolerance)
        assert result.total == pytest.approx(float(expected.sum()), rel=1e-6, abs=1e-5)
        assert result.mean == pytest.approx(float(expected.mean()), rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_logits(kind):
    model = tiny_model(kind, torch.float64, seed=1)
    check(score(model, None, ROWS), model, ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_softmax_is_float32_whatever_the_model(dtype):
    model = tiny_model("stripe", dtype, seed=1)
    check(score(model, None, ROWS[:1]), model, ROWS[:1], tolerance=1e-5)


@pytest.mark.parametrize("kind", ["stripe", "attention-gqa", "implicit", "complex-grouped", "explicit-fft"])
@pytest.mark.parametrize("chunk", [1, 7, 33, 39])
def test_long_rows_are_read_in_chunks(kind, chunk, monkeypatch):
    """The longest row has 39 tokens to read; nothing of more than ``chunk`` tokens may be run at once."""
    model = tiny_model(kind, torch.float64, seed=1)
    monkeypatch.setattr(memory, "DEFAULT", dataclasses.replace(memory.DEFAULT, chunk=chunk))
    sizes: list[int] = []
    model.blocks[0].pre_norm.register_forward_hook(lambda module, inputs, output: sizes.append(output[1].shape[1]))
    results = score(model, None, ROWS)
    assert max(sizes) <= chunk
    check(results, model, ROWS)


@pytest.mark.parametrize("limit", [1, 100, 700])
def test_logits_are_made_in_turns(limit, monkeypatch):
    model = tiny_model("stripe", torch.float64, seed=1)
    monkeypatch.setattr(memory, "DEFAULT", dataclasses.replace(memory.DEFAULT, logits=limit))
    sizes: list[int] = []
    original = Model.logits
    monkeypatch.setattr(Model, "logits", lambda self, h: sizes.append(h.shape[0] * h.shape[1]) or original(self, h))
    results = score(model, None, ROWS)
    assert max(sizes) <= max(limit // VOCABULARY, len(ROWS))
    monkeypatch.undo()
    check(results, model, ROWS)


def test_padding_is_never_heard(monkeypatch):
    """Whatever stands behind a shorter row, and how much of it."""
    model = tiny_model("stripe", torch.float64, seed=1)
    expected = score(model, None, ROWS)

    def padded(rows):
        ids = random_ids(len(rows), max(map(len, rows)) + 5, seed=9)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = row
        return ids, torch.tensor([len(row) for row in rows])

    monkeypatch.setattr(score_module, "pad_right", padded)
    for result, other in zip(score(model, None, ROWS), expected, strict=True):
        np.testing.assert_allclose(result.log_probs, other.log_probs, rtol=1e-6)
        assert result.tokens == other.tokens


def test_results_stand_in_the_given_order_over_many_batches(monkeypatch):
    model = tiny_model("real-raw", torch.float64, seed=1)
    monkeypatch.setattr(memory, "DEFAULT", dataclasses.replace(memory.DEFAULT, tokens=50))
    rows = [random_ids(length, seed=i) for i, length in enumerate([9, 30, 2, 60, 5, 30, 17, 2, 49])]
    check(score(model, None, rows), model, rows)


@pytest.mark.parametrize("lengths", [[3, 3, 3], [1, 100, 1, 100], [50] * 9, [200], list(range(1, 30))])
@pytest.mark.parametrize("tokens", [1, 60, 1000])
def test_batches_hold_every_row_once_within_the_limit(lengths, tokens):
    rows = [random_ids(length) for length in lengths]
    found = list(batches.batches(rows, tokens))
    assert sorted(i for batch in found for i in batch) == list(range(len(rows)))
    for batch in found:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= tokens
    if tokens == 1000:
        assert len(found) == 1


def test_a_certain_text_has_likelihood_one_and_an_impossible_one_almost_none():
    model = chain_model({7: 8, 8: 9, 9: 7}, vocabulary=16)
    with torch.no_grad():
        model.head.weight.mul_(10)
    certain, impossible = score(model, DNA, ["ACGACGACG", "ACGACGACC"])
    assert certain.total == pytest.approx(0, abs=1e-5)
    assert impossible.log_probs[:-1] == pytest.approx(np.zeros(7), abs=1e-5)
    assert impossible.total == pytest.approx(-40, rel=1e-3)  # logits of √16 · 10 against 0


def test_the_first_token_needs_bos():
    model = tiny_model("stripe", torch.float64, seed=1)
    with_bos, without = score(model, DNA, ["GATTACA"], bos=True)[0], score(model, DNA, ["GATTACA"])[0]
    row = torch.tensor([DNA.bos_id, *DNA.encode("GATTACA").tolist()])
    check([with_bos], model, [row])
    assert (with_bos.tokens, without.tokens) == (7, 6)
    assert score(model, DNA, ["A"], bos=True)[0].tokens == 1


def test_text_and_ids_are_the_same():
    model = tiny_model("stripe", seed=1)
    ids = DNA.encode("GATTACA")
    forms = ["GATTACA", b"GATTACA", ids, ids.astype(np.uint16), ids.tolist(), tuple(ids.tolist()), torch.tensor(ids)]
    totals = [score(model, DNA, [form])[0].total for form in forms]
    assert totals == [totals[0]] * len(forms)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_stays(training):
    model = tiny_model("stripe", torch.float64, dropout=0.5, seed=1).train(training)
    results = score(model, None, ROWS)
    assert model.training == training
    check(results, model.eval(), ROWS)
    model.train(training)
    with torch.no_grad():
        model.embedding.weight[7] = math.nan
    with pytest.raises(NonFiniteError):
        score(model, None, ROWS)
    assert model.training == training


# --- errors ---


@pytest.mark.parametrize(
    ("both_strands", "sequences"), [(False, ["CCCC", "CACC", "CC"]), (True, ["CCCC", "CCAC", "CC"])]
)
def test_nan_logits_name_the_sequence(both_strands, sequences):
    model = chain_model({}, vocabulary=16)
    with torch.no_grad():
        model.embedding.weight[7] = math.nan
    with pytest.raises(NonFiniteError, match="the model's logits are not a number for sequence 1; check its weights"):
        score(model, DNA, sequences, both_strands=both_strands)


WRONG = {
    "one-text": ({"sequences": "ACGT"}, InputError, r"sequences must be a list: got one text; pass \[text\]"),
    "empty": ({"sequences": ["ACGT", ""]}, InputError, "sequence 1 is empty"),
    "one-token": (
        {"sequences": ["ACGT", "A"]},
        InputError,
        "sequence 1 has nothing to score: got 1 token; .* bos=True",
    ),
    "foreign-id": (
        {"sequences": [[1, 16]]},
        InputError,
        "sequence 0 has an id outside the vocabulary: got ids from 1 to 16",
    ),
    "negative-id": (
        {"sequences": [[-1, 6]]},
        InputError,
        "outside the vocabulary: got ids from -1 to 6; expected 0 to 15",
    ),
    "fractions": (
        {"sequences": [[0.5, 6.0]]},
        InputError,
        "sequence 0 must hold ids: got torch.float32; expected whole",
    ),
    "no-bos": ({"tokenizer": ByteTokenizer(), "bos": True}, TokenizerError, "no BOS token; score without bos"),
    "no-tokenizer": ({"tokenizer": None}, TokenizerError, "sequence 0 is text and there is no tokenizer"),
    "no-bos-at-all": ({"tokenizer": None, "sequences": [[7, 8]], "bos": True}, TokenizerError, "no BOS token"),
    "no-strands": (
        {"tokenizer": None, "sequences": [[7, 8]], "both_strands": True},
        TokenizerError,
        "both strands need a tokenizer of nucleotides",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    arguments, kind, message = WRONG[name]
    if isinstance(arguments.get("tokenizer"), ByteTokenizer):
        arguments = {**arguments, "sequences": [[7, 8]]}
    with pytest.raises(kind, match=message) as failure:
        score(tiny_model("stripe"), **{"tokenizer": DNA, "sequences": ["ACGT"], **arguments})
    assert "\n" not in str(failure.value)


def test_longer_than_the_filters_are_defined_for():
    model = tiny_model("implicit")
    assert score(model, DNA, ["A" * 160], bos=True)[0].tokens == 160
    with pytest.raises(
        InputError, match=r"sequence 1 is longer than the model's filters .*: got 161 tokens; .* most 160"
    ):
        score(model, DNA, ["A", "A" * 161], bos=True)


# --- a bound of memory ---


@pytest.mark.parametrize("kind", ["stripe", "real-raw"])
def test_a_bound_changes_how_much_is_run_at_once_and_nothing_else(kind, monkeypatch):
    """Batches, chunks and turns of logits all shrink to what the least bound allows."""
    monkeypatch.setattr(memory, "BASE", 0)
    model = tiny_model(kind, torch.float64, seed=1)
    rows = [random_ids(length, seed=length) for length in (150, 20, 20, 20, 20, 20, 2)]
    with pytest.raises(InputError, match="max_memory is too small even for the shortest chunks: got 1kB") as least:
        score(model, None, rows, max_memory="1kB")
    read: list[int] = []
    model.embedding.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].numel()))
    check(score(model, None, rows, max_memory="2GiB"), model, rows)
    assert max(read) > 150
    read.clear()
    results = score(model, None, rows, max_memory=str(least.value.expected).split()[2])
    assert 20 < max(read) <= memory.SMALLEST
    model.embedding._forward_pre_hooks.clear()
    check(results, model, rows)


def test_ids_and_results_count(monkeypatch):
    """28 bytes a token, which are most of what a long row takes in a tiny model."""
    monkeypatch.setattr(memory, "BASE", 0)
    model = tiny_model("real-raw")
    for length, fits in ((2_000, True), (40_000, False)):
        rows = [random_ids(length)]
        if fits:
            assert score(model, None, rows, max_memory="1MB")[0].tokens == length - 1
        else:
            with pytest.raises(InputError, match=r"expected at least 1\d{3}KiB"):
                score(model, None, rows, max_memory="1MB")


def test_nothing_small_is_left_between_large_tensors(monkeypatch):
    """A result a turn, kept until the end, would keep the C library from using the place of the logits again."""
    model = tiny_model("real-raw")
    monkeypatch.setattr(memory, "DEFAULT", dataclasses.replace(memory.DEFAULT, logits=10 * VOCABULARY))
    alive: list[weakref.ref] = []
    most = 0
    original = chunks._token_log_probs

    def turn(*arguments):
        nonlocal most
        most = max(most, sum(reference() is not None for reference in alive))
        result = original(*arguments)
        alive.append(weakref.ref(result))
        return result

    monkeypatch.setattr(chunks, "_token_log_probs", turn)
    score(model, None, [random_ids(101)])
    assert len(alive) == 10
    assert most <= 1
