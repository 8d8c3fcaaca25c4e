"""What every tokenizer is: an invertible map between text and ids, described by a small JSON object."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from crocuta.errors import TokenizerError
from crocuta.tokenizers.incremental import IncrementalDecoder

CONFIG_FILE = "tokenizer_config.json"

Ids: TypeAlias = "Sequence[int] | NDArray[np.integer[Any]]"


class Tokenizer(ABC):
    """Text <-> ids. ``encode`` adds no special tokens; whoever wants them adds ``bos_id`` and ``eos_id``."""

    type: ClassVar[str]
    concatenates: ClassVar[bool]
    """Whether encode(a + b) is encode(a) followed by encode(b): long text may then be encoded in slices."""
    vocab_size: int
    """Number of ids that a model's embedding must have; may be padded beyond those in use."""
    eos_id: int | None
    bos_id: int | None
    pad_id: int
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    """Special tokens that the model's publisher puts around a sequence; ``encode`` leaves them to its caller."""

    @property
    @abstractmethod
    def num_ids(self) -> int:
        """One more than the largest id that ``encode`` and the special tokens use; at most ``vocab_size``."""

    @property
    def complement_ids(self) -> NDArray[np.int64] | None:
        """Table [v] id -> id of the complementary base, or None where the ids are not nucleotides."""
        return None

    @abstractmethod
    def encode(self, text: str | bytes) -> NDArray[np.int64]:
        """The ids [l] of ``text``, no special tokens added. Raises TokenizerError."""

    @abstractmethod
    def decode(self, ids: Ids) -> str:
        """The text of ``ids`` [l]. Raises TokenizerError for an id outside the vocabulary."""

    @abstractmethod
    def incremental_decoder(self) -> IncrementalDecoder:
        """A decoder for ids that arrive one at a time."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """The JSON object that ``make_tokenizer`` reads and ``save`` writes: "type" and every option."""

    def content_hash(self) -> str:
        """SHA-256 (hex) of the definition: equal hashes mean equal ids for equal text."""
        text = json.dumps(self._definition(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer_config.json`` (and what it refers to) into ``folder``, made if absent."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(json.dumps(self.spec(), indent=2) + "\n", encoding="utf-8")

    def _definition(self) -> dict[str, Any]:
        """What the hash covers: everything that decides the ids."""
        return self.spec()


def as_bytes(text: str | bytes) -> bytes:
    """UTF-8 of ``text``. Raises TokenizerError for a lone surrogate or another type."""
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise TokenizerError("cannot encode this type", given=type(text).__name__, expected="str or bytes")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the character at position {error.start} has no UTF-8 form",
            given=ascii(text[error.start]),
            expected="Unicode text without lone surrogates",
        ) from error


def as_ids(ids: Ids, vocab_size: int) -> NDArray[np.int64]:
    """``ids`` as an int64 array [l], each in 0..vocab_size-1. Raises TokenizerError."""
    array = np.asarray(ids)
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TokenizerError(
            "ids must be one row of integers",
            given=f"{array.dtype} {list(array.shape)}",
            expected="integers [l]",
        )
    outside = (array < 0) | (array >= vocab_size)
    if outside.any():
        position = int(outside.argmax())
        raise TokenizerError(
            f"the id at position {position} is outside the vocabulary",
            given=int(array[position]),
            expected=f"0 to {vocab_size - 1}",
        )
    return array.astype(np.int64)
