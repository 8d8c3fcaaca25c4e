"""One compiled call a token of the exact online convolution (crocuta.ops.online_conv, whose buffers these are).

The long buffer lies channels-last in memory: ``torch.zeros(b, p, d).transpose(1, 2)``, so that a token is one row.
The step changes its buffers and takes positions as numbers, so it is a plain call and no registered op: a graph that
holds it would be made anew for every token.
"""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crocuta.errors import StateError
from crocuta.ops.kernels.library import function, library
from crocuta.ops.online_conv import BLOCK, OnlineBuffers, OnlineTaps

_SPECTRUM = "pp" + "iiiii"
_STEP = "pppp"
_SPACE = 9
"""Points that a spectrum is longer than its transform: ``spaced`` of cpp/fft.h."""
_KEPT = 1 << 22
"""Numbers of a tap spectrum that is kept between tiles; larger ones come rarely and are made anew."""


class OnlineFilter:
    """Taps [g k] in the dtype of the sums, as the kernel needs them; spectra are made when first used."""

    def __init__(self, taps: Float[Tensor, "g k"], channels: int) -> None:
        self.plain = OnlineTaps(taps, channels)
        """The same for the torch op, gradients included."""
        self.taps = taps.detach().contiguous()
        self.channels = channels
        self.period = self.plain.period
        self.near = self.plain.near.detach()
        """What an input is multiplied by for the outputs of its own block."""
        self.kept = (ctypes.c_int64 * 64)()
        """Addresses of the spectra that are kept, by the logarithm of their size."""
        self._spectra: dict[int, Tensor] = {}
        self._isa = ""

    def __reduce__(self) -> tuple[object, ...]:
        """Copies and pickles have spectra of their own: addresses mean nothing there."""
        return OnlineFilter, (self.plain.taps, self.channels)

    def prepare(self, place: int) -> None:
        """Make the spectrum that the tile at a place of the period needs, if it is one to be kept."""
        opened = library()
        assert opened is not None
        if opened.isa != self._isa:  # the lanes of its spectra are others
            self._isa = opened.isa
            self._spectra.clear()
            ctypes.memset(self.kept, 0, ctypes.sizeof(self.kept))
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


class Bound:
    """A filter and buffers as the kernel takes them: addresses and sizes (Bound of cpp/online_conv.h)."""

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
        self.taps, self.skip = taps, skip
        self.dtype, self.room, self.shape = buffers.dtype, room, torch.Size((b, 1, d))
        self.rows = b
        with torch.inference_mode(False):  # what is made inside of it could not be written outside
            self._skip = None if skip is None else skip.detach().to(self.dtype).contiguous()
        self._memory = buffers.long, buffers.near, taps.taps, taps.near
        places = [tensor.data_ptr() for tensor in self._memory]
        own = 0 if self._skip is None else self._skip.data_ptr()
        strides = buffers.long.stride(0), buffers.long.stride(2)
        sizes = b, d, g, k, taps.period, room, torch.get_num_threads()
        numbers = [*places, ctypes.addressof(taps.kept), own, *strides, *sizes]
        self._arguments = (ctypes.c_int64 * len(numbers))(*numbers)
        self.address = ctypes.addressof(self._arguments)
        self.begin_block(0)

    def __reduce__(self) -> tuple[object, ...]:
        """Nothing, in a copy or a pickle of the buffers: addresses mean nothing there."""
        return type(None), ()

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
        self._arguments[-1] = torch.get_num_threads()
        opened = library()
        assert opened is not None, "the dispatcher asks for compiled kernels only where there are some"
        self.step = opened.symbol("online_conv_step", self.dtype, _STEP)
        if self.skip is not None and self._skip is not None and self.skip.dtype != self.dtype:
            self._skip.copy_(self.skip.detach())  # a cast does not follow what it was made of
        if start:
            self.taps.prepare(place)


def bound(taps: OnlineFilter, buffers: OnlineBuffers, skip: Float[Tensor, " d"] | None) -> Bound:
    """The filter and the buffers bound to each other, which is done once; raises StateError if they do not fit."""
    known = buffers.bound
    if isinstance(known, Bound) and known.taps is taps and known.skip is skip:
        return known
    buffers.bound = made = Bound(taps, buffers, skip)
    return made


def online_step(
    u: Float[Tensor, "b 1 d"],
    taps: OnlineFilter,
    buffers: OnlineBuffers,
    lengths: Int[Tensor, " b"],
    skip: Float[Tensor, " d"] | None = None,
    starts: list[int] | None = None,
) -> Float[Tensor, "b 1 d"]:
    """The outputs for the next input of each row, which has read ``lengths[row]`` before.

    What ``online_convolution`` of crocuta.ops.online_conv does for one token, in the dtype of the buffers (float32 or
    float64) and back. ``buffers`` are moved on in place, and ``lengths`` (int64 on the CPU) by one; ``starts`` are the
    numbers in it, where the caller has them already. Not differentiable.
    Raises StateError for buffers that do not fit or are full.
    """
    held = bound(taps, buffers, skip)
    starts = lengths.tolist() if starts is None else starts
    if u.shape != held.shape or len(starts) != held.rows:
        raise StateError("the inputs do not fit the buffers", given=tuple(u.shape), expected=tuple(held.shape))
    for start in starts:
        if start % BLOCK == 0:
            held.begin_block(start)
    plain = u.dtype == held.dtype and u.is_contiguous()
    inputs = u if plain else u.to(held.dtype).contiguous()
    y = torch.empty_like(inputs)
    held.step(held.address, inputs.data_ptr(), lengths.data_ptr(), y.data_ptr())
    return y if plain else y.to(u.dtype)
