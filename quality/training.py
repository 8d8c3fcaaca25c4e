"""One model trained on one row and tested: the same loss, optimizer and schedule for every model."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from models import LastTokenModel, Shape, TokenModel, model_config
from rows import Row

from crocuta.data.synthetic import IGNORED, Examples
from crocuta.errors import NonFiniteError
from crocuta.training.config import OptimizerConfig
from crocuta.training.optim import learning_rate_factor, make_optimizer, set_learning_rate

_TEST_TOKENS = 1 << 15
"""Tokens of a pass in a test."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How every model of a row is trained, and on how many updates."""

    shape: Shape
    steps: int
    batch: int
    learning_rates: tuple[float, ...] = (5e-3,)
    weight_decays: tuple[float, ...] = (0.1,)
    """Each pair of a rate and a decay is trained; the best on the row's validation draw is tested."""
    warmup: int = 50


@dataclass(frozen=True)
class Score:
    """Of the counted positions of a test: the share that was right, mean bits of the right answer, their number."""

    accuracy: float
    bits: float
    counted: int


def run(row: Row, kind: str, recipe: Recipe, *, seed: int, device: str = "cpu") -> dict[str, Any]:
    """Train a model of ``kind`` with each learning rate and decay, and test the best: a JSON object.

    Where there is only one pair, or the row has nothing to choose by, the first is taken.
    """
    started, used = time.perf_counter(), time.process_time()
    pairs = [(rate, decay) for rate in recipe.learning_rates for decay in recipe.weight_decays]
    validation = row.validation() if len(pairs) > 1 else None
    best, chosen, best_score = None, pairs[0], None
    for pair in pairs if validation is not None else pairs[:1]:
        model = train(row, kind, recipe, *pair, seed=seed, device=device)
        score = None if validation is None else measure(model, validation)
        if best_score is None or (score is not None and score.accuracy > best_score.accuracy):
            best, chosen, best_score = model, pair, score
    assert best is not None
    return {
        "row": row.name,
        "model": kind,
        "parameters": sum(p.numel() for p in best.parameters()),
        "sequences_seen": recipe.steps * recipe.batch,
        "learning_rate": chosen[0],
        "weight_decay": chosen[1],
        "runs": len(pairs) if validation is not None else 1,
        "seed": seed,
        "unit": row.unit,
        "tests": {name: vars(measure(best, examples)) for name, examples in row.tests().items()},
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
    }


def train(
    row: Row, kind: str, recipe: Recipe, learning_rate: float, weight_decay: float, *, seed: int, device: str = "cpu"
) -> TokenModel | LastTokenModel:
    """A model of ``kind`` after ``recipe.steps`` updates of AdamW. Raises NonFiniteError."""
    config = model_config(kind, recipe.shape, row.vocab_size, row.length)
    model = (TokenModel if row.decoder == "tokens" else LastTokenModel)(config, seed).to(device)
    options = OptimizerConfig(
        learning_rate=learning_rate, weight_decay=weight_decay, warmup_steps=min(recipe.warmup, recipe.steps)
    )
    optimizer = make_optimizer(model, options)
    for step in range(recipe.steps):
        progress = step / recipe.steps
        ids, targets = (torch.from_numpy(a).to(device) for a in row.batch(step, recipe.batch))
        set_learning_rate(optimizer, learning_rate_factor(options, step, progress))
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
    if not math.isfinite(float(loss.detach())):
        raise NonFiniteError(f"the loss of {kind} on {row.name} is not finite", given=float(loss.detach()))
    return model.eval()


@torch.no_grad()
def measure(model: torch.nn.Module, examples: Examples) -> Score:
    """The score of all counted positions; sums in float64."""
    device = next(model.parameters()).device
    rows = max(1, _TEST_TOKENS // examples.inputs.shape[1])
    right, nats, counted = 0, 0.0, 0
    for first in range(0, len(examples.inputs), rows):
        ids, targets = (torch.from_numpy(a[first : first + rows]).to(device) for a in examples)
        asked = targets != IGNORED
        logits, answers = model(ids)[asked], targets[asked]
        right += int((logits.argmax(-1) == answers).sum())
        nats += float(F.cross_entropy(logits.double(), answers, reduction="sum"))
        counted += len(answers)
    return Score(right / counted, nats / math.log(2) / counted, counted)
