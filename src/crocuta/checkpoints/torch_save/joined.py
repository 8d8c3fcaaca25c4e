"""Bytes of one file, of several files read as one, or of memory: where the readers of foreign files read from.

Large checkpoints are published cut into parts (``x.pt.part0``, ``x.pt.part1``, ...) that are one file when put end to
end. Here they are read as that file, and nothing is merged on disk.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Final, Protocol

from crocuta.checkpoints.strict import open_regular
from crocuta.errors import WeightsFormatError

MAX_PARTS: Final = 10_000
MAX_OPEN: Final = 8


class ByteSource(Protocol):
    """A known number of bytes that can be read at any place."""

    size: int
    name: str

    def read_at(self, offset: int, count: int) -> bytes:
        """Exactly ``count`` bytes from ``offset`` on. Raises WeightsFormatError."""
        ...

    def fill(self, view: memoryview, offset: int, what: str) -> None:
        """Fill ``view`` (of bytes) from ``offset`` on; ``what`` is named in the error. Raises WeightsFormatError."""
        ...

    def close(self) -> None: ...


class JoinedFile:
    """One or several regular files, in the given order, read as one; close it, or use ``with``.

    At most eight of them are open at a time. Each is known by its identity, size and time of writing from when it was
    first opened, so that one replaced, cut or written to in between is noticed at the next reading.

    Raises:
        WeightsFormatError: a file is unreadable or not regular, there is none, or (when reading) one has changed.
    """

    def __init__(self, paths: Sequence[Path]):
        self._paths = tuple(paths)
        if not 1 <= len(self._paths) <= MAX_PARTS:
            raise WeightsFormatError("files to be read as one", given=len(self._paths), expected=f"1 to {MAX_PARTS}")
        more = f" and {len(self._paths) - 1} more" if len(self._paths) > 1 else ""
        self.name = f"{self._paths[0]}{more}"
        self._open: dict[int, FileIO] = {}  # by position in paths; the one used longest ago comes first
        self._stamps: list[tuple[int, ...]] = []
        try:
            for index in range(len(self._paths)):
                self._stamps.append(_stamp(self._handle(index)))
        except BaseException:
            self.close()
            raise
        self._starts = [0, *accumulate(stamp[0] for stamp in self._stamps)]
        self.size = self._starts.pop()

    def read_at(self, offset: int, count: int) -> bytes:
        """Exactly ``count`` bytes from ``offset`` on. Raises WeightsFormatError."""
        what = f"{count} bytes at {offset}"
        _check_inside(self, offset, count, what)
        data = bytearray(count)
        self.fill(memoryview(data), offset, what)
        return bytes(data)

    def fill(self, view: memoryview, offset: int, what: str) -> None:
        """Fill ``view`` (of bytes) from ``offset`` on; ``what`` is named in the error. Raises WeightsFormatError."""
        _check_inside(self, offset, len(view), what)
        for index, begin, count in self._pieces(offset, len(view)):
            self._fill_from(index, view[:count], begin, what)
            view = view[count:]

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> JoinedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pieces(self, offset: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(file, place in it, bytes) for each file that holds some of the bytes."""
        index = bisect_right(self._starts, offset) - 1
        while count > 0 and index < len(self._paths):
            begin = offset - self._starts[index]
            piece = min(count, self._stamps[index][0] - begin)
            if piece > 0:
                yield index, begin, piece
            offset, count, index = offset + piece, count - piece, index + 1

    def _handle(self, index: int) -> FileIO:
        file = self._open.pop(index, None)
        if file is None:
            if len(self._open) >= MAX_OPEN:
                self._open.pop(next(iter(self._open))).close()
            file = open_regular(self._paths[index], WeightsFormatError)
        self._open[index] = file
        return file

    def _fill_from(self, index: int, view: memoryview, offset: int, what: str) -> None:
        file, path = self._handle(index), self._paths[index]
        try:
            file.seek(offset)
            while view and (count := file.readinto(view)):
                view = view[count:]
            changed = bool(view) or _stamp(file) != self._stamps[index]
        except OSError as error:
            raise WeightsFormatError(f"{path}: cannot read {what}", given=error.strerror) from error
        if changed:
            fix = "load again when nobody writes to it"
            raise WeightsFormatError(f"{path}: the file changed while {what} was read", fix=fix)


class Memory:
    """Bytes in memory, read like a file."""

    def __init__(self, data: bytes, name: str):
        self._data, self.size, self.name = memoryview(data), len(data), name

    def read_at(self, offset: int, count: int) -> bytes:
        """Exactly ``count`` bytes from ``offset`` on. Raises WeightsFormatError."""
        _check_inside(self, offset, count, f"{count} bytes at {offset}")
        return bytes(self._data[offset : offset + count])

    def fill(self, view: memoryview, offset: int, what: str) -> None:
        """Fill ``view`` (of bytes) from ``offset`` on; ``what`` is named in the error. Raises WeightsFormatError."""
        _check_inside(self, offset, len(view), what)
        view[:] = self._data[offset : offset + len(view)]

    def close(self) -> None:
        self._data.release()


def _check_inside(source: ByteSource, offset: int, count: int, what: str) -> None:
    if not 0 <= offset <= offset + count <= source.size:
        raise WeightsFormatError(f"{source.name}: {what} would end beyond the file's {source.size} bytes")


def _stamp(file: FileIO) -> tuple[int, ...]:
    """Size first, then what else changes when a file is written to or replaced by another."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino
