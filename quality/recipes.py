"""What is trained at each size, on how much, and the bounds that the results must keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from models import Shape
from real import coding_row, genome_row, text_row
from rows import Row, SyntheticRow
from training import Recipe

from crocuta.data.synthetic import (
    AssociativeRecall,
    Compression,
    FuzzyRecall,
    InContextRecall,
    Memorization,
    NoisyRecall,
    SelectiveCopying,
    SyntheticTask,
)


@dataclass(frozen=True)
class Plan:
    """One row of the table at one size: its data, made when they are needed, and the recipe of every model."""

    make: Callable[[int], Row]
    """The row of a seed. Raises MissingDataError."""
    recipe: Recipe
    without: tuple[str, ...] = ()
    """Models that are not trained on this row."""


@dataclass(frozen=True)
class Bound:
    """The accuracy that a model must reach on the test of a row."""

    row: str
    model: str
    at_least: float


BOUNDS = (
    Bound("in-context-recall", "hyena", 0.80),
    Bound("in-context-recall", "striped", 0.99),
    Bound("associative-recall", "hyena", 1.0),
    Bound("associative-recall", "striped", 1.0),
    Bound("selective-copying", "hyena", 0.90),
    Bound("selective-copying", "striped", 0.90),
)


def synthetic(
    task: SyntheticTask,
    recipe: Recipe,
    *,
    tests: int,
    train_examples: int | None = None,
    without: tuple[str, ...] = (),
) -> Plan:
    """The plan of a synthetic row; ``train_examples`` None: fresh sequences at every update."""

    def make(seed: int) -> Row:
        return SyntheticRow(task, seed, test_examples=tests, train_examples=train_examples)

    return Plan(make, recipe, without)


# --- small: two cores, under an hour ---

SMALL_SHAPE = Shape(frequency=1.0)
"""With frequency 1 the filters' MLP starts out smooth but for its first layer: recall is learned sooner (docs)."""

COPYING_SHAPE = replace(SMALL_SHAPE, layers=3, constant=True)
"""To copy the third token one has to count to three: a constant in the filters sums over all that went before."""


def small() -> dict[str, Plan]:
    """Fresh sequences at every update: 9,600 to 64,000 of them, where MAD repeats 12,800 two hundred times."""
    recall = Recipe(shape=SMALL_SHAPE, steps=300, batch=64)
    short = Recipe(shape=SMALL_SHAPE, steps=500, batch=128)
    real = Recipe(shape=SMALL_SHAPE, steps=1200, batch=16, learning_rates=(3e-3,))
    return {
        "in-context-recall": synthetic(InContextRecall(), recall, tests=1280),
        "noisy-in-context-recall": synthetic(NoisyRecall(), recall, tests=1280),
        "fuzzy-in-context-recall": synthetic(FuzzyRecall(), replace(recall, steps=400), tests=1280),
        "memorization": synthetic(Memorization(), short, tests=1280),
        "compression": synthetic(Compression(), short, tests=1280),
        "selective-copying": synthetic(
            SelectiveCopying(),
            Recipe(shape=COPYING_SHAPE, steps=16_000, batch=8, learning_rates=(3e-3,)),
            tests=1280,
            without=("multi-head",),  # four times the time of the others
        ),
        "associative-recall": synthetic(AssociativeRecall(), replace(recall, batch=32), tests=1280),
        "text": Plan(lambda seed: text_row(256, 65_536, seed), real),
        "genome": Plan(lambda seed: genome_row(256, 65_536, seed), real),
        "coding": Plan(lambda seed: coding_row(128, 2000, seed), replace(real, steps=600, batch=32)),
    }


# --- large: MAD's own protocol, and longer runs on real data, on a GPU ---


def large() -> dict[str, Plan]:
    """MAD's sizes and sweep: 12,800 sequences (memorisation 256), 200 epochs, batch 128, width 128, MAD's targets."""
    shape = Shape(hidden=128, mlp=256, frequency=1.0)
    sweep = Recipe(
        shape=shape, steps=20_000, batch=128, learning_rates=(1e-4, 5e-4, 1e-3), weight_decays=(0.0, 0.1), warmup=200
    )
    facts = replace(sweep, steps=400)
    real = Recipe(shape=replace(shape, layers=6), steps=20_000, batch=64, learning_rates=(2e-3,), warmup=500)
    tasks: list[SyntheticTask] = [
        InContextRecall(every_next_token=True),
        NoisyRecall(every_next_token=True),
        FuzzyRecall(every_next_token=True),
        Compression(),
        SelectiveCopying(),
        AssociativeRecall(every_next_token=True),
    ]
    plans = {task.name: synthetic(task, sweep, tests=1280, train_examples=12_800) for task in tasks}
    plans["memorization"] = synthetic(Memorization(), facts, tests=1280, train_examples=256)
    plans["text"] = Plan(lambda seed: text_row(1024, 120_000, seed), real)
    plans["genome"] = Plan(lambda seed: genome_row(1024, 1_000_000, seed), real)
    plans["coding"] = Plan(lambda seed: coding_row(128, 4000, seed), replace(real, steps=5000))
    return plans


def smoke() -> dict[str, Plan]:
    """The small plans with a few updates of tiny models, and without data that must be fetched."""
    shape = Shape(hidden=16, heads=2, mlp=48, filter_width=8, frequency=1.0)
    tiny = Recipe(shape=shape, steps=2, batch=4, warmup=1)
    tasks: list[SyntheticTask] = [
        InContextRecall(length=16),
        NoisyRecall(length=16),
        FuzzyRecall(length=16),
        Memorization(vocab_size=16, length=8),
        Compression(length=8),
        SelectiveCopying(length=33),
        AssociativeRecall(length=16),
    ]
    plans = {task.name: synthetic(task, tiny, tests=8) for task in tasks}
    plans["text"] = Plan(lambda seed: text_row(32, 256, seed), tiny)
    return plans


SIZES: dict[str, Callable[[], dict[str, Plan]]] = {"small": small, "large": large, "smoke": smoke}
