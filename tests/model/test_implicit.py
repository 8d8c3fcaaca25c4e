"""Implicit filters against their formula, one position after the other: every kind of every part."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from naive_layers import disturbed, gradcheck, implicit_taps

from crocuta.config import (
    BandsConfig,
    BlockConfig,
    FixedWindowConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    LearnedWindowConfig,
    ModelConfig,
    PositionsConfig,
    ReLUConfig,
    ScalarConfig,
    SineConfig,
    SinusoidalConfig,
    WindowConfig,
)
from crocuta.errors import InputError
from crocuta.model.build import build_model
from crocuta.model.filters import ImplicitFilter

LONGEST = 50
POSITIONS: dict[str, PositionsConfig] = {
    "bands": BandsConfig(features=7),
    "one band": BandsConfig(features=3),
    "trained bands": BandsConfig(trained=True),
    "scalar": ScalarConfig(),
    "sinusoidal": SinusoidalConfig(features=6, base=50.0, decay=2.0),
    "sinusoidal, no decay": SinusoidalConfig(features=2, decay=0.0),
}
ACTIVATIONS = {
    "sine": SineConfig(frequency=3.0),
    "fixed sine": SineConfig(frequency=3.3, trained=False),
    "relu": ReLUConfig(),
}
WINDOWS: dict[str, WindowConfig | None] = {
    "none": None,
    "fixed": FixedWindowConfig(decay=(0.2, 1.1), target=0.05, shift=0.03),
    "learned": LearnedWindowConfig(decay=(0.1, 2.0), target=0.05, shift=0.03),
}


def filter_of(channels: int = 6, *, seed: int = 0, disturb: bool = True, **fields) -> ImplicitFilter:
    """A filter in float64, every parameter disturbed, alone in a model."""
    config = ImplicitFilterConfig(**({"max_length": LONGEST, "width": 5} | fields))
    block = BlockConfig(mixer=HyenaConfig(filter=config), mlp=None)
    model = build_model(ModelConfig(vocab_size=4, hidden_size=channels, blocks=(block,)), seed=seed)
    filter_ = model.blocks[0].mixer.filter
    assert isinstance(filter_, ImplicitFilter)
    return (disturbed(filter_, seed) if disturb else filter_).double()


def assert_is_the_formula(filter_: ImplicitFilter) -> None:
    expected, found = implicit_taps(filter_), filter_.taps(LONGEST)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert expected.std() > 1e-3


# --- the formula ---


@torch.no_grad()
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_activations_and_windows(positions, activation, window):
    parts = {"positions": POSITIONS[positions], "activation": ACTIVATIONS[activation], "window": WINDOWS[window]}
    assert_is_the_formula(filter_of(**parts))


@torch.no_grad()
@pytest.mark.parametrize(
    ("bound", "normalise", "output_bias", "groups"),
    list(itertools.product([True, False], [None, "absolute", "energy"], [True, False], [None, 2])),
)
def test_bound_normalise_bias_and_groups(bound, normalise, output_bias, groups):
    parts = {"bound": bound, "normalise": normalise, "output_bias": output_bias, "groups": groups}
    for window in WINDOWS.values():
        filter_ = filter_of(window=window, **parts)
        assert_is_the_formula(filter_)
        assert len(filter_.taps(3)) == (groups or 6)
        assert (filter_.output.bias is not None) is output_bias


@torch.no_grad()
@pytest.mark.parametrize("layers", [0, 1, 4])
def test_depth_and_width(layers):
    filter_ = filter_of(inner_layers=layers, width=3)
    assert [len(layer.weight) for layer in filter_.layers] == [3] * (layers + 1)
    assert_is_the_formula(filter_)


@torch.no_grad()
def test_the_frequency_is_one_vector_for_all_layers():
    filter_ = filter_of(inner_layers=2)
    assert filter_.frequency.shape == (5,)
    assert [name for name, _ in filter_of(activation=ReLUConfig()).named_parameters() if "freq" in name] == []
    assert filter_of(activation=SineConfig(trained=False)).frequency is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("window", WINDOWS)
def test_gradients(window, activation):
    """Of the convolution, for its input and all that makes the taps."""
    filter_ = filter_of(
        activation=ACTIVATIONS[activation],
        window=WINDOWS[window],
        positions=BandsConfig(trained=True),
        normalise="energy",
        bound=True,
        output_bias=True,
        groups=3,
        max_length=12,
    )

    class Convolution(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter = filter_

        def forward(self, u: torch.Tensor) -> torch.Tensor:
            return self.filter.convolve(u, None)

    assert gradcheck(Convolution(), torch.randn(2, 9, 6, dtype=torch.float64))


# --- laws ---


@torch.no_grad()
@pytest.mark.parametrize("normalise", [None, "absolute", "energy"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_taps_do_not_depend_on_the_length(positions, normalise):
    filter_ = filter_of(positions=POSITIONS[positions], normalise=normalise, window=WINDOWS["learned"])
    whole = filter_.taps(LONGEST)
    for length in (1, 2, 17, 49):
        torch.testing.assert_close(filter_.taps(length), whole[:, :length], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("window", WINDOWS)
def test_normalised_filters_sum_to_one_and_enlarge_nothing(window):
    filter_ = filter_of(window=WINDOWS[window], normalise="absolute", output_bias=True)
    sums = filter_.taps(LONGEST).abs().sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-12, atol=0)
    assert (filter_.taps(LONGEST // 2).abs().sum(1) < 1).all()
    signs = filter_.taps(LONGEST).sign().flip(1).t()[None]  # what each filter answers loudest
    assert float(filter_.convolve(signs, None).abs().max()) == pytest.approx(1.0, rel=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("window", WINDOWS)
def test_filters_of_one_energy_keep_the_size_of_noise(window):
    filter_ = filter_of(window=WINDOWS[window], normalise="energy", output_bias=True)
    energy = filter_.taps(LONGEST).square().sum(1)
    torch.testing.assert_close(energy, torch.ones_like(energy), rtol=1e-12, atol=0)
    noise = torch.randn(4_000, LONGEST, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    last = filter_.convolve(noise, None)[:, -1]
    assert float(last.square().mean()) == pytest.approx(1.0, rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("normalise", ["absolute", "energy"])
def test_a_silent_filter_is_normalised_to_zeros(normalise):
    filter_ = filter_of(normalise=normalise)
    filter_.output.weight.zero_()
    assert torch.equal(filter_.taps(LONGEST), torch.zeros(6, LONGEST, dtype=torch.float64))


@torch.no_grad()
def test_bounded_taps_lie_within_the_window():
    filter_ = filter_of(bound=True, window=FixedWindowConfig())
    filter_.output.weight.mul_(1e3)
    slow, fast = (-math.log(1e-2) / share for share in (1.5, 0.3))
    rates = torch.linspace(slow, fast, 6, dtype=torch.float64)
    window = torch.exp(-rates[:, None] * torch.linspace(0, 1, LONGEST, dtype=torch.float64))
    assert (filter_.taps(LONGEST).abs() <= window * (1 + 1e-12)).all()
    assert (filter_.taps(LONGEST).abs() > 0.999 * window).double().mean() > 0.5


# --- windows as described ---


@torch.no_grad()
def test_windows_reach_their_target_where_it_is_said():
    """Channel 0 at the larger share of max_length, the last one at the smaller, fixed and, at first, learned."""
    for window in (FixedWindowConfig(decay=(0.25, 0.5), target=0.01), LearnedWindowConfig(decay=(0.25, 0.5))):
        filter_ = filter_of(window=window, disturb=False)
        rates = filter_.rates(filter_.output.weight)
        assert math.exp(-0.5 * rates[0]) == pytest.approx(0.01, rel=1e-5)
        assert math.exp(-0.25 * rates[-1]) == pytest.approx(0.01, rel=1e-5)


@torch.no_grad()
def test_learned_rates_start_log_spaced_and_fixed_ones_evenly():
    learned = filter_of(window=LearnedWindowConfig(), disturb=False)
    steps = learned.log_rates.diff()
    torch.testing.assert_close(steps, steps[:1].expand(5), rtol=1e-5, atol=0)
    fixed = filter_of(window=FixedWindowConfig(), disturb=False)
    steps = fixed.rates(fixed.output.weight).diff()
    torch.testing.assert_close(steps, steps[:1].expand(5), rtol=1e-9, atol=0)
    assert (steps > 0).all()


@torch.no_grad()
def test_trained_positions_start_as_the_formula():
    trained = filter_of(positions=BandsConfig(trained=True), disturb=False)
    plain = filter_of(positions=BandsConfig(), disturb=False)
    assert trained.features.shape == (LONGEST, 5)
    plain.load_state_dict({name: t for name, t in trained.state_dict().items() if name != "features"})
    torch.testing.assert_close(trained.taps(LONGEST), plain.taps(LONGEST), rtol=0, atol=1e-4)


def test_more_taps_than_there_are_positions_are_refused():
    with pytest.raises(InputError, match="longer than the implicit filter is defined for: got 51 tokens"):
        filter_of().taps(LONGEST + 1)


def test_a_filter_of_another_length_is_another_function():
    """The control of the law above: the same weights, with time measured in another length."""
    filter_ = filter_of()
    other = ImplicitFilter(dataclasses.replace(filter_.config, max_length=2 * LONGEST), 6).double()
    other.load_state_dict(filter_.state_dict())
    assert (other.taps(LONGEST) - filter_.taps(LONGEST)).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("positions", ["bands", "scalar", "sinusoidal"])
def test_wide_positions_keep_the_digits_of_high_frequencies(positions):
    """Taps of float32 weights against the same in float64; the control: positions in float32."""
    errors = []
    for wide in (True, False):
        parts = {"positions": POSITIONS[positions], "width": 16, "max_length": 8192, "wide_positions": wide}
        filter_ = filter_of(disturb=False, **parts)
        expected = filter_.taps(8192)
        errors.append(float((filter_.float().taps(8192) - expected).abs().max() / expected.abs().max()))
    assert errors[0] < 1e-5
    assert errors[1] > 1e-4
