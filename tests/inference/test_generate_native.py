"""Generation by the compiled step of a whole model: the tokens that ``extend`` gives, and where it may not be used."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ONLINE, random_ids, tiny_model
from torch import nn

from crocuta.errors import KernelUnavailableError
from crocuta.inference import generate as module
from crocuta.inference.generate import Generation, generate
from crocuta.inference.sampling import SamplingConfig
from crocuta.model.lm import Model
from crocuta.model.lora import LoRAConfig, add_lora
from crocuta.model.step import Stepper
from crocuta.ops.kernels.library import library, switched_off, why_not

pytestmark = pytest.mark.skipif(library() is None, reason=why_not() or "")

KINDS = ("stripe", "complex-grouped", "attention-gqa", "explicit-decay", "gated-conv", *ONLINE)
LIVELY = SamplingConfig(temperature=1.5, top_k=10)
PROMPTS = [random_ids(length, seed=length) for length in (30, 1, 7)]


@pytest.fixture
def stepped(monkeypatch) -> list[int]:
    """The rows of every compiled step."""
    calls: list[int] = []
    step = Stepper.step

    def watched(self, ids, state):
        calls.append(len(ids))
        return step(self, ids, state)

    monkeypatch.setattr(Stepper, "step", watched)
    return calls


def continued(model: Model, **options) -> list[Generation]:
    return generate(model, None, PROMPTS, **{"max_tokens": 80, "sampling": LIVELY, "samples": 2, "seed": 3, **options})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_tokens_are_those_of_extend(kind, dtype, stepped):
    """To the end of a block of an online convolution and on, for rows of different lengths."""
    model = tiny_model(kind, dtype)
    results = continued(model)
    assert stepped == [6] * 79
    with switched_off():
        expected = continued(model)
    assert len(stepped) == 79
    for one, other in zip(results, expected, strict=True):
        assert one.ids == other.ids
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4 if dtype == torch.float32 else 1e-6)


def test_rows_that_end_leave_the_others_alone(stepped, monkeypatch):
    model = tiny_model("stripe", torch.float64)
    expected = continued(model)
    first = expected[1].ids[5]

    class Tokenizer:
        eos_id = first

        def incremental_decoder(self):
            return type("Decoder", (), {"feed": lambda *_: "", "finish": lambda _: ""})()

    results = generate(model, Tokenizer(), PROMPTS, max_tokens=80, sampling=LIVELY, samples=2, seed=3)
    for one, whole in zip(results, expected, strict=True):
        assert one.ids == whole.ids[: len(one.ids)]
        assert (one.finish_reason == "eos") == (first in whole.ids)
    assert 6 > min(stepped) >= 1


def test_a_text_in_turns_is_the_text_at_once(stepped):
    model = tiny_model("implicit", torch.float64)
    options = {"sampling": LIVELY, "keep_state": True}
    whole = generate(model, None, [PROMPTS[0]], max_tokens=100, seed=1, **options)[0]
    first = generate(model, None, [PROMPTS[0]], max_tokens=37, seed=1, **options)[0]
    rest = generate(model, None, [first.prefix], max_tokens=63, **options)[0]
    assert first.ids + rest.ids == whole.ids
    assert len(stepped) == 99 + 36 + 62


def hooked(model: Model) -> Model:
    model.blocks[0].mlp.up.register_forward_hook(lambda *_: None)
    return model


class Scaled(nn.Linear):
    """Someone's own layer."""


def replaced(model: Model) -> Model:
    up = model.blocks[0].mlp.up
    model.blocks[0].mlp.up = Scaled(up.in_features, up.out_features, bias=up.bias is not None)
    return model


def adapted(model: Model) -> Model:
    add_lora(model, LoRAConfig(rank=2, alpha=1.0))
    return model


@pytest.mark.parametrize("change", [hooked, replaced, adapted, Model.bfloat16])
def test_models_that_it_cannot_take_go_through_extend(change, stepped):
    model = change(tiny_model("stripe"))
    assert all(len(result.ids) == 20 for result in continued(model, max_tokens=20))
    assert not stepped
    with pytest.raises(KernelUnavailableError, match="cannot be decoded natively"):
        continued(model, weights="int8")


def test_few_tokens_are_not_worth_it(stepped):
    model = tiny_model("stripe")
    continued(model, max_tokens=module._LEAST - 1)
    assert not stepped
    continued(model, max_tokens=module._LEAST)
    assert len(stepped) == module._LEAST - 1


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_narrow_weights_are_those_of_the_stepper(weights):
    model = tiny_model("stripe")
    result = generate(model, None, PROMPTS[:1], max_tokens=20, sampling=LIVELY, weights=weights)[0]
    ids, state = torch.tensor(result.ids), model.init_state(1, 60)
    with torch.no_grad():
        first = model.extend(PROMPTS[0][None], state)[:, -1].log_softmax(-1)[0, ids[0]]
    rest = Stepper(model, weights).log_probs(ids[None], state)[0]
    assert result.log_probs == pytest.approx([float(first), *rest.tolist()], abs=1e-5)
    plain = generate(model, None, PROMPTS[:1], max_tokens=20, sampling=LIVELY)[0]
    assert plain.log_probs != pytest.approx(result.log_probs, abs=1e-4)


def test_narrow_weights_without_the_library_are_refused():
    with switched_off(), pytest.raises(KernelUnavailableError, match="switched off"):
        continued(tiny_model("stripe"), weights="int8")
