"""Results out: to standard output, or to a file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

from crocuta.data.files import replace_file
from crocuta.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@contextlib.contextmanager
def binary_output(path: str | None) -> Iterator[IO[bytes]]:
    """The stream to write to: standard output for None and "-". Raises InputError where it cannot be written."""
    if path is None or path == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    elif Path(path).exists() and not Path(path).is_file():  # a device or a pipe: nothing to replace
        try:
            device: IO[bytes] = open(path, "wb")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"cannot write {path}", given=error.strerror, expected="a file") from error
        with device:
            yield device
    else:
        with replace_file(path) as stream:
            yield stream


@contextlib.contextmanager
def text_output(path: str | None) -> Iterator[TextIO]:
    """``binary_output`` for UTF-8 text with plain line ends."""
    if path is None or path == "-":
        yield sys.stdout
        return
    with binary_output(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="\n")
        yield text
        text.detach()


def json_line(value: Mapping[str, Any]) -> str:
    """One JSON object and a line end."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def floats(array: NDArray[np.float32]) -> Any:
    """The numbers of an array as nested lists, with the digits that float32 needs and no more."""
    if array.ndim == 1:
        return [float(str(value)) for value in array]
    return [floats(row) for row in array]
