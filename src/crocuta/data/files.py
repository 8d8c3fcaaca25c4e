"""Reading and writing files safely: bounded decompression, atomic replacement, one way to name a broken line."""

from __future__ import annotations

import contextlib
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO, Protocol, TypeAlias, final

from crocuta.errors import InputError, SequenceFormatError

PathLike: TypeAlias = str | Path

MAX_RATIO = 100.0
"""Decompressed bytes allowed for each compressed byte, beyond the first RATIO_SLACK."""
# Honest chromosomes start with up to 19 million N, which gzip packs 1000 to 1, so the ratio counts only after that.
RATIO_SLACK = 64 << 20

_BLOCK = 128 << 10
_OUTPUT_BLOCK = 1 << 20
_GZIP_MAGIC, _XZ_MAGIC, _BOM = b"\x1f\x8b", b"\xfd7zXZ\x00", b"\xef\xbb\xbf"
_XZ_MEMORY = 128 << 20  # xz -9 needs 65 MiB
_BGZF_EOF = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


def input_name(path: PathLike) -> str:
    """How messages call ``path``; "-" is standard input."""
    return "<stdin>" if str(path) == "-" else str(path)


def broken(
    name: str,
    line: int,
    reason: str,
    *,
    given: object = None,
    expected: object = None,
    fix: str | None = None,
) -> SequenceFormatError:
    """The error for line ``line`` (from 1) of the input called ``name``."""
    return SequenceFormatError(f"{name}:{line}: {reason}", given=given, expected=expected, fix=fix)


# --- reading --------------------------------------------------------------------------------------------------


def read_blocks(path: PathLike, *, max_ratio: float = MAX_RATIO) -> Iterator[bytes]:
    """The content of ``path`` ("-": standard input) in blocks, decompressed (gzip, BGZF, xz) by its first bytes.

    Raises:
        InputError: the file is missing, a folder, or not readable.
        SequenceFormatError: truncated or corrupt compressed data, bytes after it, a BGZF file without its
            end-of-file block, more than ``max_ratio`` bytes out for each byte in, or a .gz, .bgz or .xz file that
            is none.
    """
    name = input_name(path)
    with _open_input(path) as stream:
        first = stream.read(_BLOCK)
        _check_suffix(name, first)
        blocks = _chain(first, iter(partial(stream.read, _BLOCK), b""))
        if first.startswith(_GZIP_MAGIC):
            end = _BGZF_EOF if _is_bgzf(first) else b""
            yield from _expand(blocks, name, "gzip", _GzipMember, max_ratio, end)
        elif first.startswith(_XZ_MAGIC):
            yield from _expand(blocks, name, "xz", _open_xz, max_ratio, b"")
        else:
            yield from blocks


def read_lines(path: PathLike, *, max_ratio: float = MAX_RATIO) -> Iterator[bytes]:
    """The lines of ``path`` without their end (LF or CRLF) and without a byte order mark. Raises as read_blocks."""
    start: list[bytes] = []  # of a line that a block has cut
    for block in strip_bom(read_blocks(path, max_ratio=max_ratio)):
        head, *rest = block.split(b"\n")
        start.append(head)
        if rest:
            yield b"".join(start).removesuffix(b"\r")
            *whole, tail = rest
            for line in whole:
                yield line.removesuffix(b"\r")
            start = [tail]
    if any(start):
        yield b"".join(start).removesuffix(b"\r")


def strip_bom(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """``blocks`` without the UTF-8 byte order mark that some editors write first."""
    for index, block in enumerate(blocks):
        yield block.removeprefix(_BOM) if index == 0 else block


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
        yield from rest


@contextlib.contextmanager
def _open_input(path: PathLike) -> Iterator[BinaryIO]:
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    try:
        stream = open(path, "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"cannot read {path}", given=reason, expected="a readable file") from error
    with stream:
        yield stream


def _check_suffix(name: str, first: bytes) -> None:
    for suffixes, magic, kind in (((".gz", ".bgz"), _GZIP_MAGIC, "gzip"), ((".xz",), _XZ_MAGIC, "xz")):
        if name.lower().endswith(suffixes) and not first.startswith(magic):
            raise broken(name, 1, f"this is no {kind} data", given=repr(first[:8]), expected=repr(magic))
    if name.lower().endswith(".bgz") and not _is_bgzf(first):
        raise broken(name, 1, "this gzip data is not in BGZF blocks", fix="name it .gz, or compress it with bgzip")


class _Member(Protocol):
    """One gzip member or xz stream: what zlib and lzma share."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = ..., /) -> bytes: ...


@final
class _GzipMember:
    """zlib with the habit of lzma: it keeps input that the output limit left over."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int = 0, /) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


def _open_xz() -> _Member:
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


def _expand(
    blocks: Iterator[bytes],
    name: str,
    kind: str,
    open_member: Callable[[], _Member],
    max_ratio: float,
    end: bytes,
) -> Iterator[bytes]:
    """The content of concatenated members, in blocks of at most _OUTPUT_BLOCK; ``end`` must be the last bytes."""
    magic = _GZIP_MAGIC if kind == "gzip" else _XZ_MAGIC
    member, num_read, num_written, line, tail = open_member(), 0, 0, 1, b""
    for data in blocks:
        num_read += len(data)
        tail = (tail + data)[-len(_BGZF_EOF) :]
        while True:
            if member.eof:  # and there is more
                if data[: len(magic)] != magic[: len(data)]:
                    raise broken(name, line, f"bytes after the end of the {kind} data", given=repr(data[:8]))
                member = open_member()
            try:
                output = member.decompress(data, _OUTPUT_BLOCK)
            except (zlib.error, lzma.LZMAError) as error:
                raise broken(name, line, f"the {kind} data is corrupt", given=str(error)) from error
            num_written += len(output)
            if num_written > RATIO_SLACK + max_ratio * num_read:
                given = f"{num_written} bytes out of {num_read}"
                fix = "decompress it yourself if you trust it"
                raise broken(name, line, f"the {kind} data expands more than {max_ratio:g} to 1", given=given, fix=fix)
            if output:
                yield output
                line += output.count(b"\n")
            data = member.unused_data if member.eof else b""
            if not data and (member.eof or len(output) < _OUTPUT_BLOCK):
                break
    if not member.eof:
        raise broken(name, line, f"the {kind} data ends early", expected="a complete file", fix="fetch it again")
    if not tail.endswith(end):
        # A file cut between two blocks is valid gzip: only the empty block that bgzip writes last tells it is whole.
        raise broken(name, line, "the BGZF end-of-file block is missing: the file is cut", fix="fetch it again")


def _is_bgzf(first: bytes) -> bool:
    """Whether the first gzip member has the BC extra field (SAM specification, section 4.1)."""
    if len(first) < 12 or not first[3] & 4:
        return False
    return b"BC\x02\x00" in first[12 : 12 + int.from_bytes(first[10:12], "little")]


# --- writing --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replace_file(path: PathLike) -> Iterator[IO[bytes]]:
    """A stream whose bytes become ``path`` when the block ends, or nothing if it raises.

    Temporary file in the same folder, fsync, rename, fsync of the folder. Raises InputError where the folder
    cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        stream = open(temporary, "wb")  # noqa: SIM115
    except OSError as error:
        raise InputError(
            f"cannot write {path}", given=error.strerror, expected="a folder that can be written"
        ) from error
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` last through a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
