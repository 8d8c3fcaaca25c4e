"""Pickles are read as the data they stand for, by our own machine, and what it does not know is refused by name."""

import argparse
import collections
import datetime
import fractions
import io
import pathlib
import pickle
import typing

import numpy as np
import pytest
import torch
from forged_archives import named, number, tensor, text
from hypothesis import given
from hypothesis import strategies as st

from crocuta.checkpoints.torch_save import unpickle
from crocuta.checkpoints.torch_save.names import MAX_OPERATIONS, Opaque, Storage, TensorRef, Toolbox, storage_of
from crocuta.checkpoints.torch_save.unpickle import MAX_DEPTH, parse_pickle, parse_pickle_at
from crocuta.errors import WeightsFormatError

PROTOCOLS = range(6)
integers = st.integers(-(1 << 500), 1 << 500)
plain = st.none() | st.booleans() | st.integers() | integers | st.floats(allow_nan=False) | st.text() | st.binary()
keys = (
    st.text() | st.integers(-(1 << 63), 1 << 63) | st.booleans() | st.none() | st.tuples(st.text(), st.integers(0, 9))
)
values = st.recursive(
    plain | st.complex_numbers(allow_nan=False) | st.sets(keys),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(keys, inner) | st.tuples(),
    max_leaves=20,
)


@given(values, st.sampled_from(PROTOCOLS))
def test_plain_values_come_back(value, protocol):
    found = parse_pickle(pickle.dumps(value, protocol))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (collections.OrderedDict(b=1, a=[2]), {"b": 1, "a": [2]}),
        (collections.defaultdict(list, x=[1]), {"x": [1]}),
        (collections.defaultdict(int), {}),
        (collections.Counter("hyena"), {"h": 1, "y": 1, "e": 1, "n": 1, "a": 1}),
        (frozenset({1, 2}), {1, 2}),
        (bytearray(b"a\xff"), b"a\xff"),
        (bytearray(), b""),
        (torch.float32, torch.float32),
        (torch.float8_e4m3fn, torch.float8_e4m3fn),
        (torch.Size([2, 3]), (2, 3)),
        (torch.device("cuda:1"), "cuda:1"),
        (torch.device("cpu"), "cpu"),
        (np.float64(1.5), 1.5),
        (np.int32(-7), -7),
        (np.bool_(True), True),
        ("x" * 70_000, "x" * 70_000),
        (b"x" * 70_000, b"x" * 70_000),
        (list(range(3000)), list(range(3000))),
    ],
)
def test_values_of_the_table_come_back(value, expected, protocol):
    found = parse_pickle(pickle.dumps(value, protocol))
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_in_memory_become_bytes_wherever_they_are_met(protocol):
    file = io.BytesIO(b"ab\xff")
    file.seek(2)
    assert parse_pickle(pickle.dumps([file, {"again": file}, io.BytesIO()], protocol)) == [
        b"ab\xff", {"again": b"ab\xff"}, b""
    ]  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("code", ["?", "i1", "u2", "i4", "u8", "f2", "f4", "f8", "c8", "c16"])
def test_numpy_arrays_come_back(code, protocol):
    numbers = np.arange(24).reshape(2, 3, 4).astype(code)
    arrays = [numbers, np.asfortranarray(numbers), numbers[:, ::2], numbers[:0], numbers[1:, 0, 0].reshape(())]
    found = parse_pickle(pickle.dumps([*arrays, numbers], protocol))
    for array, expected in zip(found, [*arrays, numbers]):
        assert array.dtype == expected.dtype
        assert np.array_equal(array, expected)
        assert array.shape == expected.shape


def test_numpy_arrays_of_other_kinds_are_kept_as_names():
    found = parse_pickle(pickle.dumps([np.array(["ab"]), np.array([1, "x"], dtype=object), np.str_("x")]))
    assert all(isinstance(item, Opaque) for item in found)
    with pytest.raises(WeightsFormatError, match="a little-endian NumPy dtype"):
        parse_pickle(pickle.dumps(np.zeros(3, dtype=">f4")))


def test_numpy_never_parses_a_type_of_the_file():
    """Such a type would take gigabytes for each number."""
    found = parse_pickle(b"\x80\x04" + named("numpy.dtype") + text("i4,(1000000000,)i4") + b"\x89\x88\x87RNb.")
    assert isinstance(found, Opaque)


def test_values_met_twice_are_one():
    shared = [1]
    found = parse_pickle(pickle.dumps({"a": shared, "b": (shared,)}))
    assert found["a"] is found["b"][0]


class WithState:
    """Stands in for the objects in training checkpoints: made, filled, appended to."""

    def __init__(self) -> None:
        self.content = {"_parent": None, "lr": 1e-3}


class WithItems(dict):  # type: ignore[type-arg]
    pass


class WithElements(list):  # type: ignore[type-arg]
    pass


INERT = [
    "transformer_engine_torch",
    "omegaconf.dictconfig",
    "pytorch_lightning.utilities.parsing",
    "lightning.fabric",
    "lightning_fabric.x",
]
INERT += ["transformer_engine.common.recipe", "torch.optim.lr_scheduler", "deepspeed.runtime", "savanna.arguments"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("module", INERT)
@pytest.mark.parametrize("kind", [WithState, WithItems, WithElements])
def test_objects_around_the_weights_become_names(monkeypatch, kind, module, protocol):
    value = kind()
    if kind is WithItems:
        value.update(a=1, b=2)
    if kind is WithElements:
        value.extend([1, 2, 3])
    data = pickle.dumps({"settings": [value, value, 1], "after": 2}, protocol)
    name = b"test_unpickle"
    if protocol < 4:
        data = data.replace(name, module.encode())
    else:
        data = data.replace(b"\x8c" + bytes([len(name)]) + name, b"\x8c" + bytes([len(module)]) + module.encode())
        data = data[:2] + data[11:] if data[2] == 0x95 else data  # without the frame, whose length is another now
    found = parse_pickle(data)
    assert found["after"] == 2
    settings = found["settings"]
    assert settings[0] is settings[1]
    assert isinstance(settings[0], Opaque)
    assert settings[0].name == f"{module}.{kind.__name__}"
    assert repr(settings[0]) == f"Opaque('{module}.{kind.__name__}')"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_namespaces_paths_and_types_become_names(protocol):
    value = [argparse.Namespace(lr=1, layers=[2]), pathlib.PurePosixPath("a/b"), typing.Any, range(3), slice(1, 2)]
    union = typing.Union[typing.List[int], dict[str, int], None]  # noqa: UP006, UP007
    found = parse_pickle(pickle.dumps([*value, union], protocol))
    assert all(isinstance(item, Opaque) for item in found)
    homes = [item.name.split(".")[0] for item in found]
    assert homes == ["argparse", "pathlib", "typing", "builtins", "builtins", "typing"]


@pytest.mark.parametrize(
    "name", ["omegaconfig.X", "typing_extensions.Any", "torch.optimizer.X", ".typing", "Typing.Any"]
)
def test_names_that_only_look_alike_are_refused(name):
    with pytest.raises(WeightsFormatError, match="it names"):
        parse_pickle(named(name) + b".")


def test_an_ordered_dictionary_of_python_2_comes_back():
    pairs = pickle.dumps([["b", 1], ["a", [2]]], 2)[2:-1]
    assert parse_pickle(b"\x80\x02" + named("collections.OrderedDict") + pairs + b"\x85R.") == {"b": 1, "a": [2]}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (datetime.date(2020, 1, 1), "datetime.date"),
        (fractions.Fraction(1, 2), "fractions.Fraction"),
        (print, "builtins.print"),
        (WithState(), "test_unpickle.WithState"),
        (torch.nn.Linear, "torch.nn.modules.linear.Linear"),
        (torch.strided, "torch.serialization._get_layout"),
    ],
)
def test_other_names_are_refused_and_named(value, name, protocol):
    with pytest.raises(
        WeightsFormatError, match=f"^model.pt: it names {name}, which no weights file needs: nothing was"
    ):
        parse_pickle(pickle.dumps(value, protocol), where="model.pt")


CALLS = {
    "a float called": named("builtins.float") + b"X\1\0\0\x001\x85R",
    "arguments in a list": named("collections.OrderedDict") + b"]R",
    "too many arguments": named("collections.OrderedDict") + b"))\x86R",
    "a dictionary of a number": named("collections.OrderedDict") + b"K\1\x85R",
    "a dictionary of numbers": named("collections.OrderedDict") + b"]K\1a\x85R",
    "the type of a value": named("builtins.type") + b"]\x85R",
    "an item of a value": named("_operator.getitem") + b"]K\0\x86R",
    "too few arguments": named("_codecs.encode") + b")R",
    "another codec": named("_codecs.encode") + text("abc") + text("rot13") + b"\x86R",
    "text beyond latin-1": named("_codecs.encode") + text("\u0100") + text("latin1") + b"\x86R",
    "a bytearray of a size": named("builtins.bytearray") + number(1 << 40) + b"\x85R",
    "bytes of a size": named("builtins.bytes") + number(1 << 40) + b"\x85R",
    "a list of a name": named("builtins.list") + named("builtins.list") + b"\x85R",
    "a set of lists": named("builtins.set") + b"](]]e\x85R",
    "an object of a table's class": named("copyreg._reconstructor") + named("torch.Size") + b"NN\x87R",
    "a complex of texts": named("builtins.complex") + text("1") + text("2") + b"\x86R",
    "a NumPy type of a number": named("numpy.dtype") + b"K\1\x85R",
    "a NumPy array without bytes": named("numpy._core.multiarray.scalar") + named("numpy.ndarray") + b"N\x86R",
    "a BytesIO of text": named("_io.BytesIO") + text("abc") + b"\x85R",
    "a BytesIO of another state": named("_io.BytesIO") + b")\x81" + text("abc") + b"b",
    "a device of a list": named("torch.device") + b"]\x85R",
    "a shape of texts": named("torch.Size") + b"]" + text("1") + b"a\x85R",
    "a parameter of text": named("torch._utils._rebuild_parameter") + b"(" + text("x") + b"\x88NtR",
    "an item of a list": b"]K\1K\2s",
    "an element of a dictionary": b"}K\1a",
    "an odd dictionary": b"}(K\1u",
    "a dictionary as a key": b"}}K\1s",
    "a long tuple as a key": b"}(" + b"K\1" * 9 + b"tK\1s",
    "a huge number as a key": b"}" + number(1 << 100) + b"K\1s",
    "a name that is no text": b"K\1K\2\x93",
    "a persistent id": b"K\1Q",
    "a persistent id by text": b"Pabc\n",
    "the attributes of a number": b"K\1}b",
    "nothing on the stack": b"R",
    "nothing above the mark": b"K\1(\x85",
    "no mark": b"K\1t",
    "an unknown value": b"h\x05",
    "an unknown operation": b"\xff",
    "a second protocol": b"\x80\x02K\1",
    "a cut text": b"X\xff\0\0\0abc",
    "bad UTF-8": b"X\1\0\0\0\xff",
}


@pytest.mark.parametrize("case", CALLS)
def test_what_no_pickler_writes_is_refused(case):
    data = b"\x80\x04" + CALLS[case] + b"."
    with pytest.raises(WeightsFormatError, match=r"^x (is broken at byte \d+: |ends at)"):
        parse_pickle(data, where="x")


@pytest.mark.parametrize(
    "data", [b"", b".", b"\x80\x04", b"\x80\x04.", b"N", b"NN.", b"(N.", b"\x80\x06N.", b"\x80\x00N."]
)
def test_what_is_no_pickle_is_refused(data):
    with pytest.raises(WeightsFormatError, match="x is broken"):
        parse_pickle(data, where="x")


def test_bytes_after_the_end_are_refused_unless_they_are_asked_for():
    data = pickle.dumps([1]) + pickle.dumps({"b": 2}) + b"rest"
    with pytest.raises(WeightsFormatError, match="expected nothing after it"):
        parse_pickle(data)
    first, end = parse_pickle_at(data, 0)
    second, last = parse_pickle_at(data, end)
    assert (first, second, data[last:]) == ([1], {"b": 2}, b"rest")
    with pytest.raises(WeightsFormatError, match=f"at byte {last}"):
        parse_pickle_at(data, last)


# --- tensors ---


def stored(identity: typing.Any) -> Storage:
    return storage_of(identity)


def test_a_tensor_is_a_reference_that_has_been_checked():
    found = parse_pickle(b"\x80\x02" + tensor(count=20, offset=3, size=(2, 3), stride=(8, 2)) + b".", stored)
    assert found == TensorRef(torch.float32, (2, 3), (8, 2), 3, "0", 20)


LEGAL = [
    ((), ()),
    ((5,), (4,)),
    ((2, 3), (1, 2)),
    ((1, 4), (0, 1)),
    ((0, 4), (0, 0)),
    ((2, 2, 2), (12, 1, 5)),
    ((20,), (1,)),
]
ILLEGAL = [((2,), (0,)), ((2, 3), (1, 1)), ((21,), (1,)), ((6,), (4,)), ((3, 2), (2, 3)), ((2,), (20,))]


@pytest.mark.parametrize(("size", "stride"), LEGAL)
def test_views_inside_their_storage_are_accepted(size, stride):
    found = parse_pickle(b"\x80\x02" + tensor(count=20, size=size, stride=stride) + b".", stored)
    assert (found.shape, found.stride) == (size, stride)
    assert len({sum(i * s for i, s in zip(index, stride)) for index in np.ndindex(size)}) == np.prod(size)


@pytest.mark.parametrize(("size", "stride"), ILLEGAL)
def test_views_that_overlap_or_reach_out_are_refused(size, stride):
    with pytest.raises(WeightsFormatError, match=r"lie on each other|reaches out of its storage of 20 elements"):
        parse_pickle(b"\x80\x02" + tensor(count=20, size=size, stride=stride) + b".", stored)


def test_a_storage_without_a_type_takes_the_tensor_s():
    untyped = tensor(count=8, storage="torch.storage.UntypedStorage")
    with pytest.raises(WeightsFormatError, match="a tensor is made"):
        parse_pickle(b"\x80\x02" + untyped + b".", stored)
    typed = untyped.replace(b"_v2", b"_v3").removesuffix(b"tR") + named("torch.bfloat16") + b"tR"
    assert parse_pickle(b"\x80\x02" + typed + b".", stored) == TensorRef(torch.bfloat16, (4,), (1,), 0, "0", 4)
    with pytest.raises(WeightsFormatError, match="reaches out of its storage"):
        parse_pickle(b"\x80\x02" + typed.replace(number(8), number(9)) + b".", stored)


# --- bounds ---


def test_the_number_of_operations_is_bounded():
    bounded = Toolbox(100, operations=20)
    with pytest.raises(WeightsFormatError, match="more than 20 operations"):
        parse_pickle(pickle.dumps(list(range(30))), tools=bounded)
    parse_pickle(pickle.dumps(list(range(10))), tools=Toolbox(100, operations=20))
    assert MAX_OPERATIONS == 300_000


def test_the_size_is_bounded(monkeypatch):
    monkeypatch.setattr(unpickle, "MAX_PICKLE_BYTES", 100)
    parse_pickle(pickle.dumps("x" * 50))
    with pytest.raises(WeightsFormatError, match="x is too large: got 1"):
        parse_pickle(pickle.dumps("x" * 100), where="x")


@pytest.mark.parametrize(("depth", "good"), [(MAX_DEPTH, True), (MAX_DEPTH + 1, False)])
@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: (x,), lambda x: {"k": x}])
def test_depth_is_bounded(wrap, depth, good):
    value: typing.Any = wrap(0)
    for _ in range(depth - 1):
        value = wrap(value)
    if good:
        assert parse_pickle(pickle.dumps(value)) == value
    else:
        with pytest.raises(WeightsFormatError, match="nested more than 64 deep"):
            parse_pickle(pickle.dumps(value))


def test_a_value_in_itself_is_refused_on_whatever_way():
    a: list[typing.Any] = [1]
    b = {"a": (a, [2])}
    parse_pickle(pickle.dumps([a, b, a, b]))
    a.append([3, b])
    with pytest.raises(WeightsFormatError, match="contains itself"):
        parse_pickle(pickle.dumps([[], a]))


def test_shared_values_count_wherever_they_are_met():
    rows = [[0] * 1000] * 1000
    with pytest.raises(WeightsFormatError, match="shared ones counted"):
        parse_pickle(pickle.dumps(rows))
    assert parse_pickle(pickle.dumps(rows[:200])) == rows[:200]


@given(st.binary(max_size=60), st.sampled_from(PROTOCOLS))
def test_any_bytes_give_a_value_or_our_error(data, protocol):
    for start in (b"", b"\x80\x02", pickle.dumps({"a": [1, (2.0, "x")]}, protocol)[:-1]):
        try:
            parse_pickle(start + data + b".")
        except WeightsFormatError:
            continue
