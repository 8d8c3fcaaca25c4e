"""Documents: a text and its id, from text files, JSONL and FASTA alike."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from crocuta.data.fasta import Alphabet, Case, read_fasta
from crocuta.data.files import PathLike, broken, input_name, read_blocks, read_lines, strip_bom
from crocuta.errors import InputError

Format: TypeAlias = Literal["auto", "fasta", "jsonl", "text", "lines"]

_FASTA_SUFFIXES = (".fa", ".fasta", ".fna", ".ffn", ".faa")
_PACKED_SUFFIXES = (".gz", ".bgz", ".xz")


@dataclass(frozen=True)
class Document:
    """``text`` and where it is from: a record's id, the "id" of a JSON object, a path, or path:line."""

    id: str
    text: str


def read_documents(
    paths: Sequence[PathLike] | PathLike,
    format: Format = "auto",
    *,
    field: str = "text",
    alphabet: Alphabet | None = None,
    case: Case = "upper",
) -> Iterator[Document]:
    """The documents of all ``paths`` in order ("-": standard input; .gz, .bgz and .xz are unpacked).

    ``format``: "fasta" (one document a record), "jsonl" (one an object, its ``field``), "text" (one a file),
    "lines" (one a line); "auto" goes by the suffix, text where it is none of FASTA's and JSONL's. ``alphabet`` and
    ``case`` are those of ``read_fasta``; the alphabet is by default "protein" for .faa and else "iupac".

    Raises:
        InputError: no path at all, a missing file, an unknown format, or "auto" for standard input.
        SequenceFormatError: see ``read_fasta``, ``read_jsonl`` and ``read_text``.
    """
    paths = [paths] if isinstance(paths, PathLike) else list(paths)
    if not paths:
        raise InputError("there is nothing to read", given="no path", expected="at least one file, or -")
    kinds = [_format_of(path, format) for path in paths]
    return _read_all(paths, kinds, field, alphabet, case)


def _read_all(
    paths: list[PathLike], kinds: list[str], field: str, alphabet: Alphabet | None, case: Case
) -> Iterator[Document]:
    for path, kind in zip(paths, kinds):
        match kind:
            case "fasta":
                letters = alphabet or ("protein" if _stem(path).endswith(".faa") else "iupac")
                for record in read_fasta(path, alphabet=letters, case=case):
                    yield Document(record.id, record.sequence)
            case "jsonl":
                yield from read_jsonl(path, field=field)
            case "text":
                yield from read_text(path, by="file")
            case "lines":
                yield from read_text(path, by="line")


def read_text(path: PathLike, *, by: Literal["file", "line"] = "file") -> Iterator[Document]:
    """UTF-8 text: one document a file, as it stands, or one a line, without its end; blank lines are left out.

    Raises:
        InputError: the file is missing.
        SequenceFormatError: no text at all, or bytes that are not UTF-8; and all that ``read_blocks`` raises.
    """
    name = input_name(path)
    if by == "file":
        data = b"".join(strip_bom(read_blocks(path)))
        if not data:
            raise broken(name, 1, "the file is empty", expected="text")
        yield Document(name, _decode(data, name, 1))
        return
    found = False
    for number, line in enumerate(read_lines(path), 1):
        text = _decode(line, name, number)
        if text.strip():
            found = True
            yield Document(f"{name}:{number}", text)
    if not found:
        raise broken(name, 1, "the file has no line with text", expected="one document a line")


def read_jsonl(path: PathLike, *, field: str = "text") -> Iterator[Document]:
    """One JSON object a line: its ``field`` is the text, its optional "id" (string or integer) the id.

    Blank lines are left out. Other fields are ignored.

    Raises:
        InputError: the file is missing.
        SequenceFormatError: a line that is not a JSON object, lacks ``field``, or holds an empty or non-string
            text; no object at all; and all that ``read_blocks`` raises.
    """
    name, found = input_name(path), False
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        found = True
        yield _document(_parse_object(line, name, number), field, name, number)
    if not found:
        raise broken(name, 1, "the file has no JSON object", expected=f'one {{"{field}": ...}} a line')


def _parse_object(line: bytes, name: str, number: int) -> dict[str, Any]:
    try:
        value = json.loads(_decode(line, name, number))
    except (json.JSONDecodeError, RecursionError) as error:
        raise broken(name, number, "the line is not JSON", given=str(error), expected="one object a line") from error
    if not isinstance(value, dict):
        raise broken(name, number, "the line is no JSON object", given=type(value).__name__, expected="an object")
    return value


def _document(value: dict[str, Any], field: str, name: str, number: int) -> Document:
    text, key = value.get(field), value.get("id", f"{name}:{number}")
    if field not in value:
        known = ", ".join(map(repr, value)) or "none"
        raise broken(name, number, f"the object has no field {field!r}", given=f"the fields {known[:200]}")
    if not isinstance(text, str) or not text:
        given = "an empty string" if text == "" else type(text).__name__
        raise broken(name, number, f"the field {field!r} holds no text", given=given, expected="a string")
    if not isinstance(key, str | int) or isinstance(key, bool):
        raise broken(name, number, "the field 'id' is no id", given=type(key).__name__, expected="string or integer")
    return Document(str(key), text)


def _decode(data: bytes, name: str, line: int) -> str:
    """UTF-8 text; ``line`` is the number of the first line of ``data``."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise broken(name, line, "the text is not UTF-8", given=hex(data[error.start]), expected="UTF-8") from error


def _format_of(path: PathLike, format: Format) -> str:
    known = ("auto", "fasta", "jsonl", "text", "lines")
    if format not in known:
        raise InputError("unknown format", given=repr(format), expected=f"one of {known}")
    if format != "auto":
        return format
    if str(path) == "-":
        raise InputError(
            "the format of standard input is not known", given="format 'auto'", expected=f"one of {known[1:]}"
        )
    stem = _stem(path)
    if stem.endswith(_FASTA_SUFFIXES):
        return "fasta"
    return "jsonl" if stem.endswith(".jsonl") else "text"


def _stem(path: PathLike) -> str:
    name = str(path).lower()
    for suffix in _PACKED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name
