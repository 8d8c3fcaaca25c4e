"""Long and short convolutions as safari, HyenaDNA and vortex publish them, and torch's own depthwise convolution.

The long one (``fftconv`` of safari's and HyenaDNA's hyena.py, one formula in both), float32 and channels-first:

    y = irfft(rfft(u, 2l) · rfft(h, 2l) / 2l)[.. l] + D u

The models are channels-last, so the operator begins and ends with a transposition that is copied where the next
product wants it; both count here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from suite.steps import operator_training
from suite.task import Settings, Task, Tensors


def fftconv(u: Tensor, taps: Tensor, skip: Tensor) -> Tensor:
    """u [b d l], taps [d k], skip [d] -> y [b d l]."""
    size = 2 * u.shape[-1]
    spectrum = torch.fft.rfft(taps, n=size) / size
    y = torch.fft.irfft(torch.fft.rfft(u, n=size) * spectrum, n=size, norm="forward")[..., : u.shape[-1]]
    return y + u * skip[:, None]


def _with_transposes(u: Tensor, taps: Tensor, skip: Tensor) -> Tensor:
    """Channels-last in and out."""
    return fftconv(u.transpose(1, 2).contiguous(), taps, skip).transpose(1, 2).contiguous()


def long_convolution(inputs: Tensors, _: Settings) -> Task:
    u, taps, skip = inputs["u"], inputs["taps"], inputs["skip"]

    @torch.no_grad()
    def run() -> Tensor:
        return _with_transposes(u, taps, skip)

    return Task(run, lambda: {"y": run()})


def long_convolution_training(inputs: Tensors, _: Settings) -> Task:
    leaves = {name: inputs[name] for name in ("u", "taps", "skip")}
    return operator_training(lambda: _with_transposes(**leaves), leaves, inputs["dy"], {})


def fir_gate(inputs: Tensors, _: Settings) -> Task:
    """A padded depthwise ``conv1d``, cut, bias added, thirds, the gate: as in stripedhyena's engine."""
    z, bias = inputs["z"], inputs["bias"][:, None]
    weight, length, padding = inputs["taps"].flip(1)[:, None].contiguous(), z.shape[1], inputs["taps"].shape[1] - 1

    @torch.no_grad()
    def run() -> tuple[Tensor, Tensor]:
        filtered = F.conv1d(z.transpose(1, 2), weight, padding=padding, groups=z.shape[2])[..., :length] + bias
        x2, x1, v = filtered.chunk(3, dim=1)
        return x2, x1 * v

    return Task(run, lambda: {name: y.transpose(1, 2) for name, y in zip(("x2", "u"), run(), strict=True)})


def medium_fir(inputs: Tensors, _: Settings) -> Task:
    """torch's depthwise ``conv1d`` on channels-first inputs, its best layout."""
    u, weight = inputs["u"].transpose(1, 2).contiguous(), inputs["taps"].flip(1)[:, None].contiguous()

    @torch.no_grad()
    def run() -> Tensor:
        return F.conv1d(u, weight, padding=weight.shape[2] - 1, groups=u.shape[1])[..., : u.shape[2]]

    return Task(run, lambda: {"y": run().transpose(1, 2)})


def cached_dot(inputs: Tensors, sizes: Settings) -> Task:
    """Generation by a dot product with all inputs so far: y[t] = Σ_j h[t - j] u[j] + D u[t].

    The taps are flipped once, before the clock starts. Every ``sampled``-th token is run, in the middle of its stretch.
    """
    u, taps, skip = inputs["u"][0], inputs["taps"], inputs["skip"]
    length, sampled = u.shape[0], sizes["sampled"]
    flipped, buffer = taps.flip(1).contiguous(), u.t().contiguous()

    @torch.no_grad()
    def run() -> list[Tensor]:
        outputs = []
        for t in range(sampled // 2, length, sampled):
            buffer[:, t] = u[t]
            outputs.append((buffer[:, : t + 1] * flipped[:, length - 1 - t :]).sum(-1) + skip * u[t])
        return outputs

    return Task(run, lambda: {"y": torch.stack(run())[None]}, units=len(range(sampled // 2, length, sampled)))
