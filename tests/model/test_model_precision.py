"""What stays in float32 does so by type, and a bfloat16 model obeys the law of the others."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import KINDS, MAX_LENGTH, random_ids, tiny_model
from torch import nn

from crocuta.model.attention import Rope
from crocuta.model.filters import Filter
from crocuta.model.lm import Model
from crocuta.model.precision import Float32Module
from crocuta.model.state import HyenaState, ModalState, OnlineState


def wide_names(model: Model) -> set[str]:
    """Parameters and buffers of filters and of rotary embeddings."""
    owners = [(name, module) for name, module in model.named_modules() if isinstance(module, Filter | Rope)]
    return {f"{owner}.{name}" for owner, module in owners for name in module.state_dict()}


def test_rotary_embeddings_and_filters_are_wide_by_type():
    assert issubclass(Filter, Float32Module)
    assert issubclass(Rope, Float32Module)
    assert "blocks.0.mixer.rope.inverse" in wide_names(tiny_model("attention-stored"))


@pytest.mark.parametrize("narrow", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
@pytest.mark.parametrize("kind", KINDS)
def test_narrowing_leaves_filters_and_frequencies_in_float32(kind, narrow):
    model = tiny_model(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wide = wide_names(model)
    assert wide or kind.startswith(("attention", "gated-conv"))
    for name, tensor in narrow(model).state_dict().items():
        if name in wide:
            assert tensor.dtype == torch.float32, name
            assert torch.equal(tensor, before[name]), name
        else:
            assert tensor.dtype.itemsize == 2, name


@pytest.mark.parametrize("kind", KINDS)
def test_double_takes_everything_and_float_brings_it_back(kind):
    model = tiny_model(kind)
    before = copy.deepcopy(model.state_dict())
    model.double()
    assert {t.dtype for t in model.state_dict().values()} == {torch.float64}
    assert model(random_ids(1, 9)).dtype == torch.float64
    model.float()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_plain_module_would_lose_its_poles():
    """The control: what float32 protects. A decay time of 50,000 tokens rounds to a pole of 1 in bfloat16."""
    plain = nn.ParameterDict({"poles": torch.tensor([1 - 1 / 50_000])}).to(torch.bfloat16)
    assert plain["poles"].item() == 1.0


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_filter_states_are_wide(kind, dtype, expected):
    model = tiny_model(kind, dtype)
    ids = random_ids(2, 12)
    assert model.hidden(ids).dtype == dtype
    assert model(ids).dtype == expected
    state = model.init_state(2, MAX_LENGTH)
    assert model.extend(ids, state, torch.tensor([12, 5])).dtype == expected
    assert model.extend(ids[:, :1], state).dtype == expected
    for layer in state.layers:
        match layer:
            case HyenaState(long=ModalState(modes=held) | OnlineState(long=held)):
                assert held.dtype == expected


@torch.no_grad()
def test_bfloat16_logits_are_a_float32_product():
    """Not a bfloat16 product cast afterwards, whose steps are 2^-8 of the value."""
    model = tiny_model("attention", torch.bfloat16)
    hidden = model.hidden(random_ids(2, 30))
    exact = hidden.double() @ model.head.weight.double().t()
    torch.testing.assert_close(model.logits(hidden).double(), exact, rtol=0, atol=1e-6)
    narrow = (hidden @ model.head.weight.t()).double()
    assert (narrow - exact).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_forward_is_extend(kind):
    model = tiny_model(kind, torch.bfloat16, seed=1)
    ids = random_ids(2, 60, seed=2)
    expected, state = model(ids), model.init_state(2, 60)
    pieces = [model.extend(piece, state) for piece in ids.split([20, 1, 1, 33, 5], dim=1)]
    error = (torch.cat(pieces, dim=1) - expected).abs()
    assert error.max() <= 5e-2 * expected.abs().max()
    assert error.mean() <= 1e-2 * expected.std()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_filters_and_logits_in_float32(kind):
    model = tiny_model(kind, seed=1)
    ids = random_ids(2, 50, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids)
        logits.square().mean().backward()
    assert logits.dtype == torch.float32
    difference = (logits - model(ids)).abs()
    assert 0 < difference.mean() <= 2e-2 * logits.std()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
