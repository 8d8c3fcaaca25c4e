"""Exact causal convolution of inputs that come a few at a time, for filters that no recurrence carries.

    y[t] = Σ_j h[j] · u[t - j] + D · u[t],  where u[t] may depend on y[t - 1]

Each pair (input j, output t) is done once, in a tile (relaxed multiplication, van der Hoeven 2002; "Flash Inference",
Oncescu et al. 2024, and continuous "FutureFill", Agarwal et al. 2024, are this scheme). Let U be the largest power of
two that divides i. Before input i is read, the U inputs before it are carried to the U outputs from i on by one
transform of length 2 U:

    outputs [i, i + U)  +=  inputs [i - U, i) through taps [1, 2 U)

The pair (j, t) belongs to the i in (j, t] that is divisible by the highest power of two. A tile happens every 2 U
tokens, so that L tokens cost O(L log² L) a channel. Tiles below BLOCK are left out: inside a block of BLOCK tokens each
input is added to the later outputs of the block at once.

One buffer holds both what was read and what is still to come: at positions before i the inputs, from i on the part of
the outputs that the tiles so far have brought. Taps beyond P = ``period`` do not exist, so the buffer wraps: at i = P
its P inputs are carried to the next P outputs, in their place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from crocuta.ops.fft_conv import channel_turns, fft_convolution

BLOCK = 64
"""Tokens that are done by direct products; a power of two (docs/decisions.md)."""

_KEPT = 1 << 22
"""Numbers of a tap spectrum that is kept between tiles; larger ones come rarely and are made anew."""
_TURN = 1 << 20
"""Numbers of one transform: more channels than fit are done in turns, which suits the caches."""


class OnlineBuffers:
    """What the convolution remembers, in the dtype of its sums; all zero before the first input. Written in place.

    Both tensors hold inputs at places before the current one, and from it on the part of the outputs that is there.
    """

    def __init__(self, long: Float[Tensor, "b d p"], near: Float[Tensor, "b c d"]) -> None:
        self.long = long
        """All positions, as far as the taps reach (``buffer_length``). The current block is out of date."""
        self.near = near
        """The current block of BLOCK positions."""
        self.dtype = near.dtype
        self.bound: object = None
        """What the compiled step keeps of them (kernels.online_conv)."""
        self._views: list[tuple[Tensor, Tensor] | None] = [None] * BLOCK
        self._rows: list[OnlineBuffers] = []

    def from_place(self, place: int) -> tuple[Tensor, Tensor]:
        """A place's row of ``near`` [b 1 d], and all rows from there on.

        A view costs as much as the arithmetic on it, so each is made once.
        """
        pair = self._views[place]
        if pair is None:
            pair = self._views[place] = self.near[:, place : place + 1], self.near[:, place:]
        return pair

    def row(self, row: int) -> OnlineBuffers:
        """One row, sharing memory."""
        if not self._rows:
            pairs = zip(self.long.split(1), self.near.split(1))
            self._rows = [OnlineBuffers(long, near) for long, near in pairs]
        return self._rows[row]


class OnlineTaps:
    """Taps [g k], accumulated in their own dtype, as blocks and tiles need them; spectra are made when first used."""

    def __init__(self, taps: Float[Tensor, "g k"], channels: int) -> None:
        self.taps = taps
        self.period = period(taps.shape[1])
        near = F.pad(taps[:, :BLOCK], (0, max(0, BLOCK - taps.shape[1]))).repeat_interleave(channels // len(taps), 0)
        self.near = near.t().contiguous()
        """What an input is multiplied by for the outputs of its own block, [c d]."""
        self.steps = [self.near[: BLOCK - place] for place in range(BLOCK)]
        """For an input at each place of a block, what it is multiplied by for the outputs of the rest of the block."""
        self._spectra: dict[int, Tensor] = {}

    def spectrum(self, size: int, groups: slice) -> Tensor:
        """The transform, of length ``size``, of the first ``size`` taps of some groups: complex [groups f]."""
        if len(self.taps) * size > _KEPT:
            return torch.fft.rfft(self.taps[groups, :size], n=size)
        if size not in self._spectra:
            self._spectra[size] = torch.fft.rfft(self.taps[:, :size], n=size)
        return self._spectra[size][groups]


def period(taps: int) -> int:
    """The smallest power of two that is at least ``taps`` and BLOCK."""
    return max(BLOCK, 1 << (taps - 1).bit_length())


def buffer_length(taps: int, longest: int | None) -> int:
    """How long the buffer for so many taps must be if no row gets longer than ``longest``: whole blocks."""
    whole = period(taps)
    return whole if longest is None else min(whole, -(-longest // BLOCK) * BLOCK)


def online_convolution(
    u: Float[Tensor, "b l d"],
    taps: OnlineTaps,
    buffers: OnlineBuffers,
    starts: Sequence[int],
    counts: Sequence[int] | None = None,
    skip: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "b l d"]:
    """The outputs for the next inputs of each row, in u's dtype; ``buffers`` are moved on in place.

    Row r has read ``starts[r]`` inputs before. ``counts[r]`` of its l inputs are real (None: all), the rest is padding
    on the right, whose outputs mean nothing. Sums and transforms are in the dtype of the buffers, float32 or float64.
    Any cutting of the inputs gives the same outputs but for rounding. ``skip`` is D, in u's dtype.
    """
    dtype, inputs = buffers.dtype, u
    if u.dtype != dtype:  # a cast that casts nothing costs as much as arithmetic
        inputs, skip = u.to(dtype), None if skip is None else skip.to(dtype)
    if counts is None and (len(starts) == 1 or len(set(starts)) == 1):
        extend = _step if u.shape[1] == 1 else _extend
        y = extend(inputs, taps, buffers, starts[0], skip)
        return y if inputs is u else y.to(u.dtype)
    y = torch.zeros_like(inputs)
    for row, start in enumerate(starts):  # rows at different places meet tiles of different sizes
        count = inputs.shape[1] if counts is None else counts[row]
        if count:
            y[row : row + 1, :count] = _extend(inputs[row : row + 1, :count], taps, buffers.row(row), start, skip)
    return y.to(u.dtype)


def _extend(u: Tensor, taps: OnlineTaps, buffers: OnlineBuffers, start: int, skip: Tensor | None) -> Tensor:
    """Rows that are all at position ``start``: whole tiles where the inputs fill them, else token by token."""
    outputs, done = [], 0
    while done < u.shape[1]:
        at, left = start + done, u.shape[1] - done
        if at % BLOCK or left < BLOCK:
            width = 1
            outputs.append(_step(u[:, done : done + 1], taps, buffers, at, skip))
        else:
            place = at % taps.period
            width = min((place & -place) or taps.period, 1 << (left.bit_length() - 1))
            outputs.append(_piece(u[:, done : done + width], taps, buffers, at, skip))
        done += width
    return torch.cat(outputs, dim=1)


def _step(
    u: Float[Tensor, "b 1 d"], taps: OnlineTaps, buffers: OnlineBuffers, at: int, skip: Tensor | None
) -> Float[Tensor, "b 1 d"]:
    """One token: added to what is left of its block."""
    place = at % BLOCK
    if place == 0:
        _tile(taps, buffers.long, at)
        buffers.near.copy_(_block(taps, buffers, at))
    row, rest = buffers.from_place(place)
    rest.addcmul_(taps.steps[place], u)
    y = row.clone() if skip is None else torch.addcmul(row, skip, u)  # anew: the row is written again
    row.copy_(u)
    if place == BLOCK - 1:
        _block(taps, buffers, at).copy_(buffers.near)
    return y


def _block(taps: OnlineTaps, buffers: OnlineBuffers, at: int) -> Float[Tensor, "b c d"]:
    """The block that a position lies in, as a view of the long buffer."""
    first = at % taps.period // BLOCK * BLOCK
    return buffers.long[:, :, first : first + BLOCK].transpose(1, 2)


def _piece(
    u: Float[Tensor, "b w d"], taps: OnlineTaps, buffers: OnlineBuffers, at: int, skip: Tensor | None
) -> Float[Tensor, "b w d"]:
    """As many tokens at once as the place they start at is divisible by: no tile from outside ends among them."""
    _tile(taps, buffers.long, at)
    place = at % taps.period
    slots = buffers.long[:, :, place : place + u.shape[1]]
    y = fft_convolution(u, taps.taps, skip) + slots.transpose(1, 2)
    slots.copy_(u.transpose(1, 2))
    return y


def _tile(taps: OnlineTaps, long: Float[Tensor, "b d p"], at: int) -> None:
    """Carry the inputs before ``at`` to the outputs from it on, as far as the tile of that place reaches."""
    if at == 0:
        return
    (b, d, room), place, groups = long.shape, at % taps.period, len(taps.taps)
    size = (place & -place) or taps.period
    begin, end = (place or taps.period) - size, min(place + size, room)
    for channels, own in channel_turns(d, groups, b, 2 * size, _TURN):
        h = taps.spectrum(2 * size, own)
        spectra = torch.fft.rfft(long[:, channels, begin : begin + size], n=2 * size)
        spectra.view(b, len(h), -1, size + 1).mul_(h[:, None])
        carried = torch.fft.irfft(spectra, n=2 * size)[..., size : size + end - place]
        if place:
            long[:, channels, place:end].add_(carried)
        else:  # the buffer is full: its outputs take the place of its inputs
            long[:, channels].copy_(carried)
