"""Causal convolution of whole sequences with long taps, by real FFT."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crocuta.ops.blocks import channels_first, compute_dtype, full_precision
from crocuta.ops.kernels import fft_conv as compiled
from crocuta.ops.kernels.library import runs_here

_WORKSPACE = 1 << 22
"""Elements of one FFT batch: more channels than fit are done in turns, which bounds memory and suits the caches."""


def fft_convolution(
    u: Float[Tensor, "b l d"],
    taps: Float[Tensor, "g k"],
    skip: Float[Tensor, " d"] | None = None,
    spectrum: Tensor | None = None,
) -> Float[Tensor, "b l d"]:
    """y[t] = Σ_j taps[j] · u[t - j] + skip · u[t]; inputs before u are zero.

    Transforms of the smallest 5-smooth length that cannot wrap around. In float32 (or float64), whatever u's
    dtype; the result has u's dtype. Differentiable; saves u and taps, and transforms again in the backward pass.
    ``spectrum`` may be ``filter_spectrum(taps, l)`` of an earlier call, for inference only.
    Cost O(l log l · d); at 10^6 tokens the float32 error is about 2e-5 of the output's size.
    Channels-last input without a spectrum goes to the compiled kernel where there is one.
    """
    if spectrum is None and runs_here(u):
        return compiled.fft_conv(u, taps, skip)
    dtype = compute_dtype(u.dtype)
    y = _FFTConvolution.apply(channels_first(u, dtype), taps.to(dtype), spectrum).permute(1, 2, 0).to(u.dtype)
    return y if skip is None else y + skip.to(u.dtype) * u


def filter_spectrum(taps: Float[Tensor, "g k"], length: int) -> Tensor:
    """The transform of the taps that a convolution of ``length`` inputs uses; complex [g f]."""
    used = taps[:, :length].to(compute_dtype(taps.dtype))
    return torch.fft.rfft(used, n=fft_length(length + used.shape[1] - 1))


def fft_length(minimum: int) -> int:
    """The smallest even number >= minimum whose only prime factors are 2, 3 and 5."""
    best, power5 = 1 << max(1, (minimum - 1).bit_length()), 1
    while power5 < best:
        power3 = power5
        while power3 < best:
            needed = -(-minimum // power3)
            best = min(best, power3 << max(1, (needed - 1).bit_length()))
            power3 *= 3
        power5 *= 5
    return best


def channel_turns(d: int, g: int, b: int, n: int, workspace: int) -> list[tuple[slice, slice]]:
    """Slices of channels, and of the groups they belong to, whose transforms of b rows fit ``workspace`` numbers."""
    repeat = d // g
    groups = max(1, workspace // (n * b * repeat))
    return [(slice(i * repeat, min(g, i + groups) * repeat), slice(i, min(g, i + groups))) for i in range(0, g, groups)]


class _FFTConvolution(torch.autograd.Function):
    @staticmethod
    @full_precision
    def forward(ctx, u: Tensor, taps: Tensor, spectrum: Tensor | None) -> Tensor:
        (d, b, l), g = u.shape, taps.shape[0]
        ctx.save_for_backward(u, taps)
        n = fft_length(l + min(l, taps.shape[1]) - 1)
        y = torch.empty_like(u)
        for channels, groups in channel_turns(d, g, b, n, _WORKSPACE):
            h = torch.fft.rfft(taps[groups, :l], n=n) if spectrum is None else spectrum[groups]
            product = _by_group(torch.fft.rfft(u[channels], n=n), h) * h[:, None, None]
            y[channels] = torch.fft.irfft(product, n=n)[..., :l].reshape(-1, b, l)
        return y

    @staticmethod
    @full_precision
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        u, taps = ctx.saved_tensors
        (d, b, l), (g, k) = u.shape, taps.shape
        used = min(l, k)
        n = fft_length(l + used - 1)
        du, dtaps = torch.empty_like(u), torch.zeros_like(taps)
        for channels, groups in channel_turns(d, g, b, n, _WORKSPACE):
            h = torch.fft.rfft(taps[groups, :l], n=n)
            dy_spectrum = _by_group(torch.fft.rfft(dy[channels], n=n), h)
            du[channels] = torch.fft.irfft(dy_spectrum * h.conj()[:, None, None], n=n)[..., :l].reshape(-1, b, l)
            correlation = (_by_group(torch.fft.rfft(u[channels], n=n), h).conj() * dy_spectrum).sum((1, 2))
            dtaps[groups, :used] = torch.fft.irfft(correlation, n=n)[:, :used]
        return du, dtaps, None


def _by_group(spectra: Tensor, like: Tensor) -> Tensor:
    """[channels b f] -> [groups r b f]."""
    return spectra.view(len(like), -1, *spectra.shape[1:])
