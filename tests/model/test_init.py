"""What initial values promise: filters of all frequencies and of one loudness, whatever their length."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import KINDS, tiny_config
from torch import Tensor

from crocuta.config import (
    BandsConfig,
    BlockConfig,
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    FilterConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    ScalarConfig,
    SineConfig,
    filter_of,
)
from crocuta.model.build import build_block
from crocuta.presets import deep_dive_hyena, edifice_hyena

LENGTHS = (64, 1024, 16_384)
CHANNELS = 32


def implicit(**options) -> ImplicitFilterConfig:
    return ImplicitFilterConfig(max_length=2, **options)


EDIFICE = filter_of(edifice_hyena().blocks[0].mixer)
DEEP_DIVE = filter_of(deep_dive_hyena().blocks[0].mixer)
FILTERS: dict[str, tuple[FilterConfig, float]] = {  # and the least share of energy in the upper half, of any channel
    "hyena": (implicit(), 0.2),
    "hyena-pile": (implicit(positions=BandsConfig(features=33), activation=SineConfig(frequency=14.0)), 0.2),
    "scalar": (implicit(positions=ScalarConfig()), 0.2),
    "edifice": (EDIFICE, 0.1),
    "deep-dive": (DEEP_DIVE, 0.05),
    "explicit": (ExplicitFilterConfig(taps=64), 0.2),
    "complex": (ComplexModalFilterConfig(modes=8), 0.02),
}


def of_length(config: FilterConfig, length: int) -> FilterConfig:
    return dataclasses.replace(config, max_length=length) if isinstance(config, ImplicitFilterConfig) else config


def taps(config: FilterConfig, length: int) -> Tensor:
    block = build_block(BlockConfig(mixer=HyenaConfig(filter=config), mlp=None), CHANNELS)
    return block.mixer.filter.taps(length).detach()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", FILTERS)
def test_filters_have_energy_in_the_upper_half_of_the_spectrum(name, length):
    config, least = FILTERS[name]
    spectrum = torch.fft.rfft(taps(of_length(config, length), length), n=2 * length).abs().square()
    upper = spectrum[:, length // 2 :].sum(1) / spectrum.sum(1)
    assert upper.median() >= least, "half of the channels"
    assert upper.min() >= least / 4, "every channel"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", [name for name in FILTERS if name not in ("complex", "deep-dive")])
def test_filters_have_unit_energy(name, length):
    energy = taps(of_length(FILTERS[name][0], length), length).square().sum(1)
    tolerance = 0.6 if name == "explicit" else 0.01 if length <= 4096 else 0.2  # of long ones a sample is measured
    torch.testing.assert_close(energy, torch.ones(CHANNELS), rtol=0, atol=tolerance)


def test_taps_in_float32_are_those_of_float64():
    config = implicit()
    block = build_block(BlockConfig(mixer=HyenaConfig(filter=of_length(config, 16_384)), mlp=None), CHANNELS)
    narrow = block.mixer.filter.taps(16_384).detach()
    wide = block.double().mixer.filter.taps(16_384).detach()
    assert (narrow - wide).norm() < 2e-5 * wide.norm()


def _with_length(kind: str, length: int) -> BlockConfig:
    block = tiny_config(kind).blocks[0]
    mixer = block.mixer
    filter_ = filter_of(mixer)
    if isinstance(filter_, ImplicitFilterConfig):
        filter_ = dataclasses.replace(filter_, max_length=length)
        if isinstance(filter_.positions, BandsConfig):
            filter_ = dataclasses.replace(filter_, positions=dataclasses.replace(filter_.positions, trained=False))
        mixer = dataclasses.replace(mixer, filter=filter_)
    return dataclasses.replace(block, mixer=mixer)


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "stripe"])
def test_no_layer_s_output_grows_with_length(kind):
    """White inputs: the mixer's output at the end of 64 positions and of 16,384 has the same size."""
    sizes = {}
    for length in (64, 16_384):
        block = build_block(_with_length(kind, length), CHANNELS, seed=1)
        x = torch.randn(1, length, CHANNELS, generator=torch.Generator().manual_seed(1))
        sizes[length] = float(block.mixer(x)[:, length // 2 :].square().mean().sqrt())
    assert sizes[16_384] <= 1.5 * sizes[64]


@torch.no_grad()
@pytest.mark.parametrize("preset", [edifice_hyena, deep_dive_hyena], ids=["edifice", "deep-dive"])
def test_the_presets_do_not_grow_either(preset):
    sizes = {}
    for length in (64, 16_384):
        mixer = preset().blocks[0].mixer
        mixer = dataclasses.replace(mixer, filter=dataclasses.replace(mixer.filter, max_length=length))
        block = build_block(BlockConfig(mixer=mixer, mlp=None), CHANNELS, seed=1)
        x = torch.randn(1, length, CHANNELS, generator=torch.Generator().manual_seed(1))
        sizes[length] = float(block.mixer(x)[:, length // 2 :].square().mean().sqrt())
    assert sizes[16_384] <= 1.5 * sizes[64]
