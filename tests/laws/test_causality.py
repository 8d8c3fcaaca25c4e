"""Changing a token changes nothing before it, and something at it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import KINDS, random_ids, tiny_model

from crocuta.model.filters import explicit, implicit
from crocuta.model.lm import Model
from crocuta.ops.kernels.library import switched_off

LENGTH = 70


def leak(model: Model) -> tuple[float, float]:
    """(largest change before a changed token, smallest change at one), over every position that can be changed."""
    ids = random_ids(LENGTH, seed=1)
    changed = ids.repeat(LENGTH, 1)  # row t differs from ids at t alone
    other = 7 + (ids - 7 + torch.randint(1, 4, ids.shape, generator=torch.Generator().manual_seed(2))) % 4
    changed.diagonal().copy_(other)
    difference = (model(changed) - model(ids[None])).abs().amax(-1)
    before = torch.ones(LENGTH, LENGTH).tril(-1).bool()
    return float(difference[before].max()), float(difference.diagonal().min())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_no_logits_before_a_changed_token_change(kind):
    before, at = leak(tiny_model(kind, torch.float64, seed=1))
    assert before <= 1e-12
    assert at > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", ["explicit-fft", "implicit"])
def test_a_circular_convolution_is_found_out(kind, monkeypatch):
    """The control: a transform that is too short wraps the end of a sequence around to its start."""

    def circular(u, taps, skip=None, spectrum=None):
        length = u.shape[1]
        kernel = torch.fft.rfft(taps[:, :length], n=length).repeat_interleave(u.shape[2] // len(taps), 0)
        y = torch.fft.irfft(torch.fft.rfft(u, dim=1) * kernel.t(), n=length, dim=1)
        return y if skip is None else y + skip * u

    for module in (explicit, implicit):
        monkeypatch.setattr(module, "fft_convolution", circular)
    with switched_off():
        before, _ = leak(tiny_model(kind, torch.float64, seed=1))
    assert before > 1e-3
