"""Reading small files of unknown origin: regular files only, bounded size, JSON and YAML without surprises."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import stat
from io import FileIO
from pathlib import Path
from typing import Any, Final, TypeAlias

from crocuta.errors import CheckpointError, MissingExtraError, WeightsFormatError

MAX_JSON_BYTES: Final = 8 << 20
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_MAX_YAML_BYTES, _MAX_YAML_NODES = 1 << 16, 10_000  # PyYAML takes seconds for more
ErrorClass: TypeAlias = type[CheckpointError] | type[WeightsFormatError]


def open_regular(path: Path, error_class: ErrorClass) -> FileIO:
    """Open a file for unbuffered reading; one that is unreadable or not regular raises ``error_class``."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise error_class(f"{path} is not a regular file")
        return FileIO(path, "rb")
    except OSError as error:
        raise error_class(f"cannot read {path}", given=error.strerror) from error


def read_small(path: Path, error_class: ErrorClass) -> bytes:
    """All bytes of a regular file of at most 8 MiB; anything else raises ``error_class``."""
    with open_regular(path, error_class) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(size, MAX_JSON_BYTES)) or b""
        except OSError as error:
            raise error_class(f"cannot read {path}", given=error.strerror) from error
    if len(data) != size:
        given, expected = f"{len(data)} of {size} bytes", f"all, and at most {MAX_JSON_BYTES}"
        raise error_class(f"{path} cannot be read whole", given=given, expected=expected)
    return data


def strict_json(text: bytes) -> Any:
    """Parse UTF-8 JSON, refusing duplicate keys, NaN, infinities and absurd nesting. Raises ValueError."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise ValueError(f"duplicate key {ascii(name)[:80]}")
        value[name] = item
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def strict_yaml(text: str) -> Any:
    """Parse at most 64 KiB of YAML with plain types, refusing duplicate keys and aliases; 3e-3 is a number.

    Raises ValueError, and MissingExtraError without PyYAML.
    """
    if len(text) > _MAX_YAML_BYTES:
        raise ValueError(f"longer than {_MAX_YAML_BYTES} characters")
    value, fault = _parse_yaml(text)
    if fault is not None:
        raise ValueError(fault)
    return copy.deepcopy(value)


@functools.lru_cache(maxsize=4)
def _parse_yaml(text: str) -> tuple[Any, str | None]:
    """The value, or what is wrong. Kept, as each format looks into the same file, and PyYAML is slow."""
    try:
        import yaml
    except ImportError as error:
        fix = "pip install 'crocuta[yaml]', or write it as JSON"
        raise MissingExtraError("YAML files need the package PyYAML", fix=fix) from error

    class Loader(yaml.SafeLoader):
        nodes = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            # A few lines of aliases of aliases can describe more nodes than fit in memory.
            if self.check_event(yaml.AliasEvent):
                raise yaml.composer.ComposerError(None, None, "aliases are not allowed", self.peek_event().start_mark)
            self.nodes += 1
            if self.nodes > _MAX_YAML_NODES:
                raise yaml.composer.ComposerError(None, None, "too many values", self.peek_event().start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[Any] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.constructor.ConstructorError(None, None, "a key must be plain", key.start_mark)
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
    try:
        loader = Loader(text)
        try:
            return loader.get_single_data(), None
        finally:
            loader.dispose()
    except RecursionError:
        return None, "nested too deeply"
    except yaml.YAMLError as error:
        return None, str(error)
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        # From PyYAML itself, on values that do not fit their tag.
        return None, f"{type(error).__name__}: {error}"
