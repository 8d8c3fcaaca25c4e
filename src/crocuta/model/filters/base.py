"""What every filter offers, and how those without a recurrence carry their past."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crocuta.model.precision import Float32Module
from crocuta.model.state import OnlineState, State, check_room
from crocuta.ops.kernels.library import library
from crocuta.ops.kernels.online_conv import OnlineFilter, online_step
from crocuta.ops.online_conv import BLOCK, online_convolution
from crocuta.types import Hidden


class ShortFilter(NamedTuple):
    """What stands before the long filter of a Hyena mixer: taps [c k], bias [c], the k - 1 inputs before [b t c]."""

    taps: Tensor
    bias: Tensor | None
    tail: Tensor | None


class Filter(Float32Module):
    """A bank of filters over channels, convolved causally with u [b l d]; ``skip`` [d] adds D · u."""

    def _weights(self) -> list[Tensor]:
        """What taps, tables and spectra are derived from: all parameters. ``parameters()`` takes 20 µs a token."""
        return [p for p in self._parameters.values() if p is not None]

    @abstractmethod
    def taps(self, length: int) -> Float[Tensor, "g k"]:
        """The first taps of the kernel, at most ``length``; tap 0 multiplies the current input."""

    @abstractmethod
    def convolve(self, u: Hidden, skip: Tensor | None) -> Hidden:
        """The whole convolution of sequences that start here."""

    @abstractmethod
    def init_state(self, batch: int, max_length: int | None, *, device: torch.device, dtype: torch.dtype) -> State:
        """The state before the first input."""

    @abstractmethod
    def extend(self, u: Hidden, skip: Tensor | None, state: State, lengths: Tensor | None) -> Hidden:
        """The convolution continued from ``state``, which is updated; inputs past ``lengths[row]`` are padding."""

    def fuses(self, device: torch.device, length: int, *, continued: bool) -> bool:
        """Whether ``fused`` does so many tokens on a device, with a state if they continue a sequence."""
        return False

    def fused(
        self,
        z: Float[Tensor, "b l c"],
        short: ShortFilter,
        skip: Tensor | None,
        state: State | None = None,
        lengths: Tensor | None = None,
    ) -> Hidden:
        """All between the projections of a Hyena mixer in one operator: x2 · (h ∗ (x1·v) + D·(x1·v)) in z's dtype.

        (x2, x1, v) are the thirds of the short filter of z. With a state the sequence goes on from it.
        """
        raise AssertionError("asked for where fuses() is false")

    def online(self, state: OnlineState) -> OnlineFilter:
        """The taps that continue ``state``, which ``init_state`` made, as an online convolution."""
        raise AssertionError("this filter has a recurrence, or few taps")


# --- filters without a recurrence ---


def online_state(batch: int, channels: int, length: int, *, device: torch.device, dtype: torch.dtype) -> OnlineState:
    """Empty buffers for ``length`` inputs a row, float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    long, near = (torch.zeros(batch, c, channels, device=device, dtype=wide) for c in (length, BLOCK))
    return OnlineState(long.transpose(1, 2), near, torch.zeros(batch, dtype=torch.int64))


def extend_online(
    filter_: Filter,
    u: Hidden,
    skip: Tensor | None,
    state: OnlineState,
    lengths: Tensor | None,
    longest: int | None,
) -> Hidden:
    """The online convolution continued on a state whose rows may reach ``longest`` inputs.

    A token of each row goes to the compiled step where there is one, all else to ``online_convolution``.
    """
    starts, tokens, records = state.lengths.tolist(), u.shape[1], torch.is_grad_enabled()
    if longest is not None and max(starts) + tokens > longest:
        check_room(state.lengths, tokens if lengths is None else lengths.cpu(), longest, "filter's")
    if state.filter is None or starts[0] % BLOCK == 0 or records:
        state.filter = filter_.online(state)  # asking whether parameters have changed takes longer than a token
    if tokens == 1 and not records and lengths is None and u.is_cpu and library() and not torch.compiler.is_compiling():
        return online_step(u, state.filter, state.writable(), state.lengths, skip, starts)
    skip = skip if skip is None or skip.dtype == u.dtype else skip.to(u.dtype)
    counts = None if lengths is None else lengths.tolist()
    y = online_convolution(u, state.filter.plain, state.buffers, starts, counts, skip)
    state.lengths.add_(tokens if lengths is None else lengths.cpu())
    return y
