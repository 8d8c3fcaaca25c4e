"""Genomic nouns: strands and intervals. Coordinates are 0-based and half-open; region strings are not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeVar

from crocuta.errors import InputError
from crocuta.tokenizers.nucleotides import COMPLEMENT, IUPAC

Bases = TypeVar("Bases", str, bytes)

_NUCLEOTIDES = IUPAC + IUPAC.lower() + b"-*."
_REGION = re.compile(r"(?P<contig>\S+):(?P<first>[0-9][0-9,]*)-(?P<last>[0-9][0-9,]*)")


def reverse_complement(sequence: Bases) -> Bases:
    """The other strand, read in its own direction; case is kept, gaps (- * .) are themselves, U gives A.

    Raises:
        InputError: a character that is not an IUPAC nucleotide code; the message names its position.
    """
    data = sequence if isinstance(sequence, bytes) else sequence.encode("ascii", errors="replace")
    if data.translate(None, _NUCLEOTIDES):
        position = next(i for i, letter in enumerate(data) if letter not in _NUCLEOTIDES)
        raise InputError(
            f"the letter at position {position} has no complement",
            given=ascii(sequence[position : position + 1]),
            expected="IUPAC nucleotide codes",
        )
    result = data.translate(COMPLEMENT)[::-1]
    return result if isinstance(sequence, bytes) else result.decode("ascii")


@dataclass(frozen=True)
class Interval:
    """Bases start, start+1, ..., end-1 of a contig (0-based, half-open), read along ``strand``."""

    contig: str
    start: int
    end: int
    strand: Literal["+", "-"] = "+"

    def __post_init__(self) -> None:
        if not self.contig:
            raise InputError("an interval needs a contig", given=repr(self.contig), expected="the id of a sequence")
        if not 0 <= self.start < self.end:
            raise InputError(
                "an interval must hold at least one base",
                given=f"start={self.start}, end={self.end}",
                expected="0 <= start < end",
            )
        if self.strand not in ("+", "-"):
            raise InputError("an interval has an unknown strand", given=repr(self.strand), expected="'+' or '-'")

    def __len__(self) -> int:
        return self.end - self.start

    @classmethod
    def parse(cls, region: str, strand: Literal["+", "-"] = "+") -> Interval:
        """The interval of "contig:first-last", 1-based and inclusive as samtools writes it; commas may group digits.

        The last colon separates, so that contigs may hold colons (HLA alleles). Raises InputError.
        """
        match = _REGION.fullmatch(region)
        if match is None:
            raise InputError("not a region", given=repr(region), expected="contig:first-last, such as chr1:1,001-2,000")
        first, last = (int(match[key].replace(",", "")) for key in ("first", "last"))
        if not 1 <= first <= last:
            raise InputError("not a region", given=repr(region), expected="1 <= first <= last (1-based, inclusive)")
        return cls(match["contig"], first - 1, last, strand)

    @property
    def region(self) -> str:
        """The inverse of ``parse``, strand aside."""
        return f"{self.contig}:{self.start + 1}-{self.end}"

    def extract(self, sequence: Bases) -> Bases:
        """The bases of this interval in ``sequence``, the whole contig. Raises InputError past its end."""
        if self.end > len(sequence):
            raise InputError(
                f"{self.region} runs past the end of its contig",
                given=f"{len(sequence)} bases",
                expected=f">= {self.end}",
            )
        bases = sequence[self.start : self.end]
        return bases if self.strand == "+" else reverse_complement(bases)
