"""Baselines against hand-computed values, a naive dictionary implementation, and the demonstration data."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crocuta.errors import InputError
from crocuta.training.baselines import (
    Baseline,
    baselines,
    lzma_bits,
    markov_bits,
    ngram_bits,
    ngram_probabilities,
)

DATA = Path(__file__).parents[2] / "examples" / "data"
SMOOTHINGS = ("witten-bell", "absolute", "kneser-ney")
VOCAB = 5  # one more than the strategies below draw: id 4 never occurs in training

texts = st.lists(st.integers(0, 3), min_size=1, max_size=60)
unseen_texts = st.lists(st.integers(0, 4), min_size=1, max_size=12)


class Naive:
    """The recursion of the module's docstring, one context and one token at a time."""

    def __init__(self, train: list[int], vocab: int, smoothing: str):
        self.vocab, self.smoothing = vocab, smoothing
        self.counts: dict[int, Counter] = defaultdict(Counter)
        left: dict[tuple, set] = defaultdict(set)
        for end in range(len(train)):
            for order in range(end + 1):
                gram = tuple(train[end - order : end + 1])
                self.counts[order][gram] += 1
                left[gram].add(train[end - order - 1] if end > order else "start")
        self.neighbours = defaultdict(Counter)
        for gram, seen in left.items():
            self.neighbours[len(gram) - 1][gram] = len(seen)

    def probability(self, context: tuple, token: int, *, top: bool = True) -> float:
        raw = top or self.smoothing != "kneser-ney"
        table = (self.counts if raw else self.neighbours)[len(context)]
        lower = self.probability(context[1:], token, top=False) if context else 1 / self.vocab
        followers = {gram: n for gram, n in table.items() if gram[:-1] == context}
        total, own = sum(followers.values()), followers.get((*context, token), 0)
        if not total:
            return lower
        if self.smoothing == "witten-bell":
            return (own + len(followers) * lower) / (total + len(followers))
        discount = self.discounts(table)
        mass = sum(discount[min(n, 3)] for n in followers.values())
        return (own - discount[min(own, 3)] + mass * lower) / total

    @staticmethod
    def discounts(table: Counter) -> list[float]:
        n1, n2, n3, n4 = (sum(n == i for n in table.values()) for i in (1, 2, 3, 4))
        if not n1 or not n2:
            return [0, 0.5, 0.5, 0.5]
        y = n1 / (n1 + 2 * n2)
        raw = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * (n4 / n3 if n3 else 1)]
        return [0, *(min(max(d, 0.1), i) for i, d in enumerate(raw, start=1))]


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@settings(deadline=None, max_examples=40)
@given(train=texts, past=texts, text=unseen_texts)
def test_probabilities_are_those_of_the_naive_implementation(smoothing, train, past, text):
    naive, max_order = Naive(train, VOCAB, smoothing), 4
    found = ngram_probabilities(train, text, VOCAB, max_order, smoothing, past=past)
    whole = [*past, *text]
    for order in range(max_order + 1):
        for place, token in enumerate(text, start=len(past)):
            # The first tokens have a shorter context than the order and take what a back-off would give them.
            context = tuple(whole[max(0, place - order) : place])
            expected = naive.probability(context, token, top=place >= order)
            assert found[order, place - len(past)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@settings(deadline=None, max_examples=40)
@given(train=texts, past=st.lists(st.integers(0, 4), max_size=6))
def test_followers_of_every_context_sum_to_one_and_none_is_impossible(smoothing, train, past):
    p = np.stack([ngram_probabilities(train, [w], VOCAB, 4, smoothing, past=past)[:, 0] for w in range(VOCAB)])
    assert p.sum(axis=0) == pytest.approx(np.ones(5), rel=1e-12)
    assert (p > 0).all()


@settings(deadline=None, max_examples=25)
@given(train=texts, text=unseen_texts, more=unseen_texts)
def test_a_prediction_depends_on_nothing_to_its_right(train, text, more):
    for smoothing in SMOOTHINGS:
        alone = ngram_probabilities(train, text, VOCAB, 3, smoothing)
        followed = ngram_probabilities(train, [*text, *more], VOCAB, 3, smoothing)
        np.testing.assert_array_equal(alone, followed[:, : len(text)])


def test_order_0_and_1_by_hand():
    # Counts 0: 2, 1: 1, two kinds: p(0) = (2 + 2/2) / 5 = 0.6. After 0 come one 0 and one 1, two kinds:
    # p(1|0) = (1 + 2·0.4) / 4 = 0.45. Nothing was seen after 1, so p(1|1) = p(1) = 0.4.
    bits = ngram_bits([0, 0, 1], [0, 1, 1], vocab_size=2, max_order=1)
    assert bits[0] == pytest.approx(-(math.log2(0.6) + 2 * math.log2(0.4)) / 3)
    assert bits[1] == pytest.approx(-(math.log2(0.6) + math.log2(0.45) + math.log2(0.4)) / 3)


def test_contiguous_takes_the_first_context_from_the_end_of_training():
    # After 0 come one 1 and one 0: p(1|0) = (1 + 2·p(1)) / 4.
    train = [0, 1, 0, 0]
    apart = ngram_bits(train, [1], vocab_size=2, max_order=1)
    joined = ngram_bits(train, [1], vocab_size=2, max_order=1, contiguous=True)
    p_1 = (1 + 2 / 2) / (4 + 2)
    assert apart == pytest.approx({0: -math.log2(p_1), 1: -math.log2(p_1)})
    assert joined == pytest.approx({0: -math.log2(p_1), 1: -math.log2((1 + 2 * p_1) / (2 + 2))})


def test_smoothing_of_each_order_is_the_best_on_the_end_of_training():
    text = np.frombuffer(gzip.decompress((DATA / "moby_dick.txt.gz").read_bytes())[:24_000], dtype=np.uint8)
    train, held_out = text[:20_000], text[20_000:]
    head, slice_ = train[:-2000], train[-2000:]
    bits = ngram_bits(train, held_out, 256, max_order=4)
    scores = {
        s: -np.log2(ngram_probabilities(head, slice_, 256, 4, s, past=head[-4:])).mean(axis=1) for s in SMOOTHINGS
    }
    assert len({min(SMOOTHINGS, key=lambda s: scores[s][order]) for order in range(5)}) > 1
    for order in range(5):
        best = min(SMOOTHINGS, key=lambda s: scores[s][order])
        expected = -np.log2(ngram_probabilities(train, held_out, 256, 4, best)[order]).mean()
        assert bits[order] == pytest.approx(expected, rel=1e-12)


def test_markov_finds_the_order_of_its_source():
    """A source whose third-last letter decides: orders 0 to 2 see noise, order 3 nearly nothing but it."""
    rng, letters = np.random.default_rng(1), [0, 1, 2]
    for _ in range(30_000):
        letters.append(letters[-3] if rng.random() < 0.9 else int(rng.integers(4)))
    bits = markov_bits(letters[:-2000], letters[-2000:], vocab_size=4, contiguous=True)
    assert list(bits) == list(range(13))
    assert min(bits, key=bits.get) == 3
    p = 0.9 + 0.1 / 4
    entropy = -p * math.log2(p) - 3 * (0.1 / 4) * math.log2(0.1 / 4)
    assert bits[3] == pytest.approx(entropy, abs=0.08)
    assert bits[2] > 1.9


def test_lzma_counts_only_what_the_held_out_bytes_add():
    noise = np.random.default_rng(2).integers(0, 256, size=40_000, dtype=np.uint8).tobytes()
    fresh = lzma_bits(noise[:30_000], noise[30_000:])
    assert fresh.primed == pytest.approx(8, abs=0.02)
    assert fresh.alone == pytest.approx(8, abs=0.02)
    repeated = lzma_bits(noise[:30_000], noise[5_000:15_000])
    assert repeated.primed < 0.5
    assert repeated.alone > 7.9


def test_lzma_alone_is_xz_9e_without_its_container():
    text = b"the whale, the white whale; " * 3 + bytes(range(97, 123)) * 2
    container = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    size = lzma_bits(b"", text).alone * len(text) / 8
    assert container - 72 <= size < container - 40


def test_lzma_is_counted_per_token_whatever_the_width_of_an_id():
    wide = np.random.default_rng(3).integers(0, 512, size=20_000)
    found = {b.name: b.bits_per_token for b in baselines(wide[:15_000], wide[15_000:], 512, max_order=0)}
    assert 9 <= found["lzma -9e alone"] < 11
    assert 9 <= found["lzma -9e after train"] < 11
    assert 9 <= found["n-gram order 0"] < 9.1


def test_baselines_are_the_parts_by_name():
    text = np.frombuffer(b"call me ishmael. some years ago, never mind how long precisely. " * 8, dtype=np.uint8)
    train, held_out = text[:400], text[400:]
    found = baselines(train, held_out, 256, max_order=2, contiguous=True, family="Markov")
    bits, compressed = (
        ngram_bits(train, held_out, 256, 2, contiguous=True),
        lzma_bits(bytes(train), bytes(held_out)),
    )
    assert found == [
        *(Baseline(f"Markov order {k}", bits[k]) for k in range(3)),
        Baseline("lzma -9e after train", compressed.primed),
        Baseline("lzma -9e alone", compressed.alone),
    ]


def test_moby_dick_figures():
    text = np.frombuffer(gzip.decompress((DATA / "moby_dick.txt.gz").read_bytes()), dtype=np.uint8)
    cut = len(text) - len(text) // 20
    bits = ngram_bits(text[:cut], text[cut:], vocab_size=256, contiguous=True)
    assert list(bits.values()) == pytest.approx([4.5530, 3.4813, 2.8460, 2.3411, 2.1208, 2.0553], abs=2e-3)


def test_demonstration_data_is_what_its_readme_says():
    rows = re.findall(r"`([\w.]+)\.gz`.*`([0-9a-f]{64})`", (DATA / "README.md").read_text())
    assert [name for name, _ in rows] == ["moby_dick.txt", "lambda.fa", "ecoli_dh1.fa", "ecoli_genes.tsv"]
    for name, digest in rows:
        compressed = (DATA / f"{name}.gz").read_bytes()
        plain = gzip.decompress(compressed)
        assert hashlib.sha256(plain).hexdigest() == digest, name
        assert compressed[4:8] == bytes(4), f"{name}.gz carries a time"
        if name.endswith(".fa"):
            _, *lines = plain.decode("ascii").splitlines()
            bases = "".join(lines)
            assert set(bases) == set("ACGT")
            assert len(bases) == {"lambda.fa": 48_502, "ecoli_dh1.fa": 900_000}[name]


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        ([0, 1, 4], [0], "train has an id outside the vocabulary: got 0 to 4; expected 0 to 3"),
        ([0, 1], [-1], "held_out has an id outside the vocabulary: got -1 to -1; expected 0 to 3"),
        ([], [0], "train is no token sequence: got float64 of shape (0,)"),
        ([0], [[0, 1]], "held_out is no token sequence: got int64 of shape (1, 2)"),
        ([0.5], [0], "train is no token sequence: got float64 of shape (1,)"),
    ],
)
def test_bad_ids_are_named(train, held_out, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ngram_bits(train, held_out, vocab_size=4)


def test_empty_held_out_bytes_and_negative_orders_are_refused():
    with pytest.raises(InputError, match="held_out is empty"):
        lzma_bits(b"abc", b"")
    with pytest.raises(InputError, match="max_order is negative: got -1"):
        ngram_bits([0, 1], [0], 2, max_order=-1)
