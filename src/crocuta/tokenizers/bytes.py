"""Bytes as tokens: id = byte value (Evo 1, Evo 2; and any UTF-8 text)."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from crocuta.errors import TokenizerError
from crocuta.schema import encode as encode_json
from crocuta.tokenizers.base import Ids, Tokenizer, as_bytes, as_ids
from crocuta.tokenizers.incremental import IncrementalDecoder
from crocuta.tokenizers.nucleotides import COMPLEMENT


@final
@dataclass(frozen=True, kw_only=True)
class ByteTokenizer(Tokenizer):
    """id = byte of the UTF-8 text; ids 256 to vocab_size-1 pad the embedding and stand for no byte.

    eos_id is 0 and pad_id is 1, as in ``CharLevelTokenizer(512)`` of togethercomputer/stripedhyena
    (``tokenizer.py``) and Evo; so the bytes 0 and 1 are not for text. ``decode`` keeps them, so that
    decode(encode(text)) == text always, and leaves out ids that stand for no byte.
    """

    type: ClassVar[str] = "bytes"
    concatenates: ClassVar[bool] = True
    vocab_size: int = 512
    bos_is_eos: bool = False
    """Whether the token that ends a text also begins one (bos_id 0), as where Evo scores with ``prepend_bos``."""
    eos_id = 0
    bos_id = None
    pad_id = 1
    num_ids = 256

    def __post_init__(self) -> None:
        if self.vocab_size < 256:
            raise TokenizerError(
                "vocab_size is too small for bytes", given=self.vocab_size, expected=">= 256 (Evo: 512)"
            )
        if self.bos_is_eos:
            object.__setattr__(self, "bos_id", self.eos_id)

    @cached_property
    def complement_ids(self) -> NDArray[np.int64]:
        """ASCII nucleotide codes of both cases to their complement; every other id is itself."""
        table = np.arange(self.vocab_size)
        table[:256] = np.frombuffer(COMPLEMENT, np.uint8)
        table.setflags(write=False)
        return table

    def encode(self, text: str | bytes) -> NDArray[np.int64]:
        return np.frombuffer(as_bytes(text), np.uint8).astype(np.int64)

    def decode(self, ids: Ids) -> str:
        """Bytes that are not UTF-8 read U+FFFD; ids >= 256 are left out."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Ids) -> bytes:
        """The exact bytes of ``ids``; ids >= 256 are left out. Raises TokenizerError."""
        array = as_ids(ids, self.vocab_size)
        return array[array < 256].astype(np.uint8).tobytes()

    def incremental_decoder(self) -> IncrementalDecoder:
        return ByteIncrementalDecoder(self)

    def spec(self) -> dict[str, Any]:
        return encode_json(self)

    def _definition(self) -> dict[str, Any]:
        return {name: value for name, value in self.spec().items() if name != "bos_is_eos"}


@final
class ByteIncrementalDecoder(IncrementalDecoder):
    """Holds back at most three bytes: those of a character that is not complete yet."""

    def __init__(self, tokenizer: ByteTokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)
