"""The Hyena operator with a long filter given by its taps, compiled: short filter, gates and long convolution.

    (x2, x1, v) = FIR(z) + bias,   y = x2 · (h ∗ (x1 · v) + D · (x1 · v))                  (Poli et al. 2023, order 2)

Two kernels, one after the other: the short filter of all three thirds, and the convolution with both gates folded in.
The backward pass filters z again, so that z is all that is kept of what is as long as the sequence.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crocuta.ops.blocks import compute_dtype, full_precision
from crocuta.ops.kernels.fft_conv import FilterSpectrum


@full_precision
def hyena_fft(
    z: Float[Tensor, "b l c"],
    short_taps: Float[Tensor, "c k"],
    short_bias: Float[Tensor, " c"] | None,
    taps: Float[Tensor, "g m"],
    skip: Float[Tensor, " d"] | None = None,
    spectrum: FilterSpectrum | None = None,
) -> Float[Tensor, "b l d"]:
    """y for sequences that start here, c = 3 d, in float32 (or float64), returned in z's dtype.

    Differentiable in all but the spectrum, which is that of the taps for l or more inputs (``filter_spectrum``).
    """
    dtype = compute_dtype(z.dtype)
    tensors = [None if t is None else t.to(dtype) for t in (z, short_taps, short_bias, taps, skip)]
    return torch.ops.crocuta.hyena_fft(*tensors, None if spectrum is None else spectrum.values).to(z.dtype)


# --- the op ---------------------------------------------------------------------------------------------------

_ops = torch.library.Library("crocuta", "FRAGMENT")
_ops.define(
    "hyena_fft(Tensor z, Tensor short_taps, Tensor? short_bias, Tensor taps, Tensor? skip, Tensor? spectrum) -> Tensor"
)
_ops.define(
    "hyena_fft_backward(Tensor dy, Tensor z, Tensor short_taps, Tensor? short_bias, Tensor taps, Tensor? skip)"
    " -> (Tensor dz, Tensor dshort_taps, Tensor dshort_bias, Tensor dtaps, Tensor dskip)"
)


def _forward(
    z: Tensor,
    short_taps: Tensor,
    short_bias: Tensor | None,
    taps: Tensor,
    skip: Tensor | None,
    spectrum: Tensor | None,
) -> Tensor:
    x2, x1, v = torch.ops.crocuta.fir(z, short_taps, short_bias, None, None).chunk(3, dim=-1)
    return torch.ops.crocuta.fft_conv(v, taps, skip, x1, x2, spectrum)


def _backward(
    dy: Tensor, z: Tensor, short_taps: Tensor, short_bias: Tensor | None, taps: Tensor, skip: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x2, x1, v = torch.ops.crocuta.fir(z, short_taps, short_bias, None, None).chunk(3, dim=-1)
    dv, dtaps, dskip, dx1, dx2 = torch.ops.crocuta.fft_conv_backward(dy, v, taps, skip, x1, x2)
    del x2, x1, v
    dthirds = torch.cat([dx2, dx1, dv], dim=-1)
    del dx2, dx1, dv
    dz, dshort, dbias, _, _ = torch.ops.crocuta.fir_backward(dthirds, z, short_taps, None, None)
    return dz, dshort, dbias, dtaps, dskip


def _gradients(dy, z, short_taps, short_bias, taps, skip):
    dbias, dskip = z.new_empty(z.shape[2]), z.new_empty(0 if skip is None else skip.shape)
    return z.new_empty(z.shape), short_taps.new_empty(short_taps.shape), dbias, taps.new_empty(taps.shape), dskip


def _adjoint(ctx, dy):
    given = ctx.saved_tensors  # once: activation checkpointing computes them at the first call and refuses a second
    _, _, bias, _, skip = given
    dz, dshort, dbias, dtaps, dskip = torch.ops.crocuta.hyena_fft_backward(dy, *given)
    return dz, dshort, None if bias is None else dbias, dtaps, None if skip is None else dskip, None


_ops.impl("hyena_fft", _forward, "CPU")
_ops.impl("hyena_fft_backward", _backward, "CPU")
torch.library.register_fake("crocuta::hyena_fft", lambda z, *_: z.new_empty(*z.shape[:2], z.shape[2] // 3), lib=_ops)
torch.library.register_fake("crocuta::hyena_fft_backward", _gradients, lib=_ops)
torch.library.register_autograd(
    "crocuta::hyena_fft",
    _adjoint,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:5]),
    lib=_ops,
)
