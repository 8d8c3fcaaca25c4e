"""What a user waits for besides arithmetic: loading a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import crocuta
from crocuta.tokenizers.bytes import ByteTokenizer
from suite.ours.models import model_of
from suite.task import Settings, Task, Tensors


def load(inputs: Tensors, sizes: Settings) -> Task:
    """``crocuta.load`` of a folder of ours, checks and all."""
    folder = Path("checkpoint").resolve()
    crocuta.save(model_of(inputs, sizes), ByteTokenizer(), folder)

    def run() -> Tensor:
        model, _ = crocuta.load(folder)
        return model.embedding.weight

    @torch.inference_mode()
    def answers() -> Tensors:
        model, _ = crocuta.load(folder)
        return {"logits": model(inputs["ids"])}

    return Task(run, answers)
