"""Token files in Megatron's ``.bin``/``.idx`` layout, with a JSON file beside them that says what the ids mean.

    PREFIX.bin   the tokens of all sequences end to end, little-endian
    PREFIX.idx   "MMIDIDX\\0\\0", u64 version 1, u8 dtype code, u64 sequences, u64 length of the document index,
                 i32 lengths [sequences], i64 byte offsets [sequences], i64 document index
    PREFIX.json  TokenFileInfo (ours; absent in files of others)

The document index holds the number of the first sequence of each document, and the number of sequences at its end.
We write one sequence a document, and more only where a length would not fit 32 bits.
Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py (also the format of Savanna and BioNeMo).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from crocuta.data.files import PathLike, replace_file
from crocuta.errors import ConfigError, InputError, SequenceFormatError, TokenizerError
from crocuta.schema import decode, encode
from crocuta.tokenizers.base import Tokenizer

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_MAX_SEQUENCE = 2**31 - 1
_MAX_INFO_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFileInfo:
    """What PREFIX.json holds."""

    format: Literal["crocuta-tokens-1"] = "crocuta-tokens-1"
    tokenizer: dict[str, Any]
    tokenizer_hash: str
    sources: tuple[str, ...]
    documents: int
    tokens: int
    append_eos: bool


def token_dtype(num_ids: int) -> np.dtype[Any]:
    """The smallest of uint8, uint16 and int32 that holds the ids 0..num_ids-1. Raises InputError."""
    if not 1 <= num_ids <= 2**31:
        raise InputError("no token type holds such a vocabulary", given=num_ids, expected="1 to 2^31 ids")
    return np.dtype("<u1" if num_ids <= 2**8 else "<u2" if num_ids <= 2**16 else "<i4")


@final
class MegatronWriter:
    """Takes tokens document by document, in constant memory but for 12 bytes a document. Made by write_megatron."""

    def __init__(self, stream: IO[bytes], num_ids: int):
        self._stream, self._num_ids = stream, num_ids
        self._dtype = token_dtype(num_ids)
        self._lengths, self._documents = array("i"), array("q", [0])
        self._length = 0  # of the sequence being written
        self.num_tokens = 0

    @property
    def num_documents(self) -> int:
        return len(self._documents) - 1

    def append(self, ids: NDArray[np.int64]) -> None:
        """More tokens [l] of the current document. Raises TokenizerError outside the vocabulary."""
        outside = (ids < 0) | (ids >= self._num_ids)
        if outside.any():
            expected = f"0 to {self._num_ids - 1}"
            raise TokenizerError("an id is outside the vocabulary", given=int(ids[outside][0]), expected=expected)
        self._stream.write(ids.astype(self._dtype).tobytes())
        self.num_tokens += len(ids)
        self._length += len(ids)
        while self._length > _MAX_SEQUENCE:
            self._lengths.append(_MAX_SEQUENCE)
            self._length -= _MAX_SEQUENCE

    def end_document(self) -> None:
        """The document is complete; the next ``append`` starts another."""
        self._lengths.append(self._length)
        self._documents.append(len(self._lengths))
        self._length = 0

    def index(self) -> bytes:
        """The content of PREFIX.idx. Raises InputError where there are no tokens."""
        assert self._length == 0, "the last document was not ended"
        if not self.num_tokens:
            raise InputError("there are no tokens to write", given=f"{self.num_documents} documents")
        code = next(code for code, name in _DTYPES.items() if np.dtype(name) == self._dtype)
        lengths = np.array(self._lengths, "<i4")
        offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * self._dtype.itemsize
        header = _HEADER.pack(_MAGIC, 1, code, len(lengths), len(self._documents))
        documents = np.array(self._documents, "<i8")
        return header + lengths.tobytes() + offsets.astype("<i8").tobytes() + documents.tobytes()


@contextlib.contextmanager
def write_megatron(
    prefix: PathLike,
    tokenizer: Tokenizer,
    *,
    sources: Sequence[str] = (),
    append_eos: bool = False,
    overwrite: bool = False,
) -> Iterator[MegatronWriter]:
    """Token files at ``prefix`` that appear whole when the block ends; an exception leaves what was there.

    >>> with write_megatron("data/train", tokenizer, sources=["genome.fa"]) as writer:
    ...     writer.append(tokenizer.encode("ACGT"))
    ...     writer.end_document()

    Raises:
        InputError: PREFIX.idx exists (and not ``overwrite``), the folder is not writable, or there are no tokens.
        TokenizerError: an id that the tokenizer does not have.
    """
    bin_path, idx_path, json_path = (Path(f"{prefix}.{suffix}") for suffix in ("bin", "idx", "json"))
    if idx_path.exists() and not overwrite:
        raise InputError(f"{idx_path} exists", fix="choose another output prefix, or ask to overwrite it")
    with replace_file(bin_path) as stream:
        writer = MegatronWriter(stream, tokenizer.num_ids)
        yield writer
        index = writer.index()
        # The index goes first and comes last: at no moment does an index stand beside tokens that are not its own.
        idx_path.unlink(missing_ok=True)
    info = TokenFileInfo(
        tokenizer=tokenizer.spec(),
        tokenizer_hash=tokenizer.content_hash(),
        sources=tuple(sources),
        documents=writer.num_documents,
        tokens=writer.num_tokens,
        append_eos=append_eos,
    )
    with replace_file(json_path) as stream:
        stream.write(json.dumps(encode(info), indent=2).encode() + b"\n")
    with replace_file(idx_path) as stream:
        stream.write(index)


@final
class MegatronDataset:
    """Token files opened for reading: mapped, not loaded.

    Attributes:
        tokens: every token of the file [l], in the type it is stored in; a read-only map.
        document_offsets: int64 [documents + 1]; document i is tokens[document_offsets[i] : document_offsets[i+1]].
        info: what PREFIX.json says, or None where there is no such file.

    Raises:
        InputError: a file is missing.
        SequenceFormatError: anything in the header, the index or the sizes that does not fit together.
    """

    def __init__(self, prefix: PathLike):
        self.prefix = str(prefix)
        self._index_path, self._bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        index = self._read_index()
        dtype, lengths, documents = index
        ends = np.cumsum(lengths, dtype=np.int64)
        self.document_offsets: NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), ends])[documents]
        num_bytes = _size(self._bin_path)
        num_tokens = int(ends[-1]) if len(ends) else 0
        if num_bytes != num_tokens * dtype.itemsize:
            raise SequenceFormatError(
                f"{self._bin_path} does not have the size that its index says",
                given=f"{num_bytes} bytes",
                expected=f"{num_tokens * dtype.itemsize} ({num_tokens} tokens of {dtype.name})",
            )
        if not num_tokens:
            raise SequenceFormatError(f"{self._bin_path} holds no tokens", expected="at least one")
        self.tokens: NDArray[Any] = np.asarray(np.memmap(self._bin_path, dtype=dtype, mode="r"))
        self.info = self._read_info()

    def __len__(self) -> int:
        return len(self.document_offsets) - 1

    def document(self, index: int) -> NDArray[Any]:
        """The tokens of document ``index`` [l], not copied."""
        return self.tokens[self.document_offsets[index] : self.document_offsets[index + 1]]

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises TokenizerError where PREFIX.json names a tokenizer that gives other ids."""
        if self.info is not None and self.info.tokenizer_hash != tokenizer.content_hash():
            raise TokenizerError(
                f"{self.prefix} was made with another tokenizer",
                given=json.dumps(self.info.tokenizer),
                expected=json.dumps(tokenizer.spec()),
                fix="prepare the data again",
            )

    def _read_index(self) -> tuple[np.dtype[Any], NDArray[np.int32], NDArray[np.int64]]:
        size = _size(self._index_path)
        with open(self._index_path, "rb") as stream:
            header = stream.read(_HEADER.size)
            if len(header) < _HEADER.size or not header.startswith(_MAGIC):
                raise self._broken("is no Megatron index", given=repr(header[:9]), expected=repr(_MAGIC))
            _, version, code, num_sequences, num_documents = _HEADER.unpack(header)
            if version != 1:
                raise self._broken("has an unknown version", given=version, expected=1)
            if code not in _DTYPES:
                raise self._broken(
                    "has an unknown token type", given=f"code {code}", expected=f"one of {list(_DTYPES)}"
                )
            # Checked before anything is allocated: the counts may be any 64-bit numbers.
            expected = _HEADER.size + 12 * num_sequences + 8 * num_documents
            if size != expected:
                given = f"{size} bytes for {num_sequences} sequences and {num_documents} document entries"
                raise self._broken("does not have the size that its header says", given=given, expected=expected)
            lengths = np.frombuffer(stream.read(4 * num_sequences), "<i4")
            offsets = np.frombuffer(stream.read(8 * num_sequences), "<i8")
            documents = np.frombuffer(stream.read(8 * num_documents), "<i8")
        dtype = np.dtype(_DTYPES[code])
        self._check_index(dtype, lengths, offsets, documents)
        return dtype, lengths, documents

    def _check_index(
        self,
        dtype: np.dtype[Any],
        lengths: NDArray[np.int32],
        offsets: NDArray[np.int64],
        documents: NDArray[np.int64],
    ) -> None:
        if (lengths < 0).any():
            position = int((lengths < 0).argmax())
            raise self._broken(f"has a negative length at sequence {position}", given=int(lengths[position]))
        expected = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
        if not np.array_equal(offsets, expected):
            position = int((offsets != expected).argmax())
            raise self._broken(
                f"has a wrong offset at sequence {position}",
                given=int(offsets[position]),
                expected=f"{int(expected[position])}: sequences end to end",
            )
        whole = len(documents) > 0 and documents[0] == 0 and documents[-1] == len(lengths)
        if not whole or (np.diff(documents) < 0).any():
            raise self._broken("has a broken document index", expected=f"rising from 0 to {len(lengths)}")

    def _read_info(self) -> TokenFileInfo | None:
        path = Path(f"{self.prefix}.json")
        try:
            with open(path, "rb") as stream:
                text = stream.read(_MAX_INFO_BYTES)
        except FileNotFoundError:
            return None
        try:
            info = decode(TokenFileInfo, json.loads(text))
        except (ConfigError, ValueError, RecursionError) as error:
            raise SequenceFormatError(f"{path} is broken", given=str(error), expected="what 'prepare' wrote") from error
        if (info.documents, info.tokens) != (len(self), len(self.tokens)):
            raise SequenceFormatError(
                f"{path} belongs to other token files",
                given=f"{info.documents} documents, {info.tokens} tokens",
                expected=f"{len(self)} documents, {len(self.tokens)} tokens",
            )
        return info

    def _broken(self, reason: str, *, given: object = None, expected: object = None) -> SequenceFormatError:
        return SequenceFormatError(f"{self._index_path} {reason}", given=given, expected=expected)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise InputError(f"cannot read {path}", given=error.strerror, expected="PREFIX.bin and PREFIX.idx") from error
