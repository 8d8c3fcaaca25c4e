"""The gated convolution against its formula."""

from __future__ import annotations

import itertools

import pytest
import torch
from naive_layers import CHANNELS, bfloat16_error, gated_conv, gradcheck, mixer_of, randn

from crocuta.config import GatedConvConfig, LayerNormConfig, RMSNormConfig

NORMS = {"none": None, "rms": RMSNormConfig(eps=0.1), "rms inside": RMSNormConfig(eps=0.1, eps_inside_root=True)}
NORMS["layer"] = LayerNormConfig(eps=0.1)
EDIFICE = GatedConvConfig(norm=LayerNormConfig(), activation="silu", pointwise=True)


@torch.no_grad()
@pytest.mark.parametrize(("taps", "length"), list(itertools.product([1, 2, 7, 40], [1, 3, 37])))
def test_taps_and_lengths(taps, length):
    mixer, x = mixer_of(GatedConvConfig(taps=taps)), randn(2, length, CHANNELS)
    expected = gated_conv(mixer, x)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-9, atol=1e-9)
    assert expected.std() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "identity"])
@pytest.mark.parametrize(("pointwise", "bias"), [(True, False), (False, True)])
def test_every_option(norm, activation, pointwise, bias):
    config = GatedConvConfig(taps=3, norm=NORMS[norm], activation=activation, pointwise=pointwise, bias=bias)
    mixer, x = mixer_of(config), randn(2, 9, CHANNELS)
    torch.testing.assert_close(mixer(x), gated_conv(mixer, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "config", [GatedConvConfig(taps=4), EDIFICE, GatedConvConfig(norm=RMSNormConfig(), bias=False)]
)
def test_gradients(config):
    assert gradcheck(mixer_of(config), randn(2, 6, CHANNELS))


def test_no_bias_means_none_anywhere():
    names = {name for name, _ in mixer_of(GatedConvConfig(bias=False, pointwise=True)).named_parameters()}
    assert names == {"projection.weight", "short_taps", "pointwise.weight", "output.weight"}
    biases = {name for name, _ in mixer_of(EDIFICE).named_parameters()} - names
    assert biases == {"projection.bias", "short_bias", "pointwise.bias", "output.bias", "norm.scale", "norm.bias"}


@torch.no_grad()
def test_it_reaches_its_taps_and_no_further():
    """No output sees a later input, nor one that is ``taps`` or more before it."""
    mixer, x = mixer_of(GatedConvConfig(taps=4)), randn(1, 20, CHANNELS)
    before = mixer(x)
    x[:, 9] += 1
    changed = (mixer(x) - before).abs().amax((0, 2)) > 1e-9
    assert changed.nonzero()[:, 0].tolist() == [9, 10, 11, 12]


@torch.no_grad()
@pytest.mark.parametrize("config", [GatedConvConfig(taps=4), EDIFICE])
def test_bfloat16_is_close_to_float32(config):
    """Ten roundings to eight bits."""
    error = bfloat16_error(mixer_of(config, noise=0.1), randn(2, 30, CHANNELS))
    assert 1e-4 < error < 10 * 2**-8
