"""The token stream that training and evaluation read: views over arrays and token files, split without overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from crocuta.data.files import PathLike
from crocuta.data.megatron import MegatronDataset
from crocuta.errors import InputError, TokenizerError
from crocuta.tokenizers.base import Tokenizer

_CHECK_BLOCK = 16 << 20


@final
class TokenSource:
    """A read-only stream of token ids: slices of arrays (in memory or mapped) laid end to end, nothing copied.

    ``document_offsets`` int64 [documents + 1] says where documents begin and end in the stream; a view that cuts a
    document keeps its parts as documents.
    """

    def __init__(
        self, arrays: Sequence[NDArray[Any]], segments: NDArray[np.int64], document_offsets: NDArray[np.int64]
    ):
        """``segments`` [s, 3]: index of an array, start and stop in it. For users: from_array and open."""
        self._arrays = tuple(arrays)
        self._segments = segments
        self._offsets = _offsets(segments[:, 2] - segments[:, 1])
        self.document_offsets = document_offsets

    @classmethod
    def from_array(
        cls, tokens: NDArray[np.integer[Any]], document_offsets: NDArray[np.int64] | None = None
    ) -> TokenSource:
        """A stream over ``tokens`` [l], one document unless ``document_offsets`` says otherwise. Raises InputError."""
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not tokens.size:
            raise InputError(
                "tokens must be one row of integers",
                given=f"{tokens.dtype} {list(tokens.shape)}",
                expected="[l], l > 0",
            )
        documents = np.array([0, len(tokens)]) if document_offsets is None else document_offsets.astype(np.int64)
        if documents[0] != 0 or documents[-1] != len(tokens) or (np.diff(documents) < 0).any():
            raise InputError("document offsets must rise from 0 to the end", expected=f"0 ... {len(tokens)}")
        return cls([tokens], np.array([[0, 0, len(tokens)]]), documents)

    @classmethod
    def open(cls, prefixes: Sequence[PathLike] | PathLike, tokenizer: Tokenizer | None = None) -> TokenSource:
        """The token files at ``prefixes``, one after the other.

        With ``tokenizer``, files that name another one are refused (TokenizerError). Raises as MegatronDataset.
        """
        paths = [prefixes] if isinstance(prefixes, PathLike) else list(prefixes)
        if not paths:
            raise InputError("there are no token files to open", expected="at least one prefix")
        datasets = [MegatronDataset(path) for path in paths]
        if tokenizer is not None:
            for dataset in datasets:
                dataset.check_tokenizer(tokenizer)
        lengths = np.array([len(dataset.tokens) for dataset in datasets])
        starts = _offsets(lengths)
        segments = np.stack([np.arange(len(datasets)), np.zeros_like(lengths), lengths], axis=1)
        documents = [dataset.document_offsets[1:] + start for dataset, start in zip(datasets, starts)]
        return cls(
            [dataset.tokens for dataset in datasets],
            segments,
            np.concatenate([np.zeros(1, np.int64), *documents]),
        )

    def __len__(self) -> int:
        return int(self._offsets[-1])

    @property
    def num_documents(self) -> int:
        """Documents, or parts of documents, in the stream."""
        return len(self.document_offsets) - 1

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """A copy of tokens start ... start+length-1 [l]. Raises InputError outside the stream."""
        if not 0 <= start <= start + length <= len(self):
            raise InputError(
                "cannot read outside the stream",
                given=f"{start} to {start + length}",
                expected=f"0 to {len(self)}",
            )
        out, done = np.empty(length, np.int64), 0
        index = int(np.searchsorted(self._offsets, start, side="right")) - 1
        skip = start - int(self._offsets[index])
        while done < length:
            which, begin, end = self._segments[index]
            piece = self._arrays[which][begin + skip : min(end, begin + skip + length - done)]
            out[done : done + len(piece)] = piece
            done, index, skip = done + len(piece), index + 1, 0
        return out

    def slice(self, start: int, stop: int) -> TokenSource:
        """The view of tokens start ... stop-1. Raises InputError where that is empty or outside."""
        if not 0 <= start < stop <= len(self):
            raise InputError(
                "cannot cut the stream so", given=f"{start} to {stop}", expected=f"inside 0 to {len(self)}"
            )
        inside = self.document_offsets[(self.document_offsets > start) & (self.document_offsets < stop)]
        documents = np.concatenate([[start], inside, [stop]]) - start
        return self._view(np.array([start]), np.array([stop]), documents)

    def select_documents(self, keep: NDArray[np.bool_]) -> TokenSource:
        """The view of the documents where ``keep`` [documents] holds. Raises InputError where that is no token."""
        starts, stops = self.document_offsets[:-1][keep], self.document_offsets[1:][keep]
        documents = _offsets(stops - starts)
        if not documents[-1]:
            raise InputError("the chosen documents hold no tokens", given=f"{len(starts)} documents")
        joined = np.flatnonzero(starts[1:] != stops[:-1])  # neighbours make one run
        firsts, lasts = np.concatenate([[0], joined + 1]), np.concatenate([joined, [len(starts) - 1]])
        return self._view(starts[firsts], stops[lasts], documents)

    def check_ids(self, vocab_size: int) -> None:
        """Read the whole stream once; raises TokenizerError for an id outside 0..vocab_size-1."""
        for which, begin, end in self._segments:
            for start in range(begin, end, _CHECK_BLOCK):
                block = self._arrays[which][start : min(end, start + _CHECK_BLOCK)]
                for worst in (int(block.min()), int(block.max())):
                    if not 0 <= worst < vocab_size:
                        raise TokenizerError(
                            "the data holds an id outside the vocabulary",
                            given=worst,
                            expected=f"0 to {vocab_size - 1}",
                        )

    def _view(self, starts: NDArray[np.int64], stops: NDArray[np.int64], documents: NDArray[np.int64]) -> TokenSource:
        """The ranges [starts, stops) of the stream (not empty, in order), cut where segments meet."""
        first = np.searchsorted(self._offsets, starts, side="right") - 1
        last = np.searchsorted(self._offsets, stops, side="left") - 1
        counts = last - first + 1
        segment = np.arange(counts.sum()) + np.repeat(first - _offsets(counts)[:-1], counts)
        base, offset = self._segments[segment], self._offsets[segment]
        begin = base[:, 1] + np.maximum(np.repeat(starts, counts) - offset, 0)
        end = np.minimum(base[:, 2], base[:, 1] + np.repeat(stops, counts) - offset)
        return TokenSource(self._arrays, np.stack([base[:, 0], begin, end], axis=1), documents)


def split(
    source: TokenSource, held_out: float, by: Literal["position", "record"] = "position", *, seed: int = 0
) -> tuple[TokenSource, TokenSource]:
    """(train, held_out): two views of ``source`` that share no token.

    by="position": the last ``held_out`` fraction of the stream is held out. by="record": whole documents are, each
    with probability ``held_out`` by a hash of (seed, its index), so that documents added later at the end move
    no earlier one to the other side; where chance leaves one side empty, the document of extreme hash goes there.

    Raises:
        InputError: a fraction outside (0, 1), an unknown ``by``, or too few tokens or documents to split.
    """
    if not 0 < held_out < 1:
        raise InputError("the held-out fraction is impossible", given=held_out, expected="0 < fraction < 1")
    match by:
        case "position":
            if len(source) < 2:
                raise InputError("too few tokens to split", given=len(source), expected=">= 2")
            cut = min(max(round(len(source) * (1 - held_out)), 1), len(source) - 1)
            return source.slice(0, cut), source.slice(cut, len(source))
        case "record":
            return _split_by_record(source, held_out, seed)
    raise InputError("unknown way to split", given=repr(by), expected="'position' or 'record'")


def _split_by_record(source: TokenSource, held_out: float, seed: int) -> tuple[TokenSource, TokenSource]:
    filled = np.flatnonzero(np.diff(source.document_offsets))
    if len(filled) < 2:
        raise InputError(
            "too few documents to split by record",
            given=len(filled),
            expected=">= 2",
            fix="split by position",
        )
    hashes = _hash(np.arange(source.num_documents), seed)
    out = hashes < np.uint64(held_out * 2.0**64)
    if not out[filled].any():
        out[filled[hashes[filled].argmin()]] = True
    if out[filled].all():
        out[filled[hashes[filled].argmax()]] = False
    return source.select_documents(~out), source.select_documents(out)


class Windows(NamedTuple):
    """Evaluation windows, each [n, l]: see ``held_out_windows``."""

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]
    mask: NDArray[np.bool_]


def held_out_windows(source: TokenSource, length: int, context: int = 0) -> Windows:
    """Windows in which every token but the first of the stream is a target exactly once.

    Row i holds the ``length`` inputs from i · (length - context) on; targets are the tokens one place on. But for
    row 0, its first ``context`` targets were counted in the row before and only give context here. ``mask`` is True
    where a target counts, mask.sum() == len(source) - 1; past the end of the stream ids are 0. With context 0 each
    row starts without any, so a sum of losses over rows is an upper bound of the stream's code length.

    Raises:
        InputError: ``length`` < 1, a context not in 0 .. length - 1, or a stream of less than two tokens.
    """
    num_targets = len(source) - 1
    if length < 1 or num_targets < 1 or not 0 <= context < length:
        raise InputError(
            "cannot cut evaluation windows",
            given=f"length {length}, context {context}, {len(source)} tokens",
            expected="length >= 1, 0 <= context < length and at least 2 tokens",
        )
    stride = length - context
    rows = max(1, -(-(num_targets - context) // stride))
    tokens = np.zeros(rows * stride + context + 1, np.int64)
    tokens[: len(source)] = source.read(0, len(source))
    place = stride * np.arange(rows)[:, None] + np.arange(length)
    mask = (place < num_targets) & ((np.arange(length) >= context) | (np.arange(rows) == 0)[:, None])
    return Windows(np.where(place < num_targets, tokens[place], 0), tokens[place + 1], mask)


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _hash(values: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea and Flood 2014) of each value, from a start that ``seed`` sets."""
    mixed = values.astype(np.uint64) + _mix(np.array([seed], np.uint64))
    return _mix(mixed)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
