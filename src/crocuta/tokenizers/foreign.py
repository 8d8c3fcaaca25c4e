"""The tokenizers of published checkpoints, which say what they need in their own ways."""

from __future__ import annotations

import json
from pathlib import Path

from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.pieces import DEFINITION_FILE, PiecesTokenizer

_PLACES = (DEFINITION_FILE, f"tokenizer/{DEFINITION_FILE}")


def byte_tokenizer(vocab_size: int) -> ByteTokenizer | None:
    """``CharLevelTokenizer(vocab_size)`` of Evo; None for a model too small for bytes.

    Upstream's ids are the same. Its ``detokenize`` clamps ids to 32..512 before it makes characters of them, so ids
    below 32, end of text (0) and padding (1) among them, show as spaces; ours decode to the bytes that they are.
    """
    return ByteTokenizer(vocab_size=vocab_size, bos_is_eos=True) if vocab_size >= 256 else None


def pieces_tokenizer(folder: Path, named: object = None) -> PiecesTokenizer | None:
    """The tokenizer.json ``named`` below ``folder``, in it, or in its folder "tokenizer"; None where there is none.

    "<s>" and "</s>" begin and end a text if the file has them as added tokens.

    Raises:
        MissingExtraError: there is one and the package ``tokenizers`` is missing. TokenizerError: it is broken.
    """
    inside = isinstance(named, str) and not Path(named).is_absolute() and ".." not in Path(named).parts
    places = (str(named), *_PLACES) if inside else _PLACES
    path = next((folder / place for place in places if place.endswith(".json") and (folder / place).is_file()), None)
    if path is None:
        return None
    tokenizer = PiecesTokenizer.from_file(path)
    added = _added_tokens(tokenizer.definition)
    bos, eos = ("<s>" if "<s>" in added else None), ("</s>" if "</s>" in added else None)
    return PiecesTokenizer(tokenizer.definition, bos=bos, eos=eos) if bos or eos else tokenizer


def _added_tokens(definition: str) -> set[str]:
    """Read after the file was accepted as a tokenizer.json."""
    tokens = json.loads(definition).get("added_tokens") or []
    return {str(token.get("content")) for token in tokens if isinstance(token, dict)}
