"""Documents to tokens: into token files, or into memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crocuta.data.fasta import Case
from crocuta.data.files import PathLike, input_name
from crocuta.data.megatron import token_dtype, write_megatron
from crocuta.data.text import Document, Format, read_documents
from crocuta.data.windows import TokenSource
from crocuta.errors import InputError, TokenizerError
from crocuta.tokenizers.base import Tokenizer

_SLICE = 4 << 20  # characters encoded at once: ids are int64, eight times the text


@dataclass(frozen=True, kw_only=True)
class PrepareSummary:
    """What ``prepare`` wrote: PREFIX.bin, PREFIX.idx and PREFIX.json."""

    prefix: str
    documents: int
    tokens: int
    bytes: int
    tokenizer_hash: str


def prepare(
    inputs: Sequence[PathLike] | PathLike,
    tokenizer: Tokenizer,
    output_prefix: PathLike,
    *,
    format: Format = "auto",
    field: str = "text",
    case: Case = "upper",
    append_eos: bool | None = None,
    overwrite: bool = False,
) -> PrepareSummary:
    """Tokenise the documents of ``inputs`` (see ``read_documents``) into token files at ``output_prefix``.

    ``append_eos`` puts the tokenizer's end-of-sequence id after every document; None does so where it has one.

    Raises:
        InputError: a missing input, or an output that exists (and not ``overwrite``).
        SequenceFormatError: a broken input; nothing is written then.
        TokenizerError: text that the tokenizer refuses, or ``append_eos`` without such an id.
    """
    paths = [inputs] if isinstance(inputs, PathLike) else list(inputs)
    documents = read_documents(paths, format, field=field, case=case)
    sources = [input_name(path) for path in paths]
    return prepare_documents(
        documents, tokenizer, output_prefix, sources=sources, append_eos=append_eos, overwrite=overwrite
    )


def prepare_documents(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    output_prefix: PathLike,
    *,
    sources: Sequence[str] = (),
    append_eos: bool | None = None,
    overwrite: bool = False,
) -> PrepareSummary:
    """As ``prepare``, for documents from anywhere; ``sources`` names them in PREFIX.json."""
    eos = _eos(tokenizer, append_eos)
    with write_megatron(
        output_prefix, tokenizer, sources=sources, append_eos=bool(len(eos)), overwrite=overwrite
    ) as writer:
        for document in documents:
            for ids in _encode(document, tokenizer):
                writer.append(ids)
            writer.append(eos)
            writer.end_document()
    return PrepareSummary(
        prefix=str(output_prefix),
        documents=writer.num_documents,
        tokens=writer.num_tokens,
        bytes=Path(f"{output_prefix}.bin").stat().st_size,
        tokenizer_hash=tokenizer.content_hash(),
    )


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer, *, append_eos: bool | None = None) -> TokenSource:
    """The tokens of ``documents`` in memory, in the smallest type that holds them. Raises as ``prepare``."""
    eos, dtype = _eos(tokenizer, append_eos), token_dtype(tokenizer.num_ids)
    pieces: list[NDArray[np.integer]] = []
    offsets = [0]
    for document in documents:
        new = [ids.astype(dtype) for ids in [*_encode(document, tokenizer), eos]]
        pieces += new
        offsets.append(offsets[-1] + sum(map(len, new)))
    if not offsets[-1]:
        raise InputError("the documents hold no tokens", given=f"{len(offsets) - 1} documents", expected="text")
    return TokenSource.from_array(np.concatenate(pieces), np.array(offsets))


def _encode(document: Document, tokenizer: Tokenizer) -> Iterator[NDArray[np.int64]]:
    text = document.text
    size = _SLICE if tokenizer.concatenates else max(len(text), 1)
    for start in range(0, len(text), size):
        try:
            yield tokenizer.encode(text[start : start + size])
        except TokenizerError as error:
            where = f" (counted from {start})" if start else ""
            raise TokenizerError(
                f"document {document.id!r}: {error.what}{where}",
                given=error.given,
                expected=error.expected,
                fix=error.fix,
            ) from error


def _eos(tokenizer: Tokenizer, append_eos: bool | None) -> NDArray[np.int64]:
    if append_eos and tokenizer.eos_id is None:
        raise TokenizerError(
            "append_eos needs an end-of-sequence id",
            given=f"the tokenizer {tokenizer.spec()}",
            fix="name its eos piece",
        )
    wanted = append_eos is not False and tokenizer.eos_id is not None
    return np.array([tokenizer.eos_id] if wanted else [], dtype=np.int64)
