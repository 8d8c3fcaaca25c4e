"""Short FIR and the first gate in one op: what a Hyena mixer does between its projection and its long filter."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crocuta.ops.blocks import channels_first, compute_dtype
from crocuta.ops.fir import apply_band, apply_band_adjoint


def fir_gate(
    z: Float[Tensor, "b l c"],
    taps: Float[Tensor, "c k"],
    bias: Float[Tensor, " c"] | None = None,
    tail: Float[Tensor, "b t c"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]]:
    """(x2, x1 · v) where (x2, x1, v) are the thirds of FIR(z) + bias over channels, c = 3 d.

    Accumulates in float32 (or float64) and returns z's dtype. Saves z alone: the filtered thirds, three times the
    output, are computed again in the backward pass. ``tail`` as in ``fir.fir``.
    """
    dtype = compute_dtype(z.dtype)
    past = None if tail is None else channels_first(tail, dtype)
    zero = taps.new_zeros(taps.shape[0]) if bias is None else bias
    x2, u = _FIRGate.apply(channels_first(z, dtype), taps.to(dtype), zero.to(dtype), past)
    return x2.permute(1, 2, 0).to(z.dtype), u.permute(1, 2, 0).to(z.dtype)


class _FIRGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, taps: Tensor, bias: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(z, taps, bias, tail)
        d = z.shape[0] // 3
        past = (None, None) if tail is None else (tail[:d], tail[d:])
        x2 = apply_band(z[:d], taps[:d], past[0]) + bias[:d, None, None]
        pair = apply_band(z[d:], taps[d:], past[1]) + bias[d:, None, None]
        return x2, pair[:d] * pair[d:]

    @staticmethod
    def backward(ctx, dx2: Tensor, du: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # type: ignore[override]
        z, taps, bias, tail = ctx.saved_tensors
        d = z.shape[0] // 3
        past = None if tail is None else tail[d:]
        pair = apply_band(z[d:], taps[d:], past) + bias[d:, None, None]
        dc = torch.empty_like(z)
        dc[:d] = dx2
        torch.mul(du, pair[d:], out=dc[d : 2 * d])
        torch.mul(du, pair[:d], out=dc[2 * d :])
        del pair
        return (*_with_bias(apply_band_adjoint(dc, z, taps, tail), dc),)


def _with_bias(
    gradients: tuple[Tensor, Tensor, Tensor | None], dc: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dz, dtaps, dtail = gradients
    return dz, dtaps, dc.sum((1, 2)), dtail
