"""Variants of one sequence: each has the score of the whole edited sequence, and only what follows it is computed."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import KINDS, text_model, tiny_model

from crocuta.errors import InputError, NonFiniteError, TokenizerError
from crocuta.inference import variants as module
from crocuta.inference.score import score
from crocuta.inference.variants import Variant, _edit, score_variants
from crocuta.model.lm import Model
from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.dna import DNATokenizer

BYTES = ByteTokenizer(vocab_size=256)
DNA = DNATokenizer()


def bases(draw: random.Random, length: int) -> str:
    return "".join(draw.choice("ACGT") for _ in range(length))


def random_variant(draw: random.Random, sequence: str) -> Variant:
    """An exchange, insertion or deletion anywhere, the ends included."""
    position = draw.choice([0, len(sequence), draw.randint(0, len(sequence))])
    size = draw.randint(0, min(5, len(sequence) - position))
    alternative = bases(draw, draw.randint(0 if size else 1, 5))
    return Variant(position, sequence[position : position + size], alternative)


def edited(sequence: str, variant: Variant) -> str:
    return sequence[: variant.position] + variant.alternative + sequence[variant.position + len(variant.reference) :]


@torch.no_grad()
def total(model: Model, text: str) -> float:
    """The log-likelihood of a text given its first letter, in float64, from one pass."""
    ids = torch.from_numpy(DNA.encode(text))
    return float(model(ids[None, :-1])[0].double().log_softmax(-1).gather(1, ids[1:, None]).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_variant_has_the_score_of_the_whole_edited_sequence(kind):
    model = tiny_model(kind, torch.float64, seed=1)
    draw = random.Random(kind)
    sequence = bases(draw, 130)
    variants = [random_variant(draw, sequence) for _ in range(20)]
    reference = total(model, sequence)
    for variant, result in zip(variants, score_variants(model, DNA, sequence, variants), strict=True):
        text = edited(sequence, variant)
        assert result.variant == variant
        assert result.tokens == len(text) - 1
        assert result.total == pytest.approx(total(model, text), abs=1e-9)
        assert result.delta == pytest.approx(total(model, text) - reference, abs=1e-9)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), slack=st.sampled_from([1, 4, 32]))
def test_variants_anywhere_in_sequences_of_any_length(seed, slack):
    draw = random.Random(seed)
    model = tiny_model(draw.choice(["stripe", "complex-raw", "explicit"]), torch.float64, seed=1)
    sequence = bases(draw, draw.choice([2, 3, 5, 20, 140]))
    variants = [random_variant(draw, sequence) for _ in range(draw.randint(0, 8))]
    variants = [v for v in variants if len(edited(sequence, v)) > 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SLACK", slack)
        results = score_variants(model, DNA, sequence, variants)
    assert [r.total for r in results] == pytest.approx([total(model, edited(sequence, v)) for v in variants], abs=1e-9)


@pytest.mark.parametrize("options", [{}, {"both_strands": True}, {"bos": True}, {"bos": True, "both_strands": True}])
def test_options_are_those_of_score(options):
    model = tiny_model("stripe", torch.float64, seed=1)
    draw = random.Random(1)
    sequence = bases(draw, 100)
    variants = [random_variant(draw, sequence) for _ in range(20)]
    expected = score(model, DNA, [edited(sequence, v) for v in variants], **options)
    reference = score(model, DNA, [sequence], **options)[0]
    for result, whole in zip(score_variants(model, DNA, sequence, variants, **options), expected, strict=True):
        assert result.total == pytest.approx(whole.total, abs=1e-4)
        assert result.delta == pytest.approx(whole.total - reference.total, abs=1e-4)
        assert result.tokens == whole.tokens


def test_a_variant_that_changes_nothing_changes_nothing():
    model = tiny_model("stripe", seed=1)
    same, other = score_variants(model, DNA, "ACGTACGTAC", [(4, "A", "A"), (4, "A", "C")])
    assert same.delta == 0
    assert abs(other.delta) > 0.01


@pytest.mark.parametrize("vocabulary", [256])
def test_letters_of_several_tokens(vocabulary):
    """The ids differ from within a letter; and ids after the edit are found again."""
    model = tiny_model("complex-raw", torch.float64, vocabulary=vocabulary, seed=1)
    sequence = "aé€b𝄞cé"
    variants = [
        Variant(1, "é", "è"),
        Variant(2, "€", "é"),
        Variant(4, "𝄞", ""),
        Variant(0, "a", "𝄞𝄞"),
        Variant(7, "", "é"),
    ]
    expected = score(model, BYTES, [edited(sequence, v) for v in variants])
    results = score_variants(model, BYTES, sequence, variants)
    assert [r.total for r in results] == pytest.approx([e.total for e in expected], abs=1e-4)
    assert [r.tokens for r in results] == [e.tokens for e in expected]


# --- what is computed ---


def read_tokens(monkeypatch, call) -> list[tuple[int, int]]:
    """(rows, tokens) of every call that reads tokens."""
    seen: list[tuple[int, int]] = []
    extend = Model.extend_hidden
    with monkeypatch.context() as patch:
        patch.setattr(Model, "extend_hidden", lambda *a: seen.append(tuple(a[1].shape)) or extend(*a))
        call()
    return seen


def test_the_prefix_is_read_once_and_neighbours_go_together(monkeypatch):
    model = tiny_model("complex-raw", seed=1)
    sequence = bases(random.Random(1), 1000)
    near = [Variant(p, sequence[p], b) for p in range(900, 905) for b in "ACGT" if b != sequence[p]]
    seen = read_tokens(monkeypatch, lambda: score_variants(model, DNA, sequence, near))
    assert seen == [(1, 899), (15, 100), (1, 100)]  # up to the first, all variants together, the rest of the sequence
    far = [near[0], Variant(100, sequence[100], "A" if sequence[100] != "A" else "C")]
    seen = read_tokens(monkeypatch, lambda: score_variants(model, DNA, sequence, far))
    assert seen == [(1, 99), (1, 900), (1, 800), (1, 100), (1, 100)]


@pytest.mark.parametrize(
    ("reference", "alternative", "expected"),
    [
        ("ACGT", "ACGT", (4, "", 4)),
        ("ACGT", "ACTT", (2, "T", 3)),
        ("ACGT", "CCGT", (0, "C", 1)),
        ("ACGT", "ACG", (3, "", 4)),
        ("ACGT", "ACGTT", (4, "T", 4)),
        ("AAAA", "AAA", (3, "", 4)),
        ("AAAA", "AAAAA", (4, "A", 4)),
        ("ACGT", "TTT", (0, "TT", 3)),
    ],
)
def test_the_shortest_edit(reference, alternative, expected):
    a, b = (torch.from_numpy(DNA.encode(text)) for text in (reference, alternative))
    edit = _edit(a, b)
    assert (edit.shared, DNA.decode(edit.middle.tolist()), edit.resumed) == expected
    for start in range(edit.fork + 1):
        assert edit.row(a, start).tolist() == b[start:].tolist()


# --- errors ---

WRONG = {
    "bytes": ((b"ACGT", []), InputError, "the sequence must be text: got bytes"),
    "one": (("ACGT", Variant(0, "A", "C")), InputError, r"variants must be a list: got one; pass \[variant\]"),
    "short": (("ACGT", [(0, "A", "C"), (1, "A")]), InputError, r"variant 1 is none: got \(1, 'A'\); expected \(pos"),
    "number": (("ACGT", [7]), InputError, "variant 0 is none: got 7"),
    "text-position": (("ACGT", [("0", "A", "C")]), InputError, "variant 0 is none"),
    "no-text": (("ACGT", [(0, "A", None)]), InputError, "variant 0 is none"),
    "nothing": (("ACGT", [(0, "", "")]), InputError, "variant 0 edits nothing"),
    "negative": (("ACGT", [(-1, "T", "C")]), InputError, "variant 0 is not inside the sequence: got position -1"),
    "behind": (("ACGT", [(4, "T", "C")]), InputError, "variant 0 is not inside .* expected a position from 0 to 3"),
    "over": (("ACGT", [(3, "TA", "C")]), InputError, "variant 0 is not inside .* expected a position from 0 to 2"),
    "mismatch": (
        ("ACGT", [(1, "C", "G"), (1, "CT", "A")]),
        InputError,
        "the reference of variant 1 does not stand at position 1: got 'CT'; expected 'CG'; count positions from 0",
    ),
    "too-little": (("ACGT", [(1, "CGT", "")]), InputError, "the sequence with variant 0 has nothing to score"),
    "empty": (("A", [(0, "A", "")]), InputError, "the sequence has nothing to score: got 1 token"),
    "emptied": (("AC", [(0, "AC", "")]), InputError, "the sequence with variant 0 is empty"),
    "too-long": (("ACGT", [(1, "", "A" * 157)]), InputError, "the sequence with variant 0 is longer than .* got 161"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    arguments, kind, message = WRONG[name]
    with pytest.raises(kind, match=message) as failure:
        score_variants(tiny_model("stripe"), DNA, *arguments)
    assert "\n" not in str(failure.value)


def test_options_that_the_tokenizer_lacks():
    model = text_model("abc")
    with pytest.raises(TokenizerError, match="this tokenizer has no BOS token"):
        score_variants(model, BYTES, "abc", [(0, "a", "b")], bos=True)


@torch.no_grad()
def test_what_is_not_finite_is_named():
    model = text_model("abcdefgh")
    model.embedding.weight[ord("x")] = torch.nan
    with pytest.raises(NonFiniteError, match="not a number for variant 1; its state is finite: check the weights of"):
        score_variants(model, BYTES, "abcdefgh", [(1, "b", "c"), (1, "b", "x")])
    with pytest.raises(NonFiniteError, match="not a number for the sequence"):
        score_variants(model, BYTES, "abcdefgxh", [])
