"""A captured step is ``extend``, and what is captured is the same work on the same memory every time.

Without a GPU the function that would be captured runs as it is. That nothing in it asks the host is shown on the device
"meta", which has no numbers: every tensor of every operation must lie there.
"""

import pytest
import torch
from tiny_models import ATTENTION, KINDS, random_ids, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crocuta.errors import InputError, KernelUnavailableError, StateError
from crocuta.model.captured import CapturedStep
from crocuta.model.lm import Model
from crocuta.model.state import AttentionState, ModelState, OnlineState, State

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOM = 40


def parts(state: State):
    """A state and all in it."""
    yield state
    for value in vars(state).values():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, State):
                yield from parts(inner)


def is_online(kind: str) -> bool:
    return any(isinstance(part, OnlineState) for part in parts(tiny_model(kind).init_state(1, ROOM)))


ONLINE = tuple(kind for kind in KINDS if is_online(kind))
CAPTURABLE = tuple(kind for kind in KINDS if kind not in ONLINE)


def begun(kind: str, lengths: list[int], device: str = DEVICE) -> tuple[Model, ModelState, torch.Tensor]:
    """A model, its state after a ragged prompt, and the ids that follow."""
    model = tiny_model(kind, torch.float64, seed=1).to(device)
    ids = random_ids(len(lengths), 20, seed=2).to(device)
    state = model.init_state(len(lengths), ROOM)
    with torch.no_grad():
        model.extend(ids[:, :8], state, torch.tensor(lengths))
    return model, state, ids[:, 8:]


@torch.no_grad()
@pytest.mark.parametrize("kind", CAPTURABLE)
@pytest.mark.parametrize("lengths", [[8, 8], [8, 3]], ids=["aligned", "ragged"])
def test_steps_are_extend_and_leave_states_where_they_are(kind, lengths):
    model, state, ids = begun(kind, lengths)
    other = state.copy()
    addresses = {name: t.data_ptr() for name, t in state.named_tensors() if not name.endswith("lengths")}
    step = CapturedStep(model, state)
    bound = 0 if kind not in ATTENTION and DEVICE == "cpu" else 1e-12  # attention adds up in another order
    for t in range(6):
        expected = model.extend(ids[:, t : t + 1], other)[:, 0]
        torch.testing.assert_close(step(ids[:, t]), expected, rtol=bound, atol=bound)
    for (name, mine), (_, theirs) in zip(step.state.named_tensors(), other.named_tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound)
        assert name.endswith("lengths") or mine.data_ptr() == addresses[name]


class OnlyOn(TorchDispatchMode):
    """Refuses tensors of other devices, and so every copy from or to the host and every number that it asks for."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        assert devices <= {self.device}, f"{func} on {devices}"
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return result


@torch.no_grad()
@pytest.mark.parametrize("kind", CAPTURABLE)
def test_what_is_captured_asks_nothing_of_the_host(kind):
    model = tiny_model(kind, torch.float32).to("meta")
    step = CapturedStep(model, model.init_state(2, ROOM))
    step._run()  # makes what is kept
    with OnlyOn("meta") as mode:
        step._run()
    assert mode.operations > 10


@torch.no_grad()
def test_the_control_of_that_test_sees_the_host():
    model = tiny_model("attention", torch.float32).to("meta")
    with pytest.raises(AssertionError, match=r"on \{"), OnlyOn("meta"):
        model.advance(torch.zeros(1, 1, dtype=torch.int64, device="meta"), model.init_state(1, ROOM).layers)


@torch.no_grad()
def test_the_state_may_be_written_and_go_on_elsewhere_between_steps():
    model, state, ids = begun("complex-raw", [8, 8])
    step, fresh = CapturedStep(model, state), begun("complex-raw", [5, 2])[1]
    step(ids[:, 0])
    step.state.write([0, 1], fresh)
    first = step(ids[:, 1])
    torch.testing.assert_close(first, model.extend(ids[:, 1:2], fresh)[:, 0])
    model.extend(ids[:, 2:5], step.state)
    model.extend(ids[:, 2:5], fresh)
    torch.testing.assert_close(step(ids[:, 5]), model.extend(ids[:, 5:6], fresh)[:, 0])


@torch.no_grad()
def test_attention_rows_that_are_written_stand_where_they_stood():
    model, state, ids = begun("attention-gqa", [8, 8])
    step, fresh = CapturedStep(model, state), begun("attention-gqa", [5, 2])[1]
    step(ids[:, 0])
    step.state.write([0, 1], fresh)
    for t in (1, 2):
        expected = model.extend(ids[:, t : t + 1], fresh)[:, 0]
        torch.testing.assert_close(step(ids[:, t]), expected, rtol=1e-12, atol=1e-12)
    layer = step.state.layers[0]
    assert isinstance(layer, AttentionState)
    assert layer.lengths.tolist() == step.state.lengths.tolist() == [7, 4]


@torch.no_grad()
def test_a_state_of_inference_mode_is_taken_too():
    with torch.inference_mode():
        model, state, ids = begun("complex-raw", [8])
        other = state.copy()
    torch.testing.assert_close(CapturedStep(model, state)(ids[:, 0]), model.extend(ids[:, :1], other)[:, 0])


@pytest.mark.parametrize("kind", ONLINE)
def test_online_convolutions_are_refused_by_block(kind):
    model = tiny_model(kind)
    with pytest.raises(KernelUnavailableError, match=r"online convolution of block \d"):
        CapturedStep(model, model.init_state(1, ROOM))


@torch.no_grad()
def test_what_is_refused_changes_nothing():
    model, state, ids = begun("attention", [8, 8])
    step = CapturedStep(model, state)
    before = step.state.copy()
    with pytest.raises(InputError, match="outside the vocabulary"):
        step(torch.full_like(ids[:, 0], model.config.vocab_size))
    with pytest.raises(InputError, match="one id a row"):
        step(ids[:1, 0])
    for (_, mine), (_, theirs) in zip(step.state.named_tensors(), before.named_tensors(), strict=True):
        assert torch.equal(mine, theirs)
    for _ in range(ROOM - 8):
        step(ids[:, 0])
    with pytest.raises(StateError, match="longer than the model's state"):
        step(ids[:, 0])
    with pytest.raises(StateError, match="longer than the model's state"):
        CapturedStep(model, step.state)
    with pytest.raises(StateError, match="another configuration"):
        CapturedStep(model, tiny_model("complex-raw").init_state(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device to capture on")
@torch.no_grad()
@pytest.mark.parametrize("kind", CAPTURABLE)
def test_a_graph_is_what_runs_on_a_gpu(kind, monkeypatch):
    model, state, ids = begun(kind, [8, 3])
    step = CapturedStep(model, state)
    monkeypatch.setattr(step, "_run", lambda: pytest.fail("run, not replayed"))
    step(ids[:, 0])
