"""FFT convolution against direct convolution in float64: values, gradients, awkward lengths."""

from __future__ import annotations

import pytest
import torch
from kernel_paths import COMPILED, TORCH

from crocuta.ops import fft_conv, reference
from crocuta.ops.fft_conv import fft_convolution, fft_length, filter_spectrum
from crocuta.ops.kernels.library import switched_off


@pytest.fixture(autouse=True, params=[COMPILED, TORCH])
def path(request):
    """Every test with the compiled kernels, and without."""
    with request.param():
        yield


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("length", "taps"), [(1, 1), (1, 9), (2, 1), (17, 17), (31, 8), (33, 100), (64, 64)])
def test_values(length, taps):
    u, h, skip = randn(2, length, 4), randn(2, taps, seed=1), randn(4, seed=2)
    expected = reference.causal_convolution(u, h) + skip * u
    torch.testing.assert_close(fft_convolution(u, h, skip), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("length", "taps"), [(1, 3), (6, 3), (5, 9)])
def test_gradients(length, taps):
    inputs = tuple(t.requires_grad_() for t in (randn(2, length, 4), randn(2, taps), randn(4)))
    assert torch.autograd.gradcheck(fft_convolution, inputs)


def test_channels_done_in_turns_give_the_same(monkeypatch):
    u, h = randn(2, 40, 6), randn(3, 40, seed=1)
    whole = fft_convolution(u, h)
    monkeypatch.setattr(fft_conv, "_WORKSPACE", 1)
    torch.testing.assert_close(fft_convolution(u, h), whole, rtol=1e-13, atol=1e-13)


def test_a_kept_spectrum_gives_the_same():
    u, h = randn(1, 40, 4), randn(4, 64, seed=1)
    kept = fft_convolution(u, h, spectrum=filter_spectrum(h, 40))
    torch.testing.assert_close(kept, fft_convolution(u, h), rtol=1e-12, atol=1e-12)
    with switched_off():  # a spectrum is always torch's
        assert torch.equal(kept, fft_convolution(u, h))


def test_transform_lengths_are_the_smallest_smooth_even_ones():
    def smooth(n):
        for p in (2, 3, 5):
            while n % p == 0:
                n //= p
        return n == 1

    for minimum in range(1, 700):
        n = fft_length(minimum)
        assert n == next(m for m in range(max(2, minimum), 2000) if m % 2 == 0 and smooth(m))


def test_no_wrap_around():
    """A future impulse must not reach the past: a circular convolution of length l would put it there."""
    u = torch.zeros(1, 50, 1, dtype=torch.float64)
    u[0, 49, 0] = 1.0
    assert fft_convolution(u, randn(1, 50))[0, :49].abs().max() < 1e-14
