"""Reading small files of unknown origin: regular files only, bounded size, JSON without surprises."""

from __future__ import annotations

import json
import os
import stat
from io import FileIO
from pathlib import Path
from typing import Any, Final, TypeAlias

from crocuta.errors import CheckpointError, WeightsFormatError

MAX_JSON_BYTES: Final = 8 << 20
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
