"""Rebuild ecoli_genes.tsv.gz: pieces of a genome, labelled by the gene that they lie in.

python build_genes.py OUTPUT_FOLDER          (needs pyrodigal 3.7.1; reads ecoli_dh1.fa.gz beside this file)

Genes are called by pyrodigal, trained on the same 900,000 bases. A piece of 120 bases lies in genes of one strand
("forward" or "reverse", its strand) or outside all genes ("intergenic"). No two pieces overlap. Train, validation
and test are three stretches of the genome with 10,000 bases between them, so that no neighbours fall apart; pieces of a
repeat (insertion sequences) that share 32 bases with an earlier stretch, on either strand, are left out.
"""

from __future__ import annotations

import gzip
import random
import sys
from itertools import groupby
from pathlib import Path

import pyrodigal

PIECE = 120
REGIONS = {"train": (0, 500_000), "validation": (510_000, 650_000), "test": (660_000, 900_000)}
COUNTS = {"train": 100, "validation": 80, "test": 300}
"""Pieces a label and split, where there are as many."""
SHARED = 32
NAMES = {0: "intergenic", 1: "forward", 2: "reverse"}
SEED = 0
COMPLEMENT = str.maketrans("ACGT", "TGCA")


def read_genome(path: Path) -> str:
    """The one record of the file."""
    with gzip.open(path, "rt") as stream:
        return "".join(line.strip() for line in stream if not line.startswith(">"))


def stretches(genome: str) -> list[tuple[int, int, str]]:
    """(start, end, label) of every stretch that lies in genes of one strand, or in none."""
    finder = pyrodigal.GeneFinder()
    finder.train(genome)
    strands = bytearray(len(genome))
    for gene in finder.find_genes(genome):
        for place in range(gene.begin - 1, gene.end):
            strands[place] |= 1 if gene.strand > 0 else 2
    found, start = [], 0
    for kind, run in groupby(strands):
        end = start + sum(1 for _ in run)
        if kind in NAMES:  # 3: genes of both strands overlap
            found.append((start, end, NAMES[kind]))
        start = end
    return found


def pieces(genome: str) -> list[tuple[str, str, str, str]]:
    """(id, sequence, label, split), sorted by place."""
    draw, rows = random.Random(SEED), []
    cut = [
        (start + PIECE * number, label)
        for start, end, label in stretches(genome)
        for number in range((end - start) // PIECE)
    ]
    seen: set[str] = set()
    for split, (low, high) in REGIONS.items():
        for label in NAMES.values():
            starts = [start for start, found in cut if found == label and low <= start <= high - PIECE]
            for start in draw.sample(starts, min(COUNTS[split], len(starts))):
                sequence = genome[start : start + PIECE]
                if seen.isdisjoint(words(sequence)):
                    rows.append((start, sequence, label, split))
        seen.update(words(genome[low:high]), words(genome[low:high][::-1].translate(COMPLEMENT)))
    return [(f"NC_017625.1:{start + 1}-{start + PIECE}", *rest) for start, *rest in sorted(rows)]


def words(bases: str) -> set[str]:
    """Every run of SHARED bases."""
    return {bases[place : place + SHARED] for place in range(len(bases) - SHARED + 1)}


def main(output: str) -> None:
    rows = pieces(read_genome(Path(__file__).with_name("ecoli_dh1.fa.gz")))
    text = "".join("\t".join(row) + "\n" for row in [("id", "sequence", "label", "split"), *rows])
    Path(output, "ecoli_genes.tsv.gz").write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
