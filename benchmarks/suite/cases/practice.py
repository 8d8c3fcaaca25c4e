"""What has no goal on the list and still is waited for: scoring, embedding, loading, importing."""

from __future__ import annotations

from suite.case import Case, Gate, Goal, Side
from suite.cases.models import LOGITS_BOUND, STRIPED, TINY


def throughput(verb: str, answer: str, what: str) -> Case:
    return Case(
        name=f"{verb}/64_sequences",
        item=None,
        what=what,
        inputs="inputs:sequences",
        sizes={**STRIPED, "rows": 64, "length": 1024},
        smoke={**TINY, "rows": 4},
        sides=(
            Side(name="ours", task=f"ours.models:{verb}", environment="ours"),
            Side(name="stripedhyena, one by one", task=f"peers.stripedhyena:{verb}", bounds={answer: LOGITS_BOUND}),
        ),
        gate=Gate(
            reference=Side(
                name="wide", task=f"ours.models:{verb}_one_by_one", environment="ours", settings={"dtype": "float64"}
            ),
            bounds={answer: 1e-5},
            sizes={"rows": 8},
        ),
        goals=(Goal(against="stripedhyena, one by one", bound=None),),
    )


def load() -> Case:
    return Case(
        name="load/26_million",
        item=None,
        what="loading a checkpoint of 26 million parameters (hidden 512, 8 layers), checks included",
        inputs="inputs:language_model",
        sizes={**STRIPED, "hidden": 512, "length": 32},
        smoke=TINY,
        sides=(
            Side(name="ours", task="ours.practice:load", environment="ours"),
            Side(name="stripedhyena", task="peers.stripedhyena:load"),
        ),
        gate=Gate(
            reference=Side(name="wide", task="ours.models:forward", environment="ours", settings={"dtype": "float64"}),
            bounds={"logits": LOGITS_BOUND},
        ),
        goals=(Goal(against="stripedhyena", bound=None),),
    )


def importing(name: str, what: str, ours: str, peer: str, theirs: str) -> Case:
    return Case(
        name=f"import/{name}",
        item=None,
        what=what,
        inputs="inputs:nothing",
        sides=(
            Side(name="ours", task="steps:importing", environment="ours", settings={"code": ours}),
            Side(name=peer, task="steps:importing", settings={"code": theirs}),
        ),
        gate=Gate(bounds={"imported": 0.0}),
        goals=(Goal(against=peer, bound=None),),
    )


CASES = (
    throughput("score", "mean", "scoring 64 sequences of 512 to 1,024 tokens, hidden 256, 8 layers, 8 modes"),
    throughput("embed", "embedding", "embedding 64 sequences of 512 to 1,024 tokens, hidden 256, 8 layers, 8 modes"),
    load(),
    importing("library", "import of the library alone", "import crocuta", "import torch", "import torch"),
    importing(
        "model",
        "import of all that loads and runs a model",
        "import crocuta.checkpoints.load, crocuta.inference.generate",
        "stripedhyena",
        "import stripedhyena.model, stripedhyena.generation",
    ),
)
