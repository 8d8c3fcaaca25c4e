"""Compiles tiny models as one graph each and prints, a line of JSON each, how far that is from the model itself.

A process of its own: where the tests check the types of arguments, torch.compile finds those checks in its way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_models import random_ids, tiny_model

from crocuta.model.captured import on_device
from crocuta.model.lm import Model
from crocuta.ops.kernels.library import switched_off

GRAPH = {"fullgraph": True, "backend": "aot_eager", "dynamic": False}


def gradients(model: Model, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-9))


def train(kind: str) -> dict[str, float]:
    """Forward and backward."""
    model, ids = tiny_model(kind, torch.float64, seed=1), random_ids(2, 40, seed=2)
    logits = torch.compile(model, **GRAPH)(ids)
    found, true = gradients(model, logits), gradients(model, model(ids))
    assert found.keys() == true.keys()
    return {
        "logits": distance(logits, model(ids)),
        "gradients": max(distance(found[name], true[name]) for name in true),
    }


@torch.no_grad()
def decode(kind: str) -> dict[str, float]:
    """Ten tokens after a prompt; one graph for all of them."""
    model, ids = tiny_model(kind, torch.float64, seed=1), random_ids(2, 30, seed=2)
    expected, state = model(ids)[:, 20:], model.init_state(2, 64)
    model.extend(ids[:, :20], state)
    positions = state.lengths.clone()
    layers = on_device(state, positions)
    step = torch.compile(lambda ids: model.logits(model.advance(ids, layers)), **GRAPH)
    found = []
    for token in ids[:, 20:].split(1, dim=1):
        found.append(step(token))
        positions += 1
    return {"logits": distance(torch.cat(found, 1), expected)}


def refuse(_: str) -> dict[str, str]:
    """Ids outside the vocabulary are an error of the graph too."""
    model = torch.compile(tiny_model("explicit", torch.float64, seed=1), **GRAPH)
    try:
        model(torch.full((2, 40), 99))
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": "none"}


WORK = {
    "train": train,
    "decode": decode,
    "train_on_torch": switched_off()(train),
    "decode_on_torch": switched_off()(decode),
    "refuse": refuse,
}


if __name__ == "__main__":
    for work, kind in (argument.split("/") for argument in sys.argv[1:]):
        torch._dynamo.reset()
        found = WORK[work](kind)
        sys.stdout.write(json.dumps({"work": work, "kind": kind, **found}) + "\n")
