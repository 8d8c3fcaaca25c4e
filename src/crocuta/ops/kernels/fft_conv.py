"""Long causal convolution by a compiled FFT over channels-last input, with gates folded in.

Time is cut into blocks, so that any length costs what its own blocks cost (cpp/fft_conv.cpp). The backward pass keeps
the inputs alone and transforms again. A ``FilterSpectrum`` keeps what does not change between calls.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crocuta.errors import InputError
from crocuta.ops.blocks import compute_dtype
from crocuta.ops.kernels.library import contiguous, function, rows_of
from crocuta.ops.kernels.memory import empty

_SPECTRUM = "pp" + "iiiiii"
_FORWARD = "pii" * 3 + "pppp" + "iiiiiiii"
_BACKWARD = "pii" * 4 + "pppppppp" + "iiiiiiii"

_LEAST, _MOST = 6, 16
"""Blocks have 2^6 to 2^16 points."""
_SPACE = 9
"""Points that a block's spectrum is longer than the block: ``spaced`` of cpp/fft.h."""


class FilterSpectrum(NamedTuple):
    """The transform of taps [g k] for sequences up to a length, as the kernel of one instruction set lays it out."""

    values: Tensor
    """[vectors of groups, blocks, block + 9, 2, lanes]."""
    length: int


def fft_conv(
    u: Float[Tensor, "b l d"],
    taps: Float[Tensor, "g k"],
    skip: Float[Tensor, " d"] | None = None,
    gate_in: Float[Tensor, "b l d"] | None = None,
    gate_out: Float[Tensor, "b l d"] | None = None,
    spectrum: FilterSpectrum | None = None,
) -> Float[Tensor, "b l d"]:
    """y = gate_out · (h ∗ w + skip · w) with w = gate_in · u and h = taps; inputs before u are zero.

    In float32 (or float64), y in u's dtype. Differentiable in all but the spectrum; saves its arguments only. Batch and
    time may have any strides. ``spectrum`` is that of these taps (``filter_spectrum``), for l or more inputs. Raises
    InputError for shapes that do not fit one another.
    """
    _check(u, taps, skip, gate_in, gate_out)
    values = None if spectrum is None else fitting(spectrum, u, taps)
    dtype = compute_dtype(u.dtype)
    same = [None if t is None or t.dtype == dtype else t.to(dtype) for t in (u, taps, skip, gate_in, gate_out)]
    given = (u, taps, skip, gate_in, gate_out)
    y = torch.ops.crocuta.fft_conv(*[old if new is None else new for new, old in zip(same, given)], values)
    return y if y.dtype == u.dtype else y.to(u.dtype)


def filter_spectrum(taps: Float[Tensor, "g k"], length: int) -> FilterSpectrum:
    """What a convolution of up to ``length`` inputs with these taps needs of them; to be kept between calls."""
    taps = taps.detach().to(compute_dtype(taps.dtype))
    return FilterSpectrum(_spectrum(taps, length, block_size(length, taps.shape[1])), length)


@functools.cache
def block_size(length: int, taps: int) -> int:
    """The size of blocks that costs least: of transforms of inputs, taps and outputs, and of products of blocks."""

    def cost(levels: int) -> int:
        size = 1 << levels
        blocks, own = -(-length // size), _filter_blocks(length, taps, size)
        products = own * (own + 1) // 2 + (blocks - own) * own
        return (2 * blocks + own) * (3 * levels * size + 100) + 4 * products * size  # multiply-adds; 100 is measured

    return 1 << min(range(_LEAST, _MOST + 1), key=cost)


def _filter_blocks(length: int, taps: int, block: int) -> int:
    """Blocks that the taps fill, as far as there are inputs for them."""
    return -(-min(length, taps) // block)


def _check(u: Tensor, taps: Tensor, skip: Tensor | None, gate_in: Tensor | None, gate_out: Tensor | None) -> None:
    d = u.shape[2]
    if taps.shape[1] == 0:
        raise InputError("a filter has no taps", given=tuple(taps.shape))
    if taps.shape[0] == 0 or d % taps.shape[0]:
        raise InputError("the groups of a filter do not divide the channels", given=f"{taps.shape[0]} of {d}")
    if skip is not None and skip.shape != (d,):
        raise InputError("the skip does not fit the channels", given=tuple(skip.shape), expected=(d,))
    for name, gate in (("gate_in", gate_in), ("gate_out", gate_out)):
        if gate is not None and gate.shape != u.shape:
            raise InputError(f"{name} does not fit its input", given=tuple(gate.shape), expected=tuple(u.shape))


def fitting(spectrum: FilterSpectrum, u: Tensor, taps: Tensor) -> Tensor:
    """The numbers of a spectrum; raises InputError if it was made for other sizes or another instruction set."""
    values, lanes = spectrum.values, _lanes(compute_dtype(u.dtype))
    vectors = -(-taps.shape[0] // lanes)
    if values.dtype != compute_dtype(u.dtype) or (values.shape[0], values.shape[-1]) != (vectors, lanes):
        raise InputError("the spectrum is not of these taps on this machine", fix="make it with filter_spectrum")
    if spectrum.length < u.shape[1]:
        raise InputError(
            "the spectrum is for shorter inputs",
            given=f"one for {spectrum.length} inputs",
            expected=f"one for {u.shape[1]} or more",
            fix="make it with filter_spectrum(taps, length)",
        )
    return values


# --- the op -----------------------------------------------------------------------------------------------------

_ops = torch.library.Library("crocuta", "FRAGMENT")
_ops.define(
    "fft_conv(Tensor u, Tensor taps, Tensor? skip, Tensor? gate_in, Tensor? gate_out, Tensor? spectrum) -> Tensor"
)
_ops.define(
    "fft_conv_backward(Tensor dy, Tensor u, Tensor taps, Tensor? skip, Tensor? gate_in, Tensor? gate_out)"
    " -> (Tensor du, Tensor dtaps, Tensor dskip, Tensor dgate_in, Tensor dgate_out)"
)


def _lanes(dtype: torch.dtype) -> int:
    """Channels of a vector in the instruction set that runs."""
    count = torch.zeros(1, dtype=torch.int64)
    function("fft_conv_lanes", dtype, "p")(count)
    return int(count)


def _spectrum(taps: Tensor, length: int, block: int) -> Tensor:
    (g, k), lanes, blocks = taps.shape, _lanes(taps.dtype), _filter_blocks(length, taps.shape[1], block)
    values = empty(taps, -(-g // lanes), blocks, block + _SPACE, 2, lanes)
    run = function("fft_conv_spectrum", taps.dtype, _SPECTRUM)
    run(taps.contiguous(), values, length, g, k, block, blocks, torch.get_num_threads())
    return values


class FilterBlocks(NamedTuple):
    """The taps [g k] as a kernel wants them for inputs [b l d]: sizes, and spectra where it does not make them."""

    spectrum: Tensor | None
    sizes: tuple[int, ...]
    """b, l, d, g, k, points of a block, blocks of taps, threads."""

    @staticmethod
    def of(taps: Tensor, u: Tensor, spectrum: Tensor | None = None) -> FilterBlocks:
        """``spectrum`` is one that was kept; groups of channels have theirs made once, not by each of their vectors."""
        (b, l, d), (g, k) = u.shape, taps.shape
        block = block_size(l, k) if spectrum is None else spectrum.shape[2] - _SPACE
        if spectrum is None and g != d:
            spectrum = _spectrum(taps, l, block)
        blocks = _filter_blocks(l, k, block) if spectrum is None else spectrum.shape[1]
        return FilterBlocks(spectrum, (b, l, d, g, k, block, blocks, torch.get_num_threads()))


def strided(*tensors: Tensor | None) -> list[Tensor | int | None]:
    """Each tensor [b l d] with its strides of batch and time, as kernels take them."""
    arguments: list[Tensor | int | None] = []
    for tensor in tensors:
        rows = None if tensor is None else rows_of(tensor)
        arguments += [None, 0, 0] if rows is None else [rows, rows.stride(0), rows.stride(1)]
    return arguments


def _convolve(
    u: Tensor,
    taps: Tensor,
    skip: Tensor | None,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    spectrum: Tensor | None,
) -> Tensor:
    y = empty(u, *u.shape)
    if y.numel() == 0:
        return y
    taps, skip = contiguous(taps, skip)
    blocks = FilterBlocks.of(taps, u, spectrum)
    run = function("fft_conv_forward", u.dtype, _FORWARD)
    run(*strided(u, gate_in, gate_out), taps, blocks.spectrum, skip, y, *blocks.sizes)
    return y


def _convolve_backward(
    dy: Tensor, u: Tensor, taps: Tensor, skip: Tensor | None, gate_in: Tensor | None, gate_out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _gradients(dy, u, taps, skip, gate_in, gate_out)
    if u.numel() == 0:
        for output in outputs:
            output.zero_()
        return outputs
    du, dtaps, dskip, dgate_in, dgate_out = [output if output.numel() else None for output in outputs]
    taps, skip = contiguous(taps, skip)
    blocks = FilterBlocks.of(taps, u)
    run = function("fft_conv_backward", u.dtype, _BACKWARD)
    given = *strided(dy, u, gate_in, gate_out), taps, blocks.spectrum, skip
    run(*given, du, dgate_in, dgate_out, dtaps, dskip, *blocks.sizes)
    return outputs


def _gradients(
    dy: Tensor, u: Tensor, taps: Tensor, skip: Tensor | None, gate_in: Tensor | None, gate_out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tensors of the right shapes, empty where an argument is not there."""
    dskip, dgate_in, dgate_out = (
        u.new_empty(0) if argument is None else empty(u, *argument.shape) for argument in (skip, gate_in, gate_out)
    )
    return empty(u, *u.shape), empty(taps, *taps.shape), dskip, dgate_in, dgate_out


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])


def _adjoint(ctx, dy):
    given = ctx.saved_tensors  # once: activation checkpointing computes them at the first call and refuses a second
    gradients = torch.ops.crocuta.fft_conv_backward(dy, *given)
    return *(None if saved is None else d for saved, d in zip(given, gradients)), None


_ops.impl("fft_conv", _convolve, "CPU")
_ops.impl("fft_conv_backward", _convolve_backward, "CPU")
torch.library.register_fake("crocuta::fft_conv", lambda u, *_: u.new_empty(u.shape), lib=_ops)
torch.library.register_fake("crocuta::fft_conv_backward", _gradients, lib=_ops)
torch.library.register_autograd("crocuta::fft_conv", _adjoint, setup_context=_setup, lib=_ops)
