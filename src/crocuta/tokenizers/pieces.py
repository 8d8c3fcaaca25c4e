"""Sub-word pieces from a ``tokenizer.json``, through the optional ``tokenizers`` package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from crocuta.errors import MissingExtraError, TokenizerError
from crocuta.schema import encode as encode_json
from crocuta.tokenizers.base import Ids, Tokenizer, as_bytes, as_ids
from crocuta.tokenizers.incremental import DifferenceDecoder, IncrementalDecoder

DEFINITION_FILE = "tokenizer.json"
_MAX_DEFINITION_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class PiecesOptions:
    """Where the definition is, and which of its pieces are the special tokens."""

    type: ClassVar[str] = "pieces"
    file: str = DEFINITION_FILE
    eos: str | None = None
    bos: str | None = None
    pad: str | None = None


@final
class PiecesTokenizer(Tokenizer):
    """The tokenizer that ``definition`` (the text of a tokenizer.json) describes.

    ``eos``, ``bos`` and ``pad`` are pieces, such as "</s>". Without ``pad``, pad_id is eos_id, or else 0.
    Text is text: a special token written out in it is split into ordinary pieces and never becomes its id.
    Truncation and padding that the definition asks for are switched off.

    Raises:
        MissingExtraError: the ``tokenizers`` package is not installed.
        TokenizerError: the definition is broken, or lacks one of the named pieces.
    """

    type: ClassVar[str] = "pieces"
    concatenates: ClassVar[bool] = False

    def __init__(
        self, definition: str, *, eos: str | None = None, bos: str | None = None, pad: str | None = None
    ) -> None:
        self._text = definition
        self._options = PiecesOptions(eos=eos, bos=bos, pad=pad)
        backend = _import_backend()
        with _guarded("the tokenizer.json cannot be used"):
            self._backend = backend.Tokenizer.from_str(definition)
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True
            vocabulary = self._backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise TokenizerError("the tokenizer.json has an empty vocabulary", expected="at least one piece")
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = _special(vocabulary, "eos", eos)
        self.bos_id = _special(vocabulary, "bos", bos)
        pad_id = _special(vocabulary, "pad", pad)
        self.pad_id = pad_id if pad_id is not None else self.eos_id or 0

    @classmethod
    def from_file(
        cls, path: str | Path, *, eos: str | None = None, bos: str | None = None, pad: str | None = None
    ) -> PiecesTokenizer:
        """Read ``path``, a tokenizer.json. Raises TokenizerError naming the file."""
        return cls(_read_definition(Path(path)), eos=eos, bos=bos, pad=pad)

    @property
    def definition(self) -> str:
        """The text of the tokenizer.json."""
        return self._text

    @property
    def num_ids(self) -> int:
        return self.vocab_size

    def encode(self, text: str | bytes) -> NDArray[np.int64]:
        """Raises TokenizerError for bytes that are not UTF-8."""
        data = as_bytes(text)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(
                f"the byte at position {error.start} is not UTF-8",
                given=hex(data[error.start]),
                expected="UTF-8",
            ) from error
        with _guarded("the tokenizer cannot encode this text"):
            return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: Ids) -> str:
        """The text of ``ids`` without special tokens."""
        array = as_ids(ids, self.vocab_size)
        with _guarded("the tokenizer cannot decode these ids"):
            return self._backend.decode(array.tolist(), skip_special_tokens=True)

    def incremental_decoder(self) -> IncrementalDecoder:
        return DifferenceDecoder(self.decode)

    def spec(self) -> dict[str, Any]:
        return encode_json(self._options)

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer_config.json`` and ``tokenizer.json``, the latter byte for byte as it was read."""
        super().save(folder)
        (Path(folder) / DEFINITION_FILE).write_bytes(self._text.encode("utf-8"))

    def _definition(self) -> dict[str, Any]:
        return {**self.spec(), "file": hashlib.sha256(self._text.encode("utf-8")).hexdigest()}


def _read_definition(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _MAX_DEFINITION_BYTES:
            raise TokenizerError(
                f"{path} is too large for a tokenizer.json",
                given=size,
                expected=f"<= {_MAX_DEFINITION_BYTES} bytes",
            )
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise TokenizerError(
            f"cannot read {path}", given=error.strerror, expected="the tokenizer.json of the model"
        ) from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8", given=str(error), expected="a tokenizer.json") from error


def _special(vocabulary: dict[str, int], name: str, piece: str | None) -> int | None:
    if piece is None:
        return None
    if piece not in vocabulary:
        raise TokenizerError(
            f"the vocabulary has no piece for {name}",
            given=repr(piece),
            expected="a piece of the tokenizer.json",
        )
    return vocabulary[piece]


def _import_backend() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingExtraError(
            "a tokenizer.json needs the package 'tokenizers'", fix="pip install 'crocuta[tokenizers]'"
        ) from error
    return tokenizers


@contextmanager
def _guarded(what: str) -> Iterator[None]:
    """Turn any failure of the Rust package into a TokenizerError.

    Its panics (a regular expression that backtracks too far) are BaseExceptions of a class that cannot be
    imported, so they are known by name; KeyboardInterrupt and SystemExit pass.
    """
    try:
        yield
    except Exception as error:
        raise TokenizerError(what, given=str(error), expected="a valid tokenizer.json") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(what, given=f"a crash inside 'tokenizers' ({error})") from error
