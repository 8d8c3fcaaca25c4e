"""States as things: copied, selected, written, counted and saved; what does not fit is refused and named."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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


def test_what_was_loaded_is_not_the_file(tmp_path):
    """The file may be written anew, or cut short, while the state is in use."""
    path = tmp_path / "state.safetensors"
    state = read("stripe", 5, 9)
    state.save(path)
    loaded = tiny_model("stripe").load_state(path)
    path.write_bytes(bytes(100))
    assert all(map(same, rows_of(loaded), rows_of(state)))


def saved_with(path, change) -> None:
    """Rewrite a saved state after ``change`` of its tensors and metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.update(max_length="9999999999999"), "belongs to another model, batch or max_length"),
        (lambda t, m: m.update(max_length="-3"), "is not a saved state: got max_length=-3"),
        (lambda t, m: m.update(max_length='"many"'), "is not a saved state: got max_length=many"),
        (lambda t, m: m.update(max_length="{"), "is not a saved state"),
        (lambda t, m: m.pop("model"), "is not a saved state"),
        (lambda t, m: t.pop("lengths"), "is damaged: got no row of lengths"),
        (lambda t, m: t.update(lengths=torch.tensor(3)), "is damaged: got no row of lengths"),
        (lambda t, m: t.update(lengths=torch.tensor([3, 4, 5])), "belongs to another model, batch or max_length"),
        (lambda t, m: t["layers.1.lengths"].fill_(-1), r"is damaged: got layers.1.lengths of \[-1, -1\]"),
        (lambda t, m: t["layers.1.lengths"].fill_(50), r"is damaged: got layers.1.lengths of \[50, 50\]"),
        (lambda t, m: t["lengths"].fill_(61), r"is damaged: got 61 tokens; expected at most 60"),
    ],
)
def test_a_damaged_state_is_refused_and_allocates_nothing(tmp_path, change, message):
    path = tmp_path / "state.safetensors"
    read("stripe", 5, 9).save(path)
    saved_with(path, change)
    with pytest.raises(StateError, match=message):
        tiny_model("stripe").load_state(path)


def test_a_state_that_cannot_be_written(tmp_path):
    with pytest.raises(StateError, match="cannot write the state"):
        read("stripe", 5).save(tmp_path / "no" / "such" / "folder")
    with pytest.raises(StateError, match=r"nothing to save in .*: got a state without rows"):
        read("stripe", 5).without([0]).save(tmp_path / "state.safetensors")


# --- rows that come and go ---


@pytest.mark.parametrize("kind", KINDS)
def test_join_puts_the_rows_of_others_at_the_end(kind):
    state, other, last = read(kind, 5, 9), read(kind, 7), read(kind, 2, 3)
    joined = state.join([other, last])
    assert joined.lengths.tolist() == [5, 9, 7, 2, 3]
    expected = rows_of(state) + rows_of(other) + rows_of(last)
    assert all(map(same, rows_of(joined), expected))
    for _, tensor in joined.named_tensors():
        tensor.fill_(7)
    assert state.lengths.tolist() == [5, 9], "the joined state shares memory with the first"
    assert state.join([]).lengths.tolist() == [5, 9]


@pytest.mark.parametrize("kind", KINDS)
def test_without_leaves_the_others_in_order(kind):
    state = read(kind, 5, 9, 2, 4)
    assert state.without([2, 0]).lengths.tolist() == [9, 4]
    assert all(map(same, rows_of(state.without([1])), [rows_of(state)[i] for i in (0, 2, 3)]))
    empty = state.without([0, 1, 2, 3])
    assert empty.batch == 0
    assert empty.join([read(kind, 6)]).lengths.tolist() == [6]
    with pytest.raises(StateError, match="no such rows in the state"):
        state.without([4])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: read("attention", 3), "belong to another model"),
        (lambda: read("stripe", 3, max_length=61), "states differ in 'layers.1.keys'"),
    ],
)
def test_rows_that_do_not_fit_are_not_joined(other, message):
    with pytest.raises(StateError, match=message):
        read("stripe", 5).join([read("stripe", 4), other()])


def test_rows_of_another_max_length_do_not_fit_even_where_nothing_has_its_size():
    for verb in (lambda a, b: a.join([b]), lambda a, b: a.write([0], b)):
        with pytest.raises(StateError, match=r"differ in max_length: got 61; expected 60; use model\.with_room"):
            verb(read("complex-raw", 5), read("complex-raw", 5, max_length=61))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("read", "before", "after"), [(33, 33, 150), (33, 70, 71), (33, 150, 40), (140, 150, 300)])
def test_a_state_with_other_room_goes_on_as_before(kind, read, before, after):
    model = tiny_model(kind, torch.float64, seed=1)
    after = min(after, model.config.max_length or after)
    ids = random_ids(2, after, seed=2)
    state = model.init_state(2, before)
    model.extend(ids[:, :read], state, torch.tensor([read, 20]))
    moved = model.with_room(state, after)
    assert moved.max_length == after
    assert moved.lengths.tolist() == state.lengths.tolist() == [read, 20]
    logits = model.extend(ids[:, read:], moved)
    torch.testing.assert_close(logits[0], model(ids[:1])[0, read:], rtol=0, atol=1e-9)
    whole = torch.cat([ids[1:, :20], ids[1:, read:]], dim=1)
    torch.testing.assert_close(logits[1], model(whole)[0, 20:], rtol=0, atol=1e-9)


def test_room_that_is_too_small_or_another_model_s():
    model = tiny_model("stripe", seed=1)
    state = read("stripe", 5, 9)
    with pytest.raises(StateError, match="longer than the new state: got 9 tokens; expected at most 8"):
        model.with_room(state, 8)
    with pytest.raises(StateError, match="the state belongs to a model with another configuration"):
        tiny_model("attention").with_room(state, 20)


# --- where a state is not finite ---


@pytest.mark.parametrize(
    ("kind", "tensor", "name"),
    [
        ("complex-raw", lambda layer: layer.long.modes, "long.modes"),
        ("explicit", lambda layer: layer.long.tail, "long.tail"),
        ("real-stable", lambda layer: layer.short.tail, "short.tail"),
        ("attention", lambda layer: layer.keys, "keys"),
        ("attention-gqa", lambda layer: layer.values, "values"),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_named(kind, tensor, name, value):
    state = read(kind, 5, 9, 2)
    assert state.non_finite() == []
    tensor(state.layers[1])[2, 0] = value
    assert state.non_finite() == [f"block 1, {name}, row 2"]
    tensor(state.layers[0])[0, 0] = value
    assert state.non_finite([7, 8, 9]) == [f"block 0, {name}, row 7", f"block 1, {name}, row 9"]


def test_what_lies_past_a_row_s_end_is_no_part_of_it():
    state = read("attention", 5, 9)
    state.layers[0].keys[0, 5:] = torch.nan
    assert state.non_finite() == []
    state.layers[0].keys[1, 8] = torch.nan
    assert state.non_finite() == ["block 0, keys, row 1"]
