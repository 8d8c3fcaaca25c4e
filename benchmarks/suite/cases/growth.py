"""How a layer grows with the length: ours, attention, and the peers; one layer with its MLP, hidden size 64."""

from __future__ import annotations

from suite.case import Case, Gate, Goal, Side
from suite.cases.models import LOGITS_BOUND

SIZES = {"family": "stripedhyena", "against": "transformer", "hidden": 64, "layers": 1, "modes": 8, "vocabulary": 16}

LENGTHS = tuple(1 << power for power in range(10, 17))
BEYOND = (1 << 18, 1 << 20)
"""Where attention would take minutes and the published modal filter all memory."""


def _reference(family: str, group: str) -> Side:
    settings = {"dtype": "float64", "family": family, "group": group}
    return Side(name="wide", task="ours.models:forward", environment="ours", settings=settings)


IMPLICIT_TRUTH = Side(name="wide", task="peers.hyenadna:forward", settings={"dtype": "float64", "group": "hyenadna"})
"""With filters made in float32, as in training: see ``peers.hyenadna.model_of``."""

OURS_IMPLICIT = Side(
    name="ours, implicit",
    task="ours.models:forward",
    environment="ours",
    settings={"family": "hyenadna", "group": "hyenadna"},
    reference=IMPLICIT_TRUTH,
)
HYENADNA = Side(
    name="HyenaDNA",
    task="peers.hyenadna:forward",
    settings={"group": "hyenadna"},
    reference=IMPLICIT_TRUTH,
)
LLAMA = Side(name="Llama, SDPA", task="peers.transformers:llama_forward", reference=_reference("transformer", "other"))
STRIPEDHYENA = Side(name="stripedhyena", task="peers.stripedhyena:forward", bounds={"logits": 1e-3})


def growth(length: int) -> Case:
    peers = (OURS_IMPLICIT, HYENADNA) if length in BEYOND else (OURS_IMPLICIT, LLAMA, STRIPEDHYENA, HYENADNA)
    return Case(
        name=f"growth/{length}",
        item=None,
        what=f"one layer with its MLP, hidden 64, {length:,} tokens, forward",
        inputs="inputs:three_models",
        sizes={**SIZES, "length": length},
        smoke={"length": 64},
        sides=(Side(name="ours", task="ours.models:forward", environment="ours"), *peers),
        gate=Gate(
            reference=_reference("stripedhyena", "weights"), bounds={"logits": LOGITS_BOUND}, sizes={"length": 1024}
        ),
        goals=tuple(Goal(against=side.name, bound=None) for side in peers),
        least_rounds=3 if length <= 16_384 else 1,
        seconds=30.0,
    )


CASES = tuple(growth(length) for length in (*LENGTHS, *BEYOND))
