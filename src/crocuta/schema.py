"""Strict, closed translation between frozen dataclasses and plain JSON values.

Every configuration of the library goes through here, so that a typo is an error with a suggestion and never a
default. A dataclass that is one of several alternatives carries a class attribute ``type`` (a string), written
to JSON as ``"type"`` and used to choose the class when reading.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import types
import typing
from typing import Any, TypeVar

from crocuta.errors import ConfigError

T = TypeVar("T")


def encode(value: Any) -> Any:
    """The JSON value of a configuration: dataclasses become objects, tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        tag = getattr(value, "type", None)
        return {"type": tag, **fields} if isinstance(tag, str) else fields
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return value


def decode(cls: type[T], value: Any, where: str = "") -> T:
    """The ``cls`` that ``value`` (parsed JSON or YAML) describes.

    Raises:
        ConfigError: for an unknown or missing field, a wrong type or an unknown alternative; the message names
            the path of the field and the nearest known name.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{where or cls.__name__} must be a mapping", given=_show(value), expected=cls.__name__)
    described: Any = cls
    hints, fields = _hints(described), {f.name: f for f in dataclasses.fields(described)}
    arguments: dict[str, Any] = {}
    for key, item in value.items():
        if key == "type" and isinstance(getattr(cls, "type", None), str):
            continue
        if key not in fields:
            raise _unknown(f"unknown field {_join(where, str(key))!r}", str(key), fields, cls.__name__)
        arguments[key] = _decode(hints[key], item, _join(where, key))
    for name, field in fields.items():
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in arguments and not optional:
            raise ConfigError(f"missing field {_join(where, name)!r}", expected=f"{name} of {cls.__name__}")
    return cls(**arguments)


def decode_json(cls: type[T], value: Any) -> T:
    """``decode``, which also takes the text of the JSON. Raises ConfigError."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError("the configuration is not JSON", given=str(error)) from error
    return decode(cls, value)


def replace_path(value: dict[str, Any], path: str, item: Any) -> None:
    """Set ``value["a"]["b"] = item`` for the dotted path ``a.b``, making the mappings on the way."""
    *parents, last = path.split(".")
    for parent in parents:
        value = value.setdefault(parent, {})
        if not isinstance(value, dict):
            raise ConfigError(f"cannot set {path!r}: {parent!r} is not a mapping", given=_show(value))
    value[last] = item


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(
                f"{where} has an unknown value",
                given=_show(value),
                expected=" or ".join(map(repr, arguments)),
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list", given=_show(value))
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(value) != len(arguments):
            raise ConfigError(f"{where} has the wrong length", given=_show(value), expected=f"{len(arguments)} values")
        return tuple(_decode(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(arguments, value)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a mapping", given=_show(value))
        return dict(value)
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise ConfigError(f"{where} has the wrong type", given=_show(value), expected=hint.__name__)


def _decode_union(alternatives: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in alternatives:
        return None
    kinds: list[Any] = [a for a in alternatives if dataclasses.is_dataclass(a)]
    tagged = {kind.type: kind for kind in kinds if isinstance(getattr(kind, "type", None), str)}
    if isinstance(value, dict) and tagged:
        tag = value.get("type")
        if tag is None and len(tagged) == 1:
            tag = next(iter(tagged))
        if not isinstance(tag, str) or tag not in tagged:
            raise _unknown(f"{where}.type names no known kind", str(tag), tagged, "one of " + ", ".join(tagged))
        return decode(tagged[tag], value, where)
    failures = []
    for alternative in alternatives:
        if alternative is not type(None):
            try:
                return _decode(alternative, value, where)
            except ConfigError as failure:
                failures.append(failure)
    raise failures[0]


def _unknown(what: str, name: str, known: typing.Iterable[str], expected: str) -> ConfigError:
    close = difflib.get_close_matches(name, list(known), n=1)
    fix = f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(known)
    return ConfigError(what, expected=expected, fix=fix)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _show(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
