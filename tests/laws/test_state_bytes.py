"""A modal model generates for ever in constant memory; every state knows its size."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FILTERS, HIDDEN, KINDS, MODAL, random_ids, tiny_config, tiny_model

from crocuta.config import (
    AttentionConfig,
    ExplicitFilterConfig,
    GatedConvConfig,
    ImplicitFilterConfig,
    MixerConfig,
    MultiHeadHyenaConfig,
    OrderNHyenaConfig,
)
from crocuta.inference.generate import stream
from crocuta.model.lm import Model
from crocuta.model.state import ModelState
from crocuta.model.step import Stepper


def expected_bytes(mixer: MixerConfig, batch: int, max_length: int, size: int, wide: int) -> int:
    """The formula, for ``size`` bytes a number of the model and ``wide`` bytes a number of a filter's state."""
    short, filters, channels = 3 * HIDDEN, 1, HIDDEN
    match mixer:
        case AttentionConfig(num_heads=heads, num_kv_heads=kv_heads):
            return batch * (2 * max_length * (kv_heads or heads) * (HIDDEN // heads) * size + 8)
        case GatedConvConfig(taps=taps):
            return batch * (taps - 1) * HIDDEN * size
        case OrderNHyenaConfig(branches=branches, short_before_projection=before, convolutions=filters):
            short = HIDDEN * (1 if before else branches)
        case MultiHeadHyenaConfig(num_heads=heads):
            channels = HIDDEN * HIDDEN // heads
    match mixer.filter:
        case ExplicitFilterConfig(taps=600):  # a power of two and a block of 64
            long = (1024 + 64) * channels * wide + 8
        case ExplicitFilterConfig(taps=taps):
            long = (taps - 1) * channels * size
        case ImplicitFilterConfig():  # whole blocks of 64, and one more
            long = (-(-max_length // 64) * 64 + 64) * channels * wide + 8
        case modal:
            long = channels * modal.modes * (2 if modal.type == "modal_complex" else 1) * wide
    return batch * ((mixer.short_taps - 1) * short * size + filters * long)


def held_bytes(state: ModelState) -> int:
    """Bytes of the memory behind the tensors: a view of something larger would keep all of it."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in state.named_tensors()}
    return sum(storages.values())


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "size", "wide"), [(torch.float32, 4, 4), (torch.bfloat16, 2, 4), (torch.float64, 8, 8)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_formula(kind, dtype, size, wide):
    model, batch, max_length = tiny_model(kind, dtype), 3, 100
    state = model.init_state(batch, max_length)
    mixers = [block.mixer for block in tiny_config(kind).blocks]
    total = sum(expected_bytes(mixer, batch, max_length, size, wide) for mixer in mixers) + 8 * batch
    for _ in range(2):
        assert state.nbytes == total
        assert held_bytes(state) <= total
        model.extend(random_ids(batch, 50, seed=1), state, torch.tensor([50, 20, 0]))


@pytest.mark.parametrize("kind", MODAL)
def test_generation_of_4096_tokens_holds_constant_state_bytes(kind, monkeypatch):
    if kind != "complex-stable":  # the longest text once; its neighbours differ in their state's shape only
        tokens = 300
    else:
        tokens = 4096
    model = tiny_model(kind)
    sizes: list[tuple[int, int]] = []

    def watch(owner, name):
        run = getattr(owner, name)

        def watched(self, ids, state, *rest):
            logits = run(self, ids, state, *rest)
            sizes.append((state.nbytes, held_bytes(state)))
            return logits

        monkeypatch.setattr(owner, name, watched)

    watch(Model, "extend")
    watch(Stepper, "step")  # where that decodes
    pieces = list(stream(model, None, [random_ids(50, seed=1)], max_tokens=tokens, seed=1))
    assert len(pieces) == tokens
    assert len(sizes) == tokens - 1
    expected = sum(expected_bytes(b.mixer, 1, 0, 4, 4) for b in tiny_config(kind).blocks) + 8
    assert set(sizes) == {(expected, expected)}


@torch.no_grad()
@pytest.mark.parametrize("kind", [k for k in FILTERS if not k.startswith("implicit")])
def test_a_long_prompt_leaves_no_memory_behind(kind):
    model = tiny_model(kind)
    state = model.init_state(1)
    model.extend(random_ids(1, 1000, seed=1), state)
    assert held_bytes(state) == state.nbytes == model.init_state(1).nbytes
