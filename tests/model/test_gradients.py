"""Gradients are those of the loss, reach every parameter, and are the same when activations are computed again."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FILTERS, KINDS, ONLINE, random_ids, tiny_model

from crocuta.model.lm import Model
from crocuta.training.loss import next_token_loss


def gradients(model: Model) -> dict[str, torch.Tensor]:
    """Of the loss of a fixed batch; clears them before and after."""
    model.zero_grad()
    ids = random_ids(2, 71, seed=2)
    next_token_loss(model, ids[:, :-1], ids[:, 1:]).backward()
    result = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_one(kind):
    model = tiny_model(kind, seed=1)
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().max() > 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_the_slope_of_the_loss(kind):
    """Along a random direction for each parameter tensor alone, in float64, by central differences."""
    model = tiny_model(kind, torch.float64, seed=1)
    found = gradients(model)
    ids, step = random_ids(2, 71, seed=2), 1e-6
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            losses = []
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * step)
                losses.append(float(next_token_loss(model, ids[:, :-1], ids[:, 1:])))
                parameter.sub_(direction, alpha=sign * step)
            slope = (losses[0] - losses[1]) / (2 * step)
            assert slope == pytest.approx(float((found[name] * direction).sum()), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_no_bit(kind):
    model = tiny_model(kind, dropout=0.2, seed=1).train()
    torch.manual_seed(4)
    kept = gradients(model)
    model.checkpoint_activations = True
    torch.manual_seed(4)
    computed_again = gradients(model)
    torch.manual_seed(5)
    other_dropout = gradients(model)
    for name, gradient in kept.items():
        assert torch.equal(computed_again[name], gradient), name
    assert any(not torch.allclose(other_dropout[name], gradient) for name, gradient in kept.items())


def test_activation_checkpointing_runs_the_blocks_twice_and_keeps_less():
    kept = {}
    for checkpointed in (False, True):
        model = tiny_model("stripe", seed=1).train()
        model.checkpoint_activations = checkpointed
        calls: list[int] = []
        for index, block in enumerate(model.blocks):
            block.register_forward_pre_hook(lambda *_, i=index, c=calls: c.append(i))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            loss = model.hidden(random_ids(2, 150, seed=2)).square().mean()
            kept[checkpointed] = sum(sizes)
        loss.backward()
        assert calls == [0, 1, 2, 3, 4] + [4, 3, 2, 1, 0] * checkpointed
    assert kept[True] < kept[False] / 4


@torch.no_grad()
def test_without_gradients_nothing_is_computed_twice():
    model = tiny_model("stripe", seed=1).train()
    model.checkpoint_activations = True
    calls: list[int] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    model(random_ids(1, 20))
    assert len(calls) == 5


@pytest.mark.parametrize("kind", [kind for kind in FILTERS if kind not in ONLINE])
def test_a_carried_state_carries_gradients(kind):
    """Through tails and modes; the states of attention and online convolutions are memory that is written in place."""
    model = tiny_model(kind, torch.float64, seed=1)
    ids = random_ids(1, 50, seed=2)
    weights = torch.randn(1, 50, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (model(ids) * weights).sum().backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    state = model.init_state(1, 50)
    pieces = [model.extend(piece, state) for piece in ids.split([20, 2, 28], dim=1)]
    (torch.cat(pieces, dim=1) * weights).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-8, atol=1e-9, msg=name)
