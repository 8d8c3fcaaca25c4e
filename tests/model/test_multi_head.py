"""Multi-head Hyena against its formula."""

from __future__ import annotations

import pytest
import torch
from naive_layers import CHANNELS, bfloat16_error, gradcheck, mixer_of, multi_head, randn

from crocuta.config import (
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    FilterConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    ModelConfig,
    MultiHeadHyenaConfig,
    RealModalFilterConfig,
)
from crocuta.errors import ConfigError

FILTERS: dict[str, FilterConfig] = {
    "implicit": ImplicitFilterConfig(max_length=40, width=5),
    "explicit": ExplicitFilterConfig(taps=4),
    "complex": ComplexModalFilterConfig(modes=2, timescales=(1.0, 30.0)),
    "real": RealModalFilterConfig(modes=3, timescales=(1.0, 30.0)),
}


@torch.no_grad()
@pytest.mark.parametrize("filter_", FILTERS)
@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_the_formula(filter_, heads):
    mixer = mixer_of(MultiHeadHyenaConfig(num_heads=heads, filter=FILTERS[filter_], short_bias=True), seed=heads)
    x = randn(2, 11, 6)
    expected = multi_head(mixer, x)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-9, atol=1e-9)
    assert expected.std() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 40])
@pytest.mark.parametrize("skip", [True, False])
def test_options_and_lengths(length, skip):
    options = {"short_taps": 4, "projection_bias": True, "output_bias": False, "skip": skip}
    mixer = mixer_of(MultiHeadHyenaConfig(num_heads=2, filter=FILTERS["implicit"], **options), 4)
    x = randn(1, length, 4)
    torch.testing.assert_close(mixer(x), multi_head(mixer, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("filter_", FILTERS)
def test_gradients(filter_):
    config = MultiHeadHyenaConfig(num_heads=2, filter=FILTERS[filter_], short_bias=True, projection_bias=True)
    assert gradcheck(mixer_of(config, 4), randn(2, 6, 4))


@torch.no_grad()
def test_heads_of_one_channel_are_hyena():
    """N = 1: y = q · (h ∗ (k · v)), and a head is a channel."""
    hyena = mixer_of(HyenaConfig(filter=FILTERS["implicit"]))
    heads = mixer_of(MultiHeadHyenaConfig(num_heads=6, filter=FILTERS["implicit"]), seed=1)
    heads.load_state_dict(hyena.state_dict())
    x = randn(2, 15, 6)
    torch.testing.assert_close(heads(x), hyena(x), rtol=1e-12, atol=1e-12)


def test_options_are_the_parameters_that_there_are():
    bare = {"short_bias": False, "projection_bias": False, "output_bias": False, "skip": False}
    without, with_all = (
        {
            name
            for name, _ in mixer_of(
                MultiHeadHyenaConfig(num_heads=2, filter=FILTERS["explicit"], **options)
            ).named_parameters()
        }
        for options in (bare, dict.fromkeys(bare, True))
    )
    assert without == {"projection.weight", "short_taps", "filter.weight", "output.weight"}
    assert with_all - without == {"projection.bias", "short_bias", "output.bias", "skip"}


def test_there_are_as_many_filters_and_skips_as_heads():
    mixer = mixer_of(MultiHeadHyenaConfig(num_heads=3, filter=FILTERS["real"]))
    assert mixer.filter.taps(5).shape == (3, 5)
    assert mixer.skip.shape == (3,)


def test_groups_of_the_filter_are_refused():
    with pytest.raises(ConfigError, match=r"filter\.groups is given: got 2; expected one a head"):
        MultiHeadHyenaConfig(num_heads=2, filter=ExplicitFilterConfig(taps=3, groups=2))


def test_heads_must_divide_the_channels():
    value = {
        "vocab_size": 8,
        "hidden_size": 8,
        "blocks": [
            {
                "mixer": {"type": "hyena_multi_head", "num_heads": 3, "filter": {"type": "explicit", "taps": 3}},
                "mlp": None,
            }
        ],
    }
    with pytest.raises(ConfigError, match=r"blocks\[0\]\.mixer\.num_heads must divide hidden_size: got num_heads=3"):
        ModelConfig.from_json(value)


@torch.no_grad()
@pytest.mark.parametrize("filter_", FILTERS)
def test_bfloat16_is_close_to_float32(filter_):
    """Ten roundings to eight bits."""
    error = bfloat16_error(
        mixer_of(MultiHeadHyenaConfig(num_heads=2, filter=FILTERS[filter_]), noise=0.1), randn(2, 30, CHANNELS)
    )
    assert 1e-4 < error < 10 * 2**-8
