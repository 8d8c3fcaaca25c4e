"""The Hyena mixer: projection, short filter, gate, long filter, gate, projection."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crocuta.config import (
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    FilterConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    RealModalFilterConfig,
)
from crocuta.model.filters import ExplicitFilter, Filter, ImplicitFilter, ModalFilter
from crocuta.model.linear import Linear
from crocuta.model.mixer import Mixer
from crocuta.model.state import FIRState, HyenaState, State
from crocuta.ops.fir import next_tail
from crocuta.ops.gate import fir_gate
from crocuta.types import Hidden


class HyenaMixer(Mixer):
    """y = W_o( x2 · (h ∗ (x1·v) + D·(x1·v)) ), (x2, x1, v) = FIR(W_in x) (Poli et al. 2023; StripedHyena)."""

    def __init__(self, config: HyenaConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.projection = Linear(channels, 3 * channels, bias=config.projection_bias)
        self.short_taps = nn.Parameter(torch.empty(3 * channels, config.short_taps))
        self.short_bias = nn.Parameter(torch.empty(3 * channels)) if config.short_bias else None
        self.filter = build_filter(config.filter, channels)
        self.skip = nn.Parameter(torch.empty(channels)) if config.skip else None
        self.output = Linear(channels, channels, bias=config.output_bias)

    def forward(self, x: Hidden) -> Hidden:
        x2, u = fir_gate(project(x, self.projection), self.short_taps, self.short_bias)
        return unproject(x2 * self.filter.convolve(u, self.skip), self.output)

    def init_state(self, batch: int, max_length: int | None, *, device: torch.device, dtype: torch.dtype) -> HyenaState:
        channels = self.short_taps.shape[0]
        tail = torch.zeros(batch, self.config.short_taps - 1, channels, device=device, dtype=dtype)
        return HyenaState(FIRState(tail), self.filter.init_state(batch, max_length, device=device, dtype=dtype))

    def extend(self, x: Hidden, state: State, lengths: Tensor | None = None) -> Hidden:
        assert isinstance(state, HyenaState)
        z = project(x, self.projection)
        x2, u = fir_gate(z, self.short_taps, self.short_bias, state.short.tail)
        state.short.tail = next_tail(z, state.short.tail, lengths)
        return unproject(x2 * self.filter.extend(u, self.skip, state.long, lengths), self.output)


def build_filter(config: FilterConfig, channels: int) -> Filter:
    """The filter module of a configuration."""
    match config:
        case ExplicitFilterConfig():
            return ExplicitFilter(config, channels)
        case ImplicitFilterConfig():
            return ImplicitFilter(config, channels)
        case ComplexModalFilterConfig() | RealModalFilterConfig():
            return ModalFilter(config, channels)


def project(x: Hidden, linear: nn.Linear) -> Float[Tensor, "b l c"]:
    """W x + bias, laid out with time contiguous: the matrix product transposes for free what a copy would."""
    b, l, _ = x.shape
    flat = x.reshape(b * l, -1).t()
    z = torch.mm(linear.weight, flat) if linear.bias is None else torch.addmm(linear.bias[:, None], linear.weight, flat)
    return z.view(-1, b, l).permute(1, 2, 0)


def unproject(y: Hidden, linear: nn.Linear) -> Hidden:
    """W y + bias for y with time contiguous, back with channels contiguous."""
    b, l, d = y.shape
    flat = y.permute(2, 0, 1).reshape(d, b * l).t()
    out = (
        torch.mm(flat, linear.weight.t()) if linear.bias is None else torch.addmm(linear.bias, flat, linear.weight.t())
    )
    return out.view(b, l, -1)
