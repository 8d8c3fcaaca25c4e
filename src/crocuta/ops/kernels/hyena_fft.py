"""The Hyena operator with a long filter given by its taps, compiled: short filter, gates and long convolution.

    (x2, x1, v) = FIR(z) + bias,   y = x2 · (h ∗ (x1 · v) + D · (x1 · v))                  (Poli et al. 2023, order 2)

One kernel: what the long convolution reads is filtered, gated and laid out anew in a few columns at a time, and what it
gives is gated, or led back to z, on the way out (cpp/hyena_fft.cpp). Nothing between z and y is a tensor, and z is all
that is kept for the backward pass of what is as long as the sequence.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crocuta.ops.blocks import compute_dtype, full_precision
from crocuta.ops.kernels.fft_conv import FilterBlocks, FilterSpectrum, fitting, strided
from crocuta.ops.kernels.library import contiguous, function
from crocuta.ops.kernels.memory import empty

_FORWARD = "pii" + "ppi" + "pppp" + "iiiiiiii"
_BACKWARD = "pii" * 2 + "ppi" + "pppppppp" + "iiiiiiii"


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

    Differentiable in all but the spectrum, which is that of the taps for l or more inputs (``filter_spectrum``); raises
    InputError where it is not.
    """
    dtype = compute_dtype(z.dtype)
    tensors = [None if t is None else t.to(dtype) for t in (z, short_taps, short_bias, taps, skip)]
    values = None if spectrum is None else fitting(spectrum, z, taps)
    return torch.ops.crocuta.hyena_fft(*tensors, values).to(z.dtype)


# --- the op ---------------------------------------------------------------------------------------------------

_ops = torch.library.Library("crocuta", "FRAGMENT")
_ops.define(
    "hyena_fft(Tensor z, Tensor short_taps, Tensor? short_bias, Tensor taps, Tensor? skip, Tensor? spectrum) -> Tensor"
)
_ops.define(
    "hyena_fft_backward(Tensor dy, Tensor z, Tensor short_taps, Tensor? short_bias, Tensor taps, Tensor? skip)"
    " -> (Tensor dz, Tensor dshort_taps, Tensor dshort_bias, Tensor dtaps, Tensor dskip)"
)


def _check(z: Tensor, short_taps: Tensor, short_bias: Tensor | None, taps: Tensor, skip: Tensor | None) -> int:
    """d; what the kernels read lies inside the tensors."""
    (c, k), (g, m), d = short_taps.shape, taps.shape, z.shape[2] // 3
    assert z.shape[2] == c == 3 * d, f"short taps of {c} of {z.shape[2]} = 3 d channels"
    assert k * g * m, "no taps"
    assert d % g == 0, f"taps of {g} groups for {d} channels"
    assert short_bias is None or short_bias.shape == (c,), f"a bias {tuple(short_bias.shape)} for {c} channels"
    assert skip is None or skip.shape == (d,), f"a skip {tuple(skip.shape)} for {d} channels"
    return d


def _forward(
    z: Tensor,
    short_taps: Tensor,
    short_bias: Tensor | None,
    taps: Tensor,
    skip: Tensor | None,
    spectrum: Tensor | None,
) -> Tensor:
    _check(z, short_taps, short_bias, taps, skip)
    y = empty(z, *z.shape[:2], z.shape[2] // 3)
    if y.numel() == 0:
        return y
    short_taps, short_bias, taps, skip = contiguous(short_taps, short_bias, taps, skip)
    blocks = FilterBlocks.of(taps, y, spectrum)
    short = short_taps, short_bias, short_taps.shape[1]
    run = function("hyena_fft_forward", z.dtype, _FORWARD)
    run(*strided(z), *short, taps, blocks.spectrum, skip, y, *blocks.sizes)
    return y


def _backward(
    dy: Tensor, z: Tensor, short_taps: Tensor, short_bias: Tensor | None, taps: Tensor, skip: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d = _check(z, short_taps, short_bias, taps, skip)
    assert dy.shape == (*z.shape[:2], d), f"gradients {tuple(dy.shape)} of {d} channels"
    gradients = _gradients(dy, z, short_taps, short_bias, taps, skip)
    if z.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    dz, dshort, dbias, dtaps, dskip = gradients
    short_taps, short_bias, taps, skip = contiguous(short_taps, short_bias, taps, skip)
    blocks = FilterBlocks.of(taps, dy)
    short = short_taps, short_bias, short_taps.shape[1]
    run = function("hyena_fft_backward", z.dtype, _BACKWARD)
    given = *strided(dy, z), *short, taps, blocks.spectrum, skip
    run(*given, dz, dshort, dbias, dtaps, None if skip is None else dskip, *blocks.sizes)
    return gradients


def _gradients(
    dy: Tensor, z: Tensor, short_taps: Tensor, short_bias: Tensor | None, taps: Tensor, skip: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tensors of the right shapes; that of D is empty where there is none."""
    dbias, dskip = z.new_empty(z.shape[2]), z.new_empty(0 if skip is None else skip.shape)
    return empty(z, *z.shape), short_taps.new_empty(short_taps.shape), dbias, empty(taps, *taps.shape), dskip


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
