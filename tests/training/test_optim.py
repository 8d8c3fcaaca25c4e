"""Which parameter is trained how: groups by role, the schedule, and the optimiser's state under names."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import KINDS, random_ids, tiny_model
from torch import nn

from crocuta.model.filters import Filter
from crocuta.model.norm import LayerNorm, RMSNorm
from crocuta.training.config import OptimizerConfig
from crocuta.training.optim import (
    learning_rate_factor,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    parameter_groups,
    set_learning_rate,
)

CONFIG = OptimizerConfig(learning_rate=0.1, filter_learning_rate=0.01, weight_decay=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_in_exactly_one_group(kind):
    model = tiny_model(kind)
    groups = parameter_groups(model)
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    held = [id(p) for group in make_optimizer(model, CONFIG).param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_role_is_the_module_s(kind):
    model = tiny_model(kind)
    roles = {name: role for role, group in parameter_groups(model).items() for name in group}
    filters = [name for name, module in model.named_modules() if isinstance(module, Filter)]
    for name in roles:
        owner = model.get_submodule(name.rpartition(".")[0])
        if any(name.startswith(f"{f}.") for f in filters):
            expected = "filters"
        elif isinstance(owner, nn.Linear | nn.Embedding) and name.endswith("weight"):
            expected = "matrices"
        else:
            expected = "others"
        assert roles[name] == expected, name
    others = {name.rpartition(".")[2] for name, role in roles.items() if role == "others"}
    assert others <= {"scale", "bias", "short_taps", "short_bias", "skip"}
    assert any(isinstance(module, RMSNorm | LayerNorm) for module in model.modules())


@pytest.mark.parametrize("kind", ["stripe", "implicit"])
def test_only_matrices_decay_and_filters_have_their_own_rate(kind):
    """One step with gradients of zero: what moves, moves by decay alone."""
    model = tiny_model(kind)
    groups = parameter_groups(model)
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = make_optimizer(model, CONFIG)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if name in groups["matrices"] else before[name]
        torch.testing.assert_close(parameter, expected, msg=name)
    for name, parameter in model.named_parameters():
        parameter.grad = torch.ones_like(parameter)
        before[name] = parameter.detach().clone()
    set_learning_rate(optimizer, 0.5)
    optimizer.state.clear()  # the first step of Adam is as long as the rate
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = 0.005 if name in groups["filters"] else 0.05
        decayed = before[name] * (1 - rate * 0.5) if name in groups["matrices"] else before[name]
        torch.testing.assert_close(parameter, decayed - rate, rtol=1e-5, atol=1e-6, msg=name)


def test_filters_take_the_common_rate_where_none_is_given():
    optimizer = make_optimizer(tiny_model("stripe"), OptimizerConfig(learning_rate=0.1))
    assert {group["role"]: group["lr"] for group in optimizer.param_groups} == dict.fromkeys(
        ("matrices", "others", "filters"), 0.1
    )


def test_a_rate_of_zero_freezes_the_filters():
    model = tiny_model("stripe", seed=1)
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=0.1, filter_learning_rate=0.0))
    model(random_ids(1, 20)).square().mean().backward()
    optimizer.step()
    filters = parameter_groups(model)["filters"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in filters), name


def test_frozen_parameters_are_left_out():
    model = tiny_model("stripe")
    model.embedding.weight.requires_grad_(False)
    groups = parameter_groups(model)
    assert "embedding.weight" not in {name for group in groups.values() for name in group}


@given(
    steps=st.integers(2, 500),
    warmup=st.integers(0, 50),
    final=st.sampled_from([0.0, 0.1, 1.0]),
    schedule=st.sampled_from(["cosine", "linear"]),
)
def test_the_schedule_warms_up_and_then_only_falls(steps, warmup, final, schedule):
    config = OptimizerConfig(warmup_steps=warmup, final_fraction=final, schedule=schedule)
    factors = [learning_rate_factor(config, step, step / steps) for step in range(steps)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert all(b <= a + 1e-12 for a, b in zip(factors[max(0, warmup - 1) :], factors[max(1, warmup) :]))
    assert factors[0] == pytest.approx(1 / max(1, warmup))
    assert learning_rate_factor(config, steps, 1.0) == pytest.approx(final * min(1, (steps + 1) / max(1, warmup)))


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        ("cosine", 0.5, 0.55),
        ("linear", 0.5, 0.55),
        ("cosine", 0.25, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4),
        ("linear", 0.25, 0.775),
    ],
)
def test_points_of_the_schedule(schedule, progress, expected):
    config = OptimizerConfig(warmup_steps=10, final_fraction=0.1, schedule=schedule)
    assert learning_rate_factor(config, 100, progress) == pytest.approx(expected)
    assert learning_rate_factor(config, 4, progress) == pytest.approx(expected / 2)  # half of the warm-up


def test_the_state_goes_under_names_and_comes_back():
    def updates(model, optimizer, seeds):
        for seed in seeds:
            model(random_ids(1, 20, seed=seed)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model = tiny_model("stripe", seed=1)
    optimizer = make_optimizer(model, CONFIG)
    updates(model, optimizer, range(3))
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    assert tensors.keys() == {
        f"{name}.{key}" for name, _ in model.named_parameters() for key in ("step", "exp_avg", "exp_avg_sq")
    }
    twin = copy.deepcopy(model)
    restored = make_optimizer(twin, CONFIG)
    load_optimizer_tensors(twin, restored, tensors)
    updates(model, optimizer, range(3, 6))
    updates(twin, restored, range(3, 6))
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert all(torch.equal(tensors[f"{n}.step"], torch.tensor(3.0)) for n, _ in model.named_parameters())
