"""Whole models of crocuta: prefill, training steps, scoring, embedding; and the floor that no mixer can go below."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import crocuta
from crocuta.model.build import build_model
from crocuta.model.lm import Model
from crocuta.training.loss import next_token_loss
from suite.inputs import weights_of
from suite.models import config_of
from suite.steps import rows_of, step_task
from suite.task import Settings, Task, Tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def model_of(inputs: Tensors, sizes: Settings) -> Model:
    """The case's model with the case's weights, in the side's dtype."""
    model = build_model(config_of(sizes), dtype=DTYPES[sizes.get("dtype", "float32")])
    model.load_state_dict(weights_of(inputs, sizes.get("group", "weights")))
    return model


def prefill(inputs: Tensors, sizes: Settings) -> Task:
    """Reading a prompt: logits of every token, and the state to go on from."""
    model, ids = model_of(inputs, sizes).eval(), inputs["ids"]

    @torch.inference_mode()
    def run() -> Tensor:
        state = model.init_state(len(ids), ids.shape[1])
        return model.extend(ids, state)

    return Task(run, lambda: {"logits": run()})


def forward(inputs: Tensors, sizes: Settings) -> Task:
    """Logits of every token, without a state."""
    model, ids = model_of(inputs, sizes).eval(), inputs["ids"]

    @torch.inference_mode()
    def run() -> Tensor:
        return model(ids)

    return Task(run, lambda: {"logits": run()})


def without_mixers(inputs: Tensors, sizes: Settings) -> Task:
    """The floor: the same model, whose mixers only project, hand on one third and project again."""
    model, ids = model_of(inputs, sizes).eval(), inputs["ids"]
    for block in model.blocks:
        block.mixer = ProjectionsOnly(block.mixer.projection, block.mixer.output)

    @torch.inference_mode()
    def run() -> Tensor:
        return model(ids)

    return Task(run, lambda: {"finite": run().isfinite().all()[None].float()})


class ProjectionsOnly(nn.Module):
    """W_out (W_in x)[.. d]: the matrix products of a Hyena mixer and nothing else."""

    def __init__(self, projection: nn.Linear, output: nn.Linear) -> None:
        super().__init__()
        self.projection, self.output = projection, output

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.output(self.projection(x)[..., : x.shape[2]])


# --- training ---


def training_step(inputs: Tensors, sizes: Settings) -> Task:
    """Forward, next-token loss, backward, AdamW; ``checkpoint`` recomputes activations."""
    model = model_of(inputs, sizes).train()
    model.checkpoint_activations = sizes.get("checkpoint", False)
    ids, targets = inputs["ids"], inputs["targets"]
    return step_task(model, lambda: next_token_loss(model, ids, targets), str, lambda _, gradient: gradient)


def finite(_: Tensors, __: Settings) -> Task:
    """What a side must answer of which nothing but finiteness can be judged."""
    return Task(lambda: None, lambda: {"finite": torch.ones(1)})


# --- scoring and embedding ---


def score(inputs: Tensors, sizes: Settings) -> Task:
    """Log-likelihoods of many sequences; a unit is a sequence."""
    model, rows = model_of(inputs, sizes).eval(), rows_of(inputs)

    def run() -> Tensor:
        return torch.tensor([found.mean for found in crocuta.score(model, None, rows)])

    return Task(run, lambda: {"mean": run()}, units=len(rows))


def embed(inputs: Tensors, sizes: Settings) -> Task:
    """Mean-pooled hidden states after the final norm; a unit is a sequence."""
    model, rows = model_of(inputs, sizes).eval(), rows_of(inputs)

    def run() -> Tensor:
        return torch.stack([torch.from_numpy(vector) for vector in crocuta.embed(model, None, rows)])

    return Task(run, lambda: {"embedding": run()}, units=len(rows))


def score_one_by_one(inputs: Tensors, sizes: Settings) -> Task:
    """The truth of ``score``: a forward pass a sequence, in the side's dtype."""
    model, rows = model_of(inputs, sizes).eval(), rows_of(inputs)

    @torch.inference_mode()
    def answers() -> Tensors:
        logs = [model(row[None, :-1])[0].log_softmax(-1) for row in rows]
        return {"mean": torch.stack([log.gather(1, row[1:, None]).mean() for log, row in zip(logs, rows)])}

    return Task(answers, answers)


def embed_one_by_one(inputs: Tensors, sizes: Settings) -> Task:
    """The truth of ``embed``."""
    model, rows = model_of(inputs, sizes).eval(), rows_of(inputs)

    @torch.inference_mode()
    def answers() -> Tensors:
        return {"embedding": torch.stack([model.hidden(row[None])[0].mean(0) for row in rows])}

    return Task(answers, answers)
