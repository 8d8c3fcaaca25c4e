"""Folders of training checkpoints whose every part tells its step, for the tests of what survives."""

import os
from pathlib import Path

import torch

from crocuta.checkpoints import commit
from crocuta.training.checkpoint import Restored, TrainingCheckpoints


def contents(step: int, size: int = 40) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, object]]:
    """A checkpoint of which every part tells its step."""
    tensors = {
        "model": {"w": torch.full((size, 5), float(step)), "b": torch.tensor([step], dtype=torch.bfloat16)},
        "optimizer": {
            "0.exp_avg": torch.full((size,), -float(step)),
            "rng": torch.arange(9, dtype=torch.uint8),
        },
    }
    return tensors, {"step": step, "loss": 1 / (step + 3), "cursor": [step, 2**70], "note": "ü", "none": None}


def check(restored: Restored | None) -> int:
    """The step of a checkpoint after checking that every bit of it is of that step."""
    assert restored is not None
    tensors, state = contents(restored.step, restored.tensors["model"]["w"].shape[0])
    assert restored.state == state
    assert restored.tensors.keys() == tensors.keys()
    for group, named in tensors.items():
        assert restored.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            found = restored.tensors[group][name]
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
    return restored.step


def make(folder: Path, steps: range, keep: int = 2) -> None:
    with TrainingCheckpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, *contents(step))


def steps_in(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("step-"))


def unfinished(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(commit.TEMPORARY)]
