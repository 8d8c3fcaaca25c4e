"""One compiled call a token of the exact online convolution (crocuta.ops.online_conv, whose buffers these are).

The long buffer lies channels-last in memory: ``torch.zeros(b, p, d).transpose(1, 2)``, so that a token is one row.
The step changes its buffers and takes positions as numbers, so it is a plain call and no registered op: a graph that
holds it would be made anew for every token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from crocuta.errors import StateError
from crocuta.ops.kernels.library import function, library
from crocuta.ops.online_conv import BLOCK, OnlineBuffers, period

_SPECTRUM = "pp" + "iiiii"
_STEP = "pppp"
_SPACE = 9
"""Points that a spectrum is longer than its transform: ``spaced`` of cpp/fft.h."""
_KEPT = 1 << 22
"""Numbers of a tap spectrum that is kept between tiles; larger ones come rarely and are made anew."""


class OnlineFilter:
    """Taps [g k] in the dtype of the sums, as the kernel needs them; spectra are made when first used."""

    def __init__(self, taps: Float[Tensor, "g k"], channels: int) -> None:
        self.taps = taps.detach().contiguous()
        self.channels = channels
        self.period = period(taps.shape[1])
        self.near = self.taps.new_zeros(BLOCK, channels)
        """What an input is multiplied by for the outputs of its own block."""
        first = self.taps[:, :BLOCK].t().repeat_interleave(channels // len(taps), 1)
        self.near[: len(first)] = first
        self.kept = torch.zeros(64, dtype=torch.int64)
        """Addresses of the spectra that are kept, by the logarithm of their size."""
        self.bound: _Bound | None = None
        """The buffers of the last call: most filters serve one state for long."""
        self._spectra: dict[int, Tensor] = {}
        self._isa = ""

    def prepare(self, place: int) -> None:
        """Make the spectrum that the tile at a place of the period needs, if it is one to be kept."""
        opened = library()
        assert opened is not None
        if opened.isa != self._isa:  # the lanes of its spectra are others
            self._isa = opened.isa
            self._spectra.clear()
            self.kept.zero_()
        size = (place & -place) or self.period
        if size in self._spectra:
            return
        (g, k), d, dtype = self.taps.shape, self.channels, self.taps.dtype
        lanes = torch.zeros(1, dtype=torch.int64)
        function("online_conv_lanes", dtype, "p")(lanes)
        vectors = -(-d // int(lanes))
        if vectors * int(lanes) * 2 * size > _KEPT:
            return
        spectrum = self.taps.new_zeros(vectors, size + _SPACE, 2, int(lanes))
        make = function("online_conv_spectrum", dtype, _SPECTRUM)
        make(self.taps, spectrum, size, d, g, k, torch.get_num_threads())
        self._spectra[size] = spectrum
        self.kept[size.bit_length() - 1] = spectrum.data_ptr()


def online_step(
    u: Float[Tensor, "b 1 d"],
    taps: OnlineFilter,
    buffers: OnlineBuffers,
    starts: Sequence[int],
    skip: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "b 1 d"]:
    """The outputs for the next input of each row, which has read ``starts[row]`` before; moves ``buffers`` on in place.

    What ``online_convolution`` of crocuta.ops.online_conv does for one token, in the dtype of the buffers (float32 or
    float64) and back. Not differentiable. Raises StateError for buffers that do not fit or are full.
    """
    bound = taps.bound
    if bound is None or bound.buffers is not buffers or bound.skip is not skip:
        bound = taps.bound = _Bound(taps, buffers, skip)
    if u.shape != bound.shape or len(starts) != bound.rows:
        raise StateError("the inputs do not fit the buffers", given=tuple(u.shape), expected=tuple(bound.shape))
    for row, start in enumerate(starts):
        if start % BLOCK == 0:
            bound.begin_block(start)
        bound.starts[row] = start
    plain = u.dtype == bound.dtype and u.is_contiguous()
    inputs = u if plain else u.to(bound.dtype).contiguous()
    y = torch.empty_like(inputs)
    bound.step(bound.address, inputs, bound.starts_address, y)
    return y if plain else y.to(u.dtype)


class _Bound:
    """A filter and buffers as the kernel takes them: addresses and sizes (Bound of cpp/online_conv.cpp)."""

    def __init__(self, taps: OnlineFilter, buffers: OnlineBuffers, skip: Tensor | None) -> None:
        (b, d, room), (g, k) = buffers.long.shape, taps.taps.shape
        if (d > 1 and buffers.long.stride(1) != 1) or not buffers.near.is_contiguous():
            raise StateError(
                "the buffers of an online convolution have their channels apart",
                given=f"strides {buffers.long.stride()}",
                expected="neighbouring channels",
                fix="make the long one as torch.zeros(b, p, d).transpose(1, 2)",
            )
        if d != taps.channels or not buffers.long.dtype == buffers.dtype == taps.taps.dtype:
            raise StateError(
                "the buffers of an online convolution do not fit its filter",
                given=f"{d} channels in {buffers.dtype}",
                expected=f"{taps.channels} in {taps.taps.dtype}",
            )
        self.taps, self.buffers, self.skip = taps, buffers, skip
        self.dtype, self.room, self.shape = buffers.dtype, room, torch.Size((b, 1, d))
        self.rows, self.starts = b, (ctypes.c_int64 * b)()
        self.step = function("online_conv_step", self.dtype, _STEP)
        self._skip = None if skip is None else skip.detach().to(self.dtype).contiguous()
        held = buffers.long, buffers.near, taps.taps, taps.near, taps.kept, self._skip
        strides = buffers.long.stride(0), buffers.long.stride(2)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in held]
        numbers = [*addresses, *strides, b, d, g, k, taps.period, room, torch.get_num_threads()]
        self.arguments = (ctypes.c_int64 * len(numbers))(*numbers)
        self.address, self.starts_address = ctypes.addressof(self.arguments), ctypes.addressof(self.starts)

    def begin_block(self, start: int) -> None:
        """What must be there when a row begins a block; raises StateError where the buffer has no room for it."""
        place = start % self.taps.period
        if place >= self.room:
            raise StateError(
                "the buffer of an online convolution is full",
                given=f"{start} inputs read, and one more",
                expected=f"at most {self.room}",
                fix="make the state for more tokens",
            )
        self.arguments[-1] = torch.get_num_threads()
        self.step = function("online_conv_step", self.dtype, _STEP)
        if start:
            self.taps.prepare(place)
