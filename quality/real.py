"""Rows of real data: English characters, genomes of species and strains held out, coding against intergenic pieces.

The text is shipped. The genomes are those of the Debian package ragout-examples, which ``make quality`` unpacks into
``.data/ragout``; gene calls are pyrodigal's. A row whose data cannot be had is left out, and says why.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rows import ClassesRow, Labelled, Row, StreamRow

from crocuta.data.fasta import read_fasta

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "examples" / "data" / "moby_dick.txt.gz"
GENOMES = ROOT / ".data" / "ragout"

TRAINING_GENOMES = (
    "E.Coli/references/MG1655-K12",
    "H.Pylori/references/ELS37",
    "H.Pylori/references/G27",
    "H.Pylori/references/Puno120",
    "S.Aureus/references/COL",
    "S.Aureus/references/N315",
    "S.Aureus/references/JKD6008",
)
HELD_OUT_STRAIN = "S.Aureus/references/RF122"
"""A bovine strain; three strains of the species are trained on."""
HELD_OUT_SPECIES = "V.Cholerae/references/O395"

BASES = b"ACGT"
UNKNOWN = len(BASES)
"""The id of every letter that is none of the four bases."""


class MissingDataError(Exception):
    """The data of a row are not on this machine; the message says how to get them."""


def text_row(length: int, test_characters: int, seed: int) -> StreamRow:
    """Moby-Dick by bytes; the last tenth is held out and about ``test_characters`` of it are the test."""
    data = np.frombuffer(gzip.decompress(TEXT.read_bytes()), np.uint8)
    cut = len(data) * 9 // 10
    held_out = {"held out": windows(data[cut:], test_characters, length)}
    return StreamRow("text", 256, length, [data[:cut]], held_out, seed)


def genome_row(length: int, test_bases: int, seed: int, folder: Path = GENOMES) -> StreamRow:
    """The next base of a strain and of a species that training never saw: of each, pieces from all over the genome."""
    held_out = {"held-out strain": HELD_OUT_STRAIN, "held-out species": HELD_OUT_SPECIES}
    return StreamRow(
        "genome",
        len(BASES) + 1,
        length,
        [ids for name in TRAINING_GENOMES for ids in genome(name, folder)],
        {test: windows(longest(name, folder), test_bases, length) for test, name in held_out.items()},
        seed,
        unknown=UNKNOWN,
    )


def coding_row(length: int, test_pieces: int, seed: int, folder: Path = GENOMES) -> Row:
    """Does a piece of a genome lie in a gene, or wholly between genes? As many of each, either strand.

    Trained on E. coli, S. aureus and H. pylori, tested on another strain and another species as in ``genome_row``.
    """
    training = [
        labelled_pieces(name, length, folder)
        for name in (TRAINING_GENOMES[0], TRAINING_GENOMES[1], TRAINING_GENOMES[4], TRAINING_GENOMES[5])
    ]
    held_out = {"held-out strain": HELD_OUT_STRAIN, "held-out species": HELD_OUT_SPECIES}
    return ClassesRow(
        name="coding",
        letters=len(BASES) + 1,
        classes=2,
        training=Labelled(*(np.concatenate(part) for part in zip(*training))),
        held_out={test: _some(labelled_pieces(name, length, folder), test_pieces) for test, name in held_out.items()},
        seed=seed,
    )


# --- genomes ---


def genome(name: str, folder: Path = GENOMES) -> Iterator[NDArray[np.uint8]]:
    """The ids of each contig. Raises MissingDataError where the package was not unpacked."""
    path = folder / f"{name}.fasta.gz"
    if not path.exists():
        raise MissingDataError(
            f"{name}.fasta.gz of the Debian package ragout-examples is not in .data/ragout: `make quality` fetches it "
            "where there is apt-get"
        )
    for record in read_fasta(path):
        yield encode(record.sequence)


def encode(sequence: str) -> NDArray[np.uint8]:
    """A, C, G, T as 0 to 3, everything else as UNKNOWN."""
    table = np.full(256, UNKNOWN, np.uint8)
    table[np.frombuffer(BASES, np.uint8)] = np.arange(len(BASES))
    return table[np.frombuffer(sequence.encode("ascii"), np.uint8)]


def longest(name: str, folder: Path = GENOMES) -> NDArray[np.uint8]:
    """The longest contig of a genome."""
    return max(genome(name, folder), key=len)


def windows(ids: NDArray[np.uint8], tokens: int, length: int) -> NDArray[np.uint8]:
    """[n l+1]: about so many tokens in windows at even distances, so that no one region decides."""
    count = max(1, min(tokens, len(ids) - 1) // length)
    starts = np.linspace(0, len(ids) - length - 1, count).astype(np.int64)
    return ids[starts[:, None] + np.arange(length + 1)]


# --- genes ---


def labelled_pieces(name: str, length: int, folder: Path = GENOMES) -> Labelled:
    """Pieces in genes (1) and between genes (0) of the longest contig, as many of each; every other one turned over."""
    ids = longest(name, folder)
    return pieces(ids, gene_intervals(ids), length)


def gene_intervals(ids: NDArray[np.uint8]) -> NDArray[np.int64]:
    """[n 2]: start and end of each gene that pyrodigal calls, after training on the same sequence."""
    try:
        import pyrodigal
    except ImportError as error:
        raise MissingDataError("pyrodigal, which calls the genes, is not installed: `make quality` does") from error
    sequence = np.frombuffer(BASES + b"N", np.uint8)[ids].tobytes()
    finder = pyrodigal.GeneFinder()
    finder.train(sequence)
    return np.array([(gene.begin - 1, gene.end) for gene in finder.find_genes(sequence)])


def pieces(ids: NDArray[np.uint8], genes: NDArray[np.int64], length: int) -> Labelled:
    """Of ``genes`` [n 2]: pieces of ``length`` wholly inside one, and as many that touch none, cut end to end.

    A piece that starts at a gene's first base would show its start codon, so cuts begin at a fixed place in the gap and
    at another in each gene.
    """
    covered = np.zeros(len(ids) + 1, np.int64)
    np.add.at(covered, genes[:, 0], 1)
    np.add.at(covered, genes[:, 1], -1)
    free = np.flatnonzero(np.diff(np.concatenate([[1], (covered.cumsum()[:-1] > 0).astype(np.int64), [1]])))
    gaps = free.reshape(-1, 2)
    between, inside = _cut(gaps, length, 0), _cut(genes, length, length // 2)
    inside = inside[np.linspace(0, len(inside) - 1, min(len(between), len(inside))).astype(np.int64)]
    starts = np.concatenate([between, inside])
    classes = np.repeat([0, 1], [len(between), len(inside)])
    sequences = ids[starts[:, None] + np.arange(length)].astype(np.int64)
    complement = np.array([3, 2, 1, 0, UNKNOWN])
    sequences[::2] = complement[sequences[::2, ::-1]]
    return Labelled(sequences, classes)


def _cut(intervals: NDArray[np.int64], length: int, offset: int) -> NDArray[np.int64]:
    starts = [np.arange(start + offset, end - length + 1, length) for start, end in intervals]
    return np.concatenate([*starts, np.empty(0, np.int64)]).astype(np.int64)


def _some(labelled: Labelled, most: int) -> Labelled:
    """At most so many, evenly over the whole, classes kept in balance."""
    chosen = np.linspace(0, len(labelled.classes) - 1, min(most, len(labelled.classes))).astype(np.int64)
    return Labelled(labelled.sequences[chosen], labelled.classes[chosen])
