"""Synthetic tasks against naive readings of their definitions: a target must follow from what stands before it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crocuta.data.synthetic import (
    IGNORED,
    MAD,
    AssociativeRecall,
    Compression,
    Examples,
    FuzzyRecall,
    InContextRecall,
    Memorization,
    NoisyRecall,
    SelectiveCopying,
    SyntheticTask,
)
from crocuta.errors import InputError

TASKS = (*MAD, AssociativeRecall)
Row = tuple[list[int], list[int]]
SPLITS = ("train", "test")


def rows(examples: Examples) -> Iterator[Row]:
    return zip(examples.inputs.tolist(), examples.targets.tolist())


# --- what the inputs determine, read token by token ---


def recalled(inputs: list[int], last: int, letters: int) -> list[int]:
    """The value of every key that was seen before, at the place of the key; ``last`` is the value at the end."""
    half, known, targets = letters // 2, {}, []
    for key, after in zip(inputs, [*inputs[1:], last]):
        is_pair = key < half <= after < letters
        targets.append(known.get(key, IGNORED) if is_pair else IGNORED)
        if is_pair:
            assert known.setdefault(key, after) == after, "a key changed its value"
    return targets


def associated(inputs: list[int], split: str) -> list[int]:
    """Pairs, the mark 8, and a key."""
    *pairs, mark, key = inputs
    assert mark == 8
    assert 8 not in pairs
    assert all(k < 4 <= v < 8 for k, v in zip(pairs[::2], pairs[1::2]))
    known = dict(zip(pairs[::2], pairs[1::2]))
    whole = recalled(pairs, pairs[-1], 8)
    return [*(whole[:-1] if split == "train" else [IGNORED] * (len(pairs) - 1)), IGNORED, IGNORED, known[key]]


def fuzzily_recalled(inputs: list[int], targets: list[int], vocab_size: int = 16) -> list[int]:
    """Motifs are runs of keys' tokens and of values' tokens; the last token of all is a target."""
    half, padding = (vocab_size - 1) // 2, vocab_size - 1
    tokens = [*inputs, targets[-1]]
    expected, known, place = [IGNORED] * len(tokens), {}, 0
    while tokens[place] == padding:
        place += 1
    while place < len(tokens):
        middle = next(i for i in range(place, len(tokens)) if tokens[i] >= half)
        end = next((i for i in range(middle, len(tokens)) if tokens[i] < half), len(tokens))
        key, value = tuple(tokens[place:middle]), tokens[middle:end]
        assert len(set(key)) == len(key)
        assert len(set(value)) == len(value)
        assert max(len(key), len(value)) <= 3
        if key in known:
            assert known[key] == value
            expected[middle:end] = value
        known[key], place = value, end
    return expected[1:]


def copied(inputs: list[int]) -> list[int]:
    """The tokens before the mark, at the blanks after it."""
    mark = inputs.index(15)
    tokens = [token for token in inputs[:mark] if token != 14]
    assert len(tokens) == 16
    assert inputs[mark + 1 :] == [14] * 16
    return [IGNORED] * (mark + 1) + tokens


FACTS = dict(enumerate(Memorization().values().tolist()))

ORACLES: dict[type[SyntheticTask], Callable[[list[int], list[int], str], list[int]]] = {
    InContextRecall: lambda x, y, split: recalled(x, y[-1], 16),
    NoisyRecall: lambda x, y, split: recalled(x, y[-1], 16),
    FuzzyRecall: lambda x, y, split: fuzzily_recalled(x, y),
    AssociativeRecall: lambda x, y, split: associated(x, split),
    Memorization: lambda x, y, split: [FACTS[x[i - 1]] if i % 2 else IGNORED for i in range(len(x))],
    Compression: lambda x, y, split: [*x[:-1], IGNORED],
    SelectiveCopying: lambda x, y, split: copied(x),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_targets_are_what_the_inputs_determine(task: type[SyntheticTask], split: str) -> None:
    for inputs, targets in rows(task().draw(60, 3, split)):
        assert targets == ORACLES[task](inputs, targets, split)


@given(st.integers(0, 2**40), st.sampled_from(SPLITS))
def test_recall_holds_for_every_seed(seed: int, split: str) -> None:
    task = NoisyRecall(length=12, noise=0.7)  # few real pairs: the probe is most often the only one that counts
    for inputs, targets in rows(task.draw(4, seed, split)):
        assert targets[-1] != IGNORED
        assert targets == recalled(inputs, targets[-1], 16)


@given(st.integers(0, 2**40), st.integers(1, 3), st.integers(7, 40), st.sampled_from(SPLITS))
def test_fuzzy_recall_always_shows_its_probe_before(seed: int, motif: int, vocab: int, split: str) -> None:
    task = FuzzyRecall(length=4 * motif + seed % 9, motif=motif, vocab_size=vocab)
    for inputs, targets in rows(task.draw(4, seed, split)):
        assert targets[-1] != IGNORED
        assert targets == fuzzily_recalled(inputs, targets, vocab)


# --- shapes, vocabularies, fractions ---


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_shapes_types_and_vocabulary(task: type[SyntheticTask], split: str) -> None:
    examples = task().draw(50, 0, split)
    for array in examples:
        assert array.dtype == np.int64
        assert array.shape == (50, task().input_length)
    assert examples.inputs.min() >= 0
    assert examples.inputs.max() < task().vocab_size
    counted = examples.targets[examples.targets != IGNORED]
    assert 0 <= counted.min() <= counted.max() < task().vocab_size


LENGTHS = {InContextRecall: 127, NoisyRecall: 127, FuzzyRecall: 128, AssociativeRecall: 258}
LENGTHS |= {Memorization: 32, Compression: 32, SelectiveCopying: 256}


@pytest.mark.parametrize("task", TASKS)
def test_input_lengths_are_the_published_ones(task: type[SyntheticTask]) -> None:
    assert task().input_length == LENGTHS[task]


def expected_fraction(task: type[SyntheticTask]) -> float:
    """Counted positions of a test: of 63 uniform keys and a probe, those that were seen before."""
    new = sum((1 - 1 / 8) ** i for i in range(63))
    new_among_noise = sum(0.8 * (1 - 0.8 / 8) ** i for i in range(63))  # less the pair that is kept
    return {
        InContextRecall: (64 - new) / 127,
        NoisyRecall: (0.8 * 63 + 0.2 - new_among_noise + 1) / 127,
        AssociativeRecall: 1 / 258,
        Memorization: 1 / 2,
        Compression: 31 / 32,
        SelectiveCopying: 16 / 256,
    }[task]


@pytest.mark.parametrize("task", [task for task in TASKS if task is not FuzzyRecall])
def test_the_fraction_of_counted_positions(task: type[SyntheticTask]) -> None:
    targets = task().draw(2000, 1, "test").targets
    assert (targets != IGNORED).mean() == pytest.approx(expected_fraction(task), rel=5e-3)


def test_fuzzy_recall_counts_its_probe_and_little_else() -> None:
    targets = FuzzyRecall().draw(2000, 1, "test").targets
    at_the_end = (targets[:, ::-1] == IGNORED).argmax(axis=1)  # of the run of targets at the end
    assert np.bincount(at_the_end, minlength=4)[1:4].sum() == 2000
    assert at_the_end.mean() == pytest.approx(2, rel=0.05)
    pairs, motifs = (129 - 6) / 5, 7 * 6 * 5
    seen = pairs - motifs * (1 - (1 - 1 / motifs) ** pairs)
    assert (targets != IGNORED).sum(axis=1).mean() == pytest.approx(2 * (1 + seen), rel=0.05)


@pytest.mark.parametrize(
    "task", [InContextRecall(), NoisyRecall(), FuzzyRecall(), AssociativeRecall()], ids=lambda task: task.name
)
def test_published_training_targets_are_all_next_tokens(task: SyntheticTask) -> None:
    everywhere = type(task)(every_next_token=True)  # type: ignore[call-arg]
    published, ours = everywhere.draw(40, 5), task.draw(40, 5)
    assert (published.inputs == ours.inputs).all()
    inside = published.targets[:, :-1]
    padding = inside == IGNORED
    assert (inside[~padding] == ours.inputs[:, 1:][~padding]).all()
    assert (ours.inputs[:, 1:][padding] == task.vocab_size - 1).all()
    assert padding.any() == isinstance(task, FuzzyRecall)
    counted = ours.targets != IGNORED
    assert (published.targets[counted] == ours.targets[counted]).all()
    for left, right in zip(everywhere.draw(40, 5, "test"), task.draw(40, 5, "test")):
        assert (left == right).all()


# --- distributions ---


def test_noise_takes_its_share_of_pairs() -> None:
    inputs = NoisyRecall(noise=0.4).draw(2000, 2).inputs
    pairs = inputs[:, :126].reshape(2000, 63, 2) >= 16
    assert (pairs[..., 0] == pairs[..., 1]).all()
    assert pairs.mean() == pytest.approx(0.4 * 62 / 63, rel=0.02)


def test_selected_tokens_lie_anywhere_before_the_mark() -> None:
    inputs = SelectiveCopying().draw(6000, 0).inputs[:, :239]
    share = (inputs != 14).mean(axis=0)
    assert share.mean() == pytest.approx(16 / 239)
    assert np.abs(share - 16 / 239).max() < 5 * np.sqrt(16 / 239 / 6000)


def test_tests_of_fuzzy_recall_have_keys_of_the_largest_size() -> None:
    def sizes(split: str) -> set[int]:
        found = set()
        for inputs, _ in rows(FuzzyRecall().draw(20, 0, split)):
            word = "".join("k" if token < 7 else " " for token in inputs)
            found |= {len(run) for run in word.split()}
        return found

    assert sizes("train") == {1, 2, 3}
    assert sizes("test") == {3}


def test_facts_are_the_same_everywhere_and_one_to_one() -> None:
    assert sorted(FACTS.values()) == sorted(set(FACTS.values()))
    assert set(FACTS.values()) <= set(range(127, 255))
    assert (Memorization(facts=1).values() != Memorization().values()).any()


# --- seeds ---


@pytest.mark.parametrize("task", TASKS)
def test_a_draw_depends_on_its_arguments_alone(task: type[SyntheticTask]) -> None:
    np.random.seed(0)
    first = task().draw(8, 7, "train", 2)
    np.random.seed(1)
    np.random.random(5)
    for left, right in zip(first, task().draw(8, 7, "train", 2)):
        assert (left == right).all()


@pytest.mark.parametrize("task", TASKS)
def test_splits_parts_and_seeds_share_no_example(task: type[SyntheticTask]) -> None:
    keys = [(0, "train", 0), (0, "train", 1), (0, "test", 0), (1, "train", 0), (1, "test", 0)]
    drawn = [{tuple(row) for row in task().draw(100, s, split, part).inputs.tolist()} for s, split, part in keys]
    assert len(set().union(*drawn)) == sum(map(len, drawn)) == 500


DIGESTS = {
    InContextRecall: "87c119f926811420",
    NoisyRecall: "f15352215445e4a7",
    FuzzyRecall: "8d4c0392f131dfd5",
    AssociativeRecall: "fa8e13404bee8739",
    Memorization: "1e3f34d69eda938a",
    Compression: "c9c3d82966cef1d1",
    SelectiveCopying: "7fb0d66d027e27fc",
}


@pytest.mark.parametrize("task", TASKS)
def test_draws_never_change(task: type[SyntheticTask]) -> None:
    """Results of years apart are comparable only if the data of a seed stay the same."""
    examples = task().draw(16, 12, "test", 3)
    text = str([array.tolist() for array in examples])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGESTS[task]


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "count is impossible: got 0"),
        ((2.0, 0), "count is impossible: got 2.0"),
        ((True, 0), "count is impossible: got True"),
        ((1, -1), "seed is impossible: got -1"),
        ((1, 0, "valid"), "unknown split: got 'valid'"),
        ((1, 0, "test", -2), "part is impossible: got -2"),
    ],
)
def test_impossible_draws(arguments, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Compression().draw(*arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InContextRecall(vocab_size=3), "InContextRecall.vocab_size is impossible: got 3"),
        (lambda: InContextRecall(length=127), "InContextRecall.length is impossible: got 127"),
        (lambda: NoisyRecall(vocab_size=18), "NoisyRecall.vocab_size is impossible: got 18"),
        (lambda: NoisyRecall(noise=1.0), "NoisyRecall.noise is impossible: got 1.0"),
        (lambda: NoisyRecall(noise_tokens=0), "NoisyRecall.noise_tokens is impossible: got 0"),
        (lambda: FuzzyRecall(motif=8), "FuzzyRecall.motif is impossible: got 8; expected 1 to 7"),
        (lambda: FuzzyRecall(length=11), "FuzzyRecall.length is impossible: got 11"),
        (lambda: AssociativeRecall(vocab_size=5), "AssociativeRecall.vocab_size is impossible: got 5"),
        (lambda: AssociativeRecall(length=9), "AssociativeRecall.length is impossible: got 9"),
        (lambda: Memorization(vocab_size=4), "Memorization.vocab_size is impossible: got 4"),
        (lambda: Memorization(length=3), "Memorization.length is impossible: got 3"),
        (lambda: Compression(vocab_size=2), "Compression.vocab_size is impossible: got 2"),
        (lambda: Compression(length=1), "Compression.length is impossible: got 1"),
        (lambda: SelectiveCopying(copied=0), "SelectiveCopying.copied is impossible: got 0"),
        (lambda: SelectiveCopying(length=32), "SelectiveCopying.length is impossible: got 32; expected >= 33"),
        (lambda: SelectiveCopying(vocab_size=3), "SelectiveCopying.vocab_size is impossible: got 3"),
    ],
)
def test_impossible_tasks(make: Callable[[], SyntheticTask], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
