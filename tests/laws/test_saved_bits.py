"""What is saved and loaded is the same bits, and goes on as the same bits: models, and states amid a text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import KINDS, MAX_LENGTH, random_ids, tiny_model

import crocuta
from crocuta.tokenizers.load import make_tokenizer

TOKENIZER = make_tokenizer({"type": "dna"})


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_bit_for_bit(kind, dtype, tmp_path):
    model = tiny_model(kind, dtype, seed=1)
    crocuta.save(model, TOKENIZER, tmp_path / "model")
    loaded, tokenizer = crocuta.load(tmp_path / "model")
    assert tokenizer == TOKENIZER
    assert loaded.config == model.config
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    ids = random_ids(2, 37, seed=2)
    assert torch.equal(loaded(ids), model(ids))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4)
@given(read=st.integers(1, 60), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_a_state_goes_on_bit_for_bit(kind, tmp_path_factory, read, dtype):
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    model = tiny_model(kind, dtype, seed=1)
    state = model.init_state(3, MAX_LENGTH)
    model.extend(random_ids(3, read, seed=2), state, torch.tensor([read, read // 2, 0]))
    state.save(path)
    restored = model.load_state(path)
    assert restored.max_length == state.max_length
    assert restored.lengths.tolist() == [read, read // 2, 0]
    assert [(n, t.dtype) for n, t in restored.named_tensors()] == [(n, t.dtype) for n, t in state.named_tensors()]
    for ids in (random_ids(3, 20, seed=3), random_ids(3, 1, seed=4)):
        assert torch.equal(model.extend(ids, restored), model.extend(ids, state))
    for (name, tensor), (_, other) in zip(state.named_tensors(), restored.named_tensors(), strict=True):
        assert torch.equal(tensor, other), name


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_a_selected_and_a_written_state_go_on_bit_for_bit(kind):
    model = tiny_model(kind, seed=1)
    state = model.init_state(2, MAX_LENGTH)
    model.extend(random_ids(2, 40, seed=2), state)
    copy, swapped, written = state.copy(), state.select([1, 0]), model.init_state(2, MAX_LENGTH)
    written.write([1, 0], state)
    ids = random_ids(2, 20, seed=3)
    expected = model.extend(ids, state)
    assert torch.equal(model.extend(ids, copy), expected)
    for other in (swapped, written):
        torch.testing.assert_close(model.extend(ids.flip(0), other).flip(0), expected, rtol=0, atol=1e-4)
        assert other.lengths.tolist() == [60, 60]
