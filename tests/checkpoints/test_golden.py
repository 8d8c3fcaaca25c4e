"""Tiny checkpoints in the published layouts give what the upstream implementations gave for them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import crocuta
from crocuta.model.lm import Model
from crocuta.model.state import HyenaState, ModalState
from crocuta.ops.rope import inverse_frequencies

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FOLDERS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
DECODED = [name for name in FOLDERS if not name.startswith("hyenadna")]
MODAL = [name for name in FOLDERS if name.startswith(("stripedhyena", "evo1"))]
LOGITS, STATES = 2e-4, 1e-4


@pytest.fixture(params=FOLDERS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def loaded():
    """Model and expected tensors of a folder, each read once."""
    cache: dict[str, tuple[Model, dict[str, torch.Tensor]]] = {}

    def get(name: str) -> tuple[Model, dict[str, torch.Tensor]]:
        if name not in cache:
            model, _ = crocuta.load(GOLDEN / name)
            cache[name] = model, load_file(GOLDEN / name / "expected.safetensors")
        return cache[name]

    return get


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def test_there_are_five_folders() -> None:
    assert len(FOLDERS) == 5


@torch.no_grad()
def test_logits(loaded, name):
    model, expected = loaded(name)
    assert expected["logits"].abs().max() > 3  # loud enough to tell layouts apart
    assert distance(model(expected["input_ids"]), expected["logits"]) <= LOGITS
    if "hidden" in expected:
        assert distance(model.hidden(expected["input_ids"]), expected["hidden"]) <= LOGITS


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_logits_when_fed_in_random_chunks(loaded, name, seed):
    model, expected = loaded(name)
    ids, generator = expected["input_ids"], torch.Generator().manual_seed(seed)
    state, start, parts = model.init_state(len(ids), ids.shape[1]), 0, []
    while start < ids.shape[1]:
        count = int(torch.randint(1, 60, (), generator=generator))
        parts.append(model.extend(ids[:, start : start + count], state))
        start += count
    assert distance(torch.cat(parts, 1), expected["logits"]) <= LOGITS


@torch.no_grad()
@pytest.mark.parametrize("name", DECODED)
def test_prefill_then_greedy_steps(loaded, name):
    model, expected = loaded(name)
    prompt = expected["input_ids"][:, : int(expected["prompt_length"])]
    greedy = expected["greedy_ids"]
    state = model.init_state(len(prompt), prompt.shape[1] + greedy.shape[1])
    logits = model.extend(prompt, state)
    assert distance(logits, expected["prefill_logits"]) <= LOGITS
    following = logits[:, -1:].argmax(-1)
    for step in range(greedy.shape[1]):
        assert torch.equal(following, greedy[:, step : step + 1])
        logits = model.extend(following, state)
        assert distance(logits[:, 0], expected["step_logits"][:, step]) <= LOGITS
        following = logits.argmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(64,), (1,) * 64, (3, 40, 1, 20)])
@pytest.mark.parametrize("name", MODAL)
def test_modal_states_after_the_prefill(loaded, name, cuts):
    model, expected = loaded(name)
    prompt = expected["input_ids"][:, : int(expected["prompt_length"])]
    state = model.init_state(len(prompt), prompt.shape[1])
    for part in prompt.split(list(cuts), dim=1):
        model.extend(part, state)
    stored = [key for key in expected if key.startswith("iir_state.")]
    assert len(stored) >= 2
    for key in stored:
        layer = state.layers[int(key.split(".")[1])]
        assert isinstance(layer, HyenaState)
        assert isinstance(layer.long, ModalState)
        assert distance(layer.long.modes, expected[key]) <= STATES


def test_frequencies_that_are_computed_have_the_bits_of_the_file():
    stored = load_file(GOLDEN / "evo1-131k-tiny-hf" / "model.safetensors")
    name = "backbone.blocks.2.inner_mha_cls.rotary_emb.inv_freq"
    assert torch.equal(inverse_frequencies(16, 10_000.0), stored[name])


@torch.no_grad()
def test_prompts_of_every_length_decode_like_the_whole_sequence(loaded, name):
    """The published decoders are wrong after prompts of fewer than 2 (StripedHyena) or 6 tokens (vortex)."""
    model, expected = loaded(name)
    longest, steps = 130, 2
    ids = torch.cat([expected["input_ids"][:1], expected["input_ids"][1:2]], dim=1)[:, : longest + steps]
    assert ids.shape == (1, longest + steps)
    whole = model(ids)
    for length in range(1, longest + 1):
        state = model.init_state(1, length + steps)
        got = [model.extend(ids[:, :length], state)]
        got += [model.extend(ids[:, at : at + 1], state) for at in range(length, length + steps)]
        assert distance(torch.cat(got, 1), whole[:, : length + steps]) <= LOGITS, length
