"""Learned taps."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crocuta.config import ExplicitFilterConfig
from crocuta.model.filters.base import Filter, ShortFilter, extend_online, online_state
from crocuta.model.precision import Memo
from crocuta.model.state import FIRState, OnlineState, State
from crocuta.ops.dispatch import Case, choose
from crocuta.ops.fft_conv import fft_convolution
from crocuta.ops.fir import fir, next_tail
from crocuta.ops.kernels import fir as kernels
from crocuta.ops.kernels.hyena_fft import hyena_fft
from crocuta.ops.kernels.online_conv import OnlineFilter
from crocuta.ops.online_conv import buffer_length
from crocuta.types import Hidden


class ExplicitFilter(Filter):
    """Learned taps [g k], under a fixed envelope where the configuration asks for one."""

    def __init__(self, config: ExplicitFilterConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.channels = channels
        self.weight = nn.Parameter(torch.empty(config.groups or channels, config.taps))
        self._is_online = choose(Case(op="fir", length=1, taps=config.taps, continued=True)).name == "online"
        self._memo = Memo()

    def taps(self, length: int) -> Float[Tensor, "g k"]:
        decay = self.config.decay
        taps = self.weight[:, :length]
        if decay is None:
            return taps
        slowest, fastest = (math.log10(rate) for rate in decay.rates)
        rates = torch.logspace(slowest, fastest, len(taps), device=taps.device, dtype=taps.dtype)
        t = torch.arange(taps.shape[1], device=taps.device, dtype=taps.dtype) / max(1, decay.horizon - 1)
        return taps * torch.exp(-rates[:, None] * t)

    def convolve(self, u: Hidden, skip: Tensor | None) -> Hidden:
        taps = self.taps(self.config.taps)
        match choose(Case(op="fir", length=u.shape[1], taps=taps.shape[1])).name:
            case "toeplitz":
                return self._toeplitz(u, skip, None)
            case _:
                return fft_convolution(u, taps, skip)

    def init_state(self, batch: int, max_length: int | None, *, device: torch.device, dtype: torch.dtype) -> State:
        if self._is_online:  # one size for every length: rows of any length can share a state
            length = buffer_length(self.config.taps, None)
            return online_state(batch, self.channels, length, device=device, dtype=dtype)
        return FIRState(torch.zeros(batch, self.config.taps - 1, self.channels, device=device, dtype=dtype))

    def extend(self, u: Hidden, skip: Tensor | None, state: State, lengths: Tensor | None) -> Hidden:
        if isinstance(state, OnlineState):
            return extend_online(self, u, skip, state, lengths, None)
        assert isinstance(state, FIRState)
        y = self._toeplitz(u, skip, state.tail)
        state.tail = next_tail(u, state.tail, lengths)
        return y

    def fuses(self, device: torch.device, length: int, *, continued: bool) -> bool:
        op = "hyena_long" if self._is_online else "hyena_fir"
        case = Case(op=op, length=length, taps=self.config.taps, continued=continued, device=device.type)
        return choose(case).name == "fused"

    def fused(
        self,
        z: Tensor,
        short: ShortFilter,
        skip: Tensor | None,
        state: State | None = None,
        lengths: Tensor | None = None,
    ) -> Hidden:
        taps = self.taps(self.config.taps)
        if self._is_online:
            return hyena_fft(z, short.taps, short.bias, taps, skip)
        x2, u = kernels.fir_gate(z, short.taps, short.bias, short.tail)
        if state is None:
            return x2 * kernels.fir(u, taps, None, None, skip)
        assert isinstance(state, FIRState)
        y = kernels.fir(u, taps, None, state.tail, skip)
        state.tail = next_tail(u, state.tail, lengths)
        return x2 * y

    def _toeplitz(self, u: Hidden, skip: Tensor | None, tail: Tensor | None) -> Hidden:
        y = fir(u, self.taps(self.config.taps), None, tail)
        return y if skip is None else y + skip.to(u.dtype) * u

    def online(self, state: OnlineState) -> OnlineFilter:
        return self._memo.get(
            "online", self._weights(), lambda: OnlineFilter(self.taps(self.config.taps), self.channels)
        )
