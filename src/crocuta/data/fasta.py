"""FASTA, strictly: every departure from the format is an error that names file, line and reason."""

from __future__ import annotations

import gzip
import io
import lzma
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Literal, TypeAlias, final

from crocuta.data.files import MAX_RATIO, PathLike, broken, input_name, read_blocks, replace_file, strip_bom
from crocuta.errors import InputError, SequenceFormatError
from crocuta.tokenizers.nucleotides import IUPAC

Alphabet: TypeAlias = Literal["acgtn", "iupac", "gapped", "protein"]
Case: TypeAlias = Literal["upper", "keep"]

LETTERS: dict[str, bytes] = {
    "acgtn": b"ACGTN",
    "iupac": IUPAC,
    "gapped": IUPAC + b"-*",
    "protein": b"ABCDEFGHIJKLMNOPQRSTUVWXYZ-*",
}
"""What a sequence may hold, in either case."""

MAX_HEADER = 64 << 10
MAX_RECORD = 4 << 30
_MARK = 0  # stands for an illegal letter after translation
_NEWLINE, _GREATER = b"\n>"
_NOT_WRITABLE = re.compile(r"[^A-Za-z*-]")
_CONTROL = bytes(set(range(32)) - {ord("\t")}) + b"\x7f"


@dataclass(frozen=True)
class Record:
    """One sequence: ``id`` is the first word of its header line and ``description`` the rest."""

    id: str
    description: str
    sequence: str


def read_fasta(
    path: PathLike,
    *,
    alphabet: Alphabet = "iupac",
    case: Case = "upper",
    duplicates: Literal["error", "allow"] = "error",
    max_record: int = MAX_RECORD,
    max_ratio: float = MAX_RATIO,
) -> Iterator[Record]:
    """The records of ``path`` ("-": standard input; plain, gzip, BGZF or xz), one at a time.

    Lines may end in LF, CRLF or CR; a byte order mark, blank lines and a missing last line end are accepted. Lower
    case becomes upper case, or stays with ``case="keep"``. Memory: one record, twice.

    Raises:
        InputError: the file is missing or an argument is unknown.
        SequenceFormatError: no record at all, text before the first ">", an empty id, an id seen before, a record
            without sequence or longer than ``max_record``, a letter outside ``alphabet`` (spaces included), control
            characters, a header that is not UTF-8 or longer than MAX_HEADER; and all that ``read_blocks`` raises.
    """
    for name, given, known in (
        ("alphabet", alphabet, tuple(LETTERS)),
        ("case", case, ("upper", "keep")),
        ("duplicates", duplicates, ("error", "allow")),
    ):
        if given not in known:
            raise InputError(f"unknown {name}", given=repr(given), expected=f"one of {known}")
    parser = _Parser(input_name(path), alphabet, case, duplicates == "allow", max_record)
    return parser.records(_unify_line_ends(strip_bom(read_blocks(path, max_ratio=max_ratio))))


def _unify_line_ends(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """CRLF and CR become LF, also where a block ends between CR and LF."""
    held = b""
    for block in blocks:
        text = held + block
        held = b"\r" if text.endswith(b"\r") else b""
        if b"\r" in text:
            text = text.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if text:
            yield text
    if held:
        yield b"\n"


@final
class _Parser:
    """Works on whole blocks with ``bytes.find`` and ``bytes.translate``; looks at single lines only to blame one."""

    def __init__(self, name: str, alphabet: Alphabet, case: Case, allow_duplicates: bool, max_record: int):
        self._name, self._alphabet, self._max_record = name, alphabet, max_record
        self._table = _letter_table(LETTERS[alphabet], case)
        self._seen: set[str] | None = None if allow_duplicates else set()
        self._line = 1
        self._header: tuple[str, str] | None = None
        self._header_line = 0
        self._pieces: list[bytes] = []
        self._length = 0

    def records(self, blocks: Iterator[bytes]) -> Iterator[Record]:
        cut_header = b""  # of a header line that a block has cut
        at_line_start = True
        for block in blocks:
            text, position = cut_header + block, 0
            cut_header = b""
            while position < len(text):
                if at_line_start and text[position] == _GREATER:
                    end = text.find(b"\n", position)
                    if (end if end >= 0 else len(text)) - position > MAX_HEADER:
                        raise self._broken("the header line is too long", expected=f"at most {MAX_HEADER} bytes")
                    if end < 0:
                        cut_header = text[position:]
                        break
                    if self._header is not None:
                        yield self._finish()
                    self._start(text[position + 1 : end])
                    position = end + 1
                else:
                    end = text.find(b"\n>", position)
                    stop = len(text) if end < 0 else end + 1
                    self._add(text[position:stop])
                    at_line_start = text[stop - 1] == _NEWLINE
                    position = stop
        if cut_header:
            if self._header is not None:
                yield self._finish()
            self._start(cut_header[1:])
        if self._header is None:
            raise self._broken("there is no record", expected="a line that starts with '>'")
        yield self._finish()

    def _start(self, header: bytes) -> None:
        if len(header.translate(None, _CONTROL)) != len(header):
            raise self._broken("the header line holds a control character", given=ascii(header[:80]))
        words = header.split(maxsplit=1)  # of bytes: at spaces and tabs only
        if not words or not header.startswith(words[0]):
            raise self._broken(
                "the record has an empty id", given=ascii(b">" + header[:80]), expected=">id description"
            )
        try:
            key = words[0].decode("utf-8")
            description = words[1].rstrip().decode("utf-8") if len(words) > 1 else ""
        except UnicodeDecodeError as error:
            raise self._broken("the header line is not UTF-8", given=ascii(header[:80])) from error
        if self._seen is not None:
            if key in self._seen:
                raise self._broken("the id occurred before", given=ascii(key[:80]), expected="unique ids")
            self._seen.add(key)
        self._header = (key, description)
        self._header_line, self._pieces, self._length = self._line, [], 0
        self._line += 1

    def _add(self, text: bytes) -> None:
        piece = text.translate(self._table, b"\n")
        if self._header is None and piece:
            self._line += len(text) - len(text.lstrip(b"\n"))
            raise self._broken(
                "text before the first '>'",
                given=ascii(text.strip(b"\n").split(b"\n")[0][:40]),
                expected=">id",
            )
        if _MARK in piece:
            self._blame(text)
        self._length += len(piece)
        if self._length > self._max_record:
            self._line = self._header_line
            raise self._broken("the record is too long", expected=f"at most {self._max_record} letters")
        self._pieces.append(piece)
        self._line += len(text) - len(piece)  # the line ends, which translate has removed

    def _finish(self) -> Record:
        assert self._header is not None
        if not self._length:
            self._line = self._header_line
            raise self._broken("the record has no sequence", given=repr(self._header[0][:80]))
        sequence = b"".join(self._pieces).decode("ascii")
        self._pieces = []
        return Record(*self._header, sequence)

    def _blame(self, text: bytes) -> None:
        position = text.translate(self._table).find(_MARK)
        self._line += text.count(b"\n", 0, position)
        raise self._broken(
            "illegal letter in the sequence",
            given=ascii(text[position : position + 1]),
            expected=f"letters of the alphabet '{self._alphabet}' ({LETTERS[self._alphabet].decode()})",
        )

    def _broken(self, reason: str, *, given: object = None, expected: object = None) -> SequenceFormatError:
        return broken(self._name, self._line, reason, given=given, expected=expected)


def _letter_table(letters: bytes, case: Case) -> bytes:
    table = bytearray([_MARK]) * 256
    for letter in letters:
        table[letter] = letter
        if chr(letter).isalpha():
            table[letter | 0x20] = letter if case == "upper" else letter | 0x20
    table[ord("\n")] = ord("\n")
    return bytes(table)


# --- writing --------------------------------------------------------------------------------------------------


def write_fasta(records: Iterable[Record], path: PathLike, *, width: int = 60) -> int:
    """Write ``records`` to ``path`` ("-": standard output; .gz and .xz compress) and return their number.

    Sequences are cut into lines of ``width`` letters. A file appears whole or not at all; equal records give equal
    bytes.

    Raises:
        InputError: an id that is empty or holds white space, control characters in the header, a sequence that is
            empty or holds other than letters, "-" and "*", or a path that cannot be written.
    """
    if width < 1:
        raise InputError("the line width is impossible", given=width, expected=">= 1")
    if str(path) == "-":
        return _write(records, sys.stdout.buffer, width)
    name = str(path).lower()
    if name.endswith(".bgz"):
        raise InputError("BGZF cannot be written", given=str(path), expected=".gz, .xz or no compression")
    with replace_file(path) as stream:
        if name.endswith(".gz"):
            with gzip.GzipFile(fileobj=stream, mode="wb", filename="", mtime=0) as packed:
                return _write(records, packed, width)
        if name.endswith(".xz"):
            with lzma.LZMAFile(stream, "wb") as packed_xz:
                return _write(records, packed_xz, width)
        return _write(records, stream, width)


def _write(records: Iterable[Record], stream: IO[bytes] | io.BufferedIOBase, width: int) -> int:
    count = 0
    for record in records:
        _check_record(record)
        header = f">{record.id} {record.description}" if record.description else f">{record.id}"
        lines = [record.sequence[i : i + width] for i in range(0, len(record.sequence), width)]
        stream.write("\n".join([header, *lines, ""]).encode("utf-8"))
        count += 1
    return count


def _check_record(record: Record) -> None:
    header = (record.id + record.description).encode("utf-8", errors="replace")
    problems: tuple[tuple[bool, str], ...] = (
        (not record.id or any(space in record.id for space in " \t"), "the id must be one word"),
        (header.translate(None, _CONTROL) != header, "the header must not hold control characters"),
        (header.decode() != record.id + record.description, "the header must have a UTF-8 form"),
        (not record.sequence, "the sequence must not be empty"),
        (bool(_NOT_WRITABLE.search(record.sequence)), "the sequence must be letters, - and *"),
    )
    for holds, reason in problems:
        if holds:
            raise InputError(f"cannot write this record: {reason}", given=repr(record)[:120])
