"""What a mixer keeps for its backward pass: some numbers a token and channel, and not one for each of its modes.

Counted by ``saved_tensors_hooks``, storage by storage, as the slope between two lengths, so that parameters and tables,
which do not grow with the text, drop out.
"""

from __future__ import annotations

import pytest
import torch
from kernel_paths import each_path

from crocuta.config import (
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    FilterConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    RealModalFilterConfig,
)
from crocuta.model.hyena import HyenaMixer
from crocuta.ops.kernels.library import library, switched_off, why_not

CHANNELS = 8
COMMON = 8
"""x for the projection; its product (three); u for the filter; x2 and y for the gate; their product for the output."""


def saved_bytes(mixer: HyenaMixer, batch: int, length: int) -> int:
    """Bytes of the distinct storages that the graph of one forward pass holds."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    x = torch.randn(batch, length, CHANNELS, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = mixer(x)
    total = sum(storage.nbytes() for storage in storages.values())
    assert y.requires_grad
    return total


def floats_a_token_and_channel(filter_: FilterConfig, batch: int = 2) -> float:
    torch.manual_seed(0)
    mixer = HyenaMixer(HyenaConfig(filter=filter_), CHANNELS)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    short, long = (saved_bytes(mixer, batch, length) for length in (512, 2_048))
    return (long - short) / 4 / (batch * (2_048 - 512) * CHANNELS)


@pytest.mark.parametrize("modes", [2, 16])
def test_modal_filters_keep_one_state_a_block(modes):
    """Of 2 n numbers (n where they are real) every 32 tokens."""
    complex_, real = ComplexModalFilterConfig(modes=modes), RealModalFilterConfig(modes=modes)
    with switched_off():
        assert floats_a_token_and_channel(complex_) == pytest.approx(COMMON + 2 * modes / 32, rel=1e-3)
        assert floats_a_token_and_channel(real) == pytest.approx(COMMON + modes / 32, rel=1e-3)


@pytest.mark.skipif(library() is None, reason=why_not() or "")
@pytest.mark.parametrize("modes", [2, 16])
def test_the_fused_operator_keeps_its_input_and_one_state_a_block(modes):
    """Of the layer's input, its projection (three numbers) and the operator's output no copies, and nothing between."""
    complex_, real = ComplexModalFilterConfig(modes=modes), RealModalFilterConfig(modes=modes)
    assert floats_a_token_and_channel(complex_) == pytest.approx(5 + 2 * modes / 64, rel=1e-3)
    assert floats_a_token_and_channel(real) == pytest.approx(5 + modes / 64, rel=1e-3)


@pytest.mark.parametrize("taps", [7, 128, 600])
def test_explicit_filters_keep_their_input(taps):
    with switched_off():
        assert floats_a_token_and_channel(ExplicitFilterConfig(taps=taps)) == pytest.approx(COMMON, rel=1e-3)


def taps_once(path, common: int) -> list[float]:
    """What an implicit filter keeps beside ``common``, of a batch of one and of four."""
    config = ImplicitFilterConfig(max_length=4_096, width=8, inner_layers=1)
    with path():
        return [(floats_a_token_and_channel(config, batch) - common) * batch for batch in (1, 4)]


@each_path
def test_implicit_filters_keep_their_taps_once_a_batch(path):
    """The taps, the two factors that they are made of, and of the narrow MLP behind them its positions and eight
    numbers a unit, half of which belong to the first layer, in float64.
    """
    once = taps_once(path, COMMON if path is switched_off else 5)
    assert once[0] == pytest.approx(once[1], rel=1e-3)
    assert 3 <= once[0] <= 3 + (8 * 8 + 2 * 5) / CHANNELS


@pytest.mark.skipif(library() is None, reason=why_not() or "")
def test_a_long_explicit_filter_keeps_its_projection_alone():
    assert floats_a_token_and_channel(ExplicitFilterConfig(taps=600)) == pytest.approx(5, rel=1e-3)
