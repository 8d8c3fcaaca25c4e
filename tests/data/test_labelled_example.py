"""The labelled data of examples/ is what its README says: pieces of the genome beside it, split by place."""

from __future__ import annotations

import gzip
import hashlib
import re
from itertools import pairwise
from pathlib import Path

import pytest

from crocuta.data.label_map import label_map
from crocuta.data.splits import SPLITS, files_of, read_splits
from crocuta.tokenizers.nucleotides import COMPLEMENT
from crocuta.training.finetune_config import FineTuneConfig
from crocuta.training.recipes import read_recipe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def splits():
    """What the recipe reads; sequences that occur on either strand of two splits would be an error."""
    recipe = read_recipe(EXAMPLES / "genes.yaml")
    assert isinstance(recipe, FineTuneConfig)

    def key(sequence: str) -> bytes:
        return min(sequence.encode(), sequence.encode()[::-1].translate(COMPLEMENT))

    return read_splits(recipe.data.splits, recipe.task.kind, recipe.data.format, key=key)


@pytest.fixture(scope="module")
def genome():
    with gzip.open(EXAMPLES / "data" / "ecoli_dh1.fa.gz", "rt") as stream:
        return "".join(line.strip() for line in stream if not line.startswith(">"))


def test_no_piece_shares_32_bases_with_an_earlier_stretch(splits, genome):
    """Of which the first is all that the pretraining of quality/fine_tune.py sees."""
    for name, end in (("validation", 500_000), ("test", 650_000)):
        before = genome[:end]
        both = before + "|" + before.encode()[::-1].translate(COMPLEMENT).decode()
        if name == "test":
            both = both.replace(genome[500_000:510_000], "")  # nobody's
        words = {example.sequence[i : i + 32] for example in splits[name] for i in range(89)}
        assert [both[i : i + 32] for i in range(len(both) - 31) if both[i : i + 32] in words] == []


def test_pieces_are_of_the_genome_and_do_not_overlap(splits, genome):
    places = []
    for name in SPLITS:
        for example in splits[name]:
            start, end = map(int, re.fullmatch(r"NC_017625\.1:(\d+)-(\d+)", example.id).groups())
            assert genome[start - 1 : end] == example.sequence
            assert len(example.sequence) == 120
            places.append((start, end, name))
    places.sort()
    assert all(end < start for (_, end, _), (start, _, _) in pairwise(places))
    borders = [(end, start) for (_, end, a), (start, _, b) in pairwise(places) if a != b]
    assert len(borders) == 2
    assert all(start - end > 10_000 for end, start in borders)


def test_labels_and_their_numbers(splits):
    assert label_map(splits).names == ("forward", "intergenic", "reverse")
    counts = {
        name: [sum(e.label == label for e in splits[name]) for label in label_map(splits).names] for name in SPLITS
    }
    assert counts == {"train": [100] * 3, "validation": [78, 77, 80], "test": [300, 149, 298]}


def test_the_readme_s_sum_is_that_of_the_file():
    (path,) = files_of(read_recipe(EXAMPLES / "genes.yaml").data.splits)
    plain = gzip.decompress(Path(path).read_bytes())
    readme = (EXAMPLES / "data" / "README.md").read_text()
    assert hashlib.sha256(plain).hexdigest() in readme
    assert f"{len(plain):,} bytes" in readme
