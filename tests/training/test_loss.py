"""The loss in turns is the loss at once: value and gradients; targets of -100 do not count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCABULARY, random_ids, tiny_model

from crocuta.model.lm import Model
from crocuta.training import loss as loss_module
from crocuta.training.loss import next_token_loss


def run(model: Model, ids: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = next_token_loss(model, ids, targets)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["attention", "real-raw"])  # an untied and a tied head
@pytest.mark.parametrize("turn", [1, 7, 32, 59, 60, 10_000])
def test_in_turns_as_at_once(kind, turn, monkeypatch):
    model = tiny_model(kind, torch.float64, seed=1)
    ids, targets = random_ids(3, 20, seed=1), random_ids(3, 20, seed=2)
    targets[0, 5:9] = -100
    targets[2] = -100
    model.zero_grad()
    direct = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=-100)
    direct.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    monkeypatch.setattr(loss_module, "_LOGITS", turn * VOCABULARY)
    sizes: list[int] = []
    original = Model.logits
    monkeypatch.setattr(Model, "logits", lambda self, h: sizes.append(h.shape[1]) or original(self, h))
    loss, gradients = run(model, ids, targets)
    assert max(sizes) <= max(turn, 1)
    torch.testing.assert_close(loss, direct.detach(), rtol=1e-6, atol=0, check_dtype=False)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9, msg=name)


def test_the_loss_is_float32_under_autocast():
    model = tiny_model("stripe", seed=1)
    ids, targets = random_ids(3, 20, seed=1), random_ids(3, 20, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(model, ids, targets)
    assert loss.dtype == torch.float32
    wide = next_token_loss(model.double(), ids, targets)
    assert float(loss.detach()) == pytest.approx(float(wide.detach()), rel=0.05)


def test_a_uniform_model_loses_log_v():
    model = tiny_model("attention")
    with torch.no_grad():
        model.head.weight.zero_()
    loss = next_token_loss(model, random_ids(2, 9), random_ids(2, 9))
    assert float(loss.detach()) == pytest.approx(2.7725887, rel=1e-6)
