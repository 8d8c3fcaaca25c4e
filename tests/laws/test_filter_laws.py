"""One kernel, whatever makes it: taps that do not know the length, and three ways to convolve with them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FILTERS, HIDDEN, MAX_LENGTH, MODAL, tiny_model

from crocuta.config import ExplicitFilterConfig, ImplicitFilterConfig
from crocuta.model.filters import Filter, ImplicitFilter
from crocuta.model.hyena import HyenaMixer, build_filter
from crocuta.ops.fft_conv import fft_convolution
from crocuta.ops.fir import fir


def filter_of(kind: str, dtype: torch.dtype = torch.float64) -> Filter:
    mixer = tiny_model(kind, dtype, seed=1).blocks[0].mixer
    assert isinstance(mixer, HyenaMixer)
    return mixer.filter


@torch.no_grad()
@pytest.mark.parametrize("kind", FILTERS)
@settings(max_examples=10)
@given(length=st.integers(1, MAX_LENGTH // 2), factor=st.sampled_from([1.01, 1.5, 2.0]))
def test_taps_do_not_depend_on_the_length(kind, length, factor):
    """To the bit where taps are stored; else but for the rounding of matrix products of another size."""
    filter_ = filter_of(kind)
    short, long = filter_.taps(length), filter_.taps(int(length * factor) + 1)
    assert short.shape[1] == min(length, filter_.config.taps if kind.startswith("explicit") else length)
    tolerance = 0 if kind.startswith("explicit") else 1e-12
    torch.testing.assert_close(long[:, : short.shape[1]], short, rtol=0, atol=tolerance)
    assert short[:, 0].abs().max() > 0.01


@torch.no_grad()
def test_taps_that_stretch_with_the_length_are_found_out():
    """The control: the same weights, with time measured in another length."""
    filter_ = filter_of("implicit")
    assert isinstance(filter_.config, ImplicitFilterConfig)
    other = ImplicitFilter(dataclasses.replace(filter_.config, max_length=2 * MAX_LENGTH), HIDDEN).double()
    other.load_state_dict(filter_.state_dict())
    assert (other.taps(40) - filter_.taps(40)).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", MODAL)
@settings(max_examples=15)
@given(length=st.integers(1, 150), batch=st.integers(1, 3), with_skip=st.booleans())
def test_fft_fir_and_modal_are_one_convolution(kind, length, batch, with_skip):
    filter_ = filter_of(kind)
    generator = torch.Generator().manual_seed(length)
    u = torch.randn(batch, length, HIDDEN, generator=generator, dtype=torch.float64)
    skip = torch.randn(HIDDEN, generator=generator, dtype=torch.float64) if with_skip else None
    taps = filter_.taps(length)
    by_modes = filter_.convolve(u, skip)
    by_fft = fft_convolution(u, taps, skip)
    by_fir = fir(u, taps) + (0 if skip is None else skip * u)
    torch.testing.assert_close(by_fft, by_modes, rtol=0, atol=1e-11)
    torch.testing.assert_close(by_fir, by_modes, rtol=0, atol=1e-11)
    assert by_modes.abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 200, 700])
def test_an_explicit_filter_of_the_same_taps_is_the_same_filter(length):
    """As ``FIRState`` and as modes, whole and continued; 700 taps are convolved by FFT."""
    modal = filter_of("complex-grouped")
    taps = modal.taps(length)
    explicit = build_filter(ExplicitFilterConfig(taps=length, groups=len(taps)), HIDDEN).double()
    explicit.load_state_dict({"weight": taps})
    u = torch.randn(2, length, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = modal.convolve(u, None)
    torch.testing.assert_close(explicit.convolve(u, None), expected, rtol=0, atol=1e-11)
    cut = length // 2
    for filter_ in (modal, explicit):
        state = filter_.init_state(2, None, device=u.device, dtype=u.dtype)
        pieces = [filter_.extend(piece, None, state, None) for piece in (u[:, :cut], u[:, cut:])]
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-11)
