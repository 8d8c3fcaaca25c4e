"""The window of implicit filters: taps that fade exponentially (Hyena section 3.3)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crocuta.ops.kernels import window as _  # noqa: F401 - registers the op
from crocuta.ops.kernels.library import runs_here


def decay_window(
    taps: Float[Tensor, "g k"], rates: Float[Tensor, " g"], shift: float, delta: float
) -> Float[Tensor, "g k"]:
    """taps[g, i] · (exp(-rates[g] · i · delta) + shift), in the dtype of the taps, which the rates have too.

    Differentiable in taps and rates.
    """
    if runs_here(taps) and taps.dtype in (torch.float32, torch.float64):
        return torch.ops.crocuta.decay_window(taps, rates, shift, delta)
    return plain_decay_window(taps, rates, shift, delta)


def plain_decay_window(
    taps: Float[Tensor, "g k"], rates: Float[Tensor, " g"], shift: float, delta: float
) -> Float[Tensor, "g k"]:
    """``decay_window`` without the compiled kernel, whose last bits differ."""
    wide = taps.dtype if taps.device.type == "mps" else torch.float64  # which that device has not
    t = (torch.arange(taps.shape[1], dtype=wide, device=taps.device) * delta).to(taps.dtype)
    return taps * (torch.exp(-rates[:, None] * t) + shift)
