"""What both sides' adapters share: gradients of an operator, steps of a model, imports. Imports torch only."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from suite.task import Settings, Task, Tensors

Layouts = Mapping[str, Callable[[Tensor], Tensor]]
"""By name, what turns the peer's layout of a gradient into ours."""


def operator_training(forward: Callable[[], Tensor], leaves: Tensors, dy: Tensor, layouts: Layouts) -> Task:
    """Forward and backward of an operator that gives y [1 l d]."""
    for leaf in leaves.values():
        leaf.requires_grad_()

    def run() -> Tensor:
        for leaf in leaves.values():
            leaf.grad = None
        y = forward()
        y.backward(dy)
        return y

    def answers() -> Tensors:
        y = run()
        found = {"y": y.detach()}
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            found[f"d{name}"] = layouts.get(name, _same)(leaf.grad)
        return found

    return Task(run, answers)


def step_task(
    model: nn.Module,
    loss: Callable[[], Tensor],
    our_name: Callable[[str], str],
    our_layout: Callable[[str, Tensor], Tensor],
) -> Task:
    """A training step with the optimizer that ours has; answers: the loss and every gradient, as ours has them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def run() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    def answers() -> Tensors:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        pairs = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        found = {f"d{our_name(name)}": our_layout(name, grad).clone() for name, grad in pairs}
        optimizer.zero_grad()
        return {"loss": value.detach()[None], **found}

    return Task(run, answers)


def rows_of(inputs: Tensors) -> list[Tensor]:
    """The sequences of a case, of lengths that differ."""
    return [row[:length] for row, length in zip(inputs["ids"], inputs["lengths"].tolist(), strict=True)]


def _same(grad: Tensor) -> Tensor:
    return grad


def importing(_: Tensors, sizes: Settings) -> Task:
    """A fresh interpreter of the same environment that runs ``code``; its clock is that of the child processes."""

    def run() -> None:
        done = subprocess.run([sys.executable, "-c", sizes["code"]], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{sizes['code']!r} failed: {done.stderr.strip().splitlines()[-1]}")

    def answers() -> Tensors:
        run()
        return {"imported": torch.ones(1)}

    return Task(run, answers, clock=children_seconds)


def children_seconds() -> float:
    """CPU time of all children that have ended."""
    times = os.times()
    return times.children_user + times.children_system
