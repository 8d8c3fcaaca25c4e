"""From a description, or a folder, to a tokenizer. The table of types is closed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crocuta.errors import ConfigError, TokenizerError
from crocuta.schema import decode
from crocuta.tokenizers.base import CONFIG_FILE, Tokenizer
from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.dna import DNATokenizer
from crocuta.tokenizers.pieces import PiecesOptions, PiecesTokenizer

_MAX_CONFIG_BYTES = 1 << 20
TYPES = ("bytes", "dna", "pieces")


def make_tokenizer(spec: dict[str, Any]) -> Tokenizer:
    """The tokenizer that ``spec`` describes: {"type": "bytes" | "dna" | "pieces", and its options}.

    ``{"type": "pieces", "file": path}`` reads the tokenizer.json at ``path``.

    Raises:
        TokenizerError: an unknown type or option, an impossible value, or a broken file.
    """
    return _make(spec, "the tokenizer", folder=None)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that ``save(folder)`` wrote. Reads nothing outside ``folder``. Raises TokenizerError."""
    path = Path(folder) / CONFIG_FILE
    try:
        with open(path, "rb") as stream:
            data = stream.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise TokenizerError(
            f"cannot read {path}", given=error.strerror, expected="a folder that a tokenizer was saved to"
        ) from error
    if len(data) > _MAX_CONFIG_BYTES:
        raise TokenizerError(f"{path} is too large", expected=f"<= {_MAX_CONFIG_BYTES} bytes")
    try:
        spec = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON", given=str(error), expected="a JSON object") from error
    return _make(spec, str(path), folder=Path(folder))


def _make(spec: Any, where: str, *, folder: Path | None) -> Tokenizer:
    if not isinstance(spec, dict):
        raise TokenizerError(f"{where} must be an object", given=type(spec).__name__, expected='{"type": ...}')
    try:
        match spec.get("type"):
            case "bytes":
                return decode(ByteTokenizer, spec)
            case "dna":
                return decode(DNATokenizer, spec)
            case "pieces":
                return _make_pieces(decode(PiecesOptions, spec), folder)
            case other:
                raise TokenizerError(
                    f"{where} has an unknown type", given=repr(other), expected="one of " + ", ".join(TYPES)
                )
    except ConfigError as error:
        raise TokenizerError(
            f"{where}: {error.what}", given=error.given, expected=error.expected, fix=error.fix
        ) from error


def _make_pieces(options: PiecesOptions, folder: Path | None) -> PiecesTokenizer:
    path = Path(options.file)
    if folder is not None:
        # A saved folder may come from anyone: its description must not reach other files.
        if path.name != options.file:
            raise TokenizerError(
                f"'file' in {folder / CONFIG_FILE} leaves the folder",
                given=repr(options.file),
                expected="a plain name",
            )
        path = folder / path
    return PiecesTokenizer.from_file(path, eos=options.eos, bos=options.bos, pad=options.pad)
