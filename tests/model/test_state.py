"""States as things: copied, selected, written, counted and saved; what does not fit is refused and named."""

from __future__ import annotations

import pytest
import torch
from tiny_models import KINDS, random_ids, tiny_model

from crocuta.errors import StateError
from crocuta.model.state import ModelState


@torch.no_grad()
def read(kind: str, *lengths: int, max_length: int = 60) -> ModelState:
    """A state whose rows have read so many tokens, each its own."""
    model = tiny_model(kind, seed=1)
    state = model.init_state(len(lengths), max_length)
    model.extend(random_ids(len(lengths), max(lengths), seed=2), state, torch.tensor(lengths))
    return state


def rows_of(state: ModelState) -> list[list[torch.Tensor]]:
    return [[tensor[row] for _, tensor in state.named_tensors()] for row in range(state.batch)]


def same(row: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, row, other))


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_batch_first(kind):
    state = read(kind, 5, 9, 2)
    assert state.batch == 3
    assert all(tensor.shape[0] == 3 for _, tensor in state.named_tensors())
    assert len({name for name, _ in state.named_tensors()}) == len(list(state.named_tensors()))


@pytest.mark.parametrize("kind", KINDS)
def test_select_takes_rows_in_order_and_more_than_once(kind):
    state = read(kind, 5, 9, 2)
    rows, chosen = rows_of(state), rows_of(state.select([2, 0, 2, 1]))
    assert [same(chosen[i], rows[j]) for i, j in enumerate([2, 0, 2, 1])] == [True] * 4
    assert not same(rows[0], rows[2])
    assert state.select(torch.tensor([1])).lengths.tolist() == [9]


@pytest.mark.parametrize("kind", KINDS)
def test_write_replaces_the_given_rows_alone(kind):
    state, source = read(kind, 5, 9, 2, 4), read(kind, 7, 3)
    before, given = rows_of(state.copy()), rows_of(source)
    state.write([3, 1], source)
    after = rows_of(state)
    assert same(after[3], given[0])
    assert same(after[1], given[1])
    assert same(after[0], before[0])
    assert same(after[2], before[2])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_shared_with_a_copy_a_selection_or_a_source(kind):
    state = read(kind, 5, 9)
    target = read(kind, 4, 4, 4)
    target.write([0, 1], state)
    others = [state.copy(), state.select([0, 1]), target]
    before = [rows_of(other.copy()) for other in others]
    for _, tensor in state.named_tensors():
        tensor.fill_(7)
    for other, rows in zip(others, before, strict=True):
        assert all(map(same, rows_of(other), rows))


@pytest.mark.parametrize("rows", [[3], [-1], [[0]], [0, 5]])
def test_rows_that_do_not_exist(rows):
    state = read("stripe", 5, 9, 2)
    with pytest.raises(StateError, match=r"no such rows in the state: got .* expected a list of numbers from 0 to 2"):
        state.select(rows)
    with pytest.raises(StateError, match="no such rows in the state"):
        state.write(rows, state)


@pytest.mark.parametrize("rows", [[0, 0], [0], [0, 1, 2]])
def test_rows_to_write_are_distinct_and_as_many_as_given(rows):
    with pytest.raises(StateError, match="rows to write must be distinct and as many as the source has: got rows"):
        read("stripe", 5, 9, 2).write(rows, read("stripe", 5, 9))


def test_a_source_of_another_length_is_refused_whole():
    state = read("stripe", 5, 9)
    before = rows_of(state.copy())
    with pytest.raises(
        StateError, match=r"states differ in 'layers.1.keys': got \(61, .*\); expected \(60, .*\); make"
    ):
        state.write([0], read("stripe", 3, max_length=61))
    assert all(map(same, rows_of(state), before))


@pytest.mark.parametrize(
    ("kind", "other"), [("stripe", "attention"), ("real-stable", "real-raw"), ("explicit", "implicit")]
)
def test_a_source_of_another_model_is_refused(kind, other):
    with pytest.raises(StateError, match="belong to another model; make both states with the same model"):
        read(kind, 5, 9).write([0], read(other, 3))


# --- files ---


@pytest.mark.parametrize("other", ["attention", "real-raw", "complex-raw"])
def test_a_saved_state_of_another_model(tmp_path, other):
    path = tmp_path / "state.safetensors"
    read("real-stable", 5).save(path)
    with pytest.raises(StateError, match=r"state.safetensors belongs to a model with another configuration"):
        tiny_model(other).load_state(path)


@pytest.mark.parametrize("content", [None, b"", b"junk", b"\x08\0\0\0\0\0\0\0{}      "])
def test_files_that_are_no_states(tmp_path, content):
    path = tmp_path / "state.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        StateError, match=r"state.safetensors is not a saved state: .* expected a file written by"
    ) as failure:
        tiny_model("stripe").load_state(path)
    assert "\n" not in str(failure.value)


def test_a_state_that_was_cut_off(tmp_path):
    path = tmp_path / "state.safetensors"
    read("stripe", 5).save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(StateError, match=r"state.safetensors is not a saved state"):
        tiny_model("stripe").load_state(path)
