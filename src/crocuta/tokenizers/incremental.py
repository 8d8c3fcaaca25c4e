"""Decoding one token at a time without ever showing half a character."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import final

_INCOMPLETE = "\ufffd"  # what decoders show for bytes that are not yet, or never, a character


class IncrementalDecoder(ABC):
    """Turns a stream of ids into a stream of complete text.

    The pieces returned by ``feed``, followed by that of ``finish``, join to ``tokenizer.decode(all ids)``.
    """

    @abstractmethod
    def feed(self, token: int) -> str:
        """The text that ``token`` completes, often empty. Raises TokenizerError outside the vocabulary."""

    @abstractmethod
    def finish(self) -> str:
        """What was held back; an unfinished character reads U+FFFD."""


@final
class IndependentDecoder(IncrementalDecoder):
    """For tokenizers in which every id has its own text, whatever stands around it."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode

    def feed(self, token: int) -> str:
        return self._decode([token])

    def finish(self) -> str:
        return ""


@final
class DifferenceDecoder(IncrementalDecoder):
    """For any tokenizer: the text that one more id adds to the decoding of a short suffix of the stream.

    The suffix starts at an earlier piece, because decoders treat the first id of a text in its own way (a
    SentencePiece decoder strips its space).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []  # shown ids that give the context, then ids not yet shown
        self._num_shown = 0

    def feed(self, token: int) -> str:
        self._ids.append(token)
        shown, text = self._decode(self._ids[: self._num_shown]), self._decode(self._ids)
        if len(text) <= len(shown) or text.endswith(_INCOMPLETE):
            return ""
        self._ids = self._ids[self._num_shown :]
        self._num_shown = len(self._ids)
        return text[len(shown) :]

    def finish(self) -> str:
        shown, text = self._decode(self._ids[: self._num_shown]), self._decode(self._ids)
        self._num_shown = len(self._ids)
        return text[len(shown) :]
