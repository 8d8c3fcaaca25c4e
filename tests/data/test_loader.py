import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crocuta.data.loader import WindowLoader
from crocuta.data.prepare import tokenize
from crocuta.data.text import Document
from crocuta.data.windows import TokenSource
from crocuta.errors import InputError
from crocuta.tokenizers.dna import DNATokenizer

SHAPES = st.tuples(st.integers(2, 80), st.integers(1, 20), st.integers(1, 9)).filter(lambda s: s[0] > s[1])
SEEDS = st.integers(0, 2**64 - 1)


def numbered(total):
    return TokenSource.from_array(np.arange(total, dtype=np.int32))


def rows(loader, first, count):
    """The windows of samples first ... first+count-1, counted across batches, each with its last target."""
    steps = range(first // loader.batch_size, -(-(first + count) // loader.batch_size))
    batches = [loader.batch(step) for step in steps]
    whole = [np.concatenate([x, y[:, -1:]], axis=1) for x, y in batches]
    skip = first - steps.start * loader.batch_size
    return np.concatenate(whole)[skip : skip + count]


@given(SHAPES, SEEDS)
def test_targets_are_the_inputs_one_place_on(shape, seed):
    total, length, batch = shape
    inputs, targets = WindowLoader(numbered(total), length, batch, seed).batch(3)
    assert inputs.shape == targets.shape == (batch, length)
    assert inputs.dtype == targets.dtype == np.int64
    assert (targets[:, :-1] == inputs[:, 1:]).all()
    assert (targets == (inputs + 1) % total).all()  # tokens are their places, on a ring


@given(SHAPES, SEEDS, st.integers(0, 4))
def test_each_epoch_shows_each_of_its_windows_once(shape, seed, epoch):
    total, length, batch = shape
    loader = WindowLoader(numbered(total), length, batch, seed)
    n = loader.windows_per_epoch
    assert n == total // length
    seen = rows(loader, epoch * n, n)
    assert len(np.unique(seen[:, :-1])) == n * length  # no place twice, and less than one window missing


@given(SHAPES, SEEDS, st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_batches_are_a_pure_function_of_seed_and_step(shape, seed, steps):
    total, length, batch = shape
    shuffled = WindowLoader(numbered(total), length, batch, seed)
    in_any_order = [shuffled.batch(step) for step in steps]
    sequential = WindowLoader(numbered(total), length, batch, seed)
    in_order = [sequential.batch(step) for step in range(max(steps) + 1)]
    for step, (inputs, targets) in zip(steps, in_any_order):
        fresh = WindowLoader(numbered(total), length, batch, seed).batch(step)
        assert (inputs == in_order[step][0]).all()
        assert (targets == in_order[step][1]).all()
        assert (inputs == fresh[0]).all()


def test_order_phase_and_seed_differ():
    loader = WindowLoader(numbered(10_000), 10, 1, seed=1)
    n = loader.windows_per_epoch
    first, second = rows(loader, 0, n)[:, 0], rows(loader, n, n)[:, 0]
    other = rows(WindowLoader(numbered(10_000), 10, 1, seed=2), 0, n)[:, 0]
    for a, b in ((first, second), (first, other)):
        assert (a != b).mean() > 0.9
    assert (np.diff(first) != 10).mean() > 0.9  # not in order
    phases = {int(rows(loader, epoch * n, 1)[0, 0]) % 10 for epoch in range(40)}
    assert len(phases) > 5


def test_every_place_is_shown_equally_often():
    loader = WindowLoader(numbered(103), 10, 10, seed=3)
    counts = np.zeros(103, int)
    for step in range(400):
        np.add.at(counts, loader.batch(step)[0].ravel(), 1)
    expected = 400 * 100 / 103
    assert abs(counts - expected).max() < 30  # a place left out systematically would be 0 or far off


def test_batches_do_not_change_between_versions():
    # Checkpoints of running trainings depend on it; the figure was taken when the loader was written.
    loader = WindowLoader(numbered(1000), 16, 4, seed=5)
    digest = hashlib.sha256(b"".join(loader.batch(step)[0].tobytes() for step in range(50))).hexdigest()
    assert digest == "470ed42dd1fc8a275da5d519bf6dc7454bc6f5b086a6145514c7f68ca2a53d9b"


def dna(text):
    tokenizer = DNATokenizer()
    return tokenize([Document("1", text)], tokenizer, append_eos=False), tokenizer


def test_reverse_complement_turns_about_half_of_the_rows_and_nothing_else():
    source, tokenizer = dna("AACAGATCCCGGTNACCATTTG" * 60)
    plain = WindowLoader(source, 11, 8, seed=4)
    both = WindowLoader(source, 11, 8, seed=4, reverse_complement=True, complement_ids=tokenizer.complement_ids)
    forward, either = rows(plain, 0, 360), rows(both, 0, 360)
    turned = tokenizer.complement_ids[forward[:, ::-1]]
    same, flipped = (either == forward).all(axis=1), (either == turned).all(axis=1)
    assert (same | flipped).all()
    assert 0.4 < flipped.mean() < 0.6
    epochs = flipped.reshape(3, 120)
    assert (epochs[0] != epochs[1]).any()


def test_reverse_complement_is_independent_of_the_place():
    source, tokenizer = dna("ACGGT" * 13)
    both = WindowLoader(source, 5, 13, seed=4, reverse_complement=True, complement_ids=tokenizer.complement_ids)
    flips = np.array([[both._plan(e).flips[both._plan(e).order == i][0] for i in range(13)] for e in range(200)])
    assert (abs(flips.mean(axis=0) - 0.5) < 0.15).all()


def test_mapped_token_files_feed_the_loader(tmp_path):
    from crocuta.data.prepare import prepare_documents
    from crocuta.tokenizers.bytes import ByteTokenizer

    documents = [Document("1", "the cat sat on the mat"), Document("2", "and the dog did not")]
    prepare_documents(documents, ByteTokenizer(), tmp_path / "x")
    mapped = WindowLoader(TokenSource.open(tmp_path / "x"), 7, 3, seed=0)
    memory = WindowLoader(tokenize(documents, ByteTokenizer()), 7, 3, seed=0)
    for step in range(9):
        assert (mapped.batch(step)[1] == memory.batch(step)[1]).all()


def test_a_stream_of_billions_needs_no_copy():
    # One small array repeated by its stride: 4 billion tokens in 8 bytes.
    huge = np.lib.stride_tricks.as_strided(np.array([7], np.int64), (4_000_000_000,), (0,), writeable=False)
    loader = WindowLoader(TokenSource.from_array(huge), 40_000, 2, seed=0)
    inputs, _ = loader.batch(10**9)
    assert loader.windows_per_epoch == 100_000
    assert (inputs == 7).all()


def test_epoch_counts_passes():
    loader = WindowLoader(numbered(100), 10, 4, seed=0)
    assert [loader.epoch(step) for step in (0, 5, 10)] == [0, 2, 4]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"length": 0}, "length is impossible"),
        ({"batch_size": 0}, "batch_size is impossible"),
        ({"seed": -1}, "seed is impossible"),
        ({"seed": 2**64}, "seed is impossible"),
        ({"length": 100}, "shorter than one window: got 100 tokens; expected at least 101"),
        ({"reverse_complement": True}, "needs complement_ids"),
    ],
)
def test_impossible_arguments(options, reason):
    with pytest.raises(InputError, match=reason):
        WindowLoader(numbered(100), **({"length": 10, "batch_size": 2, "seed": 0} | options))


def test_steps_begin_at_zero():
    with pytest.raises(InputError, match="no such step"):
        WindowLoader(numbered(100), 10, 2, 0).batch(-1)
