"""Filters that are continued online: tokens by the compiled step, pieces by torch, on one state in any layout."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import random_ids, tiny_model
from torch import Tensor

from crocuta.model.filters import base
from crocuta.model.hyena import HyenaMixer
from crocuta.model.lm import Model
from crocuta.model.state import ModelState, OnlineState
from crocuta.ops.kernels.library import library, switched_off, why_not

pytestmark = pytest.mark.skipif(library() is None, reason=why_not() or "")

KINDS = ("implicit", "explicit-fft", "multi-head", "order-n-shared")
ROOM = 160


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """The rows of each call of the compiled step."""
    calls: list[int] = []

    def counted(u: Tensor, *rest: object) -> Tensor:
        calls.append(len(u))
        return step(u, *rest)

    step = base.online_step
    monkeypatch.setattr(base, "online_step", counted)
    return calls


def online_states(state: ModelState) -> list[OnlineState]:
    found = [getattr(layer, "long", None) for layer in state.layers]
    flat = [item for each in found for item in (each if isinstance(each, list) else [each])]
    return [item for item in flat if isinstance(item, OnlineState)]


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


@torch.no_grad()
def read(model: Model, ids: Tensor, state: ModelState, widths: list[int]) -> Tensor:
    outputs, at = [], 0
    for width in widths:
        outputs.append(model.extend(ids[:, at : at + width], state))
        at += width
    return torch.cat(outputs, 1)


@torch.no_grad()
def truth_of(model: Model, ids: Tensor) -> Tensor:
    with switched_off():
        return model(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_pieces_in_turn(kind, steps):
    """Across blocks of 64: what the one leaves in the buffers, the other goes on from."""
    model, ids = tiny_model(kind, torch.float64), random_ids(2, 150)
    widths = [3, 1, 1, 59, 1, 1, 30, *[1] * 40, 14]
    assert error(read(model, ids, model.init_state(2, ROOM), widths), truth_of(model, ids)) < 1e-9
    assert set(steps) == {2}


@pytest.mark.parametrize("kind", KINDS)
def test_float32_tokens(kind, steps):
    exact, model, ids = tiny_model(kind, torch.float64), tiny_model(kind), random_ids(3, 140)
    assert error(read(model, ids, model.init_state(3, ROOM), [1] * 140), truth_of(exact, ids)) < 1e-5
    assert len(steps) >= 140


@pytest.mark.parametrize("off", [0, 1, 2])
def test_a_library_that_goes_and_comes(off):
    """Every third token without it, as if a state went from machine to machine."""
    model, ids = tiny_model("implicit", torch.float64), random_ids(1, 140)
    state, outputs = model.init_state(1, ROOM), []
    with torch.no_grad():
        for at, column in enumerate(ids.unbind(1)):
            if at % 3 == off:
                with switched_off():
                    outputs.append(model.extend(column[:, None], state))
            else:
                outputs.append(model.extend(column[:, None], state))
    assert error(torch.cat(outputs, 1), truth_of(model, ids)) < 1e-9


def saved(model: Model, state: ModelState, folder) -> ModelState:
    state.save(folder / "state.safetensors")
    return model.load_state(folder / "state.safetensors")


CHANGES = {
    "copied": lambda model, state, _: state.copy(),
    "deep": lambda model, state, _: copy.deepcopy(state),
    "pickled": lambda model, state, _: pickle.loads(pickle.dumps(state)),
    "selected": lambda model, state, _: state.select([0, 1]),
    "joined": lambda model, state, _: state.select([0]).join([state.select([1])]),
    "moved": lambda model, state, _: model.with_room(state, 128),
    "saved": saved,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_states_that_were_changed_go_on(change, tmp_path, steps):
    model, ids = tiny_model("implicit", torch.float64), random_ids(2, 100)
    state = model.init_state(2, 128)
    first = read(model, ids[:, :70], state, [40, *[1] * 30])
    changed = change(model, state, tmp_path)
    second = read(model, ids[:, 70:], changed, [1] * 30)
    assert error(torch.cat([first, second], 1), truth_of(model, ids)) < 1e-9
    assert error(read(model, ids[:, 70:], state, [1] * 30), second) < 1e-12  # the old one was left alone
    assert all(held.long.stride(1) == 1 for held in online_states(changed))
    assert len(steps) >= 90


def test_rows_at_different_places(steps):
    model, ids = tiny_model("implicit", torch.float64), random_ids(3, 120)
    ahead = torch.tensor([50, 64, 7])
    state = model.init_state(3, ROOM)
    with torch.no_grad():
        model.extend(ids[:, :64], state, ahead)
        steps.clear()
        columns = [ids[torch.arange(3), ahead + t][:, None] for t in range(50)]
        got = torch.cat([model.extend(column, state) for column in columns], 1)
    truth = truth_of(model, ids)
    wanted = torch.stack([truth[row, start : start + 50] for row, start in enumerate(ahead.tolist())])
    assert error(got, wanted) < 1e-9
    assert len(steps) == 50 * len(online_states(state))


def test_under_gradients_torch_does_it(steps):
    model, ids = tiny_model("implicit", torch.float64), random_ids(1, 5)
    model.extend(ids[:, :1], model.init_state(1, ROOM)).sum().backward()
    assert not steps
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, HyenaMixer)
    assert mixer.skip is not None
    assert mixer.skip.grad is not None


def test_buffers_that_autograd_watches_are_copied():
    """The token before was read with gradients: they are those of what it read, whatever comes after."""
    model, ids = tiny_model("implicit", torch.float64), random_ids(1, 5)
    state = model.init_state(1, ROOM)
    before = model.extend(ids[:, :1], state)
    watched = [held.near for held in online_states(state)]
    values = [near.detach().clone() for near in watched]
    after = read(model, ids[:, 1:], state, [1] * 4)
    assert all(torch.equal(near, value) for near, value in zip(watched, values, strict=True))
    assert error(torch.cat([before.detach(), after], 1), truth_of(model, ids)) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skip_that_changes_in_place_is_followed(dtype):
    """From the next block on where it is cast."""
    model, ids = tiny_model("implicit").to(dtype), random_ids(1, 70)
    state = model.init_state(1, ROOM)
    read(model, ids[:, :64], state, [1] * 64)
    before, other = state.copy(), state.copy()
    for block in model.blocks:
        block.mixer.skip.neg_()
    got = read(model, ids[:, 64:], state, [1] * 6)
    with switched_off():
        wanted = read(model, ids[:, 64:], other, [1] * 6)
    for block in model.blocks:
        block.mixer.skip.neg_()
    bound = 1e-5 if dtype == torch.float32 else 0.1
    assert error(got, wanted) < bound
    assert error(read(model, ids[:, 64:], before, [1] * 6), wanted) > 4 * bound
