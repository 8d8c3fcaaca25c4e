"""Generation by crocuta: a token at a time from a state, sampling included, and whole generations as users ask."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

import crocuta
from crocuta import SamplingConfig
from crocuta.inference.sampling import row_generators, sample
from crocuta.model.lm import Model
from crocuta.model.state import ModelState
from suite.ours.models import model_of
from suite.task import NotRun, Settings, Task, Tensors

Step: TypeAlias = Callable[[Tensor, ModelState], Tensor]
"""(ids [b], state) -> logits [b v]; the state moves on."""

SAMPLING = SamplingConfig(top_k=50, top_p=0.7)
"""The peer's own defaults."""


def decode(inputs: Tensors, sizes: Settings) -> Task:
    """Tokens one by one after a prompt, each sampled from the last; a unit is a token. ``weights``: their precision."""
    model = model_of(inputs, sizes).eval()
    step, prompt, count = step_of(model, sizes["weights"]), sizes["prompt"], sizes["length"] - sizes["prompt"]
    state, start = _read(model, inputs["ids"][:, :prompt])
    generators = row_generators([0])

    @torch.inference_mode()
    def run() -> None:
        ids = start
        for _ in range(count):
            ids = sample(step(ids, state), SAMPLING, generators).ids

    @torch.inference_mode()
    def answers() -> Tensors:
        fresh, _ = _read(model, inputs["ids"][:, :prompt])
        told = [step(ids, fresh) for ids in inputs["ids"][:, prompt:].unbind(1)]
        return {"logits": torch.stack(told, 1).float()}

    return Task(run, answers, units=count)


def step_of(model: Model, weights: str) -> Step:
    """The compiled step of the whole model where the library has it, else a model's ``extend`` by one token."""
    if importlib.util.find_spec("crocuta.model.step") is not None:
        return importlib.import_module("crocuta.model.step").Stepper(model, weights=weights).step
    if weights == "int8":
        raise NotRun("crocuta has no decoding step with int8 weights")
    model = model.to({"float32": torch.float32, "bfloat16": torch.bfloat16}[weights])
    return lambda ids, state: model.extend(ids[:, None], state)[:, 0]


@torch.inference_mode()
def _read(model: Model, ids: Tensor, room: int | None = None) -> tuple[ModelState, Tensor]:
    """The state after a prompt, and the most likely token after it."""
    state = model.init_state(len(ids), room)
    return state, model.extend(ids, state)[:, -1].argmax(-1)


def told(inputs: Tensors, sizes: Settings) -> Task:
    """The logits that decoding gives at each place, by one forward pass: the truth."""
    model, ids = model_of(inputs, sizes).eval(), inputs["ids"]

    @torch.inference_mode()
    def run() -> Tensor:
        return model(ids)[:, sizes["prompt"] :]

    return Task(run, lambda: {"logits": run()})


def implicit(inputs: Tensors, sizes: Settings) -> Task:
    """The second half of a sequence token by token, by exact online convolution; a unit is a token.

    From the middle to the end every size of tile happens as often as in a whole generation, the largest included.
    """
    model, ids, length = model_of(inputs, sizes).eval(), inputs["ids"], sizes["length"]
    step, half, generators = step_of(model, "float32"), length // 2, row_generators([0])
    read, start = _read(model, ids[:, :half], length)

    @torch.inference_mode()
    def run() -> None:
        state, token = read.copy(), start
        for _ in range(length - half):
            token = sample(step(token, state), SamplingConfig(), generators).ids

    @torch.inference_mode()
    def answers() -> Tensors:
        state = read.copy()
        return {"logits": torch.stack([step(token, state) for token in ids[:, half:].unbind(1)], 1)}

    return Task(run, answers, units=length - half)


def generate(inputs: Tensors, sizes: Settings) -> Task:
    """``crocuta.generate`` from prompt to last token; a unit is a token. Answers: the greedy continuation."""
    model, prompt = model_of(inputs, sizes).eval(), inputs["ids"][0, : sizes["prompt"]]

    def continued(tokens: int, sampling: SamplingConfig) -> list[int]:
        return crocuta.generate(model, None, [prompt], max_tokens=tokens, sampling=sampling)[0].ids

    greedy = SamplingConfig(temperature=0)
    return Task(
        lambda: continued(sizes["tokens"], SAMPLING),
        lambda: {"greedy": torch.tensor(continued(32, greedy))},
        units=sizes["tokens"],
    )
