"""Records in, from files and standard input: their format, bounded batches of them, and errors that name them."""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import re
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, cast

import typer

from crocuta.data.files import input_name, read_blocks
from crocuta.data.text import Document, Format, read_documents
from crocuta.errors import CrocutaError, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from crocuta.model.encoder import Encoder
    from crocuta.model.lm import Model
    from crocuta.tokenizers.base import Tokenizer

RECORDS = 256
"""Most records that are worked on at once."""
CHARACTERS = 1 << 24
"""Records stop being added to a batch once they hold so many characters."""

_TELLING = re.compile(r"\.(fa|fasta|fna|ffn|faa|jsonl)(\.(gz|bgz|xz))?$", re.IGNORECASE)


def inputs(files: Sequence[str] | None) -> list[str]:
    """``files``, or standard input where there are none. A usage error if that is a terminal."""
    if files:
        return list(files)
    if sys.stdin is None or sys.stdin.isatty():
        raise typer.BadParameter("name a FILE, or pipe something in", param_hint="'FILE'")
    return ["-"]


def record_format(path: str, plain: Literal["lines", "text"] = "lines") -> Format:
    """FASTA and JSONL by the suffix, or else by the first character; ``plain`` is what everything else is.

    Raises:
        InputError: the file is missing, or a pipe whose name does not tell.
    """
    if path == "-":
        head = _stdin_head()
    elif os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        if _TELLING.search(path):
            return "auto"
        raise InputError(f"the format of {path} is not known", given="a pipe", fix="pass it as standard input")
    else:
        head = next(read_blocks(path), b"")
    if _TELLING.search(path):
        return "auto"
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return {b">": "fasta", b"{": "jsonl"}.get(first, plain)  # type: ignore[return-value]


def read_records(paths: Sequence[str], *, keep_case: bool = False) -> Iterator[Document]:
    """The records of all ``paths``, in order. Every path is looked at before the first record is read.

    Raises:
        InputError: a missing file. SequenceFormatError: a broken one, naming file, line and reason.
    """
    formats = [record_format(path) for path in paths]
    case: Literal["upper", "keep"] = "keep" if keep_case else "upper"
    return (d for path, format in zip(paths, formats) for d in read_documents([path], format, case=case))


def stdin_is_empty() -> bool:
    """Whether standard input ends at once, as that of a job without one does."""
    return not _stdin_head()


def batched(documents: Iterable[Document], what: str = "records") -> Iterator[list[Document]]:
    """``documents`` in lists of bounded size; on a terminal, standard error shows how many are done."""
    batch: list[Document] = []
    size = done = 0
    with _Counter(what) as counter:
        for document in documents:
            batch.append(document)
            size += len(document.text)
            if len(batch) == RECORDS or size >= CHARACTERS:
                yield batch
                done += len(batch)
                counter.show(done)
                batch, size = [], 0
        if batch:
            yield batch


def encode(model: Model | Encoder, tokenizer: Tokenizer, documents: Sequence[Document]) -> list[Tensor]:
    """The ids of each document. Raises InputError and TokenizerError that name it."""
    from crocuta.inference.batches import to_ids

    rows = []
    for document in documents:
        with naming([document]):
            rows.append(to_ids(model, tokenizer, document.text, "sequence 0"))
    return rows


@contextlib.contextmanager
def naming(documents: Sequence[Document]) -> Iterator[None]:
    """Errors that speak of "sequence 3" get that document's id; of a single document, all errors do."""
    try:
        yield
    except CrocutaError as error:
        what = re.sub(r"\bsequence (\d+)\b", lambda match: f"record {documents[int(match[1])].id!r}", error.what)
        if what == error.what and len(documents) == 1:
            what = f"record {documents[0].id!r}: {what}"
        raise type(error)(what, given=error.given, expected=error.expected, fix=error.fix) from error


def _stdin_head() -> bytes:
    """The first bytes of standard input, unpacked, which stay to be read. Waits for them."""
    head = cast(io.BufferedReader, sys.stdin.buffer).peek(1)
    try:
        if head.startswith(b"\x1f\x8b"):
            return zlib.decompressobj(wbits=31).decompress(head, 1024)
        if head.startswith(b"\xfd7zXZ\x00"):
            return lzma.LZMADecompressor().decompress(head, 1024)
    except (zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{input_name('-')} holds broken compressed data", given=error) from error
    return head


class _Counter:
    """A number on a terminal's standard error, not more often than four times a second."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._live = sys.stderr.isatty()
        self._last = time.monotonic()
        self._shown = False

    def __enter__(self) -> _Counter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def show(self, count: int) -> None:
        now = time.monotonic()
        if self._live and now - self._last > 0.25:
            self._last, self._shown = now, True
            sys.stderr.write(f"\r{count:,} {self._what}")
            sys.stderr.flush()
