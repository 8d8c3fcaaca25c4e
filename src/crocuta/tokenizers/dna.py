"""Nucleotides as tokens, with the ids of HyenaDNA."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, final

import numpy as np
from numpy.typing import NDArray

from crocuta.errors import TokenizerError
from crocuta.schema import encode as encode_json
from crocuta.tokenizers.base import Ids, Tokenizer, as_ids
from crocuta.tokenizers.incremental import IncrementalDecoder, IndependentDecoder

CLS, SEP, BOS, MASK, PAD, RESERVED, UNK = range(7)
_LETTERS = b"ACGTN"
_FIRST_LETTER = 7


def _table(letters_of_both_cases: bool) -> bytes:
    table = bytearray([UNK]) * 256
    for index, letter in enumerate(_LETTERS, _FIRST_LETTER):
        table[letter] = index
        if letters_of_both_cases:
            table[letter | 0x20] = index
    return bytes(table)


_TABLES = {"upper": _table(True), "strict": _table(False)}
_LETTER_OF_ID = np.zeros(16, np.uint8)  # 0: an id without a letter
_LETTER_OF_ID[_FIRST_LETTER : _FIRST_LETTER + len(_LETTERS)] = np.frombuffer(_LETTERS, np.uint8)
_LETTER_OF_ID[UNK] = ord("N")


@final
@dataclass(frozen=True, kw_only=True)
class DNATokenizer(Tokenizer):
    """One id a letter: A 7, C 8, G 9, T 10, N 11.

    Special: [CLS] 0, [SEP] 1 (eos_id), [BOS] 2 (bos_id), [MASK] 3, [PAD] 4 (pad_id), [RESERVED] 5, [UNK] 6,
    as in ``CharacterTokenizer`` of HazyResearch/hyena-dna (``standalone_hyenadna.py``). ``encode`` adds none of
    them; ``decode`` leaves them out, but shows [UNK] as N.
    """

    type: ClassVar[str] = "dna"
    concatenates: ClassVar[bool] = True
    vocab_size: Literal[12, 16] = 16
    """16: padded to a multiple of 8, as the published weights are; ids 12 to 15 stand for nothing."""
    case: Literal["upper", "strict"] = "upper"
    """upper: lower case (soft-masked repeats) reads as upper case. strict: it is unknown, as upstream."""
    unknown: Literal["unk", "error"] = "unk"
    """What becomes of a letter outside ACGTN: [UNK], or a TokenizerError that names its position."""
    special: Literal["none", "sep", "cls_sep"] = "none"
    """What stands around a sequence (``prefix_ids``, ``suffix_ids``): sep: sequence [SEP], as in HyenaDNA's training
    and its Hugging Face port; cls_sep: [CLS] sequence [SEP], as in its standalone code. The models were trained to
    predict [SEP] and never saw [CLS] or [SEP] as an input."""
    eos_id = SEP
    bos_id = BOS
    pad_id = PAD
    num_ids = 12

    def __post_init__(self) -> None:
        for name, known in (
            ("vocab_size", (12, 16)),
            ("case", tuple(_TABLES)),
            ("unknown", ("unk", "error")),
            ("special", ("none", "sep", "cls_sep")),
        ):
            value = getattr(self, name)
            if value not in known:
                raise TokenizerError(
                    f"{name} of the DNA tokenizer is unknown", given=repr(value), expected=f"one of {known}"
                )
        object.__setattr__(self, "prefix_ids", (CLS,) if self.special == "cls_sep" else ())
        object.__setattr__(self, "suffix_ids", () if self.special == "none" else (SEP,))

    @cached_property
    def complement_ids(self) -> NDArray[np.int64]:
        """A <-> T, C <-> G; N, the special tokens and the padding are themselves."""
        table = np.arange(self.vocab_size)
        table[7:11] = [10, 9, 8, 7]
        table.setflags(write=False)
        return table

    def encode(self, text: str | bytes) -> NDArray[np.int64]:
        # "replace" writes one "?" a character that is not ASCII, so that positions stay positions.
        data = text.encode("ascii", errors="replace") if isinstance(text, str) else text
        if not isinstance(data, bytes):
            raise TokenizerError("cannot encode this type", given=type(text).__name__, expected="str or bytes")
        ids = data.translate(_TABLES[self.case])
        if self.unknown == "error" and (position := ids.find(UNK)) >= 0:
            raise TokenizerError(
                f"the letter at position {position} is not a nucleotide",
                given=ascii(text[position : position + 1]),
                expected="A, C, G, T or N" + (", of either case" if self.case == "upper" else " in upper case"),
            )
        return np.frombuffer(ids, np.uint8).astype(np.int64)

    def decode(self, ids: Ids) -> str:
        letters = _LETTER_OF_ID[as_ids(ids, self.vocab_size)]
        return letters[letters > 0].tobytes().decode("ascii")

    def incremental_decoder(self) -> IncrementalDecoder:
        return IndependentDecoder(self.decode)

    def spec(self) -> dict[str, Any]:
        return encode_json(self)

    def _definition(self) -> dict[str, Any]:
        return {name: value for name, value in self.spec().items() if name != "special"}
