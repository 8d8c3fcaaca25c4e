"""Hyena of any order against its formula, in both conventions and with every option."""

from __future__ import annotations

import copy

import pytest
import torch
from naive_layers import CHANNELS, bfloat16_error, gradcheck, implicit_taps, mixer_of, order_n, randn

from crocuta.config import (
    BandsConfig,
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    FilterConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    LayerNormConfig,
    OrderNHyenaConfig,
    RealModalFilterConfig,
    RMSNormConfig,
)

IMPLICIT = ImplicitFilterConfig(max_length=40, width=5)
FILTERS: dict[str, FilterConfig] = {
    "implicit": IMPLICIT,
    "explicit": ExplicitFilterConfig(taps=9, groups=3),
    "complex": ComplexModalFilterConfig(modes=2, timescales=(1.0, 30.0)),
    "real": RealModalFilterConfig(modes=3, timescales=(1.0, 30.0), groups=2),
}
OPTIONS: dict[str, OrderNHyenaConfig] = {
    "defaults": OrderNHyenaConfig(filter=IMPLICIT),
    "all biases": OrderNHyenaConfig(filter=IMPLICIT, short_bias=True, projection_bias=True),
    "no biases, no skip": OrderNHyenaConfig(filter=IMPLICIT, output_bias=False, skip=False),
    "short before": OrderNHyenaConfig(
        filter=IMPLICIT, short_before_projection=True, short_bias=True, projection_bias=True, short_taps=4
    ),
    "layer norms": OrderNHyenaConfig(filter=IMPLICIT, branch_norm=LayerNormConfig()),
    "rms norms": OrderNHyenaConfig(filter=IMPLICIT, branch_norm=RMSNormConfig(eps=0.1), gate_first=False),
    "residual": OrderNHyenaConfig(filter=IMPLICIT, residual=0.7, convolutions=3),
    "an MLP each": OrderNHyenaConfig(filter=IMPLICIT, shared_filter=False),
    "one short tap": OrderNHyenaConfig(filter=IMPLICIT, short_taps=1),
    "edifice": OrderNHyenaConfig(
        filter=FILTERS["real"],
        gate_first=False,
        shared_filter=False,
        short_before_projection=True,
        short_bias=True,
        projection_bias=True,
        skip=False,
    ),
}


def assert_is_the_formula(config: OrderNHyenaConfig, length: int = 13) -> None:
    mixer, x = mixer_of(config, seed=1), randn(2, length, CHANNELS, seed=2)
    expected = order_n(mixer, x)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-9, atol=1e-9)
    assert expected.std() > 0.01


# --- the formula ---


@torch.no_grad()
@pytest.mark.parametrize("filter_", FILTERS)
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("convolutions", [1, 2, 3])
def test_both_conventions_with_any_number_of_convolutions(convolutions, gate_first, filter_):
    assert_is_the_formula(
        OrderNHyenaConfig(filter=FILTERS[filter_], convolutions=convolutions, gate_first=gate_first, short_bias=True)
    )


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("length", [1, 40])
def test_every_option(options, length):
    assert_is_the_formula(OPTIONS[options], length)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients(options):
    assert gradcheck(mixer_of(OPTIONS[options], seed=3), randn(2, 7, CHANNELS, seed=4))


def test_options_are_the_parameters_that_there_are():
    def sizes(config: OrderNHyenaConfig) -> dict[str, tuple[int, ...]]:
        named = mixer_of(config, 4).named_parameters()
        return {name: tuple(p.shape) for name, p in named if not name.startswith("filters.")}

    bare = {"short_bias": False, "projection_bias": False, "output_bias": False, "skip": False}
    shapes = {"projection.weight": (16, 4), "short_taps": (16, 3), "output.weight": (4, 4)}
    assert sizes(OrderNHyenaConfig(filter=IMPLICIT, **bare)) == shapes
    more = {"projection.bias": (16,), "short_bias": (16,), "output.bias": (4,), "skip": (2, 4)}
    assert sizes(OrderNHyenaConfig(filter=IMPLICIT, **dict.fromkeys(bare, True))) == shapes | more
    before = {"projection.weight": (12, 4), "short_taps": (4, 3), "short_bias": (4,), "output.weight": (4, 4)}
    options = bare | {"short_bias": True, "short_before_projection": True, "gate_first": False}
    assert sizes(OrderNHyenaConfig(filter=IMPLICIT, **options)) == before


@torch.no_grad()
def test_branch_norms_belong_to_one_branch_each():
    """A norm that all branches shared would change all of them at once."""
    mixer, x = mixer_of(OPTIONS["layer norms"], seed=1), randn(1, 5, CHANNELS)
    assert len(mixer.branch_norms) == 4
    before = mixer(x)
    for norm in mixer.branch_norms:
        other = norm.scale.clone()
        norm.scale.mul_(2)
        assert (mixer(x) - before).abs().max() > 1e-3
        norm.scale.copy_(other)


@torch.no_grad()
def test_a_residual_of_one_convolution_adds_nothing():
    """It comes "after each convolution and gate but the first"."""
    one = OrderNHyenaConfig(filter=IMPLICIT, convolutions=1, residual=0.9)
    two = OrderNHyenaConfig(filter=IMPLICIT, convolutions=2, residual=0.9)
    for config, changes in ((one, False), (two, True)):
        mixer, x = mixer_of(config), randn(1, 9, CHANNELS)
        without = copy.deepcopy(mixer)
        without.config = OrderNHyenaConfig(filter=IMPLICIT, convolutions=config.convolutions)
        assert torch.equal(mixer(x), without(x)) is not changes


# --- one convolution is Hyena itself ---


@torch.no_grad()
@pytest.mark.parametrize("filter_", FILTERS)
@pytest.mark.parametrize("skip", [True, False])
def test_one_convolution_with_the_gate_first_is_hyena(filter_, skip):
    options = {"short_taps": 4, "short_bias": True, "projection_bias": True, "skip": skip}
    hyena = mixer_of(HyenaConfig(filter=FILTERS[filter_], **options), seed=1)
    config = OrderNHyenaConfig(filter=FILTERS[filter_], convolutions=1, gate_first=True, **options)
    of_order = mixer_of(config, seed=2)
    weights = {name.replace("filter.", "filters.0.", 1): t for name, t in hyena.state_dict().items()}
    if skip:
        weights["skip"] = weights["skip"][None]
    of_order.load_state_dict(weights)
    x = randn(2, 21, CHANNELS)
    torch.testing.assert_close(of_order(x), hyena(x), rtol=1e-12, atol=1e-12)


# --- filters of one MLP, and of one each ---


def test_shared_filters_have_one_mlp_and_a_last_layer_each():
    shared = mixer_of(OrderNHyenaConfig(filter=IMPLICIT, convolutions=3))
    separate = mixer_of(OrderNHyenaConfig(filter=IMPLICIT, convolutions=3, shared_filter=False))
    mlp = 5 * 5 + 5 + 2 * (5 * 5 + 5) + 5  # three hidden layers and a frequency a unit
    last = 5 * CHANNELS
    sizes = [sum(p.numel() for p in mixer.filters.parameters()) for mixer in (shared, separate)]
    assert sizes == [mlp + 3 * last, 3 * (mlp + last)]


@torch.no_grad()
@pytest.mark.parametrize("trained", [True, False])
def test_shared_filters_are_parts_of_one_filter_with_all_outputs(trained):
    filter_ = ImplicitFilterConfig(max_length=40, width=5, positions=BandsConfig(trained=trained), window=None)
    mixer = mixer_of(OrderNHyenaConfig(filter=filter_, convolutions=3))
    first = mixer.filters[0]
    for own in mixer.filters:
        torch.testing.assert_close(own.taps(40), implicit_taps(own, mlp=first), rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("groups", [None, 3])
def test_windows_of_a_shared_mlp_are_dealt_out_as_documented(interleaved, groups):
    """Filter c of convolution i: output c · convolutions + i (interleaved) or i · channels + c."""
    config = OrderNHyenaConfig(
        filter=ImplicitFilterConfig(max_length=30, width=5, groups=groups),
        convolutions=3,
        interleaved_windows=interleaved,
    )
    mixer, count = mixer_of(config), groups or CHANNELS
    for i, own in enumerate(mixer.filters):
        places = [c * 3 + i if interleaved else i * count + c for c in range(count)]
        expected = implicit_taps(own, mlp=mixer.filters[0], places=places, of=3 * count)
        torch.testing.assert_close(own.taps(30), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_windows_of_separate_mlps_all_start_with_the_slowest():
    config = OrderNHyenaConfig(filter=IMPLICIT, shared_filter=False, interleaved_windows=True)
    for own in mixer_of(config).filters:
        torch.testing.assert_close(own.taps(40), implicit_taps(own), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_changed_mlp_changes_the_kept_taps_of_all_that_share_it():
    """Taps are kept while no weight of theirs changes; the shared weights belong to another module."""
    mixer, x = mixer_of(OrderNHyenaConfig(filter=IMPLICIT, convolutions=2)), randn(1, 9, CHANNELS)
    for name in ("layers.0.weight", "layers.1.bias", "frequency"):
        mixer(x)
        mixer.filters[0].get_parameter(name).add_(0.5)
        torch.testing.assert_close(mixer(x), order_n(copy.deepcopy(mixer), x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_copy_shares_with_its_own_first_filter():
    mixer, x = mixer_of(OrderNHyenaConfig(filter=IMPLICIT, convolutions=2)), randn(1, 9, CHANNELS)
    twin, before = copy.deepcopy(mixer), mixer(x)
    mixer.filters[0].layers[0].weight.mul_(3)
    assert torch.equal(twin(x), before)
    assert not torch.allclose(mixer(x), before)


# --- dropout ---


def test_dropout_acts_while_training_and_on_what_enters_each_convolution():
    """With all but everything dropped, only biases are left."""
    config = OrderNHyenaConfig(filter=IMPLICIT, dropout=0.999999, projection_bias=True)
    mixer, x = mixer_of(config), randn(1, 9, CHANNELS)
    torch.testing.assert_close(mixer(x), order_n(mixer, x), rtol=1e-9, atol=1e-9)
    mixer.train()
    torch.manual_seed(0)
    torch.testing.assert_close(mixer(x), mixer.output.bias.expand(1, 9, -1), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
def test_bfloat16_is_close_to_float32(options):
    """Ten roundings to eight bits."""
    error = bfloat16_error(mixer_of(OPTIONS[options], noise=0.1), randn(2, 30, CHANNELS))
    assert 1e-4 < error < 10 * 2**-8
