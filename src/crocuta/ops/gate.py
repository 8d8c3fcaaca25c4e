"""Short FIR and the first gate in one op: what a Hyena mixer does between its projection and its long filter."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crocuta.ops.blocks import channels_first, compute_dtype, full_precision
from crocuta.ops.fir import apply_taps, apply_taps_adjoint, fir
from crocuta.ops.kernels import fir as compiled
from crocuta.ops.kernels import gpu
from crocuta.ops.kernels.library import runs_here


def fir_gate(
    z: Float[Tensor, "b l c"],
    taps: Float[Tensor, "c k"],
    bias: Float[Tensor, " c"] | None = None,
    tail: Float[Tensor, "b t c"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]]:
    """(x2, x1 · v) where (x2, x1, v) are the thirds of FIR(z) + bias over channels, c = 3 d.

    Accumulates in float32 (or float64) and returns z's dtype. Saves z alone: the filtered thirds, three times the
    output, are computed again in the backward pass. ``tail`` as in ``fir.fir``.
    Channels-last input goes to the compiled kernel where there is one, few taps on a GPU to that in Triton.
    """
    if runs_here(z) or (taps.shape[1] <= gpu.MOST_TAPS and gpu.runs_on(z.device)):
        return compiled.fir_gate(z, taps, bias, tail)
    dtype = compute_dtype(z.dtype)
    past = None if tail is None else channels_first(tail, dtype)
    offset = None if bias is None else bias.to(dtype)
    x2, u = _FIRGate.apply(channels_first(z, dtype), taps.to(dtype), offset, past)
    return x2.permute(1, 2, 0).to(z.dtype), u.permute(1, 2, 0).to(z.dtype)


def fir_gate_stepwise(
    z: Float[Tensor, "b l c"],
    taps: Float[Tensor, "c k"],
    bias: Float[Tensor, " c"] | None = None,
    tail: Float[Tensor, "b t c"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]]:
    """``fir_gate`` with the filter, the bias and the gate each rounded to z's dtype, as in StripedHyena 1 and 2.

    The filter accumulates in float32. For float32 and float64 this is ``fir_gate``, to the bit.
    """
    if compute_dtype(z.dtype) == z.dtype:
        return fir_gate(z, taps, bias, tail)
    filtered = fir(z, taps, None, tail)
    if bias is not None:
        filtered = filtered + bias.to(z.dtype)
    x2, x1, v = filtered.chunk(3, dim=-1)
    return x2, x1 * v


class _FIRGate(torch.autograd.Function):
    @staticmethod
    @full_precision
    def forward(ctx, z: Tensor, taps: Tensor, bias: Tensor | None, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, taps, bias, tail)
        d = z.shape[0] // 3
        pair = _filtered(slice(d, None), z, taps, bias, tail)
        return _filtered(slice(0, d), z, taps, bias, tail), pair[:d] * pair[d:]

    @staticmethod
    @full_precision
    def backward(ctx, dx2: Tensor, du: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        z, taps, bias, tail = ctx.saved_tensors
        d = z.shape[0] // 3
        pair = _filtered(slice(d, None), z, taps, bias, tail)
        dc = torch.empty_like(z)
        dc[:d] = dx2
        torch.mul(du, pair[d:], out=dc[d : 2 * d])
        torch.mul(du, pair[:d], out=dc[2 * d :])
        del pair
        dz, dtaps, dtail = apply_taps_adjoint(dc, z, taps, tail)
        return dz, dtaps, None if bias is None else dc.sum((1, 2)), dtail


def _filtered(part: slice, z: Tensor, taps: Tensor, bias: Tensor | None, tail: Tensor | None) -> Tensor:
    y = apply_taps(z[part], taps[part], None if tail is None else tail[part])
    return y if bias is None else y.add_(bias[part, None, None])
