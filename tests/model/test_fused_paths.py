"""A Hyena mixer in one compiled operator is the mixer made of torch's parts: outputs, states and every gradient."""

import dataclasses

import pytest
import torch
from tiny_models import FILTERS, random_ids, tiny_config, tiny_model

from crocuta.model.build import build_model
from crocuta.model.hyena import HyenaMixer
from crocuta.ops.kernels.library import library, switched_off, why_not

pytestmark = pytest.mark.skipif(library() is None, reason=why_not() or "")


def pass_through(kind: str, length: int) -> dict[str, torch.Tensor]:
    """Logits of a batch and the gradient of every parameter, in float64."""
    model = tiny_model(kind, torch.float64, seed=1)
    logits = model(random_ids(2, length, seed=2))
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("length", [1, 5, 90])
def test_logits_and_gradients_equal_those_of_torch(kind, length):
    compiled = pass_through(kind, length)
    with switched_off():
        expected = pass_through(kind, length)
    assert compiled.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
@pytest.mark.parametrize("kind", FILTERS)
def test_a_state_goes_from_one_path_to_the_other(kind):
    """What one has written the other reads: a state saved on one machine goes on on another."""
    model, ids = tiny_model(kind, torch.float64, seed=1), random_ids(2, 60, seed=3)
    expected, state = model(ids), model.init_state(2, 64)
    got = [model.extend(ids[:, :25], state)]
    with switched_off():
        got.append(model.extend(ids[:, 25:40], state))
    got.append(model.extend(ids[:, 40:], state))
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", FILTERS)
def test_the_compiled_operator_is_what_runs(kind, monkeypatch):
    """The control: without this the two tests above could compare torch with itself."""
    seen: list[bool] = []
    model = tiny_model(kind, torch.float32, seed=1)
    for module in model.modules():
        if isinstance(module, HyenaMixer):
            original = module.filter.fused
            monkeypatch.setattr(module.filter, "fused", lambda *a, _f=original: seen.append(True) or _f(*a))
    model(random_ids(1, 8))
    assert seen


@torch.no_grad()
def test_a_bfloat16_model_that_rounds_as_published_is_not_fused(monkeypatch):
    config = dataclasses.replace(tiny_config("complex-raw"), precision="upstream")
    model = build_model(config, seed=1).to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, HyenaMixer):
            monkeypatch.setattr(module.filter, "fused", lambda *a: pytest.fail("fused"))
    model(random_ids(1, 8))
