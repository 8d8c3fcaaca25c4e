"""The strict translation: what it reads is what was written, and everything else is an error that helps."""

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest

from crocuta.config import ModelConfig
from crocuta.errors import ConfigError
from crocuta.schema import decode, encode, replace_path


@dataclass(frozen=True, kw_only=True)
class Circle:
    type: ClassVar[str] = "circle"
    radius: float


@dataclass(frozen=True, kw_only=True)
class Square:
    type: ClassVar[str] = "square"
    side: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Pen:
    colour: Literal["red", "blue"] = "red"
    width: int = 1


@dataclass(frozen=True, kw_only=True)
class Drawing:
    title: str
    shape: Circle | Square
    shapes: tuple[Circle | Square, ...] = ()
    size: tuple[int, int] = (1, 1)
    pen: Pen | None = None
    border: Pen = field(default_factory=Pen)
    closed: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    extra: Any = None


PLAIN = {"title": "t", "shape": {"type": "circle", "radius": 2.0}}


def test_written_and_read_again_is_the_same() -> None:
    drawing = Drawing(
        title="t",
        shape=Circle(radius=2.0),
        shapes=(Square(), Circle(radius=0.5)),
        size=(3, 4),
        pen=Pen(colour="blue"),
        closed=True,
        notes={"a": [1, {"b": None}]},
        extra=[1, "two"],
    )
    text = json.dumps(encode(drawing))
    assert decode(Drawing, json.loads(text)) == drawing
    assert json.loads(text)["shapes"] == [{"type": "square", "side": 1.0}, {"type": "circle", "radius": 0.5}]


def test_left_out_fields_take_their_defaults() -> None:
    assert decode(Drawing, PLAIN) == Drawing(title="t", shape=Circle(radius=2.0))


def test_a_whole_number_is_a_float_and_a_list_a_tuple() -> None:
    drawing = decode(Drawing, PLAIN | {"shape": {"type": "square", "side": 3}, "size": [5, 6]})
    assert drawing.shape == Square(side=3.0)
    assert isinstance(drawing.shape.side, float)
    assert drawing.size == (5, 6)


# Each: what is set in PLAIN (a dotted path), to what, and the words that the message must hold.
MISTAKES: list[tuple[str, Any, list[str]]] = [
    ("titel", "x", ["'titel'", "did you mean 'title'"]),
    ("border.color", "red", ["'border.color'", "did you mean 'colour'"]),
    ("shape.raduis", 1.0, ["'shape.raduis'", "did you mean 'radius'"]),
    ("shape.type", "circel", ["shape.type", "did you mean 'circle'"]),
    ("shape.type", None, ["shape.type", "circle, square"]),
    ("shape", "circle", ["shape", "mapping", "'circle' (str)"]),
    ("shape", None, ["shape", "mapping", "None"]),
    ("shapes", {"type": "square"}, ["shapes must be a list"]),
    (
        "shapes",
        [{"type": "square"}, {"type": "square", "side": "1"}],
        ["shapes[1].side", "float", "'1' (str)"],
    ),
    ("size", [1, 2, 3], ["size", "2 values", "[1, 2, 3]"]),
    ("size", [1, 2.5], ["size[1]", "int", "2.5 (float)"]),
    ("pen", {"width": True}, ["pen.width", "int", "True (bool)"]),
    ("pen", {"colour": "green"}, ["pen.colour", "'red' or 'blue'", "'green'"]),
    ("border", None, ["border", "mapping"]),
    ("closed", 1, ["closed", "bool", "1 (int)"]),
    ("notes", [], ["notes", "mapping"]),
    ("title", 3, ["title", "str", "3 (int)"]),
    ("zzz", 3, ["'zzz'", "known: title, shape"]),
]


@pytest.mark.parametrize(("path", "item", "words"), MISTAKES, ids=[f"{m[0]}={m[1]}" for m in MISTAKES])
def test_a_mistake_is_named(path: str, item: Any, words: list[str]) -> None:
    value = json.loads(json.dumps(PLAIN))
    replace_path(value, path, item)
    with pytest.raises(ConfigError) as caught:
        decode(Drawing, value)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match=r"missing field 'shape\.radius'.*Circle"):
        decode(Drawing, {"title": "t", "shape": {"type": "circle"}})


@pytest.mark.parametrize("value", [None, [], "title", 3])
def test_the_whole_must_be_a_mapping(value: object) -> None:
    with pytest.raises(ConfigError, match="Drawing must be a mapping"):
        decode(Drawing, value)


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(ConfigError) as caught:
        decode(Drawing, PLAIN | {"size": "x" * 10_000})
    assert len(str(caught.value)) < 200


def test_replace_path_sets_and_makes_mappings() -> None:
    value: dict[str, Any] = {"a": {"b": 1}}
    replace_path(value, "a.b", 2)
    replace_path(value, "c.d.e", 3)
    replace_path(value, "f", 4)
    assert value == {"a": {"b": 2}, "c": {"d": {"e": 3}}, "f": 4}


def test_replace_path_does_not_go_through_a_value() -> None:
    with pytest.raises(ConfigError, match=r"cannot set 'a\.b': 'a' is not a mapping: got 1"):
        replace_path({"a": 1}, "a.b", 2)


@pytest.mark.parametrize("tag", [["rms"], {"rms": 1}, 7, True, None])
def test_a_kind_that_is_no_text_is_an_unknown_kind(tag):
    value = {"vocab_size": 8, "hidden_size": 4, "blocks": [], "norm": {"type": tag, "eps": 1e-6}}
    with pytest.raises(ConfigError, match=r"norm.type names no known kind"):
        ModelConfig.from_json(value)


@pytest.mark.parametrize("size", [(1 << 40) + 1, 2**63, 10**400])
def test_sizes_that_no_machine_has_are_refused(size):
    with pytest.raises(ConfigError, match=r"ModelConfig.hidden_size is impossible: got \d{1,20};"):
        ModelConfig.from_json({"vocab_size": 8, "hidden_size": size, "blocks": []})
