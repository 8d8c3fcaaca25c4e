"""P12 and P13: generation, a token at a time and whole, sampling included."""

from __future__ import annotations

import dataclasses
from typing import Any

from suite.case import Case, Gate, Goal, Side
from suite.cases.models import DNA, STRIPED, TINY

SIZES = {256: {"layers": 8, "modes": 2}, 512: {"layers": 8, "modes": 8}, 1024: {"layers": 12, "modes": 2}}
"""By hidden size; the last has 153 million parameters."""

GOALS = {"float32": (3.0, 1.7, 1.4), "bfloat16": (5.0, 3.3, 2.3), "int8": (10.0, 6.0, 5.0)}
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 5e-2}
"""Of logits, against a forward pass in float64; of random weights, whose logits are small."""


def decode(hidden: int, weights: str, goal: float) -> Case:
    """float32 and int8 against the peer in float32, bfloat16 against the peer in bfloat16."""
    theirs = "bfloat16" if weights == "bfloat16" else "float32"
    return Case(
        name=f"decode/{hidden}_{weights}",
        item="P12",
        what=f"decoding a token, sampling included, batch 1, hidden {hidden:,}, {SIZES[hidden]['layers']} layers, "
        f"ours in {weights}, theirs in {theirs}",
        inputs="inputs:language_model",
        sizes={**STRIPED, "hidden": hidden, **SIZES[hidden], "prompt": 16, "length": 48},
        smoke={"hidden": 64, "layers": 2, "length": 24},
        sides=(
            Side(name="ours", task="ours.decoding:decode", environment="ours", settings={"weights": weights}),
            Side(
                name="stripedhyena, cached",
                task="peers.stripedhyena:decode",
                settings={"dtype": theirs},
                bounds={"logits": 1e-1 if theirs == "bfloat16" else 1e-4},
            ),
        ),
        gate=Gate(reference=_wide("ours.decoding:told"), bounds={"logits": BOUNDS[weights]}),
        goals=(Goal(against="stripedhyena, cached", bound=goal),),
    )


def _wide(task: str, **settings: Any) -> Side:
    return Side(name="ours in float64", task=task, environment="ours", settings={"dtype": "float64", **settings})


FORWARD_PASSES = Side(name="HyenaDNA, a forward pass a token", task="peers.hyenadna:second_half")


def implicit(length: int, goal: float) -> Case:
    return Case(
        name=f"generate_implicit/{length}",
        item="P13",
        what=f"a token of a HyenaDNA (hidden 256, 8 layers) at {length:,} tokens, exact; theirs without a cache",
        inputs="inputs:language_model",
        sizes={**DNA, "length": length, "longest": length, "prompt": length // 2},
        smoke={**TINY, "longest": 32, "prompt": 16},
        sides=(
            Side(name="ours", task="ours.decoding:implicit", environment="ours"),
            FORWARD_PASSES,
        ),
        gate=Gate(
            reference=dataclasses.replace(FORWARD_PASSES, settings={"dtype": "float64"}),
            bounds={"logits": 1e-6},
            sizes={"length": 1024, "longest": 1024, "prompt": 512},
        ),
        goals=(Goal(against=FORWARD_PASSES.name, bound=goal),),
        least_rounds=2,
        seconds=60.0,
    )


def long_generation() -> Case:
    return Case(
        name="generate/4096",
        item=None,
        what="generating 4,096 tokens after 1,024, hidden 256, 8 layers, 8 modes",
        inputs="inputs:language_model",
        sizes={**STRIPED, "length": 1024, "prompt": 1024, "tokens": 4096},
        smoke={**TINY, "prompt": 16, "tokens": 32},
        sides=(
            Side(name="ours", task="ours.decoding:generate", environment="ours"),
            Side(name="stripedhyena, cached", task="peers.stripedhyena:generate"),
        ),
        gate=Gate(bounds={"greedy": 0.0}),
        goals=(Goal(against="stripedhyena, cached", bound=None),),
        least_rounds=1,
        seconds=60.0,
    )


CASES = (
    *(
        decode(hidden, weights, goal)
        for weights, goals in GOALS.items()
        for hidden, goal in zip(SIZES, goals, strict=True)
    ),
    implicit(2048, 300.0),
    implicit(8192, 1200.0),
    long_generation(),
)
