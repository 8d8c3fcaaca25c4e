"""Tables that inference keeps between calls are never those of other parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from kernel_paths import each_path
from tiny_models import FILTERS, MODAL, random_ids, tiny_model

from crocuta.model.filters import ImplicitFilter
from crocuta.model.filters import modal as filters
from crocuta.model.lm import Model
from crocuta.model.precision import Memo
from crocuta.ops import modal
from crocuta.ops.kernels.library import library, switched_off, why_not


def outputs(model: Model) -> list[torch.Tensor]:
    """By every path that keeps something: whole, chunked, and one token."""
    with torch.no_grad():
        ids, state = random_ids(2, 30, seed=1), model.init_state(2, 40)
        return [model(ids), model.extend(ids, state), model.extend(ids[:, :1], state)]


def load(model: Model) -> None:
    model.load_state_dict(tiny_model(model.kind, seed=9).state_dict())


def assign(model: Model) -> None:
    model.load_state_dict(tiny_model(model.kind, seed=9).state_dict(), assign=True)


def step(model: Model) -> None:
    """Fused, which changes parameters without raising their version."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.05, fused=True).step()
    model.zero_grad()


def scale_in_place(model: Model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def cast(model: Model) -> None:
    model.double()


def train_and_go_back(model: Model) -> None:
    """A forward pass with gradients in between does not bring older tables back."""
    scale_in_place(model)
    model(random_ids(1, 8)).sum().backward()
    model.zero_grad()


CHANGES = (load, assign, step, scale_in_place, cast, train_and_go_back)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", FILTERS)
@each_path
def test_a_change_of_parameters_is_seen(kind: str, change: Callable[[Model], None], path) -> None:
    with path():
        check_a_change(kind, change)


def check_a_change(kind: str, change: Callable[[Model], None]) -> None:
    model = tiny_model(kind, seed=1)
    model.kind = kind
    before = outputs(model)
    change(model)
    after = outputs(model)
    fresh = outputs(copy.deepcopy(model))  # a copy starts with nothing kept
    for old, new, expected in zip(before, after, fresh, strict=True):
        assert torch.equal(new, expected)
        assert change is cast or not torch.allclose(new, old, atol=1e-3)


@pytest.mark.parametrize("kind", MODAL)
def test_tables_are_made_once(kind, monkeypatch):
    """The point of keeping them; and with gradients they are made at every call."""
    calls: list[str] = []
    for name in ("modal_tables", "modal_step_constants"):
        original = getattr(modal, name)
        monkeypatch.setattr(modal, name, lambda *a, _f=original, _n=name: calls.append(_n) or _f(*a))
    model = tiny_model(kind, seed=1)
    with switched_off():
        for _ in range(3):
            outputs(model)
        assert sorted(calls) == ["modal_step_constants"] * 2 + ["modal_tables"] * 2  # one a block
        calls.clear()
        for _ in range(3):
            model(random_ids(1, 9))
        assert calls == ["modal_tables"] * 6


@pytest.mark.skipif(library() is None, reason=why_not() or "")
@pytest.mark.parametrize("kind", MODAL)
def test_constants_of_the_compiled_kernel_are_made_once(kind, monkeypatch):
    calls: list[int] = []
    original = filters.modal_constants
    monkeypatch.setattr(filters, "modal_constants", lambda *a: calls.append(1) or original(*a))
    model = tiny_model(kind, seed=1)
    for _ in range(3):
        outputs(model)
    assert len(calls) == 2  # one a block
    for _ in range(3):
        model(random_ids(1, 9))
    assert len(calls) == 2 + 6


def test_taps_of_an_implicit_filter_are_made_once_a_length(monkeypatch):
    lengths: list[int] = []
    original = ImplicitFilter._make_taps
    monkeypatch.setattr(ImplicitFilter, "_make_taps", lambda self, *a: lengths.append(a[-1]) or original(self, *a))
    model = tiny_model("implicit", seed=1)
    with torch.no_grad():
        for length in (20, 20, 30, 30):
            model(random_ids(1, length))
        states = [model.init_state(1, longest) for longest in (40, 25)]
        for state in states * 5:  # by turns
            model.extend(random_ids(1, 1), state)
    assert lengths == [20, 20, 30, 30, 64, 64]  # two blocks


def test_gradients_do_not_stop_at_kept_tables():
    model = tiny_model("complex-stable", seed=1)
    outputs(model)
    model(random_ids(1, 9)).sum().backward()
    assert model.blocks[0].mixer.filter.log_decay.grad.abs().max() > 0


@pytest.mark.parametrize("kind", FILTERS)
def test_inference_mode_before_and_after(kind):
    expected = outputs(tiny_model(kind, seed=1))
    with torch.inference_mode():
        made_inside = tiny_model(kind, seed=1)
        model_inside = outputs(made_inside)
    model = tiny_model(kind, seed=1)
    with torch.inference_mode():
        outputs(model)
    for logits in (model_inside, outputs(made_inside), outputs(model)):
        assert all(map(torch.equal, logits, expected))
    model(random_ids(1, 9)).sum().backward()
    with torch.inference_mode():
        for parameter in made_inside.parameters():
            parameter.mul_(1.1)
        assert not any(map(torch.equal, outputs(made_inside), expected))


def test_one_entry_a_name():
    memo, parameter = Memo(), torch.zeros(1)
    with torch.no_grad():
        assert memo.get("a", [parameter], lambda: 1, variant=10) == 1
        assert memo.get("a", [parameter], lambda: 2, variant=10) == 1
        assert memo.get("a", [parameter], lambda: 3, variant=20) == 3
        assert memo.get("a", [parameter], lambda: 4, variant=10) == 4
        assert memo.get("b", [parameter], lambda: 5, variant=10) == 5
