"""The IUPAC nucleotide codes and their complements, as tables for ``bytes.translate``.

Source: NC-IUB, "Nomenclature for incompletely specified bases in nucleic acid sequences" (1984).
"""

from __future__ import annotations

IUPAC = b"ACGTURYSWKMBDHVN"
"""Every nucleotide code, upper case."""

_PAIRS = dict(zip(IUPAC, b"TGCAAYRSWMKVHDBN"))


def _complement_table() -> bytes:
    table = bytearray(range(256))
    for base, partner in _PAIRS.items():
        table[base] = partner
        table[base | 0x20] = partner | 0x20  # the same letters in lower case
    return bytes(table)


COMPLEMENT = _complement_table()
"""256 bytes: code -> complementary code of the same case; other bytes stay. U gives A, A gives T."""
