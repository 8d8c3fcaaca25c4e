"""Single-base variants of a window of E. coli: ``score_variants``, which reads the prefix once, against ``score``.

    python benchmarks/variants.py            # 1,000 variants at the goal's site, about a quarter of an hour
    python benchmarks/variants.py --smoke    # tiny sizes, seconds

What stands after a variant must be computed anew for each, so the gain depends on where the variants stand: the table
has several sites. At the goal's, the first bases of the window's last sixth, all variants are scored; at the others as
many as whole windows. Whole windows are scored for a subset of the variants, evenly taken, and their time is scaled by
the number of variants. Both sides run in turns in one process; the script ends with 1 if the totals of any variant
differ.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _timing import HERE, alternate, chosen_sizes, manifest, ratio, sizes_parser, table, write_result
from generate_memory import Sizes as ModelSizes
from generate_memory import make_model

import crocuta
from crocuta.config import ComplexModalFilterConfig, HyenaConfig
from crocuta.data.fasta import read_fasta
from crocuta.model.lm import Model
from crocuta.tokenizers.dna import DNATokenizer

GENOME = HERE.parent / "examples" / "data" / "ecoli_dh1.fa.gz"
TOKENIZER = DNATokenizer(vocab_size=16)
BOUND = 1e-5
"""Largest difference of a variant's log-likelihood a token."""
GOAL = 5.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The window, the variants and the model."""

    window: int = 8_192
    variants: int = 1_000
    whole: int = 20
    """Windows that are scored whole in a round, and variants at sites other than the goal's."""
    rounds: int = 2
    hidden: int = 256
    layers: int = 8
    modes: int = 8


SMOKE = Sizes(window=256, variants=30, whole=4, rounds=1, hidden=16, layers=2, modes=2)


@dataclass(frozen=True)
class Site:
    """Where a region of variants begins, how many of them are scored, and what came of it."""

    name: str
    position: int
    variants: int
    cpu_seconds: list[float]
    whole_cpu_seconds: list[float]
    largest_difference: float

    def speedup(self, whole: int) -> Any:
        """CPU time of all windows, as ``whole`` of them take it, over that of the variants."""
        return ratio([s * self.variants / whole for s in self.whole_cpu_seconds], self.cpu_seconds)


def sites(sizes: Sizes) -> list[tuple[str, int, int]]:
    """(name, first position, number of variants); the goal's is the last but two."""
    region = -(-sizes.variants // 3)
    return [
        ("the start", 0, sizes.whole),
        ("the middle", sizes.window // 2, sizes.whole),
        ("the last sixth", -(-sizes.window * 5 // 6), sizes.variants),
        ("7/8", sizes.window * 7 // 8, sizes.whole),
        ("the end", sizes.window - region, sizes.whole),
    ]


def window(sizes: Sizes) -> str:
    """Bases from the middle of the shipped piece."""
    sequence = next(iter(read_fasta(GENOME))).sequence
    first = len(sequence) // 2
    return sequence[first : first + sizes.window]


def single_base_variants(sequence: str, first: int, count: int, region: int) -> list[crocuta.Variant]:
    """``count`` of all exchanges of one base in a region, evenly taken."""
    every = [
        crocuta.Variant(position, sequence[position], base)
        for position in range(first, first + region)
        for base in "ACGT"
        if base != sequence[position]
    ]
    return [every[i * len(every) // count] for i in range(count)]


def edited(sequence: str, variant: crocuta.Variant) -> str:
    return sequence[: variant.position] + variant.alternative + sequence[variant.position + len(variant.reference) :]


def measure(model: Model, sequence: str, sizes: Sizes, name: str, position: int, count: int) -> Site:
    """Both sides at one site, in turns."""
    variants = single_base_variants(sequence, position, count, -(-sizes.variants // 3))
    chosen = [i * count // sizes.whole for i in range(sizes.whole)]
    windows = [edited(sequence, variants[i]) for i in chosen]
    totals: dict[str, list[float]] = {}

    def shared() -> None:
        totals["shared"] = [s.total for s in crocuta.score_variants(model, TOKENIZER, sequence, variants)]

    def whole() -> None:
        totals["whole"] = [s.total for s in crocuta.score(model, TOKENIZER, windows)]

    timings = alternate({"shared": shared, "whole": whole}, sizes.rounds)
    pairs = zip((totals["shared"][i] for i in chosen), totals["whole"], strict=True)
    difference = max(abs(a - b) for a, b in pairs) / sizes.window
    return Site(name, position, count, timings["shared"].cpu, timings["whole"].cpu, difference)


def sites_table(measured: Sequence[Site], sizes: Sizes) -> str:
    rows = []
    for site in measured:
        speedup = site.speedup(sizes.whole)
        each = min(site.cpu_seconds) / site.variants
        gain = f"{speedup.median:.1f} ({speedup.min:.1f} to {speedup.max:.1f})"
        rows.append([f"{site.name}, {site.position:,}", site.variants, f"{each:.3f} s", gain])
    return table(["first base of the region", "variants", "CPU time a variant", "times faster than windows"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    options = sizes_parser(__doc__, Sizes()).parse_args(arguments)
    torch.set_num_threads(options.threads)
    sizes = chosen_sizes(options, SMOKE if options.smoke else Sizes())
    result: dict[str, Any] = {"manifest": manifest(), "sizes": dataclasses.asdict(sizes)}
    shape = ModelSizes(hidden=sizes.hidden, layers=sizes.layers, modes=sizes.modes, vocabulary=TOKENIZER.vocab_size)
    model = make_model(shape, HyenaConfig(filter=ComplexModalFilterConfig(modes=sizes.modes)))
    sequence = window(sizes)
    crocuta.score(model, TOKENIZER, [sequence])  # warm
    measured = [measure(model, sequence, sizes, *site) for site in sites(sizes)]
    worst = max(site.largest_difference for site in measured)
    print(f"Largest difference of a log-likelihood a token: {worst:.1e} (bound {BOUND:.0e}).")
    if not worst <= BOUND:
        print("The totals differ: no speed is reported.", file=sys.stderr)
        return 1
    print("\n" + sites_table(measured, sizes) + "\n")
    goals = next(site for site in measured if site.variants == sizes.variants)
    speedup = goals.speedup(sizes.whole)
    met = speedup.median >= GOAL
    print(f"{goals.name}: {speedup.median:.1f} times faster, at least {GOAL:.0f}: {'met' if met else 'MISSED'}")
    result |= {
        "sites": [dataclasses.asdict(s) | {"speedup": dataclasses.asdict(s.speedup(sizes.whole))} for s in measured],
        "largest_difference_a_token": worst,
        "goals": [{"what": goals.name, "at_least": GOAL, "value": speedup.median, "met": met}],
    }
    print(f"written: {write_result(options.output, 'variants', result, smoke=options.smoke)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
