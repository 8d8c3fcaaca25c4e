"""A native step is ``extend`` of one token, for every model, on the same state."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from tiny_models import KINDS, VOCABULARY, loud, random_ids, tiny_config, tiny_model
from torch import Tensor

from crocuta.config import (
    AttentionConfig,
    BidirectionalHyenaConfig,
    BlockConfig,
    ComplexModalFilterConfig,
    GatedMLPConfig,
    HyenaConfig,
    ModelConfig,
    PlainMLPConfig,
)
from crocuta.errors import InputError, KernelUnavailableError, StateError
from crocuta.model.build import build_model
from crocuta.model.lm import Model
from crocuta.model.lora import LoRAConfig, add_lora
from crocuta.model.state import ModelState
from crocuta.model.step import Stepper, rejects
from crocuta.ops.kernels.library import library, switched_off, why_not

pytestmark = pytest.mark.skipif(library() is None, reason=why_not() or "")

ROOM = 120
MIXED = ("stripe", "complex-grouped", "attention-gqa", "explicit-decay", "implicit")


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def states_agree(a: ModelState, b: ModelState, bound: float) -> bool:
    pairs = zip(a.named_tensors(), b.named_tensors(), strict=True)
    return all(
        not x.numel() or float((x - y).abs().max()) <= bound * (1 + float(y.abs().max())) for (_, x), (_, y) in pairs
    )


@torch.no_grad()
def read(model: Model, ids: Tensor, state: ModelState) -> Tensor:
    return torch.stack([model.extend(column[:, None], state)[:, 0] for column in ids.unbind(1)], 1)


def stepped(stepper: Stepper, ids: Tensor, state: ModelState) -> Tensor:
    return torch.stack([stepper.step(column, state) for column in ids.unbind(1)], 1)


@torch.no_grad()
def prefilled(model: Model, ids: Tensor) -> tuple[ModelState, ModelState]:
    """A state that has read ``ids``, and a copy of it."""
    state = model.init_state(len(ids), ROOM)
    model.extend(ids, state)
    return state, state.copy()


# --- the same as extend -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_extend_of_one_token(kind):
    """Across a block of an online convolution, where its tiles are."""
    check_steps(tiny_model(kind, torch.float64), 1e-9)


@pytest.mark.parametrize("kind", MIXED)
def test_in_float32_too(kind):
    check_steps(tiny_model(kind), 1e-5)


def check_steps(model: Model, bound: float) -> None:
    ids = random_ids(2, 70)
    mine, theirs = prefilled(model, ids[:, :60])
    assert error(stepped(Stepper(model), ids[:, 60:], mine), read(model, ids[:, 60:], theirs)) < bound
    assert states_agree(mine, theirs, bound)


@pytest.mark.parametrize("kind", MIXED)
def test_steps_start_sequences_too(kind):
    model, ids = tiny_model(kind, torch.float64), random_ids(3, 9)
    with torch.no_grad():
        truth = model(ids)
    assert error(stepped(Stepper(model), ids, model.init_state(3, ROOM)), truth) < 1e-9


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 64])
def test_any_number_of_rows(rows):
    model, ids = wide_model(), random_ids(rows, 4, vocabulary=40)
    mine, theirs = prefilled(model, ids[:, :2])
    assert error(stepped(Stepper(model), ids[:, 2:], mine), read(model, ids[:, 2:], theirs)) < 1e-5


def wide_model(seed: int = 0) -> Model:
    """Hidden sizes that fill no whole vectors and blocks, and attention between modal filters."""
    hyena = HyenaConfig(filter=ComplexModalFilterConfig(modes=3), short_bias=True)
    mixers = hyena, AttentionConfig(num_heads=5, num_kv_heads=5), hyena
    blocks = tuple(BlockConfig(mixer=m, mlp=GatedMLPConfig(intermediate_size=130)) for m in mixers)
    config = ModelConfig(vocab_size=40, hidden_size=50, blocks=blocks)
    return loud(build_model(config, seed=seed), seed).eval()


@pytest.mark.parametrize("kind", MIXED)
def test_steps_and_extend_take_turns_while_rows_come_and_go(kind):
    model, ids = tiny_model(kind, torch.float64), random_ids(3, 60)
    stepper = Stepper(model)
    mine, theirs = prefilled(model, ids[:, :3])
    stepped(stepper, ids[:, 3:6], mine)
    read(model, ids[:, 3:6], theirs)
    with torch.no_grad():
        for state in (mine, theirs):
            model.extend(ids[:, 6:20], state, torch.tensor([14, 3, 0]))
    assert error(stepped(stepper, ids[:, 20:22], mine), read(model, ids[:, 20:22], theirs)) < 1e-9
    mine, theirs = (state.select([2, 0, 0]).join([state.without([0])]) for state in (mine, theirs))
    more = random_ids(5, 20, seed=1)
    assert error(stepped(stepper, more, mine), read(model, more, theirs)) < 1e-9
    mine, theirs = (
        model.with_room(state, 128) if kind not in ("stripe", "implicit") else state for state in (mine, theirs)
    )
    assert error(stepped(stepper, more[:, :3], mine), read(model, more[:, :3], theirs)) < 1e-9
    assert mine.lengths.tolist() == theirs.lengths.tolist()
    assert states_agree(mine, theirs, 1e-9)


def test_saved_states_go_on(tmp_path):
    model, ids = tiny_model("stripe", torch.float64), random_ids(2, 12)
    state = model.init_state(2, ROOM)
    stepper = Stepper(model)
    stepped(stepper, ids[:, :8], state)
    state.save(tmp_path / "state.safetensors")
    loaded = model.load_state(tmp_path / "state.safetensors")
    with torch.no_grad():
        assert error(stepped(stepper, ids[:, 8:], loaded), model(ids)[:, 8:]) < 1e-9


def test_two_states_in_turn():
    model, ids = wide_model(), random_ids(2, 6, vocabulary=40)
    stepper, one, two = Stepper(model), model.init_state(1, ROOM), model.init_state(1, ROOM)
    pairs = [(stepper.step(c[:1], one), stepper.step(c[1:], two)) for c in ids.unbind(1)]
    with torch.no_grad():
        truth = model(ids)
    assert error(torch.stack([torch.cat(pair) for pair in pairs], 1), truth) < 1e-5
    assert pairs[0][0].data_ptr() != pairs[1][0].data_ptr()  # logits are the caller's to keep


def test_inference_mode_inside_and_outside():
    """``generate`` runs in it; what a Stepper keeps must serve both."""
    model, ids = tiny_model("stripe"), random_ids(2, 6)
    with torch.no_grad():
        truth = model(ids)
    for first, second in (
        (torch.inference_mode, contextlib.nullcontext),
        (contextlib.nullcontext, torch.inference_mode),
    ):
        with first():
            stepper = Stepper(model)
            stepper.step(ids[:, 0], model.init_state(2, ROOM))
        with second():
            assert error(stepped(stepper, ids, model.init_state(2, ROOM)), truth) < 1e-5


def test_a_state_that_carries_gradients_is_copied_not_written():
    model, ids = tiny_model("complex-stable", torch.float64), random_ids(1, 4)
    state = model.init_state(1)
    before = model.extend(ids[:, :3], state)
    kept = [tensor for _, tensor in state.named_tensors() if tensor.requires_grad]
    values = [tensor.detach().clone() for tensor in kept]
    assert not Stepper(model).step(ids[:, 3], state).requires_grad
    assert kept
    assert all(torch.equal(tensor, value) for tensor, value in zip(kept, values))
    before.sum().backward()
    assert model.embedding.weight.grad is not None


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_the_number_of_threads_changes_nothing(weights):
    model, ids = wide_model(), random_ids(5, 12, vocabulary=40)
    results = []
    for count in (1, 2, 3, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            results.append(stepped(Stepper(model, weights), ids, model.init_state(5, ROOM)))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


# --- narrow weights -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_bfloat16_weights_are_those_of_a_rounded_model():
    model, ids = wide_model(), random_ids(3, 20, vocabulary=40)
    exact, table = wide_model(), model.embedding.weight.clone()
    for module in exact.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight.copy_(module.weight.bfloat16())
    rounded = stepped(Stepper(model, "bfloat16"), ids, model.init_state(3, ROOM))
    hidden = exact.blocks  # the embedding is read in full, and rounded only where it is the head
    y = table[ids]
    for block in hidden:
        y = block(y)
    assert error(rounded, exact.logits(exact.norm(y)[1])) < 1e-5


def test_narrow_weights_cost_what_they_may():
    model, ids = wide_model(), random_ids(4, 40, vocabulary=40)
    with torch.no_grad():
        truth = model(ids)
    errors = [error(stepped(Stepper(model, w), ids, model.init_state(4, ROOM)), truth) for w in ("bfloat16", "int8")]
    assert 1e-3 < errors[0] < 1e-2  # 8 bits of a mantissa are 4e-3, and roundings that average out
    assert 5e-3 < errors[1] < 2e-2  # of the weights alone: inputs have 16 bits
    sizes = [Stepper(model, w).nbytes for w in ("float32", "bfloat16", "int8")]
    assert sizes[1] > 1.5 * sizes[2] > 3 * sizes[0]  # in float32 it reads the model's own


def test_log_probs_are_those_of_the_logits():
    model, ids = tiny_model("stripe", torch.float64), random_ids(2, 11)
    with torch.no_grad():
        truth = torch.log_softmax(model(ids), -1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    assert error(Stepper(model).log_probs(ids), truth) < 1e-9
    assert Stepper(model).log_probs(ids[:, :1]).shape == (2, 0)


# --- changed parameters -------------------------------------------------------------------------------------------


def load(model: Model) -> None:
    model.load_state_dict(wide_model(seed=9).state_dict())


def assign(model: Model) -> None:
    model.load_state_dict(wide_model(seed=9).state_dict(), assign=True)


def optimise(model: Model) -> None:
    """Fused, which changes parameters without raising their version."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.05, fused=True).step()


@pytest.mark.parametrize("change", [load, assign, optimise])
def test_changed_parameters_are_packed_anew(change):
    model, ids = wide_model(), random_ids(2, 3, vocabulary=40)
    stepper = Stepper(model)
    stepped(stepper, ids, model.init_state(2, ROOM))
    change(model)
    with torch.no_grad():
        truth = model(ids)
    assert error(stepped(stepper, ids, model.init_state(2, ROOM)), truth) < 1e-5


def test_a_change_in_the_middle_of_a_text_is_seen():
    model, ids = wide_model(), random_ids(2, 3, vocabulary=40)
    stepper = Stepper(model)
    mine, theirs = prefilled(model, ids)
    stepper.step(ids[:, 0], mine)
    read(model, ids[:, :1], theirs)
    load(model)
    assert error(stepper.step(ids[:, 1], mine), read(model, ids[:, 1:2], theirs)[:, 0]) < 1e-5


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "what"),
    [
        (torch.zeros(2, 1, dtype=torch.int64), "one id a row"),
        ([1, 2], "one id a row"),
        (torch.tensor([0, VOCABULARY]), "outside the vocabulary"),
        (torch.tensor([0, -1]), "outside the vocabulary"),
        (torch.tensor([0.0, 1.0]), "int64"),
        (torch.zeros(0, dtype=torch.int64), "empty"),
    ],
)
def test_bad_ids_are_input_errors(ids, what):
    model = tiny_model("stripe")
    state = model.init_state(2, ROOM)
    with pytest.raises(InputError, match=what):
        Stepper(model).step(ids, state)
    assert state.lengths.tolist() == [0, 0]


def test_bad_states_are_state_errors():
    model, ids = tiny_model("stripe"), torch.tensor([7, 8])
    stepper = Stepper(model)
    for state, what in (
        (None, "no state"),
        (model.init_state(3, ROOM), "another number of rows"),
        (tiny_model("attention").init_state(2, ROOM), "another configuration"),
        (tiny_model("stripe", torch.float64).init_state(2, ROOM), "float64"),
    ):
        with pytest.raises(StateError, match=what):
            stepper.step(ids, state)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["attention", "implicit", "complex-raw"])
def test_a_row_that_outgrows_the_state_leaves_it_as_it_was(kind):
    model = tiny_model(kind)
    state, stepper = model.init_state(2, 5), Stepper(model)
    with torch.no_grad():
        model.extend(random_ids(2, 5), state, torch.tensor([5, 2]))
    before = state.copy()
    with pytest.raises(StateError, match="longer than"):
        stepper.step(torch.tensor([7, 7]), state)
    assert states_agree(state, before, 0)


def test_ids_of_32_bits_and_every_other_one():
    model, ids = tiny_model("complex-raw"), random_ids(1, 6)
    stepper, state = Stepper(model), model.init_state(3)
    assert torch.equal(
        stepper.step(ids[0, ::2].int(), state), stepper.step(ids[0, ::2].contiguous(), model.init_state(3))
    )


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_causal_model_is_refused(kind):
    assert rejects(tiny_config(kind)) is None
    assert (len(Stepper(tiny_model(kind))._cuts) > 0) == (not native(kind))


def native(kind: str) -> bool:
    return not kind.startswith(("order-n", "multi-head", "gated-conv"))


def test_reasons():
    config = tiny_config("complex-raw")
    both = BlockConfig(mixer=BidirectionalHyenaConfig(filter=ComplexModalFilterConfig(modes=2)), mlp=None)
    wide = BlockConfig(mixer=config.blocks[0].mixer, mlp=PlainMLPConfig(intermediate_size=70_000))
    heads = BlockConfig(mixer=AttentionConfig(num_heads=1), mlp=None)
    assert "looks ahead" in str(rejects(replace(config, blocks=(both,))))
    assert "70000 inputs" in str(rejects(replace(config, blocks=(wide,)), "int8"))
    assert rejects(replace(config, blocks=(wide,))) is None
    assert "2050 channels" in str(rejects(replace(config, hidden_size=2050, blocks=(heads,))))
    assert "none of float32" in str(rejects(config, "int4"))  # type: ignore[arg-type]
    with switched_off():
        assert rejects(config) == why_not()


def test_models_that_cannot_be_packed():
    adapted = tiny_model("attention")
    add_lora(adapted, LoRAConfig(rank=2, alpha=1.0))
    with torch.inference_mode():
        inference = build_model(tiny_config("complex-raw"))
    for model, weights, reason in (
        (tiny_model("complex-raw", torch.bfloat16), "float32", "load it in float32"),
        (tiny_model("complex-raw", torch.float64), "int8", "of a float64 model"),
        (adapted, "float32", "merged first"),
        (inference, "float32", "inference_mode"),
        (tiny_model("complex-raw"), "int4", "none of float32"),
    ):
        with pytest.raises(KernelUnavailableError, match=reason):
            Stepper(model, weights)  # type: ignore[arg-type]
