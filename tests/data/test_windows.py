from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crocuta.data.megatron import write_megatron
from crocuta.data.windows import TokenSource, held_out_windows, split
from crocuta.errors import InputError, TokenizerError
from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.dna import DNATokenizer

LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=12).filter(any)


def offsets_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)])


def numbered(lengths):
    """A source whose token i is i, in documents of these lengths: a token tells where it came from."""
    return TokenSource.from_array(np.arange(sum(lengths)), offsets_of(lengths))


def tokens_of(source):
    return source.read(0, len(source)).tolist()


def documents_of(source):
    bounds = source.document_offsets
    return [source.read(int(a), int(b - a)).tolist() for a, b in pairwise(bounds)]


def pieced(lengths, num_pieces):
    """As ``numbered``, but laid over several arrays of several types with dead tokens around them."""
    total = sum(lengths)
    cuts = np.unique(np.linspace(0, total, num_pieces + 1).astype(int))
    arrays, segments = [], []
    for number, (a, b) in enumerate(pairwise(cuts)):
        dtype = (np.uint8, np.uint16, np.int32)[number % 3]
        arrays.append(np.concatenate([[99], np.arange(a, b), [99, 99]]).astype(dtype))
        segments.append([number, 1, 1 + b - a])
    return TokenSource(arrays, np.array(segments), offsets_of(lengths))


@given(LENGTHS, st.integers(1, 5), st.data())
def test_reading_does_not_see_the_pieces(lengths, num_pieces, data):
    source, total = pieced(lengths, num_pieces), sum(lengths)
    start = data.draw(st.integers(0, total))
    length = data.draw(st.integers(0, total - start))
    out = source.read(start, length)
    assert out.dtype == np.int64
    assert out.tolist() == list(range(start, start + length))


@given(LENGTHS, st.integers(1, 5), st.data())
def test_slices_are_views_with_their_documents(lengths, num_pieces, data):
    source, total = pieced(lengths, num_pieces), sum(lengths)
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    view = source.slice(start, stop)
    assert tokens_of(view) == list(range(start, stop))
    whole = [[t for t in document if start <= t < stop] for document in documents_of(numbered(lengths))]
    assert [document for document in documents_of(view) if document] == [document for document in whole if document]
    middle = (start + stop) // 2
    if start < middle:
        assert tokens_of(view.slice(0, middle - start)) == list(range(start, middle))


@given(LENGTHS, st.integers(1, 5), st.data())
def test_selected_documents_are_those(lengths, num_pieces, data):
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    source = pieced(lengths, num_pieces)
    expected = [document for document, kept in zip(documents_of(source), keep) if kept]
    if not any(expected):
        with pytest.raises(InputError, match="no tokens"):
            source.select_documents(keep)
        return
    view = source.select_documents(keep)
    assert documents_of(view) == expected
    assert tokens_of(view) == list(chain(*expected))


def test_token_files_follow_one_another(tmp_path):
    for name, documents in (("a", [[1, 2], [3]]), ("b", [[4], [], [5, 6]])):
        with write_megatron(tmp_path / name, ByteTokenizer()) as writer:
            for document in documents:
                writer.append(np.array(document, np.int64))
                writer.end_document()
    source = TokenSource.open([tmp_path / "a", tmp_path / "b"], ByteTokenizer())
    assert tokens_of(source) == [1, 2, 3, 4, 5, 6]
    assert documents_of(source) == [[1, 2], [3], [4], [], [5, 6]]
    assert tokens_of(TokenSource.open(tmp_path / "b")) == [4, 5, 6]
    with pytest.raises(TokenizerError, match="another tokenizer"):
        TokenSource.open([tmp_path / "a"], DNATokenizer())
    with pytest.raises(InputError, match="no token files"):
        TokenSource.open([])


@given(LENGTHS.filter(lambda lengths: sum(lengths) > 1), st.floats(0.001, 0.999))
def test_split_by_position_cuts_once(lengths, fraction):
    train, held_out = split(numbered(lengths), fraction)
    assert tokens_of(train) + tokens_of(held_out) == list(range(sum(lengths)))
    assert abs(len(held_out) - fraction * sum(lengths)) <= 1


@given(LENGTHS, st.floats(0.001, 0.999), st.integers(0, 2**64 - 1))
def test_split_by_record_shares_no_token_and_loses_none(lengths, fraction, seed):
    source = numbered(lengths)
    if sum(length > 0 for length in lengths) < 2:
        with pytest.raises(InputError, match="split by position"):
            split(source, fraction, "record", seed=seed)
        return
    train, held_out = split(source, fraction, "record", seed=seed)
    assert tokens_of(train)
    assert tokens_of(held_out)
    assert sorted(tokens_of(train) + tokens_of(held_out)) == list(range(sum(lengths)))
    documents = documents_of(source)
    assert all(document in documents for view in (train, held_out) for document in documents_of(view))


def test_split_by_record_is_a_function_of_seed_and_index():
    few, many = numbered([2] * 500), numbered([2] * 1000)
    held_few, held_many = (set(tokens_of(split(source, 0.2, "record", seed=7)[1])) for source in (few, many))
    assert held_few == {token for token in held_many if token < 1000}
    other = set(tokens_of(split(few, 0.2, "record", seed=8)[1]))
    assert held_few != other
    assert 0.15 < len(held_many) / 2000 < 0.25
    assert len(held_few & other) / 1000 < 0.08  # 0.04 expected of independent choices


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_impossible_fractions(fraction):
    with pytest.raises(InputError, match="fraction"):
        split(numbered([9]), fraction)


def test_impossible_splits():
    with pytest.raises(InputError, match="'position' or 'record'"):
        split(numbered([9]), 0.5, "date")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="too few tokens"):
        split(numbered([1]), 0.5)


@st.composite
def window_shapes(draw):
    length = draw(st.integers(1, 70))
    return draw(st.integers(2, 90)), length, draw(st.integers(0, length - 1)), draw(st.integers(1, 4))


@given(window_shapes())
def test_held_out_windows_cover_every_target_once(shape):
    total, length, context, num_pieces = shape
    inputs, targets, mask = held_out_windows(pieced([total], num_pieces), length, context)
    assert inputs.shape == targets.shape == mask.shape
    assert inputs.shape[1] == length
    assert targets[mask].tolist() == list(range(1, total))
    assert (targets[mask] == inputs[mask] + 1).all()
    assert mask.any(axis=1).all()  # no row for nothing


@given(window_shapes())
def test_held_out_windows_hold_the_stream_and_nothing_after_it(shape):
    total, length, context, num_pieces = shape
    inputs, targets, _ = held_out_windows(pieced([total], num_pieces), length, context)
    place = (length - context) * np.arange(len(inputs))[:, None] + np.arange(length)
    assert (inputs == np.where(place < total - 1, place, 0)).all()
    assert (targets == np.where(place < total - 1, place + 1, 0)).all()


@given(window_shapes())
def test_every_target_but_those_of_the_first_row_has_its_context(shape):
    total, length, context, num_pieces = shape
    _, _, mask = held_out_windows(pieced([total], num_pieces), length, context)
    assert not mask[1:, :context].any()


@pytest.mark.parametrize(("total", "length", "context"), [(1, 4, 0), (5, 0, 0), (5, 4, 4), (5, 4, -1)])
def test_impossible_windows(total, length, context):
    with pytest.raises(InputError, match="cannot cut"):
        held_out_windows(numbered([total]), length, context)


def test_ids_of_foreign_files_can_be_checked():
    source = pieced([50], 3)
    source.check_ids(50)
    with pytest.raises(TokenizerError, match="got 49; expected 0 to 48"):
        source.check_ids(49)
    with pytest.raises(TokenizerError, match="got -1"):
        TokenSource.from_array(np.array([0, -1, 2])).check_ids(9)


@pytest.mark.parametrize("tokens", [np.zeros(0, np.int64), np.zeros((2, 2), np.int64), np.zeros(3)])
def test_arrays_that_are_no_tokens(tokens):
    with pytest.raises(InputError, match="one row of integers"):
        TokenSource.from_array(tokens)


def test_reading_outside_is_refused():
    source = numbered([5])
    for start, length in ((-1, 2), (4, 2), (6, 0), (2, -1)):
        with pytest.raises(InputError, match="outside the stream"):
            source.read(start, length)
    for start, stop in ((0, 6), (3, 3), (-1, 2)):
        with pytest.raises(InputError, match="cannot cut"):
            source.slice(start, stop)
    with pytest.raises(InputError, match="rise from 0"):
        TokenSource.from_array(np.arange(5), np.array([0, 4]))
