"""Labelled sequences from TSV, JSONL and FASTA: each with its label, the split it names, and where it stands."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, TypeAlias

from crocuta.data.fasta import Alphabet, Case, read_fasta
from crocuta.data.files import PathLike, broken, input_name, read_lines
from crocuta.errors import ConfigError, InputError, SequenceFormatError

LabelKind: TypeAlias = Literal["class", "tokens", "numbers"]
"""class: one name a sequence. tokens: one name a token, None where there is none. numbers: one or more targets."""
Label: TypeAlias = str | tuple[str | None, ...] | tuple[float, ...]

_SUFFIXES = {
    "tsv": (".tsv", ".tab"),
    "jsonl": (".jsonl",),
    "fasta": (".fa", ".fasta", ".fna", ".ffn", ".faa"),
}
_PACKED = (".gz", ".bgz", ".xz")
_SEPARATORS = re.compile(r"[\s,]+")


@dataclass(frozen=True)
class Example:
    """One labelled sequence; ``where`` is ``file:line``, and ``split`` what the file itself says, if anything."""

    id: str
    sequence: str
    label: Label
    split: str | None
    where: str


@dataclass(frozen=True, kw_only=True)
class LabelledFormat:
    """Where the parts of an example stand in a file.

    ``sequence``, ``label``, ``id`` and ``split`` name the columns of a TSV with a header line and the fields of JSONL
    objects; id and split may be missing. In FASTA ``label`` and ``split`` are words ``label=NAME`` of the header.
    """

    format: Literal["auto", "tsv", "jsonl", "fasta"] = "auto"
    """auto goes by the suffix (.tsv and .tab, .jsonl, those of FASTA), also before .gz, .bgz and .xz."""
    sequence: str = "sequence"
    label: str = "label"
    id: str = "id"
    split: str = "split"
    pattern: str | None = None
    """FASTA: a regular expression that finds the label in the header with its one group, instead of ``label=``."""
    table: str | None = None
    """FASTA: a TSV with the columns ``id`` and ``label`` (and ``split``), instead of words in the header."""
    alphabet: Alphabet | None = None
    """FASTA: the letters that a sequence may hold; by default "protein" for .faa and "iupac" else."""
    case: Case = "upper"
    """FASTA: lower case becomes upper case, or is kept. TSV and JSONL are taken as they stand."""

    def __post_init__(self) -> None:
        if self.pattern is not None and self.table is not None:
            raise ConfigError("FASTA labels come from one place", given="pattern and table", expected="one of them")
        if self.pattern is not None and _compile(self.pattern).groups != 1:
            groups = _compile(self.pattern).groups
            raise ConfigError("the pattern must have one group, the label", given=f"{self.pattern!r} with {groups}")
        names = (self.sequence, self.label, self.id, self.split)
        if len(set(names)) != len(names):
            raise ConfigError("two parts of an example have one name", given=", ".join(names), expected="four names")


def read_labelled(
    paths: Sequence[PathLike] | PathLike, kind: LabelKind, format: LabelledFormat = LabelledFormat()
) -> list[Example]:
    """The examples of all ``paths`` in order, with labels of the given ``kind``.

    A label in a TSV cell or a FASTA header is text: numbers, and the labels of tokens, are parted by spaces or commas;
    labels of tokens without either are one letter each. In JSONL a label may also be a whole number (a class), a
    number (a target) or a list; null in a list is a token without a label.

    Raises:
        InputError: no path, standard input, a missing file, or a format that the suffix does not tell.
        SequenceFormatError: with file and line: a missing column or field, a row of another width, an empty sequence, a
            label of another kind, targets that are not finite or differ in number, a FASTA record without a label, no
            example at all; and all that ``read_lines`` and ``read_fasta`` raise.
    """
    paths = [paths] if isinstance(paths, PathLike) else list(paths)
    if not paths:
        raise InputError("there is nothing to read", given="no path", expected="at least one labelled file")
    kinds = [_format_of(path, format.format) for path in paths]
    examples: list[Example] = []
    for path, name in zip(paths, kinds):
        read = {"tsv": _read_tsv, "jsonl": _read_jsonl, "fasta": _read_fasta}[name]
        found = len(examples)
        examples.extend(_example(row, kind) for row in read(path, format))
        if len(examples) == found:
            raise broken(input_name(path), 1, "the file has no labelled sequence", expected="at least one")
    if kind == "numbers":
        _check_targets(examples)
    return examples


# --- the three formats ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """What a file says about one example, before anything but its shape was looked at."""

    id: str
    sequence: Any
    label: Any
    split: Any
    where: str

    def fail(self, reason: str, *, given: object = None, expected: object = None, fix: str | None = None) -> NoReturn:
        raise SequenceFormatError(f"{self.where}: {reason}", given=given, expected=expected, fix=fix)


def _read_tsv(path: PathLike, format: LabelledFormat) -> Iterator[_Row]:
    for where, cells in _tsv_cells(path, (format.sequence, format.label)):
        sequence, label = cells[format.sequence], cells[format.label]
        yield _Row(cells.get(format.id) or where, sequence, label, cells.get(format.split) or None, where)


def _tsv_cells(path: PathLike, needed: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """(file:line, column -> cell) of every row that is not blank; there is no quoting in a TSV."""
    name, header = input_name(path), None
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        cells = _decode(line, name, number).split("\t")
        if header is None:
            header = [cell.strip() for cell in cells]
            _check_header(header, needed, name, number)
        elif len(cells) != len(header):
            given, expected = f"{len(cells)} cells", f"{len(header)}, as the header has"
            raise broken(name, number, "the row has another width than the header", given=given, expected=expected)
        else:
            yield f"{name}:{number}", dict(zip(header, cells))
    if header is None:
        raise broken(name, 1, "the file is empty", expected="a header line with " + ", ".join(needed))


def _check_header(header: list[str], needed: tuple[str, ...], name: str, number: int) -> None:
    given = "the columns " + ", ".join(map(repr, header))[:200]
    for column in needed:
        if column not in header:
            fix = "name your column in data.format" if len(header) > 1 else "columns are parted by tabs"
            raise broken(name, number, f"the header has no column {column!r}", given=given, fix=fix)
    if len(set(header)) != len(header):
        raise broken(name, number, "the header names a column twice", given=given, expected="different names")


def _read_jsonl(path: PathLike, format: LabelledFormat) -> Iterator[_Row]:
    name = input_name(path)
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        value = _object(line, name, number)
        for field in (format.sequence, format.label):
            if field not in value:
                given = "the fields " + (", ".join(map(repr, value)) or "none")[:200]
                raise broken(name, number, f"the object has no field {field!r}", given=given)
        key = value.get(format.id, f"{name}:{number}")
        if not isinstance(key, str | int) or isinstance(key, bool):
            given = type(key).__name__
            raise broken(name, number, f"the field {format.id!r} is no id", given=given, expected="string or integer")
        split = value.get(format.split)
        yield _Row(str(key), value[format.sequence], value[format.label], split, f"{name}:{number}")


def _object(line: bytes, name: str, number: int) -> dict[str, Any]:
    try:
        value = json.loads(_decode(line, name, number))
    except (json.JSONDecodeError, RecursionError) as error:
        raise broken(name, number, "the line is not JSON", given=str(error), expected="one object a line") from error
    if not isinstance(value, dict):
        raise broken(name, number, "the line is no JSON object", given=type(value).__name__, expected="an object")
    return value


def _read_fasta(path: PathLike, format: LabelledFormat) -> Iterator[_Row]:
    table = None if format.table is None else _read_table(format.table, format)
    pattern = None if format.pattern is None else _compile(format.pattern)
    alphabet = format.alphabet or ("protein" if _stem(path).endswith(".faa") else "iupac")
    records, name = list(read_fasta(path, alphabet=alphabet, case=format.case)), input_name(path)
    lines: list[object] = [number for number, line in enumerate(read_lines(path), 1) if line.startswith(b">")]
    if len(lines) != len(records):  # old line ends (CR), which are no lines here
        lines = [f"record {record.id!r}" for record in records]
    for record, line in zip(records, lines):
        header = f"{record.id} {record.description}".rstrip()
        row = _Row(record.id, record.sequence, None, None, f"{name}:{line}")
        if table is None:
            label, split = _header_label(row, header, format, pattern), _word(row, header, format.split)
        elif record.id in table:
            label, split = table[record.id]
        else:
            row.fail(f"{format.table} has no label for {record.id!r}", fix="add a row, or leave the record out")
        yield replace(row, label=label, split=split or None)


def _header_label(row: _Row, header: str, format: LabelledFormat, pattern: re.Pattern[str] | None) -> str:
    given = repr(header[:80])
    if pattern is None:
        label = _word(row, header, format.label)
        if label is None:
            row.fail("the header has no label", given=given, expected=f"a word {format.label}=NAME")
        return label
    found = pattern.search(header)
    if found is None or found[1] is None:
        row.fail("the pattern finds no label", given=given, expected=f"a header that {pattern.pattern!r} fits")
    return found[1]


def _read_table(path: str, format: LabelledFormat) -> dict[str, tuple[str, str | None]]:
    """id -> (label, split)."""
    table: dict[str, tuple[str, str | None]] = {}
    for where, cells in _tsv_cells(path, (format.id, format.label)):
        key = cells[format.id].strip()
        if key in table:
            raise SequenceFormatError(f"{where}: the id occurred before", given=repr(key[:80]), expected="unique ids")
        table[key] = cells[format.label], cells.get(format.split)
    return table


def _word(row: _Row, header: str, key: str) -> str | None:
    """The value of the word ``key=value`` in a header line."""
    values = [word.removeprefix(f"{key}=") for word in header.split() if word.startswith(f"{key}=")]
    if len(values) > 1:
        row.fail(f"the header has {key}= twice", given=repr(header[:80]), expected="one")
    return values[0] if values else None


# --- labels -----------------------------------------------------------------------------------------------------


def _example(row: _Row, kind: LabelKind) -> Example:
    if not isinstance(row.sequence, str) or not row.sequence:
        given = "an empty string" if row.sequence == "" else type(row.sequence).__name__
        row.fail("there is no sequence", given=given, expected="text")
    if row.split is not None and not isinstance(row.split, str):
        row.fail("the split must be a name", given=type(row.split).__name__, expected="train, validation or test")
    label: Label
    match kind:
        case "class":
            label = _name(row, row.label)
        case "tokens":
            label = _tokens(row)
        case "numbers":
            label = _numbers(row)
    return Example(row.id.strip(), row.sequence, label, row.split and row.split.strip(), row.where)


def _name(row: _Row, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        given = f"{json.dumps(value)[:60]} ({type(value).__name__})"
        row.fail("the label is no class", given=given, expected="a string or a whole number", fix="put it into quotes")
    if not value.strip():
        row.fail("the label is empty", expected="the name of a class")
    return value.strip()


def _tokens(row: _Row) -> tuple[str | None, ...]:
    if isinstance(row.label, list):
        labels = tuple(None if item is None else _name(row, item) for item in row.label)
    elif isinstance(row.label, str):
        labels = tuple(_parts(row.label) if _SEPARATORS.search(row.label.strip()) else row.label.strip())
    else:
        row.fail("there is no label for each token", given=type(row.label).__name__, expected="a list or text")
    if not labels:
        row.fail("the label is empty", expected="one label a token")
    return labels


def _numbers(row: _Row) -> tuple[float, ...]:
    parts = _parts(row.label) if isinstance(row.label, str) else row.label
    try:
        values = tuple(_number(item) for item in (parts if isinstance(parts, list) else [parts]))
    except (ValueError, OverflowError):
        values = ()
    if not values or not all(map(math.isfinite, values)):
        row.fail("the label is no target", given=repr(row.label)[:60], expected="finite numbers")
    return values


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    return float(value)


def _parts(text: str) -> list[str]:
    return [part for part in _SEPARATORS.split(text.strip()) if part]


def _check_targets(examples: list[Example]) -> None:
    first = examples[0]
    for example in examples:
        if len(example.label) != len(first.label):
            raise SequenceFormatError(
                f"{example.where}: the example has another number of targets than the first",
                given=len(example.label),
                expected=f"{len(first.label)}, as at {first.where}",
            )


# --- small helpers ----------------------------------------------------------------------------------------------


def _format_of(path: PathLike, format: str) -> str:
    if str(path) == "-":
        raise InputError("labelled data cannot come from standard input", fix="write it to a file")
    if format != "auto":
        return format
    for name, suffixes in _SUFFIXES.items():
        if _stem(path).endswith(suffixes):
            return name
    expected = "a suffix such as .tsv, .jsonl or .fa"
    raise InputError("the format of the labelled file is not known", given=path, expected=expected, fix="name it")


def _stem(path: PathLike) -> str:
    name = str(path).lower()
    for suffix in _PACKED:
        name = name.removesuffix(suffix)
    return name


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError("the pattern is no regular expression", given=f"{pattern!r}: {error}") from error


def _decode(line: bytes, name: str, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        given = hex(line[error.start])
        raise broken(name, number, "the text is not UTF-8", given=given, expected="UTF-8") from error
