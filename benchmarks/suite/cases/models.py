"""P7 to P11: whole models, read and trained, against the packages and formulations that publish them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from suite.case import Case, Gate, Goal, Side

STRIPED = {"family": "stripedhyena", "hidden": 256, "layers": 8, "modes": 8, "vocabulary": 512}
DNA = {"family": "hyenadna", "hidden": 256, "layers": 8, "vocabulary": 16}
TRANSFORMER = {**STRIPED, "against": "transformer"}
TINY = {"length": 32, "hidden": 64, "layers": 2}

LOGITS_BOUND = 1e-4
"""Of logits of eight layers in float32, relative to the same model in float64."""
LOSS_BOUND = 1e-5
GRADIENT_BOUND = 1e-4
PUBLISHED_GRADIENT_BOUND = 1e-2
"""The published modal filter's angles of up to l radians in float32 cost its gradients three digits."""
JUDGED = {"length": 2048}
"""Length of the comparison with float64 where the case's own is longer."""


def _judged(length: int) -> Mapping[str, Any]:
    return JUDGED if length > JUDGED["length"] else {}


def _ours(task: str, **settings: Any) -> Side:
    return Side(name="ours", task=f"ours.models:{task}", environment="ours", settings=settings)


def _wide(task: str, **settings: Any) -> Side:
    """Ours in float64: the truth of a case whose sides compute the same function."""
    return _ours(task, dtype="float64", **settings)


# --- prefill ---


def prefill(modes: int, goal: float) -> Case:
    return Case(
        name=f"prefill/{modes}_modes",
        item="P7",
        what=f"prefill of a StripedHyena (hidden 256, 8 layers), 8,192 tokens, {modes} modes",
        inputs="inputs:language_model",
        sizes={**STRIPED, "modes": modes, "length": 8192},
        smoke=TINY,
        sides=(
            _ours("prefill"),
            Side(name="stripedhyena", task="peers.stripedhyena:prefill", bounds={"logits": 1e-3}),
        ),
        gate=Gate(reference=_wide("prefill"), bounds={"logits": LOGITS_BOUND}),
        goals=(Goal(against="stripedhyena", bound=goal),),
        least_rounds=2,
    )


def striped_prefill() -> Case:
    """With attention among the layers, as the published 7B models have it; torch stands in for flash-attention."""
    return Case(
        name="prefill_striped/4096",
        item=None,
        what="prefill of a StripedHyena with attention in 2 of 8 layers, hidden 256, 4,096 tokens, 2 modes",
        inputs="inputs:language_model",
        sizes={**STRIPED, "modes": 2, "length": 4096, "attention": [3, 7]},
        smoke={**TINY, "attention": [1]},
        sides=(
            _ours("prefill"),
            Side(name="stripedhyena", task="peers.stripedhyena:prefill", bounds={"logits": 1e-3}),
        ),
        gate=Gate(reference=_wide("prefill"), bounds={"logits": LOGITS_BOUND}),
        goals=(Goal(against="stripedhyena", bound=None),),
        least_rounds=2,
    )


def floor(length: int) -> Case:
    return Case(
        name=f"prefill_floor/{length}",
        item="P7",
        what=f"prefill of a StripedHyena (hidden 256, 8 layers, 8 modes), {length:,} tokens",
        inputs="inputs:language_model",
        sizes={**STRIPED, "length": length},
        smoke=TINY,
        sides=(
            _ours("prefill"),
            Side(
                name="the same without mixers",
                task="ours.models:without_mixers",
                environment="ours",
                bounds={"finite": 0.0},
                reference=_ours("finite"),
            ),
        ),
        gate=Gate(reference=_wide("prefill"), bounds={"logits": LOGITS_BOUND}, sizes=_judged(length)),
        goals=(Goal(against="the same without mixers", bound=1.08, kind="times the cost"),),
    )


# --- training ---

STRIPED_TRAINING = Side(
    name="stripedhyena",
    task="peers.stripedhyena:training_step",
    bounds={"loss": LOSS_BOUND, "d*": PUBLISHED_GRADIENT_BOUND},
)
DNA_TRAINING = Side(name="HyenaDNA", task="peers.hyenadna:training_step")
LLAMA_TRAINING = Side(
    name="Llama, SDPA",
    task="peers.transformers:llama_training_step",
    reference=_wide("training_step", family="transformer", group="other"),
)
MAMBA_TRAINING = Side(
    name="Mamba-2",
    task="peers.transformers:mamba_training_step",
    reference=Side(name="wide", task="peers.transformers:mamba_training_step", settings={"dtype": "float64"}),
)
DNA_TRUTH = dataclasses.replace(DNA_TRAINING, settings={"dtype": "float64"})
TRAINING_GATE = {"loss": LOSS_BOUND, "d*": GRADIENT_BOUND}


def training(name: str, item: str | None, sizes: Mapping[str, Any], length: int, peer: Side, **more: Any) -> Case:
    """A step: forward, loss, backward, AdamW; one sequence, the same weights where both are the same model."""
    kind = {"stripedhyena": "StripedHyena (8 modes)", "hyenadna": "HyenaDNA"}[sizes["family"]]
    return Case(
        name=f"{name}/{length}",
        item=item,
        what=f"{'peak memory of a' if more.get('memory') else 'a'} training step of a {kind}, hidden 256, 8 layers, "
        f"{length:,} tokens",
        inputs="inputs:two_models" if "against" in sizes else "inputs:language_model",
        sizes={**sizes, "length": length},
        smoke=TINY,
        sides=(_ours("training_step"), peer),
        gate=Gate(
            reference=DNA_TRUTH if peer is DNA_TRAINING else _wide("training_step"),
            bounds=TRAINING_GATE,
            sizes=_judged(length),
        ),
        **more,
    )


def _faster(peer: Side, bound: float | None) -> tuple[Goal, ...]:
    return (Goal(against=peer.name, bound=bound),)


def against_hyenadna(length: int, goal: float) -> Case:
    slow = {"least_rounds": 1, "seconds": 60.0} if length > 8192 else {}
    return training("train_hyenadna", "P8", DNA, length, DNA_TRAINING, goals=_faster(DNA_TRAINING, goal), **slow)


def against_stripedhyena(length: int, goal: float) -> Case:
    goals = _faster(STRIPED_TRAINING, goal)
    return training("train_stripedhyena", "P9", STRIPED, length, STRIPED_TRAINING, goals=goals)


def against_transformer(length: int, goal: float | None) -> Case:
    slow = {"least_rounds": 1, "seconds": 60.0} if length > 8192 else {}
    goals = _faster(LLAMA_TRAINING, goal)
    return training("train_transformer", "P10", TRANSFORMER, length, LLAMA_TRAINING, goals=goals, **slow)


def memory(name: str, sizes: Mapping[str, Any], peer: Side, goal: float) -> Case:
    goals = (Goal(against=peer.name, bound=goal, kind="times the memory"),)
    return training(f"memory_{name}", "P11", sizes, 8192, peer, goals=goals, memory=True)


CASES = (
    prefill(2, 9.0),
    prefill(8, 32.0),
    *(floor(length) for length in (1024, 2048, 8192, 32_768, 131_072)),
    against_hyenadna(2048, 1.5),
    against_hyenadna(8192, 1.85),
    against_hyenadna(32_768, 2.4),
    against_stripedhyena(2048, 5.2),
    against_stripedhyena(8192, 6.7),
    *(against_transformer(length, None) for length in (256, 512, 1024)),
    against_transformer(2048, 1.75),
    against_transformer(8192, 3.6),
    against_transformer(32_768, 9.5),
    training("train_mamba", None, STRIPED, 2048, MAMBA_TRAINING, goals=_faster(MAMBA_TRAINING, None)),
    striped_prefill(),
    memory("stripedhyena", STRIPED, STRIPED_TRAINING, 0.35),
    memory("hyenadna", DNA, DNA_TRAINING, 0.55),
    memory("transformer", TRANSFORMER, LLAMA_TRAINING, 1.0),
)
