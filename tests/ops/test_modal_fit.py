"""The fit of modes to taps: modal filters come back, poles stay inside the circle, and every figure is what it says."""

from __future__ import annotations

import math

import pytest
import torch

from crocuta.config import ComplexModalFilterConfig
from crocuta.errors import InputError, NonFiniteError
from crocuta.model.filters import ModalFilter
from crocuta.ops import modal_fit, pole_search
from crocuta.ops.hankel import hankel_spectrum, shift_poles
from crocuta.ops.modal_fit import ModalFit, fit_modal, measure

FLOAT64 = torch.float64


def modal_filters(
    kind: str, modes: int, length: int, *, count: int = 4, seed: int = 0, timescales: tuple[float, float] | None = None
) -> torch.Tensor:
    """Taps [count length] of random modal filters, by the definition; decay times from half a tap to 4 lengths."""
    draw = torch.Generator().manual_seed(seed)
    shortest, longest = timescales or (0.5, 4.0 * length)
    uniform = torch.rand(3, count, modes, dtype=FLOAT64, generator=draw)
    decay = 1 / (shortest * (longest / shortest) ** uniform[0])
    angle = math.pi * uniform[1]
    on_axis = {"complex": 0.0, "real": 1.0, "mixed": 0.5}[kind]
    angle = torch.where(uniform[2] < on_axis, (angle > math.pi / 2) * math.pi, angle)
    residues = torch.view_as_complex(torch.randn(count, modes, 2, dtype=FLOAT64, generator=draw))
    t = torch.arange(length, dtype=FLOAT64)
    return (residues[..., None] * torch.exp(torch.complex(-decay, angle)[..., None] * t)).sum(1).real


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=FLOAT64, generator=torch.Generator().manual_seed(seed))


def poles(fit: ModalFit) -> torch.Tensor:
    """Moduli, in the dtype of the modes, as the filter that keeps them computes them."""
    return torch.exp(-torch.exp(fit.log_decay))


# --- recovery -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modes", "length"),
    # With 4 · modes taps or fewer any filter could be fitted.
    [(n, length) for n in (1, 2, 4, 8, 16) for length in (64, 300, 1024, 8192) if 4 * n < length - 1],
)
@pytest.mark.parametrize("kind", ["complex", "real", "mixed"])
def test_a_modal_filter_of_n_modes_is_recovered_from_its_taps(kind: str, modes: int, length: int) -> None:
    taps = modal_filters(kind, modes, length, count=1 if length > 2000 else 4, seed=modes * length)
    fit = fit_modal(taps, modes)
    found = fit.taps(length)
    found[:, 0] += fit.tap_0
    assert ((found - taps).norm(dim=1) / taps.norm(dim=1)).max() <= 1e-6
    assert fit.error.max() <= 1e-6
    assert poles(fit).max() < 1


def test_the_poles_themselves_come_back() -> None:
    t = torch.arange(500, dtype=FLOAT64)
    taps = torch.exp(-t / 200) * torch.cos(0.3 * t) - 2 * torch.exp(-t / 9) * torch.sin(2.1 * t)
    fit = fit_modal(taps[None], 2)
    order = fit.angle[0].argsort()
    torch.testing.assert_close(fit.angle[0, order], torch.tensor([0.3, 2.1], dtype=FLOAT64), rtol=0, atol=1e-10)
    torch.testing.assert_close((-fit.log_decay[0, order]).exp(), torch.tensor([200.0, 9.0], dtype=FLOAT64))
    expected = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=FLOAT64)
    torch.testing.assert_close(fit.residues[0, order], expected, rtol=0, atol=1e-9)


def test_too_few_modes_do_not_suffice() -> None:
    taps = modal_filters("complex", 4, 512, timescales=(50, 200))
    assert fit_modal(taps, 3).error.min() > 1e-3


@pytest.mark.parametrize("length", [5000, 40_000, 70_000])
def test_long_filters_smooth_and_rough(length: int) -> None:
    """Smooth ones are read at every q-th tap; one that is rough between those is noticed and read again."""
    t = torch.arange(length, dtype=FLOAT64)
    smooth = torch.exp(-3 * t / length) * torch.cos(20 * t / length)
    rough = torch.exp(-t / 3) + 0.2 * torch.exp(-20 * t / length) * torch.cos(2.5 * t)
    fit = fit_modal(torch.stack([smooth, rough]), 3)
    assert fit.error.max() <= 1e-6


def test_noise_is_fitted_down_to_itself() -> None:
    """Modes in noise: the error is that of the noise, not of the start."""
    taps = modal_filters("complex", 3, 1000, timescales=(100, 400))
    loud = 1e-3 * taps.norm(dim=1, keepdim=True) / math.sqrt(1000)
    fit = fit_modal(taps + loud * noise(4, 1000), 3)
    assert fit.error.min() > 8e-4
    assert fit.error.max() < 1.1e-3
    assert ((fit.taps(1000) - taps)[:, 1:].norm(dim=1) / taps.norm(dim=1)).max() < 2.5e-4


# --- stability, and what no filter can do ---------------------------------------------------------------------------


T = torch.arange(400, dtype=FLOAT64)
ARBITRARY = {
    "growing": torch.exp(T / 40)[None],
    "growing and oscillating": (torch.exp(T / 20) * torch.cos(T))[None],
    "constant": torch.ones(1, 400, dtype=FLOAT64),
    "alternating": ((-1.0) ** T)[None],
    "ramp": T[None],
    "undamped": torch.cos(0.7 * T)[None],
    "noise": noise(3, 400),
    "an impulse late": torch.eye(400, dtype=FLOAT64)[[1, 2, 200, 399]],
    "large": 1e30 * torch.exp(-T / 50)[None],
    "small": 1e-30 * torch.exp(-T / 50)[None],
    "two taps": noise(2, 2),
    "three taps": noise(2, 3),
    "six taps": noise(5, 6),
    "sixteen taps": noise(20, 16),
}


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=["float32", "float64"])
@pytest.mark.parametrize("modes", [1, 4])
@pytest.mark.parametrize("name", ARBITRARY)
def test_poles_are_inside_the_circle_whatever_the_taps(name: str, modes: int, dtype: torch.dtype) -> None:
    taps = ARBITRARY[name]
    fit = fit_modal(taps, modes, dtype=dtype)
    assert poles(fit).max() < 1
    assert all(torch.isfinite(getattr(fit, field)).all() for field in ModalFit.__dataclass_fields__)
    assert (fit.error <= 1 + 1e-9).all(), "zeros would be nearer"
    assert ((fit.angle >= 0) & (fit.angle <= math.pi + 1e-6)).all()
    assert fit.residues.abs().max() <= 1e8 * taps.abs().max(), "a sine of rounding errors was scaled up"
    assert (fit.taps(100_000)[:, -100:].abs().amax(1) <= 1e-6 * taps.abs().amax(1)).all() or taps.shape[1] < 10


def test_numbers_beyond_float64_end_in_an_error_that_says_so() -> None:
    """The norm of these overflows: no loop may wait for a matrix of NaN to become definite."""
    fit = fit_modal(torch.full((1, 40), 1e300, dtype=FLOAT64), 2)
    assert not fit.error[0] <= 1


def test_no_pole_outlasts_ten_lengths() -> None:
    fit = fit_modal(torch.ones(1, 300), 2)
    assert fit.log_decay.min().exp() >= modal_fit.SLOWEST / 299 * (1 - 1e-9)
    assert fit.error < 1e-3


def test_zeros_are_fitted_by_zeros() -> None:
    taps = torch.zeros(2, 50)
    taps[:, 0] = 3.0
    fit = fit_modal(taps, 2)
    assert fit.residues.abs().max() == 0
    assert fit.error.tolist() == fit.bound.tolist() == [0, 0]
    assert fit.tap_0.tolist() == [3, 3]


# --- errors and bounds are what they say ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=["float32", "float64"])
def test_errors_are_those_of_the_filter_that_is_kept(dtype: torch.dtype) -> None:
    """Against taps of the module that holds the modes, and a plain Fourier sum."""
    taps = torch.cat([modal_filters("complex", 6, 200, timescales=(3, 90)), noise(2, 200)])
    fit = fit_modal(taps, 3, dtype=dtype)
    module = ModalFilter(ComplexModalFilterConfig(modes=3), 6).to(dtype)
    module.load_state_dict({"log_decay": fit.log_decay, "angle": fit.angle, "residues": fit.residues})
    found = module.double().taps(200).detach() if dtype == FLOAT64 else module.taps(200).detach().double()
    found[:, 0] += fit.tap_0
    tolerance = 1e-9 if dtype == FLOAT64 else 2e-6
    torch.testing.assert_close(found[:4, 0], taps[:4, 0], rtol=0, atol=tolerance * 10)
    wanted = taps.clone()
    wanted[:, 0] = found[:, 0] = 0
    error = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    torch.testing.assert_close(fit.error, error, rtol=0, atol=tolerance)
    turns = torch.arange(512, dtype=FLOAT64)[:, None] * torch.arange(200) / 512
    wave = torch.exp(-2j * math.pi * turns)
    spectra = [(wave @ x.T.to(wave.dtype)).abs().amax(0) for x in (found - wanted, wanted)]
    torch.testing.assert_close(fit.frequency_error, spectra[0] / spectra[1], rtol=0, atol=50 * tolerance)


def test_float32_modes_are_nearly_as_good() -> None:
    taps = modal_filters("mixed", 5, 1000, count=20)
    fit = fit_modal(taps, 5, dtype=torch.float32)
    assert {fit.log_decay.dtype, fit.angle.dtype, fit.residues.dtype} == {torch.float32}
    assert 1e-9 < fit.error.median() < 1e-5


def test_a_wrong_tap_0_counts() -> None:
    taps = modal_filters("complex", 2, 100)
    fit = fit_modal(taps, 2)
    off = 0.01 * taps[:, 1:].norm(dim=1)
    error, frequency_error = measure(taps, fit.log_decay, fit.angle, fit.residues, off)
    torch.testing.assert_close(error, torch.full_like(error, 0.01))
    assert (frequency_error > 1e-3).all()


@pytest.mark.parametrize("modes", [1, 3, 6])
def test_no_filter_is_below_its_bound(modes: int) -> None:
    taps = torch.cat([noise(6, 120), modal_filters("complex", 12, 120, count=6, timescales=(5, 100))])
    fit = fit_modal(taps, modes)
    assert (fit.frequency_error >= fit.bound * (1 - 1e-9)).all()
    assert fit.bound[:6].min() > 0.05, "of noise, a bound worth its name"
    assert fit.singular_values.shape == (12, 2 * modes + 1)


def test_singular_values_are_those_of_the_hankel_matrix() -> None:
    taps = torch.cat([noise(2, 101), modal_filters("mixed", 3, 101, count=2)])
    index = torch.arange(51)
    exact = torch.linalg.svdvals(taps[:, index[:, None] + index])
    values, vectors = hankel_spectrum(taps, 6)
    assert vectors.shape == (4, 51, 6)
    assert (values <= exact[:, : values.shape[1]] + 1e-12).all()
    torch.testing.assert_close(values[2:, :6], exact[2:, :6], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(values[:2, :2], exact[:2, :2], rtol=0.15, atol=0)


def test_poles_of_the_hankel_matrix_are_exact_where_the_rank_is() -> None:
    """Also where the last row weighs much: nine rows, slow poles."""
    t = torch.arange(17, dtype=FLOAT64)
    taps = torch.exp(-t / 40) * torch.cos(0.5 * t) + 0.3 * torch.exp(-t / 15) * torch.sin(1.7 * t)
    poles = shift_poles(hankel_spectrum(taps[None], 4)[1])[0]
    poles = poles[poles.imag > 0]
    found = poles.log()[poles.angle().argsort()]
    expected = torch.tensor([-1 / 40 + 0.5j, -1 / 15 + 1.7j], dtype=torch.complex128)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_more_modes_are_never_worse() -> None:
    decaying = noise(4, 500, seed=3) * torch.exp(-torch.arange(500.0) / 60)
    taps = torch.cat([modal_filters("complex", 24, 500, timescales=(10, 300)), decaying])
    errors = torch.stack([fit_modal(taps, modes).error for modes in (1, 2, 4, 8, 16)])
    assert (errors[1:] <= errors[:-1]).all()
    assert (errors[-1] < 0.75 * errors[0]).all()


def smooth_filters() -> torch.Tensor:
    """Low numerical rank and no pole in sight: what the windowed sine MLP of a Hyena with slow sines makes."""
    t = torch.arange(600, dtype=FLOAT64) / 600
    rates = torch.linspace(0.5, 12, 16, dtype=FLOAT64)[:, None]
    return torch.sin(3 * t + 1 / (1 + rates * t)) * (torch.exp(-rates * t) + 0.05)


def test_refinement_lowers_errors_and_never_raises_one() -> None:
    for taps in (smooth_filters(), modal_filters("complex", 20, 300, count=8, timescales=(10, 200)), noise(4, 300)):
        raw, refined = (fit_modal(taps, 4, iterations=steps).error for steps in (0, 30))
        assert (refined <= raw * (1 + 1e-9)).all()
    raw, refined = (fit_modal(smooth_filters(), 4, iterations=steps).error for steps in (0, 30))
    assert refined.median() < 0.6 * raw.median()


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("working_bytes", [1, modal_fit.WORKING_BYTES])
def test_a_batch_is_its_filters_one_by_one(monkeypatch: pytest.MonkeyPatch, working_bytes: int) -> None:
    monkeypatch.setattr(modal_fit, "WORKING_BYTES", working_bytes)
    taps = torch.cat(
        [modal_filters("mixed", 3, 200), modal_filters("complex", 9, 200, timescales=(9, 99)), noise(2, 200)]
    )
    together = fit_modal(taps, 3)
    for row in range(len(taps)):
        alone = fit_modal(taps[row : row + 1], 3)
        torch.testing.assert_close(alone.error, together.error[row : row + 1], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(alone.taps(200), together.taps(200)[row : row + 1], rtol=0, atol=1e-3)
        torch.testing.assert_close(alone.tap_0, taps[row : row + 1, 0] - alone.taps(1)[:, 0])


def test_the_given_taps_stay_as_they_are() -> None:
    taps = noise(3, 60)
    before = taps.clone()
    fit_modal(taps, 2)
    assert torch.equal(taps, before)


@pytest.mark.parametrize(
    ("taps", "modes", "error", "message"),
    [
        (torch.zeros(2, 1), 2, InputError, "no taps to fit"),
        (torch.zeros(0, 9), 2, InputError, "no taps to fit"),
        (torch.ones(2, 9), 0, InputError, "modes=0"),
        (torch.tensor([[1.0, 2.0, 3.0], [1.0, math.nan, 2.0]]), 1, NonFiniteError, "filter 1"),
    ],
)
def test_what_cannot_be_fitted(
    monkeypatch: pytest.MonkeyPatch, taps: torch.Tensor, modes: int, error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(modal_fit, "WORKING_BYTES", 1)  # filters in turns of one, and yet named by their place
    with pytest.raises(error, match=message):
        fit_modal(taps, modes)


def test_renewal_helps_where_the_start_is_poor_and_never_harms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taps in float32, whose noise hides most poles: without poles of what is left over, some errors are far larger."""
    hard = torch.cat([modal_filters("complex", 20, 300, count=20, timescales=(10, 200)), noise(10, 300)])
    renewed = fit_modal(smooth_filters().float(), 8).error, fit_modal(hard, 4).error
    monkeypatch.setattr(pole_search, "RENEWALS", 0)
    once = fit_modal(smooth_filters().float(), 8).error, fit_modal(hard, 4).error
    assert (torch.cat(renewed) <= torch.cat(once)).all()
    assert once[0].max() > 10 * renewed[0].max()
    assert renewed[0].max() < 2e-5
